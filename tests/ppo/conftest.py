"""Learners of the tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from helpers.ppo import SMALL, MakeTrainer, length, ppo_job, ppo_learner, ppo_stage
from rlhf.data.schema import SftRow
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rewards.reward import Reward


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> MakeTrainer:
    """Make a trainer: always the same weights, data and random numbers."""
    made: list[PolicyTrainer] = []

    def trainer(*overrides: str, reward: Reward = length, mix_rows: Sequence[SftRow] = ()) -> PolicyTrainer:
        torch.manual_seed(0)
        job = ppo_job(tmp_path / str(len(made)), tiny_model)
        made.append(ppo_learner(ppo_stage(*SMALL, *overrides), job, reward, mix_rows))
        return made[-1]

    return trainer
