"""Compose a config and run it. Hydra's error messages are replaced by clearer ones."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlhf.cli.messages import choice_complaints, explain_error, hydra_arguments, is_defaults_cycle
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
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise, instead of print and exit with 1
    register()
    refuse_to_pickle_secrets(arguments)

    @hydra.main(version_base="1.3", config_path="pkg://rlhf.conf", config_name="config")
    def compose_and_run(node: DictConfig) -> Any:
        """Run one job: the only one, or one trial of a sweep. The sweeper gets the returned outcome."""
        with redacted_output():  # here too: a trial on a cluster does not go through main
            return run_composed(node, arguments)

    try:
        sys.argv[1:] = hydra_arguments(arguments)
        compose_and_run()
    except ConfigError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    except (HydraException, OmegaConfBaseException, YAMLError, RecursionError) as error:
        if isinstance(error, RecursionError) and not is_defaults_cycle(error):
            raise
        print(f"Error: {as_typed(explain_error(error, sys.argv[1:]))}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    except BrokenPipeError:
        raise
    except Exception:  # printed here, because Python's own traceback is not redacted
        traceback.print_exc()
        raise SystemExit(CRASH) from None


def run_composed(node: DictConfig, arguments: Sequence[str]) -> Any:
    """Run a composed config.

    Args:
        arguments: the command's, as the user typed them.
    """
    from rlhf.cli.execute import end_rank, execute
    from rlhf.cli.sweep.trial import run_trial

    try:
        resolved = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:  # printed here: Hydra would put a line of its own before it
        print(f"Error: {explain_error(error, sys.argv[1:])}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    assert isinstance(resolved, dict)
    config = {str(key): value for key, value in resolved.items()}
    if complaint := next(choice_complaints(config), None):  # in a file of --config-dir
        print(f"Error: {complaint}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR)
    name = config["run_name"] or datetime.now().strftime("%Y%m%d-%H%M%S")
    job = HydraConfig.get()
    if config["budget"] is not None and job.mode == RunMode.MULTIRUN:
        print(
            "Error: recipe=decide has pilots of its own, so it cannot be swept. Leave out -m.",
            file=sys.stderr,
        )
        raise SystemExit(CONFIG_ERROR)
    if job.mode == RunMode.MULTIRUN:
        outcome = run_trial(config, f"{name}-{job.job.num}")
        if job.sweeper._target_ in SWEEPERS:
            return outcome
        code = outcome.code  # other sweepers do not read exit codes
    elif config["budget"] is not None:
        code = run_decision(config, name, arguments)
    else:
        code = execute(config, name)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            end_rank(code)
    if code:
        raise SystemExit(code)
    return None


def run_decision(config: dict[str, Any], name: str, arguments: Sequence[str]) -> int:
    """Run `recipe=decide`. Its pilots are composed again, with the same keys."""
    from rlhf.cli.execute import set_up_libraries

    set_up_libraries()
    from rlhf.cli.decide import decide

    job = HydraConfig.get()
    given = [Path(each.path) for each in job.runtime.config_sources if each.provider == "command-line"]
    overrides = {*job.overrides.task}
    keys = [each for each in arguments if overrides.intersection(hydra_arguments([each]))]
    return decide(config, name, keys, next(iter(given), None))


def refuse_to_pickle_secrets(arguments: list[str]) -> None:
    """Refuse a secret on the command line of a submitit job: submitit writes that line to a file.

    Raises:
        SystemExit: the command line has a secret.
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
