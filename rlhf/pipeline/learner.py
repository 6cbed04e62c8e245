"""A model that a stage trains, and the one loop that trains it.

Every stage that trains uses it: with fixed data (SFT, the reward model, DPO) and with what it samples (policy
gradients). The loop continues from the newest checkpoint, counts steps with bad numbers, measures the model
when that is due, and saves the best weights.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

from torch import Tensor, nn

from rlhf.config import ConfigError
from rlhf.models.peft.attach import count_parameters
from rlhf.rewards.reward import RewardError
from rlhf.training.engine import Groups
from rlhf.training.make_engine import make_engine

if TYPE_CHECKING:
    from rlhf.pipeline.job import Job

Batch = TypeVar("Batch")
Measured = TypeVar("Measured", bound=tuple[Tensor, ...])

MAX_BAD_IN_A_ROW = 3
"""Consecutive steps with a gradient that is not finite, after which a stage with fixed data ends."""


class HaltError(Exception):
    """The run must end. A step raises it before it has learned anything; a measurement may raise it too. The
    next run repeats that step or measurement. Every rank raises it. Its text says why, and what to do."""


class Stateful(Protocol):
    """State that changes while a stage trains, besides weights and optimizer. Every checkpoint holds it. If a
    step raises `HaltError`, the checkpoint holds the state before that step."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""


@dataclass
class Evaluations(Generic[Measured]):
    """When and how a model is measured while it trains, and the measurements."""

    kind: type[Measured]
    """A named tuple of tensors."""
    measure: Callable[[], Measured]
    """Measures the model as it is, and logs it."""
    is_better: Callable[[Measured, Measured], bool]
    """Whether the first measurement is better than the second, on the half of the rows that chooses
    weights."""
    steps: Collection[int]
    """The steps after which the model is measured. It is also measured before the first step."""
    results: dict[str, Measured] = field(default_factory=dict)
    """The measurements `first`, `last` and `best`."""
    best_step: int = 0
    measured_step: int = 0
    """The step of `last`."""

    def state_dict(self) -> dict[str, Any]:
        """The measurements so far."""
        results = {name: tuple(each) for name, each in self.results.items()}
        return {"found": results, "best_step": self.best_step, "measured_step": self.measured_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self.results = {name: self.kind(*each) for name, each in state["found"].items()}
        self.best_step, self.measured_step = state["best_step"], state["measured_step"]

    def __post_init__(self) -> None:
        if not (
            isinstance(self.kind, type) and issubclass(self.kind, tuple) and hasattr(self.kind, "_fields")
        ):
            raise TypeError(
                f"Evaluations(kind={self.kind!r}): it must be a NamedTuple of tensors, such as "
                "class Found(NamedTuple): loss_B: Tensor"
            )

    @property
    def first(self) -> Measured:
        """The measurement before the first step."""
        return self.results["first"]

    @property
    def last(self) -> Measured:
        """The newest measurement."""
        return self.results["last"]

    @property
    def best(self) -> Measured:
        """The measurement of the weights that are published."""
        return self.results["best"]


class Learner:
    """A model in the engine that `zero=` selects. The first call of `restore`, `once` or `fit` brings it to
    the state of the newest checkpoint."""

    def __init__(
        self, job: Job, model: nn.Module, groups: Groups, *, published: nn.Module, in_turns: bool = False
    ) -> None:
        """Args:
        groups, in_turns: as in `make_engine`.
        published: the part of the model that the stage publishes.
        """
        self.job, self.compute, self.published = job, job.compute, published
        self.trained_parameters, _ = count_parameters(published)  # before they are sharded
        self.engine = make_engine(model, groups, job.compute, job.checkpoints.newest, in_turns=in_turns)
        self.done = 0
        """Number of steps taken."""
        self.bad_steps = 0
        """Steps from which nothing, or not everything, was learned: the stage counts them with
        `count_bad`."""
        self.rates: list[float] = []
        """The learning rates of the current step, by group."""
        self.last_bad_reason, self._bad_in_a_row = "", 0
        self._values: dict[str, Any] = {}
        self._evaluations: Evaluations[Any] | None = None
        self._state: Stateful | None = None
        self._checkpoint: dict[str, Any] | None = None
        self._is_restored, self._has_fit = False, False

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """A value that is computed once, before the first step, and saved in every checkpoint: tensors,
        numbers and containers of them."""
        self.restore()
        if name not in self._values:
            self._values[name] = measure()
        return self._values[name]

    def fit(
        self,
        batches: Sequence[Batch],
        step: Callable[[Batch], Mapping[str, float]],
        *,
        rows: Callable[[Batch], Iterable[Mapping[str, Any]]],
        state: Stateful | None = None,
        evaluations: Evaluations[Any] | None = None,
        first_steps: Mapping[int, int] = MappingProxyType({}),
        max_bad_steps: int | None = None,
        advice: str = "",
        note: Callable[[Mapping[str, float]], str] = lambda metrics: (
            f"loss {metrics.get('loss', math.nan):.3f}"
        ),
    ) -> None:
        """Take the remaining steps, one for each batch. Call it only once: for two phases, give it the
        batches of both.

        Args:
            step: learns a batch with `engine.step`, and returns what is logged.
            rows: the rows of a batch as the user knows them, to save a batch that cannot be learned from.
            state: other state that changes while the model trains.
            evaluations: when to measure, besides before the first step. The best weights are published.
            first_steps: as in `Engine.set_rates`.
            max_bad_steps: largest number of bad steps; None: the stage ends after three in a row whose
                gradient is not finite.
            advice: what to do against too many bad steps, as a sentence.
            note: the text to show for a step if there is no panel.

        Raises:
            ConfigError: training cannot continue; the newest checkpoint holds what was learned before.
            RewardError: the reward does not answer. The next run repeats the step.
            Stopped: a signal came; a checkpoint is written.
        """
        if self._has_fit:
            raise RuntimeError("Learner.fit was called before. Give all batches to one call.")
        self._has_fit, self._state, self._evaluations = True, state, evaluations
        is_resumed = self.restore()
        if is_resumed and max_bad_steps is not None and self.bad_steps > max_bad_steps:
            raise ConfigError(
                f"{self.job.stage}.max_bad_steps={max_bad_steps}: {self.bad_steps} steps were skipped, "
                f"the last one was step {self.done}. Raise it to continue after them."
            )
        if not is_resumed and evaluations is not None:
            self._evaluate(evaluations, saves_on_error=False)
        job = self.job
        bar = job.progress.task(f"{job.stage}: training", len(batches), is_main=True)
        with bar as task, job.checkpoints.training(len(batches)):
            task.skip(self.done)
            self._evaluate_if_due()  # the previous run may have ended in it
            for number in range(self.done + 1, len(batches) + 1):
                batch = batches[number - 1]
                self.begin(number, len(batches), first_steps)
                before = self._state_dict(copy=True)
                try:
                    metrics = step(batch)
                except (ConfigError, HaltError, RewardError) as halt:
                    if isinstance(halt, ConfigError) and self.compute.world_size > 1:
                        raise  # perhaps on this rank only: saving needs all ranks, and would hang
                    job.checkpoints.save(self.done, self.engine, before)
                    if not isinstance(halt, HaltError):
                        raise
                    self._end(number, rows(batch), str(halt), "takes this step again, with the same answers")
                job.log({"lr": self.rates[0], **metrics}, number)
                self.done = number
                self._end_if_bad(partial(rows, batch), max_bad_steps, advice)
                if job.checkpoints.keeps_last and number == len(batches):  # a longer run may not measure here
                    job.checkpoints.save(number, self.engine, self._state_dict())
                self._evaluate_if_due()
                task.advance(1, note(metrics))
                job.checkpoints.after_step(number, self.engine, self._state_dict())

    def begin(
        self, number: int, num_steps: int, first_steps: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        """Set the rates of a step, counted from 1."""
        self.compute.position["step"] = number
        self.rates = self.engine.set_rates(number - 1, num_steps, first_steps=first_steps)

    def count_bad(self, reason: str) -> None:
        """Report and count the current step as bad: some of it was skipped.

        Args:
            reason: a sentence. It may quote an answer.
        """
        self.bad_steps += 1
        self.last_bad_reason = reason
        self.warn(f"step {self.job.compute.position['step']} skipped: {reason}")

    def warn(self, text: str) -> None:
        """Print a warning. It may quote an answer, so brackets are no markup."""
        self.job.progress.console.print(
            f"{self.job.stage}: {text}", highlight=False, markup=False, style="yellow"
        )

    @contextmanager
    def weights(self) -> Iterator[Path]:
        """A directory with the trained weights to publish, for `publish_policy`, as long as the context is
        open: the best weights, or without evaluations the current ones. Every rank calls it."""
        if self._evaluations is None:
            # with this name the store removes it together with the scratch directory, if a crash leaves it
            directory = self.job.directory.with_name(f"{self.job.directory.name}.trained")
            self.engine.save_trained(self.published, directory)
            try:
                yield directory
            finally:
                if self.compute.is_main:
                    shutil.rmtree(directory, ignore_errors=True)  # on NFS its files may still be mapped
            return
        if self._evaluations.best_step == 0:
            self.job.progress.console.print(
                f"{self.job.stage}: no evaluation in {self.done} steps was better than the one before the "
                "first step, so the policy that is published is the one that it started from.",
                style="yellow", highlight=False, soft_wrap=True,
            )  # fmt: skip
        yield self.job.checkpoints.best

    def restore(self) -> bool:
        """Load the newest checkpoint, once. Returns whether there is one."""
        if not self._is_restored:
            self._is_restored = True
            checkpoint = self.job.checkpoints.restore(self.engine)
            if checkpoint is not None:  # copied, because its file is mapped
                self._checkpoint = _copied(checkpoint)
                self.done, self.bad_steps = self._checkpoint["done"], self._checkpoint["bad_steps"]
                self._values = self._checkpoint["values"]
        if self._checkpoint is None:
            return False
        for name, each in (("state", self._state), ("evaluations", self._evaluations)):
            if each is not None and name in self._checkpoint:
                each.load_state_dict(self._checkpoint.pop(name))
        return True

    def _state_dict(self, *, copy: bool = False) -> dict[str, Any]:
        state: dict[str, Any] = {"done": self.done, "bad_steps": self.bad_steps, "values": self._values}
        for name, each in (("state", self._state), ("evaluations", self._evaluations)):
            if each is not None:
                state[name] = each.state_dict()
        return _copied(state) if copy else state

    def _evaluate(self, evaluations: Evaluations[Any], *, saves_on_error: bool) -> None:
        """Measure the model. With `saves_on_error`, a checkpoint is written if it cannot be measured.

        Raises:
            ConfigError, RewardError: it cannot be measured.
        """
        try:
            new = evaluations.measure()
        except (HaltError, RewardError) as halt:
            if saves_on_error:
                self.job.checkpoints.save(self.done, self.engine, self._state_dict())
            if isinstance(halt, RewardError):
                raise
            raise ConfigError(
                f"{self.job.stage}: measured after step {self.done}: {halt}. All that was learned so far is "
                "kept: the same command measures again."
            ) from None
        evaluations.results |= {"last": new} | ({} if "first" in evaluations.results else {"first": new})
        evaluations.measured_step = self.done
        if "best" not in evaluations.results or evaluations.is_better(new, evaluations.best):
            self.job.checkpoints.keep_best(self.engine, self.published)
            evaluations.results["best"], evaluations.best_step = new, self.done

    def _evaluate_if_due(self) -> None:
        """Measure the model after the last step, if that is due and not yet done.

        Raises:
            ConfigError, RewardError: it cannot be measured. The step is saved; the next run measures first.
        """
        evaluations = self._evaluations
        if (
            evaluations is None
            or self.done not in evaluations.steps
            or evaluations.measured_step == self.done
        ):
            return
        self._evaluate(evaluations, saves_on_error=True)

    def _end_if_bad(
        self, rows: Callable[[], Iterable[Mapping[str, Any]]], limit: int | None, advice: str
    ) -> None:
        """End the stage if too many steps were bad, with a checkpoint after the last step."""
        name, step = self.job.stage, self.done
        if limit is not None:
            if self.bad_steps > limit:
                self.job.checkpoints.save(step, self.engine, self._state_dict())
                reason = (
                    f"{self.bad_steps} steps were skipped, more than {name}.max_bad_steps={limit}; the last "
                    f"because {self.last_bad_reason} {advice}"
                )
                self._end(step, rows(), reason, "continues after this step")
            return
        is_bad = not math.isfinite(self.engine.grad_norm)
        self._bad_in_a_row = self._bad_in_a_row + 1 if is_bad else 0
        if self._bad_in_a_row == MAX_BAD_IN_A_ROW:
            self.job.checkpoints.save(step, self.engine, self._state_dict())
            path = self.job.dump(f"step{step}", rows())
            raise ConfigError(
                f"{name}: in step {step} and the {MAX_BAD_IN_A_ROW - 1} before it the gradients were not "
                f"finite; nothing was learned from them. The last batch is in {path}. Fix the data, lower "
                f"{name}.optim.lr, or try precision=fp32."
            )

    def _end(self, step: int, rows: Iterable[Mapping[str, Any]], reason: str, then: str) -> NoReturn:
        """Write the batch to a file and end.

        Args:
            then: what the same command does with a higher limit.

        Raises:
            ConfigError: always.
        """
        path = self.job.dump(f"step{step}", rows)
        raise ConfigError(
            f"{self.job.stage}: step {step}: {reason}. Its batch is in {path}. All that was learned so far "
            f"is kept: the same command stops here again; with a higher limit it {then}."
        )


def _copied(value: Any) -> Any:
    """The value, with copies of the tensors in it."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value
