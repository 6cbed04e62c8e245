"""Save and resume inside a stage. Checkpoints are atomic and verified, and one always stays.

Layout: STORE/STAGE/.KEY.checkpoints/step-00000012/manifest.json beside the engine's and the loop's files. The
artifact's key decides the place. So any run that needs the artifact continues from the last checkpoint,
whatever the name of the run. A checkpoint is written under another name, flushed, hashed and renamed. Only
then are older ones removed.

`best/` beside them has the best weights so far, if a stage keeps such. Each checkpoint has hard links to
those files, and its manifest vouches for them. A run that goes on takes them from its checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pydantic import PositiveFloat, PositiveInt

from rlhf.config import ConfigError, Strict
from rlhf.digests import MANIFEST, Recipe, digest_of, file_digest, flush, leads_out
from rlhf.distributed.compute import Compute
from rlhf.distributed.signals import Stopped, StopSignals, leave_stop_seconds
from rlhf.tracking.tracker import Tracker

if TYPE_CHECKING:
    from torch import nn

    from rlhf.training.engine import Engine

CHECKPOINT_FORMAT = 5
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
    keep: PositiveInt
    """How many of the newest checkpoints stay until the stage is done."""
    resume: bool
    """Whether to continue from the newest checkpoint; false starts the stage again."""


def verified(checkpoint: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a checkpoint whose files are unchanged; otherwise None, and what is wrong."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())
        if manifest["format"] != CHECKPOINT_FORMAT:
            return None, f"written in format {manifest['format']}, this version reads {CHECKPOINT_FORMAT}"
        if (
            digest_of({key: value for key, value in manifest.items() if key != "digest"})
            != manifest["digest"]
        ):
            return None, f"{MANIFEST} is not what was written"
        if manifest["name"] != checkpoint.name:
            return None, f"{MANIFEST} belongs to {manifest['name']}"
        outside = leads_out(checkpoint, manifest["files"])
        if outside is not None:
            return None, f"{outside} leads out of its directory"
        for name, digest in manifest["files"].items():
            if file_digest(checkpoint / name) != digest:
                return None, f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return manifest, ""


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
        self.newest = self.compute.main_only(self._begin)
        there = {} if self.newest is None else self.newest["files"]
        self._best_files = {name: there[name] for name in there if name.startswith(f"{BEST}/")}
        self.seconds = self.newest["seconds"] if self.newest else 0.0
        self._save_seconds = self.newest.get("save_seconds") if self.newest else None

    def restore(self, engine: Engine) -> dict[str, Any] | None:
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
    def training(self) -> Iterator[None]:
        """While open, a signal to stop waits for the next `after_step`, which saves and then stops."""
        self._last = self._step_start = time.monotonic()
        with self.signals.deferred():
            yield

    def after_step(self, step: int, engine: Engine, state: Mapping[str, Any]) -> None:
        """Save if a checkpoint is due. If any rank got a signal, save and stop.

        Args:
            state: the loop's state after `step`: tensors, numbers, strings and containers of them.

        Raises:
            Stopped: a signal came; the checkpoint is written.
        """
        self.compute.position["step"] = step
        self._longest_step = max(self._longest_step, time.monotonic() - self._step_start)
        signum, due = self._agreed(step)
        if signum:
            self.log(f"{self.stage}: saving step {step}, then stopping")
        if signum or due:
            self.save(step, engine, state)
        if signum:
            raise Stopped(signum)
        if self.compute.is_main and self._save_seconds is not None:
            leave_stop_seconds(self._longest_step + self._save_seconds)
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

    def save(self, step: int, engine: Engine, state: Mapping[str, Any]) -> None:
        """Write one checkpoint. Then remove the oldest ones, so that `keep` stay.

        Raises:
            ConfigError: it could not be written. The earlier ones are unchanged.
        """
        import torch

        start = time.monotonic()
        if self.compute.broadcast((self.directory / f"step-{step:08d}").exists()):
            return
        part = self.directory / self.compute.broadcast(f".step-{step:08d}.part-{uuid4().hex[:8]}")
        with self._writing(f"the checkpoint of step {step}", part):
            if self.compute.is_main:
                part.mkdir(parents=True)
            self.compute.barrier()
            engine.save(part)
            if self.compute.is_main:
                random = {"torch_random": torch.get_rng_state()}
                if self.compute.device.type == "cuda":
                    random["cuda_random"] = torch.cuda.get_rng_state()
                torch.save({**state, **random}, part / LOOP)
                self.tracker.keep(part)
            files, size = self._digests(part)
            if self.compute.is_main and self._best_files:
                _link_files(self.directory / BEST, part / BEST)
            files |= self._best_files  # hashed when they were written: a link changes nothing
            # all wait: launchers end the other ranks as soon as one has ended, which would tear this one up
            self._save_seconds = time.monotonic() - start
            self.compute.main_only(lambda: self._finish(part, step, files))
        self._last = time.monotonic()
        self.written.append((self._last - start, size))

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

    def _agreed(self, step: int) -> tuple[int, bool]:
        import torch

        every_steps, every_minutes = self.config.every_steps, self.config.every_minutes
        due = every_steps is not None and step % every_steps == 0
        if every_minutes is not None:
            due = due or time.monotonic() - self._last >= 60 * every_minutes
        flags = torch.tensor([self.signals.received or 0, int(due and self.compute.is_main)])
        signum, is_due = self.compute.global_max(flags).tolist()
        return int(signum), bool(is_due)

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

    def _finish(self, part: Path, step: int, files: Mapping[str, str]) -> None:
        name = f"step-{step:08d}"
        manifest = {
            "format": CHECKPOINT_FORMAT, "name": name, "step": step, "world_size": self.compute.world_size,
            "zero": self.compute.zero, "seconds": self.spent(), "files": files,
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
