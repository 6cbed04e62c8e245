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
    from rlhf.cli.speaker import Ending, Speaker

HELP = """python -m rlhf chat [policy=ppo] [run_name=NAME] [system=TEXT] [key=value ...]

Talk to a policy of the newest run, or of run_name=NAME. policy is a stage that made one, base, a model's
directory, or two of these: policy=[sft,ppo] answers side by side. Without policy it is the one that evaluate
judged. (A directory that is called like a stage: ./NAME.) The local engine answers.
/reset forgets the conversation, /quit ends. Ctrl-C stops an answer; at the prompt it ends.
From a pipe, all that comes is one prompt: `echo hi | python -m rlhf chat`.

Other keys, as in the run unless given: temperature, top_p, max_new_tokens, seed, precision, device; runs_dir.
"""
NARROWEST_SIDE = 30
"""Columns that an answer beside another one needs. In a narrower terminal they follow each other."""
NOTES = {
    "ended": "",
    "cut": "(cut off: max_new_tokens={})",
    "stopped": "(stopped)",
}
"""What is said behind an answer that did not end by itself."""


class Manner(Strict):
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
    """Talk until the user has enough; from a pipe, answer once."""
    known = dict.fromkeys(("policy", "run_name", *Manner.model_fields), "")
    keys = read("chat", arguments, known | {"runs_dir": defaults["runs_dir"]}, HELP)
    if keys is None:
        return DONE
    names, run = chosen(keys)
    given = {name: keys[name] for name in Manner.model_fields if keys[name]}
    manner = validated(Manner, settings_of(run, defaults) | given, "chat")
    with uninterrupted():
        from rlhf.cli.execute import set_up_libraries

        set_up_libraries()
        from rlhf.cli.speaker import load_speakers

    speakers = load_speakers(names, run, manner)
    if not sys.stdin.isatty():
        return answer_once(speakers, manner)
    of_run = f" of {run.directory}" if run is not None else ""
    print(f"{' and '.join(names)}{of_run}, temperature {manner.temperature:g}. /reset forgets, /quit ends.")
    with interruptible():
        talk(speakers, manner)
    return DONE


def chosen(keys: Mapping[str, str]) -> tuple[list[str], RunFiles | None]:
    """The policies that are to talk, and the run that they are from. Directories need no run.

    Raises:
        ConfigError: there is no such policy or run.
    """
    listed = keys["policy"].strip("[]").split(",")
    names = [*dict.fromkeys(name.strip() for name in listed if name.strip())]
    for name in filter(is_model, names):
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        kinds = config.get("architectures") or []
        if any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise ConfigError(f"policy={name}: that model gives scores and no text ({', '.join(kinds)}).")
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
    """Whether it is a model's directory."""
    return (Path(name) / "config.json").is_file()


def settings_of(run: RunFiles | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """How the run sampled when it judged its policies; without a run, how PPO samples by default."""
    if run is None:
        text = (resources.files("rlhf.conf") / "stages" / "ppo.yaml").read_text(encoding="utf-8")
        sampling, general = {"top_p": 1.0} | yaml.safe_load(text), defaults
    else:
        sampling, general = run.config["evaluate"], run.config
    names = ("max_new_tokens", "temperature", "top_p")
    found = {name: sampling[name] for name in names}
    return found | {name: general[name] for name in ("seed", "precision", "device")} | {"system": ""}


def answer_once(speakers: Sequence[Speaker], manner: Manner) -> int:
    """Answer the one prompt that comes through a pipe.

    Raises:
        ConfigError: it is empty.
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
    one_by_one(speakers, text, manner)
    return DONE


def talk(speakers: Sequence[Speaker], manner: Manner) -> None:
    """Read what the user types, and answer."""
    import readline  # noqa: F401  # arrow keys and history for `input`

    console = Console(highlight=False)
    while True:
        try:
            text = input("> ").strip()
        except UnicodeDecodeError as error:
            print(f"That was not {error.encoding} text, and nobody was asked.")
            continue
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            for speaker in speakers:
                speaker.reset()
            print("The conversation is forgotten.")
        elif text.startswith("/"):
            print("Commands: /reset, /quit.")
        elif text:
            try:
                if len(speakers) > 1 and console.width >= 2 * NARROWEST_SIDE:
                    side_by_side(speakers, text, manner, console)
                else:
                    one_by_one(speakers, text, manner)
            except ConfigError as error:
                print(f"Error: {error}")


def one_by_one(speakers: Sequence[Speaker], text: str, manner: Manner) -> None:
    """Show each answer as it comes, one below the other."""
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"{speaker.name}:")
        ending = speaker.answer(text, show)
        print(f" {note(ending, manner)}" if note(ending, manner) and sys.stdout.isatty() else "")


def show(piece: str) -> None:
    """Show a piece of an answer: what a model writes must not command the terminal."""
    sys.stdout.write(printable(piece))
    sys.stdout.flush()


def note(ending: Ending, manner: Manner) -> str:
    """What is said of an answer's end."""
    return NOTES[ending].format(manner.max_new_tokens)


def side_by_side(speakers: Sequence[Speaker], text: str, manner: Manner, console: Console) -> None:
    """Show answers in columns, as they come."""
    answers = {speaker.name: "" for speaker in speakers}

    def columns() -> Table:
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        for name in answers:
            table.add_column(Text(printable(name)), ratio=1)
        table.add_row(*(Text(printable(answer)) for answer in answers.values()))
        return table

    with Live(columns(), console=console, transient=True) as live:
        for speaker in speakers:

            def add(piece: str, name: str = speaker.name) -> None:
                answers[name] += piece
                live.update(columns())

            ending = speaker.answer(text, add)
            answers[speaker.name] += f" {note(ending, manner)}".rstrip()
    console.print(columns())


@contextmanager
def interruptible() -> Iterator[None]:
    """While open, Ctrl-C raises KeyboardInterrupt each time: it stops an answer, and ends at the prompt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
