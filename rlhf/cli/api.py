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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.cli.run_files import RunFiles
from rlhf.config import ConfigError
from rlhf.disk import disk_error_message
from rlhf.exit_codes import CONFIG_ERROR, DONE, GATE_FAILED, INTERRUPTED, STOPPED

if TYPE_CHECKING:
    import pandas

    from rlhf.cli.chat import SamplingParams
    from rlhf.data.schema import Message
    from rlhf.generation.policy_model import PolicyModel
    from rlhf.pipeline.experiment import Settings

HYDRA_LOCK = threading.Lock()
"""Held while a config is composed: Hydra has one global state per process."""


def compose(*overrides: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """The config that `python -m rlhf OVERRIDES` would run, as plain values.

    Args:
        overrides: as on the command line: `recipe=dpo`, `ppo.kl.coef=0.02`, `+experiment=path/to/mine.yaml`.
        config_dir: a directory with more YAML files, as for `--config-dir`.

    Raises:
        ConfigError: there is no such key or choice. `run` checks the values.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from rlhf.cli.messages import choice_complaints, explain_error, hydra_arguments, is_defaults_cycle
    from rlhf.pipeline.recipe import as_typed

    if non_texts := [each for each in overrides if not isinstance(each, str)]:
        raise ConfigError(
            f"compose: {non_texts[0]!r} is no text. Give each key by itself: compose('model=tiny', ...)."
        )
    arguments = hydra_arguments(overrides)
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(f"config_dir={config_dir}: there is no such directory.")
        escaped_path = str(Path(config_dir).absolute()).replace("\\", "\\\\").replace("'", "\\'")
        arguments = [*arguments, f"hydra.searchpath=['file://{escaped_path}']"]
    try:
        with (
            HYDRA_LOCK,
            _outside_hydra(),
            hydra.initialize_config_module("rlhf.conf", version_base="1.3"),
        ):
            node = hydra.compose("config", overrides=arguments)
            resolved = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError, RecursionError) as error:
        if isinstance(error, RecursionError) and not is_defaults_cycle(error):
            raise
        raise ConfigError(as_typed(explain_error(error, arguments))) from None
    assert isinstance(resolved, dict)
    config = {str(key): value for key, value in resolved.items()}
    if complaint := next(choice_complaints(config), None):
        raise ConfigError(complaint)
    return config


@contextmanager
def _outside_hydra() -> Iterator[None]:
    """While open, Hydra can be initialized, also in a job of `hydra.main`."""
    from hydra.core.global_hydra import GlobalHydra

    state = GlobalHydra.instance()
    before = state.hydra
    state.clear()
    try:
        yield
    finally:
        state.hydra = before


def run(config: Mapping[str, Any], *, quiet: bool = False) -> FinishedRun:
    """Run a config as `python -m rlhf` does: reuse what is in the store, and continue what was interrupted.

    In the main thread, Ctrl-C (a notebook's "interrupt") first finishes and saves the current step. Runs in
    this process take turns. Several ranks (`launch.processes=2`, several GPUs) and DeepSpeed run in processes
    of their own.

    Args:
        config: the result of `compose`. You may change its values.
        quiet: print nothing. The output of ranks is then in `RUN/ranks`.

    Raises:
        ConfigError: the config, data or a model cannot be used, or the disk is full.
        GateError: a gate failed. Finished stages are kept, and `open_run` shows them.
        KeyboardInterrupt: the run was interrupted. The same call continues.
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
    if config["budget"] is not None:
        raise ConfigError("rlhf.run makes one run. A decision is a command: python -m rlhf recipe=decide.")
    config = _plain(config, "")
    experiment = build_experiment(config)
    settings = experiment.settings
    directory, processes = _directory(settings), ranks_wanted(settings.launch, settings.device)
    if processes > 1 or settings.zero != "none":
        check_ended(launch(config, directory, processes, quiet=quiet), directory)
        return FinishedRun(directory)
    # plain lines in a notebook: it claims to be a terminal (FORCE_COLOR), but has no cursor
    console = RedactingConsole(quiet=quiet, force_jupyter=False, force_terminal=sys.stdout.isatty())
    signals = StopSignals()
    with signals.installed():
        compute, compute_note = make_compute(settings.device, settings.precision)
        signals.on_gpu = compute.device_name.startswith("cuda")
        print_lead(experiment, directory, compute_note, console)
        try:
            pipeline = Pipeline(experiment, directory.name, console, compute, signals)
            try:
                run_chain(pipeline, console)
            except GateError as error:
                print_summary(pipeline.results, console, ended_by=error)
                error.add_note(f"The run is rlhf.open_run({str(directory)!r}).")
                raise
            print_summary(pipeline.results, console)
        except OSError as error:
            if (message := disk_error_message(error)) is None:
                raise
            raise ConfigError(message) from error
    return FinishedRun(directory)


def open_run(directory: str | Path) -> FinishedRun:
    """The results of a run that has ended, such as `open_run("runs/demo")`.

    Raises:
        ConfigError: there is no run in this directory.
    """
    return FinishedRun(Path(directory))


def _plain(value: Any, key: str) -> Any:
    """A config value as dict, list, str, number, bool or None. Converts numpy's numbers and paths.

    Raises:
        ConfigError: the value has another type.
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
    """The run's directory. Without a `run_name`: a new one, named by the time, that no other call gets."""
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
    """Raise the error that ended the ranks.

    Args:
        code: exit code of the first rank that failed, or 0.
    """
    from rlhf.pipeline.run import GateError

    if code == GATE_FAILED:
        failed = [each for each in FinishedRun(directory).gates if each["outcome"] == "failed"]
        advice = "\n".join(
            f"Gate failed: {each['stage']}/{each['name']}. {each['advice']}" for each in failed
        )
        error = GateError(advice)
        error.add_note(f"The run is rlhf.open_run({str(directory)!r}).")
        raise error
    if code in (INTERRUPTED, STOPPED):
        raise KeyboardInterrupt
    if code == CONFIG_ERROR:
        texts = [
            path.read_text(encoding="utf-8", errors="replace")
            for path in sorted((directory / "ranks").glob("*.err"))
        ]
        message = next(filter(None, (f"\n{text}".partition("\nError: ")[2].strip() for text in texts)), None)
        raise ConfigError(message or f"A rank refused this: see {directory / 'ranks'}.")
    if code != DONE:
        raise RuntimeError(f"A rank crashed (exit code {code}): see {directory / 'ranks'}.")


class FinishedRun:
    """The results of a run, read from its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._files = RunFiles(self.directory)
        self._summary = self._files.summary  # now: it raises if the directory has no run

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
        findings = [*ended, *gates, *filter(None, (self.outcome, self.verdict))]
        return f"<run {self.directory}: {'; '.join(findings) or 'nothing in it is judged'}>"

    @property
    def outcome(self) -> str | None:
        """`worked`, `no gain worth having`, `did not work` or `cannot be told`; None if the run judges
        nothing."""
        outcome: str | None = self._summary["outcome"]
        return outcome

    @property
    def verdict(self) -> str:
        """What improved, what did not, and what to look at: one line each."""
        return self._summary["verdict"] or ""

    @property
    def gates(self) -> list[dict[str, Any]]:
        """The gates that were checked: `stage`, `name`, `value`, `outcome` (`passed`, `failed`, `cannot tell`
        or `not checked`) and `advice`."""
        gates: list[dict[str, Any]] = self._summary["gates"]
        return gates

    @property
    def summary(self) -> dict[str, float]:
        """Summary metrics of all stages, such as `ppo/held_out_score_gain`; NaN if not finite."""
        stages = self._summary["stages"].values()
        metrics = {name: value for stage in stages for name, value in stage["metrics"].items()}
        return {name: float("nan") if value is None else value for name, value in metrics.items()}

    @property
    def metrics(self) -> pandas.DataFrame:
        """Metrics that the stages logged: one row per step. Columns: `stage`, `step`, and each metric without
        the stage's name."""
        import pandas

        rows: dict[tuple[str, int], dict[str, Any]] = {}
        path = self.directory / "metrics.jsonl"
        try:
            with path.open(encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]  # the last line may be half written
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}). Name a run's directory.") from None
        for line in map(json.loads, lines):
            if "step" in line:
                stage, step = line["stage"], line["step"]
                row = rows.setdefault((stage, step), {"stage": stage, "step": step})
                names = (key for key in line if key.startswith(f"{stage}/"))
                row |= {key.removeprefix(f"{stage}/"): line[key] for key in names}
        return pandas.DataFrame([*rows.values()], columns=None if rows else ["stage", "step"])

    @property
    def report(self) -> Path:
        """Path of the run's page, report.html."""
        return self.directory / "report.html"

    @property
    def policies(self) -> list[str]:
        """The stages that made a policy, in the chain's order."""
        return self._files.policies

    def policy(self, name: str = "") -> LoadedPolicy:
        """A policy of the run, loaded, on the run's device and in its precision.

        Args:
            name: the stage that made it, or `base`. Default: what `evaluate` judged, or the last policy.

        Raises:
            ConfigError: there is no such policy, or its files are damaged.
        """
        from rlhf.cli.chat import SamplingParams, settings_of
        from rlhf.cli.execute import set_up_libraries
        from rlhf.config import validated

        set_up_libraries()
        from rlhf.cli.chat_session import load_policy
        from rlhf.distributed.compute import make_compute
        from rlhf.pipeline.runner import RUN_LOCK

        params = validated(SamplingParams, settings_of(self._files, {}), "")
        chosen = name if name == "base" else self._files.chosen_policy(name)
        with RUN_LOCK:
            compute, _ = make_compute(params.device, params.precision)
            return LoadedPolicy(chosen, load_policy(chosen, self._files, compute), params)


class LoadedPolicy:
    """A loaded policy that answers prompts with the local engine."""

    def __init__(self, name: str, model: PolicyModel, params: SamplingParams) -> None:
        self.name = name
        self.model = model.model
        """The transformers model."""
        self.tokenizer = model.tokenizer
        """The transformers tokenizer, with the chat template that the policy learned."""
        self._policy, self._params = model, params

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
        """One answer per prompt. Defaults: the sampling settings with which the run judged its policies.

        Args:
            prompts: each is a user's message or a conversation (`[{"role": "user", "content": "..."}]`).
            temperature: 0 always takes the likeliest token.

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
        params = validated(type(self._params), {**self._params.model_dump(), **changed}, "generate")
        if not turns:
            return []
        longest = max(len(prompt_ids(self.tokenizer, each)) for each in turns)
        if longest + params.max_new_tokens > self._policy.context_length:
            raise ConfigError(
                f"generate: a prompt has {longest} tokens and its answer up to max_new_tokens="
                f"{params.max_new_tokens}, and the model reads {self._policy.context_length}. Give shorter "
                "prompts, or lower max_new_tokens."
            )
        _, texts = self._policy.sample(
            turns, max_new_tokens=params.max_new_tokens, temperature=params.temperature, top_p=params.top_p,
            generator=torch.Generator().manual_seed(params.seed),
        )  # fmt: skip
        return texts


def _conversation(prompt: Any) -> list[Message]:
    """A prompt as the turns of a conversation.

    Raises:
        ConfigError: the prompt is neither a text nor a conversation.
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
