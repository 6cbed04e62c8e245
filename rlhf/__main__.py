"""The command line: compose, build, run; mistakes are shown without a traceback.

Exit codes: 0 done, 1 crash, 2 configuration or data error, 3 a gate failed, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from datetime import datetime

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from rlhf.config import ConfigError

CONFIG_ERROR, GATE_FAILED, INTERRUPTED = 2, 3, 130
failed_trials: list[int] = []
"""Exit codes of the trials of a sweep that did not end well."""


@hydra.main(version_base="1.3", config_path="pkg://rlhf.conf", config_name="config")
def compose_and_run(node: DictConfig) -> None:
    """One job: the only one, or one trial of a multirun."""
    try:
        run(node)
    except (ConfigError, OmegaConfBaseException) as error:
        print(f"Error: {error}", file=sys.stderr)
        end(CONFIG_ERROR)


def run(node: DictConfig) -> None:
    """Check the whole config, then run what was asked for, and show what came of it."""
    from rlhf.experiment import build_experiment
    from rlhf.pipeline import Pipeline
    from rlhf.report.summary import print_summary
    from rlhf.run import GateError

    quiet_libraries()
    resolved = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    experiment = build_experiment({str(key): value for key, value in resolved.items()})
    console = Console()
    pipeline = Pipeline(experiment, run_name_of(experiment.settings.run_name), console)
    try:
        pipeline.run()
    except GateError as error:
        print_summary(pipeline.results, console)
        console.print(f"\n[red]{escape(str(error))}[/]", highlight=False)
        console.print("Finished stages are kept. `gates=warn` goes on past a failing gate.", highlight=False)
        end(GATE_FAILED)
        return
    print_summary(pipeline.results, console)


def run_name_of(configured: str | None) -> str:
    """The run directory's name; trials of a multirun are numbered."""
    name = configured or datetime.now().strftime("%Y%m%d-%H%M%S")
    job = HydraConfig.get()
    return f"{name}-{job.job.num}" if job.mode == RunMode.MULTIRUN else name


def quiet_libraries() -> None:
    """Keep other libraries' bars and chatter out of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is first imported
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # a schedule may step past a skipped update; transformers has renamed an argument that TRL still sets
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
    # transformers renames this argument in 5.40, beyond the bound in pyproject.toml
    warnings.filterwarnings("ignore", message=".*past_key_values.*is deprecated.*")


def end(code: int) -> None:
    """End with this exit code; a trial of a sweep lets the others go on first."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        raise SystemExit(code)
    failed_trials.append(code)


def in_our_words(error: Exception) -> str:
    """Hydra's complaint; for an unknown key without its advice to add it with `+`, which never helps here."""
    unknown = re.match(r"Could not override '(.+)'", str(error))
    return f"{unknown[1]}: there is no such key. `--cfg job` lists every one." if unknown else str(error)


def main() -> None:
    """Entry point of `python -m rlhf` and `rlhf`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then raises, instead of printing and ending with exit code 1
    try:
        compose_and_run()
    except OverrideParseException as error:  # its message does not say which argument it is about
        print(f"Error: {error.override}: {error}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    except (HydraException, OmegaConfBaseException) as error:
        print(f"Error: {in_our_words(error)}", file=sys.stderr)
        raise SystemExit(CONFIG_ERROR) from None
    except KeyboardInterrupt:
        print(
            "\nInterrupted. Finished stages are kept: the same command goes on from there.", file=sys.stderr
        )
        raise SystemExit(INTERRUPTED) from None
    if failed_trials:
        raise SystemExit(max(failed_trials))


if __name__ == "__main__":
    main()
