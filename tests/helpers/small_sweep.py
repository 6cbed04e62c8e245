"""A sweep of PPO by a rule, and what it left."""

from __future__ import annotations

import json
from typing import Any

from small_chain import Chain, Outcome

BY_RULE = ("stage=ppo", "ppo.reward=vader", "ppo.critic.init=sft", "ppo.score.normalize=running")


def sweep_file(chain: Chain, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((chain.directory / "runs" / name / "sweep.json").read_text())
    return found


def trial_run(chain: Chain, name: str, number: int) -> Outcome:
    return Outcome(0, "", "", chain.directory / "runs" / f"{name}-{number}")


def finished(chain: Chain, stage: str) -> int:
    """How many artifacts of a stage there are."""
    return len(list((chain.directory / "store" / stage).glob("*/manifest.json")))


def submitit_sweep_arguments(launcher: str, *settings: str) -> list[str]:
    """Four PPO trials that need the same SFT model, as submitit's jobs, two at once."""
    return [
        "-m", *BY_RULE, f"hydra/launcher={launcher}", *(f"hydra.launcher.{each}" for each in settings),
        "sweep.parallel=2", "sweep.metric=ppo/held_out_score", "run_name=jobs",
        "ppo.kl.coef=0.01,0.02,0.03,0.04",
    ]  # fmt: skip


def check_submitit_sweep(chain: Chain) -> None:
    """All are done, and the SFT model was trained once."""
    content = sweep_file(chain, "jobs")
    assert [trial["status"] for trial in content["trials"]] == ["done"] * 4
    ran = [trial_run(chain, "jobs", number).statuses["sft"] for number in range(4)]
    assert sorted(ran) == ["ran", "reused", "reused", "reused"]
    assert (finished(chain, "sft"), finished(chain, "ppo")) == (1, 4)
