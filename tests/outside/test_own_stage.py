"""A stage of the user's own, with nothing in the package changed: toy_dpo.py and its YAML."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.chains import Chain, Outcome, RealChain, kill, newest_step
from rlhf.rewards.kinds import REWARD_KINDS

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
CONFIG = f"--config-dir={HERE / 'conf'}"
MOUNTED = (CONFIG, "+stages@toy=toy", "gates=warn")


@pytest.fixture(scope="module")
def finished(finished_chain: tuple[Chain, Outcome]) -> Outcome:
    """DPO beside the packaged stages, and every stage that is about policies."""
    chain, _ = finished_chain
    outcome = chain.run(
        *MOUNTED, "stage=[all,merge,compare,plan]", "evaluate.policies=[merge,toy,base,sft,ppo]",
        "evaluate.subject=toy", "merge.policy=toy", "compare.artifacts=[toy,ppo]", "compare.num_questions=2",
        "compare.max_new_tokens=4", "plan.trains=[sft,toy]",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return outcome


def test_it_runs_behind_sft_and_leaves_the_others_as_they_are(finished: Outcome) -> None:
    made = {name for name, status in finished.statuses.items() if status == "ran"}
    assert made == {"toy", "merge", "evaluate", "compare", "plan"}
    names = list(finished.statuses)
    assert names.index("sft") < names.index("toy") < names.index("merge") < names.index("evaluate")
    assert (finished.artifact("toy") / "model.safetensors").is_file()


def test_it_is_evaluated_compared_merged_and_planned(finished: Outcome) -> None:
    metrics = {name: stage["metrics"] for name, stage in finished.summary["stages"].items()}
    assert {"evaluate/gold_mean/toy", "evaluate/kl/toy", "evaluate/task_gain/toy"} <= {*metrics["evaluate"]}
    gold = {name: metrics["evaluate"][f"evaluate/gold_mean/{name}"] for name in ("toy", "sft")}
    for name in ("gold_gain", "gold_gain/toy"):
        assert metrics["evaluate"][f"evaluate/{name}"] == pytest.approx(gold["toy"] - gold["sft"])
    assert {f"evaluate/win_rate/{name}" for name in ("base", "ppo", "toy", "merge")} <= {*metrics["evaluate"]}
    assert "compare/rouge_l/toy" in metrics["compare"]
    assert metrics["compare"]["compare/setup_seconds/toy"] > 0
    assert metrics["merge"]["merge/relative_change"] > 0
    plan = (finished.directory / "artifacts" / "plan" / "plan.md").read_text()
    assert "sft, forward and backward" in plan and "toy, forward and backward" in plan
    planned = finished.directory / "artifacts" / "plan" / "experiment" / "planned.yaml"
    section = yaml.safe_load(planned.read_text())["toy"]
    assert section["_target_"] == "toy_dpo.DpoStage" and section["beta"] == 0.1


def test_the_report_shows_it_beside_the_others(finished: Outcome) -> None:
    report = (finished.directory / "report.md").read_text()
    assert "| base | SFT | PPO | DPO | merged |" in report
    (row,) = [line for line in report.splitlines() if line.startswith("| win rate against SFT")]
    assert [cell.strip() == "-" for cell in row.split("|")[2:-1]] == [False, True, False, False, False]
    assert "| toy | ran |" in report and "ranks right" in report
    assert "- DPO model: `artifacts/toy`" in report
    assert "- DPO: `" in report and "DPO model: " in finished.out
    assert "evaluate/score_gain/toy" in finished.summary["stages"]["evaluate"]["metrics"]


def test_its_code_is_in_its_key(
    finished_chain: tuple[Chain, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, _ = finished_chain
    code = (HERE / "toy_dpo.py").read_text()
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(code: str) -> Outcome:
        (tmp_path / "my_dpo.py").write_text(code)
        monkeypatch.delitem(sys.modules, "my_dpo", raising=False)
        outcome = chain.run(*MOUNTED, "stage=toy", "toy._target_=my_dpo.DpoStage", "why=true")
        assert outcome.code == 0, outcome.err
        return outcome

    first = run(code)
    assert run(code).statuses["toy"] == "reused"
    edited = run(code.replace("-logsigmoid(beta * margin_B)", "(1 - beta * margin_B)"))
    assert edited.statuses == {"prepare": "reused", "sft": "reused", "toy": "ran"}
    assert edited.key("toy") != first.key("toy")
    assert "python:my_dpo:DpoStage" in edited.out


def test_the_script_finds_modules_of_the_current_directory(tmp_path: Path) -> None:
    Chain(tmp_path)
    shutil.copy(HERE / "toy_dpo.py", tmp_path / "dpo_beside_me.py")
    arguments = [*MOUNTED, "toy._target_=dpo_beside_me.DpoStag", "model=tiny", "stage=toy"]
    script = Path(sys.executable).with_name("rlhf")
    done = subprocess.run([script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{tmp_path / 'dpo_beside_me.py'} has no DpoStag. Did you mean DpoStage?" in done.stderr


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of reward kinds, as it was before."""
    monkeypatch.setattr("rlhf.rewards.kinds.REWARD_KINDS", dict(REWARD_KINDS))
    monkeypatch.delitem(sys.modules, "toy_length", raising=False)


@pytest.mark.usefixtures("kinds")
def test_a_reward_kind_of_ones_own_is_like_the_others(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, _ = finished_chain
    mounted = (*MOUNTED, "toy._target_=toy_length.DpoStage", "stage=[ppo,evaluate]")
    refused = chain.run(*mounted, "ppo.reward=length:many")
    assert refused.code == 2 and "http://HOST:PORT/PATH or length:COUNT" in refused.err
    outcome = chain.run(*mounted, "ppo.reward=length:3", "ppo.score.normalize=none", "evaluate.gold=length:2")
    assert outcome.code == 0, outcome.err
    assert "reward" not in outcome.statuses  # no model scores
    rows = [json.loads(line) for line in (outcome.artifact("evaluate") / "responses.jsonl").open()]
    for row in rows:
        count = len(row["response"])
        assert (row["score"], row["gold"]) == (-abs(count - 3), -abs(count - 2))
    recipe = json.loads((outcome.artifact("ppo") / "manifest.json").read_text())["recipe"]
    assert recipe["external"].keys() >= {"length", "python:toy_length:length"}


def test_the_documented_values_are_those_of_the_file() -> None:
    page = (HERE.parents[1] / "docs" / "extending.md").read_text()
    (shown,) = re.findall(r"```yaml\n(_target_: toy_dpo.*?)```", page, re.DOTALL)
    assert shown == (HERE / "conf" / "stages" / "toy.yaml").read_text()


def test_the_documented_commands_run(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, _ = finished_chain
    page = (HERE.parents[1] / "docs" / "extending.md").read_text()
    found = re.findall(r"^python -m rlhf --config-dir my_conf (.*)$", page, re.MULTILINE)
    assert len(found) == 2
    for words in found:
        small = ("gates=warn", "compare.num_questions=2", "compare.max_new_tokens=4")
        outcome = chain.run(CONFIG, *small, *words.split())
        assert outcome.code == 0, outcome.err
        assert "toy" in outcome.statuses


def test_it_goes_on_after_a_kill_bit_for_bit(tmp_path: Path) -> None:
    chain = RealChain(tmp_path)
    shutil.copy(HERE / "toy_dpo.py", tmp_path)
    settings = ("+stages@toy=toy", "stage=toy", "checkpoint.every_steps=1", "toy.epochs=3", CONFIG)
    chain.run("whole", *settings)
    kill(chain.start_until("toy", 2, "killed", *settings))
    assert newest_step(chain.store("killed"), "toy") >= 2
    out, _ = chain.run("killed", *settings)
    assert "sft reused" in out and "toy runs" in out
    assert chain.weights("killed", "toy") == chain.weights("whole", "toy")
    assert {key: value for key, value in chain.curve("killed").items() if key[0] == "toy"} == {
        key: value for key, value in chain.curve("whole").items() if key[0] == "toy"
    }
