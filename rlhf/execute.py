"""From a composed config to an exit code, on one rank or by starting several."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape

from rlhf.config import ConfigError
from rlhf.secrets import RedactingConsole

DONE, CRASH, CONFIG_ERROR, GATE_FAILED, STOPPED, INTERRUPTED = 0, 1, 2, 3, 75, 130
"""Exit codes. STOPPED (a scheduler's signal) and INTERRUPTED (Ctrl-C): the same command goes on."""

LOST_PEER = re.compile(r"timed? ?out|timeout|connection (closed|reset|refused)|broken pipe|socket", re.I)
"""What torch's backends say when another rank does not answer."""


def execute(resolved: Mapping[str, Any], run_name: str) -> int:
    """Check the whole config, run what was asked for, and show what came of it; the exit code."""
    from rlhf.distributed import find_rank

    rank = 0
    try:
        rank, _ = find_rank(os.environ)
        return _execute(resolved, run_name)
    except ConfigError as error:
        failed(resolved, run_name, rank)
        print(f"Error: {error}", file=sys.stderr)
        return CONFIG_ERROR
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        if rank == 0:
            kept = "Finished stages and the last checkpoint are kept: the same command goes on from there."
            word = "Interrupted" if signum == signal.SIGINT else f"Stopped by {signal.Signals(signum).name}"
            print(f"\n{word}. {kept}", file=sys.stderr)
        return INTERRUPTED if signum == signal.SIGINT else STOPPED
    except Exception:
        failed(resolved, run_name, rank)
        traceback.print_exc()
        return CRASH


def failed(resolved: Mapping[str, Any], run_name: str, rank: int) -> None:
    """Tell the launcher when this rank failed."""
    from rlhf.launch import note_failure

    note_failure(Path(resolved["runs_dir"]) / run_name, rank)


def _execute(resolved: Mapping[str, Any], run_name: str) -> int:
    from torch import distributed

    from rlhf.distributed import make_compute
    from rlhf.experiment import build_experiment
    from rlhf.heartbeat import Heartbeat
    from rlhf.interrupt import StopSignals
    from rlhf.launch import launch, ranks_wanted
    from rlhf.pipeline import Pipeline
    from rlhf.report.summary import print_summary
    from rlhf.run import GateError

    quiet_libraries()
    experiment = build_experiment(resolved)
    settings = experiment.settings
    runs = Path(settings.runs_dir)
    processes = ranks_wanted(settings.launch, settings.device)
    alone = settings.zero != "none" and "RANK" not in os.environ
    if processes > 1 or alone:  # DeepSpeed wants a rank's environment, and a process of its own in a sweep
        return launch(resolved, runs / run_name, processes)

    signals = StopSignals()
    with signals.installed():
        compute, how = make_compute(
            settings.device, settings.precision, settings.zero, settings.distributed.timeout
        )
        try:
            run_name = compute.broadcast(run_name)  # each rank made its own from the time
            console = RedactingConsole(quiet=not compute.is_main)
            console.print(f"Run in {runs / run_name}; {how}.", highlight=False)
            pipeline = Pipeline(experiment, run_name, console, compute, signals)
            with Heartbeat(runs / run_name / "ranks", compute) as heartbeat:
                try:
                    pipeline.run()
                except GateError as error:
                    print_summary(pipeline.results, console)
                    console.print(f"\n[red]{escape(str(error))}[/]", highlight=False)
                    console.print(
                        "Finished stages are kept. `gates=warn` goes on past a failing gate.", highlight=False
                    )
                    return GATE_FAILED
                except RuntimeError as error:
                    if compute.world_size == 1 or not LOST_PEER.search(str(error)):
                        raise
                    failed(resolved, run_name, compute.rank)
                    print(f"Error: {heartbeat.explain(settings.distributed.timeout)}", file=sys.stderr)
                    os._exit(CRASH)  # the backend's threads still wait for the lost rank
            print_summary(pipeline.results, console)
            return DONE
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()


def quiet_libraries() -> None:
    """Keep other libraries' bars and chatter out of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is first imported
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # transformers renames this argument in 5.40, beyond the bound in pyproject.toml
    warnings.filterwarnings("ignore", message=".*past_key_values.*is deprecated.*")
