"""The result of a decision in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rlhf.decide.candidate import Candidate
from rlhf.evaluation.sampled import Sampled
from rlhf.evaluation.selection import Decision, Outcome
from rlhf.pipeline.settings import DecideConfig


class Judgement(NamedTuple):
    """What the sealed questions say."""

    found: Decision
    looks: int
    """How often these sealed questions have judged, this time included."""
    questions: int


def headline(
    judgement: Judgement,
    candidates: Mapping[str, Candidate],
    untrained: Candidate,
    judge: str,
    config: DecideConfig,
) -> list[str]:
    """What was decided, and why: the first line says it, the others give reasons."""
    found = judgement.found
    gains = {name: each.gain for name, each in found.finalists.items()}
    lines = []
    if found.winner is not None:
        each = candidates[found.winner]
        lines.append(
            f"Ship {each.title}: its {judge} is {in_words(gains[each.name])} over that of {untrained.title}, the best "
            "option without training."
        )
        if each.gain_over_base is not None and untrained.config.asks != "base":
            lines.append(f"Over the base model: {in_words(each.gain_over_base)}.")
    elif found.outcome is Outcome.NO_TRAINING and not gains:
        lines.append(f"Do not train: every finalist is outside a limit. Use {untrained.title}.")
    elif found.outcome is Outcome.NO_TRAINING:
        lines.append(
            f"Do not train: {untrained.title} is as good. No finalist gains more than {found.at_most:+.3g} in "
            f"{judge}, and decide.smallest_gain={config.smallest_gain:g}."
        )
    else:
        more = (
            f"about {found.more_questions:,} more questions would tell (a third of them is sealed)"
            if found.more_questions is not None
            else "no number of questions that anybody writes would tell"
        )
        lines.append(
            f"It cannot be told whether training gains over {untrained.title}: {more}. Until then, use "
            f"{untrained.title}."
        )
    lines += [
        f"{candidates[name].title}: {in_words(gain)} over {untrained.title}."
        for name, gain in gains.items()
        if name != found.winner
    ]
    lines += [
        f"{candidates[name].title} is refused: {', '.join(limits)} is outside its limit."
        for name, limits in found.refused.items()
    ]
    if judgement.looks > 1:
        lines.append(
            f"These sealed questions have judged {judgement.looks} times, so the intervals are wider: each look halves "
            "the error."
        )
    return lines


def in_words(gain: Sampled) -> str:
    """A gain with its interval and the number of questions."""
    return f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}, {gain.rows} sealed questions)"


def percent(share: float | None) -> str:
    """A share in percent."""
    return f"{100 * (share or 0.0):.3g}%"
