"""`python -m rlhf chat`: talk to a run's policies in the terminal. Imports torch when a model is loaded."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlhf.cli.command import read
from rlhf.cli.run_files import RunFiles
from rlhf.cli.runs import find_run
from rlhf.config import ConfigError, Strict, did_you_mean, validated
from rlhf.distributed.device import Precision
from rlhf.distributed.signals import uninterrupted
from rlhf.exit_codes import DONE
from rlhf.printable import printable

if TYPE_CHECKING:
    from rlhf.cli.chat_session import ChatSession, FinishReason

HELP = """python -m rlhf chat [policy=ppo] [run_name=NAME] [system=TEXT] [key=value ...]

Talk to a policy of the newest run, or of run_name=NAME. policy is a stage that made one, base, a model's
directory, or two of these: policy=[sft,ppo] answers side by side. Without policy it is the one that evaluate
judged. (A directory that is called like a stage: ./NAME.) The local engine answers.
/reset forgets the conversation, /quit ends. Ctrl-C stops an answer; at the prompt it ends.
From a pipe, all that comes is one prompt: `echo hi | python -m rlhf chat`.

Other keys, as in the run unless given: temperature, top_p, max_new_tokens, seed, precision, device; runs_dir.
"""
MIN_COLUMN_WIDTH = 30
"""Smallest width, in characters, of an answer next to another one. A narrower terminal shows one below the
other."""
FINISH_NOTES = {
    "ended": "",
    "cut": "(cut off: max_new_tokens={})",
    "stopped": "(stopped)",
}
"""Text shown after an answer, by the reason why it ended."""


class SamplingParams(Strict):
    """How answers are sampled."""

    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: NonNegativeInt
    precision: Precision
    device: Literal["auto", "cpu"]
    system: str
    """Text of a system message; empty for none."""


def chat(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Talk until the user quits. From a pipe, answer once."""
    known = dict.fromkeys(("policy", "run_name", *SamplingParams.model_fields), "")
    keys = read("chat", arguments, known | {"runs_dir": defaults["runs_dir"]}, HELP)
    if keys is None:
        return DONE
    names, run = chosen_policies(keys)
    given = {name: keys[name] for name in SamplingParams.model_fields if keys[name]}
    params = validated(SamplingParams, settings_of(run, defaults) | given, "chat")
    with uninterrupted():
        from rlhf.cli.execute import set_up_libraries

        set_up_libraries()
        from rlhf.cli.chat_session import load_sessions

    sessions = load_sessions(names, run, params)
    if not sys.stdin.isatty():
        return answer_once(sessions, params)
    of_run = f" of {run.directory}" if run is not None else ""
    print(f"{' and '.join(names)}{of_run}, temperature {params.temperature:g}. /reset forgets, /quit ends.")
    with interruptible():
        talk(sessions, params)
    return DONE


def chosen_policies(keys: Mapping[str, str]) -> tuple[list[str], RunFiles | None]:
    """The chosen policies and their run. The run is None if all of them are directories.

    Raises:
        ConfigError: there is no such policy or run.
    """
    listed = keys["policy"].strip("[]").split(",")
    names = [*dict.fromkeys(name.strip() for name in listed if name.strip())]
    for name in filter(is_model, names):
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        architectures = config.get("architectures") or []
        if any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
            raise ConfigError(
                f"policy={name}: that model gives scores and no text ({', '.join(architectures)})."
            )
    if len(names) > 2:
        raise ConfigError(f"policy={keys['policy']}: at most two can answer side by side.")
    runs_dir = Path(keys["runs_dir"])
    has_runs = runs_dir.is_dir() and any(runs_dir.glob("*/summary.json"))
    if names and not has_runs and not keys["run_name"] and all(is_model(name) for name in names):
        return names, None
    run = RunFiles(find_run(runs_dir, keys["run_name"]))
    if not names:
        return [run.chosen_policy("")], run
    for name in names:
        known = ["base", *run.policies]
        if name not in known and not is_model(name):
            raise ConfigError(
                f"policy={name}: {run.directory} has no such policy, and there is no model in a directory of "
                f"that name.{did_you_mean(name, known)} It has {', '.join(known)}."
            )
    return names, run


def is_model(name: str) -> bool:
    """Whether the name is a directory with a model."""
    return (Path(name) / "config.json").is_file()


def settings_of(run: RunFiles | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling settings with which the run judged its policies. Without a run: PPO's defaults."""
    if run is None:
        text = (resources.files("rlhf.conf") / "stages" / "ppo.yaml").read_text(encoding="utf-8")
        sampling, run_settings = {"top_p": 1.0} | yaml.safe_load(text), defaults
    else:
        sampling, run_settings = run.config["evaluate"], run.config
    names = ("max_new_tokens", "temperature", "top_p")
    chosen = {name: sampling[name] for name in names}
    return chosen | {name: run_settings[name] for name in ("seed", "precision", "device")} | {"system": ""}


def answer_once(sessions: Sequence[ChatSession], params: SamplingParams) -> int:
    """Answer the one prompt that comes through a pipe.

    Raises:
        ConfigError: the prompt is empty, or is not text.
    """
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"chat: what came through the pipe is not {error.encoding} text (byte {error.start}). "
            "Convert it: iconv -f OLD -t utf-8."
        ) from None
    if not text:
        raise ConfigError(
            "chat: nothing came through the pipe. Write a prompt into it, or type in a terminal."
        )
    one_by_one(sessions, text, params)
    return DONE


def talk(sessions: Sequence[ChatSession], params: SamplingParams) -> None:
    """Read what the user types, and answer."""
    import readline  # noqa: F401  # arrow keys and history for `input`

    console = Console(highlight=False)
    while True:
        try:
            text = input("> ").strip()
        except UnicodeDecodeError as error:
            print(f"That was not {error.encoding} text. It was not sent.")
            continue
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            for session in sessions:
                session.reset()
            print("The conversation is forgotten.")
        elif text.startswith("/"):
            print("Commands: /reset, /quit.")
        elif text:
            try:
                if len(sessions) > 1 and console.width >= 2 * MIN_COLUMN_WIDTH:
                    side_by_side(sessions, text, params, console)
                else:
                    one_by_one(sessions, text, params)
            except ConfigError as error:
                print(f"Error: {error}")


def one_by_one(sessions: Sequence[ChatSession], text: str, params: SamplingParams) -> None:
    """Stream the answers, one below the other."""
    for session in sessions:
        if len(sessions) > 1:
            print(f"{session.name}:")
        finish_reason = session.answer(text, show)
        print(
            f" {finish_note(finish_reason, params)}"
            if finish_note(finish_reason, params) and sys.stdout.isatty()
            else ""
        )


def show(piece: str) -> None:
    """Print a piece of an answer. Control characters are escaped: a model must not control the terminal."""
    sys.stdout.write(printable(piece))
    sys.stdout.flush()


def finish_note(finish_reason: FinishReason, params: SamplingParams) -> str:
    """Text about why the answer ended; empty if the model ended it."""
    return FINISH_NOTES[finish_reason].format(params.max_new_tokens)


def side_by_side(
    sessions: Sequence[ChatSession], text: str, params: SamplingParams, console: Console
) -> None:
    """Stream two answers in columns."""
    answers = {session.name: "" for session in sessions}

    def columns() -> Table:
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        for name in answers:
            table.add_column(Text(printable(name)), ratio=1)
        table.add_row(*(Text(printable(answer)) for answer in answers.values()))
        return table

    with Live(columns(), console=console, transient=True) as live:
        for session in sessions:

            def add(piece: str, name: str = session.name) -> None:
                answers[name] += piece
                live.update(columns())

            finish_reason = session.answer(text, add)
            answers[session.name] += f" {finish_note(finish_reason, params)}".rstrip()
    console.print(columns())


@contextmanager
def interruptible() -> Iterator[None]:
    """While open, every Ctrl-C raises KeyboardInterrupt: it stops an answer, or ends the chat."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
