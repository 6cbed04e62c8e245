"""The chain on the tiny model: what a run leaves, what is reused, and what a failing gate does."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers.chains import STAGES, Chain, Outcome, run_main
from rlhf.config import Bound
from rlhf.digests import weights_digest
from rlhf.models.peft.saved import origin_of
from rlhf.pipeline.run import GateResult, Run
from rlhf.pipeline.store import Artifact, Manifest

ENFORCED = ("gates=enforce", "sft.gates.prompt_gain=null")
"""A tiny model that read a few rows does not heed the prompt yet."""
FAILING = (*ENFORCED, "sft.gates.held_out_loss_change.max=-99")


@pytest.fixture(scope="module")
def chain(finished_chain: tuple[Chain, Outcome]) -> Chain:
    return finished_chain[0]


@pytest.fixture(scope="module")
def first(finished_chain: tuple[Chain, Outcome]) -> Outcome:
    return finished_chain[1]


@pytest.fixture(scope="module")
def second(chain: Chain, first: Outcome) -> Outcome:
    return chain.run()


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reused_except(*ran: str) -> dict[str, str]:
    return {name: "ran" if name in ran else "reused" for name in STAGES}


def test_the_whole_chain_runs(first: Outcome) -> None:
    assert first.statuses == dict.fromkeys(STAGES, "ran")
    for name in STAGES:
        assert f"{name} done in" in first.out


def test_weights_are_as_readable_as_everything_else(chain: Chain, first: Outcome) -> None:
    published = [path for name in STAGES for path in first.artifact(name).rglob("*") if path.is_file()]
    published += (chain.directory / "store" / "base").rglob("*.safetensors")
    assert any(path.suffix == ".safetensors" for path in published)
    assert {path.stat().st_mode for path in published} == {(first.directory / "summary.json").stat().st_mode}


def test_summary_keeps_its_contract(first: Outcome) -> None:
    summary = first.summary
    assert set(summary) == {
        "stages", "gates", "verdict", "outcome", "judged_by", "reads", "bounds", "healthy", "changed",
        "policies",
    }  # fmt: skip
    assert [*summary["reads"]] == [*STAGES] and summary["reads"]["sft"] == ["prepare"]
    assert summary["bounds"]["ppo"]["kl"] == [None, 20.0]
    assert summary["healthy"]["ppo"]["held_out_kl"] == [None, 20.0, False]
    assert summary["healthy"]["sft"]["held_out_loss"] == [None, -0.001, True]
    assert {"key": "sft.batch_rows", "default": "16", "value": "8"} in summary["changed"]
    assert "\n- ".join(["", *summary["verdict"].split("\n")]) in (first.directory / "report.md").read_text()
    assert f"\n{summary['verdict']}\n" in first.out
    for name, stage in summary["stages"].items():
        assert set(stage) == {"status", "key", "artifact", "seconds", "cost", "metrics"}
        assert stage["cost"]["seconds"] >= 0 and stage["cost"]["peak_bytes"] > 2**20
        assert (Path(stage["artifact"]) / "manifest.json").is_file()
        assert Path(stage["artifact"]).name == stage["key"]
        assert stage["metrics"] and all(metric.startswith(f"{name}/") for metric in stage["metrics"])
        unknown = {metric for metric, value in stage["metrics"].items() if not isinstance(value, float)}
        assert all("gold_correlation" in metric for metric in unknown)  # VADER knows no word of these answers
        assert stage["seconds"] >= 0
    assert {gate["stage"] for gate in summary["gates"]} == {*STAGES}
    for gate in summary["gates"]:
        assert set(gate) == {
            "stage", "name", "value", "low", "high", "rows", "bound", "min", "max", "outcome", "passed",
            "more_rows", "advice",
        }  # fmt: skip
        metrics = summary["stages"][gate["stage"]]["metrics"]
        assert gate["value"] == metrics.get(f"{gate['stage']}/{gate['name']}"), (
            "unknown where it is not checked"
        )
        ends = [gate["value"]] if gate["rows"] is None else [gate["low"], gate["high"]]
        hold = [
            end is not None and (end <= float(bound) if sign == "<=" else end >= float(bound))
            for sign, bound in (each.split() for each in gate["bound"].split(" and "))
            for end in ends
        ]
        assert gate["passed"] == (gate["outcome"] == "passed") == all(hold)


def test_figures_that_are_not_finite_stay_valid_json(tmp_path: Path, first: Outcome) -> None:
    manifest = Manifest.model_validate_json((first.artifact("sft") / "manifest.json").read_bytes())
    manifest.metrics = {"loss": math.nan, "rows": 3.0}
    run = Run(tmp_path)
    run.record("sft", "ran", manifest.key, Artifact(first.artifact("sft"), manifest), 1.0)
    run.gates.append(GateResult("sft", "loss", math.nan, Bound(max=1.0, advice="")))
    run.write()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary["stages"]["sft"]["metrics"] == {"sft/loss": None, "sft/rows": 3.0}
    assert (summary["gates"][0]["value"], summary["gates"][0]["passed"]) == (None, False)


def test_others_find_the_promised_metrics(first: Outcome) -> None:
    metrics = {name for stage in first.summary["stages"].values() for name in stage["metrics"]}
    assert metrics >= {
        "sft/held_out_loss", "reward/accuracy", "generate/stop_rate", "ppo/kl", "evaluate/gold_mean/ppo",
        "evaluate/gold_mean/sft", "evaluate/win_rate", "evaluate/retention_perplexity_ratio",
    }  # fmt: skip


def test_metric_lines_carry_their_stage(first: Outcome) -> None:
    lines = jsonl(first.directory / "metrics.jsonl")
    assert {line["stage"] for line in lines} == set(STAGES)
    for line in lines:
        named = set(line) - {"stage", "step", "time", "summary"}
        assert named and all(name.startswith(f"{line['stage']}/") for name in named)
    steps = [line["step"] for line in lines if "ppo/policy_loss" in line]
    assert steps == [1, 2]


def test_the_run_directory_holds_what_was_promised(first: Outcome) -> None:
    samples = jsonl(first.directory / "samples.jsonl")
    assert {sample["stage"] for sample in samples} == {"generate", "ppo", "evaluate"}
    assert all({"prompt", "response"} <= set(sample) for sample in samples)
    config = yaml.safe_load((first.directory / "config.yaml").read_text())
    assert config["ppo"]["steps"] == 2
    assert config["evaluate"]["max_new_tokens"] == 6  # interpolations are resolved
    for name in STAGES:
        assert (first.directory / "artifacts" / name).resolve() == first.artifact(name)
    assert (first.directory / "report.md").is_file()


def test_artifacts_are_plain_models(first: Outcome) -> None:
    for name in ("sft", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(first.artifact(name))
        assert AutoTokenizer.from_pretrained(first.artifact(name)).chat_template is not None
        assert not [key for key in model.state_dict() if "lora" in key]
    reward = AutoModelForSequenceClassification.from_pretrained(first.artifact("reward"))
    assert reward.config.num_labels == 1
    origin = origin_of(first.artifact("reward"))
    assert origin is not None
    assert origin.digest == weights_digest(first.artifact("sft"))
    assert origin.key == first.key("sft")
    assert origin.checked_directory(first.artifact("reward")) == first.artifact("sft").resolve()


def test_training_changed_the_weights(first: Outcome) -> None:
    sft, ppo = (AutoModelForCausalLM.from_pretrained(first.artifact(name)) for name in ("sft", "ppo"))
    assert first.summary["stages"]["sft"]["metrics"]["sft/held_out_loss_change"] < -0.1
    differ = [not torch.equal(a, b) for a, b in zip(sft.parameters(), ppo.parameters(), strict=True)]
    assert any(differ) == (first.summary["stages"]["ppo"]["metrics"]["ppo/best_step"] > 0)


def test_manifests_tell_where_an_artifact_came_from(first: Outcome) -> None:
    manifest = Manifest.model_validate_json((first.artifact("ppo") / "manifest.json").read_bytes())
    assert manifest.recipe["inputs"] == {name: first.key(name) for name in ("sft", "reward", "generate")}
    assert manifest.config["ppo"]["steps"] == 2
    assert manifest.packages["torch"] and manifest.created and manifest.hardware
    assert manifest.seconds > 0
    assert "model.safetensors" in manifest.files


def test_the_second_run_reuses_everything_and_shows_the_same(first: Outcome, second: Outcome) -> None:
    assert second.statuses == dict.fromkeys(STAGES, "reused")
    for name in STAGES:
        assert second.summary["stages"][name]["metrics"] == first.summary["stages"][name]["metrics"]
    assert second.summary["gates"] == first.summary["gates"]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert jsonl(second.directory / name) == jsonl(first.directory / name)


def test_one_knob_of_ppo_runs_ppo_and_what_reads_it(chain: Chain, first: Outcome) -> None:
    outcome = chain.run("ppo.kl.coef=0.1", "why=true")
    assert outcome.statuses == reused_except("ppo", "evaluate")
    before = yaml.safe_load((first.directory / "config.yaml").read_text())["ppo"]["kl"]["coef"]
    assert f"ppo runs ({outcome.key('ppo')}): ppo.kl.coef: {before} -> 0.1\n" in outcome.out
    assert f"sft reused ({first.key('sft')}): the same settings and inputs as" in outcome.out
    assert f"made from another ppo ({first.key('ppo')} -> {outcome.key('ppo')})" in outcome.out


def test_other_prompts_leave_sft_and_reward_alone(chain: Chain, first: Outcome) -> None:
    rows = [{"prompt": f"Sing of {n}"} for n in range(20)]
    outcome = chain.run("stage=ppo", f"ppo.prompts={chain.write('other.jsonl', rows)}")
    assert outcome.statuses == {
        "prepare": "ran", "sft": "reused", "reward": "reused", "generate": "ran", "ppo": "ran",
    }  # fmt: skip
    assert outcome.key("sft") == first.key("sft")


def test_other_rows_are_counted_and_have_no_digests(chain: Chain, first: Outcome) -> None:
    rows = [json.loads(line) for line in (chain.directory / "sft.jsonl").read_text().splitlines()]
    more = [*rows, {"prompt": "Sing", "completion": "La la la"}]
    outcome = chain.run("stage=sft", f"sft.data={chain.write('more.jsonl', more)}", "why=true")
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if " sft runs" in line]
    wanted = f"sft runs ({outcome.key('sft')}): sft.data: other rows, {len(rows)} -> {len(more)}"
    assert line.endswith(wanted)
    (line,) = [line for line in outcome.out.splitlines() if " prepare runs" in line]
    assert not re.search("[0-9a-f]{32}", line), line


@pytest.mark.parametrize("override", [
    "ppo.micro_batch_tokens=64", "reward.micro_batch_tokens=64", "sft.micro_batch_tokens=64",
    *(f"{stage}.activation_checkpointing=true" for stage in ("sft", "reward", "ppo")),
    "generate.micro_batch_tokens=64", "evaluate.micro_batch_tokens=64", "evaluate.num_shown=1",
    "ppo.gates.kl.max=41", "why=true", "runs_dir=./runs/.", "stage=[evaluate]",
])  # fmt: skip
def test_what_cannot_change_the_result_is_outside_the_key(
    chain: Chain, first: Outcome, override: str
) -> None:
    outcome = chain.run(override)
    assert outcome.code == 0
    assert outcome.statuses == dict.fromkeys(STAGES, "reused")


def test_another_seed_is_another_experiment_but_the_same_data(chain: Chain, first: Outcome) -> None:
    outcome = chain.run("stage=sft", "seed=1", "why=true")
    assert outcome.statuses == {"prepare": "reused", "sft": "ran"}
    assert "seed: 0 -> 1" in outcome.out


def test_force_runs_a_finished_stage_again(chain: Chain, first: Outcome) -> None:
    outcome = chain.run("stage=[sft,reward]", "force=[sft]", "why=true")
    assert outcome.statuses == {"prepare": "reused", "sft": "ran", "reward": "reused"}
    assert outcome.key("sft") == first.key("sft")
    assert f"sft runs ({first.key('sft')}): force" in outcome.out
    before, after = (run.summary["stages"]["sft"]["metrics"] for run in (first, outcome))
    assert after == pytest.approx(before)  # the same seed gives the same model


def test_a_stage_alone_has_the_key_it_has_in_the_chain(tmp_path: Path, first: Outcome) -> None:
    outcome = Chain(tmp_path).run("stage=ppo")  # in a fresh store: its inputs come along
    assert outcome.statuses == dict.fromkeys(STAGES[:-1], "ran")
    for name in STAGES[:-1]:
        assert outcome.key(name) == first.key(name)
        alone, in_chain = (each.summary["stages"][name]["metrics"] for each in (outcome, first))
        timeless = {metric: value for metric, value in in_chain.items() if "seconds" not in metric}
        assert alone.keys() == in_chain.keys()
        assert {metric: alone[metric] for metric in timeless} == pytest.approx(timeless)


def test_a_failing_gate_names_the_stage_at_fault(chain: Chain, first: Outcome) -> None:
    outcome = chain.run(*FAILING)
    assert outcome.code == 3
    assert "Gate failed: sft: held_out_loss_change = " in outcome.out
    assert "wanted <= -99. Try: lower sft.optim.lr or sft.epochs" in outcome.out
    assert "Traceback" not in outcome.out + outcome.err
    assert list(outcome.statuses) == ["prepare", "sft"]  # the run ended there
    (gate,) = [gate for gate in outcome.summary["gates"] if gate["outcome"] == "failed"]
    assert (gate["stage"], gate["name"]) == ("sft", "held_out_loss_change")
    assert (gate["bound"], gate["passed"]) == ("<= -99", False)


def test_a_looser_bound_passes_with_the_same_artifact(chain: Chain, first: Outcome) -> None:
    outcome = chain.run("stage=sft", *ENFORCED, "sft.gates.held_out_loss_change.max=99")
    assert outcome.code == 0
    assert outcome.statuses["sft"] == "reused"
    assert outcome.key("sft") == first.key("sft")


def test_gates_can_warn_or_be_turned_off(chain: Chain, first: Outcome) -> None:
    warned = chain.run("stage=sft", *FAILING, "gates=warn")
    assert warned.code == 0
    assert "Gate failed, going on (gates=warn): sft: held_out_loss_change" in warned.out
    off = chain.run("stage=sft", *ENFORCED, "sft.gates.held_out_loss_change=null")
    assert off.code == 0
    assert "held_out_loss_change" not in [gate["name"] for gate in off.summary["gates"]]


def test_what_a_gate_cannot_tell_does_not_end_the_run(chain: Chain, first: Outcome) -> None:
    """The held-out loss falls by some value from row to row; a bound at the mean is within the interval."""
    change = first.summary["stages"]["sft"]["metrics"]["sft/held_out_loss_change"]
    outcome = chain.run("stage=sft", *ENFORCED, f"sft.gates.held_out_loss_change.max={change + 1e-3}")
    assert outcome.code == 0
    assert "Gate cannot tell, going on: sft: held_out_loss_change = " in outcome.out
    assert "It is so near the bound that it would take about " in outcome.out
    assert " more rows (give sft.data more rows, of which prepare." in outcome.out
    (gate,) = [gate for gate in outcome.summary["gates"] if gate["name"] == "held_out_loss_change"]
    assert (gate["outcome"], gate["passed"]) == ("cannot tell", False)
    assert gate["low"] < change < gate["high"] and gate["more_rows"] > gate["rows"] >= 2
    assert "cannot tell: sft/held_out_loss_change" in (outcome.directory / "report.md").read_text()


def test_a_multirun_trains_what_its_trials_share_once(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    assert chain.run("-m", "stage=ppo", "ppo.kl.coef=0.01,0.02").code == 0
    trials = [Outcome(0, "", "", tmp_path / "runs" / f"run1-{number}") for number in range(2)]
    assert trials[0].statuses == dict.fromkeys(STAGES[:-1], "ran")
    assert trials[1].statuses == dict.fromkeys(STAGES[:-2], "reused") | {"ppo": "ran"}
    assert trials[0].key("ppo") != trials[1].key("ppo")
    assert len(list((tmp_path / "store" / "sft").glob("*/manifest.json"))) == 1


def test_packaged_samples_and_defaults_need_no_files(tmp_path: Path) -> None:
    outcome = run_main(
        tmp_path, ["model=tiny", "device=cpu", "stage=prepare", "run_name=x"], tmp_path / "runs" / "x"
    )
    assert outcome.code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "store"}
