"""What one of several ranks does in test_load_slices.py: sharded, models are what they are whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.spawned import each_case
from rlhf.distributed.compute import Compute, Zero
from rlhf.models.base import ModelConfig
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel
from rlhf.models.packed_attention import hidden_states
from rlhf.models.packed_batch import Packed
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig
from rlhf.models.value_head import ScalarModel, load_scalar_model, reset_head
from rlhf.training.config import OptimConfig
from rlhf.training.make_engine import make_engine, shard_frozen
from rlhf.training.trained import load_trained

MODEL = ModelConfig(kind="local")
OPTIM = OptimConfig(
    lr=0.1, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1e9
)
ROWS = [torch.arange(3, 40), torch.arange(7, 12)]


class Case(NamedTuple):
    """A model that is read, and what it is for."""

    zero: Zero
    role: str
    """policy, critic, reference or reward."""
    model: str
    """Name of a directory."""
    method: str = "none"


def load(case: Case, compute: Compute, models: Path) -> PreTrainedModel | ScalarModel:
    """As a stage would, before there is an engine."""
    torch.manual_seed(0)
    directory, on = models / case.model, compute.loads_on
    if case.role in ("policy", "reference"):
        policy = load_causal_lm(directory, MODEL, compute.dtype, on, compute)
        if case.role == "policy":
            attach(policy, PeftConfig(method=case.method))
        return policy
    scalar = load_scalar_model(directory, MODEL, compute.dtype, on, compute, new_head=case.role == "critic")
    if case.role == "critic":
        reset_head(scalar)
        attach(scalar.model, PeftConfig(method=case.method))
        scalar.head.requires_grad_(True)
    return scalar


@torch.no_grad()
def outputs(model: PreTrainedModel | ScalarModel) -> Tensor:
    """Of every token; of a policy what its output layer gives."""
    if isinstance(model, ScalarModel):
        return model.last_values(ROWS)
    logits: Tensor = model.get_output_embeddings()(hidden_states(model, Packed(ROWS, "cpu")))
    return logits


def differences(case: Case, compute: Compute, models: Path, scratch: Path) -> list[str]:
    """Where the sharded model is another one than the whole one, by a single bit; so is what it writes."""
    whole = load(case, replace(compute, zero="none", world_size=1, rank=0), models)
    here = replace(compute, zero=case.zero)
    model = load(case, here, models)
    if case.role in ("reference", "reward"):
        shard_frozen(model, here)
        return [] if torch.equal(outputs(model), outputs(whole)) else ["outputs"]
    root: nn.Module = model if isinstance(model, ScalarModel) else ResponseModel(model)
    engine = make_engine(root, [(model.parameters(), OPTIM)], here)
    expected = dict(whole.named_parameters())
    engine.save_trained(model, scratch / "-".join(case))
    written = load_trained(scratch / "-".join(case))
    assert len(list((scratch / "-".join(case)).iterdir())) == compute.world_size  # each rank its share
    assert written.keys() == {name for name, each in expected.items() if each.requires_grad}
    assert all(torch.equal(each, expected[name]) for name, each in written.items())
    with engine.gathered(model):
        found = dict(model.named_parameters())
        assert found.keys() == expected.keys()
        other = [name for name, each in found.items() if not torch.equal(each, expected[name])]
        return other if torch.equal(outputs(model), outputs(whole)) else [*other, "outputs"]


def go_through(compute: Compute, cases: Sequence[Case], models: Path, scratch: Path) -> dict[Case, list[str]]:
    """What differs in each case, in step with the other ranks."""
    return each_case(cases, lambda case: differences(case, compute, models, scratch))
