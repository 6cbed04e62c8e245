"""A stage of the user's own that samples from the model that it trains: toy_distill.py and its YAML."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.chains import Chain, Outcome, RealChain, kill, newest_step

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
MOUNTED = ("+stages@distill=distill", "gates=warn", f"--config-dir={HERE / 'conf'}")
SHARDED = (
    "stage=distill",
    "distill.peft=lora",
    "zero=fsdp2",
    "launch.processes=2",
    "checkpoint.every_steps=1",
)


def test_the_student_comes_nearer_to_its_teacher(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, _ = finished_chain
    outcome = chain.run(
        *MOUNTED,
        "stage=distill",
        "sft.optim.lr=1e-2",
        "sft.epochs=20",
        "distill.epochs=60",
        "distill.optim.lr=3e-3",
        "distill.peft=none",
    )
    assert outcome.code == 0, outcome.err
    metrics = outcome.summary["stages"]["distill"]["metrics"]
    assert 0.0 < metrics["distill/kl"] < 0.7 * metrics["distill/kl_before"]


def test_it_is_compared_with_the_others(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, _ = finished_chain
    outcome = chain.run(
        *MOUNTED, "stage=[distill,ppo,dpo,compare]", "compare.artifacts=[sft,ppo,dpo,distill]",
        "compare.num_questions=2", "compare.max_new_tokens=4",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = outcome.summary["stages"]["compare"]["metrics"]
    assert {f"compare/rouge_l/{name}" for name in ("sft", "ppo", "dpo", "distill")} <= {*found}


def test_two_ranks_go_on_after_a_kill_bit_for_bit(tmp_path: Path) -> None:
    chain = RealChain(tmp_path)
    shutil.copy(HERE / "toy_distill.py", tmp_path)
    chain.run("whole", *SHARDED, *MOUNTED)
    kill(chain.start_until("distill", 2, "killed", *SHARDED, *MOUNTED))
    assert newest_step(chain.store("killed"), "distill") >= 2
    out, _ = chain.run("killed", *SHARDED, *MOUNTED)
    assert "sft reused" in out and "distill runs" in out
    assert chain.weights("killed", "distill") == chain.weights("whole", "distill")
