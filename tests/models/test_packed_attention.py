"""Rows laid end to end give what each gives alone, in every kind of model that may take them so."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.models import small_of
from rlhf.generation import sampler as local
from rlhf.generation.sampler import generate, growing_cache
from rlhf.models import packed_attention as packed
from rlhf.models.base import ATTENTION
from rlhf.models.packed_attention import hidden_states, pack_where_possible
from rlhf.models.packed_batch import Packed

KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}, "gpt2": {}, "gpt_neox": {}, "phi": {}, "olmo2": {},
    "granite": {}, "opt": {}, "mistral": {"sliding_window": 4},
    "gemma3_text": {"head_dim": 16, "sliding_window": 4}, "lfm2": {"layer_types": ["full_attention"] * 2},
}  # fmt: skip
PADDED: dict[str, dict[str, Any]] = {
    "bloom": {}, "mamba": {}, "gemma2": {"head_dim": 16},
    "minicpm3": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                 "v_head_dim": 12, "num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
}  # fmt: skip
"""Whose layers know no way to be told where a row ends."""
LENGTHS = (3, 9, 1, 6, 9)


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 100, (length,), generator=generator) for length in LENGTHS]


def alike() -> list[Tensor]:
    """Rows that begin alike: with one token, with all of another one's, and twice the same."""
    start, middle, *ends = rows()
    some = [start, torch.cat([start, middle]), torch.cat([start[:1], ends[0]])]
    return [*some, torch.cat([start, middle, ends[1]]), ends[2], torch.cat([start, middle]), start]


def alone(model: PreTrainedModel, of: list[Tensor] | None = None) -> Tensor:
    backbone = getattr(model, model.base_model_prefix)
    of = rows() if of is None else of
    hidden = [backbone(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in of]
    return torch.cat(hidden)


def gradients(model: PreTrainedModel, hidden_TH: Tensor) -> list[Tensor]:
    weights = torch.randn(hidden_TH.shape, generator=torch.Generator().manual_seed(2))
    trained = [p for name, p in model.named_parameters() if "head" not in name]
    return list(torch.autograd.grad((hidden_TH * weights).sum(), trained, allow_unused=True))


@pytest.mark.parametrize(
    ("short", "queries"),
    [(0, 128), (256, 128), (256, 4)],
    ids=["torchs_kernel", "matrix_products", "in_parts"],
)
@pytest.mark.parametrize("are_alike", [False, True], ids=["different", "alike"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_are_those_of_each_row_alone(
    kind: str, are_alike: bool, short: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "MAX_SHORT_TOKENS", short)
    monkeypatch.setattr(packed, "QUERY_CHUNK", queries)
    monkeypatch.setattr(packed, "CACHED_WEIGHTS", 4 * 200)  # a few rows a group
    model = small_of(kind, KINDS[kind])
    assert model.config._attn_implementation == ATTENTION
    texts = alike() if are_alike else rows()
    assert Packed(texts, "cpu").has_shared == are_alike
    expected, found = alone(model, texts), hidden_states(model, Packed(texts, "cpu"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    pairs = zip(gradients(model, found), gradients(model, expected), strict=True)
    pairs_of_used = [pair for pair in pairs if pair[1] is not None]
    rounding = 1e-5 * max(float(wanted.abs().max()) for _, wanted in pairs_of_used)
    for gradient, wanted in pairs_of_used:
        torch.testing.assert_close(gradient, wanted, atol=rounding, rtol=1e-3)


def test_heads_with_copies_of_their_keys_attend_as_groups_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does in fp32."""
    monkeypatch.setattr(packed, "MAX_SHORT_TOKENS", 0)
    model = small_of("llama", {})
    expected = hidden_states(model, Packed(rows(), "cpu"))
    seen: list[int] = []
    attend = functional.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append(k.shape[1])
        return attend(q, k, v, **options)

    monkeypatch.setattr(packed, "_needs_key_copies", lambda q, k: len(q) != len(k))
    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    torch.testing.assert_close(hidden_states(model, Packed(rows(), "cpu")), expected)
    assert {*seen} == {4}


def test_tokens_that_rows_begin_with_alike_go_through_the_model_once() -> None:
    texts = alike()
    seen = Packed(texts, "cpu").call()["input_ids"].shape[1]
    assert seen == len({tuple(row[: end + 1].tolist()) for row in texts for end in range(len(row))})
    assert seen < sum(map(len, texts))


@pytest.mark.parametrize("implementation", [ATTENTION, "sdpa"])
def test_states_at_some_tokens_are_those_among_all(implementation: str) -> None:
    """Two of the rows are the same, so their last tokens are one."""
    model, texts = small_of("llama", {}), alike()
    model.set_attn_implementation(implementation)
    laid = Packed(texts, "cpu")
    found, expected = hidden_states(model, laid, laid.last_B), alone(model, texts)[laid.last_B]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for gradient, wanted in zip(gradients(model, found), gradients(model, expected), strict=True):
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-3)


def test_what_many_rows_give_back_to_a_token_of_theirs_is_added_up_in_fp32() -> None:
    laid = Packed([torch.tensor([0, row]) for row in range(1, 401)], "cpu")
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(heads, 401, 8, generator=generator) for heads in (2, 1, 1))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        value = v.to(dtype).requires_grad_()
        out = packed.ShortAttention.apply(q.to(dtype), k.to(dtype), value, laid, 8**-0.5, None)  # type: ignore[no-untyped-call]  # torch's
        found.append(torch.autograd.grad(out.sum(), value)[0].float())
    exact, rounded = (each[0, 0] for each in found)  # some 400: in bf16 a half would change nothing there
    assert exact.min() > 300
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0.0)


def attention_by_hand(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch documents of varlen_attn, one row and one query after the other."""
    assert starts_q.dtype == starts_k.dtype == torch.int32 and torch.equal(starts_q, starts_k)
    assert longest_q == longest_k == int(starts_q.diff().max())
    before, behind = window_size
    heads, key_heads = q.shape[1], k.shape[1]
    assert behind == 0 and enable_gqa == (heads != key_heads)
    scale, outs = q.shape[-1] ** -0.5 if scale is None else scale, []
    for start, end in itertools.pairwise(starts_q.tolist()):
        for token in range(start, end):
            first = start if before < 0 else max(start, token - before)
            seen = slice(first, token + 1)
            for head in range(heads):
                group = head // (heads // key_heads)
                weights = (k[seen, group] @ q[token, head] * scale).softmax(0)
                outs.append(weights @ v[seen, group])
    return torch.stack(outs).view(q.shape)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "granite", "gpt2"])
def test_the_kernel_of_gpus_is_told_rows_windows_scales_and_groups(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel alone is replaced: it runs on GPUs only."""
    model = small_of(kind, KINDS[kind] | ({"attention_multiplier": 0.5} if kind == "granite" else {}))
    expected = alone(model)
    monkeypatch.setattr(varlen, "varlen_attn", attention_by_hand)
    monkeypatch.setattr(packed, "_by_row", packed._by_kernel)
    found = hidden_states(model, Packed(rows(), "cpu"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    pairs = zip(gradients(model, found), gradients(model, expected), strict=True)
    for gradient, wanted in ((left, right) for left, right in pairs if right is not None):
        torch.testing.assert_close(gradient, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("kind", PADDED)
def test_models_that_cannot_be_packed_get_padded_rows(kind: str) -> None:
    model = small_of(kind, PADDED[kind])
    assert model.config._attn_implementation != ATTENTION
    torch.testing.assert_close(
        hidden_states(model, Packed(rows(), "cpu")), alone(model), atol=1e-5, rtol=1e-5
    )


def test_a_model_whose_rows_would_mix_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LAYER_TYPES", {"conv", "full_attention"})
    assert small_of("lfm2", {"layer_types": ["conv", "full_attention"]}).config._attn_implementation == "sdpa"
    assert small_of("lfm2", {"layer_types": ["full_attention"] * 2}).config._attn_implementation == ATTENTION


def test_no_position_but_a_rows_own_goes_through_a_model() -> None:
    model = small_of("llama", {})
    positions: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: positions.append(ids[0].numel()))
    hidden_states(model, Packed(rows(), "cpu"))
    assert positions == [sum(LENGTHS)]


def test_a_model_that_puts_more_into_its_mask_is_padded() -> None:
    """Doge's attention adds there what it has learned of each key."""
    config = AutoConfig.for_model(
        "doge", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.normal_()
            layer.self_attn.dt_proj.weight.normal_()
            layer.self_attn.v_proj.weight.normal_()
            layer.self_attn.o_proj.weight.normal_()
    pack_where_possible(model)
    assert model.config._attn_implementation == "sdpa"
    found = hidden_states(model, Packed(rows(), "cpu"))
    torch.testing.assert_close(found, alone(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_sees_its_rows_cache_and_no_padding(kind: str) -> None:
    model, length = small_of(kind, KINDS[kind]), max(LENGTHS)
    ids_BL, mask_BL = torch.zeros(2, len(LENGTHS), length, dtype=torch.long)
    for place, row in enumerate(rows()):
        ids_BL[place, length - len(row) :], mask_BL[place, length - len(row) :] = row, 1
    positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
    backbone, cache = getattr(model, model.base_model_prefix), growing_cache(model)
    for part in (slice(0, length - 1), slice(length - 1, length)):  # the second one is a single token
        hidden_BLH = backbone(
            input_ids=ids_BL[:, part], attention_mask=mask_BL[:, : part.stop],
            position_ids=positions_BL[:, part], past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
    expected_BH = alone(model)[Packed(rows(), "cpu").last_B]
    torch.testing.assert_close(hidden_BLH[:, -1], expected_BH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read_tokens", [4096, 10])
@pytest.mark.parametrize("kind", [*KINDS, *PADDED])
def test_prompts_that_are_read_together_are_answered_as_each_alone(
    kind: str, read_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "PREFILL_TOKENS", read_tokens)
    model = small_of(kind, (KINDS | PADDED)[kind])
    with torch.no_grad():
        for parameter in model.parameters():  # else all answers are alike
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    settings: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0, "stop_ids": [], "pad_id": 0}

    def answers(prompts: list[Tensor]) -> list[list[int]]:
        uniform_BR = torch.zeros(len(prompts), 4)
        rollout = generate(model, prompts, uniform_BR=uniform_BR, batch_rows=64, **settings)
        return [ids.tolist() for ids in rollout.response_ids]

    each = [answers([row])[0] for row in rows()]
    assert answers(rows()) == each
    assert len({tuple(ids) for ids in each}) > 2
    settings["stop_ids"] = [each[1][0], each[4][0]]  # the longest prompts' columns are needed no more
    assert answers(rows()) == [answers([row])[0] for row in rows()]


def test_what_comes_back_to_a_shared_row_is_added_up_in_fp32() -> None:
    """In bf16 the sum of ones would stand still at 256."""
    x = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    packed._take(x, torch.zeros(1000, dtype=torch.long), may_repeat=True).sum().backward()
    assert x.grad is not None and x.grad.sum(-1).tolist() == [8000.0, 0.0]


def test_packed_attention_refuses_dropout_instead_of_leaving_it_out() -> None:
    heads = torch.ones(1, 1, 3, 8)
    with pytest.raises(AssertionError):
        packed.attention(
            torch.nn.Module(),
            heads,
            heads,
            heads,
            None,
            packed=Packed([torch.arange(3)], torch.device("cpu")),
            dropout=0.1,
        )
