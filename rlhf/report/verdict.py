"""The sentence that a run ends with: what improved, what did not, and which stage is to blame for it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.run import Run

Direction = Literal["better", "not better", "unknown"]


class Measure(NamedTuple):
    """A summary metric that tells whether a stage did what it is for: against no change, which is 0."""

    stage: str
    metric: str
    sign: int
    """1 where more is better, -1 where less is."""
    words: str
    format: str


MEASURES = {
    "sft": Measure("sft", "held_out_loss_change", -1, "SFT's loss on held-out answers", "+.3g"),
    "reward": Measure(
        "reward", "accuracy_over_baseline", 1, "the reward model's ranking against chance and length", "+.3g"
    ),
    "ppo": Measure("ppo", "held_out_score_gain", 1, "PPO's score on held-out prompts", "+.3g"),
    "gold": Measure("evaluate", "gold_gain", 1, "the gold score on new prompts", "+.3g"),
    "learned": Measure("evaluate", "score_gain", 1, "the reward's score on new prompts", "+.3g"),
}
"""In the order of the chain. The last is of interest where nobody knows the gold score."""


class Finding(NamedTuple):
    """A measure as this run has it."""

    measure: Measure
    sampled: Sampled

    @property
    def direction(self) -> Direction:
        """Whether the whole interval is on one side of no change."""
        _, low, high, _ = self.sampled
        worst, best = (low, high) if self.measure.sign > 0 else (-high, -low)
        return "better" if worst > 0 else "not better" if best <= 0 else "unknown"

    def __str__(self) -> str:
        return f"{self.measure.words} ({self.sampled.value:{self.measure.format}})"


def verdict(run: Run) -> str:
    """What improved, what did not, and who is to blame; or that nothing can be said."""
    findings = found(run)
    if not findings:
        return "Nothing can be said: no stage of this run measures whether anything improved."
    parts = []
    for word, direction in (
        ("Improved", "better"),
        ("Did not improve", "not better"),
        ("Cannot be told from so few rows", "unknown"),
    ):
        named = [str(finding) for finding in findings.values() if finding.direction == direction]
        parts += [f"{word}: {'; '.join(named)}."] if named else []
    blamed = blame(run, {name: finding.direction for name, finding in findings.items()})
    if blamed is None and all(finding.direction == "unknown" for finding in findings.values()):
        return f"Nothing can be said. {' '.join(parts)}"
    return " ".join([*parts, blamed or ""]).rstrip()


def found(run: Run) -> dict[str, Finding]:
    """What the run measured, by its name in MEASURES."""
    findings = {}
    for name, measure in MEASURES.items():
        sampled = Sampled.found(measure.metric, run.metrics_of(measure.stage))
        if sampled is not None and not (name == "learned" and "gold" in findings):
            findings[name] = Finding(measure, sampled)
    return findings


def blame(run: Run, directions: dict[str, Direction]) -> str | None:
    """The first stage of the chain that did not do what it is for, and why it is that one; None where none
    is known to have failed."""
    bad = [name for name, direction in directions.items() if direction == "not better"]
    if "sft" in bad:
        return "To blame is sft: it learned nothing of its examples, and all that follows starts from it."
    if "reward" in bad:
        return (
            "To blame is reward: it ranks no better than a rule that reads no word: PPO cannot learn from it."
        )
    if "ppo" in bad and directions.get("reward") == "unknown":
        return (
            "To blame is reward or ppo: PPO did not raise its score, and nobody can tell whether the reward "
            "model ranks well enough to learn from."
        )
    if "ppo" in bad:
        ranks = "the reward model ranks well" if "reward" in directions else "its reward is not learned"
        return f"To blame is ppo: {ranks}, and PPO found no policy that scores better."
    if "gold" in bad:
        if directions.get("ppo") == "better":
            reward = "reward" if "reward" in directions else "the reward"
            return (
                f"To blame is {reward}: PPO raised its score, and the gold score did not follow. The policy "
                "found what the reward likes by mistake (reward hacking)."
            )
        return "To blame is ppo: what it publishes is no better than what it started from, by the gold score."
    if "learned" in bad:
        return "To blame is ppo: what it publishes scores no better than what it started from on new prompts."
    failed = [f"{gate.stage} ({gate.name} = {gate.figure})" for gate in run.gates if gate.outcome == "failed"]
    return f"To blame is {', '.join(failed)}: its gate failed." if failed else None
