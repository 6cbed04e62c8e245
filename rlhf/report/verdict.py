"""The verdict that a run ends with: whether it worked, what was gained, the first failed gate, what differs
from a run that worked, and the command that finds the cause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.metrics import purpose_metric
from rlhf.pipeline.recipe import last_evaluation
from rlhf.pipeline.run import Run
from rlhf.pipeline.stage import Stage
from rlhf.report.against import Worked, worked_before
from rlhf.report.findings import (
    Direction,
    Finding,
    evaluated,
    is_untrained,
    measured,
    silent_gold,
)
from rlhf.report.judges import judge_of, learners, no_judge, unproven_rewards

Outcome = Literal["worked", "no gain worth having", "did not work", "cannot be told"]
OUTCOME_OF: Mapping[Direction, Outcome] = {
    "better": "worked",
    "too small": "no gain worth having",
    "not better": "did not work",
    "unknown": "cannot be told",
}
UNTRAINED_VERDICT = "Your data and settings work; a random model says nothing about quality."


def verdict(run: Run) -> str:
    """The verdict, one statement per line. Empty if the run has nothing to judge."""
    found = outcome(run)
    if found is None:
        return ""
    if is_untrained(run):
        return UNTRAINED_VERDICT
    worked = worked_before(run) if found != "worked" else None
    lines = [
        *(doubts(run) if found == "cannot be told" else ()),
        *gains(run),
        *first_failed_gate(run),
        *over_optimized(run),
        *(against(worked) if worked is not None else ()),
        *(next_command(run, worked) if found != "worked" else ()),
    ]
    return "\n".join(lines) or "No stage of this run measures whether anything improved."


def outcome(run: Run) -> Outcome | None:
    """The verdict in a few words. A failed gate decides, else the last metric of improvement. None for a run
    that has nothing to judge, such as `stage=plan`."""
    if not any(has_purpose(run.chain[name]) for name in run.stages if name in run.chain):
        return None
    if is_untrained(run):
        return "cannot be told"
    if any(gate.outcome == "failed" for gate in run.gates):
        return "did not work"
    if any(doubts(run)):
        return "cannot be told"
    if is_below_base(run):
        return "did not work"
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


def doubts(run: Run) -> Iterator[str]:
    """Why no score of this run can tell whether it worked."""
    yield from filter(None, [silent_gold(run), *unproven_rewards(run), no_judge(run)])


def is_below_base(run: Run) -> bool:
    """Whether the last policy's gold score is below the untuned model's. The policy's gain over its start
    does not show this."""
    _, metrics = last_evaluation(run.stages)
    over = [Sampled.found(f"gold_over_base/{name}", metrics) for name in run.chain]
    known = [each for each in over if each is not None]
    return bool(known) and known[-1].high < 0


def gains(run: Run) -> Iterator[str]:
    """What improved and what did not, with intervals."""
    findings = [*dict(measured(run)).values(), *dict(evaluated(run)).values()]
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
        if named:
            yield f"{word}: {'; '.join(named)}."


def first_failed_gate(run: Run) -> Iterator[str]:
    """The first failed gate in the chain's order, with its advice. Those after it are often its symptoms."""
    places = {name: place for place, name in enumerate(run.chain)}
    failed = [gate for gate in run.gates if gate.outcome == "failed"]
    if failed:
        gate = min(failed, key=lambda gate: places.get(gate.stage, len(places)))
        more = f" {len(failed) - 1} more failed." if len(failed) > 1 else ""
        figure = f"{gate.stage}/{gate.name} = {gate.figure}, wanted {gate.bound}"
        yield f"First failed gate: {figure}. {gate.advice}{more}"


def over_optimized(run: Run) -> Iterator[str]:
    """Policies with a higher gold score at an earlier step than at the published one."""
    _, metrics = last_evaluation(run.stages)
    for name in run.chain:
        lost, kept = Sampled.found(f"gold_lost/{name}", metrics), run.metrics_of(name).get("best_step")
        if lost is None or kept is None or lost.low <= 0:
            continue
        if (peak := metrics[f"gold_peak_step/{name}"]) <= kept:
            yield (
                f"Note {name}: its gold score was higher at step {peak:.0f} than at step {kept:.0f}, whose "
                f"weights it keeps, by {lost.value:.2g} ({lost.low:.2g} to {lost.high:.2g}). Lower "
                f"{name}.steps, or raise {name}.kl.coef."
            )


def against(worked: Worked) -> Iterator[str]:
    """How the run differs from the nearest one that worked."""
    said = str(worked)
    yield f"{said[0].upper()}{said[1:]}"


def next_command(run: Run, worked: Worked | None) -> Iterator[str]:
    """The command that finds the cause by experiment, if a score can judge its trials. `ceiling` has no part
    to replace where nothing learned from scores or preferences."""
    if judge_of(run) is None or silent_gold(run):
        return
    runs_dir, name = run.directory.parent, run.directory.name
    elsewhere = "" if str(runs_dir) == "runs" else f" runs_dir={runs_dir}"
    if worked is not None:
        yield f"To find the cause: python -m rlhf bisect good={worked.name} bad={name}{elsewhere}"
    elif any(learners(run)):
        yield f"To find the part that limits it: python -m rlhf ceiling {name}{elsewhere}"
