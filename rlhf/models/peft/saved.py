"""Trained adapters on disk: small files, with a reference to their base model.

`adapter/` in a model's artifact has adapter_config.json and adapter_model.safetensors, in peft's format if
peft has the method, and base.json, the reference. If the method can be merged, the artifact also has the
merged model. Otherwise it has only the model's config and tokenizer.
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
from rlhf.models.peft.methods import METHODS, PREFIX, VIRTUAL_TOKEN_METHODS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from rlhf.distributed.compute import Compute
    from rlhf.models.on_disk import MapWeight
    from rlhf.models.peft.attach import Adapter

ADAPTER = "adapter"
"""Name of the adapter's directory in an artifact."""
CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "base.json"
HEAD = f"{PREFIX}score.weight"


class Origin(Strict):
    """`base.json`: the model that a stage's training started from."""

    directory: str
    """Its directory; relative to the artifact if both are in the same store, so that the store can be
    moved."""
    key: str
    """Key of its artifact, or identity of the base model."""
    digest: str
    """`weights_digest` of that model."""
    in_4_bits: list[str]
    """Its linear layers that had 4-bit weights during the training, by the last part of their names."""

    @classmethod
    def of(cls, model: Path, key: str, artifact: Path, in_4_bits: Sequence[str] = ()) -> Origin:
        """The reference to `model` from an artifact (STORE/STAGE/KEY, or where it is being written)."""
        here, there = artifact.resolve(), model.resolve()
        is_in_store = there.is_relative_to(here.parents[1])
        directory = os.path.relpath(there, here) if is_in_store else str(there)
        digest = weights_digest(model)
        return cls(directory=directory, key=key, digest=digest, in_4_bits=[*in_4_bits])

    def expected_directory(self, artifact: Path) -> Path:
        """The directory where the model should be, without a check."""
        return (artifact.resolve() / self.directory).resolve()

    def checked_directory(self, artifact: Path) -> Path:
        """The directory of the model, after a check of its weights.

        Raises:
            ConfigError: the model is missing, or has other weights.
        """
        directory = self.expected_directory(artifact)
        if not (directory / "config.json").is_file():
            why = f"its base model ({self.key}) is no longer in {directory}."
            fix = "Run the stage that makes it again with the same store_dir, or put it back."
            raise ConfigError(Complaint(str(artifact), why, fix))
        if weights_digest(directory) != self.digest:
            why = f"its base model in {directory} has other weights than the adapter was trained on."
            fix = "Train the adapter again, or put the old weights back."
            raise ConfigError(Complaint(str(artifact), why, fix))
        return directory


def attach_to_merge(model: PreTrainedModel, config: PeftConfig, map_weight: MapWeight) -> Adapter:
    """`attach` for weights that are already trained. Layers with 4-bit weights get plain weights of the same
    values, so that the adapter can be merged into them.

    Args:
        map_weight: called with each new weight; its result goes into the model.
    """
    from rlhf.models.peft.attach import attach
    from rlhf.models.peft.quantization import round_to_4_bits
    from rlhf.models.peft.target_modules import low_rank_targets

    if config.method != "qlora":
        return attach(model, config)
    names = low_rank_targets(model, config)
    round_to_4_bits(model, names, map_weight)
    adapter = attach(model, config.model_copy(update={"method": "lora"}))
    adapter.in_4_bits = names
    return adapter


def save_adapter(
    adapter: Adapter, artifact: Path, start: Path, key: str, head: Tensor | None = None
) -> dict[str, float]:
    """Write the trained adapter into `adapter/`. If all weights were trained, write nothing.

    Args:
        start: directory of the model that the training started from.
        key: key or identity of that model.
        head: score head [1, H] of a sequence-classification model.

    Returns:
        Summary metric: the adapter's size in bytes.
    """
    from safetensors.torch import save_file

    config = adapter.saved_config()
    if config is None:
        return {}
    origin, weights = Origin.of(start, key, artifact, adapter.in_4_bits), adapter.weights()
    saved = config | {"task_type": "CAUSAL_LM", "revision": origin.digest}
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
    """Size of a model's files in bytes, without *.jsonl: the run still writes its metrics there."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".jsonl")
    return float(sum(path.stat().st_size for path in files))


def origin_of(artifact: Path) -> Origin | None:
    """The artifact's reference to its base model; None if it has no adapter.

    Raises:
        ConfigError: the reference cannot be read.
    """
    path = artifact / ADAPTER / ORIGIN
    try:
        return Origin.model_validate_json(path.read_bytes()) if path.exists() else None
    except ValidationError:
        raise ConfigError(f"{path}: cannot be read. Remove the artifact; the next run rebuilds it.") from None


def base_of(artifact: Path, compute: Compute | None = None) -> Path | None:
    """The directory of the base model if the artifact has only an adapter and no weights; otherwise None.

    Args:
        compute: ranks that all call this at the same time: one of them checks the weights.
    """
    origin = None if any(artifact.glob("*.safetensors")) else origin_of(artifact)
    if origin is None:
        return None
    find = partial(origin.checked_directory, artifact)
    return find() if compute is None else compute.main_only(find)


def unchecked_base_of(artifact: Path) -> Path | None:
    """`base_of` without a check that the model is there."""
    origin = None if any(artifact.glob("*.safetensors")) else origin_of(artifact)
    return None if origin is None else origin.expected_directory(artifact)


def adapter_config(artifact: Path) -> dict[str, Any]:
    """The content of an artifact's adapter_config.json."""
    content: dict[str, Any] = json.loads((artifact / ADAPTER / CONFIG).read_bytes())
    return content


def check_publishable(model: PreTrainedModel, config: PeftConfig) -> None:
    """Check before training that the trained adapter can be published: attach an adapter to a copy of the
    model, load it into another copy, and merge it.

    Args:
        model: on the meta device, where this takes no memory. It does not change.

    Raises:
        ConfigError: the adapter cannot be published, or `check_attachable` refuses the model.
    """
    import torch
    from peft import get_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from rlhf.models.peft.attach import attach, check_attachable, inject

    check_attachable(model, config)
    if config.method in ("none", "freeze", *VIRTUAL_TOKEN_METHODS.values()):
        return
    key = f"{STAGE}.peft={config.method}"
    if config.method == "qlora":  # as `attach_to_merge` does
        config = config.model_copy(update={"method": "lora"})
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    trained, loaded = copy.deepcopy(model), copy.deepcopy(model)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            adapter = attach(trained, config)
            names, saved = adapter.weights().keys(), adapter.saved_config()
            assert saved is not None
            kind = PEFT_TYPE_TO_CONFIG_MAPPING[saved["peft_type"]]
            content = json.loads(json.dumps(saved, default=sorted))
            tuner = inject(loaded, kind.from_peft_type(**content), "published")
            loaded_weights = get_peft_model_state_dict(tuner.model, adapter_name="published")
            if {PREFIX + name for name in loaded_weights} != names:
                raise ValueError("it is not loaded as it was saved")
            if METHODS[config.method].merges:
                adapter.merge()
                if {name: weight.shape for name, weight in trained.state_dict().items()} != shapes:
                    raise ValueError("the merged model has other weights")
    # errors of peft and transformers if a model has other modules than they expect
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
    model: PreTrainedModel, artifact: Path, map_weight: MapWeight = lambda weight: weight
) -> tuple[Adapter, Tensor | None]:
    """Attach an artifact's adapter to the model on which it was trained, all frozen. The second result is the
    score head that was saved with it, or None.

    Args:
        map_weight: called with each new weight; its result goes into the model.
    """
    import torch
    from peft import PeftConfig as TunerConfig
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    from rlhf.models.peft.attach import Adapter, inject
    from rlhf.models.peft.quantization import round_to_4_bits
    from rlhf.models.peft.virtual_tokens import EMBEDDINGS, add_virtual_tokens

    directory, saved, origin = artifact / ADAPTER, adapter_config(artifact), origin_of(artifact)
    assert origin is not None
    round_to_4_bits(model, origin.in_4_bits, map_weight)
    weights = load_file(directory / WEIGHTS)
    head = weights.pop(HEAD, None)
    if saved["peft_type"] == "FREEZE":
        for name, weight in weights.items():
            parameter = model.get_parameter(name)
            parameter.data = weight.to(parameter)
        model.requires_grad_(False)
        return Adapter(model, None, None), head
    config = TunerConfig.from_pretrained(str(directory))
    config.modules_to_save = None  # the score head, which is handled here
    if saved["peft_type"] in VIRTUAL_TOKEN_METHODS:
        config.inference_mode = True
        with torch.random.fork_rng(devices=[]):
            virtual = add_virtual_tokens(model, config)
        virtual.encoder.embedding.weight.data.copy_(weights[EMBEDDINGS])
        model.requires_grad_(False)
        return Adapter(model, None, None), head
    with torch.random.fork_rng(devices=[]):  # peft's random weights are overwritten: keep the random state
        tuner = inject(model, config, "published")
    weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    assert weights.keys() == get_peft_model_state_dict(model, adapter_name="published").keys()
    set_peft_model_state_dict(model, weights, adapter_name="published")
    del model.peft_config  # with it, peft would warn about the second adapter, which `attach` adds
    model.requires_grad_(False)
    return Adapter(model, tuner, None), head
