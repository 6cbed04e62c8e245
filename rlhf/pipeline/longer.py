"""A longer training continues where a shorter run of the same stage ended.

If no step of a stage depends on the number of steps (`Stage.has_open_end`), a longer training begins with
the steps of a shorter one. So when such a stage is done, its last checkpoint stays in STORE/STAGE/.KEY.last/.
There KEY is the key of the recipe without the length. A longer run with this KEY begins with hard links to
it, among its own checkpoints, and continues as after an interruption. In the end its last checkpoint replaces
the other one. The checkpoint is from before the last measurement: the longer run may not measure there.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from rlhf.digests import MANIFEST, Recipe, flush, link_or_copy
from rlhf.disk import content_of, naming
from rlhf.distributed.compute import Compute
from rlhf.distributed.signals import StopSignals
from rlhf.pipeline.fields import Mark, fields_of
from rlhf.pipeline.preflight import Attempt
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import Store, recipe_key
from rlhf.tracking.tracker import Tracker
from rlhf.training.checkpoint import CheckpointConfig, Checkpointer


class Course:
    """The checkpoints of one stage's run, and the last one of a shorter or longer run."""

    def __init__(
        self,
        store: Store,
        stage: Stage,
        recipe: Recipe,
        input_digests: Mapping[str, str],
        config: CheckpointConfig,
        compute: Compute,
    ) -> None:
        """Args:
        recipe, input_digests: as in `Checkpointer`.
        """
        self._store, self._stage, self._config, self._compute = store, stage.name, config, compute
        self._recipe, self._input_digests = recipe, dict(input_digests)
        self.directory = store.checkpoints(stage.name, recipe_key(recipe))
        """The run's own checkpoints."""
        self.keeps_last = stage.has_open_end()
        """Whether the last checkpoint stays when the stage is done."""
        if self.keeps_last:
            (self._length_key,) = fields_of(type(stage), Mark.LENGTH)
            self._length = _length(recipe, self._length_key)
            knobs = {key: value for key, value in recipe["knobs"].items() if key != self._length_key}
            self._key = recipe_key({**recipe, "knobs": knobs})
            self._last = store.last_checkpoint(stage.name, self._key)

    def checkpointer(
        self, tracker: Tracker, signals: StopSignals, log: Callable[[str], None]
    ) -> Checkpointer:
        """The run's checkpoints. Every rank calls it. The last checkpoint of a shorter run is among them,
        if it holds more steps than the run's own. Without `checkpoint.resume` it is removed."""
        if self.keeps_last:
            self._compute.main_only(self._take_shorter)
        return Checkpointer(
            directory=self.directory, config=self._config, compute=self._compute, tracker=tracker,
            signals=signals, log=log, stage=self._stage, recipe=self._recipe,
            input_digests=self._input_digests, keeps_last=self.keeps_last,
        )  # fmt: skip

    def _take_shorter(self) -> None:
        with self._store.lock(self._stage, self._key), naming(self.directory):
            if not self._config.resume:
                shutil.rmtree(self._last, ignore_errors=True)
            elif (shorter := self._shorter()) is not None:
                self.directory.mkdir(exist_ok=True)
                for file in self._last.glob("kept-*"):
                    (self.directory / file.name).unlink(missing_ok=True)
                    link_or_copy(file, self.directory / file.name)
                name = shorter["name"]
                part = self.directory / f".{name}.part-{uuid4().hex[:8]}"
                shutil.copytree(self._last / name, part, copy_function=link_or_copy)
                part.rename(self.directory / name)
                flush(self.directory)

    def end(self) -> None:
        """Remove the run's checkpoints, once the artifact is published. The last one stays if a longer run
        can use it, unless that of a longer run is there."""
        newest = max(self.directory.glob("step-*"), default=None)
        if not self.keeps_last or newest is None:
            shutil.rmtree(self.directory, ignore_errors=True)
            return
        with self._store.lock(self._stage, self._key):
            found = self._found()
            if found is not None and _length(found["recipe"], self._length_key) > self._length:
                shutil.rmtree(self.directory, ignore_errors=True)
                return
            for path in self.directory.iterdir():
                if path.is_dir() and path != newest:
                    shutil.rmtree(path, ignore_errors=True)
            replaced = self._last.with_name(f".{self._key}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if self._last.exists():
                self._last.rename(replaced)
            self.directory.rename(self._last)
            flush(self._last.parent)
            shutil.rmtree(replaced, ignore_errors=True)  # on NFS its files may still be mapped

    def attempt(self) -> Attempt:
        """What earlier attempts and a shorter run have done of this run's work."""
        key = recipe_key(self._recipe)
        size = float(self._store.checkpoint_bytes(self._stage, key))
        if not self._config.resume:
            return Attempt(size)
        shorter = self._shorter() if self.keeps_last else None
        if shorter is None:
            return Attempt(size, *self._store.checkpoint_progress(self._stage, key))
        share = shorter["step"] / (shorter["steps"] or math.inf)
        length = _length(shorter["recipe"], self._length_key)
        return Attempt(size, shorter["seconds"], share * length / self._length)

    def _shorter(self) -> dict[str, Any] | None:
        """The manifest of the last checkpoint of a shorter run, or of an equal one whose artifact is gone, if
        this run can continue from it and has none of a later step."""
        found = self._found()
        if found is None or found["zero"] != self._compute.zero:
            return None  # another engine cannot read it
        own = max((path.name for path in self.directory.glob("step-*")), default="")
        is_ahead = found["name"] > own
        return found if is_ahead and _length(found["recipe"], self._length_key) <= self._length else None

    def _found(self) -> dict[str, Any] | None:
        """The manifest of the checkpoint that stayed; None without one of the same inputs."""
        path = max(self._last.glob(f"step-*/{MANIFEST}"), default=None)
        try:
            found: dict[str, Any] | None = None if path is None else json.loads(content_of(path))
            is_known = found is not None and found["input_digests"] == self._input_digests
            return found if is_known else None
        except (OSError, ValueError, KeyError, TypeError):  # damaged
            return None


def _length(recipe: Recipe, key: str) -> float:
    return float(recipe["knobs"][key])
