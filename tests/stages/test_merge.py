"""Weights between the base model and a tuned one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.chains import Chain, Outcome
from helpers.experiments import stage_with
from helpers.jobs import SmallJob, run_in, small_job, tiny_base
from rlhf.config import ConfigError
from rlhf.stages.merge import MergeStage


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, every weight moved by 0.25."""
    directory = tmp_path_factory.mktemp("tuned")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    model.save_pretrained(directory)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(directory)
    return directory


def merge(directory: Path, base: Path, tuned: Path, alpha: float) -> SmallJob:
    stage = stage_with(MergeStage, policy="ppo", alpha=alpha)
    job = small_job("merge", directory, tiny_base(base), {"ppo": tuned})
    run_in(stage, job)
    return job


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_every_weight_is_on_the_line(tiny_model: Path, tuned: Path, tmp_path: Path, alpha: float) -> None:
    job = merge(tmp_path / "job", tiny_model, tuned, alpha)
    base, end, found = (
        dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        for path in (tiny_model, tuned, job.directory)
    )
    assert base.keys() == found.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, base[name] + alpha * 0.25, atol=1e-6, rtol=0)
        assert alpha != 1 or torch.equal(weight, end[name])  # to the bit
        assert alpha != 0 or torch.equal(weight, base[name])
    count = sum(weight.numel() for weight in base.values())
    norm = math.sqrt(sum(float(weight.detach().double().square().sum()) for weight in base.values()))
    assert job.summary["relative_change"] == pytest.approx(alpha * 0.25 * math.sqrt(count) / norm, rel=1e-4)


def test_text_goes_in_as_into_the_tuned_model(tiny_model: Path, tuned: Path, tmp_path: Path) -> None:
    job = merge(tmp_path / "job", tiny_model, tuned, 0.5)
    tokenizer = AutoTokenizer.from_pretrained(job.directory)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_lies_between_the_two(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"merge\.alpha="):
        stage_with(MergeStage, alpha=alpha)


def test_a_merged_policy_is_judged_beside_the_others(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, _ = finished_chain
    policies = (
        "stage=evaluate", "evaluate.policies=[base,sft,merge]", "evaluate.reward=null",
        "evaluate.gates.win_rate=null",
    )  # fmt: skip
    half, whole = (chain.run(*policies, f"merge.alpha={alpha}") for alpha in (0.4, 1.0))
    assert half.code == whole.code == 0, half.err + whole.err
    assert half.statuses == {"prepare": "reused", "sft": "reused", "merge": "ran", "evaluate": "ran"}
    losses = {
        name: half.summary["stages"]["evaluate"]["metrics"][f"evaluate/task_loss/{name}"]
        for name in ("base", "merge", "sft")
    }
    assert losses["base"] > losses["merge"] > losses["sft"]
    measured = whole.summary["stages"]["evaluate"]["metrics"]
    assert measured["evaluate/task_loss/merge"] == measured["evaluate/task_loss/sft"]
    assert measured["evaluate/task_gain"] == measured["evaluate/task_gain/merge"]
    report = (half.directory / "report.md").read_text()
    assert "| 4 prompts | base | SFT | merged |" in report
    assert "- Merged model: `artifacts/merge`" in report


def test_an_adapter_is_put_into_the_weights_that_it_belongs_to(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    outcome = chain.run("stage=merge", "sft.peft=lora", "merge.alpha=1.0")
    assert outcome.code == 0, outcome.err
    tuned, merged = (
        dict(AutoModelForCausalLM.from_pretrained(outcome.artifact(name)).named_parameters())
        for name in ("sft", "merge")
    )
    assert tuned.keys() == merged.keys()
    assert all(torch.equal(weight, tuned[name]) for name, weight in merged.items())


@pytest.mark.parametrize("method", ["adapter", "prefix"])
def test_what_is_no_weight_of_the_model_is_refused_before_it_is_trained(tmp_path: Path, method: str) -> None:
    outcome = Chain(tmp_path).run("stage=merge", f"sft.peft={method}")
    assert outcome.code == 2
    assert f"merge.policy=sft: sft.peft={method} cannot be merged" in outcome.err
    assert "sft.peft=none or lora or dora" in outcome.err
