"""Weights in the form in which a model holds them: if files have another one, other files are made."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from rlhf.disk import naming
from rlhf.distributed.compute import Compute
from rlhf.models.base import ModelConfig
from rlhf.models.on_disk import INDEX
from rlhf.training import trained

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names -> torch's."""


@contextmanager
def as_loaded(
    directory: Path, config: ModelConfig, dtype: torch.dtype, compute: Compute | None, scratch: Path | None
) -> Iterator[Path]:
    """While open, a directory of this model whose files hold the weights as the model does: in dtype, and the
    experts of a layer in one tensor where the model has that. So a CPU maps them.

    transformers would convert the files of another dtype, and merge experts that have files' weights of their
    own, in the memory of every rank. So this is done once, into another directory, into files of at most
    5 GB; in memory are a file, and the experts of a layer. The mappings outlast the directory. One process
    alone converts in memory, unless it names a place.

    Args:
        compute: of ranks that all load this model at the same time. The first one of each node converts, into
            a temporary directory (TMPDIR).
        scratch: where one process converts.
    """
    together = compute is not None and compute.world_size > 1
    if not (together or scratch) or not _is_converted(directory, config, dtype):
        yield directory
    elif scratch is not None:
        target = scratch / uuid4().hex
        _convert(directory, target, config, dtype)
        yield target
    else:
        assert compute is not None
        name = f"rlhf-{compute.broadcast(uuid4().hex)}-node{compute.rank // compute.node_ranks}"
        target, converts = Path(gettempdir()) / name, compute.rank % compute.node_ranks == 0
        try:
            if converts:
                with compute.busy():
                    _convert(directory, target, config, dtype)
            compute.barrier()
            yield target
            compute.barrier()
        finally:
            if converts:
                shutil.rmtree(target, ignore_errors=True)  # on NFS, what is mapped cannot be removed yet


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _is_converted(directory: Path, config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the model holds some weight in another way than the files."""
    form = Form.of(directory, config, dtype)
    for file in _weights(directory):
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            if any(form.is_other(name, weights.get_slice(name).get_dtype()) for name in names):
                return True
    return False


@dataclass
class Form:
    """How transformers holds the weights of a model's files: some it merges, as the experts of a layer."""

    model: PreTrainedModel
    """Its weights are not read."""
    dtype: torch.dtype

    @classmethod
    def of(cls, directory: Path, config: ModelConfig, dtype: torch.dtype) -> Form:
        """Of the model in a directory."""
        settings = AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
        own = getattr(settings, "auto_map", None) or {}
        is_causal = type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own
        maker: Any = AutoModelForCausalLM if is_causal else AutoModel  # a reward model may be an encoder
        with torch.device("meta"):
            model = maker.from_config(settings, dtype=dtype, trust_remote_code=config.trust_remote_code)
        return cls(model, dtype)

    @cached_property
    def conversions(self) -> list[WeightTransform]:
        """All that may be done to a file's weights: they are renamed, or converted."""
        return get_model_conversion_mapping(self.model)

    def is_other(self, name: str, kind: str) -> bool:
        """Whether a file's weight of this kind is held in another way."""
        into, pattern = self.place_of(name)
        return pattern is not None or (
            kind in FLOATS and f"torch.{FLOATS[kind]}" != str(self._dtype_of(into))
        )

    def converted(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every weight as it is held; merged ones have the model's names, others their own."""
        converters: dict[str, WeightConverter] = {}
        for name in sorted(weights, key=dot_natural_key):  # experts in their order
            into, pattern = self.place_of(name)
            if pattern is None:
                yield name, self._cast(into, weights[name])
            else:
                converter = converters.setdefault(into, self._converter(pattern))
                converter.add_tensor(into, name, pattern, weights[name])  # type: ignore[arg-type]  # it takes tensors too
        for into, converter in converters.items():
            made = converter.convert(into, model=self.model, config=self.model.config)
            for name, found in made.items():
                yield name, self._cast(name, found[0] if isinstance(found, list) else found)

    def place_of(self, name: str) -> tuple[str, str | None]:
        """The model's weight that a file's one becomes, or becomes a part of; then also the pattern of what
        merges it."""
        converters = [each for each in self.conversions if isinstance(each, WeightConverter)]
        renamings = [each for each in self.conversions if isinstance(each, WeightRenaming)]
        into, pattern = rename_source_key(
            name, renamings, converters, self.model.base_model_prefix, self._held
        )
        return (into, pattern) if into in self._held else (name, None)

    def _converter(self, pattern: str) -> WeightConverter:
        converters = (each for each in self.conversions if isinstance(each, WeightConverter))
        return deepcopy(next(each for each in converters if pattern in each.source_patterns))

    def _cast(self, name: str, weight: Tensor) -> Tensor:
        return weight.to(self._dtype_of(name)) if weight.is_floating_point() else weight

    def _dtype_of(self, name: str) -> torch.dtype:
        """A few weights stay in fp32, such as what balances experts."""
        stays = self._stays
        if stays is not None and stays.search(name):
            return torch.float32
        return self._held[name].dtype if name in self._held else self.dtype

    @cached_property
    def _stays(self) -> re.Pattern[str] | None:
        plan = self.model._get_dtype_plan(self.dtype)
        return build_glob_alternation([*plan])[0] if plan else None

    @cached_property
    def _held(self) -> dict[str, Tensor]:
        return self.model.state_dict()


def keep_form(model: PreTrainedModel, directory: Path) -> None:
    """Let `save_pretrained` write weights in the form of this directory's files, though the model was read
    from those that `as_loaded` made of them."""
    form = Form(model, model.dtype)
    for file in _weights(directory):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - a file is no mapping
                form.place_of(name)  # which notes what it uses
    # what transformers sets when it reads files
    used: Any = [each for each in form.conversions if each.was_used()]
    model._weight_conversions = used


def _convert(directory: Path, target: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Write a model once more, as it is held: see `as_loaded`."""
    target.mkdir(mode=0o700)
    for file in directory.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX:
            (target / file.name).symlink_to(file.resolve())
    places: dict[str, str] = {}
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(places.values())):05}.safetensors"
        with naming(target / name):
            save_file(waiting, target / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(waiting, name))
        waiting.clear()

    weights = {name: each for file in _weights(directory) for name, each in load_file(file).items()}
    for name, each in Form.of(directory, config, dtype).converted(weights):
        waiting[name] = each.contiguous()
        if sum(weight.nbytes for weight in waiting.values()) >= trained.FILE_BYTES:
            write()
    write()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
