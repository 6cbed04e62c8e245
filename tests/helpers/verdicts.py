"""Runs with figures that are set by hand, and their verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from helpers.experiments import build
from rlhf.config import Bound
from rlhf.data.mount import Mount
from rlhf.data.roles import ROLES, Roles
from rlhf.data.sources import SourceConfig
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.fields import Reads
from rlhf.pipeline.graph import in_order
from rlhf.pipeline.metrics import Metric
from rlhf.pipeline.run import GateResult, Run
from rlhf.pipeline.stage import Stage
from rlhf.report import verdict as judging
from rlhf.stages.merge import MergeStage

NAMES = {
    "sft": ("sft", "held_out_loss_change"), "reward": ("reward", "accuracy_over_baseline"),
    "ppo": ("ppo", "held_out_score_gain"), "gold": ("evaluate", "gold_gain/ppo"),
    "learned": ("evaluate", "score_gain/ppo"), "of_sft": ("evaluate", "gold_gain/sft"),
    "dpo": ("dpo", "margin"), "gold_dpo": ("evaluate", "gold_gain/dpo"),
    "gold_merge": ("evaluate", "gold_gain/merge"),
}  # fmt: skip
UP, DOWN, NONE, UNKNOWN = (0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.0, 0.0, 0.0), (0.1, -0.1, 0.3)
GOOD = {"sft": DOWN, "reward": UP, "ppo": UP, "gold": UP, "learned": UP}


class OwnStage(MergeStage):
    """A stage from outside the package that makes a policy of the SFT model's."""

    title: ClassVar[str] = "DPO"

    data: SourceConfig | None = None

    def reads(self) -> Reads:
        return Reads(stages=("prepare", "sft"))


class JudgedStage(OwnStage):
    """It says what it is for."""

    metrics: ClassVar[Mapping[str, Metric]] = {
        "margin": Metric(
            better="higher",
            purpose="{title}'s margin on held-out pairs",
        )
    }


def verdict(run: Run) -> str:
    """In one line."""
    return judging.verdict(run).replace("\n", " ")


def mounted(name: str, stage: Stage, roles: Roles = ROLES) -> Stage:
    """The stage under this name, in a config with these roles."""
    stage.model_post_init(Mount(name, roles))
    return stage


def chain_of(own: type[Stage] = OwnStage, *overrides: str) -> dict[str, Stage]:
    """The packaged stages, merge(dpo), and the stage from outside behind those it reads."""
    stages = dict(build("model=tiny", *overrides).stages)
    stages["dpo"] = mounted("dpo", own.model_construct(gates={}))
    stages["merge"] = mounted("merge", MergeStage.model_construct(policy="dpo", alpha=0.5, gates={}))
    return in_order(stages)


def run_of(directory: Path, chain: dict[str, Stage], **figures: tuple[float, float, float]) -> Run:
    """A run that measured these, each with its interval."""
    stages: dict[str, dict[str, Any]] = {"prepare": {"metrics": {"prepare/sft_rows": 9.0}}}
    for name, figure in figures.items():
        stage, metric = NAMES[name]
        metrics = stages.setdefault(stage, {"metrics": {}})["metrics"]
        metrics |= {f"{stage}/{key}": value for key, value in Sampled(*figure, 30).metrics(metric).items()}
    return Run(directory, stages, chain=chain)


LENGTH = Bound(min=0.5, max=1.5, advice="reward the right length")
PERPLEXITY = Bound(max=1.15, advice="lower sft.optim.lr")


def gate_of(run: Run, stage: str, name: str, bound: Bound, value: float, policies: str = "") -> None:
    """A gate on a figure with a narrow interval, and the same figure of each policy named."""
    sampled = Sampled(value, value - 0.01, value + 0.01, 96)
    for policy in policies.split():
        metrics = run.stages.setdefault(stage, {"metrics": {}})["metrics"]
        metrics |= {f"{stage}/{key}": each for key, each in sampled.metrics(f"{name}/{policy}").items()}
    run.gates.append(GateResult(stage, name, value, bound, sampled))
