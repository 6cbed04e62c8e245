"""Compose a config and run it. Messages of Hydra about mistakes are replaced by clearer ones."""

from __future__ import annotations

import os
import sys
import traceback
from datetime import datetime
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlhf.cli.messages import in_our_words, is_of_composing, not_chosen, readable
from rlhf.cli.sweep.sweepers import SWEEPERS, register
from rlhf.config import ConfigError
from rlhf.exit_codes import CONFIG_ERROR, CRASH
from rlhf.pipeline.recipe import as_typed
from rlhf.tracking.redaction import redacted, redacted_output


def run(arguments: list[str]) -> None:
    """Compose the config of `key=value ...` and run it.

    Raises:
        SystemExit: the exit code is not 0.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises, instead of printing and ending with exit code 1
    register()
    refuse_to_pickle_secrets(arguments)
    try:
        sys.argv[1:] = readable(arguments)
        compose_and_run()
    except ConfigError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    except (HydraException, OmegaConfBaseException, YAMLError, RecursionError) as error:
        if isinstance(error, RecursionError) and not is_of_composing(error):
            raise
        print(f"Error: {as_typed(in_our_words(error, sys.argv[1:]))}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    except BrokenPipeError:
        raise
    except Exception:  # shown here: what Python itself shows is not redacted
        traceback.print_exc()
        raise SystemExit(CRASH) from None


@hydra.main(version_base="1.3", config_path="pkg://rlhf.conf", config_name="config")
def compose_and_run(node: DictConfig) -> Any:
    """One job: the only one, or one trial of a sweep, whose outcome the sweeper gets."""
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
    """Refuse secrets: submitit writes the command line of its jobs to a file.

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
