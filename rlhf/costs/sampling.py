"""Costs of the stages that sample and measure: generate, evaluate, compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlhf.costs.memory import SAMPLING, MemoryPhase, beside_vllm, frozen_runs, logits, reading, sampling
from rlhf.costs.peft_costs import COSTS
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, ThroughputModel, joined
from rlhf.data.prepared import LengthStats
from rlhf.models.peft.config import PeftConfig


def most_added(on: CostContext, tuned: Iterable[PeftConfig | None]) -> int:
    """Virtual tokens that any of the models which are trained like this puts before its rows."""
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
    """The policies answer every prompt one after the other, and each answer is read again.

    Args:
        policies: that answer one after the other.
        readings: reward models that read every answer.
        measures: passes over every answer for log-probabilities.
        models: in memory while answers are scored.
        others: texts whose log-probabilities each policy gives.
        added: virtual tokens before every sequence.
        rollouts: how often vLLM is handed a policy; None for once each.
    """
    answers = prompts.rows * samples
    of_others = prompts.mean - prompts.shared_prefix
    repeated = prompts._replace(
        shared_prefix=prompts.mean - of_others / samples
    )  # samples of a prompt share it
    sampled = on.answers(new_tokens if prompts.rows else 0)
    length = joined(repeated, sampled)
    shards = on.shards_weights
    running = frozen_runs(on, "policy")
    model = running[0]
    rows = min(batch_rows, answers / on.ranks)
    scored = on.pass_tokens(answers, length, micro_batch_tokens)
    texts = [(answers, length), *((each.rows, each) for each in others)]
    most = max(on.pass_tokens(count, each, micro_batch_tokens) for count, each in texts)
    phases = [
        MemoryPhase(SAMPLING, [model, *sampling(on, rows, prompts.longest, new_tokens, gathers=shards)]),
        MemoryPhase("measuring", [*running, reading(on, most), logits(on, learns=False)]),
        MemoryPhase("scoring", [*[model] * (models - 1), *running, reading(on, scored)]),
    ]
    worker = ThroughputModel(on)
    answered = policies * answers
    computed = on.computed(answered * length.mean, length)
    work = [
        worker.load(policies + readings, what="models"),
        *worker.decode(answered, batch_rows, repeated, sampled, what="answers"),
        *worker.rollouts(policies if rollouts is None else rollouts, answered, what="answers"),
        *worker.gathering(policies * on.gathers_a_rollout(new_tokens), what="weights to sample from"),
        worker.read(
            measures * computed, length.mean, predicted=measures * answered * sampled.mean,
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
        beside_vllm(on, phases), work, longest=longest, sampled=length.longest, context=on.shape.context
    )
