"""As soon as one source is the user's own, a packaged set is used only if it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from helpers.chains import SETTINGS, Chain, Outcome, run_main
from helpers.experiments import build
from rlhf.config import ConfigError
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import JUDGE, ROLES

TRAINING: tuple[Literal["train", "held_out"], ...] = ("train", "held_out")
DEMO = {
    "sft.data": "samples:instructions",
    "reward.pairs": "samples:pairs",
    "ppo.prompts": "samples:prompts",
    "evaluate.prompts": "samples:prompts",
    "evaluate.retention": ["samples:retention_sentences", "samples:retention_questions"],
    "evaluate.gold": "vader",
}


def values(*overrides: str) -> dict[str, Any]:
    """The values of the keys that may be auto, as in the run's config.yaml."""
    resolved = build("stage=prepare", *overrides).resolved
    found = {}
    for key in DEMO:
        section, name = key.split(".")
        found[key] = resolved[section][name]
    return found


def test_without_own_data_it_is_the_demo() -> None:
    assert values() == values("sft.replay=samples:retention_sentences") == DEMO
    named = "samples:retention_questions"
    assert values(f"evaluate.retention={named}") == DEMO | {"evaluate.retention": named}
    assert build().notes == ()


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (
            ["sft.data=mine.jsonl"],
            {"sft.data": "mine.jsonl", "ppo.prompts": "sft.data", "evaluate.prompts": "sft.data"},
        ),
        (
            ["sft.data={path: mine.csv, limit: 5}", "reward.pairs=hub:a/b"],
            {
                "sft.data": {"path": "mine.csv", "limit": 5}, "reward.pairs": "hub:a/b",
                "ppo.prompts": "sft.data", "evaluate.prompts": "sft.data",
            },
        ),
        (
            ["reward.pairs=mine.jsonl"],
            {"reward.pairs": "mine.jsonl", "ppo.prompts": "reward.pairs", "evaluate.prompts": "reward.pairs"},
        ),
        (["ppo.prompts=mine.txt"], {"ppo.prompts": "mine.txt", "evaluate.prompts": "ppo.prompts"}),
        (
            ["reward.pairs=mine.jsonl", "sft.data=samples:instructions", "evaluate.gold=vader"],
            {
                "sft.data": "samples:instructions", "reward.pairs": "mine.jsonl", "evaluate.gold": "vader",
                "ppo.prompts": "reward.pairs", "evaluate.prompts": "reward.pairs",
            },
        ),
        (
            ["sft.data=mine.jsonl", "ppo.prompts=samples:prompts"],
            {"sft.data": "mine.jsonl", "ppo.prompts": "samples:prompts", "evaluate.prompts": "sft.data"},
        ),
        (["compare.questions=mine.jsonl"], {}),
        (
            ["evaluate.retention=[samples:prompts,mine.txt]"],
            {"evaluate.retention": ["samples:prompts", "mine.txt"]},
        ),
        (["sft.replay=mine.txt"], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_beside_own_data_nothing_is_packaged_but_what_is_named(
    overrides: list[str], changes: dict[str, Any]
) -> None:
    assert values(*overrides) == dict.fromkeys(DEMO) | changes


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [
        ("stage=all sft.data=mine.jsonl", ["reward.pairs (for reward)"]),
        ("stage=compare sft.data=mine.jsonl", ["reward.pairs (for reward)"]),
        ("stage=ppo ppo.prompts=mine.jsonl", ["sft.data (for sft)", "reward.pairs (for reward)"]),
        ("stage=sft reward.pairs=mine.jsonl", ["sft.data (for sft)"]),
        (
            "stage=generate generate.reward=null sft.replay=mine.txt",
            ["sft.data (for sft)", "ppo.prompts (for generate)"],
        ),
        (
            "stage=evaluate sft.data=mine evaluate.prompts=null",
            ["reward.pairs (for reward)", "evaluate.prompts (for evaluate)"],
        ),
        ("stage=plan reward.pairs=mine.jsonl plan.trains=[ppo]", ["sft.data (for plan)"]),
        ("stage=sft sft.data=null", ["sft.data (for sft)"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_one_error_that_names_the_keys(overrides: str, missing: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(*overrides.split())
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"No data for {', '.join(missing)}.")
    assert ("beside your own data" in line) == ("mine" in overrides)
    is_ppo = overrides.startswith("stage=ppo")
    assert ("Without SFT: reward.init=base ppo.init=base." in line) == is_ppo


@pytest.mark.parametrize(
    "overrides",
    [
        "stage=sft sft.data=mine.jsonl",
        "stage=reward sft.data=mine.jsonl reward.pairs=pairs.jsonl",
        "stage=ppo sft.data=mine.jsonl ppo.reward=python:m:f ppo.critic.init=sft",
        "stage=compare sft.data=mine.jsonl compare.artifacts=[sft] compare.reward=null",
        "stage=compare compare.questions=q.jsonl compare.corpus=c.txt compare.methods=[retrieval] "
        "compare.artifacts=[] compare.reward=null",
        "stage=plan plan.rows=10 plan.prompt_tokens=5 plan.answer_tokens=5 sft.replay=mine.txt",
        "stage=prepare sft.replay=mine.txt",
    ],
)
def test_a_source_may_be_null_where_no_chosen_stage_needs_it(overrides: str) -> None:
    build(*overrides.split())


@pytest.mark.parametrize("key", ["sft.data", "ppo.ptx.data", "compare.questions"])
def test_other_rows_are_a_source_of_prompts_only(key: str) -> None:
    stage = build("stage=prepare", f"{key}=reward.pairs").stages[key.split(".")[0]].model_dump()
    for name in key.split(".")[1:]:
        stage = stage[name]
    assert stage["path"] == "reward.pairs"  # a file of this name


def run(directory: Path, *overrides: str) -> Outcome:
    return run_main(directory, [*SETTINGS, *overrides, "run_name=run"], directory / "runs" / "run")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_own_answers_alone_are_enough_to_tune_and_to_judge(tmp_path: Path) -> None:
    """The full chain without the reward model, on prompts of `sft.data`; no packaged prompts."""
    write(
        tmp_path / "mine.jsonl",
        [{"prompt": f"Ticket {n % 60}?", "completion": f"Reply {n}."} for n in range(90)],
    )
    (tmp_path / "m.py").write_text(
        "def f(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    rule = ("ppo.reward=python:m:f", "ppo.critic.init=sft", "ppo.gates.explained_variance=null")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        outcome = run(tmp_path, "stage=evaluate", "sft.data=mine.jsonl", *rule)
    assert outcome.code == 0, outcome.err
    config = yaml.safe_load((outcome.directory / "config.yaml").read_text())
    assert config["ppo"]["prompts"] == config["evaluate"]["prompts"] == "sft.data"
    assert "auto became: reward.pairs=null, ppo.prompts=sft.data, evaluate.prompts=sft.data," in outcome.out
    assert "Gate retention_perplexity_ratio does not apply: evaluate.retention=null." in outcome.out
    assert "evaluate/win_rate" in outcome.summary["stages"]["evaluate"]["metrics"]
    assert "evaluate/gold_gain" not in outcome.summary["stages"]["evaluate"]["metrics"]
    of_evaluation = [gate for gate in outcome.summary["gates"] if gate["stage"] == "evaluate"]
    checked = [gate["name"] for gate in of_evaluation if gate["outcome"] != "not checked"]
    assert checked == ["win_rate", "length_ratio", "stop_rate_change", "word_gain"]
    data = PreparedData(outcome.artifact("prepare"))
    asked: dict[tuple[str, str], set[str]] = {}
    for split in TRAINING:
        asked["sft", split] = {row.prompt[0]["content"] for row in data.rows("sft", split)}
        asked["ppo", split] = {row.prompt[0]["content"] for row in data.rows("ppo", split)}
    rows = data.rows("evaluate", "evaluation")
    asked["evaluate", "evaluation"] = {row.prompt[0]["content"] for row in rows}
    assert asked["ppo", "train"] == asked["sft", "train"]
    assert asked["ppo", "held_out"] == asked["sft", "held_out"]
    assert all(asked.values())
    assert set.union(*asked.values()) == {f"Ticket {n}?" for n in range(60)}
    assert not asked["evaluate", "evaluation"] & (asked["sft", "train"] | asked["sft", "held_out"])
    assert len(data.rows("ppo", "train")) == len(asked["ppo", "train"])  # each once


def test_rows_without_prompts_that_fit_stop_only_who_samples(tmp_path: Path) -> None:
    """Plain texts and long prompts can be tuned on; the user never said that they are prompts."""
    long = [{"prompt": "x" * 970, "completion": f"{n}"} for n in range(2)]
    write(tmp_path / "mine.jsonl", [*({"text": f"Text {n}."} for n in range(40)), *long])
    tuned = run(
        tmp_path,
        "stage=sft",
        "sft.data=mine.jsonl",
        "sft.gates.held_out_loss_change=null",
        "ppo.max_new_tokens=64",
    )
    assert tuned.code == 0, tuned.err
    assert (
        "ppo.prompts: 40 no prompt (mine.jsonl line 1, mine.jsonl line 2, mine.jsonl line 3, ...); "
        in tuned.out
    )
    sampled = run(
        tmp_path,
        "stage=generate",
        "sft.data=mine.jsonl",
        "generate.reward=null",
        "ppo.score.normalize=none",
        "ppo.critic.init=sft",
        "ppo.max_new_tokens=64",
    )
    assert sampled.code == 2
    assert sampled.err.startswith(
        "Error: ppo.prompts=sft.data: no prompts are left for train: 42 rows; 40 no prompt; 1 same prompt"
    )


@pytest.mark.parametrize(
    ("overrides", "judge"),
    [
        (("reward.pairs=many.jsonl",), "learned@judge"),
        (("recipe=dpo", "dpo.data=many.jsonl", "evaluate.reward=null"), "learned@judge"),
        (("reward.pairs=few.jsonl",), None),
        (("reward.pairs={path: many.jsonl, limit: 999}",), None),
        (("reward.pairs=missing.jsonl",), None),  # told where it is read
        (("reward.pairs=many.jsonl", "evaluate.gold=vader"), None),
        (("reward.pairs=many.jsonl", "evaluate.judge=null"), None),
        (("reward.pairs=many.jsonl", "evaluate.judge=vader"), "vader"),
        (("recipe=feedback",), None),
        ((), None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_own_pairs_without_a_gold_score_give_a_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], judge: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rows in (("few", 999), ("many", 1000)):
        pairs = ({"prompt": f"Rate {n}", "chosen": "Good.", "rejected": "Bad."} for n in range(rows))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    found = build(
        *overrides, *(("sft.data=few.jsonl",) if overrides and "recipe=feedback" not in overrides else ())
    )
    assert found.resolved["evaluate"]["judge"] == judge
    assert any("so reward@judge judges: it learns from 30% of the" in said for said in found.notes) == (
        judge == "learned@judge"
    )
    assert ("reward@judge" in found.needed()) == (judge == "learned@judge")
    if judge == "learned@judge":
        assert found.stages["reward@judge"].gates["accuracy_over_baseline"] is None
        assert "reward@judge" not in build("stage=sft", *overrides, "sft.data=few.jsonl").needed()
        typed = build(*overrides, "sft.data=few.jsonl", "++instances.reward-at-judge.epochs=3")
        assert dict(typed.stages["reward@judge"])["epochs"] == 3


def test_nobody_else_learns_from_the_prompts_of_the_judge(tmp_path: Path) -> None:
    """Neither another reward model nor DPO; it is tested on what they learn from."""
    chain = Chain(tmp_path)
    chain.write(
        "pairs.jsonl",
        ({"prompt": f"Rate {n % 1200}", "chosen": f"{n}!", "rejected": "No."} for n in range(1500)),
    )
    done = chain.run(
        "stage=prepare", "evaluate.gold=null", "dpo.data=pairs.jsonl", "evaluate.prompts=reward.pairs"
    )
    data = PreparedData(done.artifact("prepare"), roles={**ROLES, JUDGE: ROLES["pairs"]})
    asked = {
        (role, split): {str(row.prompt) for row in data.rows(role, split)}
        for role in ("pairs", "dpo", "pairs@judge")
        for split in TRAINING
    }
    judged = asked["pairs@judge", "train"]
    others = asked["pairs", "train"] | asked["pairs", "held_out"]
    assert 0.25 < len(judged) / (len(judged) + len(others)) < 0.35
    assert not judged & others and others == asked["dpo", "train"] | asked["dpo", "held_out"]
    assert asked["pairs@judge", "held_out"] <= others and len(asked["pairs@judge", "held_out"]) > 500
    assert len(data.rows("pairs@judge", "held_out")) <= 1000
    assert not (judged | others) & {str(row.prompt) for row in data.rows("evaluate", "evaluation")}
