"""Which stage is to blame for a failed gate, and why. It may be earlier in the chain than the gate."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.graph import inputs, starts_from
from rlhf.pipeline.recipe import kind_of, last_evaluation
from rlhf.pipeline.run import GateResult, Run
from rlhf.pipeline.stage import Stage
from rlhf.report.blame import Blame
from rlhf.rewards.kinds import keyed_parts, stage_of

RETENTION_GATES = ("retention_perplexity_ratio", "question_accuracy_change")
"""Gates of `evaluate` on what a policy still knows. Each policy of the chain has the same metric."""
MIN_LENGTH_CORRELATION = 0.3
"""Smallest correlation of a reward model's scores with length at which it pays for length. 0.91 was measured
where pairs were ordered by length, 0.11 in the demo."""
MIN_LENGTH_GROWTH = 2.0
"""Smallest ratio of answer lengths that explains a rise of common words. 3.7 was measured where 70% of SFT's
answers were "N/A", 1.07 in the demo."""

OTHER_TEMPLATE = (
    "it asks the base model otherwise than its tokenizer's own template, and no stage trained the model on "
    "this one. Set model.chat_template=null, or start from sft."
)


def convictions(run: Run, gate: GateResult) -> dict[str, Blame]:
    """The stages that are to blame for a failed gate, and why."""
    found: dict[str, Blame] = {}
    figure = f"{gate.name} = {gate.figure}, wanted {gate.bound}"
    kind = kind_of(gate.stage)
    if kind == "prepare" and gate.name == "bad_share":
        why = f"it left out most rows of a data set ({figure}). Its table says of which, and why."
        found[gate.stage] = Blame((gate.stage,), why)
    elif kind == "generate" and gate.name == "stop_rate":
        found |= endless(run, gate.stage, figure)
    elif kind == "generate" and gate.name == "echo_rate":
        made_by = str(getattr(run.chain[gate.stage], "policy", gate.stage))
        blamed = made_by if made_by in run.chain else gate.stage
        found[blamed] = Blame(
            (blamed,),
            f"the answers repeat the question ({figure}). Are prompt and answer exchanged in the rows that "
            "it learned?",
        )
    elif kind == "generate" and gate.name == "within_prompt_share":
        found[gate.stage] = Blame(
            (gate.stage,),
            f"all answers to one prompt have nearly the same score ({figure}). Either it does not read the "
            "answer, or the answers are alike "
            f"({gate.stage}.temperature={getattr(run.chain[gate.stage], 'temperature', 1.0):g}).",
            f"the reward of {gate.stage}",
        )
    elif kind == "generate" and gate.name == "score_reliability":
        found[gate.stage] = Blame(
            (gate.stage,),
            f"the same answers get other scores when they come in another order ({figure}). Does it return "
            "its scores in the order of its arguments?",
            f"the reward of {gate.stage}",
        )
    elif kind == "sft" and gate.name == "cut_share":
        found[gate.stage] = Blame(
            (gate.stage,),
            f"the answers that it learned were cut off before it read them ({figure}). Look where its data "
            "comes from.",
        )
    elif kind == "sft" and gate.name == "prompt_gain":
        found[gate.stage] = Blame(
            (gate.stage,),
            f"what it learned to answer does not depend on the prompts ({figure}). Are the rows of its data "
            "out of step, or all answers alike?",
        )
    elif gate.name == "kl":
        found[gate.stage] = Blame((gate.stage,), f"the policy went too far from its start ({figure}).")
    elif kind == "evaluate" and gate.name == "gold_correlation":
        found |= another_aim(run, gate)
    elif kind == "evaluate" and (first := first_failing(run, gate)) is not None:
        policy, each = first
        if gate.name in ("length_ratio", "word_gain"):
            blamed, blame = paid_for_form(run, policy, each)
            found[blamed] = blame
        elif gate.name == "stop_rate_change":
            found[policy] = Blame(
                (policy,),
                f"far fewer of its answers end by themselves than before ({each.name} = {each.figure}). Does "
                "its reward pay for that? Read its last answers.",
            )
        elif gate.name in RETENTION_GATES:
            found[policy] = Blame(
                (policy,),
                f"its policy lost what the base model knew ({each.name} = {each.figure}, wanted "
                f"{gate.bound}). Look at its data and its learning rate.",
            )
    return found


def endless(run: Run, stage: str, figure: str) -> dict[str, Blame]:
    """Why most answers do not end by themselves."""
    asks = run.chain[stage]
    policy, most = str(getattr(asks, "policy", "")), getattr(asks, "max_new_tokens", None)
    learned = run.metrics_of(policy).get("answer_tokens")
    said = f"most answers do not end by themselves ({figure})"
    if uses_other_template(run, stage):
        return {stage: Blame(("model",), f"{said}: {OTHER_TEMPLATE}", "model.chat_template")}
    if learned is not None and most is not None and learned > most:
        return {
            policy: Blame(
                (policy, stage),
                f"{said}: those that {policy} learned have {learned:.0f} tokens on average, and "
                f"{stage}.max_new_tokens={most}. Do the answers of {policy}.data run on, or is the limit too "
                "low?",
            )
        }
    return {
        stage: Blame(
            ("model", stage),
            f"{said}. Either the template writes no end that the model learned, or answers are cut off.",
            f"model.chat_template, or what {stage} asks",
        )
    }


def uses_other_template(run: Run, stage: str) -> bool:
    """Whether a `generate` samples from the base model with another template than its tokenizer's own."""
    untuned = kind_of(stage) == "generate" and getattr(run.chain.get(stage), "policy", None) == "base"
    return untuned and bool(run.metrics_of("prepare").get("foreign_template"))


def another_aim(run: Run, gate: GateResult) -> dict[str, Blame]:
    """Blame for the reward of the chain's first policy, which does not agree with the gold score."""
    for name, stage in run.chain.items():
        if stage.makes == "policy" and stage.reads().rewards:
            reward, figure = reward_of(run, name), f"{gate.name} = {gate.figure}"
            is_against = (gate.value if gate.sampled is None else gate.sampled.high) < 0
            if is_against and (counted := counted_against(stage, reward)):
                return {name: Blame((name,), f"{counted}, and goes against the gold score ({figure}).")}
            said = f"it {'goes against' if is_against else 'does not go with'} the gold score ({figure})."
            if not (reward and is_against):
                return {reward or name: Blame((reward or name,), said, reward or f"the reward of {name}")}
            return {
                reward: Blame(
                    (reward, gate.stage),
                    f"{said} Are the better and the worse answers of {reward}.pairs exchanged, or does "
                    f"{gate.stage}.gold give the worse answers more?",
                )
            }
    return {}


def counted_against(stage: Stage, reward: str | None) -> str:
    """A sentence if the reward model, or without one every part of the reward, has a weight below 0; else
    empty."""
    parts = keyed_parts(stage.reads().rewards)
    learned = [each for each in parts if reward is not None and stage_of(each[1].source) == reward]
    if not all(part.weight < 0 for _, part in learned or parts):
        return ""
    key, part = (learned or parts)[0]
    return (
        f"{key} counts {part.source} with a weight of {part.weight:g}, so it pays for what that likes least"
    )


def paid_for_form(run: Run, policy: str, each: GateResult) -> tuple[str, Blame]:
    """Blame for a policy's reward after its answers changed in length or took up a word."""
    stage = run.chain[policy]
    reward = reward_of(run, policy)
    together = run.metrics_of(reward).get("length_correlation") if reward else None
    if each.name.startswith("length_ratio"):
        seen = "" if together is None else f"; the reward's scores go with length by {together:+.2f}"
        did, form = "changed the length of the answers", "length"
    else:
        if (short := grown_from_little(run, policy, each)) is not None:
            return short
        word = taken_up(run, policy)
        put = f'the word "{word}"' if word else "one word"
        went_far = any((g.stage, g.name, g.outcome) == (policy, "kl", "failed") for g in run.gates)
        if reward and went_far:  # a reward model is right only near what it was trained on
            return policy, Blame((policy,), f"far from its start it put {put} into the answers.")
        together, seen, did, form = None, "", f"put {put} into the answers", "a word"
    said = f"{stage.full_title} {did} ({each.name} = {each.figure}{seen})"
    if together is not None and abs(together) < MIN_LENGTH_CORRELATION:
        return policy, Blame(
            (policy,),
            f"{said}. The reward hardly pays for length: is what {policy} starts from much shorter or longer "
            f"than the answers of {reward}.pairs?",
        )
    blamed = reward or policy
    subject = f"the reward of {policy}" if reward is None and stage.reads().rewards else ""
    why = f"{said}. What it learned from may pay for {form} and not for what is said."
    return blamed, Blame((blamed,), why, subject)


def taken_up(run: Run, policy: str) -> str:
    """The word that `word_gain` is about, from the answers; empty if the run has no answers."""
    from rlhf.evaluation.wording import gained_word

    evaluation, _ = last_evaluation(run.stages)
    start = str(getattr(run.chain.get(evaluation), "start", ""))
    given = answers(run)
    texts = [[row["response"] for row in given.get(name, ())] for name in (policy, start)]
    return gained_word(*texts)[0] if given else ""


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


def grown_from_little(run: Run, policy: str, each: GateResult) -> tuple[str, Blame] | None:
    """The stage whose answers a policy starts from, if they are so short that longer ones take up common
    words by themselves."""
    evaluation, metrics = last_evaluation(run.stages)
    start = str(getattr(run.chain.get(evaluation), "start", ""))
    before, after = (metrics.get(f"length_mean/{name}") for name in (start, policy))
    if start not in run.chain or before is None or after is None or after < MIN_LENGTH_GROWTH * before:
        return None
    return start, Blame(
        (start,),
        f"its answers have {before:.0f} tokens, and those of {run.chain[policy].full_title} {after:.0f}, so "
        f"they took up common words ({each.name} = {each.figure}). Are the answers of {start}.data cut off, "
        "or often empty?",
    )


def first_failing(run: Run, gate: GateResult) -> tuple[str, GateResult] | None:
    """The first stage of the chain whose policy fails a gate of `evaluate`, and its own figure."""
    for name in run.chain:
        metric = f"{gate.name}/{name}"
        sampled = Sampled.found(metric, run.metrics_of(gate.stage))
        if sampled is not None:
            each = replace(gate, name=metric, value=sampled.value, sampled=sampled)
            if each.outcome == "failed":
                return name, each
    return None


def broken_start(run: Run) -> dict[str, Blame]:
    """Blame for a user's starting model that lost what the base model knows; else empty."""
    evaluation, metrics = last_evaluation(run.stages)
    init = getattr(run.chain.get(evaluation), "init", None)
    starts = {name: start for name, stage in run.chain.items() if (start := starts_from(stage))}
    asking = [name for name, (_, model) in starts.items() if model == init]
    learner = next((name for name in asking if run.chain[name].makes == "policy"), None)
    for gate in run.gates:
        sampled = Sampled.found(f"{gate.name}/init", metrics) if gate.name in RETENTION_GATES else None
        if sampled is None or learner is None:
            continue
        each = replace(gate, name=f"{gate.name}/init", value=sampled.value, sampled=sampled)
        if each.outcome == "failed":
            figure = f"{each.name} = {each.figure}, wanted {gate.bound}"
            lost = "the model that it names lost what the base model knows, before any step"
            why = f"{lost} ({figure}). Was it saved whole?"
            return {asking[0]: Blame((learner,), why, f"{learner}.{starts[learner][0]}")}
    return {}


def reward_of(run: Run, policy: str) -> str | None:
    """The reward model that a policy learned from."""
    read = inputs(run.chain[policy], run.chain)
    return next((name for name in read if run.chain[name].makes == "reward"), None)
