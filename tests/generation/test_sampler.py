"""The local engine against transformers' own, and its sampling against the distribution it should have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.jobs import on_cpu
from helpers.models import sharper
from rlhf.config import ConfigError
from rlhf.generation import sampler as local
from rlhf.generation.sampler import _draw, _nucleus, _sample, generate
from rlhf.models.logprobs import ResponseModel, answer_logprobs
from rlhf.rl.rollout import Rollout

PAD = 0
LENGTHS = (5, 17, 1, 9, 30, 9)
NEW = 12


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return sharper(tiny_model)


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 259, (length,), generator=generator) for length in LENGTHS]  # pad ids among them


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def sample(model: PreTrainedModel, prompts: list[Tensor], **changes: Any) -> Rollout:
    settings: dict[str, Any] = {
        "max_new_tokens": NEW, "temperature": 0.0, "stop_ids": [], "pad_id": PAD, "batch_rows": 64,
        "uniform_BR": uniform(len(prompts), changes.get("max_new_tokens", NEW)),
    }  # fmt: skip
    return generate(model, prompts, **(settings | changes))


def transformers_greedy(model: PreTrainedModel, prompt: Tensor, stop_ids: list[int]) -> list[int]:
    """One row at a time, so without padding."""
    theirs: Any = model
    output = theirs.generate(
        prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=NEW, do_sample=False,
        eos_token_id=stop_ids or -1, pad_token_id=PAD,
    )  # fmt: skip
    found: list[int] = output[0, len(prompt) :].tolist()
    return found


def lists(rollout: Rollout) -> list[list[int]]:
    return [ids.tolist() for ids in rollout.response_ids]


def some_stops(model: PreTrainedModel, prompts: list[Tensor]) -> list[int]:
    """Two tokens that end some greedy answers early, in different steps, and leave others whole."""
    whole = lists(sample(model, prompts))
    return [whole[0][3], whole[3][1]]


@pytest.mark.parametrize("room", [0, 1, 3, 64])
def test_greedy_equals_transformers_token_for_token(
    model: PreTrainedModel, prompts: list[Tensor], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.GrowingLayer, "GROWTH_TOKENS", room)  # so that it has to grow meanwhile
    rollout = sample(model, prompts)
    assert lists(rollout) == [transformers_greedy(model, prompt, []) for prompt in prompts]
    assert not rollout.stopped.any()
    assert len({tuple(ids) for ids in lists(rollout)}) > 3  # not the same for everyone
    assert [ids.tolist() for ids in rollout.prompt_ids] == [prompt.tolist() for prompt in prompts]


@pytest.mark.parametrize("batch_rows", [1, 2, 4, 64])
def test_stop_tokens_end_a_row_and_disturb_no_other(
    model: PreTrainedModel, prompts: list[Tensor], batch_rows: int
) -> None:
    stops = some_stops(model, prompts)
    rollout = sample(model, prompts, stop_ids=stops, batch_rows=batch_rows)
    expected = [transformers_greedy(model, prompt, stops) for prompt in prompts]
    assert lists(rollout) == expected
    assert rollout.stopped.tolist() == [ids[-1] in stops for ids in expected]
    assert 0 < int(rollout.stopped.sum()) < len(prompts)
    assert len({len(ids) for ids in expected}) > 2


def test_finished_rows_are_decoded_no_more(model: PreTrainedModel, prompts: list[Tensor]) -> None:
    rows: list[int] = []
    stops = some_stops(model, prompts)
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: rows.append(len(ids[0])))
    lengths = sample(model, prompts, stop_ids=stops).response_lengths
    hook.remove()
    assert len(set(lengths.tolist())) > 2
    # the first call reads the prompts; the one behind it and all others extend rows that have not stopped
    assert rows[1:] == [int((lengths > done).sum()) for done in range(1, NEW)]


def test_columns_that_only_a_finished_row_used_are_read_no_more(
    model: PreTrainedModel, prompts: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    long, widths = torch.cat([*prompts] * 3), []
    update = local.GrowingLayer.update

    def noted(layer: local.GrowingLayer, *states: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        keys, values = update(layer, *states, **options)
        widths.append(keys.shape[-2])
        return keys, values

    monkeypatch.setattr(local.GrowingLayer, "update", noted)
    stops = transformers_greedy(model, long, [])[1:2]
    rollout = sample(model, [*prompts, long], stop_ids=stops)
    expected = [transformers_greedy(model, prompt, stops) for prompt in [*prompts, long]]
    assert lists(rollout) == expected
    assert len(expected[-1]) <= 2 and max(map(len, expected)) == NEW
    assert max(widths) > len(long) > widths[-1]
    assert widths[-1] <= max(LENGTHS) + NEW + local.GrowingLayer.GROWTH_TOKENS


def test_prompts_are_read_in_groups_of_so_many_tokens(
    model: PreTrainedModel, prompts: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []
    expected, stops = sample(model, prompts), some_stops(model, prompts)
    stopped = sample(model, prompts, stop_ids=stops)
    monkeypatch.setattr(local, "PREFILL_TOKENS", 20)
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, ids: tokens.append(ids[0].numel())
    )
    found = sample(model, prompts)
    hook.remove()
    assert tokens[:4] == [30, 17, 9 + 9, 5 + 1]  # the longest prompt by itself
    assert tokens[4:] == [len(prompts)] * (NEW - 1)  # and decoded together
    assert lists(found) == lists(expected)
    assert lists(sample(model, prompts, stop_ids=stops)) == lists(stopped)


@pytest.mark.parametrize("attention", [None, "sdpa"])
def test_a_prompt_is_read_once_for_all_of_its_answers(
    tiny_model: Path, prompts: list[Tensor], attention: str | None
) -> None:
    """Packed or padded, also where its answers do not stand side by side. Each answer has its own numbers."""
    model = sharper(tiny_model)
    if attention is not None:
        model.set_attn_implementation(attention)
    asked = [prompts[0], prompts[1], prompts[0], prompts[1], prompts[2]]
    numbers_BR = uniform(5, NEW, seed=3)
    tokens: list[int] = []
    settings: dict[str, Any] = {"temperature": 1.0, "stop_ids": some_stops(model, prompts)}
    alone = [
        sample(model, [prompt], uniform_BR=numbers_BR[row : row + 1], **settings)
        for row, prompt in enumerate(asked)
    ]
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, ids: tokens.append(ids[0].numel())
    )
    found = sample(model, asked, uniform_BR=numbers_BR, **settings)
    hook.remove()
    assert tokens[0] == (LENGTHS[0] + LENGTHS[1] + LENGTHS[2] if attention is None else 3 * LENGTHS[1])
    assert lists(found) == [lists(each)[0] for each in alone]
    assert len({*map(tuple, lists(found))}) == 5
    for row, each in enumerate(alone):
        assert found.sampled_logp is not None and each.sampled_logp is not None
        torch.testing.assert_close(found.sampled_logp[row], each.sampled_logp[0], atol=1e-5, rtol=1e-5)


def test_a_row_that_stops_at_once_has_one_token(model: PreTrainedModel, prompts: list[Tensor]) -> None:
    firsts = [ids[0] for ids in lists(sample(model, prompts))]
    rollout = sample(model, prompts, stop_ids=firsts)
    assert lists(rollout) == [[first] for first in firsts]
    assert rollout.stopped.all()


def test_a_stop_in_the_last_step_counts(model: PreTrainedModel, prompts: list[Tensor]) -> None:
    last = lists(sample(model, prompts[:1]))[0]
    rollout = sample(model, prompts[:1], stop_ids=[last[-1]], max_new_tokens=last.index(last[-1]) + 1)
    assert rollout.stopped.tolist() == [True]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_reported_log_probabilities_are_the_policys(
    model: PreTrainedModel, prompts: list[Tensor], temperature: float, top_p: float
) -> None:
    stops = some_stops(model, prompts)
    rollout = sample(model, prompts, temperature=temperature, top_p=top_p, stop_ids=stops, batch_rows=4)
    logp_BR = answer_logprobs(ResponseModel(model), rollout, temperature or 1.0, 200, on_cpu())
    assert rollout.sampled_logp is not None
    reported_BR = torch.nn.utils.rnn.pad_sequence(rollout.sampled_logp, batch_first=True)
    torch.testing.assert_close(reported_BR, logp_BR, atol=1e-4, rtol=1e-4)


def test_the_seed_decides_a_sample(model: PreTrainedModel, prompts: list[Tensor]) -> None:
    first, again, other = (
        lists(sample(model, prompts, temperature=1.0, uniform_BR=uniform(len(prompts), NEW, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_does_not_depend_on_its_neighbours(
    model: PreTrainedModel, prompts: list[Tensor], temperature: float
) -> None:
    """Alone, in another order or in other batches, a row with its own randomness is answered alike."""
    uniform_BR = uniform(len(prompts), NEW)
    settings = {"temperature": temperature, "stop_ids": some_stops(model, prompts)}
    together = lists(sample(model, prompts, uniform_BR=uniform_BR, **settings))
    assert len({len(ids) for ids in together}) > 1
    for batch_rows in (1, 2, 4):
        assert (
            lists(sample(model, prompts, uniform_BR=uniform_BR, batch_rows=batch_rows, **settings))
            == together
        )
    order = [3, 5, 0, 2, 4, 1]
    shuffled = sample(model, [prompts[row] for row in order], uniform_BR=uniform_BR[order], **settings)
    assert lists(shuffled) == [together[row] for row in order]
    for row, prompt in enumerate(prompts):
        assert lists(sample(model, [prompt], uniform_BR=uniform_BR[[row]], **settings)) == [together[row]]


def test_every_row_and_step_has_its_own_number(model: PreTrainedModel, prompts: list[Tensor]) -> None:
    """Another number in one place changes that row from that token on, and nothing else."""
    uniform_BR = uniform(len(prompts), NEW)
    before = lists(sample(model, prompts, temperature=1.0, uniform_BR=uniform_BR))
    row, step = 3, 5
    uniform_BR[row, step] = (uniform_BR[row, step] + 0.5) % 1
    after = lists(sample(model, prompts, temperature=1.0, uniform_BR=uniform_BR))
    assert [index for index in range(len(prompts)) if before[index] != after[index]] == [row]
    assert before[row][:step] == after[row][:step]
    assert before[row][step] != after[row][step]


def test_finished_rows_are_counted(model: PreTrainedModel, prompts: list[Tensor]) -> None:
    counts: list[int] = []
    sample(model, prompts, batch_rows=4, on_rows=counts.append)
    assert counts == [4, 2]


def test_sampling_follows_the_models_distribution(model: PreTrainedModel, prompts: list[Tensor]) -> None:
    """First tokens of many rows with one prompt: within four standard errors of the softmax at 0.7."""
    rows = 4000
    rollout = sample(
        model, [prompts[0]] * rows, temperature=0.7, max_new_tokens=1, batch_rows=rows,
        uniform_BR=uniform(rows, 1, seed=4),
    )  # fmt: skip
    with torch.no_grad():
        probability_V = (model(prompts[0][None]).logits[0, -1] / 0.7).softmax(-1)
    counts_V = torch.bincount(torch.cat(rollout.response_ids), minlength=259)
    likely = probability_V > 0.01
    assert int(likely.sum()) > 3
    error_V = (counts_V / rows - probability_V) / (probability_V * (1 - probability_V) / rows).sqrt()
    assert error_V[likely].abs().max() < 4


def test_draws_have_the_right_frequencies() -> None:
    weight_V = torch.tensor([0.0, 3.0, 0.0, 1.0, 2.0, 0.0, 4.0, 0.0])  # need not add up to 1
    rows = 40_000
    drawn = _draw(weight_V.expand(rows, -1), uniform(rows))
    counts = torch.bincount(drawn, minlength=8).double()
    assert counts[weight_V == 0].sum() == 0
    expected = weight_V.double() / 10 * rows
    positive = weight_V > 0
    chi_square = float(((counts - expected)[positive] ** 2 / expected[positive]).sum())
    assert chi_square < 16.3  # 3 degrees of freedom, 0.1%


def test_rows_draw_independently() -> None:
    drawn = _draw(torch.ones(20_000, 2), uniform(20_000))
    both = (drawn[0::2] + drawn[1::2]).bincount(minlength=3) / 10_000
    torch.testing.assert_close(both, torch.tensor([0.25, 0.5, 0.25]), atol=0.02, rtol=0)


@pytest.mark.parametrize("edge", [0.0, 1.0 - 2**-24])
@pytest.mark.parametrize(
    "weights", [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.3, 0.3, 0.0], [0.0, 1e-30, 0.0]]
)
def test_a_weight_of_zero_is_never_drawn_at_the_edges(edge: float, weights: list[float]) -> None:
    drawn = int(_draw(torch.tensor([weights]), torch.tensor([edge])))
    assert weights[drawn] > 0


def test_a_nucleus_by_hand() -> None:
    probability = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    weight, total = 3 * probability, torch.tensor([3.0])
    assert _nucleus(weight.clone(), total, 1.0).tolist() == weight.tolist()
    for top_p, kept in (
        (0.4, [0, 1, 0, 0]), (0.6, [0, 1, 0, 1]), (0.8, [0, 1, 1, 1]), (0.95, [1, 1, 1, 1]),
        (1e-9, [0, 1, 0, 0]),  # the likeliest one always stays
    ):  # fmt: skip
        assert (_nucleus(weight.clone(), total, top_p) > 0).int().tolist() == [kept], top_p


def test_only_the_nucleus_is_sampled_but_its_log_probability_is_the_whole_ones() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(2000, -1)
    token_B, logp_B = _sample(logits, 1.0, 0.6, uniform(2000))
    assert set(token_B.tolist()) == {1, 3}
    assert float((token_B == 1).float().mean()) == pytest.approx(2 / 3, abs=0.04)
    expected = torch.where(token_B == 1, torch.tensor(0.5).log(), torch.tensor(0.25).log())
    torch.testing.assert_close(logp_B, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_told(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])
    with pytest.raises(ConfigError, match="logits are not finite"):
        _sample(logits, temperature, 1.0, uniform(2))
