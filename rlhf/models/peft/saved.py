"""Trained adapters on disk: small files, with a reference to the model that they belong to.

`adapter/` in a model's artifact has adapter_config.json and adapter_model.safetensors, in peft's format if
peft has the method, and base.json, the reference. If the method merges, the artifact also has the merged
model. Otherwise it has only the model's settings and tokenizer.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rlhf.config import STAGE, Complaint, ConfigError, Strict
from rlhf.digests import weights_digest
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import KINDS, METHODS, PREFIX

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from rlhf.distributed.compute import Compute
    from rlhf.models.on_disk import Keep
    from rlhf.models.peft.attach import Adapter

ADAPTER = "adapter"
"""Name of the directory in an artifact."""
CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "base.json"
HEAD = f"{PREFIX}score.weight"


class Origin(Strict):
    """`base.json`: the model that a stage's training started from."""

    directory: str
    """Relative to the artifact if both are in the same store, so that the store can be moved."""
    key: str
    """The key of its artifact, or the base model's identity."""
    digest: str
    """`weights_digest` of the model that the trained weights belong to."""
    in_4_bits: list[str]
    """Its linear layers that had 4-bit weights during the training, by the last part of their names."""

    @classmethod
    def of(cls, model: Path, key: str, artifact: Path, in_4_bits: Sequence[str] = ()) -> Origin:
        """The reference from an artifact (STORE/STAGE/KEY, or where it is being made) to a model."""
        here, there = artifact.resolve(), model.resolve()
        is_in_store = there.is_relative_to(here.parents[1])
        directory = os.path.relpath(there, here) if is_in_store else str(there)
        digest = weights_digest(model)
        return cls(directory=directory, key=key, digest=digest, in_4_bits=[*in_4_bits])

    def place(self, artifact: Path) -> Path:
        """The directory where the model should be."""
        return (artifact.resolve() / self.directory).resolve()

    def found(self, artifact: Path) -> Path:
        """The directory of the model.

        Raises:
            ConfigError: the model is not there, or has other weights.
        """
        directory = self.place(artifact)
        if not (directory / "config.json").is_file():
            why = f"its base model ({self.key}) is no longer in {directory}."
            fix = "Run the stage that makes it again with the same store_dir, or put it back."
            raise ConfigError(Complaint(str(artifact), why, fix))
        if weights_digest(directory) != self.digest:
            why = f"its base model in {directory} has other weights than the adapter was trained on."
            fix = "Train the adapter again, or put the old weights back."
            raise ConfigError(Complaint(str(artifact), why, fix))
        return directory


def attach_to_merge(model: PreTrainedModel, config: PeftConfig, keep: Keep) -> Adapter:
    """Like `attach`, for weights that were already trained. Layers that had 4-bit weights get plain weights
    with the same values, so that the adapter can be merged into them.

    Args:
        keep: gets each weight that is made.
    """
    from rlhf.models.peft.attach import attach
    from rlhf.models.peft.quantization import round_to_4_bits
    from rlhf.models.peft.target_modules import update_targets

    if config.method != "qlora":
        return attach(model, config)
    names = update_targets(model, config)
    round_to_4_bits(model, names, keep)
    adapter = attach(model, config.model_copy(update={"method": "lora"}))
    adapter.in_4_bits = names
    return adapter


def save_adapter(
    adapter: Adapter, artifact: Path, start: Path, key: str, head: Tensor | None = None
) -> dict[str, float]:
    """Write what was trained on frozen weights into `adapter/`. If all weights were trained, write nothing.

    Args:
        start: the model that the training started from; `key` names it.
        head: the score head [1, H] of a sequence-classification model.

    Returns:
        Its size on disk, as a summary metric.
    """
    from safetensors.torch import save_file

    described = adapter.described()
    if described is None:
        return {}
    origin, weights = Origin.of(start, key, artifact, adapter.in_4_bits), adapter.weights()
    saved = described | {"task_type": "CAUSAL_LM", "revision": origin.digest}
    if head is not None:
        weights[HEAD] = head.detach()
        saved |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    directory = artifact / ADAPTER
    directory.mkdir()
    content = json.dumps(saved, default=sorted, indent=2, sort_keys=True)
    (directory / CONFIG).write_text(content, encoding="utf-8")
    (directory / ORIGIN).write_text(origin.model_dump_json(indent=2), encoding="utf-8")
    save_file({name: each.contiguous() for name, each in weights.items()}, directory / WEIGHTS)
    return {"adapter_bytes": bytes_under(directory)}


def bytes_under(directory: Path) -> float:
    """Size of a model's files, without the metrics beside them, which are still being written."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".jsonl")
    return float(sum(path.stat().st_size for path in files))


def origin_of(artifact: Path) -> Origin | None:
    """The artifact's reference to its base model; None if it has no adapter.

    Raises:
        ConfigError: it cannot be read.
    """
    path = artifact / ADAPTER / ORIGIN
    try:
        return Origin.model_validate_json(path.read_bytes()) if path.exists() else None
    except ValidationError:
        raise ConfigError(f"{path}: cannot be read. Remove the artifact; the next run rebuilds it.") from None


def base_of(artifact: Path, compute: Compute | None = None) -> Path | None:
    """The directory of the base model, if the artifact has only an adapter and no weights; None otherwise.

    Args:
        compute: of ranks that all ask at the same time: one of them reads the model.
    """
    origin = None if any(artifact.glob("*.safetensors")) else origin_of(artifact)
    if origin is None:
        return None
    find = partial(origin.found, artifact)
    return find() if compute is None else compute.main_only(find)


def model_below(artifact: Path) -> Path | None:
    """Like `base_of`, without a check of what is there."""
    origin = None if any(artifact.glob("*.safetensors")) else origin_of(artifact)
    return None if origin is None else origin.place(artifact)


def described(artifact: Path) -> dict[str, Any]:
    """The content of an artifact's adapter_config.json."""
    content: dict[str, Any] = json.loads((artifact / ADAPTER / CONFIG).read_bytes())
    return content


def rehearse(model: PreTrainedModel, config: PeftConfig) -> None:
    """Check before anything trains that the result of a method can be published. The adapter is attached to a
    copy of the model, loaded into another copy, and merged.

    Args:
        model: on the meta device, where this costs no memory. It does not change.

    Raises:
        ConfigError: it cannot be published, or `check_attachable` refuses it.
    """
    import torch
    from peft import get_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from rlhf.models.peft.attach import attach, check_attachable, inject

    check_attachable(model, config)
    if config.method in ("none", "freeze", *KINDS.values()):
        return
    key = f"{STAGE}.peft={config.method}"
    if config.method == "qlora":  # as `attach_to_merge`
        config = config.model_copy(update={"method": "lora"})
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    trained, loaded = copy.deepcopy(model), copy.deepcopy(model)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            adapter = attach(trained, config)
            names, saved = adapter.weights().keys(), adapter.described()
            assert saved is not None
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[saved["peft_type"]]
            content = json.loads(json.dumps(saved, default=sorted))
            tuner = inject(loaded, kind.from_peft_type(**content), "published")
            found = get_peft_model_state_dict(tuner.model, adapter_name="published")
            if {PREFIX + name for name in found} != names:
                raise ValueError("it is not loaded as it was saved")
            if METHODS[config.method].merges:
                adapter.merge()
                if {name: weight.shape for name, weight in trained.state_dict().items()} != shapes:
                    raise ValueError("the merged model has other weights")
    # what peft and transformers raise where a model has other modules than they expect; on the meta device
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            Complaint(
                key,
                f"what it trains in {type(model).__name__} cannot be published: {reason}.",
                f"Use {STAGE}.peft=freeze or none, or name other layers in {STAGE}.peft.target_modules.",
            )
        ) from error


def attach_published(
    model: PreTrainedModel, artifact: Path, keep: Keep = lambda weight: weight
) -> tuple[Adapter, Tensor | None]:
    """Put an artifact's adapter into the model that it was trained on, all frozen. The second value is the
    score head that was saved with it, or None.

    Args:
        keep: gets each weight that is made.
    """
    import torch
    from peft import PeftConfig as TunerConfig
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    from rlhf.models.peft.attach import Adapter, inject
    from rlhf.models.peft.quantization import round_to_4_bits
    from rlhf.models.peft.virtual_tokens import EMBEDDINGS, add_virtual_tokens

    directory, saved, origin = artifact / ADAPTER, described(artifact), origin_of(artifact)
    assert origin is not None
    round_to_4_bits(model, origin.in_4_bits, keep)
    weights = load_file(directory / WEIGHTS)
    head = weights.pop(HEAD, None)
    if saved["peft_type"] == "FREEZE":
        for name, weight in weights.items():
            parameter = model.get_parameter(name)
            parameter.data = weight.to(parameter)
        model.requires_grad_(False)
        return Adapter(model, None, None), head
    config = TunerConfig.from_pretrained(str(directory))
    config.modules_to_save = None  # the head
    if saved["peft_type"] in KINDS:
        config.inference_mode = True
        with torch.random.fork_rng(devices=[]):
            virtual = add_virtual_tokens(model, config)
        virtual.encoder.embedding.weight.data.copy_(weights[EMBEDDINGS])
        model.requires_grad_(False)
        return Adapter(model, None, None), head
    with torch.random.fork_rng(devices=[]):  # what peft draws is overwritten
        tuner = inject(model, config, "published")
    weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    assert weights.keys() == get_peft_model_state_dict(model, adapter_name="published").keys()
    set_peft_model_state_dict(model, weights, adapter_name="published")
    del model.peft_config  # seeing it, peft would warn of the adapter that `attach` adds
    model.requires_grad_(False)
    return Adapter(model, tuner, None), head
