"""What one of several ranks does in test_sampling_by_layers.py: all passes of models that do not train."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from helpers.jobs import small_job, tiny_base, user
from helpers.spawned import each_case
from rlhf.compare.retrieval import embeddings
from rlhf.data.schema import PromptRow, QuestionRow, TextRow
from rlhf.distributed.compute import Compute, Zero
from rlhf.evaluation.reference_loss import reference_losses
from rlhf.evaluation.retention import retention
from rlhf.pipeline.job import Job


class Case(NamedTuple):
    """How the weights are spread, and how the local engine samples from them."""

    zero: Zero
    sampling: Literal["whole", "layers"]
    model: str
    """Name of a directory."""


NEW, BATCH = 12, 2
COUNTS = (0, 1, 3, 7)
"""Rows: none, fewer than ranks, and so many that ranks decode one batch more than others."""


def prompts(count: int) -> list[Any]:
    """Of uneven lengths."""
    return [user("rain on the roof " * (1 + 7 * number % 5)) for number in range(count)]


def found(job: Job, model: Path, reward: Path) -> dict[str, Any]:
    """By name, what a policy and a reward model say; of which all ranks have the same."""
    policy = job.policy(model)
    said: dict[str, Any] = {}
    for count in COUNTS:
        rollout, texts = policy.sample(
            prompts(count), max_new_tokens=NEW, temperature=1.0, batch_rows=BATCH,
            generator=torch.Generator().manual_seed(count),
        )  # fmt: skip
        said[f"texts {count}"] = texts
        if count:
            assert rollout.sampled_logp is not None
            said[f"sampled {count}"] = [float(each.sum()) for each in rollout.sampled_logp]
            logp_BR = policy.log_probabilities(rollout, 1.0, 150)
            said[f"read {count}"] = logp_BR.sum(-1).tolist()
    rows: list[TextRow | QuestionRow] = [
        TextRow("It rained. " * 9, "a"),
        TextRow("Sun.", "a"),
        QuestionRow("2 + 2?", ["3", "4", "22"], 1),
    ]
    for some in (rows, rows[1:2]):
        known = retention(policy, some, 100)
        said[f"retention {len(some)}"] = [*known.nats_B.tolist(), *known.right_B.tolist()]
    nats_B, _ = reference_losses(policy, prompts(3), ["Yes.", "No, never. " * 9, "Perhaps."], 100)
    said["references"] = nats_B.tolist()
    with policy.ready():  # as compare asks: one question, and what is searched for it, at a time
        for text in ("What is rain?", "Hi"):
            said[f"embedding of {text}"] = embeddings([text, text * 3], policy, 100).sum(0)[:5].tolist()
            _, said[f"answer to {text}"] = policy.sample(
                [user(text)], max_new_tokens=NEW, temperature=0.0, batch_rows=1, generator=torch.Generator()
            )
    first = weakref.ref(policy.model)
    del policy
    scores = job.reward(f"model:{reward}", 100)
    assert first() is None, "the policy is in memory beside the reward model"
    for count in COUNTS[1:]:
        said[f"scores {count}"] = scores(
            [*map(PromptRow, prompts(count))], ["So it is. " * (1 + n) for n in range(count)]
        ).tolist()
    return said


def go_through(compute: Compute, cases: Sequence[Case], models: Path, scratch: Path) -> dict[Case, Any]:
    """All cases, in step with the other ranks."""

    def of_one(case: Case) -> dict[str, Any]:
        directory = scratch / "-".join(case) / str(compute.rank)
        here = replace(compute, zero=case.zero)
        job = small_job("evaluate", directory / "artifact", tiny_base(models / case.model), compute=here)
        job = replace(job, local_sampling=case.sampling)
        said = found(job, models / case.model, models / f"{case.model}-reward")
        gc.collect()
        return said

    return each_case(cases, of_one)
