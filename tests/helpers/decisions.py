"""The content of decision.json, written by hand."""

from __future__ import annotations

from typing import Any

FIGURES = (
    "gain", "gain_over_base", "quality", "share", "train_seconds", "seconds_p50", "seconds_p95",
    "cost_per_thousand", "memory_bytes", "retention_perplexity_ratio", "question_accuracy_change",
    "length_ratio", "stop_rate", "break_even",
)  # fmt: skip


def estimated(value: float, half: float, rows: int = 64) -> dict[str, Any]:
    """An estimate with a symmetric interval."""
    return {"value": value, "low": value - half, "high": value + half, "rows": rows}


def candidate(name: str, state: str, *, trained: bool = True, **known: Any) -> dict[str, Any]:
    """A candidate of which only some figures are known."""
    empty: dict[str, Any] = dict.fromkeys(FIGURES)
    words = {"name": name, "title": name, "trained": trained, "state": state, "why": "", "limits_over": []}
    return {**words, **empty, **known}


def pilot(name: str, share: float, start: float, seconds: float | None, **known: Any) -> dict[str, Any]:
    """A finished pilot on the questions that choose."""
    run = f"decision-{name}-{100 * share:.0f}"
    usual = {"part": "choosing", "seed": 0, "predicted": 55.0, "run": run, "ended": "done"}
    return {"candidate": name, "share": share, "start": start, "seconds": seconds, **usual, **known}


def decided() -> dict[str, Any]:
    """A finished decision with five candidates: LoRA wins."""
    lora = candidate(
        "sft_lora", "winner", title="SFT, LoRA", share=1.0, quality=estimated(0.71, 0.09),
        gain=estimated(0.24, 0.12, 32), gain_over_base=estimated(0.4, 0.11, 32), train_seconds=301.0,
        seconds_p50=0.82, seconds_p95=1.31, cost_per_thousand=0.013, memory_bytes=2.1e9,
        retention_perplexity_ratio=1.012, question_accuracy_change=-0.004, length_ratio=1.13,
        stop_rate=0.98, break_even={"value": 12_345.2, "low": 9_000.0, "high": "never", "rows": 16},
    )  # fmt: skip
    full = candidate(
        "sft", "finalist", title="SFT, all weights", share=1.0, quality=estimated(0.68, 0.1),
        gain=estimated(0.17, 0.13, 32), train_seconds=420.0, seconds_p50=0.81, seconds_p95=1.3,
        cost_per_thousand=0.0131, retention_perplexity_ratio=1.08, question_accuracy_change=-0.031,
        why="its gain may be too small", limits_over=["retention_perplexity_ratio"],
    )  # fmt: skip
    dpo = candidate(
        "dpo", "worse", title="DPO", share=0.5, quality=estimated(0.41, 0.1), train_seconds=180.0,
        cost_per_thousand=0.015, why="its interval lies below the best one's",
    )  # fmt: skip
    grpo = candidate(
        "grpo", "cut", title="GRPO", share=0.25, quality=estimated(0.55, 0.1), train_seconds=260.0,
        cost_per_thousand=0.017, why="the budget had no room for it",
    )  # fmt: skip
    ppo = candidate("ppo", "refused", title="PPO", why="it needs a reward model: set reward.path")
    base = candidate(
        "base", "compared", trained=False, title="base", quality=estimated(0.3, 0.1), seconds_p50=0.8,
        cost_per_thousand=0.012,
    )  # fmt: skip
    few = candidate(
        "few_shot", "compared", trained=False, title="base, few-shot", quality=estimated(0.46, 0.1),
        seconds_p50=1.1, seconds_p95=1.9, cost_per_thousand=0.031,
    )  # fmt: skip
    pilots = [
        pilot("sft_lora", 0.25, 40.0, 75.0),
        pilot("sft", 0.25, 116.0, 105.0),
        pilot("dpo", 0.25, 222.0, 90.0),
        pilot("grpo", 0.25, 313.0, 260.0),
        pilot("sft_lora", 0.5, 574.0, 150.0),
        pilot("sft", 0.5, 725.0, 210.0),
        pilot("dpo", 0.5, 936.0, 95.0, ended="stopped"),
        pilot("sft_lora", 1.0, 1040.0, 300.0, part="sealed"),
        pilot("sft", 1.0, 1341.0, 359.0, part="sealed"),
    ]
    return {
        "name": "decision", "outcome": "ship",
        "sentences": [
            "Ship SFT, LoRA: it gains 0.24 (0.12 to 0.36) over few-shot, the best without training.",
            "It forgets little: perplexity on general texts rose by 1.2%.",
            "SFT, all weights may be as good, but forgets more.",
        ],
        "command": "python -m rlhf recipe=sft peft=lora sft.data=mine.jsonl sft.epochs=3 run_name=shipped",
        "artifact": "runs/decision-sft_lora-100/artifacts/sft", "judge": "gold score",
        "questions": {"choosing": 64, "sealed": 32}, "smallest_gain": 0.1, "seeds": 1,
        "budget": {"seconds": 1800.0, "spent": 1700.0}, "ended": "",
        "untrained": "few_shot", "winner": "sft_lora",
        "candidates": [base, few, full, lora, dpo, grpo, ppo], "pilots": pilots,
        "more": ["GRPO was cut at 25% of its length: 12 more minutes would train it to the end."],
    }  # fmt: skip


def begun() -> dict[str, Any]:
    """An unfinished decision: one pilot is done, one runs."""
    base = candidate("base", "compared", trained=False, quality=estimated(0.3, 0.1))
    lora = candidate(
        "sft_lora", "running", title="SFT, LoRA", share=0.25, quality=estimated(0.5, 0.1), train_seconds=75.0
    )
    return {
        **decided(), "outcome": None, "sentences": [], "command": None, "artifact": None, "winner": None,
        "untrained": None, "budget": {"seconds": 1800.0, "spent": 190.0}, "more": [],
        "candidates": [base, lora, candidate("dpo", "waiting", title="DPO"),
                       candidate("sft", "running", title="SFT, all weights")],
        "pilots": [pilot("sft_lora", 0.25, 40.0, 75.0), pilot("sft", 0.25, 116.0, None, ended=None)],
    }  # fmt: skip
