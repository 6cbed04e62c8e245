"""Rewards are asked before anything trains, whatever the stage that names them reads."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from helpers.jobs import on_cpu, tiny_base
from rlhf.config import ConfigError
from rlhf.data.prepared import PreparedData
from rlhf.pipeline.fields import Reads
from rlhf.pipeline.job import Job
from rlhf.pipeline.rehearsal import TEST_ANSWER, rehearse_rewards
from rlhf.pipeline.stage import Stage
from rlhf.rewards.http import RewardServerConfig


class ReadsNothing(Stage):
    def reads(self) -> Reads:
        return Reads(rewards={"reads_nothing.reward": "python:never_finite:score"})

    def run(self, job: Job) -> Mapping[str, float]:
        raise AssertionError("nothing runs here")


def test_a_stage_that_reads_no_data_has_its_reward_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    code = "def score(prompts, responses):\n    return [float('nan')] * len(responses)\n"
    (tmp_path / "never_finite.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    server = RewardServerConfig(timeout=1.0, retries=0)
    stages, console = [ReadsNothing(gates={})], Console(file=io.StringIO())
    with pytest.raises(ConfigError, match=rf"never_finite:score gave nan for the response '{TEST_ANSWER}'"):
        rehearse_rewards(stages, PreparedData(tmp_path), tiny_base(tiny_model), on_cpu(), server, console)
