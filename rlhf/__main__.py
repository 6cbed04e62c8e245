"""The command line: `python -m rlhf [COMMAND] [key=value ...]`. Mistakes are shown without a traceback.

A first word without `=` is a command. Without a command, the config is composed from the keys and run.

Exit codes: 0 done; 1 crash; 2 configuration or data error; 3 a gate failed (`verify`: something is damaged;
`bisect`: no cause was found);
75 stopped by a scheduler's signal; 130 stopped by Ctrl-C; 141 the output was closed (`| head`). After 75 and
130 the same command continues.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module, resources
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf import __version__

if find_spec("hydra") is None:
    print(
        f"Error: rlhf is not installed for {sys.executable} (it has no package hydra). In the checkout: "
        "`make install`, then `. .venv/bin/activate`.",
        file=sys.stderr,
    )
    raise SystemExit(2)
import yaml

from rlhf.distributed.signals import Stopped, StopSignals, discard_stdout, leave_exit_code, uninterrupted
from rlhf.exit_codes import CONFIG_ERROR, INTERRUPTED, PIPE, STOPPED
from rlhf.tracking.redaction import redacted_output

COMMANDS = {
    "status": "rlhf.cli.runs:status",
    "ls": "rlhf.cli.runs:ls",
    "gc": "rlhf.cli.gc:gc",
    "watch": "rlhf.cli.watch:watch",
    "verify": "rlhf.cli.verify:verify",
    "export": "rlhf.cli.export:export",
    "chat": "rlhf.cli.chat:chat",
    "init": "rlhf.cli.init:init",
    "keys": "rlhf.cli.keys:keys",
    "bisect": "rlhf.cli.bisect:bisect",
    "ceiling": "rlhf.cli.ceiling:ceiling",
}
"""Command -> its function. The function gets the other arguments and the packaged config, and returns the
exit code."""


@redacted_output()
def main() -> None:
    """Entry point of `python -m rlhf` and `rlhf`."""
    if not sys.flags.safe_path and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # to import the user's modules; `python -m rlhf` has it already
    with StopSignals().installed():  # first: importing torch takes seconds, in which a signal would kill
        try:
            try:
                run_command_line()
            finally:
                sys.stdout.flush()  # here, so that a closed pipe raises BrokenPipeError, handled below
        except Stopped as stop:  # before any run began
            code = INTERRUPTED if stop.signum == signal.SIGINT else STOPPED
            leave_exit_code(code)
            raise SystemExit(code) from None
        except BrokenPipeError:
            discard_stdout()
            leave_exit_code(PIPE)
            raise SystemExit(PIPE) from None
        except SystemExit as exit_error:
            leave_exit_code(exit_error.code)
            raise


def run_command_line() -> None:
    """Run the command. Help and version come first, because they import no slow package.

    Raises:
        SystemExit: the exit code is not 0.
    """
    arguments = sys.argv[1:]
    command = arguments[0] if arguments and is_command(arguments[0]) else None
    if command is None and {"-h", "--help"} & {*arguments}:
        print(packaged_config()["hydra"]["help"]["template"])
    elif "--version" in arguments:
        print(f"rlhf {__version__}")
    elif later := misplaced_command(arguments):
        message = f"{later}: a command is the first word: `python -m rlhf {later} ...`."
        if later == "keys":
            message += " It knows the packaged stages, not your own."
        print(f"Error: {message}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR)
    elif command is None:
        with uninterrupted():
            from rlhf.cli.app import run
        run(arguments)
    elif command in COMMANDS:
        if code := run_command(command, arguments[1:]):
            raise SystemExit(code)
    else:
        print(f"Error: {unknown_command_message(command)}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR)


def run_command(name: str, arguments: list[str]) -> int:
    """Run a command. Returns the exit code."""
    module, _, function = COMMANDS[name].partition(":")
    with uninterrupted():
        from rlhf.config import ConfigError
        from rlhf.disk import disk_error_message

        command = getattr(import_module(module), function)
    try:
        code: int = command(arguments, packaged_config())
    except ConfigError as error:
        print(f"Error: {error}", file=sys.stderr)
        return CONFIG_ERROR
    except OSError as error:
        if (message := disk_error_message(error)) is None:
            raise
        print(f"Error: {message}", file=sys.stderr)
        return CONFIG_ERROR
    return code


def is_command(word: str) -> bool:
    """Whether a first word is a command: no option (`-m`), no key=value, no removed key (`~key`)."""
    return "=" not in word and not word.startswith(("-", "~"))


def misplaced_command(arguments: list[str]) -> str | None:
    """A command after the first word, as in `stage=sft status`; None if there is none, or after a command."""
    if not arguments or is_command(arguments[0]):
        return None
    later = (word for before, word in pairwise(arguments) if not before.startswith("--"))
    return next((word for word in later if word in COMMANDS), None)


def unknown_command_message(word: str) -> str:
    """The message for an unknown command. It suggests `stage=NAME` for the name of a stage."""
    from rlhf.cli.messages import choice_names
    from rlhf.config import nearest

    known = {name: name for name in COMMANDS} | {name: f"stage={name}" for name in choice_names("stages")}
    near = " or ".join(known[name] for name in nearest(word, known))
    meant = f" Did you mean {near}?" if near else ""
    *names, last = COMMANDS
    return (
        f"{word}: there is no such command.{meant} The form is `python -m rlhf [COMMAND] [key=value ...]`, "
        f"and COMMAND may be {', '.join(names)} or {last}. `python -m rlhf --help` shows what can be typed."
    )


def packaged_config() -> dict[str, Any]:
    """The content of conf/config.yaml, not composed."""
    text = (resources.files("rlhf.conf") / "config.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    return config


if __name__ == "__main__":
    main()
