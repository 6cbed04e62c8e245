"""The command line: compose, build, run; mistakes are shown without a traceback.

Exit codes: 0 done, 1 crash, 2 configuration or data error, 3 a gate failed; 75 stopped by a scheduler's
signal and 130 by Ctrl-C, after which the same command goes on.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.interrupt import Stopped, StopSignals, leave_exit_code
from rlhf.secrets import redacted, redacted_output

CRASH, CONFIG_ERROR, STOPPED, INTERRUPTED = 1, 2, 75, 130
failed_trials: list[int] = []
"""Exit codes of the trials of a sweep that did not end well."""


@hydra.main(version_base="1.3", config_path="pkg://rlhf.conf", config_name="config")
def compose_and_run(node: DictConfig) -> None:
    """One job: the only one, or one trial of a multirun."""
    with redacted_output():  # here too: a trial on a cluster does not come through main
        run_composed(node)


def run_composed(node: DictConfig) -> None:
    """Run what was composed."""
    from rlhf.execute import execute

    try:
        resolved = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        print(f"Error: {error}", file=sys.stderr)
        end(CONFIG_ERROR)
        return
    assert isinstance(resolved, dict)
    end(execute({str(key): value for key, value in resolved.items()}, run_name_of(resolved["run_name"])))


def run_name_of(configured: str | None) -> str:
    """The run directory's name; trials of a multirun are numbered."""
    name = configured or datetime.now().strftime("%Y%m%d-%H%M%S")
    job = HydraConfig.get()
    return f"{name}-{job.job.num}" if job.mode == RunMode.MULTIRUN else name


def end(code: int) -> None:
    """End with this exit code; a trial of a sweep lets the others go on first, unless all shall stop."""
    if code == 0:
        return
    if HydraConfig.get().mode != RunMode.MULTIRUN or code in (STOPPED, INTERRUPTED):
        raise SystemExit(code)
    failed_trials.append(code)


def in_our_words(error: Exception) -> str:
    """Hydra's complaint; for an unknown key without its advice to add it with `+`, which never helps here."""
    unknown = re.match(r"Could not override '(.+)'", str(error))
    return f"{unknown[1]}: there is no such key. `--cfg job` lists every one." if unknown else str(error)


@contextmanager
def redacted_sweep() -> Iterator[None]:
    """While open, the multirun.yaml of Hydra's sweeper, the whole command line in it, has no secrets."""
    save = OmegaConf.save

    def save_redacted(config: DictConfig, path: Path) -> None:
        save(OmegaConf.create(redacted(OmegaConf.to_container(config))), path)

    OmegaConf.save = save_redacted  # type: ignore[assignment]
    try:
        yield
    finally:
        OmegaConf.save = save  # type: ignore[method-assign]


def refuse_to_pickle_secrets(arguments: list[str]) -> None:
    """Submitit hands the command line to its jobs in a file.

    Raises:
        SystemExit: there is a secret in it.
    """
    if any("launcher=submitit" in argument for argument in arguments):
        for argument in arguments:
            if redacted(argument) != argument:
                print(
                    f"Error: {argument}: submitit would write this secret to a file. Leave it in the "
                    "environment and name it: '${oc.env:NAME}'.",
                    file=sys.stderr,
                )
                raise SystemExit(CONFIG_ERROR)


@redacted_output()
def main() -> None:
    """Entry point of `python -m rlhf` and `rlhf`."""
    with StopSignals().installed():  # at once: importing torch takes seconds, in which a signal would kill
        try:
            run_command_line()
        except SystemExit as ending:
            leave_exit_code(ending.code)
            raise


def run_command_line() -> None:
    """Compose and run.

    Raises:
        SystemExit: whenever the exit code is not 0.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises, instead of printing and ending with exit code 1
    failed_trials.clear()
    refuse_to_pickle_secrets(sys.argv[1:])
    try:
        with redacted_sweep():
            compose_and_run()
    except OverrideParseException as error:  # its message does not say which argument it is about
        print(f"Error: {error.override}: {error}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    except (HydraException, OmegaConfBaseException) as error:
        print(f"Error: {in_our_words(error)}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    except Stopped as stop:  # before any run began
        raise SystemExit(INTERRUPTED if stop.signum == signal.SIGINT else STOPPED) from None
    except Exception:  # shown here: what Python itself shows is not redacted
        traceback.print_exc()
        raise SystemExit(CRASH) from None
    if failed_trials:
        raise SystemExit(max(failed_trials))


if __name__ == "__main__":
    main()
