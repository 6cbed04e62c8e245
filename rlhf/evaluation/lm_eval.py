"""Evaluates a policy on tasks of EleutherAI's harness: github.com/EleutherAI/lm-evaluation-harness."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import ConfigError
from rlhf.digests import directory_digest

if TYPE_CHECKING:
    from rlhf.generation.policy_model import PolicyModel

BATCH_ROWS = 16
"""Rows per forward pass. Small, because the harness keeps the logits of all of them."""


@dataclass(frozen=True)
class Harness:
    """The settings `evaluate.lm_eval*`."""

    tasks: Sequence[str]
    """Names of tasks, groups or tags."""
    folder: Path | None
    """Folder of task files; None for the harness's own tasks, whose data it downloads."""
    limit: int | None
    """Largest number of questions per task; None for all."""

    def check(self) -> None:
        """Check that the package and the tasks exist.

        Raises:
            ConfigError: the package or a task is missing.
        """
        if find_spec("lm_eval") is None:
            raise ConfigError("evaluate.lm_eval needs lm-eval: pip install -e '.[lm_eval]'.")
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(
                f"evaluate.lm_eval_tasks={self.folder}: there is no such folder. Name a folder "
                "with lm-eval's task files (*.yaml)."
            )
        known = self._manager().all_tasks
        unknown = [name for name in self.tasks if name not in known]
        if unknown:
            where = f"in evaluate.lm_eval_tasks={self.folder}" if self.folder else "in this lm-eval"
            near = f": {', '.join(known)}" if len(known) < 20 else "; `lm_eval ls tasks` lists them"
            raise ConfigError(f"evaluate.lm_eval: there is no task {unknown[0]} {where}. Known{near}.")

    def digest(self) -> str:
        """The harness's version, and a digest of the folder: together they determine the figures."""
        version = importlib.metadata.version("lm_eval")
        return version if self.folder is None else f"{version} {directory_digest(self.folder)}"

    def fetch(self) -> None:
        """Download the tasks' data, if they are not on this machine.

        Raises:
            ConfigError: the data cannot be downloaded.
        """
        try:
            self._manager().load(list(self.tasks))
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"evaluate.lm_eval={','.join(self.tasks)}: {str(error).splitlines()[0].rstrip('.')}. lm-eval "
                "downloads its tasks' data: check the network, or set evaluate.lm_eval_tasks to a folder of "
                "task files whose data are on this machine."
            ) from None

    def measure(self, policy: PolicyModel) -> dict[str, float]:
        """`lm_eval/TASK/METRIC` of all tasks and groups, as the harness defines them; no chat template."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        results: Any = simple_evaluate(
            HFLM(pretrained=policy.model, tokenizer=policy.tokenizer, batch_size=BATCH_ROWS),
            tasks=list(self.tasks),
            task_manager=self._manager(),
            limit=self.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        metrics = {}
        for task, figures in results["results"].items():
            for name, value in figures.items():
                metric, comma, filter_name = name.partition(",")
                if comma and not metric.endswith("_stderr"):
                    metric = metric if filter_name == "none" else name
                    metrics[f"lm_eval/{task}/{metric}"] = float(value)
        return metrics

    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.folder, include_defaults=self.folder is None)
