"""The command line: compose, build, run; mistakes are shown without a traceback.

Exit codes: 0 done, 1 crash, 2 configuration or data error, 3 a gate failed (of `verify`: there is damage);
75 stopped by a scheduler's signal and 130 by Ctrl-C, after which the same command continues; 141 the output
was closed (`| head`).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

try:
    import hydra
except ModuleNotFoundError as missing:
    print(
        f"Error: rlhf is not installed for {sys.executable} ({missing}). In the checkout: `make install`, "
        "then `. .venv/bin/activate`.",
        file=sys.stderr,
    )
    raise SystemExit(2) from None
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlhf.cli.messages import in_our_words, not_chosen, readable, version
from rlhf.cli.sweep.sweepers import SWEEPERS, register
from rlhf.cli.verify import verify
from rlhf.config import ConfigError
from rlhf.distributed.signals import Stopped, StopSignals, leave_exit_code, nobody_reads
from rlhf.exit_codes import CONFIG_ERROR, CRASH, INTERRUPTED, PIPE, STOPPED
from rlhf.tracking.redaction import redacted, redacted_output


@hydra.main(version_base="1.3", config_path="pkg://rlhf.conf", config_name="config")
def compose_and_run(node: DictConfig) -> Any:
    """One job: the only one, or one trial of a sweep, whose outcome goes back to the sweeper."""
    with redacted_output():  # here too: a trial on a cluster does not come through main
        return run_composed(node)


def run_composed(node: DictConfig) -> Any:
    """Run what was composed."""
    from rlhf.cli.execute import end_rank, execute
    from rlhf.cli.sweep.trial import run_trial

    try:
        resolved = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:  # told here: Hydra would put a line of its own before it
        print(f"Error: {in_our_words(error, sys.argv[1:])}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    assert isinstance(resolved, dict)
    config = {str(key): value for key, value in resolved.items()}
    if complaint := next(not_chosen(config), None):  # in a file of --config-dir
        print(f"Error: {complaint}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR)
    name = config["run_name"] or datetime.now().strftime("%Y%m%d-%H%M%S")
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        outcome = run_trial(config, f"{name}-{job.job.num}")
        if job.sweeper._target_ in SWEEPERS:
            return outcome
        code = outcome.code  # another sweeper knows no exit codes
    else:
        code = execute(config, name)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            end_rank(code)
    if code:
        raise SystemExit(code)
    return None


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
    if not sys.flags.safe_path and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # for the user's modules; `python -m rlhf` has it there
    with StopSignals().installed():  # at once: importing torch takes seconds, in which a signal would kill
        try:
            try:
                run_command_line()
            finally:
                sys.stdout.flush()  # here, where a pipe without a reader is told quietly
        except BrokenPipeError:
            nobody_reads()
            leave_exit_code(PIPE)
            raise SystemExit(PIPE) from None
        except SystemExit as ending:
            leave_exit_code(ending.code)
            raise


def run_command_line() -> None:
    """Compose and run; or verify a store, for which nothing is composed.

    Raises:
        SystemExit: whenever the exit code is not 0.
    """
    if sys.argv[1:2] == ["verify"]:
        defaults = OmegaConf.load(str(resources.files("rlhf.conf") / "config.yaml"))
        if code := verify(sys.argv[2:], store_dir=defaults.store_dir):
            raise SystemExit(code)
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises, instead of printing and ending with exit code 1
    register()
    if "--version" in sys.argv[1:]:
        print(version())
        return
    refuse_to_pickle_secrets(sys.argv[1:])
    try:
        sys.argv[1:] = readable(sys.argv[1:])
        compose_and_run()
    except ConfigError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        print(f"Error: {in_our_words(error, sys.argv[1:])}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    except Stopped as stop:  # before any run began
        raise SystemExit(INTERRUPTED if stop.signum == signal.SIGINT else STOPPED) from None
    except BrokenPipeError:
        raise
    except Exception:  # shown here: what Python itself shows is not redacted
        traceback.print_exc()
        raise SystemExit(CRASH) from None


if __name__ == "__main__":
    main()
