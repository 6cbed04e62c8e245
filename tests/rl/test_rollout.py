"""Rollouts, experience and minibatches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from rlhf.rl.rollout import Experience, Rollout, Values, minibatches


def rollout(*responses: list[int], first_prompt: int = 0, logp: bool = True) -> Rollout:
    """Prompts are one token, numbered; an answer stopped if it ends in 0, which is also the padding id."""
    return Rollout(
        prompt_ids=[torch.tensor([first_prompt + i]) for i in range(len(responses))],
        response_ids=[torch.tensor(ids) for ids in responses],
        stopped=torch.tensor([ids[-1] == 0 for ids in responses]),
        sampled_logp=[-torch.tensor(ids, dtype=torch.float32) for ids in responses] if logp else None,
    )


def lists(tensors: list[Tensor] | None) -> list[list[float]] | None:
    return None if tensors is None else [tensor.tolist() for tensor in tensors]


def test_the_mask_counts_stop_tokens_that_are_also_padding() -> None:
    episodes = rollout([5, 0], [7, 0, 0, 8], [9])
    assert episodes.response_lengths.tolist() == [2, 4, 1]
    assert episodes.mask_BR.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("logp", [True, False])
def test_select_and_concatenate(logp: bool) -> None:
    whole = Rollout.concatenate(
        [rollout([5, 0], [6], logp=logp), rollout([7, 8, 9], first_prompt=2, logp=logp)]
    )
    assert len(whole) == 3
    picked = whole.select(torch.tensor([2, 0]))
    assert lists(picked.prompt_ids) == [[2], [0]]
    assert lists(picked.response_ids) == [[7, 8, 9], [5, 0]]
    assert picked.stopped.tolist() == [False, True]
    assert lists(picked.sampled_logp) == ([[-7.0, -8.0, -9.0], [-5.0, 0.0]] if logp else None)


def test_a_half_known_rollout_is_refused() -> None:
    with pytest.raises(AssertionError):
        Rollout.concatenate([rollout([1]), rollout([2], logp=False)])
    with pytest.raises(AssertionError):
        dataclasses.replace(rollout([1], [2]), stopped=torch.tensor([True]))
    with pytest.raises(AssertionError, match="at least one"):
        dataclasses.replace(
            rollout([1]), response_ids=[torch.tensor([], dtype=torch.long)], sampled_logp=None
        )


def experience() -> Experience:
    tokens_BR = torch.arange(12.0).reshape(3, 4)
    return Experience(
        rollout=rollout([5, 0], [7, 0, 0, 8], [9]),
        score_B=torch.tensor([0.1, 0.2, 0.3]),
        logp_BR=tokens_BR,
        reference_logp_BR=tokens_BR + 100,
        reward_BR=tokens_BR + 300,
        advantage_BR=tokens_BR + 400,
        values=Values(tokens_BR + 200, tokens_BR + 500),
    )


def test_selected_experience_is_cropped_to_its_longest_answer() -> None:
    picked = experience().select(torch.tensor([2, 0]))
    assert len(picked) == 2
    assert picked.mask_BR.int().tolist() == [[1, 0], [1, 1]]
    assert lists(picked.rollout.response_ids) == [[9], [5, 0]]
    torch.testing.assert_close(picked.score_B, torch.tensor([0.3, 0.1]))
    tokens_BR = torch.tensor([[8.0, 9.0], [0.0, 1.0]])
    assert torch.equal(picked.logp_BR, tokens_BR)
    assert torch.equal(picked.reference_logp_BR, tokens_BR + 100)
    assert torch.equal(picked.value_BR, tokens_BR + 200)
    assert torch.equal(picked.reward_BR, tokens_BR + 300)
    assert torch.equal(picked.advantage_BR, tokens_BR + 400)
    assert torch.equal(picked.return_BR, tokens_BR + 500)


def test_experience_of_another_shape_than_its_rollout_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"\(3, 3\) for responses of \(3, 4\)"):
        dataclasses.replace(experience(), values=Values(torch.zeros(3, 4), torch.zeros(3, 3)))


@pytest.mark.parametrize(("size", "sizes"), [(4, [4, 4, 4]), (5, [5, 5, 2]), (12, [12]), (100, [12])])
def test_minibatches_are_a_partition_reshuffled_every_epoch(size: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(5)
    first = minibatches(12, size, generator)
    second = minibatches(12, size, generator)
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == sizes
        assert sorted(torch.cat(epoch).tolist()) == list(range(12))
    assert torch.cat(first).tolist() != torch.cat(second).tolist() != list(range(12))
    repeated = minibatches(12, size, torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat(repeated), torch.cat(first))
