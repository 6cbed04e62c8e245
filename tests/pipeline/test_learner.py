"""The training loop: steps that are not finite are skipped; several in a row end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from helpers.jobs import on_cpu, small_job, tiny_base
from rlhf.config import ConfigError
from rlhf.distributed.signals import Stopped
from rlhf.pipeline.job import Job
from rlhf.pipeline.learner import Evaluations, HaltError, Learner
from rlhf.training.config import OptimConfig

OPTIM = OptimConfig(
    lr=0.1, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1e9
)
NAN = math.nan


def as_rows(batch: Sequence[float]) -> Iterator[dict[str, Any]]:
    """A batch as the user knows it."""
    return ({"number": str(number)} for number in batch)


class Bench:
    """One number that learns from batches of numbers: the loss is their sum times it."""

    def __init__(self, directory: Path, **checkpoint: Any) -> None:
        base = tiny_base(directory)
        kept = directory.with_name("checkpoints")
        self.job: Job = small_job("sft", directory, base, checkpoints=kept, **checkpoint)
        self.model = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.model.weight.fill_(5.0)
        groups = [(self.model.parameters(), OPTIM)]
        self.learner = Learner(self.job, self.model, groups, published=self.model)
        self.engine = self.learner.engine
        self.seen: list[Sequence[float]] = []

    @property
    def weight(self) -> float:
        return self.model.weight.item()

    def step(self, batch: Sequence[float]) -> dict[str, float]:
        self.seen.append(batch)
        loss = sum(batch) * self.model.weight.sum()
        self.engine.backward(loss, last=True)
        self.engine.step()
        return {"loss": float(loss.detach()), "grad_norm": self.engine.grad_norm}

    def train(self, batches: Sequence[Sequence[float]], evaluations: Evaluations[Any] | None = None) -> None:
        self.noted = self.learner.once("noted", lambda: self.weight)
        self.learner.fit(batches, self.step, rows=as_rows, evaluations=evaluations)

    def logged(self) -> list[dict[str, Any]]:
        lines = (self.job.directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def test_each_batch_is_one_step_with_its_rate(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "job")
    batches = [[1.0], [0.5, 0.5], [1.0], [3.0, -2.0]]
    bench.train(batches)
    assert bench.seen == batches
    assert bench.weight == pytest.approx(5.0 - 0.1 * (4 + 3 + 2 + 1) / 4, abs=1e-4)
    lines = bench.logged()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["sft/lr"] for line in lines] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert [line["sft/grad_norm"] for line in lines] == pytest.approx([1.0] * 4)
    assert lines[0]["sft/loss"] == 5.0


def test_three_steps_in_a_row_that_are_not_finite_end_the_stage(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "job")
    with pytest.raises(ConfigError) as error:
        bench.train([[1.0], [NAN], [math.inf], [2.0, NAN, 3.0], [1.0], [1.0]])
    dumped = bench.job.run_directory / "sft-step4.jsonl"
    assert str(error.value) == (
        "sft: in step 4 and the 2 before it the gradients were not finite; nothing was learned from them. "
        f"The last batch is in {dumped}. Fix the data, lower sft.optim.lr, or try precision=fp32."
    )
    assert len(bench.seen) == 4
    assert bench.weight == pytest.approx(4.9, abs=1e-4)  # as after the first batch
    rows = [json.loads(line) for line in dumped.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"number": "2.0"}, {"number": "nan"}, {"number": "3.0"}]


def test_behind_what_ended_it_the_same_command_goes_on(tmp_path: Path) -> None:
    batches = [[1.0], [NAN], [NAN], [NAN], [1.0], [1.0]]
    first = Bench(tmp_path / "first")
    with pytest.raises(ConfigError, match="in step 4"):
        first.train(batches)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    second = Bench(tmp_path / "second")
    second.train(batches)
    assert second.seen == batches[4:]
    assert second.engine.skipped_steps == 3
    assert second.weight == pytest.approx(5.0 - 0.1 * (6 + 2 + 1) / 6, abs=1e-4)
    assert [line["step"] for line in second.logged()] == [1, 2, 3, 4, 5, 6]  # told once each


def test_a_good_step_between_bad_ones_forgives_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "job")
    bench.train([[NAN], [NAN], [1.0], [NAN], [NAN]])
    assert bench.engine.skipped_steps == 4
    assert not list(bench.job.run_directory.glob("sft-step*"))


def test_a_signal_waits_for_the_step_and_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [[1.0], [2.0], [3.0]]
    first = Bench(tmp_path / "first")
    step = first.step

    def interrupted(batch: Sequence[float]) -> dict[str, float]:
        if batch == [2.0]:
            first.job.checkpoints.signals._handle(15, None)  # what the operating system would call
        return step(batch)

    monkeypatch.setattr(first, "step", interrupted)
    with pytest.raises(Stopped) as stop:
        first.train(batches)
    assert stop.value.signum == 15
    assert first.seen == [[1.0], [2.0]]
    second, through = Bench(tmp_path / "second"), Bench(tmp_path / "through" / "job")
    for bench in (second, through):
        bench.train(batches)
    assert second.seen == [[3.0]]
    assert second.noted == 5.0  # not its weight after two steps
    assert second.weight == through.weight


def test_checkpoints_come_as_often_as_asked_and_the_newest_stay(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "job", every_steps=2, keep=2)
    bench.train([[1.0]] * 7)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000004", "step-00000006",
    ]  # fmt: skip


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path: Path) -> None:
    batches = [[1.0]] * 5
    Bench(tmp_path / "first", every_steps=2).train(batches)
    damaged = tmp_path / "checkpoints" / "step-00000004" / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    second = Bench(tmp_path / "second")
    second.train(batches)
    assert len(second.seen) == 3  # from step 2 on
    assert [path.name[:21] for path in (tmp_path / "checkpoints").glob("damaged-*")] == [
        "damaged-step-00000004"
    ]


class Counter:
    """Counts of the steps, as a `Stateful` that does not copy."""

    def __init__(self) -> None:
        self.count, self.seen = torch.zeros(()), list[float]()

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def counted(directory: Path, limit: float) -> Counter:
    """Train on three batches; a step whose batch reaches the limit ends the run."""
    bench, counter = Bench(directory), Counter()

    def step(batch: Sequence[float]) -> dict[str, float]:
        counter.count += 1
        counter.seen += batch
        if batch[0] >= limit:
            raise HaltError("it is too much. Raise sft.limit")
        return bench.step(batch)

    batches = [[1.0], [2.0], [3.0]]
    bench.learner.fit(batches, step, rows=lambda batch: [{"number": batch}], state=counter)
    return counter


def test_a_step_that_must_not_be_learned_from_is_taken_again_from_where_it_began(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"sft: step 2: it is too much\. Raise sft\.limit\. Its batch is in"
    ):
        counted(tmp_path / "first", 2.0)
    counter = counted(tmp_path / "second", math.inf)
    assert counter.seen == [1.0, 2.0, 3.0] and counter.count == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_that_may_be_of_one_rank_alone_is_not_waited_for(tmp_path: Path, ranks: int) -> None:
    """All ranks save together: one that raised by itself would wait for ever."""
    bench = Bench(tmp_path / "job")
    bench.learner.compute = on_cpu(world_size=ranks)

    def step(batch: Sequence[float]) -> dict[str, float]:
        if batch == [2.0]:
            raise ConfigError("sft.data: this rank's row is wrong")
        return bench.step(batch)

    with pytest.raises(ConfigError, match="this rank's row"):
        bench.learner.fit([[1.0], [2.0]], step, rows=as_rows)
    saved = [path.name for path in (tmp_path / "checkpoints").glob("step-*")]
    assert saved == (["step-00000001"] if ranks == 1 else [])


class Weight(NamedTuple):
    """The bench's weight, as a measurement."""

    weight: Tensor


def evaluations(bench: Bench, limit: float, measured: list[int]) -> Evaluations[Weight]:
    """The lowest weight is the best; notes the steps after which it was measured."""

    def measure() -> Weight:
        if bench.learner.done >= limit:
            raise HaltError("it is too far. Raise sft.limit")
        measured.append(bench.learner.done)
        return Weight(torch.tensor(bench.weight))

    return Evaluations(Weight, measure, lambda new, best: bool(new.weight < best.weight), steps={2, 3})


def test_what_a_checkpoint_holds_is_not_measured_again(tmp_path: Path) -> None:
    batches = [[1.0]] * 3
    through = list[int]()
    bench = Bench(tmp_path / "first", every_steps=2)
    bench.train(batches, evaluations(bench, math.inf, through))
    second, resumed = Bench(tmp_path / "second"), list[int]()
    found = evaluations(second, math.inf, resumed)
    second.train(batches, found)
    assert (through, resumed) == ([0, 2, 3], [3])
    assert found.first.weight == 5.0 and found.best_step == 3


def test_a_measurement_that_must_end_the_run_keeps_what_was_learned(tmp_path: Path) -> None:
    first = Bench(tmp_path / "first")
    with pytest.raises(
        ConfigError, match=r"sft: measured after step 2: it is too far\. Raise sft\.limit\. All"
    ):
        first.train([[1.0]] * 3, evaluations(first, 2, []))
    second = Bench(tmp_path / "second")
    found = evaluations(second, math.inf, [])
    second.train([[1.0]] * 3, found)
    assert len(second.seen) == 1 and found.best_step == 3
    assert found.first.weight == 5.0 and found.best.weight == found.last.weight == second.weight


def test_fit_is_called_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "job")
    bench.train([[1.0]])
    with pytest.raises(RuntimeError, match="Give all batches to one call"):
        bench.train([[1.0], [2.0]])


def test_resume_can_be_refused(tmp_path: Path) -> None:
    Bench(tmp_path / "first", every_steps=1).train([[1.0]] * 3)
    second = Bench(tmp_path / "second", resume=False)
    second.train([[1.0]] * 3)
    assert len(second.seen) == 3
