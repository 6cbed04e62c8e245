"""What the checks of tests/gpu share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from helpers.encoded import answers_of
from helpers.jobs import TINY, small_job, tiny_base, user
from helpers.trained import trained_weights
from rlhf.data.schema import SftRow
from rlhf.distributed.compute import Compute, Zero, leave_group, make_compute
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel
from rlhf.supervised.answers import answer_step
from rlhf.training.config import OptimConfig
from rlhf.training.make_engine import make_engine

OneRank = Callable[[Zero, str], Compute]
"""By `zero=` and the name of a dtype."""


class Reaches(Protocol):
    """Note a figure; fail where it misses its bound."""

    def __call__(self, what: str, value: float, *, at_most: float = ..., at_least: float = ...) -> None: ...


def error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Relative, over all elements of all tensors."""
    left, right = (torch.cat([x.detach().float().cpu().flatten() for x in xs]) for xs in (found, wanted))
    return float((left - right).norm() / right.norm())


OPTIM = OptimConfig(
    lr=1e-3, weight_decay=0.0, eps=1e-8, schedule="constant", warmup_fraction=0.0, max_grad_norm=1.0
)
ROWS = [SftRow(user(f"{n}?"), "rain on the roof " * n) for n in (1, 4, 2, 3)]


def go_on(model: Path, directory: Path, compute: Compute, *, steps: int) -> dict[str, Tensor]:
    """SFT of a model from the checkpoint in a directory, if there is one, to a step, whose checkpoint is
    written; the weights."""
    base = tiny_base(model)
    tokenizer = base.load_tokenizer()
    rows = answers_of(tokenizer, ROWS)
    job = small_job(
        "sft", directory / f"to-{steps}-{compute.device.type}", base, compute=compute,
        checkpoints=directory / "checkpoints", keep=9,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = load_causal_lm(model, TINY, compute.dtype, compute.loads_on)
    checkpoints = job.checkpoints
    engine = make_engine(ResponseModel(policy), [(policy.parameters(), OPTIM)], compute, checkpoints.newest)
    state = checkpoints.restore(engine)
    for step in range(0 if state is None else state["step"], steps):
        engine.set_rates(step, 10)
        answer_step(engine, rows, 1000, compute)
    checkpoints.save(steps, engine, {"step": steps})
    return trained_weights(engine, policy)


def main(model: str, directory: str, zero: Zero, steps: str) -> None:
    """`go_on` on the CPU, in a process that knows no GPU; weights.pt in the directory."""
    compute, _ = make_compute("cpu", "fp32", zero)
    weights = go_on(Path(model), Path(directory), compute, steps=int(steps))
    torch.save(weights, Path(directory) / "weights.pt")
    leave_group(compute)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]  # its caller's words
