"""`python -m rlhf bisect`: which differences between a good and a bad run make it bad, found by trials."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.bisect.differences import Difference, Side, differences, downstream, with_differences
from rlhf.bisect.scores import MIN_PROMPTS, NoScoresError, Scores, Verdict, compare, difference, in_words
from rlhf.bisect.search import Answer, Found, Part, plan, search
from rlhf.cli.command import read
from rlhf.cli.runs import state_of
from rlhf.cli.trials import Finished, Judged, NotTriedError, Trials, is_true, judged_run, named_run
from rlhf.config import Complaint, ConfigError
from rlhf.digests import Recipe
from rlhf.evaluation.sampled import Sampled
from rlhf.exit_codes import DONE, NOT_FOUND
from rlhf.pipeline.experiment import build_experiment
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
MIN_FACTOR = 2
"""With fewer further prompts, all runs would answer again for an interval that is hardly narrower."""
MAX_SEEDS = 3
"""Largest number of seeds of one trial. Each is a training run of its own."""
NOT_APART = (
    "The two cannot be told apart, so there is nothing to search for. Both were evaluated like the good run: "
    "if the bad one evaluates in another way, look there."
)
NO_PART: Part = frozenset()
Made = tuple[str, Part, int, int]
"""A stage, the differences that reach it, what is added to the seed, and the prompts if it evaluates."""


class Level(NamedTuple):
    """How thoroughly a trial is judged."""

    prompts: int
    seeds: int
    """Number of seeds. The first one is the run's own."""


def bisect(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Find the cause, or show the trials."""
    known = {"good": "", "bad": "", "budget": "30", "dry_run": "false", "runs_dir": defaults["runs_dir"]}
    keys = read("bisect", arguments, known, HELP)
    if keys is None:
        return DONE
    if not (keys["good"] and keys["bad"]):
        raise ConfigError("bisect: name both runs, as in `python -m rlhf bisect good=RUN bad=RUN`.")
    if not keys["budget"].isdecimal() or keys["budget"] == "0":
        raise ConfigError(f"bisect budget={keys['budget']}: give the number of trials, 1 or more.")
    is_dry = is_true("bisect dry_run", keys["dry_run"])
    bisection = make_bisection(keys["good"], keys["bad"], Path(keys["runs_dir"]), int(keys["budget"]))
    bisection.introduce()
    if is_dry:
        bisection.show_plan()
        return DONE
    return bisection.trials.finish(bisection.run)


def make_bisection(good_name: str, bad_name: str, runs_dir: Path, budget: int) -> Bisection:
    """Read both runs and compare them.

    Raises:
        ConfigError: a run is missing or has not finished, nothing can judge, or the runs do not differ.
    """
    good = judged_run("good=", good_name, runs_dir)
    bad = bad_run(bad_name, runs_dir, good)
    if bad.files.directory.resolve() == good.files.directory.resolve():
        raise ConfigError(Complaint(f"bad={bad_name}", "it is the good run.", "Name two runs."))
    trials = Trials(good, "bisect", f"bisect-{good.name}-{bad.name}", budget)
    sides = Side("good", good.experiment, good.recipes()), Side("bad", bad.experiment, bad.recipes())
    found = differences(sides[0], sides[1], trials.store, good.evaluation, good.judges)
    if not found:
        why = f"nothing that can change its policy differs from {good.name}."
        fix = f"If its evaluation is worse, compare the keys of {good.evaluation}."
        raise ConfigError(Complaint(f"bad={bad_name}", why, fix))
    return Bisection(good, bad, {each.name: each for each in found}, trials, sides[1].recipes)


def bad_run(word: str, runs_dir: Path, good: Judged) -> Finished:
    """The bad run. A failed gate may have ended it: the first trial makes what it lacks.

    Raises:
        ConfigError: it has not finished, or another policy is judged there.
    """
    files = named_run("bad=", word, runs_dir)
    if (status := state_of(files.directory).status) not in ("done", "failed"):
        raise ConfigError(Complaint(f"bad={word}", f"it is {status}.", "Run its command to its end."))
    try:
        experiment = build_experiment({**files.config, "stage": [good.evaluation]})
    except ConfigError as error:
        why = f"it cannot be evaluated like {good.name}. {error}"
        fix = f"Run it again with stage={good.evaluation}, and with what that needs."
        raise ConfigError(Complaint(f"bad={word}", why, fix)) from None
    theirs = str(getattr(experiment.stages[good.evaluation], "subject", ""))
    if theirs != good.subject:
        why = f"{good.evaluation} judges {theirs} there, and {good.subject} in {good.name}."
        raise ConfigError(Complaint(f"bad={word}", why, "Run both with the same subject."))
    return Finished(files, experiment)


@dataclass
class Bisection:
    """The search between two runs."""

    good: Judged
    bad: Finished
    differences: Mapping[str, Difference]
    trials: Trials
    bad_recipes: Mapping[str, Recipe]
    answers: dict[Part, Verdict] = field(default_factory=dict)
    """What has been tried."""
    scored: dict[tuple[Part, int, int], Scores | NoScoresError] = field(default_factory=dict)
    """Differences, number of prompts and what is added to the seed -> scores, or why there are none."""
    not_tried: set[Part] = field(default_factory=set)
    """What was asked for when the budget was spent."""
    refused: dict[Part, str] = field(default_factory=dict)
    """Why the keys of a part do not fit together; empty if they do."""
    made: set[Made] = field(default_factory=set)
    """What is in the store."""
    first_level: int = 0
    """The level at which good and bad can be told apart."""

    def __post_init__(self) -> None:
        chain, own = self.good.experiment.stages, self.good.prompts
        self.everything: Part = frozenset(self.differences)
        self.reach = {name: downstream(each.touches, chain) for name, each in self.differences.items()}
        for part in (NO_PART, self.everything):
            self.made |= {each for each, _ in self.stages(part, own, 0) if each[0] != self.good.evaluation}
        self.scored[NO_PART, own, 0] = self.good.scores()
        if self.is_judged_alike():
            self.scored[self.everything, own, 0] = self.good.scores(directory=self.bad.files.directory)

    def is_judged_alike(self) -> bool:
        """Whether the bad run's own evaluation asked and judged like the good run's."""
        name, role = self.good.evaluation, self.good.section.mount.own_role("evaluate")
        ours, theirs = self.good.recipes()[name], self.bad_recipes.get(name)
        if theirs is None:
            return False
        judges = all(ours["inputs"].get(each) == theirs["inputs"].get(each) for each in self.good.judges)
        same = all(ours[key] == theirs[key] for key in ("knobs", "external"))
        return judges and same and bool(ours["data"][role] == theirs["data"][role])

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
        while sizes[-1] < available and (sizes[-1] < MIN_PROMPTS or sizes[-1] * MIN_FACTOR <= available):
            sizes.append(min(available, sizes[-1] * PROMPTS_FACTOR))
        return [Level(size, 1) for size in sizes] + [Level(sizes[-1], n) for n in range(2, MAX_SEEDS + 1)]

    def introduce(self) -> None:
        """Print the differences."""
        rows = [
            [each.group, each.name, each.words, f"gone: the {each.lost} run's" if each.lost else ""]
            for each in self.differences.values()
        ]
        self.trials.console.print(
            f"{self.bad.name} differs from {self.good.name} in {len(rows)} way{'s' * (len(rows) > 1)}. The "
            f"{self.good.words} of {self.good.subject} judges, on {self.good.prompts} prompts."
        )
        self.trials.console.print(shown(Cells(["stage", "difference", "good -> bad", ""], rows)))

    def stages(self, part: Part, prompts: int, seed: int) -> Iterator[tuple[Made, float]]:
        """The stages of a trial, and roughly the seconds of each."""
        for stage in [each for each in self.good.experiment.needed() if each not in self.good.judges]:
            own = frozenset(name for name in part if stage in self.reach[name])
            is_changed = any(stage in self.differences[name].touches for name in part)
            sides = (self.bad, self.good) if is_changed else (self.good, self.bad)
            seconds = next(filter(None, (side.seconds(stage) for side in sides)), 0.0)
            is_evaluation = stage == self.good.evaluation
            asked = prompts / self.good.prompts / len(self.good.section.policies)  # a trial asks one policy
            factor = asked if is_evaluation else 1.0
            yield (stage, own, seed, prompts if is_evaluation else 0), factor * seconds

    def seconds(self, part: Part, prompts: int, seed: int, made: Set[Made]) -> float:
        """Roughly how long a trial takes, if these stages are in the store."""
        return sum(seconds for stage, seconds in self.stages(part, prompts, seed) if stage not in made)

    def cannot_run(self, part: Part) -> str:
        """Why a trial cannot be run: it needs what is gone, or its keys do not fit together; else empty."""
        for each in self.differences.values():
            if each.lost and (each.lost == "bad") == (each.name in part):
                run = self.bad if each.lost == "bad" else self.good
                return f"cannot run: what {each.name} named in {run.name} is gone"
        if part not in self.refused:
            self.refused[part] = ""
            try:
                build_experiment(self.config(part))
            except ConfigError as error:
                self.refused[part] = f"cannot run: {' '.join(str(error).split())}"
        return self.refused[part]

    def config(self, part: Part, **evaluation: Any) -> dict[str, Any]:
        """The good run's config with some differences put in, and with these keys of its evaluation."""
        chosen = (each for each in self.differences.values() if each.name in part)
        return with_differences(self.good.config(**evaluation), chosen)

    def known(self, part: Part) -> Answer | None:
        """What is known of a part without a trial."""
        if part in self.answers:
            return self.answers[part].answer
        if part == self.everything:
            return Answer.BAD
        return Answer.UNKNOWN if self.cannot_run(part) else None

    def remaining(self) -> list[tuple[list[Part], float]]:
        """For each difference: the trials that follow if it alone is to blame, and their seconds."""
        level, found = self.levels[self.first_level], []
        for parts in plan(self.groups, self.known):
            made, total = {*self.made}, 0.0
            for part, seed in product(parts, range(level.seeds)):
                total += self.seconds(part, level.prompts, seed, made)
                made |= {stage for stage, _ in self.stages(part, level.prompts, seed)}
            found.append((parts, total))
        return found

    def show_plan(self) -> None:
        """Print the trials that may follow, and how long they take."""
        plans, prompts = self.remaining(), self.good.prompts
        is_judged = (self.everything, prompts, 0) in self.scored
        if is_judged:
            gap = difference(*(self.pooled(each, Level(prompts, 1)) for each in (self.everything, NO_PART)))
            self.trials.console.print(self.in_short(gap))
            if gap.low > 0:
                return
            if not gap.high < 0:
                self.trials.console.print(
                    "So both first get more prompts or seeds, until they can be told apart."
                )
        first = [] if is_judged else [self.everything]
        parts = dict.fromkeys([*first, *(part for parts, _ in plans for part in parts)])
        rows = [[self.in_words(each), clock(self.seconds(each, prompts, 0, self.made))] for each in parts]
        if rows:
            self.trials.console.print(shown(Cells(["trial", "time alone"], rows), right=[1]))
        numbers, totals = [len(parts) + len(first) for parts, _ in plans], [total for _, total in plans]
        self.trials.console.print(
            f"If one difference is to blame: {min(numbers)} to {max(numbers)} of these trials, "
            f"{clock(min(totals))} to {clock(max(totals))}. Times are those of the two runs. A trial that "
            "cannot be told takes more prompts or seeds, and so more time."
        )

    def in_words(self, part: Part) -> str:
        """A trial, in words."""
        if part == self.everything:
            return f"{self.bad.name}, evaluated as {self.good.name}"
        if len(self.everything - part) < len(part):
            return f"{self.bad.name} without {', '.join(sorted(self.everything - part))}"
        return f"{self.good.name} with {', '.join(sorted(part))}" if part else self.good.name

    def run(self) -> int:
        """Search, print and write the result. Gives the exit code."""
        try:
            gap = self.tell_apart()
        except NoScoresError as error:
            why = str(error).rstrip(".")
            return self.end(None, [f"{self.bad.name} cannot be judged like {self.good.name}: {why}."])
        first = self.in_short(gap)
        if gap.low > 0:
            return self.end(None, [first])
        if not gap.high < 0:
            return self.end(None, [first, NOT_APART])
        found = search(self.groups, lambda part: self.test(part).answer)
        half_way = (
            f"A trial is bad if its whole interval is below half way between them, {gap.value / 2:+.3f} for "
            "all prompts together. Prompt by prompt, that is over_half_way in bisect.json."
        )
        return self.end(found, [first, half_way, *self.told(found)])

    def in_short(self, gap: Sampled) -> str:
        """How much worse the bad run is, as a sentence."""
        words = f"{self.bad.name} against {self.good.name}: {in_words(gap)} of the {self.good.words}."
        is_better = f" {self.bad.name} is the better one. Exchange good= and bad=."
        return words + is_better * (gap.low > 0)

    def tell_apart(self) -> Sampled:
        """How much worse the bad run is, with as many prompts and seeds as it takes.

        Raises:
            NoScoresError: the bad run has no scores.
        """
        gap = Sampled(math.nan, -math.inf, math.inf, 0)
        for number, level in enumerate(self.levels):
            try:
                gap = difference(self.pooled(self.everything, level), self.pooled(NO_PART, level))
            except NoScoresError:
                if number == 0:
                    raise
                break
            self.first_level = number
            if gap.high < 0 or gap.low > 0:
                break
        return gap

    def test(self, part: Part) -> Verdict:
        """Whether the good run with these differences is bad."""
        if part in self.answers:
            return self.answers[part]
        verdict = Verdict(Answer.UNKNOWN)
        try:
            for level in self.levels[self.first_level :]:
                verdict = compare(*(self.pooled(each, level) for each in (part, NO_PART, self.everything)))
                if verdict.answer is not Answer.UNKNOWN:
                    break
        except NoScoresError as error:
            if verdict.gain is None:
                verdict = Verdict(Answer.UNKNOWN, why=str(error))
                if isinstance(error, NotTriedError):
                    self.not_tried.add(part)
        self.answers[part] = verdict
        if part not in self.not_tried:
            self.trials.console.print(f"  {verdict.answer.value}: {self.in_words(part)}: {verdict.words}")
        return verdict

    def pooled(self, part: Part, level: Level) -> list[Scores]:
        """A part's scores at a level, one entry for each seed.

        Raises:
            NoScoresError: it has none.
        """
        return [self.scores(part, level.prompts, seed) for seed in range(level.seeds)]

    def scores(self, part: Part, prompts: int, seed: int) -> Scores:
        """A part's scores, by a trial if they are not known.

        Raises:
            NoScoresError: it has none.
        """
        at = part, prompts, seed
        if at not in self.scored:
            try:
                self.scored[at] = self.run_trial(part, prompts, seed)
            except NoScoresError as error:
                self.scored[at] = error
        if isinstance(found := self.scored[at], NoScoresError):
            raise found
        return found

    def run_trial(self, part: Part, prompts: int, seed: int) -> Scores:
        """Run one trial, and remember what it has made.

        Raises:
            NoScoresError: it has none.
        """
        if why := self.cannot_run(part):
            raise NoScoresError(why)
        own = {} if prompts == self.good.prompts else {"num_prompts": prompts}
        config = self.config(part, **own)
        config["seed"] += seed
        more = [f"{prompts} prompts"] * bool(own) + [f"seed {config['seed']}"] * bool(seed)
        seconds = self.seconds(part, prompts, seed, self.made)
        left = max(total for _, total in self.remaining()) - seconds
        words = ", ".join([self.in_words(part), *more])
        scores = self.trials.run(config, words, seconds, max(0.0, left))
        self.made |= {stage for stage, _ in self.stages(part, prompts, seed)}
        return scores

    def end(self, found: Found | None, lines: Sequence[str]) -> int:
        """Print and write the result. Gives the exit code."""
        is_found = found is not None and found.without is Answer.GOOD and not self.has_not_ended(found)
        tried = {part: each for part, each in self.answers.items() if part not in self.not_tried}
        rows = [[self.in_words(part), each.answer.value, each.words] for part, each in tried.items()]
        table = Cells(["trial", "", f"{self.good.words} minus that of {self.good.name}"], rows)
        content = {
            "good": str(self.good.files.directory),
            "bad": str(self.bad.files.directory),
            "found": is_found,
            "causes": [sorted(cause) for cause in found.causes] if found else [],
            "unsure": sorted(name for cause in found.causes for name in self.unsure(cause)) if found else [],
            "differences": {each.name: each.words for each in self.differences.values()},
            "trials": [{"put_in": sorted(part)} | each.as_json() for part, each in tried.items()],
        }
        self.trials.write(f"{self.bad.name} against {self.good.name}", lines, table, content)
        return DONE if is_found else NOT_FOUND

    def has_not_ended(self, found: Found) -> bool:
        """Whether nothing smaller than all differences was found, while some may not be needed."""
        return found.causes == [self.everything] and bool(self.unsure(self.everything))

    def told(self, found: Found) -> Iterator[str]:
        """What was found, in sentences."""
        if self.has_not_ended(found):
            yield "Not found: no smaller cause than all differences was shown."
            for name in sorted(self.everything - {*self.unsure(self.everything)}):
                shows = self.answers[self.everything - {name}].words
                yield f"It takes {name}: without it {self.bad.name} is good: {shows}."
            yield from self.about_unsure(self.everything)
            yield from self.about_budget()
            return
        for cause in found.causes:
            yield from self.about(cause)
        everything = frozenset[str]().union(*found.causes)
        names, left = ", ".join(sorted(everything)), self.everything - everything
        words = f"{self.bad.name} without {names}"
        if left and (other := self.in_words(left)) != words:
            words += f" ({other})"
        shows = self.answers[left].words if left else f"that is {self.good.name}"
        match found.without:
            case Answer.GOOD:
                yield f"Taken out, it mends the bad run: {words}: {shows}."
            case Answer.BAD:
                yield f"More is to blame: {words} is still bad: {shows}."
            case Answer.UNKNOWN:
                yield f"Whether {words} is good cannot be told: {shows}."
        yield from self.about_budget()

    def about_budget(self) -> Iterator[str]:
        """That the budget is spent, if more trials were asked for."""
        if self.not_tried:
            yield f"budget={self.trials.budget} is spent. The same command with a larger one continues."

    def about(self, cause: Part) -> Iterator[str]:
        """A cause, and what shows it."""
        words = " and ".join(f"{name} ({self.differences[name].words})" for name in sorted(cause))
        alone = self.answers[cause].words if cause in self.answers else f"that is {self.bad.name}"
        yield f"Cause: {words}. Put in alone, it breaks the good run: {alone}."
        yield from self.about_unsure(cause)

    def about_unsure(self, cause: Part) -> Iterator[str]:
        """The members of a cause that may not be needed."""
        for name, why in self.unsure(cause).items():
            yield f"Whether it takes {name} for that cannot be told. Without it: {why}."

    def unsure(self, cause: Part) -> dict[str, str]:
        """The members of a cause of which it cannot be told whether they are needed, each with the reason."""
        rests = {name: self.answers.get(cause - {name}) for name in sorted(cause) if len(cause) > 1}
        return {
            name: "not tried" if rest is None else rest.words.rstrip(".")
            for name, rest in rests.items()
            if rest is None or rest.answer is not Answer.GOOD
        }
