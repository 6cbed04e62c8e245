"""Runs the chosen stages in order: reuses what is finished, runs the rest, says why, checks the gates."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from rlhf.config import Complaint, ConfigError, in_user_keys
from rlhf.data.prepared import PreparedData
from rlhf.digests import Recipe
from rlhf.disk import naming
from rlhf.distributed.compute import Compute
from rlhf.distributed.peak import PeakMeter, held_bytes
from rlhf.distributed.signals import StopSignals
from rlhf.models.base import BaseModelFiles, base_files, base_identity, check_hub_files, fetch_weights
from rlhf.models.intact import check_tokenizer, check_weights
from rlhf.models.libraries import load_libraries
from rlhf.models.peft.saved import unchecked_base_of
from rlhf.models.start import architecture_complaints
from rlhf.pipeline.abilities import Records, TellsOfRuns, is_enough
from rlhf.pipeline.checks import check, check_published, complaints, refuse
from rlhf.pipeline.defaults import changed_keys
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.forecast import Forecast
from rlhf.pipeline.graph import inputs, naming_keys, reads_base_model, roles_of, row_makers, sampled_models
from rlhf.pipeline.job import Job
from rlhf.pipeline.key import RunContext, digest_names, external_digests, recipe_of
from rlhf.pipeline.longer import Course
from rlhf.pipeline.made_rows import data_of, prepare_rows, roles_read
from rlhf.pipeline.manifest import content_digest, make_manifest
from rlhf.pipeline.metrics import as_summary, undeclared
from rlhf.pipeline.preflight import Attempt, RunEstimate, check_before_loading
from rlhf.pipeline.rehearsal import rehearse_rewards
from rlhf.pipeline.run import GateError, Run, gate_results
from rlhf.pipeline.sampling_engine import make_vllm, without_auto_generation
from rlhf.pipeline.stage import Stage, View
from rlhf.pipeline.store import Artifact, DamagedError, Store, recipe_key
from rlhf.pipeline.stored_base import stored_base
from rlhf.pipeline.why import Change, in_words
from rlhf.pipeline.yaml_text import to_yaml
from rlhf.rewards.code import has_changed, imported_code
from rlhf.tracking.position import Position
from rlhf.tracking.progress import Progress, clock
from rlhf.tracking.redaction import redacted
from rlhf.tracking.tracker import Tracker, make_tracker

RUN_LOCK = threading.RLock()
"""Runs of one process take turns: they share torch's random numbers, default dtype and ranks."""


class DamagedInputError(Exception):
    """An artifact that a stage would load is damaged. Raised on every rank, before anything is loaded."""

    def __init__(self, damage: DamagedError) -> None:
        super().__init__(damage)
        self.damage = damage


class Pipeline:
    """Everything that an experiment's stages share."""

    def __init__(
        self,
        experiment: Experiment,
        run_name: str,
        console: Console,
        compute: Compute,
        signals: StopSignals | None = None,
    ) -> None:
        """Every rank has one. Rank 0 decides what is reused, and only it writes to the store and the run."""
        settings = experiment.settings
        stages = [experiment.stages[name] for name in experiment.needed()]
        self.experiment, self.console, self.compute = experiment, console, compute
        self.signals = signals or StopSignals()
        self.store = Store(Path(settings.store_dir))
        self.base: Artifact | None = None
        """The base model in the store, if it had to be made."""
        directory = Path(settings.runs_dir) / run_name
        self.results = Run(directory, writes=compute.is_main, chain=experiment.stages)
        self.made: set[str] = set()
        """Stages that this run has run. `force=` does not run them again."""
        self.needs_weights = any(stage.reads_weights for stage in stages)
        self.vllm = make_vllm(experiment, compute)
        self.expected = RunEstimate()
        """The result of the preflight."""
        self._has_begun = False
        self.position = Position(directory, writes=compute.is_main)
        self.forecast = Forecast({}, self.position.update, self.log)

        def identify() -> tuple[str, dict[str, dict[str, str]]]:
            model = base_identity(settings.model, weights=self.needs_weights, memory=self.store.digest_cache)
            return model, {
                stage.name: external_digests(stage, experiment.stages, self.store.directory_digest)
                for stage in sorted(stages, key=lambda stage: stage.repeats_keys)
            }

        # only on rank 0, as it may read full models; here, so that a missing file is found before training
        self.model_identity, self.external_digests = compute.main_only(identify)
        self.import_rewards()

    def import_rewards(self) -> None:
        """Import the user's functions on this rank now: later their files may have changed.

        Raises:
            ConfigError: this rank's code differs from rank 0's, or from what the files hold.
        """
        for external in self.external_digests.values():
            for source, digest in external.items():
                if source.startswith("python:") and imported_code(source)[source] != digest:
                    raise ConfigError(
                        f"{source}: rank {self.compute.rank} has other code than rank 0. Start all ranks "
                        "from the same files, and leave these alone while they start."
                    )
                if source.startswith("python:") and has_changed(source):
                    raise ConfigError(
                        f"{source}: its code has changed since this process imported it, and this run would "
                        "use the old one. Start it in a new process; in a notebook, restart the kernel."
                    )

    def run(self) -> None:
        """Run the chain; `results` holds what is done. If an artifact to load is damaged, it is set aside,
        and the run starts again and reuses the sound ones.

        Raises:
            GateError: a gate failed; every finished stage stays in the store.
            ConfigError: an artifact is damaged again after it was rebuilt.
        """
        for name in self.experiment.needed():
            check(self.experiment.stages[name], self.view())
        with RUN_LOCK, ExitStack() as stack:
            self.compute.main_only(lambda: stack.enter_context(self.results.locked()))
            stack.callback(self.close)
            rebuilt: set[Path] = set()
            while (damage := self.attempt()) is not None:
                if damage.path in rebuilt:
                    raise ConfigError(
                        f"{damage.path} is damaged again ({damage.complaint}), though this run set it aside "
                        f"and rebuilt it. What is written to store_dir={self.store.root} changes there: "
                        "check that disk and this machine's memory, or use another store_dir."
                    )
                rebuilt.add(damage.path)
                self.set_aside(damage)

    def close(self) -> None:
        """Free the memory of the engine that samples."""
        if self.vllm is not None:
            self.vllm.close()

    def attempt(self) -> DamagedError | None:
        """Run the chain once.

        Returns:
            The damage of an artifact that a stage would have loaded; None if there is none.
        """
        self.results.stages.clear()
        self.results.gates.clear()
        self.compute.main_only(self.begin)
        with self.position.end():
            try:
                self.run_stages()
            except DamagedInputError as error:
                return error.damage
        return None

    def set_aside(self, damage: DamagedError) -> None:
        """Set the artifact aside, unless another run just did."""
        stage, key = damage.path.parent.name, damage.path.name
        with self.locked(stage, key):
            line = self.compute.main_only(lambda: self.store.set_aside(stage, key, read=True))
        self.log(
            f"{stage}: {line or f'{damage.path} was damaged ({damage.complaint})'}. The run starts again and "
            "rebuilds it."
        )

    def begin(self) -> None:
        """Remove what an earlier run or attempt left in the run's directory."""
        run = self.results
        run.needed, run.changed = self.experiment.needed(), changed_keys(self.experiment.composed)
        try:
            run.begin()
            content = to_yaml(redacted(self.experiment.resolved))
            (run.directory / "config.yaml").write_text(content, encoding="utf-8")
            self.position.update(needed=self.experiment.needed(), ended=None, error=None, now=True)
        except OSError as error:
            raise run.unwritable(error) from None

    def run_stages(self) -> None:
        """Run the chain inside its directory."""
        settings, run = self.experiment.settings, self.results
        tracker = Tracker(None, [])
        if self.compute.is_main:
            tracker = make_tracker(settings.tracker, run.directory, self.experiment.resolved)
        try:
            base = base_files(settings.model, self.model_identity, self.store_base)
            self.experiment, line = without_auto_generation(self.experiment, base, self.compute)
            if line is not None:
                self.log(line)
                self.vllm = make_vllm(self.experiment, self.compute)
            artifacts: dict[str, Artifact] = {}
            for name in self.experiment.needed():
                self.compute.position.update(stage=name, step=0)
                self.position.update(stage=name, key=None, task=None, left=None, now=True)
                artifacts[name] = self.find_or_make(name, artifacts, base, tracker)
                if name == "prepare":
                    self.check_pending(artifacts["prepare"], base)
                self.check_gates(name, artifacts[name])
        finally:
            tracker.close()

    def find_or_make(
        self,
        name: str,
        artifacts: Mapping[str, Artifact],
        base: BaseModelFiles,
        tracker: Tracker,
    ) -> Artifact:
        """The stage's artifact, from the store or made now."""
        stage, run = self.experiment.stages[name], self.results
        # a record may be only on rank 0's disk
        recipe = self.compute.main_only(lambda: self.recipe(stage, artifacts))
        key = recipe_key(recipe)
        self.position.update(key=key, now=True)
        forced = self.is_forced(stage)

        def find() -> Artifact | None:
            return None if forced else self.reusable(stage, recipe, artifacts)

        def find_under_lock() -> tuple[Artifact | None, str | None]:
            damage = None if forced else self.store.set_aside(name, key)
            return find(), damage  # another run may just have made it

        artifact = self.compute.main_only(find)  # without the lock: what is finished never changes
        if artifact is None:
            with self.locked(name, key):
                artifact, damage = self.compute.main_only(find_under_lock)
                if damage is not None:
                    self.log(f"{name}: {damage}")
                if artifact is None:
                    reason = damage and "what was there is damaged"
                    return self.make(stage, recipe, artifacts, base, tracker, forced=forced, reason=reason)
        self.forecast.skip(name)
        tracker.replay(artifact.path)
        run.record(name, "reused", key, artifact, 0.0)
        why = f": the same settings and inputs as {artifact.path}" if self.experiment.settings.why else ""
        self.console.print(f"[cyan]{name}[/] reused ({key}){why}", highlight=False)
        return artifact

    def make(
        self,
        stage: Stage,
        recipe: Recipe,
        artifacts: Mapping[str, Artifact],
        base: BaseModelFiles,
        tracker: Tracker,
        *,
        forced: bool,
        reason: str | None = None,
    ) -> Artifact:
        """Run the stage and publish its artifact. The caller holds the artifact's lock.

        Args:
            reason: why it runs, if that is known.
        """
        self.begin_to_compute(base)
        import torch

        name, key, run, start = stage.name, recipe_key(recipe), self.results, time.monotonic()
        why = ""
        if self.experiment.settings.why:
            if forced:
                reason = "it always does" if isinstance(stage, TellsOfRuns) else "force"
            why = f": {reason or self.compute.main_only(lambda: self.explain(recipe))}"
        self.console.print(f"[cyan]{name}[/] runs ({key}){why}", highlight=False)
        damage = self.compute.main_only(lambda: self.damaged_input(stage, artifacts))
        if damage is not None:
            raise DamagedInputError(damage)
        self.compute.main_only(lambda: self.check_external(stage, base))
        progress = Progress(self.console, self.forecast.update, partial(held_bytes, self.compute))
        self.forecast.begin(name)
        scratch = self.compute.main_only(lambda: self.store.scratch(name, key))
        course = self.course(stage, recipe, artifacts, forget=forced)
        tracker.begin(scratch)
        chain, rows = self.experiment.stages, scratch.with_name(f"{scratch.name}.rows")
        prepared = artifacts["prepare"].path if "prepare" in artifacts else scratch
        inputs = {other: made for other, made in artifacts.items() if other in self.inputs(stage)}
        job = Job(
            stage=name,
            seed=self.experiment.settings.seed,
            compute=self.compute,
            base=base,
            inputs=inputs,
            data=data_of(stage, prepared, chain, rows),
            directory=scratch,
            tracker=tracker,
            progress=progress,
            checkpoints=course.checkpointer(tracker, self.signals, self.log),
            reward_server=self.experiment.settings.reward_server,
            run_directory=run.directory,
            external_digests=self.external_digests[name],
            digest_names=digest_names(stage),
            vllm=self.vllm,
            local_sampling=self.expected.sampling_modes.get(name, "layers"),
            experiment=self.experiment,
        )
        is_new = job.checkpoints.newest is None and not forced
        if is_new and (other := self.compute.main_only(lambda: self.stale_checkpoints(recipe))) is not None:
            self.log(f"{name}: starts again; {other}")
        torch.manual_seed(job.seed)
        job.peak = PeakMeter(self.compute)
        try:
            with progress.shown(name), naming(scratch), in_user_keys(naming_keys(stage, base), stage.name):
                if row_makers(stage, chain):
                    self.compute.main_only(lambda: prepare_rows(stage, chain, inputs, base, rows, progress))
                    check(stage, self.view(data=job.data, base=base, compute=self.compute))
                elif "prepare" not in artifacts:  # else it was checked before anything ran
                    check(stage, self.view(compute=self.compute))
                metrics = as_summary(stage, stage.run(job))
                for each in undeclared(stage, metrics):
                    self.log(f"{name}: its run returned {each}, which its `metrics` does not name.")
                self.compute.main_only(lambda: check_published(stage, scratch))
                tracker.summarize(name, metrics)
        except BaseException as cause:  # Ctrl-C too: summary.json says where it ended; raised again
            ended = "stopped" if isinstance(cause, KeyboardInterrupt) else "failed"
            run.record(name, ended, key, None, time.monotonic() - start)
            if self.compute.is_main:  # the checkpoints are in another directory
                for directory in (scratch, rows):
                    shutil.rmtree(directory, ignore_errors=True)
            raise
        self.compute.barrier()  # others may still read the rows
        if self.compute.is_main:
            shutil.rmtree(rows, ignore_errors=True)  # on NFS its files may still be mapped
        if isinstance(stage, Records):
            recipe = recipe | {"recorded": job.recorded}
            key = recipe_key(recipe)
        seconds, peak = job.checkpoints.spent(), job.peak.total()

        def publish() -> Artifact:
            manifest = make_manifest(
                name, recipe, scratch, config=redacted(self.experiment.resolved), metrics=metrics,
                seconds=seconds, peak=peak, num_ranks=self.compute.world_size,
                input_digests=self.input_digests(stage, artifacts),
            )  # fmt: skip
            return self.store.publish(scratch, manifest)

        artifact = self.compute.main_only(publish)
        self.made.add(name)
        self.compute.main_only(course.end)
        run.record(name, "ran", key, artifact, seconds)
        cost = job.checkpoints.cost()
        self.console.print(f"[cyan]{name}[/] done in {clock(seconds)}{cost}", highlight=False)
        self.forecast.end()
        if job.ending is not None:
            raise job.ending
        return artifact

    def explain(self, recipe: Recipe) -> str:
        """Why the store's artifact is not used. The caller holds the artifact's lock."""
        if found := self.store.find(recipe["stage"], recipe_key(recipe)):
            has_enough = is_enough(self.experiment.stages[recipe["stage"]], found.manifest.metrics)
            return "an input was rebuilt, with another result" if has_enough else "it has less than is asked"
        return self.in_words(recipe["stage"], self.store.differences(recipe["stage"], recipe))

    def stale_checkpoints(self, recipe: Recipe) -> str | None:
        """A text on checkpoints that were made from other inputs; None if there are none."""
        if (stale := self.store.stale_checkpoints(recipe["stage"], recipe)) is None:
            return None
        words = self.in_words(recipe["stage"], stale[1])
        return f"the checkpoints in {stale[0]} are of other inputs ({words})"

    def in_words(self, stage: str, differences: Sequence[Change] | None) -> str:
        """Differences from an artifact in the store, in words."""
        return in_words(stage, differences, self.store.root, roles_of(self.experiment.stages))

    def course(
        self, stage: Stage, recipe: Recipe, artifacts: Mapping[str, Artifact], *, forget: bool = False
    ) -> Course:
        """The checkpoints of a stage's run. `forget` deletes those that are there, for `force=`."""
        config = self.experiment.settings.checkpoint.model_copy(update={"resume": False} if forget else {})
        inputs = self.input_digests(stage, artifacts)
        return Course(self.store, stage, recipe, inputs, config, self.compute)

    def log(self, text: str) -> None:
        """Print a line, without markup."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def is_forced(self, stage: Stage) -> bool:
        """Whether the stage runs even if the store has its artifact."""
        forced = stage.name in self.experiment.settings.force or isinstance(stage, TellsOfRuns)
        return forced and stage.name not in self.made

    def damaged_input(self, stage: Stage, artifacts: Mapping[str, Artifact]) -> DamagedError | None:
        """Read what the stage will load, and compare it with the manifests; None if nothing is damaged."""
        bases = [] if self.base is None else [self.base]
        loaded = [artifacts[name] for name in self.inputs(stage)]
        loaded += bases if reads_base_model(stage) else []
        try:
            for artifact in loaded:  # the list grows in the loop
                self.store.verify(artifact, read=True)
                below = unchecked_base_of(artifact.path)
                loaded += [each for each in (*artifacts.values(), *bases) if each.path.resolve() == below]
        except DamagedError as damage:
            return damage
        return None

    def check_external(self, stage: Stage, base: BaseModelFiles) -> None:
        """Check that what is outside the store has not changed since the key was computed.

        Raises:
            ConfigError: it has changed since the run began; or the Hub's cache is damaged.
        """
        settings, before = self.experiment.settings, self.external_digests[stage.name]
        digest = partial(self.store.directory_digest, read=True)
        now = external_digests(stage, self.experiment.stages, digest)
        changed = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        if reads_base_model(stage) and settings.model.kind == "hub":
            check_hub_files(settings.model, base.directory, self.store.digest_cache(base.directory))
        if reads_base_model(stage) and settings.model.kind == "local":
            identity = base_identity(
                settings.model, weights=self.needs_weights, memory=self.store.digest_cache, read=True
            )
            changed += [f"model.path={settings.model.path}"] if identity != self.model_identity else []
        if changed:
            raise ConfigError(
                f"{stage.name}: {', '.join(changed)}: changed since this run began, so the artifact's "
                "key would be wrong. Nothing was written. Run the same command again: it uses the changed "
                "files."
            )
        for source in now:
            if source.startswith("python:") and has_changed(source):
                self.log(f"{stage.name}: the code of {source} has changed; this run keeps what it imported")

    def inputs(self, stage: Stage) -> tuple[str, ...]:
        """The stages that a stage reads."""
        return inputs(stage, self.experiment.stages)

    def input_digests(self, stage: Stage, artifacts: Mapping[str, Artifact]) -> dict[str, str]:
        """Content digests of a stage's inputs. Those of the prepared sets are in its recipe."""
        inputs = {name: content_digest(artifacts[name]) for name in self.inputs(stage) if name != "prepare"}
        if reads_base_model(stage) and self.base is not None:
            inputs["base"] = content_digest(self.base)
        return inputs

    def begin_to_compute(self, base: BaseModelFiles) -> None:
        """Check and load what stages need, once, before the first one runs. Reuse needs none of it."""
        if self._has_begun:
            return
        self._has_begun = True
        load_libraries(self.console)
        if self.needs_weights or "prepare" in self.experiment.needed():  # a plan of given sizes has no text
            check_tokenizer(base, self.experiment.settings.model.user_key)

    def check_pending(self, prepared: Artifact, base: BaseModelFiles) -> None:
        """Refuse what cannot run here, before anything trains. If no stage runs, refuse only missing rows."""
        chain = self.experiment.stages
        data = PreparedData(prepared.path, roles=roles_of(chain))
        stages = [chain[name] for name in self.experiment.needed()]
        for role in roles_read(stages, chain):
            data.check_not_empty(role)
        pending = self.compute.main_only(lambda: self.pending(prepared))
        if not pending:
            return
        self.begin_to_compute(base)
        self.check_stages_fit(stages, pending, data, base)
        settings, args = self.experiment.settings, (self.compute, data, self.console)
        self.expected = check_before_loading(self.experiment, pending, base, *args)
        if self.vllm is not None:
            self.vllm.longest = self.expected.longest
        self.forecast = Forecast(self.expected.stages, self.position.update, self.log)
        if self.needs_weights:
            fetch_weights(settings.model)
            check_weights(base.directory, settings.model.user_key)
        stages = [self.experiment.stages[name] for name in pending]
        rehearse_rewards(stages, data, base, self.compute, settings.reward_server, self.console)

    def view(self, **known: Any) -> View:
        """What stages may know of this run when they are checked, together with `known`."""
        return View(self.experiment.stages, self.results.directory, **known)

    def check_stages_fit(
        self, stages: Sequence[Stage], pending: Collection[str], data: PreparedData, base: BaseModelFiles
    ) -> None:
        """Refuse stages that do not fit the data, the models, or (if they are pending) the ranks.

        Raises:
            ConfigError: what does not fit, and the fix.
        """
        chain, problems = self.experiment.stages, list[Complaint | str]()
        for stage in stages:
            own = data_of(stage, data.directory, chain, data.directory)
            is_there = not row_makers(stage, chain)  # rows that others make are checked when they are made
            problems += complaints(
                stage,
                self.view(
                    data=own if is_there else None, base=base,
                    compute=self.compute if stage.name in pending else None,
                ),
            )  # fmt: skip
        if self.vllm is not None:
            models = (each for name in pending for each in sampled_models(chain[name], chain))
            problems += architecture_complaints(models, base)
        refuse(problems, "Nothing was loaded.")

    def pending(self, prepared: Artifact) -> dict[str, Attempt]:
        """The stages after `prepare` that are not in the store -> what an earlier attempt left."""
        known: dict[str, Artifact] = {"prepare": prepared}
        pending: dict[str, Attempt] = {}
        for name in self.experiment.needed():
            if name == "prepare":
                continue
            stage = self.experiment.stages[name]
            if not set(self.inputs(stage)) <= set(known):
                pending[name] = Attempt()  # without its inputs it cannot have begun
                continue
            recipe = self.recipe(stage, known)
            artifact = None if self.is_forced(stage) else self.reusable(stage, recipe, known)
            if artifact:
                known[name] = artifact
            else:
                pending[name] = self.course(stage, recipe, known).attempt()
        return pending

    def reusable(self, stage: Stage, recipe: Recipe, artifacts: Mapping[str, Artifact]) -> Artifact | None:
        """The store's artifact; None if it is damaged, or an input was rebuilt since with another result."""
        try:
            artifact = self.store.find(stage.name, recipe_key(recipe))
        except DamagedError:
            return None
        if artifact is None or artifact.manifest.input_digests != self.input_digests(stage, artifacts):
            return None
        if not is_enough(stage, artifact.manifest.metrics):
            return None
        return artifact

    def recipe(self, stage: Stage, artifacts: Mapping[str, Artifact]) -> Recipe:
        """Everything that decides the artifact."""
        settings = self.experiment.settings
        context = RunContext(
            model=self.model_identity, seed=settings.seed, dtype=self.compute.dtype_name,
            vllm=settings.vllm if self.vllm is not None else None, run=self.results.directory,
        )  # fmt: skip
        return recipe_of(stage, self.experiment.stages, artifacts, self.external_digests[stage.name], context)

    def check_gates(self, name: str, artifact: Artifact) -> None:
        """Compare the stage's summary with its bounds."""
        run, stage, metrics = self.results, self.experiment.stages[name], artifact.manifest.metrics
        results = gate_results(stage, metrics)
        run.gates += results
        run.write()
        failed = [result for result in results if result.outcome == "failed"]
        if failed and self.experiment.settings.gates == "enforce":
            raise GateError("\n".join(f"Gate failed: {result}" for result in failed))
        words = {"failed": "Gate failed, going on (gates=warn)", "cannot tell": "Gate cannot tell, going on"}
        for result in results:
            if result.outcome in words:
                line = f"[yellow]{words[result.outcome]}:[/] {escape(str(result))}"
                self.console.print(line, highlight=False)
            if result.outcome == "not checked":
                line = f"Gate {result.name} does not apply: {result.not_checked}."
                self.console.print(line, highlight=False, markup=False)

    @contextmanager
    def locked(self, name: str, key: str) -> Iterator[None]:
        """Hold the artifact's lock. Prints who has it while it waits."""

        def log(holder: str) -> None:
            waits = f"[cyan]{name}[/] waits: another run is making {key} ({holder})"
            self.console.print(waits, highlight=False, soft_wrap=True)

        with ExitStack() as held:
            self.compute.main_only(lambda: held.enter_context(self.store.lock(name, key).awaited(log)))
            yield

    def store_base(self, content: list[str], write: Callable[[Path], None]) -> Path:
        """Convert or build a base model that needs it, once, and save it in the store."""

        def make(directory: Path) -> None:
            load_libraries(self.console)
            write(directory)

        self.base = self.compute.main_only(lambda: stored_base(self.store, content, make, self.log))
        return self.base.path
