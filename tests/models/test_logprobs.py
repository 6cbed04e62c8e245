"""Log-probabilities of responses: chunked, packed and micro-batched, against the plain formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from helpers.jobs import TINY, on_cpu
from helpers.models import sharper, small_of, tiny_family
from rlhf.config import ConfigError
from rlhf.models import logprobs as policy
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import (
    ResponseModel,
    answer_logprobs,
    check_policy,
    head_statistics,
    pack_sequences,
    response_statistics,
)
from rlhf.rl.rollout import Responses, Rollout

PAD = 2
CPU = torch.device("cpu")
LENGTHS = [(3, 5), (9, 1), (1, 8), (6, 6)]
"""Prompt and response tokens of each row."""


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return sharper(tiny_model)


def rows() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 259, (prompt,), generator=generator) for prompt, _ in LENGTHS]
    responses = [torch.randint(3, 259, (response,), generator=generator) for _, response in LENGTHS]
    responses[1][0] = PAD  # a response that is only the stop token, which is also the pad token
    responses[0][2] = PAD  # and one with it inside
    return prompts, responses


def by_hand(model: PreTrainedModel, prompt: Tensor, response: Tensor, temperature: float) -> Tensor:
    """One row without padding: log-softmax of the model's own logits, gathered one position earlier."""
    logits_TV = model(input_ids=torch.cat([prompt, response])[None]).logits[0].float() / temperature
    logp_TV = logits_TV.log_softmax(-1)
    start = len(prompt) - 1
    return torch.stack([logp_TV[start + offset, token] for offset, token in enumerate(response)])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_equals_the_plain_formula(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, temperature: float, chunk: int
) -> None:
    monkeypatch.setattr(policy, "HEAD_CHUNK", chunk)
    prompts, responses = rows()
    batch = pack_sequences(prompts, responses, CPU)
    expected = [by_hand(model, *pair, temperature) for pair in zip(prompts, responses, strict=True)]
    statistics = response_statistics(model, batch, temperature)
    torch.testing.assert_close(statistics.logp_N, torch.cat(expected), atol=1e-5, rtol=1e-5)
    logp_BR = batch.to_rows(statistics.logp_N)
    for row, values in enumerate(expected):
        torch.testing.assert_close(logp_BR[row, : len(values)], values, atol=1e-5, rtol=1e-5)
        assert not logp_BR[row, len(values) :].any()
    assert torch.cat(expected).std() > 0.4  # a model that says the same everywhere would prove little


def test_gradients_equal_those_of_the_plain_formula(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "HEAD_CHUNK", 4)
    prompts, responses = rows()
    weights = torch.randn(sum(len(response) for response in responses))
    plain = torch.cat([by_hand(model, *pair, 0.7) for pair in zip(prompts, responses, strict=True)])
    wanted = torch.autograd.grad((plain * weights).sum(), list(model.parameters()))
    batch = pack_sequences(prompts, responses, CPU)
    ours = (response_statistics(model, batch, 0.7).logp_N * weights).sum()
    for gradient, expected in zip(torch.autograd.grad(ours, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("num_tokens", [0, 1, 20, 700])
@pytest.mark.parametrize("trains", [True, False])
def test_the_output_layer_is_called_once_whatever_the_number_of_tokens(num_tokens: int, trains: bool) -> None:
    """A sharding engine gathers its weights around each call, with all ranks, which have other numbers."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30)  # with a bias
    head.requires_grad_(trains)
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    hidden_NH = torch.randn(num_tokens, 8, requires_grad=True)
    targets_N, slope_N = torch.randint(30, (num_tokens,)), torch.randn(num_tokens)
    plain_N = (head(hidden_NH) / 0.7).log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)
    calls.clear()
    logp_N, entropy_N = head_statistics(hidden_NH, head, targets_N, 0.7)
    assert calls == [1]
    torch.testing.assert_close(logp_N, plain_N)
    assert logp_N.shape == entropy_N.shape == (num_tokens,) and not entropy_N.requires_grad
    learning = [hidden_NH, *(head.parameters() if trains else ())]
    wanted, found = (torch.autograd.grad((each * slope_N).sum(), learning) for each in (plain_N, logp_N))
    torch.testing.assert_close(found, wanted)
    assert calls == [1]  # nor again for the gradients


def test_a_bf16_weights_gradient_is_rounded_once() -> None:
    """However many tokens add to it: then it is off by less than half a step of bf16, 2 ** -9."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=False, dtype=torch.bfloat16)
    hidden_NH, targets_N = torch.randn(8 * 256, 16).bfloat16(), torch.randint(50, (8 * 256,))
    head_statistics(hidden_NH, head, targets_N, 1.0).logp_N.sum().backward()
    precise = torch.nn.Linear(16, 50, bias=False, dtype=torch.float64)
    with torch.no_grad():
        precise.weight.copy_(head.weight)
    plain_NV = precise(hidden_NH.double()).log_softmax(-1)
    plain_NV.gather(-1, targets_N[:, None]).sum().backward()
    assert head.weight.grad is not None and precise.weight.grad is not None
    error = (head.weight.grad - precise.weight.grad).norm() / precise.weight.grad.norm()
    assert float(error) < 2e-3


def test_an_output_layer_that_is_not_linear_is_refused() -> None:
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)).eval()
    plain.set_output_embeddings(torch.nn.Sequential(plain.get_output_embeddings()))
    with pytest.raises(ConfigError, match="the output layer of GPT2LMHeadModel is a Sequential"):
        check_policy(plain)


def test_entropy_by_definition_and_without_gradient(model: PreTrainedModel) -> None:
    prompts, responses = rows()
    statistics = response_statistics(model, pack_sequences(prompts, responses, CPU), 0.7)
    logits_TV = model(input_ids=torch.cat([prompts[0], responses[0]])[None]).logits[0] / 0.7
    expected = torch.distributions.Categorical(logits=logits_TV).entropy()
    start = len(prompts[0]) - 1
    torch.testing.assert_close(
        statistics.entropy_N[: len(responses[0])], expected[start : start + len(responses[0])],
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    assert not statistics.entropy_N.requires_grad
    assert statistics.logp_N.requires_grad


def test_a_uniform_model_is_worth_log_of_the_vocabulary(tiny_model: Path) -> None:
    flat = load_causal_lm(tiny_model, TINY, torch.float32)
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
    statistics = response_statistics(flat, pack_sequences(*rows(), CPU), 1.0)
    expected = torch.full_like(statistics.entropy_N, 5.5568280616995374)  # ln 259
    torch.testing.assert_close(-statistics.logp_N, expected)
    torch.testing.assert_close(statistics.entropy_N, expected)


def rollout() -> Rollout:
    prompts, responses = rows()
    return Rollout(prompts, responses, torch.tensor([True, True, False, False]))


def measured(model: PreTrainedModel, episodes: Responses, micro_batch_tokens: int) -> Tensor:
    return answer_logprobs(ResponseModel(model), episodes, 0.7, micro_batch_tokens, on_cpu())


@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 10_000])
def test_micro_batches_do_not_matter(model: PreTrainedModel, micro_batch_tokens: int) -> None:
    expected = torch.zeros(4, 8)
    for row, pair in enumerate(zip(*rows(), strict=True)):
        expected[row, : len(pair[1])] = by_hand(model, *pair, 0.7)
    logp_BR = measured(model, rollout(), micro_batch_tokens)
    torch.testing.assert_close(logp_BR, expected.detach(), atol=1e-5, rtol=1e-5)
    assert not logp_BR.requires_grad


def test_rows_come_back_in_their_order(model: PreTrainedModel) -> None:
    order = torch.tensor([2, 0, 3, 1])
    whole = measured(model, rollout(), 10_000)
    shuffled = measured(model, rollout().select(order), 20)
    torch.testing.assert_close(shuffled, whole[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_a_token_decides_its_own_and_later_probabilities_only(model: PreTrainedModel, changed: int) -> None:
    row = 2  # one prompt token, eight response tokens
    prompts, responses = rows()
    before = measured(model, rollout(), 10_000)
    responses[row][changed] = (responses[row][changed] + 40) % 259
    after = measured(model, Responses(prompts, responses), 10_000)
    differs = (after[row] - before[row]).abs() > 1e-4
    assert differs.tolist() == [position >= changed for position in range(8)]
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(after[others], before[others], atol=1e-5, rtol=1e-5)


def test_the_layout_by_hand() -> None:
    batch = pack_sequences(
        [torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8]), torch.tensor([9, PAD, 9])], CPU
    )
    assert batch.packed.ids_T.tolist() == [5, 6, 7, 9, PAD]
    assert batch.packed.positions_T.tolist() == [0, 1, 0, 1, 2]
    assert batch.packed.places_T.tolist() == [0, 1, 3, 4, 5]
    assert batch.packed.last_B.tolist() == [1, 4]
    assert batch.predicts_N.tolist() == [1, 2, 3, 4]
    assert batch.targets_N.tolist() == [8, 9, PAD, 9]
    assert batch.mask_BR.int().tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.to_rows(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[1, 0, 0], [2, 3, 4]]


def test_a_response_needs_something_before_it() -> None:
    with pytest.raises(AssertionError, match="at least one token before"):
        pack_sequences([torch.tensor([], dtype=torch.long)], [torch.tensor([3])], CPU)


def test_a_model_that_transforms_its_logits_is_refused(model: PreTrainedModel) -> None:
    check_policy(model)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64)).eval()
    check_policy(plain)

    class Capped(GPT2LMHeadModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 0.1 * torch.tanh(output.logits / 0.1)
            return output

    with pytest.raises(ConfigError, match="Capped transforms its logits"):
        check_policy(Capped(plain.config).train(False))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 16}), ("bert-generation", {})],
)
def test_a_model_whose_tokens_see_later_ones_is_refused(kind: str, options: dict[str, Any]) -> None:
    """Its log-probabilities would be off by a nat a token: rows are laid out for causal attention."""
    with pytest.raises(ConfigError, match="see those behind them"):
        check_policy(small_of(kind, options))


def test_an_output_layer_with_a_forward_of_its_own_is_refused() -> None:
    """Dory's multiplies each logit by a weight, which is 1 until it is trained."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("dory", vocab_size=259, num_key_value_heads=2, head_dim=16, **shape)
    for change in (1.0, 1.1):
        dory = AutoModelForCausalLM.from_config(config).eval()
        dory.lm_head.logit_scale.data *= change
        with pytest.raises(ConfigError, match="the output layer of DoryForCausalLM is a DoryLMHead"):
            check_policy(dory)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match="is a NoneType"):
        patch.setattr(dory, "get_output_embeddings", lambda: None)
        check_policy(dory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "known", "wrong"),
    [
        ("gemma2", "logit_cap", None), ("gemma2", "logit_cap", 33.0), ("gemma3n_text", "logit_cap", 27.0),
        ("llama", "logit_cap", 50.0), ("cohere", "logit_scale", 1.0), ("granite", "logit_scale", 0.24),
    ],
)  # fmt: skip
def test_what_is_done_to_logits_is_known_to_a_few_per_cent(
    name: str, known: str, wrong: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest logits are about 2 here, of which a cap of 30 takes a thousandth."""
    family = tiny_family(name, dtype)
    check_policy(family)
    monkeypatch.setattr(policy, known, lambda config: wrong)
    with pytest.raises(ConfigError, match="transforms its logits behind the output layer in a way"):
        check_policy(family)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cap", [0.5, 30.0])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_soft_capped_logits(cap: float, temperature: float, is_frozen: bool) -> None:
    capped = tiny_family("gemma2")
    capped.config.final_logit_softcapping = cap
    capped.get_output_embeddings().requires_grad_(not is_frozen)
    prompts, responses = rows()
    plain = torch.cat([by_hand(capped, *pair, temperature) for pair in zip(prompts, responses, strict=True)])
    batch = pack_sequences(prompts, responses, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "HEAD_CHUNK", 5)
        found = response_statistics(capped, batch, temperature)
        torch.testing.assert_close(found.logp_N, plain, atol=1e-5, rtol=1e-5)
        weights = torch.randn(len(plain), generator=torch.Generator().manual_seed(0))
        trained = [each for each in capped.parameters() if each.requires_grad]
        ours = torch.autograd.grad((found.logp_N * weights).sum(), trained)
    wanted = torch.autograd.grad((plain * weights).sum(), trained)
    for gradient, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    logits_TV = capped(input_ids=torch.cat([prompts[0], responses[0]])[None]).logits[0] / temperature
    entropy_T = torch.distributions.Categorical(logits=logits_TV).entropy()[len(prompts[0]) - 1 : -1]
    torch.testing.assert_close(found.entropy_N[: len(entropy_T)], entropy_T, atol=1e-4, rtol=1e-4)


def test_hidden_states_that_are_more_exact_than_the_output_layer() -> None:
    family = tiny_family("mamba", torch.bfloat16)
    check_policy(family)
    prompts, responses = rows()
    plain = torch.cat([by_hand(family, *pair, 1.0) for pair in zip(prompts, responses, strict=True)])
    found = response_statistics(family, pack_sequences(prompts, responses, CPU), 1.0).logp_N
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0)


def test_a_model_with_damaged_weights_is_refused(tiny_model: Path) -> None:
    damaged = load_causal_lm(tiny_model, TINY, torch.float32)
    with torch.no_grad():
        damaged.model.norm.weight[3] = float("nan")
    with pytest.raises(ConfigError, match=r"the logits of this .* are not finite"):
        check_policy(damaged)
