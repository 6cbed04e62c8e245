"""Run a composed config on one rank, or start several ranks. Gives the exit code."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.markup import escape

from rlhf.config import ConfigError
from rlhf.disk import disk_error_message
from rlhf.distributed.signals import discard_stdout, uninterrupted
from rlhf.exit_codes import CONFIG_ERROR, CRASH, DONE, GATE_FAILED, INTERRUPTED, PIPE, STOPPED
from rlhf.tracking.redaction import RedactingConsole

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf.pipeline.experiment import Experiment
    from rlhf.pipeline.runner import Pipeline

CONTINUE_HINT = "Finished stages and the last checkpoint are kept: the same command continues from there."

LOST_PEER = re.compile(r"timed? ?out|timeout|connection (closed|reset|refused)|broken pipe|socket", re.I)
"""Matches messages of torch's backends when another rank does not answer."""
OPENMP_SPINS = 4000
"""Iterations for which an OpenMP thread spins before it sleeps, about 0.05 ms. That is long enough on free
cores, and soon gives a busy core to other work. OpenMP's default of 300 000 is much slower next to another
program (benchmarks/busy_core.py)."""


def execute(resolved: Mapping[str, Any], run_name: str) -> int:
    """Check the config, run the chosen stages and print the results. Returns the exit code."""
    rank = 0
    try:
        with uninterrupted():
            from rlhf.distributed.compute import find_rank

            set_up_libraries()
        rank, _ = find_rank(os.environ)
        return _execute(resolved, run_name)
    except ConfigError as error:
        print(f"Error: {error}", file=sys.stderr)
        return return_or_end(CONFIG_ERROR)
    except BrokenPipeError:
        discard_stdout()
        return return_or_end(PIPE)
    except OSError as error:
        if (message := disk_error_message(error)) is None:
            traceback.print_exc()
            return return_or_end(CRASH)
        print(f"Error: {message}", file=sys.stderr)
        return return_or_end(CONFIG_ERROR)
    except LostRankError as error:
        print(f"Error: {error}", file=sys.stderr)
        return return_or_end(CRASH)
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        if rank == 0:
            word = "Interrupted" if signum == signal.SIGINT else f"Stopped by {signal.Signals(signum).name}"
            print(f"\n{word}. {CONTINUE_HINT}", file=sys.stderr)
        return INTERRUPTED if signum == signal.SIGINT else STOPPED
    except BaseException:  # a crash; also SystemExit, because a user's stage may call sys.exit
        traceback.print_exc()
        return return_or_end(CRASH)


class LostRankError(Exception):
    """Another rank does not answer."""


def return_or_end(code: int) -> int:
    """Return the code. In a group of ranks, end the process: the backend's threads may wait for others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        if distributed.is_initialized():
            end_rank(code)
    return code


def end_rank(code: int) -> NoReturn:
    """End this rank at once, without cleanup. Otherwise threads of the backend and of DeepSpeed may abort a
    process whose work is done."""
    from rlhf.distributed.signals import leave_exit_code

    leave_exit_code(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report_failure(resolved: Mapping[str, Any], run_name: str, rank: int) -> None:
    """Write down for the launcher when this rank failed."""
    note_failure(Path(resolved["runs_dir"]) / run_name, rank)


def _execute(resolved: Mapping[str, Any], run_name: str) -> int:
    with uninterrupted():
        from rlhf.cli.launcher import launch, ranks_wanted
        from rlhf.distributed.compute import leave_group, make_compute
        from rlhf.distributed.heartbeat import Heartbeat
        from rlhf.distributed.signals import Stopped, StopSignals
        from rlhf.pipeline.experiment import build_experiment
        from rlhf.pipeline.run import GateError
        from rlhf.pipeline.runner import Pipeline
        from rlhf.report.summary import print_summary

    experiment = build_experiment(resolved)
    settings = experiment.settings
    runs = Path(settings.runs_dir)
    processes = ranks_wanted(settings.launch, settings.device)
    needs_group = settings.zero != "none" and "RANK" not in os.environ
    if processes > 1 or needs_group:  # DeepSpeed needs a rank's environment, and in a sweep its own process
        return launch(resolved, runs / run_name, processes)

    signals, heartbeat = StopSignals(), None
    if "RANK" in os.environ and os.environ["WORLD_SIZE"] != "1":
        signals.progress = list  # no progress yet: the ranks wait for each other to join

    def end_hung(signum: int, is_second: bool) -> None:
        name = signal.Signals(signum).name
        why = f"a second signal ({name}) came"
        if not is_second:
            where = f": {heartbeat.place}; {heartbeat.others()}" if heartbeat is not None else ""
            why = f"{name} came, and no rank has made progress for {signals.quiet_seconds:.0f} s{where}"
        print(f"\nRank {os.environ.get('RANK', '0')} ends at once: {why}. {CONTINUE_HINT}", file=sys.stderr)
        end_rank(INTERRUPTED if signum == signal.SIGINT else STOPPED)

    def end_waiting(why: str) -> None:
        report_failure(resolved, run_name, compute.rank)
        print(f"Error: {why}", file=sys.stderr)
        end_rank(CRASH)

    with signals.installed(), signals.watchdog(end_hung):
        compute, compute_note = make_compute(
            settings.device, settings.precision, settings.zero, settings.distributed.timeout
        )
        signals.on_gpu = compute.device_name.startswith("cuda")  # does not import torch
        try:
            run_name = compute.broadcast(run_name)  # each rank made its own name from the time
            console = RedactingConsole(quiet=not compute.is_main)
            print_lead(experiment, runs / run_name, compute_note, console)
            pipeline = Pipeline(experiment, run_name, console, compute, signals)
            with Heartbeat(runs / run_name / "ranks", compute, end_waiting) as heartbeat:
                signals.progress = heartbeat.progress if compute.world_size > 1 else None
                try:
                    run_chain(pipeline, console)
                except GateError as error:
                    print_summary(pipeline.results, console, ended_by=error)
                    console.print(f"\n[red]{escape(str(error))}[/]", highlight=False)
                    console.print(
                        "Finished stages are kept. `gates=warn` continues after a failed gate.",
                        highlight=False,
                    )
                    return GATE_FAILED
                except RuntimeError as error:
                    if compute.world_size == 1 or not LOST_PEER.search(str(error)):
                        raise
                    if signals.received is not None:  # the other rank ended because of the same signal
                        raise Stopped(signals.received) from error
                    raise LostRankError(heartbeat.explain()) from error
            print_summary(pipeline.results, console)
            return DONE
        except KeyboardInterrupt:
            raise
        except BaseException:  # raised again; here only the time is written
            if compute.world_size > 1:  # before other ranks notice it, and without waiting for them
                report_failure(resolved, run_name, compute.rank)
            raise
        finally:
            if sys.exc_info()[0] in (None, Stopped):
                leave_group(compute)


def print_lead(experiment: Experiment, directory: Path, compute_note: str, console: Console) -> None:
    """Print the run's directory, its device and precision, and what was decided for the user."""
    console.print(f"Run in {directory}; {compute_note}.", highlight=False)
    for line in experiment.notes:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def run_chain(pipeline: Pipeline, console: Console) -> None:
    """Run the stages. If an error or a signal ends the run, first write the page of the finished stages.
    After a failed gate, the caller writes it; after a closed output, no page is written."""
    from rlhf.pipeline.run import GateError
    from rlhf.report.summary import write_page_too

    try:
        pipeline.run()
    except (GateError, BrokenPipeError):
        raise
    except BaseException:  # also a signal: write the page, then raise it again
        if pipeline.results.writes and pipeline.results.stages:
            write_page_too(pipeline.results, console)
        raise


def set_up_libraries() -> None:
    """Set variables that libraries read at import: no progress bars, few messages, short spins of OpenMP."""
    from rlhf.distributed.device import has_gpu

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for bars in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(bars, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "OMP_WAIT_POLICY" not in os.environ:  # GOMP_SPINCOUNT would override it
        os.environ.setdefault("GOMP_SPINCOUNT", str(OPENMP_SPINS))
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed, if installed, warns
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it reports missing GPU kernels
    # torch 2.14 renames these functions; DeepSpeed calls them for every parameter
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    # transformers renames this argument in 5.40, beyond the bound in pyproject.toml
    warnings.filterwarnings("ignore", message=".*past_key_values.*is deprecated.*")


def note_failure(directory: Path, rank: int) -> None:
    """Write the time of a rank's failure. The launcher shows the error of the rank that failed first."""
    if "RLHF_LAUNCHER" in os.environ:
        (directory / "ranks" / f"rank{rank}.failed").write_text(str(time.monotonic()), encoding="utf-8")
