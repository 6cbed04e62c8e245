"""The files of a finished run, written by hand: what a page is made from."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.config import Bound
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.run import GateResult


def make_run(
    directory: Path, answer: str = "I love it.", num_prompts: int = 3, num_steps: int = 5, name: str = "demo"
) -> Path:
    """The files of a finished run, as its stages write them."""
    run = directory / "runs" / name
    store = directory / "store"
    metrics: dict[str, dict[str, float]] = {
        "prepare": {"sft_rows": 9.0},
        "sft": {"held_out_loss": 2.0},
        "reward": Sampled(0.2, 0.1, 0.3, 40).metrics("accuracy_over_baseline"),
        "ppo": {"kl": 3.0},
        "evaluate": {"prompts": float(num_prompts)},
    }
    for name, score in (("base", 0.1), ("sft", 0.2), ("ppo", 0.6)):
        metrics["evaluate"] |= {
            f"length_mean/{name}": 9.0, f"gold_mean/{name}": score, f"score_mean/{name}": score,
            f"perplexity/{name}": 20.0,
        }  # fmt: skip
    metrics["evaluate"] |= {"kl/ppo": 3.0, "kl/base": 0.5} | Sampled(0.4, 0.3, 0.5, 96).metrics(
        "gold_gain/ppo"
    )
    (run / "artifacts").mkdir(parents=True)
    stages = {}
    for name, each in metrics.items():
        artifact = store / name / "0123456789abcdef"
        artifact.mkdir(parents=True, exist_ok=True)
        (run / "artifacts" / name).symlink_to(artifact)
        manifest = {"hardware": "2 CPU cores, 2 ranks", "created": "2026-01-01", "git_revision": None}
        (artifact / "manifest.json").write_text(json.dumps(manifest))
        stages[name] = {
            "status": "reused" if name == "prepare" else "ran", "key": artifact.name,
            "artifact": str(artifact), "seconds": 71.2, "cost": {"seconds": 71.2, "peak_bytes": 2.0**30},
            "metrics": {f"{name}/{metric}": value for metric, value in each.items()},
        }  # fmt: skip
    gates = [
        GateResult("ppo", "kl", 30.0, Bound(max=20.0, advice="raise ppo.kl.coef"), Sampled(30, 25, 35, 9)),
        GateResult("sft", "skipped_steps", 0.0, Bound(max=0.0, advice="lower sft.optim.lr")),
        GateResult("ppo", "value", float("nan"), Bound(min=0.0, advice="look"), not_checked="no critic"),
    ]
    summary = {
        "stages": stages, "gates": [gate.as_json() for gate in gates], "verdict": "Improved: all of it.",
        "outcome": "did not work",
        "reads": {"prepare": [], "sft": ["prepare"], "reward": ["prepare", "sft"], "ppo": ["sft", "reward"],
                  "evaluate": ["ppo", "sft"]},
        "policies": {"base": {"title": "base"}, "ppo": {"title": answer}},
        "bounds": {"ppo": {"kl": [None, 20.0]}},
        "changed": [{"key": "ppo.kl.coef", "default": "0.05", "value": answer}],
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"stage": "ppo", "step": step, "time": 1.0, "ppo/kl": 0.1 * step, "ppo/score": None,
         "ppo/held_out_kl": 0.1 * step, "ppo/held_out_score": 0.2 * step}
        for step in range(num_steps)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "pp')
    answers = {
        name: {"response": f"{answer} {name}", "stopped": True, "tokens": number, "gold": 0.1, "score": 0.2}
        for number, name in enumerate(("base", "ppo", "sft"))
    }  # fmt: skip
    prompt = [{"role": "user", "content": answer}]
    rows = [json.dumps({"prompt": prompt, **answers}, ensure_ascii=False) + "\n"] * num_prompts
    evaluated = store / "evaluate" / "0123456789abcdef"
    (evaluated / "comparison.jsonl").write_text("".join(rows), encoding="utf-8")
    asked = [{"name": name} for name in ("base", "sft", "ppo")]
    (evaluated / "candidates.json").write_text(json.dumps({"start": "sft", "candidates": asked}))
    bins = [
        {"confidence": 0.6, "accuracy": 0.5, "pairs": 4},
        {"confidence": 0.9, "accuracy": 1.0, "pairs": 9},
    ]
    (store / "reward" / "0123456789abcdef" / "calibration.jsonl").write_text("\n".join(map(json.dumps, bins)))
    return run
