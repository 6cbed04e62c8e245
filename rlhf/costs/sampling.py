"""Costs of the stages that sample and score answers: generate, evaluate, compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlhf.costs.memory import SAMPLING, MemoryPhase, frozen_runs, logits, reading, sampling, with_vllm
from rlhf.costs.peft_costs import COSTS
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, ThroughputModel, joined
from rlhf.data.prepared import LengthStats
from rlhf.models.peft.config import PeftConfig


def max_virtual_tokens(on: CostContext, tuned: Iterable[PeftConfig | None]) -> int:
    """Largest number of virtual tokens that a model of these tuning methods puts before its rows."""
    return max((COSTS[peft.method].added_tokens(on.shape, peft) for peft in tuned if peft), default=0)


def sampling_cost(
    on: CostContext,
    prompts: LengthStats,
    *,
    samples: int,
    new_tokens: int,
    batch_rows: int,
    micro_batch_tokens: int,
    policies: int,
    readings: int,
    measures: int,
    models: int,
    others: Sequence[LengthStats] = (),
    added: int = 0,
    rollouts: float | None = None,
) -> StageCost:
    """Cost of sampling answers to every prompt from each policy, and of reading each answer again.

    Args:
        samples: answers per prompt.
        new_tokens: most tokens of an answer.
        batch_rows: answers that a rank samples together.
        micro_batch_tokens: most tokens of a pass.
        policies: number of policies, which answer one after the other.
        readings: reward models that read every answer.
        measures: passes over every answer for log-probabilities.
        models: models in memory while answers are scored.
        others: lengths of other texts whose log-probabilities each policy computes.
        added: virtual tokens before every sequence.
        rollouts: number of times that vLLM receives weights; None for once per policy.
    """
    answers = prompts.rows * samples
    unshared = prompts.mean - prompts.shared_prefix
    repeated = prompts._replace(
        shared_prefix=prompts.mean - unshared / samples
    )  # samples of a prompt share it
    sampled = on.answers(new_tokens if prompts.rows else 0)
    length = joined(repeated, sampled)
    shards = on.shards_weights
    running = frozen_runs(on, "policy")
    model = running[0]
    rows = min(batch_rows, answers / on.ranks)
    scored = on.pass_tokens(answers, length, micro_batch_tokens)
    texts = [(answers, length), *((each.rows, each) for each in others)]
    largest = max(on.pass_tokens(count, each, micro_batch_tokens) for count, each in texts)
    phases = [
        MemoryPhase(SAMPLING, [model, *sampling(on, rows, prompts.longest, new_tokens, gathers=shards)]),
        MemoryPhase("measuring", [*running, reading(on, largest), logits(on, learns=False)]),
        MemoryPhase("scoring", [*[model] * (models - 1), *running, reading(on, scored)]),
    ]
    worker = ThroughputModel(on)
    all_answers = policies * answers
    computed = on.computed(all_answers * length.mean, length)
    work = [
        worker.load(policies + readings, what="models"),
        *worker.decode(all_answers, batch_rows, repeated, sampled, what="answers"),
        *worker.rollouts(policies if rollouts is None else rollouts, all_answers, what="answers"),
        *worker.gathering(policies * on.gathers_a_rollout(new_tokens), what="weights to sample from"),
        worker.read(
            measures * computed, length.mean, predicted=measures * all_answers * sampled.mean,
            what="log-probabilities of answers",
        ),
        worker.read(readings * computed, length.mean, what="scores"),
        *(
            worker.read(
                policies * each.rows * each.mean, each.mean, predicted=policies * each.rows * each.mean,
                what="other texts",
            )
            for each in others
        ),
    ]  # fmt: skip
    longest = added + max([length.longest, *(each.longest for each in others if added)])
    return StageCost(
        with_vllm(on, phases), work, longest=longest, sampled=length.longest, context=on.shape.context
    )
