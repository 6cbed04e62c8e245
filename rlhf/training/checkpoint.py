"""Save and resume inside a stage. Checkpoints are atomic and verified, and one always stays.

Layout: STORE/STAGE/.KEY.checkpoints/step-00000012/manifest.json beside the engine's and the loop's files. The
artifact's key decides the place. So any run that needs the artifact continues from the last checkpoint,
whatever the name of the run. A checkpoint is written under another name, flushed, hashed and renamed. Only
then are older ones removed.

In the background, training goes on as soon as the state is copied. A thread of each rank writes, flushes and
hashes the rank's own files, and asks no other rank anything. `after_step` finishes the checkpoint once the
threads of all ranks are done, which all ranks learn at the same moment.

`best/` beside them has the best weights so far, if a stage keeps such. Each checkpoint has hard links to
those files, and its manifest vouches for them. A run that goes on takes them from its checkpoint.

`kept-INPUTS-DIGEST-NAME` beside them is a file that a stage makes once, before it trains.
"""

from __future__ import annotations

import errno
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
from rlhf.digests import MANIFEST, Recipe, digest_of, file_digest, first_outside, flush
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
NO_LINKS = (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)
"""Errors of `link` on file systems without hard links, or without another one to this file."""
NOT_WRITTEN = re.compile("unexpected pos|PytorchStreamWriter|write|iostream error", re.I)
"""What torch.save says if it cannot write to the disk. Any other error means that another rank was lost."""


class CheckpointConfig(Strict):
    """`checkpoint.*`: how often a training stage saves its state."""

    every_steps: PositiveInt | None
    """Steps between two checkpoints (in PPO: rollouts); null goes by minutes only."""
    every_minutes: PositiveFloat | None
    """Minutes between two checkpoints; null goes by steps only. If both are null, only a signal writes
    one."""
    background: Literal["auto", True, False]
    """Whether training goes on while a checkpoint is written, from a copy of the state in the host's memory.
    auto does so on GPUs, if the copy fits. Under DeepSpeed training always waits."""
    keep: PositiveInt
    """How many of the newest checkpoints stay until the stage is done."""
    resume: bool
    """Whether to continue from the newest checkpoint; false starts the stage again."""


def verified(checkpoint: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a checkpoint whose files are unchanged; otherwise None, and what is wrong."""
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
            found = pool.map(lambda name: file_digest(checkpoint / name), manifest["files"])
            for name, digest in zip(manifest["files"], found, strict=True):
                if manifest["files"][name] != digest:
                    return None, f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return manifest, ""


class Saved(Protocol):
    """Whose state a checkpoint holds: an engine's, or that of another library's trainer."""

    def state(self) -> dict[str, Any] | None:
        """See `Engine.state`."""

    def save(self, directory: Path) -> None:
        """See `Engine.save`."""

    def load(self, directory: Path) -> None:
        """See `Engine.load`."""


@dataclass
class Writing:
    """A checkpoint that this rank's thread writes."""

    step: int
    part: Path
    spent: float
    """Seconds of this and all earlier attempts when the state was copied."""
    paused: float
    """Seconds that training waited for the copy."""
    best_files: Mapping[str, str]
    thread: threading.Thread
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Digest and size of the files that this rank wrote."""
    error: Exception | None = None
    seconds: float = 0.0
    """What the copy and the writing took."""


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
    """The recipe of the artifact that is being made."""
    input_digests: Mapping[str, str] = field(default_factory=dict)
    """Digests of the stage's inputs. A checkpoint that was made from other inputs is not used."""
    seconds: float = 0.0
    """Seconds of earlier attempts, up to the checkpoint that this one continues from."""
    written: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, bytes) of each checkpoint that this attempt wrote."""
    newest: dict[str, Any] | None = None
    """The manifest of the newest checkpoint that is intact."""

    def __post_init__(self) -> None:
        self._start = self._last = self._step_start = time.monotonic()
        self._longest_step = 0.0
        self._steps: int | None = None
        self.newest = self.compute.main_only(self._begin)
        there = {} if self.newest is None else self.newest["files"]
        self._best_files = {name: there[name] for name in there if name.startswith(f"{BEST}/")}
        self.seconds = self.newest["seconds"] if self.newest else 0.0
        self._save_seconds = self.newest.get("save_seconds") if self.newest else None
        self._writing_now: Writing | None = None

    def restore(self, engine: Saved) -> dict[str, Any] | None:
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
        cuda_random = state.pop("cuda_random", None)  # not there if a CPU has come so far
        if cuda_random is not None and self.compute.device.type == "cuda":
            torch.cuda.set_rng_state(cuda_random)
        self.tracker.restore(directory)
        self.log(f"{self.stage}: continues from step {self.newest['step']} ({directory})")
        return state

    @contextmanager
    def training(self, steps: int | None = None) -> Iterator[None]:
        """While open, a signal to stop waits for the next `after_step`, which saves and then stops.

        Args:
            steps: so many there will be, those of earlier attempts too; None: nobody knows.
        """
        self._last = self._step_start = time.monotonic()
        self._steps = steps
        with self.signals.deferred():
            yield
            self._complete()

    def after_step(self, step: int, engine: Saved, state: Mapping[str, Any]) -> None:
        """Save if a checkpoint is due. If any rank got a signal, save and stop.

        Args:
            state: the loop's state after `step`: tensors, numbers, strings and containers of them.

        Raises:
            ConfigError: a checkpoint could not be written, this one or the one that was written meanwhile.
            Stopped: a signal came; the checkpoint is written.
        """
        self.compute.position["step"] = step
        self._longest_step = max(self._longest_step, time.monotonic() - self._step_start)
        self.signals.longest_step = max(self.signals.longest_step, self._longest_step)
        signum, due, is_written = self._agreed(step)
        if signum:
            self.log(f"{self.stage}: saving step {step}, then stopping")
        if is_written:
            self._complete()
        if due and not signum and self._goes_on(engine):
            self._save_in_background(step, engine, state)
        elif signum or due:
            self.save(step, engine, state)
        if signum:
            raise Stopped(signum)
        if self.compute.is_main and self._save_seconds is not None:
            saves = 1 if self._writing_now is None else 2  # it would wait for this one first
            leave_stop_seconds(self._longest_step + saves * self._save_seconds)
        self._step_start = time.monotonic()

    @property
    def best(self) -> Path:
        """The directory with what `keep_best` wrote last, for `load_trained`."""
        assert self._best_files, f"{self.stage}: nothing was kept"
        return self.directory / BEST

    def keep_best(self, engine: Engine, module: nn.Module) -> None:
        """Write the trained weights of a part of the engine's model, in the place of those before. They are
        in every checkpoint from now on.

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

    def kept(self, name: str) -> Path | None:
        """The file of this name that `keep` wrote for the same inputs, in this attempt or an earlier one;
        None if there is none, or if it is damaged."""

        def find() -> Path | None:
            for path in self.directory.glob(self._kept_as(name, "?" * 12)):
                if path.name == self._kept_as(name, file_digest(path)):
                    return path
            return None

        return self.compute.main_only(find)

    def keep(self, name: str, write: Callable[[Path], None]) -> Path:
        """Let rank 0 write a file that all attempts use: `kept` finds it, whatever interrupts the stage. Its
        name tells its content, so it needs no manifest.

        Raises:
            ConfigError: it could not be written.
        """
        part = self.directory / f".{name}.part"

        def work() -> Path:
            self.directory.mkdir(parents=True, exist_ok=True)
            write(part)
            flush(part)
            final = self.directory / self._kept_as(name, file_digest(part))
            for other in self.directory.glob(self._kept_as(name, "?" * 12)):
                other.unlink()  # of an attempt that went on from an earlier step, with other roundings
            part.rename(final)
            flush(self.directory)
            return final

        with self._writing(name, part):
            return self.compute.main_only(work)

    @property
    def _of_inputs(self) -> str:
        return digest_of(dict(self.input_digests))[:12]

    def _kept_as(self, name: str, digest: str) -> str:
        return f"kept-{self._of_inputs}-{digest[:12]}-{name}"

    def save(self, step: int, engine: Saved, state: Mapping[str, Any]) -> None:
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
            files |= self._best_files  # hashed when they were written: a link changes nothing
            # all wait: launchers end the other ranks as soon as one has ended, which would tear this one up
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

    def _goes_on(self, engine: Saved) -> bool:
        """Whether training goes on while this engine's state is written; the same on all ranks."""
        import torch
        from torch.utils._pytree import tree_leaves

        state, wanted = engine.state(), self.config.background
        if state is None or wanted is False or (wanted == "auto" and self.compute.device.type != "cuda"):
            return False
        if wanted is True:
            return True
        self._complete()  # whose copy is in memory still
        size = sum(each.nbytes for each in tree_leaves(state) if isinstance(each, torch.Tensor))
        lacks = size > host_memory() / self.compute.node_ranks
        return not int(self.compute.global_max(torch.tensor([int(lacks)])))

    def _save_in_background(self, step: int, engine: Saved, state: Mapping[str, Any]) -> None:
        """Copy the state, and let a thread write it."""
        import torch
        from torch.utils._pytree import tree_map_only

        self._complete()
        start = time.monotonic()
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
            there = [path.name for path in part.iterdir()] if self.compute.is_main else []
            if self.compute.is_main and self._best_files:
                _link_files(self.directory / BEST, part / BEST)

        def write() -> None:
            try:
                for name in [*contents]:
                    torch.save(contents.pop(name), part / name)
                    there.append(name)
                for name in there:
                    flush(part / name)
                    writing.files[name] = (file_digest(part / name), (part / name).stat().st_size)
            except Exception as error:  # raised by the next `after_step`, on all ranks
                writing.error = portable(error)
            writing.seconds = time.monotonic() - start

        self._last = time.monotonic()
        writing = Writing(
            step, part, self.spent(), self._last - start, self._best_files,
            threading.Thread(target=write, daemon=True),
        )  # fmt: skip
        self._writing_now = writing
        writing.thread.start()

    def _complete(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and finish it.

        Raises:
            ConfigError: it could not be written. The earlier ones are unchanged.
        """
        writing, self._writing_now = self._writing_now, None
        if writing is None:
            return
        start = time.monotonic()
        with self.compute.busy():
            writing.thread.join()
        mine = (writing.files, writing.error)
        ranks = self.compute.collect_taken({self.compute.rank: mine}, self.compute.world_size)
        with self._writing(f"the checkpoint of step {writing.step}", writing.part):
            for _, error in ranks:
                if error is not None:
                    raise error
            found = {name: entry for files, _ in ranks for name, entry in files.items()}
            size = sum(size for _, size in found.values())
            if self.compute.is_main and writing.best_files:
                size += _bytes_in(writing.part / BEST)
            self._save_seconds = writing.seconds
            digests = {name: digest for name, (digest, _) in sorted(found.items())} | dict(writing.best_files)
            self.compute.main_only(lambda: self._finish(writing.part, writing.step, digests, writing.spent))
        paused = writing.paused + time.monotonic() - start
        self.written.append((paused, size))

    def discard(self) -> None:
        """Remove all checkpoints, once the artifact is published."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def cost(self) -> str:
        """The time that saving took, in words; empty if nothing was saved."""
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
        """While open, what the disk refuses ends the run, and `part` is removed.

        Raises:
            ConfigError: `what` could not be written.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not NOT_WRITTEN.search(str(error)):
                raise
            if self.compute.is_main:
                shutil.rmtree(part, ignore_errors=True)
            free = shutil.disk_usage(self.directory.parent).free
            said = error.strerror if isinstance(error, OSError) else "the disk took only a part of it"
            raise ConfigError(
                f"{self.directory}: {what} could not be written ({said}); "
                f"{free / 1e6:.0f} MB are free there. Earlier checkpoints and finished stages are intact. "
                "Fix it, or move store_dir; then the same command continues."
            ) from error

    def _agreed(self, step: int) -> tuple[int, bool, bool]:
        """The signal that any rank got, or 0; whether rank 0 wants a checkpoint; whether the threads of all
        ranks have written theirs."""
        import torch

        every_steps, every_minutes = self.config.every_steps, self.config.every_minutes
        due = every_steps is not None and step % every_steps == 0
        if every_minutes is not None:
            due = due or time.monotonic() - self._last >= 60 * every_minutes
        writing = self._writing_now
        flags = [
            self.signals.received or 0,
            int(due and self.compute.is_main),
            int(writing is None or writing.thread.is_alive()),
        ]
        signum, is_due, is_written_not = self.compute.global_max(torch.tensor(flags)).tolist()
        return int(signum), bool(is_due), not is_written_not

    def _digests(self, part: Path) -> tuple[dict[str, str], int]:
        """Flush and hash all files, divided over the ranks. Returns their digests and the sum of their
        bytes."""
        self.compute.barrier()
        names = sorted(str(path.relative_to(part)) for path in part.rglob("*") if path.is_file())
        sizes = [(part / name).stat().st_size for name in names]
        mine = [names[index] for index in self.compute.shard_indices(sizes)]
        for name in mine:
            with self.compute.busy():
                flush(part / name)
        digests = self.compute.collect([file_digest(part / name) for name in mine], sizes)
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

    def _begin(self) -> dict[str, Any] | None:
        """Find the newest intact checkpoint. `best/` becomes what that one has: what lies there may be of a
        later step."""
        newest = self._find()
        shutil.rmtree(self.directory / BEST, ignore_errors=True)
        shutil.rmtree(self.directory / f".{BEST}.part", ignore_errors=True)
        if newest is not None and (self.directory / newest["name"] / BEST).exists():
            _link_files(self.directory / newest["name"] / BEST, self.directory / BEST)
        return newest

    def _find(self) -> dict[str, Any] | None:
        if not self.config.resume:
            self.discard()
            return None
        for stale in self.directory.glob(".step-*.part-*"):
            shutil.rmtree(stale)
        for path in self._all():
            manifest, complaint = verified(path)
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
    """A second directory of the same files: hard links, or copies on a file system without them."""
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            shutil.copyfile(file, target / file.name)
            flush(target / file.name)
