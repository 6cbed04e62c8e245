"""`*.optim.*`: how a stage's optimizer steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from rlhf.config import Strict

Schedule = Literal["linear", "cosine", "constant"]


class OptimConfig(Strict):
    """AdamW and its schedule. The stage's YAML has the defaults."""

    lr: float = Field(gt=0, allow_inf_nan=False)
    """The highest learning rate of the schedule."""
    weight_decay: NonNegativeFloat
    """Decoupled weight decay per step, multiplied by the learning rate. Only matrices decay, not biases and
    norms."""
    eps: PositiveFloat
    """Added to the square root of Adam's second moment."""
    schedule: Schedule
    """The learning rate after the warm-up: it falls to 0 linearly or along half a cosine, or stays
    constant."""
    warmup_fraction: float = Field(ge=0, lt=1)
    """Share of the steps, at the start, in which the rate rises from 0."""
    max_grad_norm: PositiveFloat
    """Gradients with a larger norm are scaled down to it."""
