"""The chain with generation=vllm; and what it says where vLLM is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import GROUPS, Chain, RealChain, ranks_of
from helpers.vllm import (
    CHAIN,
    Engines,
    needs_vllm,
)


def test_where_vllm_is_missing_one_line_says_so_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", without_vllm(importlib.util.find_spec))
    outcome = Chain(tmp_path).run("generation=vllm")
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith(
        "Error: generation=vllm needs vLLM: pip install -c constraints-vllm.txt -e '.[vllm]'"
    )
    assert not (tmp_path / "store" / "prepare").exists()
    assert Chain(tmp_path).run("generation=vllm", "stage=reward").code == 0  # which samples nothing


def without_vllm(find: Callable[[str], Any]) -> Callable[..., Any]:
    return lambda name, *rest: None if name == "vllm" else find(name, *rest)


@needs_vllm
@pytest.mark.slow
def test_the_chain_samples_with_vllm(tmp_path: Path, directory: Path, engines: Engines) -> None:
    engines.close()
    chain = Chain(tmp_path)
    base = ("model.kind=local", f"+model.path={directory}", "precision=fp32", "ppo.temperature=1.0")
    small = "vllm.kv_cache_gib=0.0005"  # too small for the model's context, not for what is sampled
    outcome = chain.run(*base, *CHAIN, small)
    assert outcome.code == 0, outcome.err
    assert set(outcome.statuses.values()) == {"ran"}
    lines = [json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line and "ppo/engine_mismatch" in line]
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
def test_groups_of_answers_are_sampled_with_vllm(tmp_path: Path, directory: Path, engines: Engines) -> None:
    """Several answers to a prompt share its prefill, and are different ones."""
    engines.close()
    chain = Chain(tmp_path)
    (tmp_path / "letters.py").write_text(
        "def count(prompts, responses):\n    return [sum(map(str.isalpha, each)) for each in responses]\n"
    )
    outcome = chain.run(
        *CHAIN, *GROUPS, "grpo.steps=2", "grpo.init=base", "ppo.reward=python:letters:count",
        "model.kind=local", f"+model.path={directory}", "precision=fp32",
        "ppo.score.normalize=none", "grpo.optim.lr=1e-2",
    )  # fmt: skip
    assert outcome.code in (0, 3), outcome.err
    assert outcome.statuses["grpo"] == "ran"
    lines = [json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line and "grpo/engine_mismatch" in line]
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["grpo/engine_mismatch_max"] < 1e-4
        assert step["grpo/seconds_sync"] > 0
        assert step["grpo/group_deviation"] > 0 and step["grpo/grad_norm"] > 0
    assert steps[1]["grpo/kl_k3"] > 1e-4  # it learned, and vLLM sampled from what it became


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "tensor_parallel"), [("none", 1), ("zero3", 1), ("none", 2), ("zero3", 2), ("fsdp2", 2)]
)
def test_two_ranks_have_an_engine_each_or_one_together(
    tmp_path: Path, directory: Path, zero: str, tensor_parallel: int
) -> None:
    """The mismatch says whether they sampled from the whole, trained weights."""
    if zero == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    chain = RealChain(tmp_path)
    out, _ = chain.run(
        "two", *CHAIN, "model.kind=local", f"+model.path={directory}", "launch.processes=2", f"zero={zero}",
        f"vllm.tensor_parallel={tensor_parallel}", "ppo.peft=lora", "ppo.steps=3", "ppo.optim.lr=1e-2",
    )  # fmt: skip
    assert "2 ranks" in out
    lines = (tmp_path / "runs" / "two" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    mismatches = [line["ppo/engine_mismatch_max"] for line in found if "ppo/engine_mismatch_max" in line]
    assert len(mismatches) == 3
    assert max(mismatches) < 1e-4
    assert max(line.get("ppo/approximate_kl", 0) for line in found) > 1e-4  # so the policy did move


ANSWERS = {"generate": "responses", "evaluate": "responses", "compare": "responses"}
"""Stage -> the file of its answers."""


@needs_vllm
@pytest.mark.slow
def test_ranks_that_share_an_engine_answer_in_every_stage_what_one_rank_answers(
    tmp_path: Path, directory: Path
) -> None:
    """The SFT model is trained once, by one rank."""
    chain = RealChain(tmp_path)
    found = []
    for ranks, zero in ((1, "none"), (2, "none"), (2, "fsdp2"), (2, "zero3")):
        chain.run(
            "answers", *CHAIN, "stage=[generate,evaluate,compare]", "force=[generate,evaluate,compare]",
            "model.kind=local", f"+model.path={directory}", "ppo.reward=vader", "sft.epochs=1",
            "evaluate.policies=[base,sft]", "evaluate.gates.win_rate=null", "compare.artifacts=[sft]",
            "compare.methods=[zero_shot]", "compare.num_questions=5", "compare.max_new_tokens=6",
            f"launch.processes={ranks}", f"vllm.tensor_parallel={ranks}", f"zero={zero}",
        )  # fmt: skip
        artifacts = chain.directory / "runs" / "answers" / "artifacts"
        lines = {
            stage: (artifacts / stage / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
            for stage, file in ANSWERS.items()
        }
        found.append({stage: [said(json.loads(line)) for line in each] for stage, each in lines.items()})
    for stage, answers in found[0].items():
        assert len(set(map(str, answers))) > 1, stage
        assert all(each[stage] == answers for each in found), stage


def said(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says in words: figures may differ in the last bits."""
    return {name: value for name, value in row.items() if not isinstance(value, float)}


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
    assert "ppo: continues from step" in out
    assert chain.weights("killed", "ppo") == chain.weights("whole", "ppo")
    assert chain.curve("killed") == chain.curve("whole")


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_rank_that_hangs_is_named(tmp_path: Path, directory: Path, tensor_parallel: int) -> None:
    """While it samples, most probably: learning takes no time here."""
    overrides = (
        *CHAIN, "model.kind=local", f"+model.path={directory}", "launch.processes=2", "ppo.steps=300",
        f"vllm.tensor_parallel={tensor_parallel}", "checkpoint.every_steps=1", "distributed.timeout=15",
        "ppo.reward=vader", "ppo.critic.init=sft", "ppo.score.normalize=none", "sft.epochs=1",
        "ppo.max_new_tokens=400",
    )  # fmt: skip
    process = RealChain(tmp_path).start_until("ppo", 1, "hangs", *overrides)
    os.kill(ranks_of(process.pid)[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 0 waited for rank 1 (last seen " in err, err
