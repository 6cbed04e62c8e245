"""Save and resume inside a stage. Checkpoints are atomic and verified, and one always stays.

Layout: STORE/STAGE/.KEY.checkpoints/step-00000012/ has manifest.json and the files of the engine and the
loop. The artifact's key decides the place. So any run that needs the artifact continues from the last
checkpoint, whatever the name of the run. A checkpoint is written under another name, flushed, hashed and
renamed. Only then are older ones removed.

In the background, training continues as soon as the state is copied. A thread of each rank writes, flushes
and hashes the rank's own files, without communication. `after_step` finishes the checkpoint once the threads
of all ranks are done. All ranks learn this in the same call.

`best/` next to the checkpoints has the best weights so far, if a stage keeps them. Each checkpoint has hard
links to those files, and its manifest has their digests. A resumed run takes them from its checkpoint.

`kept-INPUTS-DIGEST-NAME` next to them is a file that a stage makes once, before it trains.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from uuid import uuid4

from pydantic import PositiveFloat, PositiveInt

from rlhf.config import ConfigError, Strict
from rlhf.digests import MANIFEST, Recipe, digest_of, file_digest, first_outside, flush, link_or_copy
from rlhf.disk import content_of
from rlhf.distributed.compute import Compute, portable
from rlhf.distributed.device import host_memory
from rlhf.distributed.signals import Stopped, StopSignals, leave_stop_seconds
from rlhf.tracking.tracker import Tracker

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf.training.engine import Engine

CHECKPOINT_FORMAT = 6
LOOP, BEST = "loop.pt", "best"
WRITE_ERROR = re.compile("unexpected pos|PytorchStreamWriter|write|iostream error", re.I)
"""Messages of torch.save if it cannot write to the disk. Any other error means that another rank was lost."""


class CheckpointConfig(Strict):
    """`checkpoint.*`: how often a training stage saves its state."""

    every_steps: PositiveInt | None
    """Steps between two checkpoints (in PPO: rollouts); null uses minutes only."""
    every_minutes: PositiveFloat | None
    """Minutes between two checkpoints; null uses steps only. If both are null, only a signal to stop writes a
    checkpoint."""
    background: Literal["auto", True, False]
    """Whether training continues while a checkpoint is written from a copy of the state in the host's memory.
    auto does so on GPUs, if the copy fits. Under DeepSpeed, training always waits."""
    keep: PositiveInt
    """Number of newest checkpoints that stay until the stage is done."""
    resume: bool
    """Whether to continue from the newest checkpoint; false starts the stage again."""


def verify_checkpoint(checkpoint: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest of an intact checkpoint, and an empty text; otherwise None, and what is wrong."""
    try:
        manifest: dict[str, Any] = json.loads(content_of(checkpoint / MANIFEST))
        if manifest["format"] != CHECKPOINT_FORMAT:
            return None, f"written in format {manifest['format']}, this version reads {CHECKPOINT_FORMAT}"
        if (
            digest_of({key: value for key, value in manifest.items() if key != "digest"})
            != manifest["digest"]
        ):
            return None, f"{MANIFEST} is not what was written"
        if manifest["name"] != checkpoint.name:
            return None, f"{MANIFEST} belongs to {manifest['name']}"
        outside = first_outside(checkpoint, manifest["files"])
        if outside is not None:
            return None, f"{outside} leads out of its directory, or to itself"
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing lets other threads run
            digests = pool.map(lambda name: file_digest(checkpoint / name), manifest["files"])
            for name, digest in zip(manifest["files"], digests, strict=True):
                if manifest["files"][name] != digest:
                    return None, f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return manifest, ""


class Saveable(Protocol):
    """An object whose state a checkpoint holds: an engine, or another library's trainer."""

    def state(self) -> dict[str, Any] | None:
        """See `Engine.state`."""

    def save(self, directory: Path) -> None:
        """See `Engine.save`."""

    def load(self, directory: Path) -> None:
        """See `Engine.load`."""


@dataclass
class BackgroundWrite:
    """A checkpoint that this rank's thread writes."""

    step: int
    part: Path
    spent: float
    """Seconds of this and all earlier attempts up to the copy of the state."""
    paused: float
    """Seconds that training waited for the copy."""
    best_files: Mapping[str, str]
    thread: threading.Thread
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Digest and size of the files that this rank wrote."""
    error: Exception | None = None
    seconds: float = 0.0
    """Seconds for the copy and the writing together."""


@dataclass
class Checkpointer:
    """One stage's checkpoints. Every rank has a Checkpointer, and all ranks make the same calls."""

    directory: Path
    config: CheckpointConfig
    compute: Compute
    tracker: Tracker
    signals: StopSignals
    log: Callable[[str], None]
    stage: str
    recipe: Recipe = field(default_factory=dict)
    """The recipe of the artifact that the stage makes."""
    input_digests: Mapping[str, str] = field(default_factory=dict)
    """Digests of the stage's inputs. A checkpoint made from other inputs is not used."""
    keeps_last: bool = False
    """Whether the state after the last step is saved too, before the model is measured for the last time."""
    seconds: float = 0.0
    """Seconds of earlier attempts, up to the checkpoint that this one continues from."""
    written: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, bytes) of each checkpoint that this attempt wrote."""
    newest: dict[str, Any] | None = None
    """The manifest of the newest intact checkpoint."""

    def __post_init__(self) -> None:
        self._start = self._last = self._step_start = time.monotonic()
        self._longest_step = 0.0
        self._steps: int | None = None
        self.newest = self.compute.main_only(self._restore_newest)
        files = {} if self.newest is None else self.newest["files"]
        self._best_files = {name: files[name] for name in files if name.startswith(f"{BEST}/")}
        self.seconds = self.newest["seconds"] if self.newest else 0.0
        self._save_seconds = self.newest.get("save_seconds") if self.newest else None
        self._background: BackgroundWrite | None = None

    def restore(self, engine: Saveable) -> dict[str, Any] | None:
        """Load the newest checkpoint and return the loop's state; None if there is no checkpoint.

        The state's tensors are mapped from the checkpoint's file and take no memory before they are read.
        Copy what you keep, and drop the rest.
        """
        import torch

        if self.newest is None:
            return None
        directory = self.directory / self.newest["name"]
        try:
            engine.load(directory)
            state: dict[str, Any] = torch.load(
                directory / LOOP, weights_only=True, mmap=True, map_location="cpu"
            )
        except pickle.UnpicklingError as error:
            raise ConfigError(
                f"{directory}: refused, because it contains more than tensors and numbers "
                f"({str(error).splitlines()[0]}) This project did not write it. Remove it, or start the "
                "stage again with checkpoint.resume=false."
            ) from None
        torch.set_rng_state(state.pop("torch_random"))
        cuda_random = state.pop("cuda_random", None)  # missing in a checkpoint from a CPU
        if cuda_random is not None and self.compute.device.type == "cuda":
            torch.cuda.set_rng_state(cuda_random)
        self.tracker.restore(directory)
        if not self._is_of_shorter_run:  # then `training` says so, which knows the number of steps
            self.log(f"{self.stage}: continues from step {self.newest['step']} ({directory})")
        return state

    @contextmanager
    def training(self, steps: int | None = None) -> Iterator[None]:
        """While open, a signal to stop waits for the next `after_step`, which saves and then stops.

        Args:
            steps: total number of steps, with those of earlier attempts; None if unknown.
        """
        self._last = self._step_start = time.monotonic()
        self._steps = steps
        if self.newest is not None and self._is_of_shorter_run:
            self.log(
                f"{self.stage}: continues the shorter run from step {self.newest['step']} of {steps} "
                f"({self.directory / self.newest['name']})"
            )
        with self.signals.deferred():
            yield
            self._complete()

    def after_step(self, step: int, engine: Saveable, state: Mapping[str, Any]) -> None:
        """Save if a checkpoint is due. If any rank got a signal, save and stop.

        Args:
            state: the loop's state after `step`: tensors, numbers, strings and containers of them.

        Raises:
            ConfigError: this checkpoint, or the one in the background, could not be written.
            Stopped: a signal came. The checkpoint is written.
        """
        self.compute.position["step"] = step
        self._longest_step = max(self._longest_step, time.monotonic() - self._step_start)
        self.signals.longest_step = max(self.signals.longest_step, self._longest_step)
        signum, due, is_written = self._agree(step)
        if signum:
            self.log(f"{self.stage}: saving step {step}, then stopping")
        if is_written:
            self._complete()
        if due and not signum and self._continues_while_saving(engine):
            self._save_in_background(step, engine, state)
        elif signum or due:
            self.save(step, engine, state)
        if signum:
            raise Stopped(signum)
        if self.compute.is_main and self._save_seconds is not None:
            saves = 1 if self._background is None else 2  # it would first wait for the one in the background
            leave_stop_seconds(self._longest_step + saves * self._save_seconds)
        self._step_start = time.monotonic()

    @property
    def best(self) -> Path:
        """The directory with what `keep_best` wrote last, for `load_trained`."""
        assert self._best_files, f"{self.stage}: nothing was kept"
        return self.directory / BEST

    def keep_best(self, engine: Engine, module: nn.Module) -> None:
        """Write the trained weights of a part of the engine's model, in place of the earlier ones. Every
        later checkpoint has them.

        Raises:
            ConfigError: they could not be written.
        """
        part = self.directory / f".{BEST}.part"
        with self._writing("the best weights", part):
            self.compute.main_only(lambda: _empty(part))
            engine.save_trained(module, part)
            files, _ = self._digests(part)
            self.compute.main_only(lambda: self._replace_best(part))
        self._best_files = {f"{BEST}/{name}": digest for name, digest in files.items()}

    def saved_file(self, name: str) -> Path | None:
        """The file of this name that `save_file` wrote for the same inputs, in this attempt or an earlier
        one; None if it is missing or damaged."""

        def find() -> Path | None:
            for path in self.directory.glob(self._saved_name(name, "?" * 12)):
                if path.name == self._saved_name(name, file_digest(path)):
                    return path
            return None

        return self.compute.main_only(find)

    def save_file(self, name: str, write: Callable[[Path], None]) -> Path:
        """Let rank 0 write a file that later attempts find with `saved_file`, even if the stage is
        interrupted. Its name contains its digest, so it needs no manifest.

        Raises:
            ConfigError: the file could not be written.
        """
        part = self.directory / f".{name}.part"

        def work() -> Path:
            self.directory.mkdir(parents=True, exist_ok=True)
            write(part)
            flush(part)
            final = self.directory / self._saved_name(name, file_digest(part))
            for other in self.directory.glob(self._saved_name(name, "?" * 12)):
                other.unlink()  # from an attempt that resumed at an earlier step, with other rounding
            part.rename(final)
            flush(self.directory)
            return final

        with self._writing(name, part):
            return self.compute.main_only(work)

    @property
    def _is_of_shorter_run(self) -> bool:
        """Whether the newest checkpoint is the last one of a shorter run of this stage."""
        return self.newest is not None and digest_of(self.newest["recipe"]) != digest_of(self.recipe)

    @property
    def _inputs_digest(self) -> str:
        return digest_of(dict(self.input_digests))[:12]

    def _saved_name(self, name: str, digest: str) -> str:
        return f"kept-{self._inputs_digest}-{digest[:12]}-{name}"

    def save(self, step: int, engine: Saveable, state: Mapping[str, Any]) -> None:
        """Write one checkpoint. Then remove the oldest ones, so that `keep` stay.

        Raises:
            ConfigError: it could not be written. The earlier ones are unchanged.
        """
        import torch

        self._complete()
        start = time.monotonic()
        if self.compute.broadcast((self.directory / f"step-{step:08d}").exists()):
            return
        part = self._part(step)
        with self._writing(f"the checkpoint of step {step}", part):
            self.compute.main_only(lambda: part.mkdir(parents=True))
            engine.save(part)
            if self.compute.is_main:
                torch.save({**state, **self._random()}, part / LOOP)
                self.tracker.keep(part)
            files, size = self._digests(part)
            if self.compute.is_main and self._best_files:
                _link_files(self.directory / BEST, part / BEST)
                size += _bytes_in(part / BEST)
            files |= self._best_files  # hashed when they were written; a link does not change them
            # all ranks wait: when one rank ends, launchers end the others, in the middle of this checkpoint
            self._save_seconds, spent = time.monotonic() - start, self.spent()
            self.compute.main_only(lambda: self._finish(part, step, files, spent))
        self._last = time.monotonic()
        self.written.append((self._last - start, size))

    def _part(self, step: int) -> Path:
        return self.directory / self.compute.broadcast(f".step-{step:08d}.part-{uuid4().hex[:8]}")

    def _random(self) -> dict[str, Tensor]:
        import torch

        random = {"torch_random": torch.get_rng_state()}
        if self.compute.device.type == "cuda":
            random["cuda_random"] = torch.cuda.get_rng_state()
        return random

    def _continues_while_saving(self, engine: Saveable) -> bool:
        """Whether training continues while this engine's state is written; the same on all ranks."""
        import torch
        from torch.utils._pytree import tree_leaves

        state, background = engine.state(), self.config.background
        if (
            state is None
            or background is False
            or (background == "auto" and self.compute.device.type != "cuda")
        ):
            return False
        if background is True:
            return True
        self._complete()  # its copy is still in memory
        size = sum(each.nbytes for each in tree_leaves(state) if isinstance(each, torch.Tensor))
        is_short = size > host_memory() / self.compute.node_ranks
        return not int(self.compute.global_max(torch.tensor([int(is_short)])))

    def _save_in_background(self, step: int, engine: Saveable, state: Mapping[str, Any]) -> None:
        """Copy the state, and let a thread write it."""
        import torch
        from torch.utils._pytree import tree_map_only

        self._complete()
        start = time.monotonic()
        if self.compute.broadcast((self.directory / f"step-{step:08d}").exists()):
            return
        part = self._part(step)
        contents = dict(engine.state() or {})
        if self.compute.is_main:
            contents[LOOP] = {**state, **self._random()}
        contents = tree_map_only(torch.Tensor, lambda each: each.detach().to("cpu", copy=True), contents)

        def begin() -> None:
            part.mkdir(parents=True)
            self.tracker.keep(part)

        with self._writing(f"the checkpoint of step {step}", part):
            self.compute.main_only(begin)
            names = [path.name for path in part.iterdir()] if self.compute.is_main else []
            if self.compute.is_main and self._best_files:
                _link_files(self.directory / BEST, part / BEST)

        def write() -> None:
            try:
                for name in [*contents]:
                    torch.save(contents.pop(name), part / name)
                    names.append(name)
                for name in names:
                    flush(part / name)
                    writing.files[name] = (file_digest(part / name), (part / name).stat().st_size)
            except Exception as error:  # raised by the next `after_step`, on all ranks
                writing.error = portable(error)
            writing.seconds = time.monotonic() - start

        self._last = time.monotonic()
        writing = BackgroundWrite(
            step, part, self.spent(), self._last - start, self._best_files,
            threading.Thread(target=write, daemon=True),
        )  # fmt: skip
        self._background = writing
        writing.thread.start()

    def _complete(self) -> None:
        """Wait for the checkpoint in the background, if there is one, and finish it.

        Raises:
            ConfigError: it could not be written. The earlier ones are unchanged.
        """
        writing, self._background = self._background, None
        if writing is None:
            return
        start = time.monotonic()
        with self.compute.busy():
            writing.thread.join()
        own = (writing.files, writing.error)
        ranks = self.compute.collect_taken({self.compute.rank: own}, self.compute.world_size)
        with self._writing(f"the checkpoint of step {writing.step}", writing.part):
            for _, error in ranks:
                if error is not None:
                    raise error
            entries = {name: entry for files, _ in ranks for name, entry in files.items()}
            size = sum(size for _, size in entries.values())
            if self.compute.is_main and writing.best_files:
                size += _bytes_in(writing.part / BEST)
            self._save_seconds = writing.seconds
            digests = {name: digest for name, (digest, _) in sorted(entries.items())} | dict(
                writing.best_files
            )
            self.compute.main_only(lambda: self._finish(writing.part, writing.step, digests, writing.spent))
        paused = writing.paused + time.monotonic() - start
        self.written.append((paused, size))

    def discard(self) -> None:
        """Remove all checkpoints, once the artifact is published."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def cost(self) -> str:
        """The time that training waited for checkpoints, in words; empty if there were none."""
        if not self.written:
            return ""
        seconds, size = sum(each for each, _ in self.written), self.written[-1][1]
        share = seconds / (time.monotonic() - self._start)
        count = f"{len(self.written)} checkpoint{'s' if len(self.written) > 1 else ''}"
        each = seconds / len(self.written)
        return f" ({count} of {size / 1e6:.0f} MB, {each:.1f} s each, {share:.1%} of the time)"

    def spent(self) -> float:
        """Seconds of this and all earlier attempts."""
        return self.seconds + time.monotonic() - self._start

    @contextmanager
    def _writing(self, what: str, part: Path) -> Iterator[None]:
        """While open, an error of the disk removes `part` and becomes a ConfigError.

        Raises:
            ConfigError: `what` could not be written.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not WRITE_ERROR.search(str(error)):
                raise
            if self.compute.is_main:
                shutil.rmtree(part, ignore_errors=True)
            free = shutil.disk_usage(self.directory.parent).free
            reason = error.strerror if isinstance(error, OSError) else "the disk took only a part of it"
            raise ConfigError(
                f"{self.directory}: {what} could not be written ({reason}); "
                f"{free / 1e6:.0f} MB are free there. Earlier checkpoints and finished stages are intact. "
                "Fix it, or move store_dir; then the same command continues."
            ) from error

    def _agree(self, step: int) -> tuple[int, bool, bool]:
        """What all ranks agree on: the signal that any rank got, or 0; whether a checkpoint is due on rank 0;
        and whether the threads of all ranks have finished."""
        import torch

        every_steps, every_minutes = self.config.every_steps, self.config.every_minutes
        due = every_steps is not None and step % every_steps == 0
        if every_minutes is not None:
            due = due or time.monotonic() - self._last >= 60 * every_minutes
        writing = self._background
        flags = [
            self.signals.received or 0,
            int(due and self.compute.is_main),
            int(writing is None or writing.thread.is_alive()),
        ]
        signum, is_due, is_unfinished = self.compute.global_max(torch.tensor(flags)).tolist()
        return int(signum), bool(is_due), not is_unfinished

    def _digests(self, part: Path) -> tuple[dict[str, str], int]:
        """Flush and hash all files, divided over the ranks. Returns their digests and total bytes."""
        self.compute.barrier()
        names = sorted(str(path.relative_to(part)) for path in part.rglob("*") if path.is_file())
        sizes = [(part / name).stat().st_size for name in names]
        own_names = [names[index] for index in self.compute.shard_indices(sizes)]
        for name in own_names:
            with self.compute.busy():
                flush(part / name)
        digests = self.compute.collect([file_digest(part / name) for name in own_names], sizes)
        return dict(zip(names, digests, strict=True)), sum(sizes)

    def _finish(self, part: Path, step: int, files: Mapping[str, str], spent: float) -> None:
        name = f"step-{step:08d}"
        manifest = {
            "format": CHECKPOINT_FORMAT, "name": name, "step": step, "world_size": self.compute.world_size,
            "steps": self._steps, "zero": self.compute.zero, "seconds": spent, "files": files,
            "save_seconds": self._save_seconds,
            "recipe": self.recipe, "input_digests": self.input_digests,
        }  # fmt: skip
        manifest["digest"] = digest_of(manifest)
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in [part / MANIFEST, *(path for path in part.rglob("*") if path.is_dir()), part]:
            flush(path)
        final = self.directory / name
        part.rename(final)
        flush(self.directory)
        for old in self._all()[self.config.keep :]:
            shutil.rmtree(old)

    def _all(self) -> list[Path]:
        """The finished checkpoints, the newest first."""
        return sorted(self.directory.glob("step-*"), reverse=True)

    def _replace_best(self, part: Path) -> None:
        flush(part)
        shutil.rmtree(self.directory / BEST, ignore_errors=True)
        part.rename(self.directory / BEST)
        flush(self.directory)

    def _restore_newest(self) -> dict[str, Any] | None:
        """Find the newest intact checkpoint, and restore `best/` from it: the present files may be from a
        later step."""
        newest = self._newest_intact()
        shutil.rmtree(self.directory / BEST, ignore_errors=True)
        shutil.rmtree(self.directory / f".{BEST}.part", ignore_errors=True)
        if newest is not None and (self.directory / newest["name"] / BEST).exists():
            _link_files(self.directory / newest["name"] / BEST, self.directory / BEST)
        return newest

    def _newest_intact(self) -> dict[str, Any] | None:
        if not self.config.resume:
            self.discard()
            return None
        for stale in self.directory.glob(".step-*.part-*"):
            shutil.rmtree(stale)
        for path in self._all():
            manifest, complaint = verify_checkpoint(path)
            if manifest is not None:
                if manifest["input_digests"] == self.input_digests:
                    return manifest
                changed = {*manifest["input_digests"].items()} ^ {*self.input_digests.items()}
                inputs = ", ".join(sorted({name for name, _ in changed}))
                self.log(
                    f"{self.stage}: starts again, because {inputs} was rebuilt with another result; the "
                    f"checkpoints in {self.directory} are removed"
                )
                self.discard()
                return None
            aside = path.with_name(f"damaged-{path.name}-{uuid4().hex[:4]}")
            path.rename(aside)
            self.log(f"{self.stage}: checkpoint {path.name} is damaged ({complaint}); kept aside as {aside}")
        return None


def _bytes_in(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _link_files(source: Path, target: Path) -> None:
    """Make a second directory of the same files: with hard links, or with copies if there are no links."""
    target.mkdir()
    for file in source.iterdir():
        link_or_copy(file, target / file.name)
