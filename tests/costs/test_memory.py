"""Predicted bytes against what the project's own code keeps."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from helpers.jobs import TINY
from helpers.models import in_dtype
from rlhf.costs.hardware import Machine, Speed
from rlhf.costs.memory import (
    SAMPLING,
    MemoryPhase,
    Trained,
    activations,
    kept_per_layer,
    kept_per_token,
    sampling,
    vllm_pass,
    vllm_row,
    with_vllm,
    working_per_token,
)
from rlhf.costs.model_shape import shape_of
from rlhf.costs.setup import CostContext, pads_rows
from rlhf.costs.stage_cost import joined
from rlhf.data.prepared import LengthStats
from rlhf.distributed.batching import token_budget_batches
from rlhf.distributed.compute import Zero
from rlhf.generation.cpu_decoder import multiplies_bf16
from rlhf.generation.vllm import BATCHED_TOKENS, VllmConfig
from rlhf.models.base import ModelConfig
from rlhf.models.packed_attention import hidden_states, pack_where_possible
from rlhf.models.packed_batch import Packed
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS
from rlhf.models.recompute import checkpoint_layers
from rlhf.training.config import OptimConfig
from rlhf.training.deepspeed import bucket_elements
from rlhf.training.optimizer import MasterAdamW, parameter_group

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
ROWS, LENGTH = 8, 32
FULL, LORA = PeftConfig(method="none"), PeftConfig(method="lora", rank=4)
OPTIM = OptimConfig(
    lr=1e-3, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1.0
)


def setting(
    zero: Zero = "none",
    ranks: int = 1,
    kind: Literal["cpu", "cuda"] = "cpu",
    dtype_bytes: int = 2,
    *,
    pads: bool = False,
) -> CostContext:
    machine = Machine(
        kind=kind, name="a test", memory=1e9, host_memory=1e9, used=0.0, ranks=ranks, speed=Speed(100.0, 10.0)
    )
    lengths = LengthStats(1, 1.0, 0.0, 1)
    return CostContext(shape_of(CONFIG), dtype_bytes, zero, machine, lambda role, split: lengths, pads=pads)


def model(peft: PeftConfig, dtype: torch.dtype, attention: str = "auto") -> PreTrainedModel:
    torch.manual_seed(0)
    found = in_dtype(LlamaForCausalLM(deepcopy(CONFIG)), dtype)
    found.eval()
    if attention == "auto":
        pack_where_possible(found)
    attach(found, peft)
    return found


@contextmanager
def kept(network: PreTrainedModel) -> Iterator[weakref.WeakSet[Kept]]:
    """All that autograd keeps of the passes meanwhile, for as long as it does."""
    found: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> Kept:
        found.add(holder := Kept(tensor))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
        yield found


class Kept:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def size_of(found: weakref.WeakSet[Kept], network: PreTrainedModel) -> int:
    """Bytes, of each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    storages = [holder.tensor.untyped_storage() for holder in found]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for place, size in sizes.items() if place not in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("peft", [
    FULL, LORA, PeftConfig(method="dora", rank=4), PeftConfig(method="ia3"),
    PeftConfig(method="adapter", size=8), PeftConfig(method="adapter", size=8, placement="houlsby"),
    PeftConfig(method="prefix", tokens=4), PeftConfig(method="prompt", tokens=4),
    PeftConfig(method="p_tuning", tokens=4), PeftConfig(method="freeze", layers=2),
], ids=lambda peft: f"{peft.method}-{peft.placement}")  # fmt: skip
def test_a_pass_keeps_what_is_predicted(peft: PeftConfig, attention: str, dtype: torch.dtype) -> None:
    network = model(peft, dtype, attention)
    rows = [torch.randint(0, 64, (LENGTH,)) for _ in range(ROWS)]
    with kept(network) as found:
        states = hidden_states(network, Packed(rows, "cpu"))
    on = setting(dtype_bytes=dtype.itemsize, pads=attention == "sdpa")
    predicted = kept_per_token(on, LENGTH, peft) * ROWS * LENGTH
    assert size_of(found, network) == pytest.approx(predicted, rel=0.05)
    assert states.requires_grad  # until here its graph was alive


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    network = model(FULL, torch.bfloat16)
    checkpoint_layers(network)
    rows = [torch.randint(0, 64, (LENGTH,)) for _ in range(ROWS)]
    with kept(network) as found:
        states = hidden_states(network, Packed(rows, "cpu"))
    on, tokens, held = setting(), ROWS * LENGTH, size_of(found, network)
    assert states.requires_grad
    with_it, without = (
        activations(on, tokens, LENGTH, FULL, checkpointing=on_or_off).size for on_or_off in (True, False)
    )
    layer = kept_per_layer(on, LENGTH, FULL) * tokens
    kept_inputs = 2 * CONFIG.hidden_size * CONFIG.num_hidden_layers * tokens
    # beside them only the last norm, outside the layers, and what all layers share
    assert kept_inputs <= held < kept_inputs + layer / 2
    assert without - with_it == pytest.approx(3 * layer - kept_inputs)


@pytest.mark.parametrize("peft", [FULL, LORA], ids=["none", "lora"])
def test_the_optimizer_holds_what_is_predicted(peft: PeftConfig) -> None:
    network = model(peft, torch.bfloat16)
    optimizer = MasterAdamW([parameter_group(network.parameters(), OPTIM)])
    loss = hidden_states(network, Packed([torch.arange(LENGTH)], "cpu")).float().square().mean()
    loss.backward()
    optimizer.step()
    state = optimizer.state_dict()
    held = sum(master.nbytes for master in state["masters"])
    held += sum(
        each.nbytes for moments in state["adamw"]["state"].values() for each in moments.values() if each.dim()
    )
    assert Trained(setting(), peft).optimizer().size == held


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"),
    # bytes per parameter and rank, of four ranks: Rajbhandari et al. 2020, figure 1, with fp32 gradients
    [
        ("none", 2, 4, 12),
        ("zero1", 2, 4, 3),
        ("zero2", 2, 1, 3),
        ("zero3", 2 / 4, 1, 3),
        ("fsdp2", 2 / 4, 1, 3),
    ],
)
def test_what_is_sharded(zero: Zero, weights: float, gradients: float, optimizer: float) -> None:
    trained = Trained(setting(zero, ranks=4), FULL)
    count = trained.parameters
    held = [part.size for part in trained.weights("model") if "small" not in part.formula]
    assert sum(held) == pytest.approx(weights * count)
    parts = [*trained.buffers(), *trained.gradients(passes=2)]
    held = [part.size for part in parts if not re.search("bucket|sent|part of it", part.formula)]
    assert sum(held) == pytest.approx(gradients * count)
    assert trained.optimizer().size == pytest.approx(optimizer * count)


def test_hsdp_shards_over_the_ranks_of_a_node() -> None:
    on = setting("hsdp", ranks=8)
    trained = Trained(replace(on, machine=replace(on.machine, ranks_here=4)), FULL)
    (weights,) = trained.weights("model")
    assert weights.size == 2 * trained.parameters / 4
    assert trained.optimizer().size == 12 * trained.parameters / 4
    assert Trained(on, FULL).optimizer().size == 12 * trained.parameters  # each rank is a node


def test_fsdp2_sends_a_layers_gradients_and_at_the_end_those_outside_the_layers() -> None:
    """Policy and critic of 10 parameters outside layers of 1000, whose backward passes follow each other."""
    on = setting("fsdp2", ranks=2)
    on = replace(on, shape=replace(on.shape, layer=1000, outside=10))
    trained = Trained(on, FULL, models=2, weight_sets=2, scalars=1)

    def sent(**how: bool) -> float:
        return sum(part.size for part in trained.gradients(passes=1, **how) if "sent" in part.formula)

    assert sent() == (2 + 4) * 1000 + 2 * 10
    assert sent(together=True) == (2 + 4) * 1000 + 2 * 20
    assert sent(at_step=True) == (2 + 4) * 10 + 2 * 20  # both are still gathered
    assert [part.size for part in trained.gathered()] == [2 * (2 * 1000 + 20)]


def test_deepspeeds_step_lays_gradients_of_one_model_at_a_time_end_to_end() -> None:
    for zero in ("zero2", "zero3"):
        trained = Trained(setting(zero, ranks=2), FULL, models=2, weight_sets=2)
        parts = [each for each in trained.gradients(passes=2, at_step=True) if "one model" in each.formula]
        assert sum(part.size for part in parts) == 4 * trained.parameters / 2 / 2


def test_deepspeeds_norm_of_a_large_weight_takes_more_than_that() -> None:
    def norm(zero: Zero, largest: int) -> list[float]:
        on = setting(zero, ranks=2)
        trained = Trained(replace(on, shape=replace(on.shape, largest=largest)), FULL)
        return [part.size for part in trained.gradients(passes=2, at_step=True) if "norm" in part.formula]

    count = setting().shape.parameters
    assert norm("zero2", count // 2) == [8 * (count // 2)] and norm("zero2", count // 4) == []
    assert norm("zero3", count // 2 + 1) == [8 * (count // 2 + 1) / 2] and norm("zero3", count // 2) == []


def test_a_weight_beyond_deepspeeds_bucket_is_sent_by_itself() -> None:
    def alone(largest: int, peft: PeftConfig) -> list[float]:
        on = setting("zero3", ranks=2)
        trained = Trained(replace(on, shape=replace(on.shape, largest=largest)), peft)
        return [each.size for each in trained.gradients(passes=2) if "by itself" in each.formula]

    bucket = bucket_elements(setting().shape.parameters)
    assert alone(bucket + 1, FULL) == [(2 + 4) * (bucket + 1)]
    assert alone(bucket, FULL) == alone(bucket + 1, LORA) == []  # no update is so large


def test_vllm_on_a_gpu_tries_its_largest_pass_when_it_is_built() -> None:
    vllm = VllmConfig(
        tensor_parallel=2, kv_cache_gib=1.0, max_num_seqs=100, max_model_len=None, enforce_eager=True
    )
    phases = [MemoryPhase(SAMPLING), MemoryPhase("learning")]

    def held(kind: Literal["cpu", "cuda"]) -> list[list[str]]:
        on = replace(setting(kind=kind), vllm=vllm)
        return [[each.kind for each in phase.parts] for phase in with_vllm(on, phases)]

    assert held("cuda") == [["weights", "KV cache", "activations", "logits"], []]
    assert held("cpu") == [["weights", "KV cache"]] * 2
    on = replace(setting(kind="cuda"), vllm=vllm)
    layer, sampled = vllm_pass(on, vllm)
    assert layer.size == BATCHED_TOKENS * working_per_token(on.shape, 2, mlp_ranks=2)
    assert sampled.size == 100 * on.shape.vocabulary * (2 + 6 * 4)
    many = vllm.model_copy(update={"max_num_seqs": 2 * BATCHED_TOKENS})
    assert next(vllm_pass(on, many)).size == 2 * layer.size


def test_a_row_takes_whole_blocks_of_vllms_cache() -> None:
    def row(tokens: int, ranks: int = 1, kind: Literal["cpu", "cuda"] = "cuda") -> float:
        on = setting(kind=kind)
        config = VllmConfig(
            tensor_parallel=ranks, kv_cache_gib=1.0, max_num_seqs=1, max_model_len=None, enforce_eager=True
        )
        return vllm_row(on, config, tokens)

    token = 2 * setting().shape.kv_elements
    assert row(1) == row(16) == 16 * token and row(17) == 32 * token
    assert row(1, kind="cpu") == 128 * token
    kv_heads = setting().shape.kv_heads
    assert row(16, ranks=kv_heads) == row(16, ranks=4 * kv_heads) == 16 * token / kv_heads
    windowed = Gemma3TextConfig(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=64,
    )  # fmt: skip
    assert shape_of(windowed).full_layers == 1


def test_layers_that_train_are_the_models_own() -> None:
    def held(method: str) -> float:
        return sum(part.size for part in Trained(setting(), PeftConfig(method=method)).weights("model"))

    assert held("freeze") == held("none") < held("lora")


def test_offloading_leaves_on_the_device_what_is_gathered() -> None:
    trained = Trained(setting("zero3_offload", ranks=2, kind="cuda"), FULL)
    parts = [*trained.weights("model"), trained.optimizer(), *trained.buffers(), *trained.gradients(passes=2),
             *trained.gathered()]  # fmt: skip
    assert [part.on_host for part in parts] == [True, False, True, True, *[False] * 4]


HOLDING = """
import json, os, sys
import torch
from rlhf.training.config import OptimConfig
from rlhf.distributed.compute import make_compute
from rlhf.training.make_engine import make_engine
from rlhf.training.optimizer import ClippedAdamW
from torch import nn

compute, _ = make_compute("cpu", "fp32", sys.argv[1], timeout=100)
optim = OptimConfig(
    lr=1e-3, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1.0
)
model = nn.Sequential(nn.Linear(300, 400, bias=False), nn.Linear(400, 300, bias=False))
engine = make_engine(model, [(layer.parameters(), optim) for layer in model], compute)
optimizer, held = engine._engine.optimizer, {}

def gradients():
    flat = [master.grad for master in optimizer.fp32_partitioned_groups_flat]
    tensors = [optimizer.grad_partitions_flat_buffer, *(each for each in flat if each is not None)]
    buckets = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
    found = {"own": tensors, "bucket": buckets}
    return {name: sum(each.nbytes for each in tensors) for name, tensors in found.items()}

step = ClippedAdamW.step

def spy(self, *arguments, **options):
    held.setdefault("stepping", gradients())
    return step(self, *arguments, **options)

ClippedAdamW.step = spy
held["waiting"] = gradients()
for last in (False, True):
    engine.backward(engine.model(torch.ones(1, 300)).sum(), last=last)
engine.step()
held["again"] = gradients()
if compute.is_main:
    print(json.dumps(held))
    sys.stdout.flush()
compute.barrier()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero3", "zero3_offload"])
def test_deepspeed_holds_the_gradients_that_are_predicted(tmp_path: Path, zero: Zero) -> None:
    (tmp_path / "holding.py").write_text(HOLDING)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "holding.py", zero]
    done = subprocess.run(
        [sys.executable, *run], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")] or [done.stderr]
    held = json.loads(line)
    count = 2 * 300 * 400  # two groups, as policy and critic

    class Two(Trained):
        parameters = count

    trained = Two(setting(zero, ranks=2, dtype_bytes=4), FULL, models=2)
    own, bucket = trained.buffers()
    assert held["waiting"] == held["again"] == {"own": own.size, "bucket": bucket.size}
    steps = trained.gradients(passes=2, at_step=True)
    stepping = sum(part.size for part in steps if part.kind == "gradients")
    assert held["stepping"] == {"own": own.size + stepping, "bucket": bucket.size}


def test_the_largest_pass_is_within_the_budget_but_holds_the_longest_row() -> None:
    on = setting(ranks=2)
    rows = LengthStats(rows=100, mean=50.0, deviation=0.0, longest=60)
    assert on.pass_tokens(16, rows, max_tokens=4096) == 8 * 50  # a rank's half of the batch
    assert on.pass_tokens(16, rows, max_tokens=128) == 128
    assert on.pass_tokens(16, rows, max_tokens=16) == 60
    assert (on.passes(16, rows, max_tokens=4096), on.passes(16, rows, max_tokens=128)) == (1, 4)
    assert on.pass_tokens(16, rows._replace(deviation=10.0), max_tokens=4096) > 8 * 50


LENGTHS = {
    "texts": lambda chance: round(chance.lognormvariate(5.0, 0.6)),
    "even texts": lambda chance: round(chance.gauss(400.0, 60.0)),
    "prompts and answers of 128": lambda chance: 128 + max(1, round(chance.gauss(50.0, 15.0))),
}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("most", [1024, 4096, 16384])
@pytest.mark.parametrize("rows", [1, 16, 256, 2000])
def test_the_largest_padded_pass_is_that_of_the_batches(kind: str, most: int, rows: int) -> None:
    chance = random.Random(1)
    lengths = [LENGTHS[kind](chance) for _ in range(2000)]
    seen = 0
    for _ in range(3):  # epochs
        chance.shuffle(lengths)
        for batch in (lengths[first : first + rows] for first in range(0, 2001 - rows, rows)):
            for places in token_budget_batches(batch, most):
                seen = max(seen, len(places) * max(batch[place] for place in places))
    of_all = LengthStats(len(lengths), fmean(lengths), pstdev(lengths), max(lengths))
    on = setting(ranks=2, pads=True)
    assert on.pass_tokens(2 * rows, of_all, most) == pytest.approx(seen, rel=0.15)
    assert on.passes(2 * rows, of_all, most) == setting(ranks=2).passes(2 * rows, of_all, most)


def test_rows_are_padded_behind_virtual_tokens_and_where_they_cannot_be_packed() -> None:
    shape = shape_of(CONFIG)
    assert not pads_rows(TINY, shape)
    assert not pads_rows(ModelConfig(kind="tiny", attention="packed"), shape)
    assert pads_rows(ModelConfig(kind="tiny", attention="sdpa"), shape)
    capped = Gemma2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                          head_dim=8, intermediate_size=48, vocab_size=64)  # fmt: skip
    assert pads_rows(TINY, shape_of(capped))
    padded = {name for name in METHODS if setting().tuned(PeftConfig(method=name)).pads}
    assert padded == {"prefix", "prompt", "p_tuning"}
    assert setting(pads=True).tuned(LORA).pads


def test_a_prompt_and_its_answer_stand_behind_each_other() -> None:
    both = joined(LengthStats(9, 30.0, 3.0, 40), LengthStats(0, 20.0, 0.0, 20))
    assert both == LengthStats(9, 50.0, 3.0, 60)


def test_what_rows_begin_with_alike_is_computed_once_where_rows_are_packed_on_a_cpu() -> None:
    rows = LengthStats(rows=100, mean=50.0, deviation=0.0, longest=60, shared_prefix=20.0)
    assert setting().computed(1000, rows) == 600
    assert setting().pass_tokens(16, rows, max_tokens=4096) == 16 * 30
    assert setting().pass_tokens(1, rows, max_tokens=4096) == 60
    for on in (setting(kind="cuda"), setting(pads=True)):
        assert on.computed(1000, rows) == 1000
    assert joined(rows, rows).shared_prefix == 40.0
    assert rows.cut(10).shared_prefix == 10.0


def test_sampling_holds_a_cache_that_grows_with_rows_and_tokens() -> None:
    def cache(rows: int, new_tokens: int) -> float:
        parts = sampling(setting(kind="cuda"), rows, 10, new_tokens)
        return sum(part.size for part in parts if part.kind == "KV cache")

    per_token = 2 * 2 * 16 * 4 * 2  # keys and values, 2 heads of 16, 4 layers, bf16
    assert cache(3, 26) == 3 * (10 + 26 + 64) * per_token
    assert cache(6, 26) == 2 * cache(3, 26)


@pytest.mark.parametrize(("lean", "rows", "copies"), [(True, 2, 1), (True, 1, 0), (False, 2, 0)])
def test_only_the_lean_decoder_copies_weights(lean: bool, rows: int, copies: int) -> None:
    on = setting()
    on = replace(on, shape=replace(on.shape, is_lean=lean))
    parts = [part for part in sampling(on, rows, 10, 26) if part.formula.startswith("laid out")]
    assert len(parts) == copies * multiplies_bf16()


def test_prompts_are_read_in_groups() -> None:
    def read(rows: int, prompt: int) -> float:
        (part,) = [p for p in sampling(setting(kind="cuda"), rows, prompt, 26) if p.kind == "activations"]
        return part.size

    assert read(20, 10) == 2 * read(10, 10)
    assert read(8192, 10) == read(4096, 10) == read(1, 4096)
    assert read(2, 8192) == read(1, 8192) == 2 * read(1, 4096)  # one prompt goes through whole
