"""The chain from Python: in a script, a notebook or a thread, as from the command line.

import rlhf

run = rlhf.run(rlhf.compose("recipe=dpo", "model=tiny"))
run.metrics                              # a pandas.DataFrame: one row for each logged step
run.policy().generate(["How was it?"])   # answers
run.report                               # the path of its page
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.cli.run_files import RunFiles
from rlhf.config import ConfigError
from rlhf.exit_codes import CONFIG_ERROR, DONE, GATE_FAILED, INTERRUPTED, STOPPED

if TYPE_CHECKING:
    import pandas

    from rlhf.cli.chat import Manner
    from rlhf.data.schema import Message
    from rlhf.generation.policy_model import PolicyModel

COMPOSING = threading.Lock()
"""Hydra has one state for a process."""


def compose(*overrides: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """The config that `python -m rlhf OVERRIDES` would run, as plain values.

    Args:
        overrides: as they are typed: `recipe=dpo`, `ppo.kl.coef=0.02`, `+experiment=path/to/mine.yaml`.
        config_dir: a directory with more YAML files, as `--config-dir` names it.

    Raises:
        ConfigError: a key or a value that there is not. `run` checks the values as a whole.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from rlhf.cli.messages import in_our_words, not_chosen, readable
    from rlhf.pipeline.recipe import as_typed

    arguments = readable(overrides)
    if config_dir is not None:
        arguments = [*arguments, f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"]
    try:
        with COMPOSING, hydra.initialize_config_module("rlhf.conf", version_base="1.3"):
            node = hydra.compose("config", overrides=arguments)
            found = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(as_typed(in_our_words(error, arguments))) from None
    assert isinstance(found, dict)
    config = {str(key): value for key, value in found.items()}
    if complaint := next(not_chosen(config), None):
        raise ConfigError(complaint)
    return config


def run(config: Mapping[str, Any], *, quiet: bool = False) -> FinishedRun:
    """Run a config as `python -m rlhf` does: what is in the store is reused, what was interrupted goes on.
    In the main thread, Ctrl-C (a notebook's "interrupt") finishes the current step and saves it first.

    Runs of one process take turns. Several ranks (`launch.processes=2`, several GPUs) and DeepSpeed get
    processes of their own.

    Args:
        config: of `compose`. Keys may have been changed.
        quiet: print nothing.

    Raises:
        ConfigError: the config, data or a model cannot be used.
        GateError: a gate failed. All that was finished is kept, and `open_run` shows it.
        KeyboardInterrupt: it was interrupted. The same call continues.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "rlhf.run starts its ranks by itself (launch.processes=N), and this process is one of several "
            "ranks already. Under torchrun or srun, use python -m rlhf."
        )
    from rlhf.cli.execute import print_lead, run_chain, set_up_libraries
    from rlhf.cli.launcher import launch, ranks_wanted

    set_up_libraries()
    from rlhf.distributed.compute import make_compute
    from rlhf.distributed.signals import StopSignals
    from rlhf.pipeline.experiment import build_experiment
    from rlhf.pipeline.run import GateError
    from rlhf.pipeline.runner import Pipeline
    from rlhf.report.summary import print_summary
    from rlhf.tracking.redaction import RedactingConsole

    experiment = build_experiment(config)
    settings = experiment.settings
    name = settings.run_name or datetime.now().strftime("%Y%m%d-%H%M%S")
    directory, processes = Path(settings.runs_dir, name), ranks_wanted(settings.launch, settings.device)
    if processes > 1 or settings.zero != "none":
        _check_ended(launch(config, directory, processes), directory)
        return FinishedRun(directory)
    # plain lines in a notebook, which says of itself that it is a terminal (FORCE_COLOR), and has no cursor
    console = RedactingConsole(quiet=quiet, force_jupyter=False, force_terminal=sys.stdout.isatty())
    signals = StopSignals()
    with signals.installed():
        compute, how = make_compute(settings.device, settings.precision)
        signals.on_gpu = compute.device_name.startswith("cuda")
        print_lead(experiment, directory, how, console)
        pipeline = Pipeline(experiment, name, console, compute, signals)
        try:
            run_chain(pipeline, console)
        except GateError:
            print_summary(pipeline.results, console)
            raise
        print_summary(pipeline.results, console)
    return FinishedRun(directory)


def open_run(directory: str | Path) -> FinishedRun:
    """The results of a run that has ended, such as `open_run("runs/demo")`."""
    return FinishedRun(Path(directory))


def _check_ended(code: int, directory: Path) -> None:
    """Raise what ended the ranks."""
    from rlhf.pipeline.run import GateError

    if code == GATE_FAILED:
        raise GateError(f"A gate failed: rlhf.open_run({str(directory)!r}).verdict")
    if code in (INTERRUPTED, STOPPED):
        raise KeyboardInterrupt
    if code == CONFIG_ERROR:
        raise ConfigError(f"{directory}: see what rank 0 printed, and {directory / 'ranks'}.")
    if code != DONE:
        raise RuntimeError(f"A rank crashed (exit code {code}): see {directory / 'ranks'}.")


class FinishedRun:
    """What a run made, read from its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = RunFiles(directory)

    def __repr__(self) -> str:
        said = " ".join(filter(None, (self.outcome and f"{self.outcome}.", self.verdict)))
        return f"<run {self.directory}: {said or 'nothing in it is judged'}>"

    @property
    def outcome(self) -> str | None:
        """`worked`, `no gain worth having`, `did not work` or `cannot be told`; None where nothing is
        judged."""
        found: str | None = self._files.summary["outcome"]
        return found

    @property
    def verdict(self) -> str:
        """What improved, what did not, and what to look at: a line each."""
        return self._files.summary["verdict"] or ""

    @property
    def summary(self) -> dict[str, float]:
        """The summary metrics of all stages, such as `ppo/held_out_score_gain`; NaN for one that is not
        finite."""
        stages = self._files.summary["stages"].values()
        metrics = {name: value for stage in stages for name, value in stage["metrics"].items()}
        return {name: float("nan") if value is None else value for name, value in metrics.items()}

    @property
    def metrics(self) -> pandas.DataFrame:
        """What the stages logged: a row for each step, with the columns `stage` and `step`, and one for each
        metric, without the stage's name."""
        import pandas

        rows: dict[tuple[str, int], dict[str, Any]] = {}
        with (self.directory / "metrics.jsonl").open(encoding="utf-8") as file:
            for line in map(json.loads, file):
                if "step" in line:
                    stage, step = line["stage"], line["step"]
                    row = rows.setdefault((stage, step), {"stage": stage, "step": step})
                    named = (key for key in line if key.startswith(f"{stage}/"))
                    row |= {key.removeprefix(f"{stage}/"): line[key] for key in named}
        return pandas.DataFrame([*rows.values()], columns=None if rows else ["stage", "step"])

    @property
    def report(self) -> Path:
        """Its page, report.html, for a browser."""
        return self.directory / "report.html"

    @property
    def policies(self) -> list[str]:
        """The stages that made a policy, in the chain's order."""
        return self._files.policies

    def policy(self, name: str = "") -> Policy:
        """A policy of the run, loaded, on the run's device and in its precision.

        Args:
            name: the stage that made it, or `base`; without one, what `evaluate` judged, or the last one.

        Raises:
            ConfigError: there is none of that name, or its files are damaged.
        """
        from rlhf.cli.chat import Manner, settings_of
        from rlhf.cli.execute import set_up_libraries
        from rlhf.config import validated

        set_up_libraries()
        from rlhf.cli.speaker import load_policy
        from rlhf.distributed.compute import make_compute
        from rlhf.pipeline.runner import TURN

        manner = validated(Manner, settings_of(self._files, {}), "")
        chosen = name if name == "base" else self._files.chosen_policy(name)
        with TURN:
            compute, _ = make_compute(manner.device, manner.precision)
            return Policy(chosen, load_policy(chosen, self._files, compute), manner)


class Policy:
    """A policy that answers, by the local engine."""

    def __init__(self, name: str, model: PolicyModel, manner: Manner) -> None:
        self.name = name
        self.model = model.model
        """transformers' model."""
        self.tokenizer = model.tokenizer
        """transformers' tokenizer, with the chat template that the policy learned."""
        self._policy, self._manner = model, manner

    def __repr__(self) -> str:
        return f"<policy {self.name}>"

    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """One answer to each prompt. What is not given is as when the run judged its policies.

        Args:
            prompts: a user's message each, or a conversation (`[{"role": "user", "content": "..."}]`).
            temperature: 0 for the likeliest token each time.

        Raises:
            ConfigError: a prompt does not fit the model's context, or the values cannot be used.
        """
        import torch

        from rlhf.config import validated
        from rlhf.data.chat_template import prompt_ids

        if isinstance(prompts, str):
            raise ConfigError("generate: give a list of prompts, such as generate(['How was it?']).")
        given = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
        }  # fmt: skip
        changed = {key: value for key, value in given.items() if value is not None}
        manner = validated(type(self._manner), {**self._manner.model_dump(), **changed}, "generate")
        turns: list[list[Message]] = [
            [{"role": "user", "content": each}] if isinstance(each, str) else [*each] for each in prompts
        ]
        if not turns:
            return []
        longest = max(len(prompt_ids(self.tokenizer, each)) for each in turns)
        if longest + manner.max_new_tokens > self._policy.context_length:
            raise ConfigError(
                f"generate: a prompt has {longest} tokens, and the model reads "
                f"{self._policy.context_length}, of which max_new_tokens={manner.max_new_tokens} are left "
                "for an answer. Give shorter prompts, or lower max_new_tokens."
            )
        _, texts = self._policy.sample(
            turns, max_new_tokens=manner.max_new_tokens, temperature=manner.temperature, top_p=manner.top_p,
            generator=torch.Generator().manual_seed(manner.seed),
        )  # fmt: skip
        return texts
