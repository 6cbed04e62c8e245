"""`python -m rlhf bisect`: which differences between a good and a bad run make it bad, found by trials."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.bisect.differences import Difference, Side, differences, downstream, with_differences
from rlhf.bisect.scores import Scores, Verdict, compare, difference, in_words, mean_of
from rlhf.bisect.search import Answer, Found, Part, plan, search
from rlhf.cli.command import read
from rlhf.cli.trials import Finished, Judged, Trials, ended_by_signal, judged_run, named_run, positive
from rlhf.config import Complaint, ConfigError
from rlhf.disk import replace_text
from rlhf.evaluation.sampled import Sampled
from rlhf.exit_codes import DONE, NOT_FOUND
from rlhf.pipeline.experiment import build_experiment
from rlhf.pipeline.run import Run
from rlhf.tracking.progress import clock
from rlhf.tracking.tables import Cells, shown

HELP = """python -m rlhf bisect good=RUN bad=RUN [budget=30] [dry_run=true] [runs_dir=DIR]

Find out which differences between two runs make the second one bad. Each trial is the good run with some of
the differences put in, judged by the good run's independent judge on the same prompts. RUN is a run's name or
its directory. budget is the largest number of trials. dry_run=true only shows the differences, the trials and
their times. The result is printed and written to RUNS_DIR/bisect-GOOD-BAD/. After Ctrl-C the same command
continues.

Exit codes: 0 the cause was found, 3 it was not, 2 the runs cannot be compared.
"""
PROMPTS_FACTOR = 4
"""How many times as many prompts a trial gets that cannot be told. Four times halve the interval."""
MAX_SEEDS = 3
"""Largest number of seeds of one trial. The interval does not count how seeds differ, so more promise too
much."""
NO_PART: Part = frozenset()
Made = tuple[str, Part, int, int]
"""A stage, the differences that reach it, what is added to the seed, and the prompts if it evaluates."""


class Level(NamedTuple):
    """How thoroughly a trial is judged."""

    prompts: int
    seeds: int
    """Number of seeds, over which the scores of each prompt are averaged."""


def bisect(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Find the cause, or show the trials."""
    known = {"good": "", "bad": "", "budget": "30", "dry_run": "false", "runs_dir": defaults["runs_dir"]}
    keys = read("bisect", arguments, known, HELP)
    if keys is None:
        return DONE
    if not (keys["good"] and keys["bad"]):
        raise ConfigError("bisect: name both runs, as in `python -m rlhf bisect good=RUN bad=RUN`.")
    if keys["dry_run"] not in ("true", "false"):
        raise ConfigError(f"bisect dry_run={keys['dry_run']}: true or false.")
    bisection = make_bisection(keys, positive("bisect budget", keys["budget"]))
    bisection.introduce()
    if keys["dry_run"] == "true":
        bisection.show_plan()
        return DONE
    with Run(bisection.trials.directory).locked():
        return ended_by_signal(bisection.run)


def make_bisection(keys: Mapping[str, str], budget: int) -> Bisection:
    """Read both runs and compare them.

    Raises:
        ConfigError: a run is missing or has not finished, nothing can judge, or the runs do not differ.
    """
    runs_dir = Path(keys["runs_dir"])
    good = judged_run("good=", keys["good"], runs_dir)
    bad = bad_run(keys["bad"], runs_dir, good)
    if bad.files.directory.resolve() == good.files.directory.resolve():
        raise ConfigError(Complaint(f"bad={keys['bad']}", "it is the good run.", "Name two runs."))
    trials = Trials(good, f"bisect-{good.name}-{bad.name}", budget)
    sides = Side("good", good.experiment, good.recipes()), Side("bad", bad.experiment, bad.recipes())
    found = differences(sides[0], sides[1], trials.store, good.evaluation, good.judges)
    if not found:
        raise ConfigError(
            Complaint(
                f"bad={keys['bad']}",
                f"nothing that can change its policy differs from {good.name}; only how they are evaluated "
                "may differ.",
                "Compare the keys of evaluate.",
            )
        )
    return Bisection(good, bad, {each.name: each for each in found}, trials, sides[1].recipes)


def bad_run(word: str, runs_dir: Path, good: Judged) -> Finished:
    """The bad run. It may have ended at a failed gate: what it lacks is made by the first trial.

    Raises:
        ConfigError: it has not finished, or another policy is judged there.
    """
    files = named_run("bad=", word, runs_dir)
    summary = files.summary
    has_failed = any(gate["outcome"] == "failed" for gate in summary["gates"])
    if summary["verdict"] is None and not has_failed:
        raise ConfigError(Complaint(f"bad={word}", "it has not come to its end.", "Run its command again."))
    experiment = build_experiment({**files.config, "stage": [good.evaluation]})
    theirs = str(getattr(experiment.stages[good.evaluation], "subject", ""))
    if theirs != good.subject:
        raise ConfigError(
            Complaint(
                f"bad={word}",
                f"{good.evaluation} judges {theirs} there, and {good.subject} in {good.name}.",
                f"Run both with the same {good.evaluation}.subject.",
            )
        )
    return Finished(files, experiment)


@dataclass
class Bisection:
    """The search between two runs."""

    good: Judged
    bad: Finished
    differences: Mapping[str, Difference]
    trials: Trials
    bad_recipes: Mapping[str, Any]
    answers: dict[Part, Verdict] = field(default_factory=dict)
    """What has been tried."""
    scored: dict[tuple[Part, int, int], tuple[Scores | None, str]] = field(default_factory=dict)
    """Part, number of prompts and seed -> scores, or why there are none."""
    reach: dict[str, set[str]] = field(default_factory=dict)
    """Difference -> all stages whose results it changes."""
    first_level: int = 0
    """The level at which good and bad can be told apart."""
    made: set[Made] = field(default_factory=set)
    """What is in the store."""

    def __post_init__(self) -> None:
        chain, own = self.good.experiment.stages, self.good.prompts
        self.reach = {name: downstream(each.touches, chain) for name, each in self.differences.items()}
        for part in (NO_PART, self.everything):
            self.made |= {each for each, _ in self.stages(part, own, 0) if each[0] != self.good.evaluation}
        self.scored[NO_PART, own, 0] = self.good.scores(), ""
        if self.is_judged_alike():
            self.scored[self.everything, own, 0] = self.good.scores(directory=self.bad.files.directory), ""

    @property
    def everything(self) -> Part:
        """All differences: the bad run."""
        return frozenset(self.differences)

    @property
    def groups(self) -> list[list[str]]:
        """The differences by stage. The last stages come first, because their trials take the least time."""
        groups: dict[str, list[str]] = {}
        for each in self.differences.values():
            groups.setdefault(each.group, []).append(each.name)
        return [*reversed(groups.values())]

    @property
    def levels(self) -> list[Level]:
        """More prompts each time, then more seeds."""
        sizes, available = [self.good.prompts], len(self.good.rows())
        while sizes[-1] < available:
            sizes.append(min(available, sizes[-1] * PROMPTS_FACTOR))
        return [Level(size, 1) for size in sizes] + [Level(sizes[-1], n) for n in range(2, MAX_SEEDS + 1)]

    def is_judged_alike(self) -> bool:
        """Whether the bad run's own evaluation asked and judged like the good run's."""
        name = self.good.evaluation
        ours, theirs = self.good.recipes()[name], self.bad_recipes.get(name)
        if theirs is None:
            return False
        same = all(ours.get(key) == theirs.get(key) for key in ("knobs", "external"))
        judges = all(ours["inputs"].get(each) == theirs["inputs"].get(each) for each in self.good.judges)
        role = self.good.section.mount.own_role("evaluate")
        return same and judges and bool(ours["data"][role] == theirs["data"][role])

    def introduce(self) -> None:
        """Print the differences."""
        rows = [
            [each.group, each.name, each.words, f"gone: {each.lost} run's" if each.lost else ""]
            for each in self.differences.values()
        ]
        self.trials.console.print(
            f"{self.bad.name} differs from {self.good.name} in {len(rows)} way{'s' * (len(rows) > 1)} that "
            f"can change its policy. The {self.good.words} of {self.good.subject} judges, on "
            f"{self.good.prompts} prompts."
        )
        self.trials.console.print(shown(Cells(["stage", "difference", "good -> bad", ""], rows)))

    def stages(self, part: Part, prompts: int, seed: int) -> Iterator[tuple[Made, float]]:
        """The stages of a trial, and roughly the seconds of each."""
        for stage in self.good.experiment.needed():
            own = frozenset(name for name in part if stage in self.reach[name])
            directly = any(stage in self.differences[name].touches for name in part)
            sides = (self.bad, self.good) if directly else (self.good, self.bad)
            seconds = next(filter(None, (side.seconds(stage) for side in sides)), 0.0)
            is_evaluation = stage == self.good.evaluation
            seconds *= prompts / self.good.prompts if is_evaluation else 1.0
            yield (stage, own, seed, prompts if is_evaluation else 0), seconds

    def seconds(self, part: Part, made: Set[Made], level: Level) -> float:
        """Roughly how long a trial takes, if these stages are in the store."""
        stages = self.stages(part, level.prompts, level.seeds - 1)
        return sum(seconds for stage, seconds in stages if stage not in made)

    def cannot_run(self, part: Part) -> str:
        """Why a trial cannot be run: it needs what is gone; else empty."""
        for each in self.differences.values():
            if each.lost and (each.lost == "bad") == (each.name in part):
                run = self.bad if each.lost == "bad" else self.good
                return f"cannot run: what {each.name} named in {run.name} is gone"
        return ""

    def known(self, part: Part) -> Answer | None:
        """What is known of a part without a trial."""
        if part in self.answers:
            return self.answers[part].answer
        if part == self.everything:
            return Answer.BAD
        return Answer.UNKNOWN if self.cannot_run(part) or self.trials.is_spent else None

    def remaining(self) -> list[tuple[list[Part], float]]:
        """For each difference: the trials that follow if it alone is to blame, and their seconds."""
        level, found = self.levels[self.first_level], []
        for parts in plan(self.groups, self.known):
            made, total = {*self.made}, 0.0
            for part in parts:
                total += self.seconds(part, made, level)
                made |= {stage for stage, _ in self.stages(part, level.prompts, 0)}
            found.append((parts, total))
        return found

    def show_plan(self) -> None:
        """Print the trials that may follow, and how long they take."""
        plans, level = self.remaining(), self.levels[0]
        first = [] if (self.everything, level.prompts, 0) in self.scored else [self.everything]
        parts = dict.fromkeys([*first, *(part for parts, _ in plans for part in parts)])
        rows = [[self.in_words(part), clock(self.seconds(part, self.made, level))] for part in parts]
        self.trials.console.print(shown(Cells(["trial", "time alone"], rows), right=[1]))
        numbers, totals = [len(parts) + len(first) for parts, _ in plans], [total for _, total in plans]
        self.trials.console.print(
            f"If one difference is to blame: {min(numbers)} to {max(numbers)} of these trials, "
            f"{clock(min(totals))} to {clock(max(totals))}. A trial that cannot be told takes more prompts "
            "or seeds, and so more time. Times are those of the two runs."
        )

    def in_words(self, part: Part) -> str:
        """A trial, in words."""
        if part == self.everything:
            return f"{self.bad.name}, evaluated as {self.good.name}"
        if len(self.everything - part) < len(part):
            return f"{self.bad.name} without {', '.join(sorted(self.everything - part))}"
        return f"{self.good.name} with {', '.join(sorted(part))}" if part else self.good.name

    def run(self) -> int:
        """Search, print and write the result."""
        gap = self.tell_apart()
        if gap is None or not gap.high < 0:
            return self.end(None, gap)
        return self.end(search(self.groups, lambda part: self.test(part).answer), gap)

    def tell_apart(self) -> Sampled | None:
        """How much worse the bad run is, with as many prompts and seeds as it takes; None if it has no
        scores."""
        gap: Sampled | None = None
        for number, level in enumerate(self.levels):
            scores = [self.pooled(part, level) for part in (NO_PART, self.everything)]
            if scores[0] is None or scores[1] is None:
                break
            gap, self.first_level = difference(scores[1], scores[0]), number
            if gap.high < 0 or gap.low > 0:
                break
        return gap

    def test(self, part: Part) -> Verdict:
        """Whether the good run with these differences is bad."""
        if part in self.answers:
            return self.answers[part]
        verdict = Verdict(Answer.UNKNOWN, why=self.cannot_run(part))
        for level in self.levels[self.first_level :] if not verdict.why else ():
            scores = [self.pooled(each, level) for each in (part, NO_PART, self.everything)]
            if any(each is None for each in scores):
                if verdict.gain is None:
                    verdict = Verdict(Answer.UNKNOWN, why=self.why_not(part, level))
                break
            verdict = compare(*(each for each in scores if each is not None))
            if verdict.answer is not Answer.UNKNOWN:
                break
        self.answers[part] = verdict
        self.trials.console.print(
            f"  {verdict.answer.value}: {self.in_words(part)}: {verdict.words}", markup=False
        )
        return verdict

    def pooled(self, part: Part, level: Level) -> Scores | None:
        """A part's scores at a level; None if it has none."""
        several = [self.scores(part, level.prompts, seed) for seed in range(level.seeds)]
        known = [each for each in several if each is not None]
        return mean_of(known) if len(known) == len(several) else None

    def why_not(self, part: Part, level: Level) -> str:
        """Why a trial has no scores at a level."""
        found = (
            self.scored[each, level.prompts, seed][1]
            for each in (part, NO_PART, self.everything)
            for seed in range(level.seeds)
        )
        return next(filter(None, found), "")

    def scores(self, part: Part, prompts: int, seed: int) -> Scores | None:
        """A part's scores, by a trial if they are not known."""
        at = part, prompts, seed
        if at not in self.scored:
            self.scored[at] = (None, self.cannot_run(part))
            if not self.scored[at][1]:
                self.scored[at] = self.run_trial(part, prompts, seed)
        return self.scored[at][0]

    def run_trial(self, part: Part, prompts: int, seed: int) -> tuple[Scores | None, str]:
        """Run one trial, and remember what it has made."""
        own = {} if prompts == self.good.prompts else {"num_prompts": prompts}
        config = with_differences(
            self.good.config(**own), (each for each in self.differences.values() if each.name in part)
        )
        config["seed"] += seed
        more = [f"{prompts} prompts"] * bool(own) + [f"seed {config['seed']}"] * bool(seed)
        words = ", ".join([self.in_words(part), *more])
        seconds = self.seconds(part, self.made, Level(prompts, seed + 1))
        others = max((total for _, total in self.remaining()), default=0.0)
        left = f", then about {clock(max(0.0, others - seconds))} if one difference is to blame"
        found = self.trials.run(config, words, seconds, left)
        if found[0] is not None:
            self.made |= {stage for stage, _ in self.stages(part, prompts, seed)}
        return found

    def end(self, found: Found | None, gap: Sampled | None) -> int:
        """Print and write the result. Gives the exit code."""
        lines = [*self.result(found, gap)]
        is_found = found is not None and found.without is Answer.GOOD
        rows = [
            [str(number), self.in_words(part), each.answer.value, each.words]
            for number, (part, each) in zip(count(1), self.answers.items(), strict=False)
        ]
        table = Cells(["", "trial", "", f"{self.good.words} minus that of {self.good.name}"], rows)
        console = self.trials.console
        if rows:
            console.print(shown(table))
        console.print("\n".join(lines), markup=False)
        content = {
            "good": str(self.good.files.directory),
            "bad": str(self.bad.files.directory),
            "found": is_found,
            "causes": [sorted(cause) for cause in found.causes] if found else [],
            "gap": None if gap is None else gap._asdict(),
            "differences": {each.name: each.words for each in self.differences.values()},
            "trials": [
                {"put_in": sorted(part), "answer": each.answer.value, "why": each.why}
                | {"gain": None if each.gain is None else each.gain._asdict()}
                for part, each in self.answers.items()
            ],
        }
        directory = self.trials.directory
        replace_text(directory / "bisect.json", json.dumps(content, indent=2))
        title = f"# {self.bad.name} against {self.good.name}"
        replace_text(directory / "bisect.md", "\n\n".join([title, *lines, table.markdown()]) + "\n")
        console.print(f"Written to {directory / 'bisect.md'} and bisect.json.", markup=False)
        return DONE if is_found else NOT_FOUND

    def result(self, found: Found | None, gap: Sampled | None) -> Iterator[str]:
        """What was found, in sentences."""
        if gap is None:
            why = self.why_not(self.everything, self.levels[self.first_level])
            yield f"{self.bad.name} cannot be judged like {self.good.name}: {why}."
            return
        yield f"{self.bad.name} against {self.good.name}: {in_words(gap)} of the {self.good.words}."
        if found is None and gap.low > 0:
            yield f"{self.bad.name} is the better one. Exchange good= and bad=."
        elif found is None:
            yield (
                "The two cannot be told apart, so there is nothing to search for. If the bad run evaluates "
                "in another way, look there: here both were evaluated like the good one."
            )
        if found is None:
            return
        yield f"Bad means below half way, {gap.value / 2:+.3f}."
        for cause in found.causes:
            yield from self.about(cause)
        everything = frozenset[str]().union(*found.causes)
        left = self.everything - everything
        names = ", ".join(sorted(everything))
        mended = self.answers[left].words if left in self.answers else "it is the good run"
        match found.without:
            case Answer.GOOD:
                yield f"Taken out, {self.bad.name} is mended: without {names}: {mended}."
            case Answer.BAD:
                yield f"More is to blame: {self.bad.name} without {names} is still bad: {mended}."
            case Answer.UNKNOWN:
                yield f"Whether {self.bad.name} without {names} is good cannot be told: {mended}."
        if self.trials.is_spent:
            yield f"budget={self.trials.budget} is spent. The same command with a larger budget continues."

    def about(self, cause: Part) -> Iterator[str]:
        """A cause, and what shows it."""
        words = " and ".join(f"{name} ({self.differences[name].words})" for name in sorted(cause))
        alone = self.answers[cause].words if cause in self.answers else "as the bad run"
        breaks = "it breaks" if len(cause) == 1 else "they break"
        yield f"Cause: {words}. Put in alone, {breaks} {self.good.name}: {alone}."
        for name in sorted(cause) if len(cause) > 1 else ():
            rest = cause - {name}
            verdict = self.answers.get(rest)
            if verdict is not None and verdict.answer is not Answer.GOOD:
                yield f"Whether {name} is needed for that cannot be told: without it {verdict.words}."
