"""`python -m rlhf recipe=decide`: which way to tune, if any, is worth it, measured within a budget.

Pilots are ordinary runs, NAME-CANDIDATE-PERCENT, in the same store. First every candidate is checked and its
time predicted. Then come rungs: each trains the candidates that are left to a larger share of their length,
and asks them the choosing questions. Last, the finalists are judged once on the sealed questions.
The statistics: rlhf/evaluation/selection.py.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from rlhf.cli.pilots import Pilots, pilot_arguments
from rlhf.cli.run_files import RunFiles
from rlhf.cli.trials import CONTINUE
from rlhf.config import Complaint, ConfigError
from rlhf.costs.price import cost_of
from rlhf.decide.candidate import Candidate, Result, State, figures_of, read_answers, table, twins
from rlhf.decide.pace import budget_seconds
from rlhf.decide.pilots import Trial, count_looks
from rlhf.decide.words import Judgement, Told, cannot_run, off_limits, percent
from rlhf.disk import replace_text
from rlhf.distributed.device import has_gpu
from rlhf.evaluation.crossed import estimate as estimated
from rlhf.evaluation.sampled import Sampled
from rlhf.evaluation.selection import ERROR, Outcome, best_untrained, judge, over_limits, rung
from rlhf.evaluation.selection import Decision as Judged
from rlhf.exit_codes import CONFIG_ERROR, DONE, INTERRUPTED, STOPPED
from rlhf.pipeline.experiment import build_settings
from rlhf.pipeline.recipe import with_instances
from rlhf.pipeline.run import Run
from rlhf.pipeline.settings import DecideConfig
from rlhf.report.decision import decision_page
from rlhf.tracking.progress import clock
from rlhf.tracking.redaction import redacted

LATE = 0.05
"""Share of the budget by which the judgement may exceed it. Then further finalists are left out. One that
takes longer than expected is stopped after another `pilots.OVERSHOOT`."""
JUDGING = 1 / 3
"""Largest share of the budget that is reserved for the judgement, if that is enough for one finalist."""


def decide(config: Mapping[str, Any], name: str, arguments: Sequence[str], config_dir: Path | None) -> int:
    """Decide, and give the exit code.

    Args:
        config: the composed config.
        name: of the run.
        arguments: the command's `key=value`, as they were typed.
        config_dir: the user's directory with more YAML files.
    """
    try:
        decision = Decision(config, name, pilot_arguments(arguments), config_dir)
        with Run(decision.directory).locked():
            decision.run()
        return DONE
    except ConfigError as error:
        print(f"Error: {error}", file=sys.stderr)
        return CONFIG_ERROR
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        print(f"\nInterrupted. {continues(config['run_name'], name)}", file=sys.stderr)
        return INTERRUPTED if signum == signal.SIGINT else STOPPED


def continues(typed: str | None, name: str) -> str:
    """How to continue. The time is the name of a run that was given none.

    Args:
        typed: `run_name`.
        name: of the run.
    """
    return CONTINUE if typed else f"With run_name={name}, t{CONTINUE[1:]}"


class Decision:
    """A decision in progress."""

    def __init__(
        self, config: Mapping[str, Any], name: str, arguments: Sequence[str], config_dir: Path | None
    ) -> None:
        settings = build_settings(with_instances(config))  # the pilots' experiments check the stages
        self.config: DecideConfig = settings.decide
        self.directory = Path(settings.runs_dir) / name
        self.price = float(config["evaluate"]["price_per_hour"])
        """Price of the machine per hour."""
        assert settings.budget is not None
        if not self.config.tried:
            raise ConfigError(
                f"budget={settings.budget}: only recipe=decide has a budget. Add recipe=decide."
            )
        ranks = settings.launch.processes or (torch.cuda.device_count() if has_gpu() else 1)
        budget = budget_seconds(settings.budget, self.price, ranks)
        self.pilots = Pilots(self.config, self.directory, budget, arguments, config_dir)
        self.say = self.pilots.say
        for each in self.config.tried:
            self.pilots.check_keys(each)
            self.pilots.check_limits(each)
        self.candidates = {
            each: Candidate(each, own, self.pilots.is_trained(each))
            for each, own in self.config.tried.items()
        }
        if all(each.is_trained for each in self.candidates.values()):
            key = "decide.candidates" if self.config.only is None else "decide.only"
            raise ConfigError(f"{key}: none is without training, which is what training must beat. Add base.")
        self.untrained: Candidate | None = None
        """The best option without training."""
        self.judgement: Judgement | None = None
        self.leaks = 0
        """The highest `prepare/leaks` of a candidate. A row of two roles counts in each."""
        self.ended = ""
        """Why it ended early."""
        path = self.directory / "decision.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.was_decided = before.get("outcome") is not None
        """Whether its directory shows a result. That stays until there is another one."""
        self.sealed_seconds = 0.0
        """What it takes to ask the best option without training the sealed questions."""

    @property
    def left(self) -> float:
        """Seconds that pilots may still take."""
        return self.pilots.budget - self.pilots.spent - self.pilots.reserve

    @property
    def leaks_told(self) -> str:
        """What is told of `leaks`."""
        counted = "prepare/leaks; a row of two roles counts twice"
        return f"Training rows that ask what the evaluation asks were left out: {self.leaks} ({counted})."

    @property
    def asked(self) -> list[Candidate]:
        """The options without training that were asked."""
        return [each for each in self.candidates.values() if each.state is State.COMPARED]

    @property
    def prompts(self) -> Sequence[str]:
        """The choosing questions."""
        results = [each.chosen for each in self.candidates.values() if each.chosen is not None]
        return results[0].prompts if results else ()

    @property
    def scores_of_questions(self) -> dict[str, list[float]]:
        """Question -> all scores of its answers so far."""
        found = defaultdict[str, list[float]](list)
        for each in self.candidates.values():
            for result in (each.chosen, *each.sealed):
                for prompt, score in ({} if result is None else result.scores).items():
                    found[prompt].append(score)
        return found

    @property
    def score_range(self) -> float | None:
        """Highest minus lowest possible score. If that is not known, the largest difference that was seen
        between two answers to one question: without it, equal scores of a few questions would look certain.
        """
        seen = (max(scores) - min(scores) for scores in self.scores_of_questions.values())
        return self.pilots.score_range or max(seen, default=0.0) or None

    def run(self) -> None:
        """Decide. If that ends early, the page says why."""
        try:
            self.take_steps()
        except BaseException as error:  # raised again: also a signal or a crash ends it, and the page says so
            again = f"It was interrupted. With run_name={self.directory.name}, t{CONTINUE[1:]}"
            why = f"It ended with an error: {error if isinstance(error, ConfigError) else repr(error)}"
            self.ended = again if isinstance(error, KeyboardInterrupt) else why
            with suppress(OSError):  # the disk may be full, and the error says it
                self.write()
            raise

    def take_steps(self) -> None:
        """From the checks to the judgement."""
        budget, spent = clock(self.pilots.budget), self.pilots.spent
        continued = f", of which {clock(spent)} are spent" if self.pilots.log.pilots else ""
        self.say(f"Candidates: {', '.join(self.candidates)}. Budget: {budget}{continued}.")
        self.check_candidates()
        self.check_seconds = self.pilots.spent - self.pilots.log.spent
        self.ask_untrained()
        self.climb()
        self.judge_finalists()
        told = self.write()
        leaks = [self.leaks_told] if self.leaks else []
        self.say("\n" + "\n".join([*told.sentences(), *leaks, *told.commands()]))
        self.say(f"Page: {self.directory / 'report.html'}")

    def check_candidates(self) -> None:
        """Prepare the data, and find out what each candidate's first pilot takes, or why it cannot run.

        Raises:
            ConfigError: no option without training can run, or nothing judges.
        """
        self.pilots.check_judge(next(iter(self.candidates)))
        errors = {}
        for name, each in self.candidates.items():
            try:
                self.pilots.check_needs(name)
                self.plan_first(each)
            except ConfigError as error:
                errors[name] = error
                each.state, each.why = State.IMPOSSIBLE, " ".join(str(error).split())
        if all(each.is_trained or each.state is State.IMPOSSIBLE for each in self.candidates.values()):
            raise next(error for name, error in errors.items() if not self.candidates[name].is_trained)
        self.say("\n".join(cannot_run(self.candidates.values()) or ["All of them can run."]))
        self.write()

    def plan_first(self, each: Candidate) -> None:
        """Find the first share at which a candidate can run: so few steps may leave none that learns.

        Raises:
            ConfigError: it cannot run at its full length either.
        """
        for share in self.config.shares:
            each.first_share = self.pilots.share_at(each.name, share)
            try:
                each.planned = self.pilots.predicted(Trial(each.name, each.first_share, "choosing", 0))
                return
            except ConfigError:
                if each.first_share == 1.0:
                    raise

    def ask_untrained(self) -> None:
        """Ask the options that need no training, and choose the best one."""
        for each in self.candidates.values():
            if not each.is_trained and each.state is not State.IMPOSSIBLE:
                self.try_candidate(each, 1.0)
                if each.chosen is not None:
                    each.state = State.COMPARED
        if not self.asked:
            why = "no option without training could be asked within it."
            raise ConfigError(Complaint(f"budget={self.pilots.budget:g}s", why, "Raise it."))
        scores = {each.name: table([each.scores], self.prompts)[0] for each in self.asked}
        costs = {each.name: each.asking_cost for each in self.asked}
        self.untrained = each = self.candidates[best_untrained(scores, costs)]
        self.sealed_seconds = self.pilots.pace.seconds(
            self.pilots.predicted(Trial(each.name, 1.0, "sealed", 0))
        )
        self.reserve_for([])
        self.say(f"Best option without training on the choosing questions: {each.title}.")

    def reserve_for(self, running: Sequence[Candidate]) -> None:
        """Reserve the time of the judgement: base is asked beside each finalist, and with several seeds the
        finalists train again. If that is a large part of the budget, it is reserved for fewer finalists."""
        config = self.config
        longest = max((each.full_seconds for each in running), default=0.0)
        one, each_more = (
            self.sealed_seconds * asked * config.seeds + longest * (config.seeds - 1) for asked in (3, 2)
        )
        most = max(0.0, JUDGING * self.pilots.budget - one)
        others = min(config.finalists, sum(each.is_possible for each in self.candidates.values())) - 1
        self.pilots.reserve = one + min(each_more * max(0, others), most)

    def climb(self) -> None:
        """The rungs: train the candidates that are left to a larger share, and drop the worse ones."""
        shares = self.config.shares
        running = [
            each for each in self.candidates.values() if each.is_trained and each.state is State.WAITING
        ]
        for number, share in enumerate(shares):
            if running:
                self.say(f"\nRung {number + 1} of {len(shares)}: {percent(share)} of the length.")
            later = [each for each in running if self.pilots.share_at(each.name, share) < each.first_share]
            self.run_pilots([each for each in running if each not in later], share)
            running = [each for each in running if each.state is State.RUNNING]
            if number + 1 == len(shares):
                running += self.made_for_others()
            self.reserve_for(running)
            ahead = [each for each in running if each.share == 1.0 and share < 1.0]
            rest = [each for each in running if each not in ahead]
            running = [*ahead, *self.keep(rest, number), *later]  # short pilots are compared with each other
            self.write()

    def run_pilots(self, running: Sequence[Candidate], share: float) -> None:
        """Run the pilots of a rung. Of first pilots the shortest one comes next, by what those before it
        took. One that takes far longer than expected is stopped, and continues after the others."""
        own = {each: self.pilots.share_at(each.name, share) for each in running}
        waiting = [each for each in running if each.share is None or each.share < own[each]]
        late = list[Candidate]()
        while waiting or late:
            next_ones = waiting or late
            each = min(
                next_ones,
                key=lambda each: self.pilots.pace.seconds(each.planned) if each.share is None else 0.0,
            )
            next_ones.remove(each)
            self.try_candidate(each, own[each], others_wait=bool(waiting))
            if each.state is State.LATE:
                late.append(each)

    def made_for_others(self) -> list[Candidate]:
        """The dropped candidates whose model of the full length is in the store, because others start from
        it. Their short pilots were compared with candidates on top of that model. Now it is asked itself."""
        dropped = [each for each in self.candidates.values() if each.state in (State.WORSE, State.CUT)]
        for each in (each for each in dropped if each.chosen is not None):
            try:
                missing = self.pilots.predicted(Trial(each.name, 1.0, "choosing", 0))
            except ConfigError:  # it cannot run at its full length, and is dropped already
                continue
            if missing.keys() <= {"evaluate"}:
                self.say(f"{each.title} is back: its model of the full length is in the store.")
                self.try_candidate(each, 1.0)
        return [each for each in dropped if each.state is State.RUNNING]

    def keep(self, running: list[Candidate], number: int) -> list[Candidate]:
        """The candidates that go on after a rung, the best first: of those that are not worse, as many as
        the budget allows. After the last one all that are not worse."""
        if len(running) < 2:
            return running
        shares, is_last = self.config.shares, number + 1 == len(self.config.shares)
        score_CB = table([each.scores for each in running], self.prompts)
        cost_C = torch.tensor([each.train_seconds for each in running])
        slow_C = torch.tensor([each.config.slow for each in running])
        for most in range(len(running), 0, -1):
            found = rung(
                score_CB, max_kept=most, cost_C=cost_C, slow_C=slow_C, is_last=is_last,
                num_rungs=len(shares), score_range=self.score_range,
            )  # fmt: skip
            kept = [each for each, stays in zip(running, found.kept.tolist(), strict=True) if stays]
            if is_last or most == 1 or self.is_affordable(kept, number):
                break
        for each, is_worse, is_cut in zip(running, found.worse.tolist(), found.cut.tolist(), strict=True):
            if is_worse:
                each.state, each.why = State.WORSE, f"clearly worse than the best at {percent(each.share)}"
            elif is_cut:
                each.state, each.why = State.CUT, f"others looked better at {percent(each.share)}"
            if is_worse or is_cut:
                self.say(f"{each.title} is dropped: {each.why}.")
        return sorted(kept, key=lambda each: -each.mean)

    def is_affordable(self, kept: Sequence[Candidate], number: int) -> bool:
        """Whether the next rung takes its part of the budget at most, or all rungs fit."""
        shares, left = self.config.shares[number + 1 :], max(0.0, self.left)
        rungs = [sum(self.seconds_to(each, share) for each in kept) for share in shares]
        whole = rungs[-1] + (len(shares) - 1) * sum(each.ask_seconds for each in kept)
        return rungs[0] <= left / len(shares) or whole <= left

    def seconds_to(self, each: Candidate, share: float) -> float:
        """What it takes to train a candidate on to a share and to ask it; 0 if it was done before."""
        share = self.pilots.share_at(each.name, share)
        seconds = each.seconds_to(share)
        if not seconds or self.pilots.log.done(Trial(each.name, share, "choosing", 0)) is not None:
            return 0.0
        return seconds + self.pilots.pace.overhead

    def try_candidate(self, each: Candidate, share: float, *, others_wait: bool = False) -> None:
        """Run a candidate's pilot on the choosing questions, unless there is no time for it."""
        expected = None if each.share is None else each.seconds_to(share) + self.pilots.pace.overhead
        trial = Trial(each.name, share, "choosing", 0)
        result = self.result(each, trial, expected, others_wait=others_wait)
        if result is not None:
            each.chosen, each.share, each.state, each.why = result, share, State.RUNNING, ""
            self.measure(each)

    def result(
        self,
        each: Candidate,
        trial: Trial,
        expected: float | None = None,
        until: float | None = None,
        *,
        others_wait: bool = False,
    ) -> Result | None:
        """What a trial measured; it runs if it has not yet.

        Args:
            expected: seconds; None for what the planner predicts.
            until: seconds of the decision at which it must have ended; None for the budget without what the
                judgement takes.

        Returns:
            None if there is no time for it, or it failed; the candidate says which.
        """
        if not self.pilots.log.pilots:
            until = math.inf  # one is always asked
        elif until is None:
            until = self.pilots.budget - self.pilots.reserve
        try:
            predicted = self.pilots.predicted(trial)
        except ConfigError as error:
            each.state, each.why = State.FAILED, " ".join(str(error).split())
            return None
        if not predicted:
            expected = 0.0
        elif expected is None:
            expected = self.pilots.pace.seconds(predicted)
        if predicted and self.pilots.spent + expected > until:
            left = f"{clock(max(0.0, until - self.pilots.spent))} are left"
            kept = self.pilots.budget - until
            left += f" besides {clock(kept)} for the sealed questions" if kept > 0 else ""
            what = "to ask it the sealed questions" if trial.part == "sealed" else percent(trial.share)
            each.state = State.CUT
            each.why = f"{what} would take about {clock(expected)}, and {left}"
            stays = f"stays at {percent(each.share)}" if each.share is not None else "is dropped"
            self.say(f"{each.title} {stays if trial.part == 'choosing' else 'is dropped'}: {each.why}.")
            return None
        try:
            found = self.pilots.run(trial, each, predicted, expected, until, others_wait=others_wait)
        finally:
            self.write()
        asked = self.prompts
        if trial.part == "sealed":
            asked = next((own.sealed[0].prompts for own in self.candidates.values() if own.sealed), ())
        if found is not None and asked and found.prompts != asked:
            each.state, each.why = State.FAILED, "its keys change the questions, so it cannot be compared"
            self.say(f"{each.title}: {each.why}.")
            return None
        return found

    def measure(self, each: Candidate) -> None:
        """Note what a candidate took so far."""
        assert each.chosen is not None
        stages = RunFiles(self.pilots.run_directory(each.chosen.run)).summary["stages"]
        if (leaks := int(stages["prepare"]["metrics"]["prepare/leaks"])) > self.leaks:
            self.leaks = leaks
            self.say(f"{each.title}: {self.leaks_told}")
        seconds = {name: float(own["cost"]["seconds"]) for name, own in stages.items() if own["cost"]}
        each.ask_seconds = seconds["evaluate"]
        each.train_seconds = sum(
            taken
            for name, taken in seconds.items()
            if name not in {"prepare", "evaluate", *self.pilots.judges}
        )
        if each.config.length is not None and each.share is not None:
            each.step_seconds = seconds[each.config.length.rpartition(".")[0]] / each.share

    def judge_finalists(self) -> None:
        """Ask the finalists the sealed questions, once, and judge them.

        Raises:
            ConfigError: no candidate could be trained or judged.
        """
        assert self.untrained is not None
        budget = self.pilots.budget
        trained = [each for each in self.candidates.values() if each.is_trained]
        found = [each for each in trained if each.chosen is not None]
        if self.config.seeds == 1:
            self.drop_twins(found)
        open_ones = [each for each in found if each.is_open]
        ranked = sorted(open_ones or found, key=lambda each: -each.mean)
        most = self.config.finalists if open_ones else 1
        possible = [each for each in trained if each.state is not State.IMPOSSIBLE]
        if not ranked and any(each.state is State.FAILED for each in possible):
            whys = [f"{each.title}: {each.why}" for each in possible]
            raise ConfigError("\n".join(["No candidate could be trained and judged.", *whys]))
        if possible and not ranked:
            first = min(possible, key=lambda each: self.pilots.pace.seconds(each.planned))
            takes, spent = self.pilots.pace.seconds(first.planned), self.pilots.spent
            judging = self.pilots.reserve
            enough = math.ceil(1.1 * (spent + self.check_seconds + takes + judging))
            raise ConfigError(
                f"budget={clock(budget)}: no candidate could be trained in it. {clock(spent)} are spent, "
                f"{percent(first.first_share)} of {first.title} takes about {clock(takes)}, and the sealed "
                f"questions about {clock(judging)}. Raise it above their sum: with the checks once more, to "
                f"about {enough}s. Or leave out what takes long, such as '~decide.candidates.NAME'."
            )
        asked = "; ".join(each.title for each in [*ranked[:most], self.untrained])
        self.say(f"\nThe sealed questions judge: {asked}.")
        if not self.ask_sealed(self.untrained, math.inf):
            raise ConfigError(f"{self.untrained.title} could not be judged: {self.untrained.why}")
        if self.untrained.config.asks != "base":
            self.untrained.gain_over_base = self.over_base(self.untrained)
        if not possible:
            nothing = Judged(Outcome.NO_TRAINING)
            self.judgement = Judgement(nothing, 1, len(self.untrained.sealed[0].prompts))
            return
        judged, limits = list[Candidate](), self.config.limits.ranges
        for each in ranked:
            if len(judged) - len(over_limits(figures_of(judged), limits)) == most:
                break  # in the place of one that is outside a limit, the next one is judged
            if self.ask_sealed(each, (1 + LATE) * budget if judged else math.inf):
                each.state, each.why = State.FINALIST, ""
                judged.append(each)
            elif each.state is State.CUT:
                break
        for each in open_ones:
            if each.state is State.RUNNING:
                each.state, each.why = State.BEHIND, "others looked better on the choosing questions"
        if not judged:
            raise ConfigError(f"No finalist could be judged. {ranked[0].title}: {ranked[0].why}")
        self.judge(judged, self.untrained)

    def drop_twins(self, found: Sequence[Candidate]) -> None:
        """Leave out who answers as another one does, whose training took less."""
        for each, twin in twins(found):
            each.state, each.why = State.BEHIND, f"it answers as {twin.title} does, whose training took less"
            self.say(f"{each.title} is dropped: {each.why}.")

    def ask_sealed(self, each: Candidate, until: float) -> bool:
        """Ask a candidate the sealed questions, for each seed. Whether all could be asked."""
        for seed in range(self.config.seeds):
            trial = Trial(each.name, each.share or 1.0, "sealed", seed)
            if (result := self.result(each, trial, until=until)) is None:
                return False
            each.sealed = [*each.sealed, result]
        return True

    def judge(self, judged: Sequence[Candidate], untrained: Candidate) -> None:
        """Judge the finalists by their answers to the sealed questions."""
        prompts = untrained.sealed[0].prompts
        scores = {each.name: table([result.scores for result in each.sealed], prompts) for each in judged}
        untrained_SB = table([result.scores for result in untrained.sealed], prompts)
        refused = over_limits(figures_of(judged), self.config.limits.ranges)
        costs = {each.name: self.cost(each) for each in judged}
        looks, is_base = self.looks(), untrained.config.asks == "base"
        if len({score for scores in self.scores_of_questions.values() for score in scores}) < 2:
            self.judgement = Judgement(Judged(Outcome.UNTOLD), looks, len(prompts))  # it judges nothing
            return
        found = judge(
            scores, untrained_SB, cost=costs, smallest_gain=self.config.smallest_gain, refused=refused,
            score_range=self.score_range, error=ERROR / 2 ** (looks - 1),
        )  # fmt: skip
        for each in judged:
            if each.name in refused:
                each.state, each.limits_over = State.REFUSED, refused[each.name]
                each.why = off_limits(each.figures, refused[each.name], self.config.limits.ranges)
            elif each.name == found.winner:
                each.state = State.WINNER
            each.gain = found.finalists[each.name].gain if each.name in found.finalists else None
            each.gain_over_base = (each.gain if is_base else None) or self.over_base(each)
        self.judgement = Judgement(found, looks, len(prompts))

    def looks(self) -> int:
        """How often the sealed questions have judged: other answers are a further look."""
        runs = [result.run for each in self.candidates.values() for result in each.sealed]
        answers = (self.pilots.run_directory(run) / "artifacts" / "evaluate" for run in runs)
        return count_looks(self.directory / "looks.json", [path.resolve().name for path in answers])

    def cost(self, each: Candidate) -> float:
        """Price of training a candidate and of `decide.requests` answers."""
        thousand = each.figures.get("cost_per_thousand", 0.0)
        return cost_of(each.train_seconds, self.price) + self.config.requests / 1000 * thousand

    def over_base(self, each: Candidate) -> Sampled:
        """The gain over the base model, which was asked the same sealed questions beside the candidate."""
        files = [
            self.pilots.run_directory(result.run) / "artifacts" / "evaluate" / "responses.jsonl"
            for result in each.sealed
        ]
        base = [read_answers(file, "base", self.pilots.kind).scores for file in files]
        prompts = each.sealed[0].prompts
        own_SB = table([result.scores for result in each.sealed], prompts)
        found = estimated(own_SB - table(base, prompts), self.score_range)
        most = self.score_range or math.inf
        low, high = (min(most, max(-most, float(found.bound(ERROR / 2, side)))) for side in (-1, 1))
        return Sampled(float(found.value), low, high, int(found.rows))

    def model(self, each: Candidate) -> Path | None:
        """The model that was judged; None for a method that was judged over seeds."""
        if not each.sealed or self.config.seeds > 1:
            return None
        artifacts = self.pilots.run_directory(each.sealed[0].run) / "artifacts"
        path = artifacts / self.pilots.asked(each.name).model
        return path if path.exists() else None

    def has_page(self, run: str) -> bool:
        """Whether a pilot's run has a page."""
        return (self.pilots.run_directory(run) / "report.html").is_file()

    def write(self) -> Told:
        """Write decision.json and the page."""
        winner = next((each for each in self.candidates.values() if each.state is State.WINNER), None)
        told = Told(
            self.config, self.candidates, self.untrained, winner, self.judgement, self.pilots.kind,
            self.price, command=None if winner is None else self.pilots.command(winner.name),
            model=None if winner is None else self.model(winner),
        )  # fmt: skip
        if self.was_decided and self.judgement is None:
            return told
        own = told.as_json()
        if self.leaks and own["sentences"]:
            own["sentences"].append(self.leaks_told)
        content = redacted(own | {
            "name": self.directory.name,
            "ended": self.ended,
            "questions": {
                "choosing": len(self.prompts) or None,
                "sealed": None if self.judgement is None else self.judgement.questions,
            },
            "budget": {"seconds": self.pilots.budget, "spent": self.pilots.log.spent},
            "pilots": [
                each.as_json() | ({} if self.has_page(each.run) else {"run": None})
                for each in self.pilots.log.pilots
            ],
        })  # fmt: skip
        replace_text(self.directory / "decision.json", json.dumps(content, indent=2, allow_nan=False))
        replace_text(self.directory / "report.html", decision_page(content))
        return told
