"""`*.optim.*`: how a stage's optimizer steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

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
    warmup_steps: NonNegativeInt | None = Field(default=None, exclude_if=lambda value: value is None)
    """Number of these steps, instead of `warmup_fraction`; null uses the fraction. With schedule=constant a
    longer run then continues a shorter one: docs/store.md."""
    max_grad_norm: PositiveFloat
    """Gradients with a larger norm are scaled down to it."""

    @property
    def has_open_end(self) -> bool:
        """Whether no step's rate depends on the number of steps, as `schedule` and `warmup_steps` say."""
        return self.schedule == "constant" and self.warmup_steps is not None

    def num_warmup_steps(self, num_steps: int) -> int:
        """Steps in which the rate rises, of a run of `num_steps`."""
        return round(num_steps * self.warmup_fraction) if self.warmup_steps is None else self.warmup_steps
