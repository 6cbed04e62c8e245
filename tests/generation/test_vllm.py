"""vLLM against the local engine, with weights handed over in place; and what is said where it is missing.

`make test-vllm` runs all of it, in an environment of its own with vLLM for CPUs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from real_processes import RealChain
from small_chain import Chain
from small_job import on_cpu
from torch import Tensor, distributed
from transformers import PreTrainedModel

from rlhf.config import ConfigError, PeftConfig
from rlhf.data.schema import Message
from rlhf.generation.local import generate
from rlhf.generation.policy import Policy
from rlhf.generation.vllm import Vllm, VllmConfig
from rlhf.models import load
from rlhf.models.adapters import attach
from rlhf.models.load import ModelConfig, load_causal_lm, load_tokenizer
from rlhf.rl.rollout import Rollout

LENGTHS = (5, 17, 1, 9, 30, 9)
NEW = 12
SMALL = VllmConfig(kv_cache_gib=0.03, max_num_seqs=64, max_model_len=None, enforce_eager=True)
CHAIN = ("generation=vllm", "vllm.kv_cache_gib=0.03")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def written(directory: Path, **changes: int) -> Path:
    """The tiny model with changes; its own heads are too small for vLLM's kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setitem(load.TINY, name, value)
        load._write_tiny(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tiny32"), head_dim=32)


@pytest.fixture
def model(directory: Path) -> PreTrainedModel:
    """Sharper than the tiny model, whose logits hardly differ."""
    found = load_causal_lm(directory, ModelConfig(kind="tiny"), torch.float32)
    scale(found, 6.0)
    return found


@torch.no_grad()
def scale(model: PreTrainedModel, factor: float) -> None:
    for parameter in model.parameters():
        parameter.mul_(factor if parameter.dim() > 1 else 1.0)


@torch.no_grad()
def shake(model: PreTrainedModel, seed: int) -> None:
    """Change every weight in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class Engines:
    """One at a time: closing one ends what another would need."""

    def __init__(self) -> None:
        self.current: Vllm | None = None
        self.made: tuple[Any, ...] = ()

    def get(self, dtype: torch.dtype = torch.float32, **changes: Any) -> Vllm:
        """The one that is there where it is as wanted."""
        wanted = (dtype, changes)
        if self.current is None or self.made != wanted:
            self.close()
            self.current = Vllm(SMALL.model_copy(update=changes), on_cpu(dtype=dtype))
            self.made = wanted
        return self.current

    def close(self) -> None:
        if self.current is not None:
            self.current.close()
            self.current = None


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    found = Engines()
    yield found
    found.close()


@pytest.fixture
def engine(engines: Engines) -> Vllm:
    return engines.get()


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 259, (length,), generator=generator) for length in LENGTHS]


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def locally(model: PreTrainedModel, prompts: Sequence[Tensor], **changes: Any) -> Rollout:
    settings: dict[str, Any] = {
        "max_new_tokens": NEW, "temperature": 0.0, "stop_ids": [], "pad_id": 0, "batch_rows": 64,
        "uniform_BR": uniform(len(prompts), NEW),
    }  # fmt: skip
    return generate(model, prompts, **(settings | changes))


def sample(engine: Vllm, model: PreTrainedModel, prompts: Sequence[Tensor], **changes: Any) -> Rollout:
    settings: dict[str, Any] = {
        "max_new_tokens": NEW, "temperature": 0.0, "stop_ids": [], "uniform_BR": uniform(len(prompts), NEW)
    }  # fmt: skip
    engine.hand_over(model)
    return engine.generate(prompts, **(settings | changes))


def lists(rollout: Rollout) -> list[list[int]]:
    return [ids.tolist() for ids in rollout.response_ids]


@torch.no_grad()
def own_logp(model: PreTrainedModel, rollout: Rollout, temperature: float) -> list[Tensor]:
    """The model's log-probabilities of each response, row by row."""
    found = []
    for prompt, response in zip(rollout.prompt_ids, rollout.response_ids, strict=True):
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        found.append((logits / temperature).log_softmax(-1).gather(-1, response[:, None]).squeeze(-1))
    return found


def assert_same(first: Rollout, second: Rollout) -> None:
    assert lists(first) == lists(second)
    assert first.stopped.tolist() == second.stopped.tolist()
    assert first.sampled_logp is not None
    assert second.sampled_logp is not None
    torch.testing.assert_close(
        torch.cat(first.sampled_logp), torch.cat(second.sampled_logp), atol=1e-4, rtol=0
    )


class Recorded:
    """In vLLM's place: notes who calls it, and answers with the local engine."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.inside = False
        self.model: PreTrainedModel | None = None

    def holds(self, model: PreTrainedModel) -> bool:
        return self.model is model

    def hand_over(self, model: PreTrainedModel) -> None:
        self.calls.append(f"hand over, whole={self.inside}")
        self.model = model

    def generate(self, prompts: Sequence[Tensor], **settings: Any) -> Rollout:
        self.calls.append(f"generate, whole={self.inside}")
        assert self.model is not None
        rollout = generate(self.model, prompts, pad_id=0, batch_rows=64, **settings)
        self.model = None
        return rollout

    @contextmanager
    def whole(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False


def test_weights_are_handed_over_once_for_each_rollout_and_gathered_only_then(
    directory: Path, model: PreTrainedModel
) -> None:
    recorded = Recorded()
    tokenizer = load_tokenizer(directory, ModelConfig(kind="tiny"))
    policy = Policy(model, tokenizer, on_cpu(), recorded.whole, recorded)  # type: ignore[arg-type]

    def roll_out() -> Rollout:
        rollout, _ = policy.sample(
            [[Message(role="user", content="Hi")]] * 2, max_new_tokens=NEW, temperature=1.0, batch_rows=2,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return rollout

    expected = ["hand over, whole=True", "generate, whole=False"]
    first = roll_out()
    assert recorded.calls == expected
    shake(model, 1)
    assert lists(roll_out()) != lists(first)  # nobody had to say that the weights changed
    policy.hand_over()  # by somebody who wants to know how long it takes
    roll_out()
    assert recorded.calls == 3 * expected


def test_where_vllm_is_missing_one_line_says_so_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without_vllm(importlib.util.find_spec))
    outcome = Chain(tmp_path).run("generation=vllm")
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("Error: generation=vllm needs vLLM: pip install 'rlhf[vllm]'")
    assert not (tmp_path / "store" / "prepare").exists()
    assert Chain(tmp_path).run("generation=vllm", "stage=reward").code == 0  # which samples nothing


def without_vllm(find: Callable[[str], Any]) -> Callable[..., Any]:
    return lambda name, *rest: None if name == "vllm" else find(name, *rest)


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
            return [
                torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
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
            written(tmp_path, head_dim=32, tie_word_embeddings=False), ModelConfig(kind="tiny"), torch.float32
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
        other = load_causal_lm(directory, ModelConfig(kind="tiny"), torch.float32)
        scale(other, 6.0)
        shake(other, 9)
        for each in (model, other, model):
            assert_same(sample(engine, each, prompts), locally(each, prompts))

    def test_bf16_weights_stay_bf16(self, engines: Engines, directory: Path, prompts: list[Tensor]) -> None:
        """Rounding changes tokens of a random model; the distribution is the same within bf16's precision."""
        model = load_causal_lm(directory, ModelConfig(kind="tiny"), torch.bfloat16)
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
        model = load_causal_lm(tiny_model, ModelConfig(kind="tiny"), torch.float32)
        with pytest.raises(ConfigError, match=r"vLLM cannot run .*head_dim=16.*generation=local"):
            engines.get().hand_over(model)
        engines.close()

    def test_weights_that_vllm_leaves_as_they_were(self, engine: Vllm, model: PreTrainedModel) -> None:
        engine.hand_over(model)
        delattr(model.model, "norm")
        with pytest.raises(ConfigError, match=r"1 weights, such as model.norm.weight"):
            engine.hand_over(model)

    def test_a_cache_that_is_too_small_for_one_context(
        self, engines: Engines, model: PreTrainedModel
    ) -> None:
        with pytest.raises(ConfigError, match=r"vLLM cannot run .*KV cache.*vllm\.kv_cache_gib"):
            engines.get(kv_cache_gib=0.0005).hand_over(model)
        engines.close()

    def test_a_context_that_is_too_short(
        self, engines: Engines, model: PreTrainedModel, prompts: list[Tensor]
    ) -> None:
        with pytest.raises(ConfigError, match=r"vllm.max_model_len=32: .* 42 tokens.* takes 32"):
            sample(engines.get(max_model_len=32), model, prompts)


@needs_vllm
@pytest.mark.slow
def test_the_chain_samples_with_vllm(tmp_path: Path, directory: Path, engines: Engines) -> None:
    engines.close()
    chain = Chain(tmp_path)
    base = ("model.kind=local", f"+model.path={directory}", "precision=fp32", "ppo.temperature=1.0")
    outcome = chain.run(*base, *CHAIN)
    assert outcome.code == 0, outcome.err
    assert set(outcome.statuses.values()) == {"ran"}
    lines = [json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "ppo/engine_mismatch" in line]
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["ppo/engine_mismatch_max"] < 1e-4  # fp32; another engine, so never exactly 0
        assert step["ppo/seconds_sync"] > 0
        assert step["ppo/policy_loss"] != 0
    samples = (outcome.artifact("generate") / "responses.jsonl").read_text().splitlines()
    assert len(samples) == 8

    again = chain.run(*base, *CHAIN, "vllm.max_num_seqs=3")
    assert set(again.statuses.values()) == {"reused"}
    local = chain.run(*base, "stage=evaluate")
    assert {name: status for name, status in local.statuses.items() if status == "ran"}.keys() == {
        "generate", "ppo", "evaluate",
    }  # fmt: skip
    other = (local.artifact("generate") / "responses.jsonl").read_text().splitlines()
    assert other != samples


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "zero3", "fsdp2"])
def test_each_of_two_ranks_has_its_engine(tmp_path: Path, directory: Path, zero: str) -> None:
    """The mismatch says whether each rank sampled from the gathered, trained weights."""
    if zero == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    chain = RealChain(tmp_path)
    out, _ = chain.run(
        "two", *CHAIN, "model.kind=local", f"+model.path={directory}", "launch.processes=2", f"zero={zero}",
        "ppo.peft=lora", "ppo.steps=3", "ppo.optim.lr=1e-2",
    )  # fmt: skip
    assert "2 ranks" in out
    lines = (tmp_path / "runs" / "two" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    mismatches = [line["ppo/engine_mismatch_max"] for line in found if "ppo/engine_mismatch_max" in line]
    assert len(mismatches) == 3
    assert max(mismatches) < 1e-4
    assert max(line.get("ppo/approximate_kl", 0) for line in found) > 1e-4  # so the policy did move


@needs_vllm
@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, directory: Path) -> None:
    """On one CPU bit for bit, though vLLM does not promise it."""
    chain = RealChain(tmp_path)
    overrides = (
        *CHAIN, "model.kind=local", f"+model.path={directory}", "ppo.peft=lora", "ppo.optim.lr=1e-2",
        "checkpoint.every_steps=1",
    )  # fmt: skip
    chain.run("whole", *overrides)
    process = chain.start_until("ppo", 2, "killed", *overrides)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    out, _ = chain.run("killed", *overrides)
    assert "ppo: goes on from step" in out
    assert chain.weights("killed", "ppo") == chain.weights("whole", "ppo")
    assert chain.curve("killed") == chain.curve("whole")
