"""Weights handed over in place, and those that cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.jobs import TINY, on_cpu, user
from helpers.models import scale
from helpers.vllm import (
    NEW,
    Engines,
    assert_same,
    lists,
    locally,
    needs_vllm,
    own_logp,
    sample,
    shake,
    written,
)
from rlhf.config import ConfigError
from rlhf.generation.policy_model import PolicyModel
from rlhf.generation.sampler import generate
from rlhf.generation.vllm import Vllm
from rlhf.models.base import load_tokenizer
from rlhf.models.load import load_causal_lm
from rlhf.models.peft.attach import attach, merged_weights
from rlhf.models.peft.config import PeftConfig
from rlhf.rl.rollout import Rollout
from rlhf.training.engine import Access, Gather


class Recorded:
    """In vLLM's place: notes who calls it, and answers with the local engine."""

    group_size = 1

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.inside = False
        self.model: PreTrainedModel | None = None

    def holds(self, model: PreTrainedModel) -> bool:
        return self.model is model

    def hand_over(self, model: PreTrainedModel, gathered: Gather) -> None:
        with gathered([model]):
            self.calls.append(f"hand over, gathered={self.inside}")
        self.model = model

    def generate(self, prompts: Sequence[Tensor], **settings: Any) -> Rollout:
        self.calls.append(f"generate, gathered={self.inside}")
        assert self.model is not None
        rollout = generate(self.model, prompts, pad_id=0, batch_rows=64, **settings)
        self.model = None
        return rollout

    def whole(self) -> AbstractContextManager[None]:
        raise AssertionError("no rank needs the whole policy")

    @contextmanager
    def gathered(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False


def test_weights_are_handed_over_once_for_each_rollout_and_gathered_only_then(
    directory: Path, model: PreTrainedModel
) -> None:
    recorded, tokenizer = Recorded(), load_tokenizer(directory, TINY)
    engine: Any = recorded
    access = Access(recorded.whole, weights=recorded.gathered)
    policy = PolicyModel(model, tokenizer, on_cpu(), access, engine)

    def roll_out() -> Rollout:
        rollout, _ = policy.sample(
            [user("Hi")] * 2, max_new_tokens=NEW, temperature=1.0, batch_rows=2,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return rollout

    expected = ["hand over, gathered=True", "generate, gathered=False"]
    first = roll_out()
    assert recorded.calls == expected
    shake(model, 1)
    assert lists(roll_out()) != lists(first)  # nobody had to say that the weights changed
    policy.hand_over()  # by somebody who wants to know how long it takes
    roll_out()
    assert recorded.calls == 3 * expected


@needs_vllm
@pytest.mark.slow
class TestHandingOver:
    def test_the_engine_follows_weights_that_changed_in_place(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        before = sample(engine, model, prompts)
        llm = engine._llm
        for seed in range(3):
            shake(model, seed)
            after = sample(engine, model, prompts)
            assert_same(after, locally(model, prompts))
            assert lists(after) != lists(before)
            before = after
        assert engine._llm is llm  # no new engine

    def test_every_single_weight_arrives(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        """One parameter after the other, from a large matrix to a norm's scale."""
        sample(engine, model, prompts)
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)))
            rollout = sample(engine, model, prompts)
            assert rollout.sampled_logp is not None
            expected = torch.cat(own_logp(model, rollout, 1.0))
            torch.testing.assert_close(
                torch.cat(rollout.sampled_logp), expected, atol=1e-3, rtol=1e-3, msg=name
            )

    def test_an_untied_output_layer_arrives(
        self, engines: Engines, tmp_path: Path, prompts: list[Tensor]
    ) -> None:
        untied = load_causal_lm(
            written(tmp_path, head_dim=32, tie_word_embeddings=False), TINY, torch.float32
        )
        scale(untied, 6.0)
        shake(untied, 5)
        engines.close()
        assert_same(sample(engines.get(), untied, prompts), locally(untied, prompts))
        engines.close()

    def test_a_prompt_that_was_cached_is_read_anew(self, engine: Vllm, model: PreTrainedModel) -> None:
        """Longer than the cache's blocks, so that an equal prompt would be taken from it."""
        long = [torch.randint(0, 259, (300,), generator=torch.Generator().manual_seed(0))]
        sample(engine, model, long)
        shake(model, 1)
        assert_same(sample(engine, model, long), locally(model, long))

    def test_an_adapter_is_folded_in_and_the_model_stays_as_it_is(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        base = lists(sample(engine, model, prompts))
        attach(model, PeftConfig(method="lora", rank=4, alpha=8))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        places = {name: value.data_ptr() for name, value in model.named_parameters()}
        rollout = sample(engine, model, prompts)
        assert_same(rollout, locally(model, prompts))
        assert lists(rollout) != base
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert places == {name: value.data_ptr() for name, value in model.named_parameters()}

    def test_two_policies_take_turns(
        self, engine: Vllm, model: PreTrainedModel, directory: Path, prompts: list[Tensor]
    ) -> None:
        other = load_causal_lm(directory, TINY, torch.float32)
        scale(other, 6.0)
        shake(other, 9)
        for each in (model, other, model):
            assert_same(sample(engine, each, prompts), locally(each, prompts))

    def test_bf16_weights_stay_bf16(self, engines: Engines, directory: Path, prompts: list[Tensor]) -> None:
        """Rounding changes tokens of a random model; the distribution is the same within bf16's precision."""
        model = load_causal_lm(directory, TINY, torch.bfloat16)
        for seed in range(2):
            shake(model, seed)
            rollout = sample(engines.get(torch.bfloat16), model, prompts, temperature=1.0)
            assert rollout.sampled_logp is not None
            expected = torch.cat(own_logp(model, rollout, 1.0)).float()
            assert (torch.cat(rollout.sampled_logp) - expected).abs().mean() < 0.02


@needs_vllm
@pytest.mark.slow
class TestRefusals:
    def test_broken_weights_are_told(
        self, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        with torch.no_grad():
            model.model.norm.weight[3] = float("nan")
        for temperature in (0.0, 1.0):
            with pytest.raises(ConfigError, match="logits are not finite"):
                sample(engine, model, prompts, temperature=temperature)

    def test_a_model_that_vllm_cannot_run(self, engines: Engines, tiny_model: Path) -> None:
        engines.close()
        model = load_causal_lm(tiny_model, TINY, torch.float32)
        with pytest.raises(ConfigError, match=r"vLLM cannot run .*head_dim=16.*generation=local"):
            engines.get().hand_over(model)
        engines.close()

    def test_weights_that_vllm_leaves_as_they_were(self, engine: Vllm, model: PreTrainedModel) -> None:
        engine.hand_over(model)
        delattr(model.model, "norm")
        with pytest.raises(ConfigError, match=r"1 weights, such as model.norm.weight"):
            engine.hand_over(model)

    def test_what_goes_wrong_on_our_side_is_no_refusal(
        self, engines: Engines, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        errors = [torch.OutOfMemoryError("CUDA out of memory"), KeyError("a bug")]

        def failing(model: PreTrainedModel, gathered: Gather) -> Iterator[tuple[str, Tensor]]:
            yield next(iter(merged_weights(model)))
            raise errors[-1]

        engine = engines.get()
        monkeypatch.setattr("rlhf.models.peft.attach.merged_weights", failing)
        while errors:
            with pytest.raises(type(errors[-1])) as raised:
                engine.hand_over(model)
            assert raised.value is errors.pop()
        engines.close()

    def test_a_cache_that_is_too_small_for_one_context(
        self, engines: Engines, model: PreTrainedModel
    ) -> None:
        with pytest.raises(ConfigError, match=r"vLLM cannot run .*KV cache.*vllm\.kv_cache_gib"):
            engines.get(kv_cache_gib=0.0005).hand_over(model)
        engines.close()

    def test_a_context_that_is_too_short(
        self, engines: Engines, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        with pytest.raises(ConfigError, match=r"vllm.max_model_len=32: .* 42 tokens.* accepts 32"):
            sample(engines.get(max_model_len=32), model, prompts)
