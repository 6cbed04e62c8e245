"""What the benchmark of a PPO step prints: operations, padding, refusals, and the whole of it once."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_work import Work
from ppo_step import check, main, operations
from run_rlhf import Positions
from torch import Tensor
from transformers import LlamaConfig

from rlhf.models.base import ModelConfig
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import pack_sequences
from rlhf.models.value_head import ActorCritic, load_scalar_model

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ppo_step.py"
TRUNK = 3 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 8 * 16 + 8 * 16 + 16 * 8)
"""Three layers' queries, keys, values, output, gate, up, down."""
HEAD = 8 * 10
STEP = {"prompt_tokens": 5.0, "response_tokens": 7.0}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A config alone: hidden size 8, two heads of 4, one of keys and values, vocabulary of 10."""
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=10,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return tmp_path


def operations_of(
    model: Path, *, epochs: int, peft: str, micro_batch_tokens: int, algorithm: str = "ppo"
) -> dict[str, float]:
    work = {"model": str(model), "epochs": epochs, "peft": peft, "algorithm": algorithm}
    return operations(work, STEP, micro_batch_tokens, positions_a_token=1.2)


def test_a_weight_and_token_are_two_operations_and_the_head_sees_responses_alone(model: Path) -> None:
    found = operations_of(model, epochs=1, peft="none", micro_batch_tokens=12)
    forward = 2 * TRUNK * 12
    assert found["generate"] == found["reference"] == forward + 2 * HEAD * 7
    assert found["reward"] == forward
    assert found["score"] == 2 * forward + 2 * HEAD * 7  # policy and critic


def test_what_rows_begin_with_alike_is_worked_on_once(model: Path) -> None:
    work = {"model": str(model), "epochs": 1, "peft": "none", "algorithm": "ppo"}
    assert operations(work, STEP, 12, positions_a_token=0.75)["reward"] == 2 * TRUNK * 9


@pytest.mark.parametrize(
    ("epochs", "peft", "micro_batch_tokens", "passes"),
    [
        (1, "none", 12, 4),  # the pass of `score` is learned from: backward alone, for inputs and weights
        (1, "none", 11, 6),  # it does not fit, and is rebuilt
        (3, "none", 12, 4 + 6 + 6),
        (1, "lora", 12, 2),  # the weights are frozen
        (2, "lora", 11, 4 + 4),
    ],
)
def test_operations_of_the_update(
    model: Path, epochs: int, peft: str, micro_batch_tokens: int, passes: int
) -> None:
    found = operations_of(model, epochs=epochs, peft=peft, micro_batch_tokens=micro_batch_tokens)
    assert found["update"] == passes * (2 * TRUNK * 12 + HEAD * 7)  # of 2: policy and critic, one head


def test_without_a_critic_the_policy_alone_scores_and_learns(model: Path) -> None:
    found = operations_of(model, epochs=1, peft="none", micro_batch_tokens=12, algorithm="grpo")
    assert found["score"] == found["reference"]
    assert found["update"] == 4 * (TRUNK * 12 + HEAD * 7)


@pytest.mark.parametrize(
    ("attention", "positions"),
    [("sdpa", 2 * 3 * 19 + 2 * 5), ("auto", 2 * 19 + 5)],  # packed: all begin alike
    ids=["padded", "packed"],
)
def test_positions_are_counted_over_passes_of_any_number(
    tiny_model: Path, attention: str, positions: int
) -> None:
    config = ModelConfig(kind="tiny", attention=attention)
    policy = load_causal_lm(tiny_model, config, torch.float32)
    model = ActorCritic(policy, load_scalar_model(tiny_model, config, torch.float32, new_head=True))
    counted = Positions(model)
    for lengths in ([20, 2, 3], [20, 2, 3], [6, 4]):
        rows = [torch.arange(1, length + 1) for length in lengths]
        batch = pack_sequences(*split(rows), torch.device("cpu"))
        for half in ("policy", "critic"):
            model(half, batch)
    real = 2 * (20 + 2 + 3) + (6 + 4)
    assert (counted.real_tokens, counted.positions) == (real, positions)
    assert counted.a_token == pytest.approx(positions / real)


def split(rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The first token as prompt, the others as response."""
    return [row[:1] for row in rows], [row[1:] for row in rows]


@pytest.mark.parametrize(
    ("honour_stop", "pad_id", "tokens"),
    [
        (True, 2, (3 + 1) + 8 + (0 + 1)),  # the stop token is padding too: not among those told
        (True, 0, 3 + 8 + 0),
        (False, 2, 8 + 8 + 8),  # whatever is in them
    ],
)
def test_a_peers_response_tokens_include_the_stop_token(honour_stop: bool, pad_id: int, tokens: int) -> None:
    known: dict[str, Any] = {field.name: 0 for field in fields(Work)}
    work = Work(**{**known, "new_tokens": 8, "stop_id": 2, "honour_stop": honour_stop})
    assert work.response_tokens([3, 8, 0], pad_id) == tokens


def work_with(*overrides: str) -> dict[str, object]:
    return {
        "model": "absent", "reward": "absent", "precision": "auto", "seed": 0, "prompts": [[[], []]],
        "minibatch_episodes": 2, "epochs": 1, "new_tokens": 4, "temperature": 1.0, "lr": 1e-6,
        "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "clip": 0.2, "value_clip": 0.2, "peft": "none",
        "overrides": overrides, "algorithm": "ppo", "answers": 1,
    }  # fmt: skip


@pytest.mark.parametrize("override", ["zero=zero2", "generation=vllm"])
def test_what_a_benchmark_would_leave_out_is_refused(override: str) -> None:
    with pytest.raises(SystemExit, match=f"^{override}: the benchmarks run one process"):
        check(work_with(override), None)


def test_a_peer_on_the_cpu_is_not_compared_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # it is refused before a GPU is touched
    check(work_with("device=cpu"), "trl")
    check(work_with("device=auto"), None)
    with pytest.raises(SystemExit, match=r"^device=auto: .* Use device=cpu\.$"):
        check(work_with("device=cpu", "device=auto"), "trl")


def test_torchtune_is_refused_an_adapter_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--peft", "lora", "--peer", "torchtune", "--peer-python", "python"])
    assert "--peft none" in capsys.readouterr().err


@pytest.mark.slow
def test_the_tiny_model_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--model", "tiny", "--steps", "2", "--directory", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout[result.stdout.index(" phase ") :].splitlines()
    assert [line.split()[0] for line in lines[:9]] == [
        "phase", "generate", "reward", "reference", "score", "advantages", "update", "optimizer", "step",
    ]  # fmt: skip
    seconds = [float(line.split()[1]) for line in lines[1:9]]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), rel=0.2, abs=0.1)
    assert lines[9] == "sampled tokens per step (median, mean): 768, 768"  # 16 episodes of 48
    assert re.search(r"0\.[6-9]\d positions per token", lines[10])
    assert re.search(r"peak memory 0\.\d+ GB, matmul peak [1-9]\d* GFLOP/s; (bf16|fp32) on ", lines[10])
