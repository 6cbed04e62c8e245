"""Convert a model's weight files to the layout in which transformers holds the weights in memory."""

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
    """While open, a directory of this model whose files have the model's own weight layout: in `dtype`, and
    with a layer's experts in one tensor if the model has them so. A CPU can map such files.

    Without it, transformers converts the dtype and merges experts in the memory of every rank. This function
    converts once, into another directory, into files of at most 5 GB. It holds one file and the experts of a
    layer in memory. The mappings stay valid after the directory is removed. A single process converts in
    memory, unless `scratch` is given.

    Args:
        compute: ranks that all load this model at the same time. The first rank of each node converts, into
            a temporary directory (TMPDIR).
        scratch: directory into which a single process converts.
    """
    together = compute is not None and compute.world_size > 1
    if not (together or scratch) or not _needs_conversion(directory, config, dtype):
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
                shutil.rmtree(target, ignore_errors=True)  # NFS cannot remove mapped files yet


def _weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _needs_conversion(directory: Path, config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the layout of some weight differs between the files and the model."""
    layout = WeightLayout.of(directory, config, dtype)
    for file in _weights(directory):
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            if any(layout.is_converted(name, weights.get_slice(name).get_dtype()) for name in names):
                return True
    return False


@dataclass
class WeightLayout:
    """The layout in which transformers holds a model's weights. It merges some, such as a layer's experts."""

    model: PreTrainedModel
    """The model on the meta device, or with its weights; only names, shapes and dtypes are used."""
    dtype: torch.dtype

    @classmethod
    def of(cls, directory: Path, config: ModelConfig, dtype: torch.dtype) -> WeightLayout:
        """The layout of the model in a directory."""
        settings = AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)
        own = getattr(settings, "auto_map", None) or {}
        is_causal = type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own
        maker: Any = AutoModelForCausalLM if is_causal else AutoModel  # a reward model may be an encoder
        with torch.device("meta"):
            model = maker.from_config(settings, dtype=dtype, trust_remote_code=config.trust_remote_code)
        return cls(model, dtype)

    @cached_property
    def conversions(self) -> list[WeightTransform]:
        """Every renaming and conversion that transformers may apply to a file's weights."""
        return get_model_conversion_mapping(self.model)

    def is_converted(self, name: str, kind: str) -> bool:
        """Whether transformers converts this weight of a file, whose safetensors dtype is `kind`."""
        into, pattern = self.target_of(name)
        return pattern is not None or (
            kind in FLOATS and f"torch.{FLOATS[kind]}" != str(self._dtype_of(into))
        )

    def converted(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every weight in the model's layout. Merged weights have the model's names, others the file's."""
        converters: dict[str, WeightConverter] = {}
        for name in sorted(weights, key=dot_natural_key):  # experts in their order
            into, pattern = self.target_of(name)
            if pattern is None:
                yield name, self._cast(into, weights[name])
            else:
                converter = converters.setdefault(into, self._converter(pattern))
                converter.add_tensor(into, name, pattern, weights[name])  # type: ignore[arg-type]  # it takes tensors too
        for into, converter in converters.items():
            made = converter.convert(into, model=self.model, config=self.model.config)
            for name, weight in made.items():
                yield name, self._cast(name, weight[0] if isinstance(weight, list) else weight)

    def target_of(self, name: str) -> tuple[str, str | None]:
        """The name of the model's weight that a file's weight becomes. If it becomes a part of that weight,
        also the pattern of the converter that merges it; otherwise None."""
        converters = [each for each in self.conversions if isinstance(each, WeightConverter)]
        renamings = [each for each in self.conversions if isinstance(each, WeightRenaming)]
        into, pattern = rename_source_key(
            name, renamings, converters, self.model.base_model_prefix, self._state
        )
        return (into, pattern) if into in self._state else (name, None)

    def _converter(self, pattern: str) -> WeightConverter:
        converters = (each for each in self.conversions if isinstance(each, WeightConverter))
        return deepcopy(next(each for each in converters if pattern in each.source_patterns))

    def _cast(self, name: str, weight: Tensor) -> Tensor:
        return weight.to(self._dtype_of(name)) if weight.is_floating_point() else weight

    def _dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a weight in the model. A few stay in fp32, such as the bias that balances experts."""
        pattern = self._fp32_pattern
        if pattern is not None and pattern.search(name):
            return torch.float32
        return self._state[name].dtype if name in self._state else self.dtype

    @cached_property
    def _fp32_pattern(self) -> re.Pattern[str] | None:
        plan = self.model._get_dtype_plan(self.dtype)
        return build_glob_alternation([*plan])[0] if plan else None

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return self.model.state_dict()


def use_file_layout(model: PreTrainedModel, directory: Path) -> None:
    """Make `save_pretrained` write weights in the layout of this directory's files, although the model was
    read from the converted files of `as_loaded`."""
    layout = WeightLayout(model, model.dtype)
    for file in _weights(directory):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - a file is no mapping
                layout.target_of(name)  # marks the conversions that it uses
    # transformers sets this when it reads files
    used: Any = [each for each in layout.conversions if each.was_used()]
    model._weight_conversions = used


def _convert(directory: Path, target: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Write a copy of a model in its own weight layout: see `as_loaded`."""
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
    for name, each in WeightLayout.of(directory, config, dtype).converted(weights):
        waiting[name] = each.contiguous()
        if sum(weight.nbytes for weight in waiting.values()) >= trained.FILE_BYTES:
            write()
    write()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
