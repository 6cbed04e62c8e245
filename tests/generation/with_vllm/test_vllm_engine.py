"""vLLM against the local engine.

`make test-vllm` runs all of this directory, in an environment of its own with vLLM for CPUs.
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from helpers.vllm import (
    NEW,
    Engines,
    assert_same,
    lists,
    locally,
    needs_vllm,
    own_logp,
    sample,
    uniform,
)
from rlhf.generation.vllm import Vllm


@needs_vllm
@pytest.mark.slow
class TestEngine:
    def test_greedy_tokens_are_the_local_engines(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        rollout = sample(engine, model, prompts)
        assert_same(rollout, locally(model, prompts))
        assert len({tuple(ids) for ids in lists(rollout)}) > 3  # not the same for everyone
        assert [ids.tolist() for ids in rollout.prompt_ids] == [prompt.tolist() for prompt in prompts]

    def test_answers_to_one_prompt_share_its_prefill(
        self, engine: Vllm, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of all but one of them only the last, unfinished block of the prompt is computed."""
        sample(engine, model, [torch.tensor([1])])  # so that it is built
        block = engine._llm.llm_engine.vllm_config.cache_config.block_size
        prompt = torch.arange(2 * block + 3) % 251
        step = engine._llm.llm_engine.step
        cached: list[int] = []

        def noted() -> list[Any]:
            outputs: list[Any] = step()
            cached.extend(each.num_cached_tokens for each in outputs if each.finished)
            return outputs

        monkeypatch.setattr(engine._llm.llm_engine, "step", noted)
        rollout = sample(engine, model, [prompt] * 4, temperature=1.0)
        assert sorted(cached) == [0, 2 * block, 2 * block, 2 * block]
        assert len({tuple(ids) for ids in lists(rollout)}) == 4

    def test_stop_tokens_end_a_response_and_are_part_of_it(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        whole = lists(sample(engine, model, prompts))
        stops = [whole[0][3], whole[3][1]]
        rollout = sample(engine, model, prompts, stop_ids=stops)
        assert_same(rollout, locally(model, prompts, stop_ids=stops))
        assert rollout.stopped.tolist() == [ids[-1] in stops for ids in lists(rollout)]
        assert 0 < int(rollout.stopped.sum()) < len(prompts)
        assert {len(ids) for ids in lists(rollout)} >= {2, 4, NEW}

    def test_only_our_stop_tokens_end_a_response(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        """The model's own eos (2) and pad (2) are tokens like others, unless the policy lists them."""
        with torch.no_grad():
            model.lm_head.weight[2] = 3 * model.lm_head.weight.abs().max()
        rollout = sample(engine, model, prompts, temperature=1.0)
        assert any(2 in ids[:-1] for ids in lists(rollout))
        assert not rollout.stopped.any()

    @pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
    def test_log_probabilities_are_the_policys_at_the_sampling_temperature(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor], temperature: float
    ) -> None:
        rollout = sample(engine, model, prompts, temperature=temperature)
        assert rollout.sampled_logp is not None
        expected = torch.cat(own_logp(model, rollout, temperature))
        torch.testing.assert_close(torch.cat(rollout.sampled_logp), expected, atol=1e-4, rtol=1e-4)

    def test_a_nucleus_has_no_log_probabilities(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        rollout = sample(engine, model, prompts, temperature=1.0, top_p=1e-6)
        assert rollout.sampled_logp is None
        assert lists(rollout) == lists(locally(model, prompts))  # only the likeliest token is in it

    def test_sampling_follows_the_models_distribution(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        """First tokens of many rows with one prompt: within four standard errors of the softmax at 0.7."""
        rows = 3000
        rollout = sample(
            engine, model, [prompts[0]] * rows, temperature=0.7, max_new_tokens=1,
            uniform_BR=uniform(rows, 1, seed=4),
        )  # fmt: skip
        with torch.no_grad():
            probability_V = (model(prompts[0][None]).logits[0, -1] / 0.7).softmax(-1)
        counts_V = torch.bincount(torch.cat(rollout.response_ids), minlength=259)
        likely = probability_V > 0.01
        assert int(likely.sum()) > 3
        error_V = (counts_V / rows - probability_V) / (probability_V * (1 - probability_V) / rows).sqrt()
        assert error_V[likely].abs().max() < 4

    def test_a_rows_own_random_numbers_decide_its_response(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        uniform_BR = uniform(len(prompts), NEW, seed=1)
        settings = {"temperature": 1.0, "uniform_BR": uniform_BR}
        together = lists(sample(engine, model, prompts, **settings))
        torch.manual_seed(7)  # on CPUs vLLM draws from the global generator as well
        assert lists(sample(engine, model, prompts, **settings)) == together
        order = [3, 5, 0, 2, 4, 1]
        shuffled = sample(
            engine, model, [prompts[row] for row in order], temperature=1.0, uniform_BR=uniform_BR[order]
        )
        assert lists(shuffled) == [together[row] for row in order]
        uniform_BR[3, 5] = (uniform_BR[3, 5] + 0.5) % 1
        other = lists(sample(engine, model, prompts, **settings))
        assert [row for row in range(len(prompts)) if other[row] != together[row]] == [3]

    def test_equal_prompts_are_answered_differently(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        rollout = sample(engine, model, [prompts[1]] * 4, temperature=1.0)
        assert len({tuple(ids) for ids in lists(rollout)}) == 4

    def test_finished_rows_are_counted(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        counts: list[int] = []
        sample(engine, model, prompts, on_rows=counts.append)
        assert sum(counts) == len(prompts)
        assert lists(sample(engine, model, [], uniform_BR=uniform(0, NEW))) == []  # a rank without a share

    def test_the_trainer_is_left_as_it_was(
        self, engines: Engines, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        def state() -> list[Any]:
            numbers: Any = numpy.random.get_state()
            return [
                torch.get_rng_state().tolist(), random.getstate(), numbers[1].tolist(),
                torch.set_num_threads, torch.get_num_threads(), os.environ.get("LD_PRELOAD"),
                os.environ.get("LOCAL_WORLD_SIZE"), torch.get_default_dtype(), torch.is_grad_enabled(),
            ]  # fmt: skip

        engines.close()
        before = state()
        for _ in range(2):
            sample(engines.get(), model, prompts, temperature=1.0)
            assert state() == before
        engines.close()
        assert state() == before
        assert not distributed.is_initialized()
