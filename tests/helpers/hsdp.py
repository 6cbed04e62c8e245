"""What one of four ranks does in test_hsdp.py: they take themselves for two nodes of two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from helpers.encoded import answers_of
from helpers.jobs import TINY, small_job, tiny_base, user
from rlhf.config import ConfigError
from rlhf.data.schema import SftRow
from rlhf.distributed.compute import Compute, check_nodes
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel
from rlhf.supervised.answers import answer_step
from rlhf.training.config import OptimConfig
from rlhf.training.make_engine import make_engine

OPTIM = OptimConfig(
    lr=1e-3, weight_decay=0.1, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=0.5
)
ROWS = [SftRow(user(f"{n}?"), "rain on the roof " * n) for n in (1, 4, 2, 3)]


def train(compute: Compute, model: Path, directory: Path, name: str, *, steps: int) -> dict[str, float]:
    """SFT to a step, from the checkpoint in the directory, if there is one; a checkpoint after each step, and
    the weights in a directory of that name.

    Returns:
        Losses and gradient norms of the steps taken, and how many files a checkpoint has of the engine.
    """
    base = tiny_base(model)
    rows = answers_of(base.load_tokenizer(), ROWS)
    job = small_job(
        "sft", directory / f"{name}-{compute.rank}", base, compute=compute,
        checkpoints=directory / "checkpoints", keep=9,
    )  # fmt: skip
    policy = load_causal_lm(model, TINY, compute.dtype, compute.loads_on, compute)
    groups = [(policy.parameters(), OPTIM)]
    engine = make_engine(ResponseModel(policy), groups, compute, job.checkpoints.newest)
    state = job.checkpoints.restore(engine)
    figures: dict[str, float] = {}
    for step in range(0 if state is None else state["step"], steps):
        engine.set_rates(step, 10)
        figures[f"loss {step}"] = answer_step(engine, rows, 150, compute)["loss"]
        figures[f"norm {step}"] = engine.grad_norm
        job.checkpoints.save(step + 1, engine, {"step": step + 1})
    engine.save_trained(policy, directory / name)
    figures["files"] = len(list((directory / "checkpoints" / "step-00000001").glob("fsdp-*")))
    return figures


def first_start(compute: Compute, model: Path, directory: Path) -> dict[str, dict[str, float]]:
    """Three steps through; and one, whose checkpoint two later starts go on from."""
    refused = unequal(compute)
    here = replace(compute, zero="hsdp", node_ranks=2)
    return {
        "through": train(here, model, directory / "through", "weights", steps=3),
        "first": train(here, model, directory / "again", "first", steps=1),
        "refused": {refused: 1.0},
    }


def second_start(compute: Compute, model: Path, directory: Path) -> dict[str, dict[str, float]]:
    """On the same nodes; and on a single one of four ranks."""
    return {
        name: train(
            replace(compute, zero="hsdp", node_ranks=ranks), model, directory / name, "weights", steps=3
        )
        for name, ranks in (("same", 2), ("other", 4))
    }


def unequal(compute: Compute) -> str:
    """What is said where the last node has a rank more."""
    try:
        check_nodes(compute.rank, compute.world_size, 1 if compute.is_main else 3)
    except ConfigError as error:
        return str(error)
    return "nothing"
