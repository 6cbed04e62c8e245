"""The pilots of a decision: how a candidate becomes a run, when it is stopped, and what it measured."""

from __future__ import annotations

import copy
import json
import math
import os
import shlex
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf.cli.api import compose
from rlhf.cli.api import run as run_config
from rlhf.cli.run_files import RunFiles
from rlhf.cli.trials import Finished, replaced
from rlhf.compare.candidate import CANDIDATES, is_stage, parse_candidate
from rlhf.compare.candidate import Candidate as Asked
from rlhf.config import Complaint, ConfigError, did_you_mean
from rlhf.decide.candidate import Candidate, Result, State, read_answers
from rlhf.decide.estimate import estimate
from rlhf.decide.pace import Pace
from rlhf.decide.pilots import Ended, Pilot, PilotLog, Trial
from rlhf.decide.words import percent
from rlhf.evaluation.references import QUALITIES
from rlhf.pipeline.auto import MIN_JUDGE_PAIRS
from rlhf.pipeline.experiment import Experiment, build_experiment, stage_class
from rlhf.pipeline.recipe import AT_SUBSTITUTE, kind_of, with_instances
from rlhf.pipeline.settings import DecideConfig
from rlhf.report.judges import KINDS, faults
from rlhf.rewards.kinds import (
    RIGHT_ANSWERS,
    columns_needed,
    is_verifier,
    keyed_parts,
    parts_of,
    stage_of,
)
from rlhf.tracking.progress import clock
from rlhf.tracking.redaction import RedactingConsole

OWN_KEYS = ("recipe", "budget", "run_name", "stage")
"""Keys of the command that its pilots do not get. `decide` and `decide.*` are others."""
OVERSHOOT = 0.05
"""Share of the budget by which a pilot may exceed it before it is stopped."""
PATIENCE = 2.0
"""Times the expected seconds after which a pilot is stopped if others wait; it continues after them."""

FORGETTING = ("retention_perplexity_ratio", "question_accuracy_change")
"""Figures that need evaluate.retention."""
RETENTION_FIX = "Set evaluate.retention=[samples:retention_sentences,samples:retention_questions]"
TIMED = ("seconds_p50", "seconds_p95", "cost_per_thousand")
"""Figures that need decide.num_timed."""


def no_judge(whys: Iterable[str]) -> ConfigError:
    """The error of a decision that nothing can judge.

    Args:
        whys: sentences on what was named and cannot judge.
    """
    why = " ".join(["there is no judge that no candidate learned from.", *whys])
    fix = (
        "Give evaluate.gold (a function, a verifier, a language model), evaluate.reference (a column of the "
        f"prompts with the right answers), or {MIN_JUDGE_PAIRS:,} pairs or more."
    )
    return ConfigError(Complaint("recipe=decide", why, fix))


def no_verifier(key: str, source: str) -> ConfigError:
    """The error of a reward that does not check answers, where a candidate needs one that does."""
    why = f"{source} is no verifier, which checks answers against right ones."
    return ConfigError(Complaint(key, why, "Give one, such as ppo.reward=verify:number."))


class Pilots:
    """Runs the pilots of one decision, and knows how long they take."""

    def __init__(
        self, config: DecideConfig, directory: Path, budget: float, arguments: Sequence[str],
        config_dir: Path | None,
    ) -> None:  # fmt: skip
        """Args:
        directory: of the decision.
        budget: in seconds.
        arguments: `key=value` of all pilots, besides `decide.set`.
        config_dir: the user's directory with more YAML files.
        """
        self.config, self.directory, self.budget = config, directory, budget
        self.arguments, self.config_dir = arguments, config_dir
        self.console: Console = RedactingConsole(highlight=False, soft_wrap=True, markup=False)
        self.log, self.pace = PilotLog(directory / "pilots.jsonl"), Pace()
        for pilot in self.log.pilots:
            if pilot.ended == "done":
                self.pace.add(pilot.planned, pilot.stages, pilot.seconds)
        self._spent_before, self._begun = self.log.spent, time.monotonic()
        self.reserve = 0.0
        """Seconds that the judgement will take."""
        self.kind = ""
        """The score that judges; known after the first pilot."""
        self.score_range: float | None = None
        self.judges: set[str] = set()
        """The stages that make what judges."""
        self.composed = {name: self.compose(name) for name in config.tried}

    @property
    def spent(self) -> float:
        """Seconds of this decision so far, over all its processes."""
        return self._spent_before + time.monotonic() - self._begun

    def say(self, line: str) -> None:
        """Print a line of progress."""
        self.console.print(line)

    def compose(self, name: str) -> dict[str, Any]:
        """The config of a candidate, at its full length."""
        own = self.config.candidates[name].set
        try:
            return compose(*self.config.set, *self.arguments, *own, config_dir=self.config_dir)
        except ConfigError as error:
            complaint = Complaint(f"decide.candidates.{name}", f"its keys cannot be used. {error}")
            raise ConfigError(complaint) from None

    def asked(self, name: str) -> Asked:
        """Who answers for a candidate."""
        return parse_candidate(self.config.candidates[name].asks, "base")

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
        try:
            reward = vars(self.experiment(name).stages["evaluate"])["reward"]
        except ConfigError:  # `Decision.check_candidates` meets it again, and says it
            return True
        return reward is not None and any(stage_of(part.source) for part in parts_of(reward))

    def trial_config(self, trial: Trial, run: str | None) -> dict[str, Any]:
        """The config of a trial's run."""
        own = self.config.candidates[trial.candidate]
        config = copy.deepcopy(self.composed[trial.candidate])
        seed = int(config["seed"]) + trial.seed
        config |= {"stage": ["evaluate"], "gates": "warn", "why": False, "force": [], "run_name": run}
        config |= {"budget": None, "seed": seed}
        if own.length is not None and trial.share < 1:
            stage, _, key = own.length.rpartition(".")
            sections = config["instances"] if "@" in stage else config
            typed = stage.replace("@", AT_SUBSTITUTE)  # the candidate's own keys of an instance, which win
            sections.setdefault(typed if typed in sections else stage, {})[key] = share_of(
                self.full_length(trial.candidate), trial.share
            )
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
            evaluate |= {"num_timed": 0, "num_references": 0, "lm_eval": []}
        if trial.seed:
            config = self.with_first_judge(config, trial)
        return config

    def with_first_judge(self, config: dict[str, Any], trial: Trial) -> dict[str, Any]:
        """A config whose judge is the model of the first seed, so that all seeds have the same judge."""
        experiment = build_experiment(config)
        resolved = copy.deepcopy(dict(experiment.resolved))
        first = self.run_directory(self.run_name(trial._replace(seed=0))) / "artifacts"
        for kind in ("gold", "judge"):
            source = getattr(experiment.stages["evaluate"], kind)
            for part in parts_of(source) if source is not None else ():
                if (stage := stage_of(part.source)) is not None:
                    model = f"model:{(first / stage).resolve()}"
                    resolved["evaluate"][kind] = replaced(resolved["evaluate"][kind], part.source, model)
        return resolved

    def check_keys(self, name: str) -> None:
        """Check that a candidate's `asks` and `length` name what there is, also without its data.

        Raises:
            ConfigError: one of them does not.
        """
        sections, own = with_instances(self.composed[name]), self.config.candidates[name]
        stages = {
            each: keys for each, keys in sections.items() if isinstance(keys, dict) and "_target_" in keys
        }
        model = self.asked(name).model
        makers = [
            each for each, keys in stages.items() if stage_class(each, keys["_target_"]).makes == "policy"
        ]
        if is_stage(model) and model not in makers:
            why = f"no stage of that name makes a model that answers.{did_you_mean(model, makers)}"
            fix = f"Known: {', '.join(['base', *makers])}."
            raise ConfigError(Complaint(f"decide.candidates.{name}.asks={own.asks}", why, fix))
        if own.length is not None:
            stage, _, last = own.length.rpartition(".")
            near = did_you_mean(own.length, (f"{each}.{key}" for each in stages for key in stages[each]))
            number_of(name, own.length, stages.get(stage, {}).get(last), near)
            try:
                needed = self.experiment(name).needed()
            except ConfigError:  # `Decision.check_candidates` meets it again, and says it
                return
            if stage not in needed:
                why, fix = f"asks={own.asks} runs no {stage}.", f"Its stages: {', '.join(needed)}."
                raise ConfigError(Complaint(f"decide.candidates.{name}.length={own.length}", why, fix))

    def check_needs(self, name: str) -> None:
        """Check what only some candidates need, and only a decision asks for.

        Raises:
            ConfigError: the reward of the candidate's policy is no verifier, and it needs one; or the reward
                that chooses an answer reads the right one.
        """
        model, method = self.asked(name).model, self.asked(name).method
        if method == "best_of_n":
            reward = vars(self.experiment(name).stages["evaluate"])["reward"]
            if columns_needed(reward) & RIGHT_ANSWERS:
                why = "it reads the right answers, which nobody has when the model is used."
                raise ConfigError(Complaint("evaluate.reward", why, "Give one that reads only the answer."))
        if "verifier" in self.config.candidates[name].needs:
            section = self.compose(name).get(kind_of(model), {})  # `base` has none
            if section.get("reward") == "learned":  # told before the pairs are missed
                raise no_verifier("ppo.reward", "learned")
            stage = self.experiment(name).stages.get(model)
            for key, part in () if stage is None else keyed_parts(stage.reads().rewards):
                if not is_verifier(part):
                    raise no_verifier(key, part.source)

    def check_limits(self, name: str) -> None:
        """Check that what has a limit is measured for a candidate that trains.

        Raises:
            ConfigError: it could not be shipped, whatever its answers are.
        """
        limits = self.config.limits.ranges
        if not limits or not self.is_trained(name):
            return
        try:
            retention = vars(self.experiment(name).stages["evaluate"])["retention"]
        except ConfigError:  # `Decision.check_candidates` meets it again, and says it
            return
        for figure in limits:
            if figure in FORGETTING and not retention:
                is_missing, fix = "evaluate.retention is null", RETENTION_FIX
            elif figure in TIMED and not self.config.num_timed:
                is_missing, fix = "decide.num_timed is 0", "Set decide.num_timed=8"
            else:
                continue
            why = f"it is not measured for {self.config.candidates[name].title}, as {is_missing}."
            fix = f"{fix}, or leave out the limit."
            raise ConfigError(Complaint(f"decide.limits.{figure}", why, fix))

    def full_length(self, name: str) -> float:
        """The value of a candidate's length key at its full length: an int if it is a whole number."""
        key = self.config.candidates[name].length
        assert key is not None
        stage, _, last = key.rpartition(".")
        value = getattr(self.experiment(name).stages.get(stage), last, None)
        return number_of(name, key, value)

    def command(self, name: str) -> str:
        """The command that makes a candidate's model at its full length."""
        experiment, own = self.experiment(name), self.config.candidates[name].set
        made = {kind_of(stage) for stage in experiment.needed()} - {"evaluate"}
        common = [word for word in self.config.set if word.partition(".")[0] in made]
        given = [] if self.config_dir is None else ["--config-dir", str(self.config_dir)]
        words = [*given, *common, *self.arguments, *own, f"stage={self.asked(name).model}"]
        return "python -m rlhf " + " ".join(map(shlex.quote, words))

    def run_name(self, trial: Trial) -> str:
        """The name of a trial's run."""
        words = [self.directory.name, trial.candidate]
        words += [f"{100 * trial.share:g}"] if self.config.candidates[trial.candidate].length else []
        words += ["sealed"] if trial.part == "sealed" else []
        words += [f"seed{trial.seed}"] if trial.seed else []
        return "-".join(words)

    def share_at(self, name: str, share: float) -> float:
        """The share that a candidate really trains at a rung: steps are whole. 1 without a length."""
        if self.config.candidates[name].length is None:
            return 1.0
        full = self.full_length(name)
        return share_of(full, share) / full

    def run_directory(self, run: str) -> Path:
        """The directory of a pilot's run."""
        return self.directory.parent / run

    def predicted(self, trial: Trial) -> dict[str, float]:
        """Prepare the data of a trial, and check it.

        Returns:
            Stage that is not in the store -> seconds that the planner predicts.

        Raises:
            ConfigError: it cannot run.
        """
        return estimate(self.trial_config(trial, None), f"{self.directory.name}/check")

    def run(
        self,
        trial: Trial,
        each: Candidate,
        predicted: Mapping[str, float],
        expected: float,
        until: float,
        *,
        others_wait: bool = False,
    ) -> Result | None:
        """Run a trial.

        Args:
            each: the candidate; if the trial fails or is stopped, it says why.
            predicted: seconds by stage, as the planner predicts.
            expected: seconds.
            until: seconds of the decision at which it should have ended.
            others_wait: stop it after `PATIENCE` times the expected seconds. The candidate then is `LATE`.

        Raises:
            ConfigError: the disk is full.
            KeyboardInterrupt: the run was interrupted.
        """
        run, start, why = self.run_name(trial), self.spent, ""
        ended: Ended = "done"
        length = f" at {percent(trial.share)}" if each.config.length else ""
        sealed = ", sealed questions" if trial.part == "sealed" else ""
        takes = f"about {clock(expected)}" if predicted else "all of it is in the store"
        self.say(
            f"{each.title}{length}{sealed}: {takes}. {clock(start)} of {clock(self.budget)} spent. State: "
            f"python -m rlhf status run_name={run}"
        )
        self.log.write(Pilot(trial, run, start, 0.0, expected, "running"))
        left = until + OVERSHOOT * self.budget - start
        patience = max(PATIENCE * expected, expected + OVERSHOOT * self.budget)
        is_patience = others_wait and patience < left
        timer = StopTimer(patience if is_patience else left)
        try:
            with timer.running():
                run_config(self.trial_config(trial, run), quiet=True)
        except KeyboardInterrupt:
            reason = "it is slower than expected, and others wait" if is_patience else "for lack of budget"
            ended, why = "stopped", f"stopped after {clock(self.spent - start)}, {reason}"
            if not timer.has_fired:
                self.log.add(Pilot(trial, run, start, self.spent - start, expected, "stopped", "interrupted"))
                raise
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):
                raise
            ended, why = "failed", " ".join(str(error).split())
        except Exception as error:  # such as too little memory: the other candidates go on
            traceback.print_exc()
            ended, why = "failed", f"{type(error).__name__}: {error}"
        taken = self.stages_run(run, self.spent - start) if ended == "done" else {}
        if taken or self.log.done(trial) is None:  # else all of it was in the store
            seconds = self.spent - start
            pilot = Pilot(trial, run, start, seconds, expected, ended, why, predicted, taken)
            self.log.add(pilot)
            if ended == "done":
                self.pace.add(predicted, taken, seconds)
        else:
            self.log.write()
        if ended != "done":
            stopped = State.LATE if is_patience else State.CUT
            each.state, each.why = stopped if ended == "stopped" else State.FAILED, why
            self.say(f"{each.title}: {why}.")
            return None
        return self.result(trial, run)

    def stages_run(self, run: str, most: float) -> dict[str, float]:
        """Stage that a run has run -> its seconds.

        Args:
            most: seconds of the run. A stage that continued a shorter one counts that one's seconds too.
        """
        stages = RunFiles(self.run_directory(run)).summary["stages"]
        return {name: min(each["seconds"], most) for name, each in stages.items() if each["status"] == "ran"}

    def result(self, trial: Trial, run: str) -> Result:
        """What a finished trial measured.

        Raises:
            ConfigError: nothing can judge the answers.
        """
        artifact = self.run_directory(run) / "artifacts" / "evaluate"
        if not self.kind:
            self.find_judge(artifact)
        asks = parse_candidate(self.config.candidates[trial.candidate].asks, "base").name
        metrics = RunFiles(self.run_directory(run)).summary["stages"]["evaluate"]["metrics"]
        own = {
            key.removeprefix("evaluate/").removesuffix(f"/{asks}"): value
            for key, value in metrics.items()
            if key.endswith(f"/{asks}") and value is not None
        }
        found, base = (read_answers(artifact / "responses.jsonl", name, self.kind) for name in (asks, "base"))
        return Result(
            found.prompts, found.scores, own, run, found.answers, found.costs, base.costs,
            self.score_range == 1.0,
        )  # fmt: skip

    def check_judge(self, name: str) -> None:
        """Check that something may judge, as far as that is known before anything runs.

        Raises:
            ConfigError: no score and no reference is named.
        """
        try:
            evaluate = vars(self.experiment(name).stages["evaluate"])
        except ConfigError:  # `Decision.check_candidates` meets it again, and says it
            return
        if all(evaluate[key] is None for key in (*KINDS, "reference")):
            raise no_judge(())

    def find_judge(self, artifact: Path) -> None:
        """Note what judges, as the first pilot found it.

        Raises:
            ConfigError: nothing does.
        """
        self.kind = json.loads((artifact / CANDIDATES).read_text(encoding="utf-8"))["quality"] or ""
        if self.kind in ("", "score"):
            experiment = self.experiment(next(iter(self.config.tried)))
            run = Finished(RunFiles(artifact.parents[1]), experiment).results
            sources = {kind: getattr(run.chain["evaluate"], kind) for kind in KINDS}
            whys = [f"evaluate.{kind}: {why}" for kind in KINDS for why in faults(run, kind, sources[kind])]
            raise no_judge(whys)
        evaluate = self.experiment(next(iter(self.config.tried))).stages["evaluate"]
        source = getattr(evaluate, self.kind, None)
        parts = [] if source is None else parts_of(source)
        self.judges = {*filter(None, (stage_of(part.source) for part in parts))}
        # of a sum, and of a function that reads the right answers, the range is not known
        is_rule = [part.source.startswith("verify:") and part.weight == 1 for part in parts] == [True]
        self.score_range = 1.0 if self.kind in QUALITIES or is_rule else None


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


def pilot_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of the command that are also those of its pilots."""
    own = []
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if key not in OWN_KEYS and key.partition(".")[0].partition("@")[0] != "decide":
            own.append(argument)
    return own


def number_of(name: str, key: str, value: Any, near: str = "") -> float:
    """The value of a candidate's length key.

    Args:
        name: of the candidate.
        near: what the complaint suggests.

    Raises:
        ConfigError: there is no such key, or it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        why = f"there is no such key, or it is no number.{near if value is None else ''}"
        raise ConfigError(Complaint(f"decide.candidates.{name}.length={key}", why))
    return value


def share_of(full: float, share: float) -> float:
    """A share of a length: of a whole number, a whole one that is at least 1."""
    return max(1, round(full * share)) if isinstance(full, int) else full * share
