"""The sentence that a run ends with: what improved, what did not, and which stage is to blame for it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

from rlhf.data.prepared import PreparedData
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.auto import AUTO
from rlhf.pipeline.defaults import Change, references
from rlhf.pipeline.graph import inputs, roles_of
from rlhf.pipeline.metrics import purpose_metric
from rlhf.pipeline.recipe import kind_of, last_evaluation
from rlhf.pipeline.run import GateResult, Run
from rlhf.pipeline.stage import Stage
from rlhf.report.against import Worked, worked_before
from rlhf.report.blame import Blame
from rlhf.report.convictions import (
    OTHER_TEMPLATE,
    RETENTION_GATES,
    broken_start,
    convictions,
    reward_of,
    uses_other_template,
)
from rlhf.report.findings import (
    GAIN_WORDS,
    OWN_SCORE_WORDS,
    Direction,
    Finding,
    evaluated,
    is_untrained,
    measured,
    silent_gold,
)
from rlhf.report.judges import learners, no_judge, unproven_rewards
from rlhf.rewards.kinds import RewardMix, stage_of

Outcome = Literal["worked", "no gain worth having", "did not work", "cannot be told"]
OUTCOME_OF: Mapping[Direction, Outcome] = {
    "better": "worked",
    "too small": "no gain worth having",
    "not better": "did not work",
    "unknown": "cannot be told",
}
UNTRAINED_VERDICT = "Your data and settings work; a random model says nothing about quality."

MIN_DEVIATION_RATIO = 0.3
"""Smallest healthy ratio of the deviation of a reward model's scores on answers to that on its own pairs.
1.06 was measured in the demo, 0.16 where a full stop decided every pair."""
MIN_CHANGED_KL = 0.5
"""KL from the start, nats per sequence, below which a policy has hardly changed."""
MIN_HEALTHY_KL_RATIO = 1 / 3
"""Smallest healthy ratio of the KL on new prompts to that on the prompts that were learned from. 0.9 to 1.1
was measured in healthy runs, 0.12 where the prompts were of another kind."""
SAMPLING_KEYS = ("temperature", "max_new_tokens")
"""Sampling keys that should be equal in `evaluate` and in the stage that trained a policy."""


NO_SURE_CAUSE = "Nobody is to blame for sure. Look first at"
UNPROVEN_REWARD = "nobody can tell whether the reward model ranks well enough to learn from"
MAX_SHOWN_NOTES = 2
"""Most differences between data sets that the verdict names; `prepare` shows all."""
MAX_SHOWN_KEYS = 4
"""Most changed keys that the verdict names."""


def verdict(run: Run) -> str:
    """What was learned, what improved, what did not, and which stage is to blame. Empty if the run has
    nothing to judge."""
    found = outcome(run)
    if found is None:
        return ""
    if is_untrained(run):
        return UNTRAINED_VERDICT
    own, scored = dict(measured(run)), dict(evaluated(run))
    findings = [*own.values(), *scored.values()]
    failed = [gate for gate in run.gates if gate.outcome == "failed"]
    reasons = to_blame(run, causes(run))
    if not findings and not reasons and not failed:
        return "No stage of this run measures whether anything improved."
    worked = worked_before(run)
    blamed = blames(run, reasons, [] if reasons else failed, worked)
    why = [*unproven_rewards(run), no_judge(run)] if found == "cannot be told" else []
    parts = [*why]
    for word, direction, is_judged in (
        ("Learned", "better", False),
        ("Improved", "better", True),
        ("No gain worth having", "too small", True),
        ("Did not improve", "not better", None),
        ("Cannot be told from so few rows", "unknown", None),
    ):
        named = [
            str(each)
            for each in findings
            if each.direction == direction and is_judged in (None, each.is_judged)
        ]
        parts += [f"{word}: {'; '.join(named)}."] if named else []
    evaluation, _ = last_evaluation(run.stages)
    compared = [name for name in scored if name in run.chain]
    asked = dict.fromkeys(differing_sampling(run, name) or learned_elsewhere(run, name) for name in compared)
    remarks = [
        f"Note {evaluation}: {each}" for each in asked if each and all(each != said.why for said in reasons)
    ]
    for name in compared:
        remarks += [
            f"Note {name}: {said}" for said in (over_optimized(run, name), critic_alone(run, name)) if said
        ]
    if not blamed:
        remarks += [f"Note {said}" for said in outside_bounds(run)]
        if any(uses_other_template(run, name) for name in run.chain):
            remarks.append(f"Note model.chat_template: {OTHER_TEMPLATE}")
    is_unexplained = not blamed and not any(why) and found != "worked"
    if is_unexplained and any(each.direction != "better" for each in findings):
        changed = changed_keys(run, run.needed or run.chain, f"{NO_SURE_CAUSE} what was changed").strip()
        parts.append(changed if worked is None else f"{NO_SURE_CAUSE} {worked.section or 'this'}: {worked}")
    elif not blamed and worked is not None:
        remarks += filter(None, [losses_against(run, worked, scored)])
    remarks += [f"Note prepare: {said}" for said in unlike(run)[:MAX_SHOWN_NOTES]]
    return "\n".join(filter(None, [*parts, *blamed, *remarks]))


def blames(
    run: Run, reasons: Sequence[Blame], failed: Sequence[GateResult], worked: Worked | None
) -> list[str]:
    """Sentences on what is to blame. If a run worked that differs in only one section of the config, that
    section is the cause, and other findings are its symptoms.

    Args:
        failed: failed gates that nothing explains.
    """
    gates = ", ".join(f"{gate.stage} ({gate.name} = {gate.figure})" for gate in failed)
    sections = [
        *(each.sections for each in reasons),
        *([tuple(gate.stage for gate in failed)] * bool(failed)),
    ]
    if not sections:
        return []
    if worked is not None and worked.section is not None and (worked.section,) not in sections:
        shows = [*map(str, reasons), *([f"{gates}."] if gates else [])]
        return [f"To blame is {worked.section}: {worked}", *(f"It shows in {each}" for each in shows)]
    found = [f"To blame is {each}" for each in reasons]
    found += [f"To blame is perhaps {gates}: its gate failed, and nothing else says why."] if gates else []
    if worked is None:
        return [
            each + changed_keys(run, names, "Changed there")
            for each, names in zip(found, sections, strict=True)
        ]
    said = str(worked)
    return [*found, f"{said[0].upper()}{said[1:]}"]


def losses_against(run: Run, worked: Worked, scored: Mapping[str, Finding]) -> str:
    """Metrics in which the last policy is worse than that of a run that worked; else empty."""
    if not scored:
        return ""
    name, finding = [*scored.items()][-1]
    sides = [last_evaluation(stages)[1] for stages in (run.stages, worked.stages)]
    here, there = ({name: value for name, value in side.items() if value is not None} for side in sides)
    is_alike = all(kind_of(key.partition(".")[0]) != "evaluate" for key in worked.differences)
    found = []
    # levels can be compared only if `evaluate` is the same in both runs; else gains are compared
    levels = gold_levels(name, here, there) if is_alike and finding.metric == "gold_gain" else []
    own, other = levels or (finding.sampled, Sampled.found(f"{finding.metric}/{name}", there))
    if other is not None and own.value < other.value:
        chance = "" if own.high < other.low else ", which may be chance"
        did = "is lower" if levels else "gained less"
        found.append(f"{finding.words} {did} ({own.value:+.3g}, there {other.value:+.3g}){chance}")
    knows, knew = (Sampled.found(f"perplexity/{name}", side) for side in (here, there))
    if is_alike and knows and knew and knows.low > knew.high and reads_alike(run, worked):
        title = run.chain[name].full_title if name in run.chain else name
        evaluation, _ = last_evaluation(run.stages)
        figures = f"{knows.value:.3g}, there {knew.value:.3g}"
        found.append(f"the perplexity of the {title} model on {evaluation}.retention is higher ({figures})")
    return f"Note {worked.section or 'on this run'}: {'; '.join(found)}: {worked}" if found else ""


def reads_alike(run: Run, worked: Worked) -> bool:
    """Whether perplexities can be compared: both runs have the same base model, or as many tokens for the
    same rows."""
    if not any(key.partition(".")[0] in ("model", "the base model") for key in worked.differences):
        return True
    mine, theirs = ((side.get("sft") or {}).get("metrics") or {} for side in (run.stages, worked.stages))
    return mine.get("sft/tokens") is not None and mine.get("sft/tokens") == theirs.get("sft/tokens")


def gold_levels(policy: str, *runs: Mapping[str, float]) -> list[Sampled]:
    """A policy's mean gold score in each run's `evaluate`, with its interval; empty if a run has none."""
    found = []
    for metrics in runs:
        mean, deviation = metrics.get(f"gold_mean/{policy}"), metrics.get(f"gold_deviation/{policy}")
        gain = Sampled.found(f"gold_gain/{policy}", metrics)
        if mean is None or deviation is None or gain is None or not gain.rows:
            return []
        half = 1.96 * deviation / math.sqrt(gain.rows)
        found.append(Sampled(mean, mean - half, mean + half, gain.rows))
    return found


def outcome(run: Run) -> Outcome | None:
    """The verdict in a few words. A failure decides, else the last metric of improvement. None for a run that
    has nothing to judge, such as `stage=plan`."""
    is_failed = any(gate.outcome == "failed" for gate in run.gates)
    if not any(has_purpose(run.chain[name]) for name in run.stages if name in run.chain):
        return None
    silent = silent_gold(run)
    convicted = {name: why for name, why in causes(run).items() if name not in silent}
    if is_untrained(run):
        return "cannot be told"
    if is_failed or to_blame(run, convicted):
        return "did not work"
    if silent or unproven_rewards(run) or no_judge(run):
        return "cannot be told"
    found = decisive(run)
    return "cannot be told" if found is None else OUTCOME_OF[found.direction]


def decisive(run: Run) -> Finding | None:
    """The finding by which a run is judged: the last policy's, by an independent judge. Without one, if
    nothing learned from scores, the last stage's own, on held-out rows."""
    findings = [*dict(measured(run)).values(), *dict(evaluated(run)).values()]
    judged = [each for each in findings if each.is_judged]
    if not judged and not any(learners(run)):
        judged = findings
    return judged[-1] if judged else None


def has_purpose(stage: Stage) -> bool:
    """Whether a stage makes a model, or asks one."""
    return stage.makes is not None or purpose_metric(stage) is not None or stage.samples


def causes(run: Run) -> dict[str, Blame]:
    """Stages to blame, with the reason: for a failed gate, for a gold score that tells nothing, or for data
    from which hardly anything is learned."""
    found = silent_gold(run) | mostly_held_out(run) | broken_start(run)
    for gate in run.gates:
        # an earlier policy may fail where the last one cannot be told
        is_suspect = gate.name in RETENTION_GATES and gate.outcome == "cannot tell"
        is_suspect |= gate.name == "stop_rate" and is_outside(gate) and uses_other_template(run, gate.stage)
        if gate.outcome == "failed" or is_suspect:
            found = convictions(run, gate) | found  # an earlier stage's reason is not replaced
    return found


def mostly_held_out(run: Run) -> dict[str, Blame]:
    """Blame for `prepare` if more rows are held out than learned from and not all improved; else empty."""
    share = getattr(run.chain.get("prepare"), "held_out_fraction", 0.0)
    findings = [*dict(measured(run)).values(), *dict(evaluated(run)).values()]
    if share <= 1 - share or all(finding.direction == "better" for finding in findings):
        return {}
    why = f"{share:.0%} of all rows are held out, and the stages learn from the rest"
    return {"prepare": Blame(("prepare",), f"{why}. Lower prepare.held_out_fraction={share:g}.")}


def unlike(run: Run) -> list[str]:
    """Differences between the chain's data sets that `prepare` found."""
    return PreparedData(run.directory / "artifacts" / "prepare").unlike()


def to_blame(run: Run, convicted: Mapping[str, Blame]) -> list[Blame]:
    """Each stage that is to blame, and why. If there is none, the stage that made the policy worse than the
    untuned model.

    Args:
        convicted: see `causes`.
    """
    return [*failures(run, dict(measured(run)), dict(evaluated(run)), convicted)] or below_base(run)


def below_base(run: Run) -> list[Blame]:
    """Blame if the last policy's gold score is below the untuned model's, for the stage where it fell; else
    empty. The policy's gain over its start does not show this."""
    evaluation, metrics = last_evaluation(run.stages)
    over = {name: Sampled.found(f"gold_over_base/{name}", metrics) for name in run.chain}
    known = {name: each for name, each in over.items() if each is not None}
    if not known or [*known.values()][-1].high >= 0:
        return []
    last, start = [*known][-1], str(getattr(run.chain.get(evaluation), "start", ""))
    _, low, high, _ = known[last]
    figure = f"{known[last].value:+.2g} ({low:+.2g} to {high:+.2g})"
    if start == last or start not in known or known[start].high >= 0:
        why = f"by the gold score its policy is worse than the untuned model, {figure}."
        return [Blame((last,), why)]
    return [
        Blame(
            (start,),
            f"by the gold score its policy is worse than the untuned model ({known[start].value:+.2g}), and "
            f"{run.chain[last].full_title} did not make up for it: {figure}. Compare the answers of "
            f"{start}.data with those of base.",
        )
    ]


def failures(
    run: Run,
    own: Mapping[str, Finding],
    scored: Mapping[str, Finding],
    convicted: Mapping[str, Blame],
) -> Iterator[Blame]:
    """Each stage that failed although all that it reads is good, and why."""
    evaluation, _ = last_evaluation(run.stages)
    spoiled: set[str] = set()
    """Stages that failed, and all that is made from them."""
    for name, stage in run.chain.items():
        findings = [found[name] for found in (own, scored) if name in found]
        is_bad = any(finding.direction == "not better" for finding in findings)
        is_spoiled = bool(spoiled & {*inputs(stage, run.chain)})
        if name in convicted:
            if not is_spoiled:
                yield convicted[name]
            spoiled.add(name)
            continue
        did_its_own = name in own and own[name].direction == "better"
        asked = differing_sampling(run, name)
        is_unseen = name in scored and scored[name].direction != "better"
        if asked and did_its_own and not is_spoiled and is_unseen:
            yield Blame((evaluation,), asked)
            continue
        if did_its_own and not is_spoiled and is_unseen and (elsewhere := learned_elsewhere(run, name)):
            yield Blame((name, evaluation), elsewhere)
            continue
        if did_its_own and not is_spoiled and (unsure := learned_from_nothing(run, name, own, scored)):
            yield unsure
            spoiled.add(name)
            continue
        is_gain = name in scored and scored[name].is_judged and scored[name].direction == "better"
        if name in own and not did_its_own and not is_spoiled and not is_gain:
            why = out_of_sight(run, name) or hardly_moved(run, name)
            if why:
                yield why
                spoiled.add(name)
                continue
        if is_bad and not is_spoiled:
            yield reason(name, run, own, scored.get(name))
        if is_spoiled or (is_bad and not did_its_own):
            spoiled.add(name)


def reason(name: str, run: Run, own: Mapping[str, Finding], score: Finding | None) -> Blame:
    """What is to blame if this stage failed, and why."""
    stage, mine = run.chain[name], own.get(name)
    reward = reward_of(run, name)
    if mine is not None and mine.direction == "not better":
        found = purpose_metric(stage)
        assert found is not None
        why = found[1].failed
        if reward is None:
            scored = "no model was trained to score, and " if stage.reads().rewards else ""
            return Blame((name,), f"{scored}{why}.")
        if reward in own and own[reward].direction == "better":
            return Blame((name,), f"the reward model ranks well, and {why}.")
        return Blame((reward, name), f"{why}, and {UNPROVEN_REWARD}.")
    assert score is not None
    by, against = GAIN_WORDS[score.metric], "what it publishes is no better than what it is compared with"
    if mine is None or mine.direction != "better" or not score.is_judged:
        if reward is not None and reward in own and own[reward].direction == "unknown":
            return Blame((reward, name), f"{against}, by the {by} on new prompts, and {UNPROVEN_REWARD}.")
        return Blame((name,), f"{against}, by the {by} on new prompts.")
    if not stage.reads().rewards:
        return Blame((name,), f"it improved on its own data, and the {by} did not follow.")
    on_new = dict(evaluated(run, OWN_SCORE_WORDS)).get(name)
    if on_new is not None and on_new.direction == "not better":
        return Blame(
            (name,),
            "it raised the reward's score on the prompts that it learned from, and not on new ones "
            f"({on_new.sampled.value:+.3g}). Compare ppo.prompts with evaluate.prompts.",
        )
    return Blame(
        (reward or name,),
        f"{stage.full_title} raised its score, and the {by} did not follow. The policy may have found what "
        "the reward likes by mistake (reward hacking): read its answers.",
        reward or "the reward",
    )


def learned_from_nothing(
    run: Run, policy: str, own: Mapping[str, Finding], scored: Mapping[str, Finding]
) -> Blame | None:
    """Blame for a reward model that may rank by chance, if its policy shows no gain by the judge's score."""
    reward, score = reward_of(run, policy), scored.get(policy)
    if reward is None or reward not in own or score is None or not score.is_judged:
        return None
    if own[reward].direction != "unknown" or score.direction != "unknown":
        return None
    return Blame(
        (reward,),
        "nobody can tell that it ranks better than chance and length "
        f"({own[reward].sampled.value:+.2g}), and the {GAIN_WORDS[score.metric]} shows no gain.",
    )


def learned_elsewhere(run: Run, policy: str) -> str:
    """A sentence if a policy changed on prompts that it learned from and hardly on new ones; else empty."""
    evaluation, metrics = last_evaluation(run.stages)
    there, here = Sampled.found("kl", run.metrics_of(policy)), metrics.get(f"kl/{policy}")
    if (
        there is None
        or here is None
        or there.value < MIN_CHANGED_KL
        or here > there.value * MIN_HEALTHY_KL_RATIO
    ):
        return ""
    return (
        f"{policy} moved on the prompts that it learned from (KL {there.value:.2g} nats per sequence), and "
        f"hardly on those of {evaluation} ({here:.2g}), so these ask for something else. Compare ppo.prompts "
        f"with {evaluation}.prompts."
    )


def out_of_sight(run: Run, policy: str) -> Blame | None:
    """Blame for a reward model that separates its pairs by features that the policy's answers lack."""
    reward = reward_of(run, policy)
    readers = (name for name, stage in run.chain.items() if reward in inputs(stage, run.chain))
    generate = next((name for name in readers if kind_of(name) == "generate"), "generate")
    on_pairs = run.metrics_of(reward or "").get("score_deviation")
    on_answers = run.metrics_of(generate).get(deviation_of(run, generate, reward))
    if (
        reward is None
        or on_pairs is None
        or on_answers is None
        or on_answers >= MIN_DEVIATION_RATIO * on_pairs
    ):
        return None
    return Blame(
        (reward,),
        f"what tells its pairs apart is hardly in the answers that {policy} starts from (its scores deviate "
        f"by {on_pairs:.2g} on held-out pairs, by {on_answers:.2g} in {generate}). Look at {reward}.pairs.",
    )


def deviation_of(run: Run, stage: str, reward: str | None) -> str:
    """The stage's metric for the deviation of a reward model's own scores, before weighting."""
    sources = run.chain[stage].reads().rewards.values() if stage in run.chain else ()
    for mix in (source for source in sources if isinstance(source, RewardMix)):
        for part, label in zip(mix.of, mix.labels, strict=True):
            if reward is not None and stage_of(part.source) == reward:
                return f"score_deviation/{label}"
    return "score_deviation"


def hardly_moved(run: Run, policy: str) -> Blame | None:
    """Blame for a policy that hardly changed from its start; None if it changed, or is the start itself."""
    kl = run.metrics_of(policy).get("held_out_kl_last")
    if kl is None or kl >= MIN_CHANGED_KL:
        return None
    return Blame(
        (policy,),
        f"its policy hardly moved from its start (KL {kl:.2g} nats per sequence). Raise {policy}.optim.lr or "
        f"{policy}.steps, or lower {policy}.kl.coef.",
    )


def over_optimized(run: Run, policy: str) -> str:
    """A sentence if an earlier step of a policy has a higher gold score than its published step; else
    empty."""
    _, metrics = last_evaluation(run.stages)
    lost, kept = Sampled.found(f"gold_lost/{policy}", metrics), run.metrics_of(policy).get("best_step")
    if lost is None or kept is None or lost.low <= 0 or (peak := metrics[f"gold_peak_step/{policy}"]) > kept:
        return ""
    return (
        f"its gold score was higher at step {peak:.0f} than at step {kept:.0f}, whose weights it keeps, by "
        f"{lost.value:.2g} ({lost.low:.2g} to {lost.high:.2g}): it learned more than the reward is right "
        f"about. Lower {policy}.steps, or raise {policy}.kl.coef."
    )


def critic_alone(run: Run, policy: str) -> str:
    """A sentence if only the critic learned in most of a policy's steps; else empty."""
    steps = getattr(run.chain[policy], "steps", 0)
    alone = getattr(getattr(run.chain[policy], "critic", None), "warmup_steps", 0)
    if not alone or 2 * alone <= steps:
        return ""
    return f"in {alone} of its {steps} steps only the critic learned. Lower {policy}.critic.warmup_steps."


def outside_bounds(run: Run) -> list[str]:
    """The gates whose value is outside its bound, but may be so by chance."""
    return [
        f"{gate.stage}: {gate.name} = {gate.figure}, wanted {gate.bound}, which may be chance."
        for gate in run.gates
        if is_outside(gate)
    ]


def is_outside(gate: GateResult) -> bool:
    """Whether a gate's value is outside its bound, but may be so by chance."""
    is_known = gate.outcome == "cannot tell" and not math.isnan(gate.value)
    return is_known and not gate.bound.holds(gate.value)


def changed_keys(run: Run, stages: Collection[str], heading: str) -> str:
    """A sentence on the changed keys of these stages, of `prepare`, and of the keys that they refer to, the
    furthest from its packaged value first. Empty if none was changed. Left out are data keys, which the user
    knows, and gates, which train nothing."""
    if not run.changed:
        return ""
    named = {"prepare", *stages}
    read = {source for key, source in references().items() if key.partition(".")[0] in named}
    data = {role.key for role in roles_of(run.chain).values()}
    found = []
    for each in run.changed:
        key = each["key"]
        stage, _, own = key.partition(".")
        # `auto` is most often data too: its value was derived, not chosen
        is_data = each["default"] == AUTO or any(f"{key}.".startswith(f"{name}.") for name in data)
        if (stage in named or key in read) and not is_data and not own.startswith("gates"):
            found.append(each)
    if not found:
        return ""
    found.sort(key=far_from_default, reverse=True)
    keys = [f"{each['key']}={each['value']} (packaged: {each['default']})" for each in found]
    more = f" and {len(keys) - MAX_SHOWN_KEYS} more" if len(keys) > MAX_SHOWN_KEYS else ""
    return f" {heading}: {', '.join(keys[:MAX_SHOWN_KEYS])}{more}."


def far_from_default(change: Change) -> float:
    """Distance of a number from the packaged one: |log(ratio)|; infinite if there is no ratio."""
    try:
        ratio = float(change["value"]) / float(change["default"])
    except (ValueError, ZeroDivisionError):  # a word, a list, or from or to nothing
        return math.inf
    return abs(math.log(ratio)) if ratio > 0 else math.inf


def differing_sampling(run: Run, policy: str) -> str:
    """A sentence on sampling keys that differ between `evaluate` and a policy's training; else empty."""
    evaluation, _ = last_evaluation(run.stages)
    learner, judge = run.chain[policy], run.chain.get(evaluation)
    pairs = ((key, getattr(learner, key, None), getattr(judge, key, None)) for key in SAMPLING_KEYS)
    keys = [
        f"{evaluation}.{key}={asked} and {policy}.{key}={learned}"
        for key, learned, asked in pairs
        if None not in (learned, asked) and learned != asked
    ]
    if not keys:
        return ""
    return f"it asks otherwise than {policy} learned to answer ({', '.join(keys)})."
