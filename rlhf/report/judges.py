"""Which score of a run may judge its policies: one that no policy of the run learned from.

A score that was learned from rises whether or not the answers become better (reward hacking; Gao et al. 2023,
arXiv:2210.10760). So the judge is a gold function, a language model, or a reward model that learned from
other prompts. A verifier may judge too, as it checks new answers against the right ones in the rows.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.prepared import PreparedData
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.auto import JUDGE, MIN_JUDGE_PAIRS
from rlhf.pipeline.graph import (
    named_source,
    preference_roles,
    roles_of,
    row_makers,
    starts_from,
    with_ancestors,
)
from rlhf.pipeline.recipe import BEST_OF_N, kind_of, last_evaluation
from rlhf.pipeline.run import Run
from rlhf.pipeline.stage import Stage
from rlhf.rewards.kinds import RewardMix, RewardPart, is_verifier, keyed_parts, parts_of, stage_of

KINDS = {"gold": "gold score", "judge": "judge's score"}
"""Scores of `evaluate` that may judge, the best first, with their words."""
VOTES, VOTES_WORDS = "preferred", "people's votes"
"""The metric of `label` that judges if no score can, and its words."""
MIN_DISTINCT_SCORES, SAME_SCORE_CORRELATION = 10, 0.9999
"""Fewest distinct scores, and smallest correlation, for which two scores count as the same function."""
OWN_SCORE = "score_gain"
"""The metric of `evaluate` for the reward that policies learned from."""


class Judge(NamedTuple):
    """A score that judges whether a policy improved."""

    metric: str
    """The metric of `evaluate`: the gain over what PPO started from."""
    words: str
    remark: str = ""
    """How often the judge is right, if measured."""


def answers(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Policy -> the rows of its answers in the last `evaluate`, in the prompts' order; empty if there are
    none."""
    evaluation, _ = last_evaluation(run.stages)
    path = run.directory / "artifacts" / evaluation / "responses.jsonl"
    found: dict[str, list[dict[str, Any]]] = {}
    if path.is_file():
        with path.open(
            encoding="utf-8"
        ) as file:  # answers may contain characters at which splitlines would split
            for row in map(json.loads, file):
                found.setdefault(row["policy"], []).append(row)
    return found


def judge_of(run: Run) -> Judge | None:
    """The best score of the last evaluation that no policy learned from; None if there is none."""
    evaluation, metrics = last_evaluation(run.stages)
    for kind, words in KINDS.items():
        source = getattr(run.chain.get(evaluation), kind, None)
        is_known = any(name.startswith(f"{kind}_gain/") for name in metrics)
        if source is not None and is_known and not any(faults(run, kind, source)):
            return Judge(f"{kind}_gain", words, how_often_right(run, source))
    return None


def no_judge(run: Run) -> str:
    """Why no score of this run can judge its policies; empty if one can, or none is needed."""
    learned = [*learners(run)]
    if not learned or judge_of(run) is not None or learned[-1] in {voted.policy for voted in votes(run)}:
        return ""
    evaluation, metrics = last_evaluation(run.stages)
    stage = run.chain.get(evaluation)
    if not metrics:
        return "No stage of this run judges the answers. Run evaluate too."
    start = getattr(stage, "start", "")
    if start not in getattr(stage, "policies", [start]):
        return f"{evaluation}.policies has no {start}, which the others started from: add it."
    sources = {kind: getattr(stage, kind, None) for kind in KINDS}
    reasons = [
        f"{evaluation}.{kind}: {why}" for kind, each in sources.items() for why in faults(run, kind, each)
    ]
    if not reasons:
        reasons = [
            "The only score is the one that was trained on, which rises whether or not the answers are "
            "better."
        ]
    return (
        f"{' '.join(reasons)} Name a judge that nothing learned from: {evaluation}.gold (a function, a "
        f"verifier, a language model), give {MIN_JUDGE_PAIRS:,} pairs or more for {evaluation}.judge=auto, "
        "or let people judge (label)."
    )


class VoteResult(NamedTuple):
    """People's votes between the answers of a policy and those of its start."""

    label: str
    policy: str
    start: str
    sampled: Sampled
    """Share of votes that the policy won minus the share that it lost."""
    is_new: bool
    """Whether no policy learned from these prompts."""


def votes(run: Run) -> Iterator[VoteResult]:
    """People's votes on policies. None of these learned from the votes, which are newer than the policies."""
    for label, stage in run.chain.items():
        answers = getattr(stage, "answers", ())
        if kind_of(label) != "label" or getattr(stage, "annotator", "") != "human" or len(answers) != 2:
            continue
        policy_of_answers = {
            each: start[1] for each in answers if (start := starts_from(run.chain[each])) is not None
        }
        is_new = all(getattr(run.chain[each], "splits", ()) == ["held_out"] for each in answers)
        for answer, policy in policy_of_answers.items():
            sampled = Sampled.found(f"{VOTES}/{answer}", run.metrics_of(label))
            start = starts_from(run.chain[policy]) if policy in run.chain else None
            if sampled is not None and start is not None and start[1] in policy_of_answers.values():
                yield VoteResult(label, policy, start[1], sampled, is_new)


def learners(run: Run) -> Iterator[str]:
    """The stages of this run that learn a policy from scores or preferences; and best of n."""
    yield from (
        name for name in run.chain if name in run.stages and learns_from_scores(run.chain[name], run.chain)
    )
    evaluation, metrics = last_evaluation(run.stages)
    if BEST_OF_N in getattr(run.chain.get(evaluation), "policies", ()) and metrics:
        yield BEST_OF_N


def made_from(run: Run) -> set[str]:
    """The learners, and all stages that they are made from."""
    evaluation, _ = last_evaluation(run.stages)
    names = [*learners(run)]
    if BEST_OF_N in names and (reward := getattr(run.chain[evaluation], "reward", None)):
        names += filter(None, (stage_of(part.source) for part in parts_of(reward)))
    return {each for name in names for each in with_ancestors(name, run.chain)}


def learns_from_scores(stage: Stage, chain: Mapping[str, Stage]) -> bool:
    """Whether a stage learns a policy from scores, preferences, or answers that scores chose. Such a stage's
    own metrics cannot judge it."""
    chosen = any(chain[maker].reads().rewards for maker in row_makers(stage, chain))
    return stage.makes == "policy" and (bool(stage.reads().rewards) or chosen or any(preference_roles(stage)))


def unproven_rewards(run: Run) -> list[str]:
    """Sentences on reward models that policies learned from and that may rank no better than a rule that
    reads no word."""
    read = made_from(run)
    return [
        f"{name} is not shown to rank better than a rule that reads no word ({said}), so nothing that "
        f"learned from it can be told. Give {name}.pairs more or cleaner rows."
        for name in run.chain
        if name in read and run.chain[name].makes == "reward" and (said := unproven(run, name))
    ]


def unproven(run: Run, reward: str) -> str:
    """A reward model's accuracy over chance and length, in words, if it may be zero; else empty."""
    gain = Sampled.found("accuracy_over_baseline", run.metrics_of(reward))
    if gain is None or gain.low > 0:
        return ""
    return f"{gain.value:+.2g}, {gain.low:+.2g} to {gain.high:+.2g} of {gain.rows} held-out pairs"


def faults(run: Run, kind: str, source: str | RewardMix | None) -> Iterator[str]:
    """Why a source cannot judge this run.

    Args:
        kind: the key of `evaluate` that names the source, one of `KINDS`.
    """
    taught = [identity(run, part) for part in learned_from(run)]
    roles = {role for name in made_from(run) for role in preference_roles(run.chain[name])}
    for part in parts_of(source) if source is not None else ():
        reward = stage_of(part.source)
        if is_verifier(part):
            continue
        if identity(run, part) in taught:
            yield f"policies learned from {part.source}, so it cannot judge them."
        elif taught and same_scores(run, kind):
            yield f"{part.source} scores exactly as what policies learned from, so it cannot judge them."
        elif reward is not None and reward != JUDGE and shares_pairs(run, reward, roles):
            yield f"{reward} learned from the pairs that policies learned from, so it cannot judge them."
        elif reward is not None and (said := unproven(run, reward)):
            yield f"{reward} is not shown to rank better than a rule that reads no word ({said})."


def shares_pairs(run: Run, reward: str, roles: Collection[str]) -> bool:
    """Whether a reward model learned from the source of one of these roles."""
    prepared = PreparedData(run.directory / "artifacts" / "prepare", roles=roles_of(run.chain))
    own = [*preference_roles(run.chain[reward])]
    sources = [named_source(run.chain, role) for role in roles]
    copies = {prepared.content_digest(role) for role in roles} - {None}
    return any(
        named_source(run.chain, role) in sources or prepared.content_digest(role) in copies for role in own
    )


def identity(run: Run, part: RewardPart) -> tuple[str, str]:
    """An identity of the scorer that does not depend on its name: for a reward model, its resolved path in
    the store."""
    place, stage = part.source.removeprefix("model:"), stage_of(part.source)
    if stage is not None:
        place = str(run.directory / "artifacts" / stage)
    elif place == part.source:
        return part.source, repr(part.args)
    return str(Path(place).expanduser().resolve()), repr(part.args)


def same_scores(run: Run, kind: str) -> bool:
    """Whether a judge's scores equal those of the learned reward up to scale: then both are the same function
    under two names."""
    both = [
        (row["score"], row[kind])
        for rows in answers(run).values()
        for row in rows
        if row.get("score") is not None and row.get(kind) is not None
    ]
    if min((len({*each}) for each in zip(*both, strict=True)), default=0) < MIN_DISTINCT_SCORES:
        return False
    return abs(statistics.correlation(*zip(*both, strict=True))) > SAME_SCORE_CORRELATION


def learned_from(run: Run) -> Iterator[RewardPart]:
    """The rewards that the policies of this run learned from, or whose scores chose what they learned."""
    evaluation, _ = last_evaluation(run.stages)
    for name in learners(run):
        if name == BEST_OF_N and (reward := getattr(run.chain[evaluation], "reward", None)):
            yield from parts_of(reward)
        for each in with_ancestors(name, run.chain):
            if learns_from_scores(run.chain[each], run.chain) or kind_of(each) == "generate":
                yield from (part for _, part in keyed_parts(run.chain[each].reads().rewards))


def how_often_right(run: Run, source: str | RewardMix) -> str:
    """How often a judge that learned from pairs is right, with its interval; empty for any other judge."""
    for part in parts_of(source):
        reward = stage_of(part.source)
        share = reward and Sampled.found("accuracy", run.metrics_of(reward))
        if share:
            low, high = f"{share.low:.2f}", f"{share.high:.2f}"
            return f"the judge is right on {share.value:.2f} ({low} to {high}) of {share.rows} held-out pairs"
    return ""
