"""The chain from Python: in a script, a notebook or a thread, as from the command line.

import rlhf

run = rlhf.run(rlhf.compose("recipe=dpo", "model=tiny"))
run.metrics                              # a pandas.DataFrame: one row for each logged step
run.policy().generate(["How was it?"])   # answers
run.report                               # the path of its page
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import count
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.cli.run_files import RunFiles
from rlhf.config import ConfigError
from rlhf.disk import in_words
from rlhf.exit_codes import CONFIG_ERROR, DONE, GATE_FAILED, INTERRUPTED, STOPPED

if TYPE_CHECKING:
    import pandas

    from rlhf.cli.chat import Manner
    from rlhf.data.schema import Message
    from rlhf.generation.policy_model import PolicyModel
    from rlhf.pipeline.experiment import Settings

COMPOSING = threading.Lock()
"""Hydra has one state for a process."""


def compose(*overrides: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """The config that `python -m rlhf OVERRIDES` would run, as plain values.

    Args:
        overrides: as they are typed: `recipe=dpo`, `ppo.kl.coef=0.02`, `+experiment=path/to/mine.yaml`.
        config_dir: a directory with more YAML files, as `--config-dir` names it.

    Raises:
        ConfigError: a key or a value that there is not. `run` checks the values as a whole.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from rlhf.cli.messages import in_our_words, is_of_composing, not_chosen, readable
    from rlhf.pipeline.recipe import as_typed

    if odd := [each for each in overrides if not isinstance(each, str)]:
        raise ConfigError(
            f"compose: {odd[0]!r} is no text. Give each key by itself: compose('model=tiny', ...)."
        )
    arguments = readable(overrides)
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"config_dir={config_dir}: there is no such directory.")
        place = str(Path(config_dir).absolute()).replace("\\", "\\\\").replace("'", "\\'")
        arguments = [*arguments, f"hydra.searchpath=['file://{place}']"]
    try:
        with COMPOSING, hydra.initialize_config_module("rlhf.conf", version_base="1.3"):
            node = hydra.compose("config", overrides=arguments)
            found = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError, RecursionError) as error:
        if isinstance(error, RecursionError) and not is_of_composing(error):
            raise
        raise ConfigError(as_typed(in_our_words(error, arguments))) from None
    assert isinstance(found, dict)
    config = {str(key): value for key, value in found.items()}
    if complaint := next(not_chosen(config), None):
        raise ConfigError(complaint)
    return config


def run(config: Mapping[str, Any], *, quiet: bool = False) -> FinishedRun:
    """Run a config as `python -m rlhf` does: what is in the store is reused, what was interrupted goes on.
    In the main thread, Ctrl-C (a notebook's "interrupt") finishes the current step and saves it first.

    Runs in this process take turns. Several ranks (`launch.processes=2`, several GPUs) and DeepSpeed get
    processes of their own.

    Args:
        config: of `compose`. Keys may have been changed.
        quiet: print nothing. What ranks print is then in `RUN/ranks`.

    Raises:
        ConfigError: the config, data or a model cannot be used, or the disk is full.
        GateError: a gate failed. All that was finished is kept, and `open_run` shows it.
        KeyboardInterrupt: it was interrupted. The same call continues.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "rlhf.run starts its ranks by itself (launch.processes=N), and this process is one of several "
            "ranks already. Under torchrun or srun, use python -m rlhf."
        )
    from rlhf.cli.execute import print_lead, run_chain, set_up_libraries
    from rlhf.cli.launcher import launch, ranks_wanted

    set_up_libraries()
    from rlhf.distributed.compute import make_compute
    from rlhf.distributed.signals import StopSignals
    from rlhf.pipeline.experiment import build_experiment
    from rlhf.pipeline.run import GateError
    from rlhf.pipeline.runner import Pipeline
    from rlhf.report.summary import print_summary
    from rlhf.tracking.redaction import RedactingConsole

    if not isinstance(config, Mapping) or "recipe" not in config:
        raise ConfigError("rlhf.run takes the config that rlhf.compose(...) gives, as a dict.")
    config = _plain(config, "")
    experiment = build_experiment(config)
    settings = experiment.settings
    directory, processes = _directory(settings), ranks_wanted(settings.launch, settings.device)
    if processes > 1 or settings.zero != "none":
        check_ended(launch(config, directory, processes, quiet=quiet), directory)
        return FinishedRun(directory)
    # plain lines in a notebook, which says of itself that it is a terminal (FORCE_COLOR), and has no cursor
    console = RedactingConsole(quiet=quiet, force_jupyter=False, force_terminal=sys.stdout.isatty())
    signals = StopSignals()
    with signals.installed():
        compute, how = make_compute(settings.device, settings.precision)
        signals.on_gpu = compute.device_name.startswith("cuda")
        print_lead(experiment, directory, how, console)
        try:
            pipeline = Pipeline(experiment, directory.name, console, compute, signals)
            try:
                run_chain(pipeline, console)
            except GateError as error:
                print_summary(pipeline.results, console)
                error.add_note(f"The run is rlhf.open_run({str(directory)!r}).")
                raise
            print_summary(pipeline.results, console)
        except OSError as error:
            if (said := in_words(error)) is None:
                raise
            raise ConfigError(said) from error
    return FinishedRun(directory)


def open_run(directory: str | Path) -> FinishedRun:
    """The results of a run that has ended, such as `open_run("runs/demo")`.

    Raises:
        ConfigError: there is none.
    """
    return FinishedRun(Path(directory))


def _plain(value: Any, key: str) -> Any:
    """A config's value as a dict, list, text, number, truth value or None: numpy's numbers and paths too.

    Raises:
        ConfigError: it is none of these.
    """
    match value:
        case Mapping():
            return {str(name): _plain(each, f"{key}.{name}".lstrip(".")) for name, each in value.items()}
        case list() | tuple():
            return [_plain(each, key) for each in value]
        case None | bool():
            return value
        case str() | Path():
            return str(value)
        case Integral():
            return int(value)
        case Real():
            return float(value)
    raise ConfigError(f"{key}={value!r}: a {type(value).__name__}. Give a text, a number, a list or a dict.")


def _directory(settings: Settings) -> Path:
    """Of a run: without a `run_name` one that is called by the time, and that no other call gets."""
    runs = Path(settings.runs_dir)
    if settings.run_name is not None:
        return runs / settings.run_name
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in count(1):
        directory = runs / (now if number == 1 else f"{now}-{number}")
        try:
            directory.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            from rlhf.pipeline.run import Run

            raise Run(directory).unwritable(error) from None
    return directory


def check_ended(code: int, directory: Path) -> None:
    """Raise what ended the ranks.

    Args:
        code: the first one's that failed, or 0.
    """
    from rlhf.pipeline.run import GateError

    if code == GATE_FAILED:
        failed = [each for each in FinishedRun(directory).gates if each["outcome"] == "failed"]
        said = "\n".join(f"Gate failed: {each['stage']}/{each['name']}. {each['advice']}" for each in failed)
        error = GateError(said)
        error.add_note(f"The run is rlhf.open_run({str(directory)!r}).")
        raise error
    if code in (INTERRUPTED, STOPPED):
        raise KeyboardInterrupt
    if code == CONFIG_ERROR:
        texts = [
            path.read_text(encoding="utf-8", errors="replace")
            for path in sorted((directory / "ranks").glob("*.err"))
        ]
        told = next(filter(None, (f"\n{text}".partition("\nError: ")[2].strip() for text in texts)), None)
        raise ConfigError(told or f"A rank refused this: see {directory / 'ranks'}.")
    if code != DONE:
        raise RuntimeError(f"A rank crashed (exit code {code}): see {directory / 'ranks'}.")


class FinishedRun:
    """What a run made, read from its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._files = RunFiles(self.directory)
        self._summary = self._files.summary  # at once: an error here says that it is no run

    def __repr__(self) -> str:
        stages = self._summary["stages"].items()
        ended = [
            f"{name} {each['status']}" for name, each in stages if each["status"] in ("failed", "stopped")
        ]
        gates = [
            f"gate {each['stage']}/{each['name']} failed"
            for each in self.gates
            if each["outcome"] == "failed"
        ]
        said = [*ended, *gates, *filter(None, (self.outcome, self.verdict))]
        return f"<run {self.directory}: {'; '.join(said) or 'nothing in it is judged'}>"

    @property
    def outcome(self) -> str | None:
        """`worked`, `no gain worth having`, `did not work` or `cannot be told`; None where nothing is
        judged."""
        found: str | None = self._summary["outcome"]
        return found

    @property
    def verdict(self) -> str:
        """What improved, what did not, and what to look at: a line each."""
        return self._summary["verdict"] or ""

    @property
    def gates(self) -> list[dict[str, Any]]:
        """The gates that were checked: `stage`, `name`, `value`, `outcome` (`passed`, `failed`, `cannot tell`
        or `not checked`) and `advice`."""
        found: list[dict[str, Any]] = self._summary["gates"]
        return found

    @property
    def summary(self) -> dict[str, float]:
        """The summary metrics of all stages, such as `ppo/held_out_score_gain`; NaN for one that is not
        finite."""
        stages = self._summary["stages"].values()
        metrics = {name: value for stage in stages for name, value in stage["metrics"].items()}
        return {name: float("nan") if value is None else value for name, value in metrics.items()}

    @property
    def metrics(self) -> pandas.DataFrame:
        """What the stages logged: a row for each step, with the columns `stage` and `step`, and one for each
        metric, without the stage's name."""
        import pandas

        rows: dict[tuple[str, int], dict[str, Any]] = {}
        path = self.directory / "metrics.jsonl"
        try:
            with path.open(encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]  # one may be half written
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}). Name a run's directory.") from None
        for line in map(json.loads, lines):
            if "step" in line:
                stage, step = line["stage"], line["step"]
                row = rows.setdefault((stage, step), {"stage": stage, "step": step})
                named = (key for key in line if key.startswith(f"{stage}/"))
                row |= {key.removeprefix(f"{stage}/"): line[key] for key in named}
        return pandas.DataFrame([*rows.values()], columns=None if rows else ["stage", "step"])

    @property
    def report(self) -> Path:
        """Its page, report.html, for a browser."""
        return self.directory / "report.html"

    @property
    def policies(self) -> list[str]:
        """The stages that made a policy, in the chain's order."""
        return self._files.policies

    def policy(self, name: str = "") -> LoadedPolicy:
        """A policy of the run, loaded, on the run's device and in its precision.

        Args:
            name: the stage that made it, or `base`; without one, what `evaluate` judged, or the last one.

        Raises:
            ConfigError: there is none of that name, or its files are damaged.
        """
        from rlhf.cli.chat import Manner, settings_of
        from rlhf.cli.execute import set_up_libraries
        from rlhf.config import validated

        set_up_libraries()
        from rlhf.cli.speaker import load_policy
        from rlhf.distributed.compute import make_compute
        from rlhf.pipeline.runner import TURN

        manner = validated(Manner, settings_of(self._files, {}), "")
        chosen = name if name == "base" else self._files.chosen_policy(name)
        with TURN:
            compute, _ = make_compute(manner.device, manner.precision)
            return LoadedPolicy(chosen, load_policy(chosen, self._files, compute), manner)


class LoadedPolicy:
    """A policy that answers, by the local engine."""

    def __init__(self, name: str, model: PolicyModel, manner: Manner) -> None:
        self.name = name
        self.model = model.model
        """transformers' model."""
        self.tokenizer = model.tokenizer
        """transformers' tokenizer, with the chat template that the policy learned."""
        self._policy, self._manner = model, manner

    def __repr__(self) -> str:
        return f"<policy {self.name}>"

    def generate(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """One answer to each prompt. What is not given is as when the run judged its policies.

        Args:
            prompts: a user's message each, or a conversation (`[{"role": "user", "content": "..."}]`).
            temperature: 0 for the likeliest token each time.

        Raises:
            ConfigError: a prompt does not fit the model's context, or the values cannot be used.
        """
        import torch

        from rlhf.config import validated
        from rlhf.data.chat_template import prompt_ids

        if isinstance(prompts, str | Mapping):
            raise ConfigError("generate: give a list of prompts, such as generate(['How was it?']).")
        turns = [_conversation(each) for each in prompts]
        given = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
        }  # fmt: skip
        changed = {key: value for key, value in given.items() if value is not None}
        manner = validated(type(self._manner), {**self._manner.model_dump(), **changed}, "generate")
        if not turns:
            return []
        longest = max(len(prompt_ids(self.tokenizer, each)) for each in turns)
        if longest + manner.max_new_tokens > self._policy.context_length:
            raise ConfigError(
                f"generate: a prompt has {longest} tokens and its answer up to max_new_tokens="
                f"{manner.max_new_tokens}, and the model reads {self._policy.context_length}. Give shorter "
                "prompts, or lower max_new_tokens."
            )
        _, texts = self._policy.sample(
            turns, max_new_tokens=manner.max_new_tokens, temperature=manner.temperature, top_p=manner.top_p,
            generator=torch.Generator().manual_seed(manner.seed),
        )  # fmt: skip
        return texts


def _conversation(prompt: Any) -> list[Message]:
    """The turns of a prompt.

    Raises:
        ConfigError: it is neither a text nor a conversation.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    turns: list[Any] = [*prompt] if isinstance(prompt, list | tuple) else []
    for turn in turns:
        texts = [turn.get(key) for key in ("role", "content")] if isinstance(turn, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            turns = []
            break
    if not turns:
        raise ConfigError(
            f"generate: {prompt!r} is no prompt. A prompt is a text, or a list of turns such as "
            '[{"role": "user", "content": "How was it?"}].'
        )
    return turns
