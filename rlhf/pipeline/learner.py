"""A model that a stage trains, and the one loop that trains it.

Every stage that trains uses it: with fixed data (SFT, the reward model, DPO) and with what it samples (policy
gradients). The loop continues from the newest checkpoint, counts steps with bad numbers, measures the model
when that is due, and keeps the weights that were the best.
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
"""A stage with fixed data ends after so many steps in a row whose gradient is not finite."""


class HaltError(Exception):
    """The run must end: raised in a step, from which nothing was learned then, or in a measurement. The next
    run takes that up again. Every rank raises it. Its text says why, and what to do."""


class Stateful(Protocol):
    """What changes while a stage trains, beside weights and optimizer. Every checkpoint holds it: where a
    step raises `HaltError`, as it was before that step."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""


@dataclass
class Evaluations(Generic[Measured]):
    """When and how a model is measured while it trains, and what was found."""

    kind: type[Measured]
    """A named tuple of tensors."""
    measure: Callable[[], Measured]
    """Measures the model as it is, and logs it."""
    is_better: Callable[[Measured, Measured], bool]
    """Whether the first one is better than the second: on the half of the rows that chooses the weights."""
    steps: Collection[int]
    """The steps after which it is due, beside the measurement before the first step."""
    found: dict[str, Measured] = field(default_factory=dict)
    """`first`, `last` and `best`."""
    best_step: int = 0
    measured_step: int = 0
    """The step of `last`."""

    def state_dict(self) -> dict[str, Any]:
        """What was found."""
        found = {name: tuple(each) for name, each in self.found.items()}
        return {"found": found, "best_step": self.best_step, "measured_step": self.measured_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self.found = {name: self.kind(*each) for name, each in state["found"].items()}
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
        """Before the first step."""
        return self.found["first"]

    @property
    def last(self) -> Measured:
        """The newest one."""
        return self.found["last"]

    @property
    def best(self) -> Measured:
        """Of the weights that are published."""
        return self.found["best"]


class Learner:
    """A model under the engine that `zero=` asks for. `restore`, `once` or `fit`, whichever comes first,
    brings it to where the newest checkpoint left it."""

    def __init__(
        self, job: Job, model: nn.Module, groups: Groups, *, published: nn.Module, in_turns: bool = False
    ) -> None:
        """Args:
        groups, in_turns: as of `make_engine`.
        published: the part of the model that the stage publishes.
        """
        self.job, self.compute, self.published = job, job.compute, published
        self.trained_parameters, _ = count_parameters(published)  # before they are sharded
        self.engine = make_engine(model, groups, job.compute, job.checkpoints.newest, in_turns=in_turns)
        self.done = 0
        """Steps that are taken."""
        self.bad_steps = 0
        """Steps from which nothing, or not all, was learned, as the stage counts them (`count_bad`)."""
        self.rates: list[float] = []
        """The learning rates of the current step, by group."""
        self.last_bad, self._bad_in_a_row = "", 0
        self._values: dict[str, Any] = {}
        self._evaluations: Evaluations[Any] | None = None
        self._state: Stateful | None = None
        self._found: dict[str, Any] | None = None
        self._is_restored, self._has_fit = False, False

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """A value that is computed before the first step, and that every checkpoint holds: tensors, numbers
        and containers of them."""
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
        """Take the steps that are left, one for each batch. It is called once: two phases are two stretches
        of the same batches.

        Args:
            step: learns a batch with `engine.step`, and returns what is logged.
            rows: a batch as the user knows it, for the file of one that could not be learned from.
            state: what else changes meanwhile.
            evaluations: measured before the first step, and when it is due. The best weights are published.
            first_steps: as of `Engine.set_rates`.
            max_bad_steps: so many steps the stage may count as bad; None: no three in a row may have a
                gradient that is not finite.
            advice: what to do against too many, as a sentence.
            note: what is shown of a step where there is no panel.

        Raises:
            ConfigError: too much went wrong; what was learned before is in the newest checkpoint.
            RewardError: the reward does not answer. The next run takes the step again.
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
            self._evaluate(evaluations, keeps=False)
        job = self.job
        bar = job.progress.task(f"{job.stage}: training", len(batches), is_main=True)
        with bar as task, job.checkpoints.training(len(batches)):
            task.skip(self.done)
            self._evaluate_if_due()  # it may be what ended the run before
            for number in range(self.done + 1, len(batches) + 1):
                batch = batches[number - 1]
                self.begin(number, len(batches), first_steps)
                before = self._state_dict(copy=True)
                try:
                    metrics = step(batch)
                except (ConfigError, HaltError, RewardError) as halt:
                    if isinstance(halt, ConfigError) and self.compute.world_size > 1:
                        raise  # perhaps on this rank alone, and all ranks save together
                    job.checkpoints.save(self.done, self.engine, before)
                    if not isinstance(halt, HaltError):
                        raise
                    self._end(number, rows(batch), str(halt), "takes this step again, with the same answers")
                job.log({"lr": self.rates[0], **metrics}, number)
                self.done = number
                self._end_if_bad(partial(rows, batch), max_bad_steps, advice)
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
        """Report and count the current step, of which something was skipped.

        Args:
            reason: a sentence. It may quote an answer.
        """
        self.bad_steps += 1
        self.last_bad = reason
        self.warn(f"step {self.job.compute.position['step']} skipped: {reason}")

    def warn(self, text: str) -> None:
        """Print it. It may quote an answer, so brackets are no markup."""
        self.job.progress.console.print(
            f"{self.job.stage}: {text}", highlight=False, markup=False, style="yellow"
        )

    @contextmanager
    def weights(self) -> Iterator[Path]:
        """While open, a directory with the trained weights that are published, for `publish_policy`: the best
        ones, or without evaluations those of now. Every rank calls it."""
        if self._evaluations is None:
            # by this name the store removes it with the artifact's directory, if it is left behind
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
        """Continue from the newest checkpoint, once. Whether there is one."""
        if not self._is_restored:
            self._is_restored = True
            found = self.job.checkpoints.restore(self.engine)
            if found is not None:  # copied: its file is mapped
                self._found = _copied(found)
                self.done, self.bad_steps = self._found["done"], self._found["bad_steps"]
                self._values = self._found["values"]
        if self._found is None:
            return False
        for name, each in (("state", self._state), ("evaluations", self._evaluations)):
            if each is not None and name in self._found:
                each.load_state_dict(self._found.pop(name))
        return True

    def _state_dict(self, *, copy: bool = False) -> dict[str, Any]:
        state: dict[str, Any] = {"done": self.done, "bad_steps": self.bad_steps, "values": self._values}
        for name, each in (("state", self._state), ("evaluations", self._evaluations)):
            if each is not None:
                state[name] = each.state_dict()
        return _copied(state) if copy else state

    def _evaluate(self, evaluations: Evaluations[Any], *, keeps: bool) -> None:
        """Measure the model. `keeps`: if it cannot be measured, a checkpoint is written first.

        Raises:
            ConfigError, RewardError: it cannot be measured.
        """
        try:
            found = evaluations.measure()
        except (HaltError, RewardError) as halt:
            if keeps:
                self.job.checkpoints.save(self.done, self.engine, self._state_dict())
            if isinstance(halt, RewardError):
                raise
            raise ConfigError(
                f"{self.job.stage}: measured after step {self.done}: {halt}. All that was learned so far is "
                "kept: the same command measures again."
            ) from None
        evaluations.found |= {"last": found} | ({} if "first" in evaluations.found else {"first": found})
        evaluations.measured_step = self.done
        if "best" not in evaluations.found or evaluations.is_better(found, evaluations.best):
            self.job.checkpoints.keep_best(self.engine, self.published)
            evaluations.found["best"], evaluations.best_step = found, self.done

    def _evaluate_if_due(self) -> None:
        """Measure the model of the last step, if that is due and not done.

        Raises:
            ConfigError, RewardError: it cannot be measured. The step is kept; the next run measures first.
        """
        evaluations = self._evaluations
        if (
            evaluations is None
            or self.done not in evaluations.steps
            or evaluations.measured_step == self.done
        ):
            return
        self._evaluate(evaluations, keeps=True)

    def _end_if_bad(
        self, rows: Callable[[], Iterable[Mapping[str, Any]]], limit: int | None, advice: str
    ) -> None:
        """End the stage if too many steps were bad. The checkpoint is behind the last one."""
        name, step = self.job.stage, self.done
        if limit is not None:
            if self.bad_steps > limit:
                self.job.checkpoints.save(step, self.engine, self._state_dict())
                reason = (
                    f"{self.bad_steps} steps were skipped, more than {name}.max_bad_steps={limit}; the last "
                    f"because {self.last_bad} {advice}"
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
    """With copies of the tensors in it."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value
