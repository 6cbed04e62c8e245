"""`python -m rlhf recipe=decide`: which way to tune, if any, is worth it, measured within a budget.

Pilots are ordinary runs, NAME-CANDIDATE-PERCENT, in the same store. First every candidate is checked and its time
predicted. Then come rungs: each trains the candidates that are left to a larger share of their length, and asks
them the choosing questions. Last, the finalists are judged once on the sealed questions.
The statistics: rlhf/evaluation/selection.py.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlhf.bisect.scores import read_scores
from rlhf.cli.api import compose
from rlhf.cli.api import run as run_config
from rlhf.cli.run_files import RunFiles
from rlhf.cli.trials import CONTINUE, replaced
from rlhf.compare.candidate import CANDIDATES, parse_candidate
from rlhf.compare.cost import break_even, cost_of
from rlhf.config import Complaint, ConfigError
from rlhf.decide.candidate import FIGURES, Candidate, Result, State, table
from rlhf.decide.estimate import estimate
from rlhf.decide.pace import Pace, budget_seconds
from rlhf.decide.pilots import Ended, Part, Pilot, PilotLog, Trial
from rlhf.decide.words import Judgement, headline, percent
from rlhf.disk import replace_text
from rlhf.distributed.device import has_gpu
from rlhf.evaluation.crossed import estimate as estimated
from rlhf.evaluation.references import QUALITIES
from rlhf.evaluation.sampled import Sampled
from rlhf.evaluation.selection import ERROR, Outcome, best_untrained, judge, over_limits, rung
from rlhf.exit_codes import CONFIG_ERROR, DONE, INTERRUPTED, STOPPED
from rlhf.pipeline.experiment import Experiment, build_experiment
from rlhf.pipeline.recipe import as_typed, kind_of
from rlhf.pipeline.run import Run
from rlhf.pipeline.settings import DecideConfig
from rlhf.rewards.kinds import is_verifier, keyed_parts, parts_of, stage_of
from rlhf.tracking.progress import clock
from rlhf.tracking.redaction import RedactingConsole

OWN_KEYS = ("recipe", "budget", "run_name", "stage")
"""Keys of the command that its pilots do not get. `decide` and `decide.*` are others."""
OVERSHOOT = 0.05
"""Share of the budget by which a pilot may exceed it before it is stopped."""
LATE = 0.1
"""Share of the budget by which the judgement may exceed it. Then further finalists are left out."""
JUDGE_WORDS = {"gold": "gold score", "judge": "judge's score", "rouge_l": "ROUGE-L"}


def decide(config: Mapping[str, Any], name: str, arguments: Sequence[str], config_dir: Path | None) -> int:
    """Decide, and give the exit code.

    Args:
        config: the composed config.
        name: of the run.
        arguments: the command's `key=value`.
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
        print(f"\nInterrupted. {CONTINUE}", file=sys.stderr)
        return INTERRUPTED if signum == signal.SIGINT else STOPPED


def pilot_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of the command that are also those of its pilots."""
    own = []
    for argument in map(as_typed, arguments):
        key = argument.lstrip("+~").partition("=")[0]
        if key not in OWN_KEYS and key.partition(".")[0].partition("@")[0] != "decide":
            own.append(argument)
    return own


class Decision:
    """A decision in progress."""

    def __init__(
        self, config: Mapping[str, Any], name: str, arguments: Sequence[str], config_dir: Path | None
    ) -> None:
        settings = build_experiment(config).settings
        assert settings.decide is not None
        self.config: DecideConfig = settings.decide
        self.name, self.arguments, self.config_dir = name, arguments, config_dir
        self.runs_dir = Path(settings.runs_dir)
        self.directory = self.runs_dir / name
        self.price = float(config["evaluate"]["price_per_hour"])
        if settings.budget is None:
            raise ConfigError("budget=null: recipe=decide needs a budget, such as budget=30m.")
        ranks = settings.launch.processes or max(1, torch.cuda.device_count() if has_gpu() else 1)
        self.budget = budget_seconds(settings.budget, self.price, ranks)
        self.console: Console = RedactingConsole(highlight=False, soft_wrap=True, markup=False)
        self.log, self.pace = PilotLog(self.directory / "pilots.jsonl"), Pace()
        for pilot in self.log.pilots:
            if pilot.ended == "done":
                self.pace.add(pilot.predicted, pilot.stages, pilot.seconds)
        self.spent_before, self.begun = self.log.spent, time.monotonic()
        self.kind, self.score_range = "", None
        """The score that judges, and its range; known after the first pilot."""
        self.composed = {each: self.compose(each) for each in self.config.candidates}
        self.candidates = {
            each: Candidate(each, own, self.is_trained(each)) for each, own in self.config.candidates.items()
        }
        self.reserve = 0.0
        """Seconds that the judgement will take."""
        self.untrained = ""
        self.judgement: Judgement | None = None
        self.check_limits()

    # What is known

    @property
    def spent(self) -> float:
        """Seconds of this decision so far, over all its processes."""
        return self.spent_before + time.monotonic() - self.begun

    @property
    def left(self) -> float:
        """Seconds that pilots may still take."""
        return self.budget - self.spent - self.reserve

    @property
    def trained(self) -> list[Candidate]:
        """The candidates that need training and may still be finalists."""
        return [each for each in self.candidates.values() if each.is_trained and each.is_open]

    def compose(self, name: str) -> dict[str, Any]:
        """The config of a candidate, at its full length."""
        own = self.config.candidates[name].set
        try:
            return compose(*self.config.set, *self.arguments, *own, config_dir=self.config_dir)
        except ConfigError as error:
            complaint = Complaint(f"decide.candidates.{name}", f"its keys cannot be used. {error}")
            raise ConfigError(complaint) from None

    def experiment(self, name: str) -> Experiment:
        """The experiment of a candidate at its full length.

        Raises:
            ConfigError: its keys do not fit together.
        """
        return build_experiment(self.trial_config(Trial(name, 1.0, "choosing", 0), None))

    def is_trained(self, name: str) -> bool:
        """Whether stages make a model for a candidate: the one that answers, or a reward that chooses."""
        asked = parse_candidate(self.config.candidates[name].asks, "base")
        if asked.model != "base" and "/" not in asked.model:
            return True
        if asked.method != "best_of_n":
            return False
        reward = vars(self.experiment(name).stages["evaluate"])["reward"]
        return reward is not None and any(stage_of(part.source) for part in parts_of(reward))

    def trial_config(self, trial: Trial, run: str | None) -> dict[str, Any]:
        """The config of a trial's run."""
        own = self.config.candidates[trial.candidate]
        config = copy.deepcopy(self.composed[trial.candidate])
        seed = int(config["seed"]) + trial.seed
        config |= {"stage": ["evaluate"], "gates": "warn", "why": False, "force": [], "run_name": run}
        config |= {"budget": None, "decide": None, "seed": seed}
        if own.length is not None and trial.share < 1:
            stage, _, key = own.length.rpartition(".")
            sections = config["instances"] if "@" in stage else config
            sections.setdefault(stage, {})[key] = share_of(self.full_length(trial.candidate), trial.share)
        asks = parse_candidate(own.asks, "base").name
        evaluate = config["evaluate"]
        evaluate["gates"] = dict.fromkeys(evaluate["gates"])
        evaluate |= {"init": "base", "policies": [own.asks], "subject": asks, "part": trial.part}
        if "best_of_n" not in own.asks:
            evaluate["reward"] = None
        if self.kind:
            evaluate["quality"] = self.kind
        if trial.part == "sealed":
            evaluate["policies"] = sorted({"base", own.asks})
            evaluate["num_timed"] = self.config.num_timed
        else:
            evaluate |= {"retention": None, "num_timed": 0, "num_references": 1, "lm_eval": []}
        if trial.seed:
            config = self.with_first_judge(config, trial)
        return config

    def with_first_judge(self, config: dict[str, Any], trial: Trial) -> dict[str, Any]:
        """A config whose judge is the model of the first seed, so that all seeds have the same judge."""
        resolved = copy.deepcopy(dict(build_experiment(config).resolved))
        first = self.runs_dir / self.run_name(trial._replace(seed=0)) / "artifacts"
        for kind in ("gold", "judge"):
            source = resolved["evaluate"][kind]
            for part in parts_of(source) if source is not None else ():
                if (stage := stage_of(part.source)) is not None:
                    model = f"model:{(first / stage).resolve()}"
                    resolved["evaluate"][kind] = replaced(resolved["evaluate"][kind], part.source, model)
        return resolved

    def full_length(self, name: str) -> float:
        """The value of a candidate's length key at its full length: an int if it is a whole number."""
        key = self.config.candidates[name].length
        assert key is not None
        stage, _, last = key.rpartition(".")
        value = getattr(self.experiment(name).stages.get(stage), last, None)
        if not isinstance(value, int | float):
            why = "there is no such key, or it is no number."
            raise ConfigError(Complaint(f"decide.candidates.{name}.length={key}", why))
        return value

    def run_name(self, trial: Trial) -> str:
        """The name of a trial's run."""
        words = [self.name, trial.candidate]
        words += [f"{100 * trial.share:g}"] if self.candidates[trial.candidate].config.length else []
        words += ["sealed"] if trial.part == "sealed" else []
        words += [f"seed{trial.seed}"] if trial.seed else []
        return "-".join(words)

    def say(self, line: str) -> None:
        """Print a line of progress."""
        self.console.print(line)

    # The steps

    def run(self) -> None:
        """Decide."""
        self.say(
            f"Decides between {len(self.candidates)} candidates within {clock(self.budget)}"
            + (f", of which {clock(self.spent)} are spent." if self.log.pilots else ".")
        )
        self.check_candidates()
        self.ask_untrained()
        self.climb()
        self.judge_finalists()
        self.write()
        self.say("\n" + "\n".join(self.sentences()))
        self.say(f"Page: {self.directory / 'report.html'}")

    def check_limits(self) -> None:
        """Refuse limits on figures that nothing measures.

        Raises:
            ConfigError: in the user's keys.
        """
        for figure in self.config.limits:
            if figure not in FIGURES:
                why = f"the final evaluation has no such figure. It has {', '.join(FIGURES)}."
                raise ConfigError(Complaint(f"decide.limits.{figure}", why))

    def check_candidates(self) -> None:
        """Prepare the data, and find out what each candidate's first pilot takes, or why it cannot run."""
        errors = {}
        for name, each in self.candidates.items():
            trial = Trial(name, self.first_share(each), "choosing", 0)
            if self.log.done(trial):
                continue
            try:
                self.check_needs(each)
                each.planned = estimate(self.trial_config(trial, None), f"{self.name}/check")
            except ConfigError as error:
                errors[name] = error
                each.state, each.why = State.IMPOSSIBLE, " ".join(str(error).split())
        for name, error in errors.items():
            self.say(f"{self.candidates[name].title} cannot run: {error}")
        if all(each.is_trained or each.state is State.IMPOSSIBLE for each in self.candidates.values()):
            first = next((errors[name] for name in errors if not self.candidates[name].is_trained), None)
            raise first or ConfigError("decide.candidates: no candidate is without training. Add base.")
        self.write()

    def check_needs(self, each: Candidate) -> None:
        """Check what only some candidates need.

        Raises:
            ConfigError: the reward of the candidate's policy is no verifier, and it needs one.
        """
        model = parse_candidate(each.config.asks, "base").model
        if "verifier" in each.config.needs:
            rewards = keyed_parts(self.experiment(each.name).stages[model].reads().rewards)
            for key, part in rewards:
                if not is_verifier(part):
                    why = f"{part.source} is no verifier, which checks answers against right ones."
                    raise ConfigError(Complaint(key, why, "Give one, such as ppo.reward=verify:number."))

    def ask_untrained(self) -> None:
        """Ask the options that need no training, and choose the best one."""
        for each in self.candidates.values():
            if not each.is_trained and each.state is not State.IMPOSSIBLE:
                self.try_candidate(each, 1.0)
                if each.chosen is not None:
                    each.state = State.COMPARED
        asked = {each.name: each for each in self.candidates.values() if each.state is State.COMPARED}
        if not asked:
            why = "no option without training could be asked within the budget."
            raise ConfigError(Complaint(f"budget={self.budget:g}s", why, "Raise it."))
        prompts = self.prompts()
        scores = {name: table([self.chosen(each).scores], prompts)[0] for name, each in asked.items()}
        self.untrained = best_untrained(scores, {name: each.seconds for name, each in asked.items()})
        each = asked[self.untrained]
        trial = Trial(each.name, 1.0, "sealed", 0)
        one = self.pace.seconds(self.estimate(trial)) if not self.log.done(trial) else each.seconds
        self.reserve = one * (1 + self.config.finalists * self.config.seeds)
        self.say(f"Best option without training on the choosing questions: {each.title}.")

    def chosen(self, each: Candidate) -> Result:
        """The result on the choosing questions."""
        assert each.chosen is not None
        return each.chosen

    def prompts(self) -> list[str]:
        """The choosing questions, in the order of the first option without training."""
        first = next(each for each in self.candidates.values() if each.state is State.COMPARED)
        return [*self.chosen(first).scores]

    def climb(self) -> None:
        """The rungs: train the candidates that are left to a larger share, and drop the worse ones."""
        running = [
            each for each in self.candidates.values() if each.is_trained and each.state is State.WAITING
        ]
        running.sort(key=lambda each: self.pace.seconds(each.planned))
        for number, share in enumerate(self.config.shares):
            if not running:
                break
            self.say(f"\nRung {number + 1} of {len(self.config.shares)}: {percent(share)} of the length.")
            for each in running:
                if self.next_share(each, share) is not None:
                    self.try_candidate(each, self.share_at(each, share))
            running = self.keep([each for each in running if each.state is State.RUNNING], number)
            self.write()

    def keep(self, running: list[Candidate], number: int) -> list[Candidate]:
        """The candidates that go on after a rung, the best first. At the last one all that are not worse."""
        if len(running) < 2:
            return running
        shares, is_last = self.config.shares, number + 1 == len(self.config.shares)
        score_CB = table([self.chosen(each).scores for each in running], self.prompts())
        cost_C = torch.tensor([each.train_seconds for each in running])
        slow_C = torch.tensor([each.config.slow for each in running])
        most = len(running)
        while True:
            found = rung(
                score_CB, max_kept=most, cost_C=cost_C, slow_C=slow_C, is_last=is_last,
                num_rungs=len(shares), score_range=self.score_range,
            )  # fmt: skip
            kept = [each for each, stays in zip(running, found.kept.tolist(), strict=True) if stays]
            if is_last or most == 1 or self.is_affordable(kept, number):
                break
            most = min(most, len(kept)) - 1 or 1
        for each, is_worse, is_cut in zip(running, found.worse.tolist(), found.cut.tolist(), strict=True):
            if is_worse:
                each.state, each.why = State.WORSE, f"clearly worse than the best at {percent(each.share)}"
            elif is_cut:
                each.state, each.why = State.CUT, "for lack of budget"
            if is_worse or is_cut:
                self.say(f"{each.title} is dropped: {each.why}.")
        return sorted(kept, key=lambda each: -each.mean)

    def is_affordable(self, kept: Sequence[Candidate], number: int) -> bool:
        """Whether the next rung takes its part of the budget at most, or all rungs fit."""
        shares = self.config.shares[number + 1 :]
        seconds = [sum(self.seconds_to(each, share) for each in kept) for share in shares]
        return seconds[0] <= self.left / len(shares) or sum(seconds) <= self.left

    def seconds_to(self, each: Candidate, share: float) -> float:
        """What a rung takes for a candidate that has finished one before it."""
        before = max((other for other in self.config.shares if other < share), default=0.0)
        first = each.share if each.share is not None and each.share < before else before
        if each.config.length is None or each.share is None or each.share >= 1:
            return 0.0
        return each.ask_seconds + each.step_seconds * (share - first)

    def first_share(self, each: Candidate) -> float:
        """The share of a candidate's first pilot."""
        return self.share_at(each, self.config.shares[0]) if each.config.length else 1.0

    def share_at(self, each: Candidate, share: float) -> float:
        """The share that a candidate really trains at a rung: 1 if it cannot be divided."""
        if each.config.length is None:
            return 1.0
        full = self.full_length(each.name)
        return share_of(full, share) / full

    def next_share(self, each: Candidate, share: float) -> float | None:
        """The share that a candidate trains at this rung; None if it has already."""
        wanted = self.share_at(each, share)
        return None if each.share is not None and each.share >= wanted else wanted

    def try_candidate(self, each: Candidate, share: float) -> None:
        """Run a candidate's pilot on the choosing questions, unless there is no time for it."""
        result = self.run_trial(Trial(each.name, share, "choosing", 0))
        if result is not None:
            each.chosen, each.share, each.state = result, share, State.RUNNING
            self.measure(each)

    def measure(self, each: Candidate) -> None:
        """Note what a candidate took so far."""
        pilots = [pilot for pilot in self.log.pilots if pilot.trial.candidate == each.name]
        length = each.config.length
        stage = "" if length is None else length.rpartition(".")[0]
        steps = sum(pilot.stages.get(stage, 0.0) for pilot in pilots)
        each.step_seconds = steps / (each.share or 1.0)
        asked = [pilot for pilot in pilots if pilot.ended == "done" and pilot.trial.part == "choosing"]
        each.ask_seconds = asked[-1].stages.get("evaluate", 0.0) + self.pace.overhead
        each.seconds = sum(pilot.seconds for pilot in pilots)
        stages = RunFiles(self.runs_dir / asked[-1].run).summary["stages"]
        each.train_seconds = sum(
            stage["cost"]["seconds"] for name, stage in stages.items()
            if name not in ("prepare", "evaluate") and name not in self.judges and stage["cost"]
        )  # fmt: skip

    @property
    def judges(self) -> set[str]:
        """The reward models that only judge."""
        return {"reward@judge"}

    def estimate(self, trial: Trial) -> dict[str, float]:
        """Stage -> predicted seconds of a trial's run."""
        each = self.candidates[trial.candidate]
        if trial.part == "choosing" and not trial.seed and each.planned and each.share is None:
            return each.planned
        return estimate(self.trial_config(trial, None), f"{self.name}/check")

    def run_trial(self, trial: Trial, until: float | None = None) -> Result | None:
        """Run a trial, or read what it left.

        Args:
            until: seconds of the decision at which it must have ended; by default the budget without what
                the judgement takes.

        Returns:
            None if there is no time for it, or it failed; the candidate says which.
        """
        each, run = self.candidates[trial.candidate], self.run_name(trial)
        if (pilot := self.log.done(trial)) is not None and self.is_there(pilot.run):
            return self.result(trial, pilot.run)
        until = self.budget - self.reserve if until is None else until
        try:
            predicted = self.estimate(trial)
        except ConfigError as error:
            each.state, each.why = State.FAILED, " ".join(str(error).split())
            return None
        expected = self.pace.seconds(predicted)
        if each.share is not None and trial.part == "choosing":
            expected = self.seconds_to(each, trial.share)
        if self.spent + expected > until and self.log.pilots:
            each.state = State.CUT
            each.why = (
                f"about {clock(expected)} for {percent(trial.share)}, and {clock(until - self.spent)} left"
            )
            self.say(f"{each.title} is dropped for lack of budget: {each.why}.")
            return None
        self.say(
            f"{each.title}{' at ' + percent(trial.share) if each.config.length else ''}"
            f"{', sealed questions' if trial.part == 'sealed' else ''}: about {clock(expected)}. "
            f"{clock(self.spent)} of {clock(self.budget)} spent. State: status run_name={run}"
        )
        start, ended, why = self.spent, "done", ""
        timer = StopTimer(until + OVERSHOOT * self.budget - start)
        try:
            with timer.running():
                run_config(self.trial_config(trial, run), quiet=True)
        except KeyboardInterrupt:
            ended = "stopped"
            if not timer.has_fired:
                self.note(Pilot(trial, run, start, self.spent - start, expected, "stopped", "interrupted"))
                raise
            each.state, each.why = State.CUT, f"stopped after {clock(self.spent - start)}: it took too long"
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):
                raise
            ended, why = "failed", " ".join(str(error).split())
            each.state, each.why = State.FAILED, why
        except Exception as error:  # such as too little memory: the other candidates go on
            traceback.print_exc()
            ended, why = "failed", f"{type(error).__name__}: {error}"
            each.state, each.why = State.FAILED, why
        taken = self.stages_run(run) if ended == "done" else {}
        pilot = Pilot(trial, run, start, self.spent - start, expected, as_ended(ended), why, predicted, taken)
        self.note(pilot)
        if ended != "done":
            self.say(f"{each.title}: {each.why}")
            return None
        self.pace.add(predicted, taken, pilot.seconds)
        return self.result(trial, run)

    def note(self, pilot: Pilot) -> None:
        """Write a pilot down, and the page."""
        self.log.add(pilot)
        self.write()

    def is_there(self, run: str) -> bool:
        """Whether a pilot's answers are still in the store."""
        return (self.runs_dir / run / "artifacts" / "evaluate" / "responses.jsonl").is_file()

    def stages_run(self, run: str) -> dict[str, float]:
        """Stage that a run has run -> its seconds."""
        stages = RunFiles(self.runs_dir / run).summary["stages"]
        return {name: each["seconds"] for name, each in stages.items() if each["status"] == "ran"}

    def result(self, trial: Trial, run: str) -> Result:
        """What a finished trial measured.

        Raises:
            ConfigError: nothing can judge the answers.
        """
        artifact = self.runs_dir / run / "artifacts" / "evaluate"
        if not self.kind:
            self.find_judge(artifact)
        asks = parse_candidate(self.candidates[trial.candidate].config.asks, "base").name
        metrics = RunFiles(self.runs_dir / run).summary["stages"]["evaluate"]["metrics"]
        own = {
            key.removeprefix("evaluate/").removesuffix(f"/{asks}"): value
            for key, value in metrics.items()
            if key.endswith(f"/{asks}") and value is not None
        }
        return Result(read_scores(artifact / "responses.jsonl", asks, self.kind), own, run)

    def find_judge(self, artifact: Path) -> None:
        """Note what judges, as the first pilot found it.

        Raises:
            ConfigError: nothing does.
        """
        self.kind = json.loads((artifact / CANDIDATES).read_text(encoding="utf-8"))["quality"] or ""
        if self.kind in ("", "score"):
            raise ConfigError(
                Complaint(
                    "recipe=decide", "there is no judge that no candidate learned from.",
                    "Give evaluate.gold (a function, a verifier, a language model), evaluate.reference (a "
                    "column of the prompts with the right answers), or 1,000 pairs or more.",
                )
            )  # fmt: skip
        evaluate = self.experiment(next(iter(self.candidates))).stages["evaluate"]
        source = getattr(evaluate, self.kind, None)
        is_share = self.kind in QUALITIES or (
            source is not None and all(is_verifier(part) and part.weight == 1 for part in parts_of(source))
        )
        self.score_range = 1.0 if is_share else None

    # The judgement

    def judge_finalists(self) -> None:
        """Ask the finalists the sealed questions, once, and judge them."""
        ranked = sorted(self.trained, key=lambda each: -each.mean)
        finalists = ranked[: self.config.finalists]
        if not finalists:
            worse = [each for each in self.candidates.values() if each.state is State.WORSE]
            finalists = sorted(worse, key=lambda each: -each.mean)[:1]
        if not finalists:
            raise ConfigError(
                f"budget={clock(self.budget)}: no candidate could be trained in it. "
                "Raise it, or leave out what takes long, such as '~decide.candidates.NAME'."
            )
        self.say(f"\nThe sealed questions judge {', '.join(each.title for each in finalists)}.")
        until = (1 + LATE) * self.budget
        untrained = self.candidates[self.untrained]
        seeds = range(self.config.seeds)
        untrained.sealed = [self.sealed(untrained, seed, math.inf) for seed in seeds]  # type: ignore[misc]
        for number, each in enumerate(finalists):
            results = [self.sealed(each, seed, until if number else math.inf) for seed in seeds]
            found = [result for result in results if result is not None]
            if len(found) == len(results):
                each.sealed, each.state = found, State.FINALIST
        judged = [each for each in finalists if each.state is State.FINALIST]
        if not judged:
            raise ConfigError(f"No finalist could be judged: {finalists[0].why}")
        self.judgement = self.judge(judged, untrained)

    def sealed(self, each: Candidate, seed: int, until: float) -> Result | None:
        """The result on the sealed questions."""
        return self.run_trial(Trial(each.name, each.share or 1.0, "sealed", seed), until)

    def judge(self, judged: Sequence[Candidate], untrained: Candidate) -> Judgement:
        """Judge the finalists by their answers to the sealed questions."""
        prompts = [*untrained.sealed[0].scores]
        scores = {each.name: table([result.scores for result in each.sealed], prompts) for each in judged}
        untrained_SB = table([result.scores for result in untrained.sealed], prompts)
        limits = {
            figure: (-math.inf if each.min is None else each.min, math.inf if each.max is None else each.max)
            for figure, each in self.config.limits.items()
        }
        refused = over_limits({each.name: dict(each.figures()) for each in judged}, limits)
        costs = {each.name: self.cost(each) for each in judged}
        looks = self.looks()
        found = judge(
            scores, untrained_SB, cost=costs, smallest_gain=self.config.smallest_gain, refused=refused,
            score_range=self.score_range, error=ERROR / 2 ** (looks - 1),
        )  # fmt: skip
        for each in judged:
            if each.name in found.finalists:
                each.gain = found.finalists[each.name].gain
            if each.name in refused:
                each.state, each.limits_over = State.REFUSED, refused[each.name]
                each.why = f"outside the limit of {', '.join(refused[each.name])}"
            each.gain_over_base = self.over_base(each)
        if found.winner is not None:
            self.candidates[found.winner].state = State.WINNER
        return Judgement(found, looks, len(prompts))

    def looks(self) -> int:
        """How often these sealed questions have judged, this time included. Each new set of pilots on them is
        a further look."""
        path = self.directory / "looks.json"
        seen = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        now = sorted(
            pilot.run for pilot in self.log.pilots if pilot.ended == "done" and pilot.trial.part == "sealed"
        )
        if now not in seen:
            replace_text(path, json.dumps([*seen, now]))
            seen = [*seen, now]
        return seen.index(now) + 1

    def cost(self, each: Candidate) -> float:
        """Price of training a candidate and of `decide.requests` answers."""
        figures = dict(each.figures())
        thousand = figures.get("cost_per_thousand", 0.0)
        return cost_of(each.train_seconds, self.price) + self.config.requests / 1000 * thousand

    def over_base(self, each: Candidate) -> Sampled | None:
        """The gain over the base model, which was asked the same sealed questions."""
        kinds = [
            read_scores(
                self.runs_dir / result.run / "artifacts" / "evaluate" / "responses.jsonl", "base", self.kind
            )
            for result in each.sealed
        ]
        prompts = [*kinds[0]]
        own_SB = table([result.scores for result in each.sealed], prompts)
        found = estimated(own_SB - table(kinds, prompts), self.score_range)
        low, high = (float(found.bound(ERROR / 2, side)) for side in (-1, 1))
        return Sampled(float(found.value), low, high, int(found.rows))

    # The result

    def pays_off(self, each: Candidate) -> float | None:
        """After how many answers a candidate's training has paid off against the best untrained option."""
        own, other = (
            dict(one.figures()).get("cost_per_thousand") for one in (each, self.candidates[self.untrained])
        )
        if own is None or other is None:
            return None
        return break_even(cost_of(each.train_seconds, self.price), 0.0, (other - own) / 1000)

    def command(self, each: Candidate) -> str:
        """The command that makes a candidate's model at its full length."""
        model = parse_candidate(each.config.asks, "base").model
        words = [*self.config.set, *self.arguments, *each.config.set, f"stage={model}"]
        return "python -m rlhf " + " ".join(map(shlex.quote, words))

    def artifact(self, each: Candidate) -> str | None:
        """The model that was judged; None for a method or an untrained option."""
        model = parse_candidate(each.config.asks, "base").model
        path = self.runs_dir / each.sealed[0].run / "artifacts" / model if each.sealed else None
        return str(path) if path is not None and path.exists() and self.config.seeds == 1 else None

    def sentences(self) -> list[str]:
        """The result in words."""
        if self.judgement is None:
            return []
        untrained, winner = self.candidates[self.untrained], self.judgement.found.winner
        each = self.candidates[winner] if winner is not None else None
        lines = headline(self.judgement, self.candidates, untrained, self.judge_words, self.config)
        if each is not None:
            lines += self.about_winner(each)
        return lines

    def about_winner(self, each: Candidate) -> Iterator[str]:
        """What else a user wants to know of the winner."""
        figures = dict(each.figures())
        if (ratio := figures.get("retention_perplexity_ratio")) is not None:
            yield f"It forgets: perplexity on evaluate.retention is {ratio:.3f} times the base model's."
        if (requests := self.pays_off(each)) is not None and "cost_per_thousand" in figures:
            price = cost_of(each.train_seconds, self.price)
            words = (
                f"its answers cost no less than those of {self.candidates[self.untrained].title}"
                if math.isinf(requests)
                else f"it pays off after {requests:,.0f} answers"
            )
            yield (
                f"Training took {clock(each.train_seconds)} ({price:.3g} at evaluate.price_per_hour), 1,000 "
                f"answers cost {figures['cost_per_thousand']:.3g}: {words}."
            )
        if (path := self.artifact(each)) is not None:
            yield f"The model that was judged: {path}"
        else:
            yield f"A method was judged, over {self.config.seeds} seeds, and not one model."
        if each.share is not None and each.share < 1:
            yield (
                f"It was trained to {percent(each.share)} of its length. The command makes it at full length; "
                "that model has not been judged."
            )

    @property
    def judge_words(self) -> str:
        """What judges."""
        return JUDGE_WORDS.get(self.kind, self.kind.replace("_", " "))

    def more(self) -> list[str]:
        """What five times the budget could still change."""
        lines = [
            f"{each.title} was dropped: {each.why}."
            for each in self.candidates.values()
            if each.state is State.CUT
        ]
        short = [
            each for each in self.candidates.values()
            if each.state in (State.FINALIST, State.WINNER) and each.share is not None and each.share < 1
        ]  # fmt: skip
        lines += [
            f"{each.title} was judged at {percent(each.share)} of its length: "
            f"{clock(self.seconds_to(each, 1.0))} more would train it to the end."
            for each in short
        ]
        if self.judgement is not None and not lines:
            lines.append("Nothing was cut: a larger budget changes nothing. More questions or rows might.")
        return lines

    def write(self) -> None:
        """Write decision.json and the page."""
        from rlhf.report.decision import decision_page

        found = None if self.judgement is None else self.judgement.found
        winner = None if found is None or found.winner is None else self.candidates[found.winner]
        content = {
            "name": self.name,
            "outcome": None if found is None else found.outcome.value,
            "sentences": self.sentences(),
            "command": None if winner is None else self.command(winner),
            "artifact": None if winner is None else self.artifact(winner),
            "judge": self.judge_words,
            "questions": {
                "choosing": len(self.prompts()) if self.untrained else None,
                "sealed": None if self.judgement is None else self.judgement.questions,
            },
            "smallest_gain": self.config.smallest_gain,
            "seeds": self.config.seeds,
            "budget": {"seconds": self.budget, "spent": self.spent},
            "untrained": self.untrained or None,
            "winner": None if winner is None else winner.name,
            "candidates": [
                each.as_json() | {"break_even": self.requests_of(each)} for each in self.candidates.values()
            ],
            "pilots": [each.as_json() for each in self.log.pilots],
            "more": self.more(),
        }
        self.directory.mkdir(parents=True, exist_ok=True)
        replace_text(self.directory / "decision.json", json.dumps(content, indent=2, allow_nan=False))
        replace_text(self.directory / "report.html", decision_page(content))

    def requests_of(self, each: Candidate) -> float | None:
        """After how many answers a finalist pays off; None if it does not, or that is not known."""
        if not each.is_trained or not each.sealed or not self.untrained:
            return None
        requests = self.pays_off(each)
        return requests if requests is not None and math.isfinite(requests) else None


class StopTimer:
    """Stops a run of this process after some seconds, as a scheduler would: it saves its state."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock, self._is_over = threading.Lock(), False
        self.has_fired = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """While open, the time runs."""
        timer = threading.Timer(max(1.0, self._seconds), self._stop)
        timer.daemon = True
        if math.isfinite(self._seconds):
            timer.start()
        try:
            yield
        finally:
            with self._lock:
                self._is_over = True
            timer.cancel()

    def _stop(self) -> None:
        with self._lock:
            if not self._is_over:
                self.has_fired = True
                os.kill(os.getpid(), signal.SIGUSR1)


def share_of(full: float, share: float) -> float:
    """A share of a length: of a whole number, a whole one that is at least 1."""
    return max(1, round(full * share)) if isinstance(full, int) else full * share


def as_ended(word: str) -> Ended:
    """The word, as one of `Ended`."""
    assert word in ("done", "stopped", "failed")
    return word  # type: ignore[return-value]
