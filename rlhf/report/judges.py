"""Which score of a run may say that a policy improved: one that no policy of the run learned from.

A score that was learned from rises whether or not the answers become better (reward hacking; Gao et al. 2023,
arXiv:2210.10760). So a gold function, a language model, or a reward model that learned from other prompts
judges; a verifier does too, as it checks new answers against what the row says.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PairRow
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.auto import JUDGE, MIN_JUDGE_PAIRS
from rlhf.pipeline.graph import named_source, own_roles, roles_of, row_makers, starts_from, with_ancestors
from rlhf.pipeline.recipe import BEST_OF_N, kind_of, last_evaluation
from rlhf.pipeline.run import Run
from rlhf.pipeline.stage import Stage
from rlhf.report.convictions import answers
from rlhf.rewards.kinds import RewardMix, RewardPart, keyed_parts, parts_of, reward_kind, stage_of

KINDS = {"gold": "gold score", "judge": "judge's score"}
"""Scores of `evaluate` that may judge, the best first: their words."""
VOTES, VOTES_WORDS = "preferred", "people's votes"
"""The metric of `label` that judges where no score does, and its words."""
RIGHT_ANSWERS = frozenset({
    "answer", "answers", "expected", "ground_truth", "reference", "references", "solution", "target",
    "targets", "test", "test_cases", "tests",
})  # fmt: skip
"""Columns whose name says that they hold what is right."""
MANY_SCORES, SAME = 10, 0.9999
"""Different scores, and the correlation, from which on two scores are the same one."""
OWN_SCORE = "score_gain"
"""The metric of `evaluate` by the reward that was learned from."""


class Judge(NamedTuple):
    """What tells whether a policy improved."""

    metric: str
    """Of `evaluate`: the gain over what PPO started from."""
    words: str
    remark: str = ""
    """How often it is right, where that was measured."""


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
    """Why no score of this run can judge what it made; empty if one can, or none is needed."""
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
    found = [
        f"{evaluation}.{kind}: {why}" for kind, each in sources.items() for why in faults(run, kind, each)
    ]
    if not found:
        found = [
            "The only score is the one that was trained on, which rises whether or not the answers are "
            "better."
        ]
    return (
        f"{' '.join(found)} Name a judge that nothing learned from: {evaluation}.gold (a function, a "
        f"verifier, a language model), give {MIN_JUDGE_PAIRS:,} pairs or more for {evaluation}.judge=auto, "
        "or let people judge (label)."
    )


class Voted(NamedTuple):
    """What people said of the answers of a policy and of what it started from."""

    label: str
    policy: str
    start: str
    sampled: Sampled
    """How often the policy's answers won, less how often they lost."""
    is_new: bool
    """Whether no policy learned from the prompts."""


def votes(run: Run) -> Iterator[Voted]:
    """People's votes on policies, none of which can have learned from them: they were made before."""
    for label, stage in run.chain.items():
        answers = getattr(stage, "answers", ())
        if kind_of(label) != "label" or getattr(stage, "annotator", "") != "human" or len(answers) != 2:
            continue
        asked = {each: start[1] for each in answers if (start := starts_from(run.chain[each])) is not None}
        is_new = all(getattr(run.chain[each], "splits", ()) == ["held_out"] for each in answers)
        for answer, policy in asked.items():
            sampled = Sampled.found(f"{VOTES}/{answer}", run.metrics_of(label))
            start = starts_from(run.chain[policy]) if policy in run.chain else None
            if sampled is not None and start is not None and start[1] in asked.values():
                yield Voted(label, policy, start[1], sampled, is_new)


def learners(run: Run) -> Iterator[str]:
    """The stages of this run that learn a policy from scores or preferences; and best of n."""
    yield from (
        name for name in run.chain if name in run.stages and learns_from_scores(run.chain[name], run.chain)
    )
    evaluation, metrics = last_evaluation(run.stages)
    if BEST_OF_N in getattr(run.chain.get(evaluation), "policies", ()) and metrics:
        yield BEST_OF_N


def made_from(run: Run) -> set[str]:
    """These stages, and all that they read."""
    evaluation, _ = last_evaluation(run.stages)
    found = [*learners(run)]
    if BEST_OF_N in found and (chose := getattr(run.chain[evaluation], "reward", None)):
        found += filter(None, (stage_of(part.source) for part in parts_of(chose)))
    return {each for name in found for each in with_ancestors(name, run.chain)}


def learns_from_scores(stage: Stage, chain: Mapping[str, Stage]) -> bool:
    """Whether a stage learns a policy from scores, preferences, or answers that scores chose: then what it
    measures judges itself."""
    chosen = any(chain[maker].reads().rewards for maker in row_makers(stage, chain))
    return stage.makes == "policy" and (bool(stage.reads().rewards) or chosen or any(preference_roles(stage)))


def preference_roles(stage: Stage) -> Iterator[str]:
    """The roles of the pairs that a stage learns from."""
    yield from (role for role in own_roles(stage) if PairRow in stage.mount.roles[role].row_types)


def unproven_rewards(run: Run) -> list[str]:
    """That a reward model which policies learned from may rank no better than a rule that reads no word."""
    read = made_from(run)
    return [
        f"{name} is not shown to rank better than a rule that reads no word ({said}), so nothing that "
        f"learned from it can be told. Give {name}.pairs more or cleaner rows."
        for name in run.chain
        if name in read and run.chain[name].makes == "reward" and (said := unproven(run, name))
    ]


def unproven(run: Run, reward: str) -> str:
    """How much better than chance and length a reward model ranks, where that may be nothing; else empty."""
    found = Sampled.found("accuracy_over_baseline", run.metrics_of(reward))
    if found is None or found.low > 0:
        return ""
    return f"{found.value:+.2g}, {found.low:+.2g} to {found.high:+.2g} of {found.rows} held-out pairs"


def faults(run: Run, kind: str, source: str | RewardMix | None) -> Iterator[str]:
    """Why a source cannot judge this run.

    Args:
        kind: of `KINDS`, under which `evaluate` names it.
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
    copies = {prepared.content(role) for role in roles} - {None}
    return any(named_source(run.chain, role) in sources or prepared.content(role) in copies for role in own)


def identity(run: Run, part: RewardPart) -> tuple[str, str]:
    """What scores, whatever it is called: a reward model by its place in the store, links followed."""
    place, stage = part.source.removeprefix("model:"), stage_of(part.source)
    if stage is not None:
        place = str(run.directory / "artifacts" / stage)
    elif place == part.source:
        return part.source, repr(part.args)
    return str(Path(place).expanduser().resolve()), repr(part.args)


def same_scores(run: Run, kind: str) -> bool:
    """Whether the scores of a judge are those of the learned reward, but for their scale: then it is the same
    function under another name."""
    both = [
        (row["score"], row[kind])
        for rows in answers(run).values()
        for row in rows
        if row.get("score") is not None and row.get(kind) is not None
    ]
    if min((len({*each}) for each in zip(*both, strict=True)), default=0) < MANY_SCORES:
        return False
    return abs(statistics.correlation(*zip(*both, strict=True))) > SAME


def learned_from(run: Run) -> Iterator[RewardPart]:
    """The rewards that the policies of this run learned from, or whose scores chose what they learned."""
    evaluation, _ = last_evaluation(run.stages)
    for name in learners(run):
        if name == BEST_OF_N and (chose := getattr(run.chain[evaluation], "reward", None)):
            yield from parts_of(chose)
        for each in with_ancestors(name, run.chain):
            if learns_from_scores(run.chain[each], run.chain) or kind_of(each) == "generate":
                yield from (part for _, part in keyed_parts(run.chain[each].reads().rewards))


def is_verifier(part: RewardPart) -> bool:
    """Whether it checks an answer: `verify:`, or what compares with a column of the right answer."""
    return part.source.startswith("verify:") or bool(RIGHT_ANSWERS & {*reward_kind(part.source).needs(part)})


def how_often_right(run: Run, source: str | RewardMix) -> str:
    """How often a judge that learned from pairs is right, with its interval; empty of any other."""
    for part in parts_of(source):
        reward = stage_of(part.source)
        found = reward and Sampled.found("accuracy", run.metrics_of(reward))
        if found:
            low, high = f"{found.low:.2f}", f"{found.high:.2f}"
            return f"the judge is right on {found.value:.2f} ({low} to {high}) of {found.rows} held-out pairs"
    return ""
