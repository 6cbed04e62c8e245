"""What a run says of itself, on the terminal and in report.md."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from helpers.experiments import build
from rlhf.config import Bound
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.run import GateResult, Run
from rlhf.report.summary import print_summary, stage_cells, write_report
from rlhf.stages.evaluate import EvaluateStage

ANSWERS = {
    "base": "The [bold]chair[/] stands [/] there, \x1b[31mwith four legs and a back, " + "and so on, " * 12,
    "sft": "",
    "ppo": "I love this `beautiful` chair,\nit makes me happy every day!",
}
PROMPT = "Write a tweet about the [wooden] chair."


def stage(name: str, metrics: dict[str, float], artifact: Path | None = None) -> dict[str, Any]:
    return {
        "status": "ran",
        "key": "0123456789abcdef",
        "artifact": str(artifact or "/store/it"),
        "seconds": 71.2,
        "metrics": {f"{name}/{metric}": value for metric, value in metrics.items()},
    }


def evaluation(policies: tuple[str, ...] = ("base", "sft", "ppo")) -> dict[str, float]:
    gold = {"base": 0.31, "sft": 0.2, "ppo": 0.62}
    metrics = {"prompts": 96.0}
    for name in policies:
        metrics |= {f"gold_mean/{name}": gold[name], f"length_mean/{name}": 22.5, f"stop_rate/{name}": 0.9}
        metrics |= {f"retention_perplexity_ratio/{name}": 1.02} if "base" in policies else {}
        metrics |= {
            f"task_gain/{name}": gold[name] / 10,
            f"lm_eval/arc_easy/acc/{name}": 0.5 + gold[name] / 10,
        }
    if "ppo" in policies and "sft" in policies:
        metrics |= {"kl/ppo": -0.001, "kl/base": 0.3}
        for name, win_rate, gain in (("base", 0.6, 0.11), ("ppo", 0.78, 0.42)):
            metrics |= Sampled(win_rate, win_rate - 0.08, win_rate + 0.08, 96).metrics(f"win_rate/{name}")
            metrics |= Sampled(gain, gain - 0.12, gain + 0.08, 96).metrics(f"gold_gain/{name}")
    return metrics


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished chain whose evaluation has three prompts and shows two."""
    artifact = tmp_path / "store" / "evaluate"
    artifact.mkdir(parents=True)
    answers = {
        name: {"response": text, "stopped": True, "tokens": 9, "score": -1.5, "gold": 0.25}
        for name, text in ANSWERS.items()
    }
    lines = [
        {"prompt": [{"role": "user", "content": f"{PROMPT} ({number})"}], **answers} for number in range(3)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (artifact / "comparison.jsonl").write_text(text, encoding="utf-8")
    directory = tmp_path / "runs" / "demo"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("evaluate:\n  num_shown: 2\n")
    stages = {
        "prepare": stage("prepare", {"sft_rows": 318, "reward_pairs": 1100})
        | {"status": "reused", "seconds": 0.0},
        "sft": stage("sft", {"held_out_loss_before": 2.41, "held_out_loss": 2.01}),
        "evaluate": stage("evaluate", evaluation(), artifact),
    }
    gates = [
        GateResult("sft", "held_out_loss_change", -0.4, Bound(max=0.0, advice="lower sft.optim.lr")),
        GateResult("evaluate", "win_rate", 0.45, Bound(min=0.5, advice="raise ppo.steps")),
        GateResult(
            "ppo",
            "kl",
            5.0,
            Bound(max=6.0, advice="raise ppo.kl.coef", rows="raise ppo.evaluate_prompts"),
            Sampled(5.0, 3.0, 7.0, 24),
        ),
        GateResult("ppo", "first_kl", 0.5, Bound(max=0.02, advice="clear it"), not_checked="it starts apart"),
    ]
    return Run(directory, stages, gates, chain=build("model=tiny").stages)


def printed(run: Run, width: int) -> str:
    stream = io.StringIO()
    print_summary(run, Console(file=stream, width=width))
    return stream.getvalue()


def row_of(text: str, start: str) -> list[str]:
    """The words behind `start` in the line that begins with it."""
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line.removeprefix(start).split()


@pytest.mark.parametrize("width", [80, 120])
def test_policies_stand_side_by_side(run: Run, width: int) -> None:
    text = printed(run, width)
    assert row_of(text, "96 prompts") == ["base", "SFT", "PPO"]
    assert row_of(text, "gold score") == ["+0.310", "+0.200", "+0.620"]
    assert row_of(text, "task gain, nats per token") == ["+0.031", "+0.020", "+0.062"]
    assert row_of(text, "arc_easy acc") == ["0.531", "0.520", "0.562"]
    assert row_of(text, "KL from SFT, nats per sequence") == ["0.30", "-", "0.00"]  # not -0.00
    assert row_of(text, "win rate against SFT") == ["0.60", "-", "0.78"]
    assert row_of(text, "gold gain over SFT") == ["+0.11", "-", "+0.42"]
    intervals = [line.split()[4:] for line in text.splitlines() if line.startswith("  95% interval")]
    assert intervals == [["0.52..0.68", "-", "0.70..0.86"], ["-0.01..+0.19", "-", "+0.30..+0.50"]]


def test_each_of_several_rewards_has_a_row(run: Run) -> None:
    metrics = run.stages["evaluate"]["metrics"]
    metrics |= {"evaluate/score_mean/sft": -7.9, "evaluate/score_mean/ppo": -1.2}
    parts = {"learned": (-0.7, 1.28), "python:my:length": (-72.0, -25.0)}
    for part, scores in parts.items():
        metrics |= dict(
            zip((f"evaluate/score_mean/{part}/{name}" for name in ("sft", "ppo")), scores, strict=True)
        )
    text = printed(run, 120)
    assert row_of(text, "learned score, all together") == ["-", "-7.900", "-1.200"]
    assert row_of(text, "  learned alone") == ["-", "-0.700", "+1.280"]
    assert row_of(text, "  python:my:length alone") == ["-", "-72.000", "-25.000"]


def test_best_of_n_stands_behind_its_start(run: Run) -> None:
    metrics, best = run.stages["evaluate"]["metrics"], {"gold_mean": 0.5, "length_mean": 21.0, "kl": 1.8351}
    metrics |= {f"evaluate/{metric}/best_of_n": value for metric, value in best.items()}
    for name, seconds in (("sft", 100.0), ("prepare", 10.0), ("ppo", 1000.0)):
        run.stages.setdefault(name, stage(name, {}))["cost"] = {"seconds": seconds, "peak_bytes": None}
    judge = run.chain["evaluate"]
    assert isinstance(judge, EvaluateStage)
    asked = judge.model_copy(update={"policies": [*judge.policies, "best_of_n"]})
    run.chain = {**run.chain, "evaluate": asked}
    text = printed(run, 120)
    assert row_of(text, "96 prompts") == ["base", "SFT", "best", "of", "16", "PPO"]
    assert row_of(text, "KL from SFT, nats per sequence") == ["0.30", "-", "1.84", "0.00"]
    assert row_of(text, "seconds, all its stages") == ["-", "110", "110", "1,110"]  # as nothing was learned


def test_the_last_evaluation_is_shown(run: Run) -> None:
    again = dict(run.stages["evaluate"])
    again["metrics"] = {
        name.replace("evaluate/", "evaluate@2/"): value for name, value in again["metrics"].items()
    } | {"evaluate@2/gold_mean/ppo": 0.9}
    run.stages = {name: said for name, said in run.stages.items() if name != "evaluate"} | {
        "evaluate@2": again
    }
    (run.directory / "config.yaml").write_text("evaluate@2:\n  num_shown: 1\n")
    text = printed(run, 120)
    assert row_of(text, "gold score") == ["+0.310", "+0.200", "+0.900"]
    assert row_of(text, "96 prompts (evaluate@2)") == ["base", "SFT", "PPO"]
    assert text.count(PROMPT) == 1 and "artifacts/evaluate@2/comparison.jsonl" in text


def test_the_start_is_named_where_base_has_no_distance_from_it(run: Run) -> None:
    del run.stages["evaluate"]["metrics"]["evaluate/kl/base"]
    assert row_of(printed(run, 120), "KL from SFT, nats per sequence") == ["-", "-", "0.00"]


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_wider_than_the_terminal_but_paths(run: Run, width: int) -> None:
    lines = [line for line in printed(run, width).splitlines() if str(run.directory) not in line]
    assert max(map(len, lines)) <= width


def test_stages_tell_status_time_and_headlines(run: Run) -> None:
    text = printed(run, 80)
    assert " ".join(row_of(text, "prepare")) == "reused - SFT rows 318, pairs 1100"
    assert " ".join(row_of(text, "sft")) == "ran 1:11 loss before 2.410, after 2.010"


def test_what_a_method_costs_is_told_where_it_was_measured(run: Run) -> None:
    figures = {"trained_parameters": 4884480, "artifact_bytes": 279e6}
    latency = {"adapter_bytes": 9.8e6, "token_seconds": 0.0593, "token_seconds_base": 0.0402}
    run.stages["reward"] = stage("reward", {"accuracy": 0.75, **figures})
    run.stages["ppo"] = stage("ppo", figures | latency)
    text = printed(run, 200)
    told = "trained parameters 4,884,480, artifact MB 279.00"
    assert " ".join(row_of(text, "reward")[2:]) == f"accuracy 0.750, {told}"
    latency_told = "adapter MB 9.80, ms per token 59.3, without adapter 40.2"
    assert " ".join(row_of(text, "ppo")[2:]) == f"{told}, {latency_told}"
    assert "adapter MB 9.80" in write_report(run).read_text()


def test_gates_tell_value_bound_and_advice(run: Run) -> None:
    text = printed(run, 80)
    assert "passed       sft/held_out_loss_change = -0.4, wanted <= 0" in text
    assert "FAILED       evaluate/win_rate = 0.45, wanted >= 0.5" in text
    assert "Try: raise ppo.steps." in text
    assert "lower sft.optim.lr" not in text  # advice is for failures
    assert "cannot tell  ppo/kl = 5 (95%: 3 to 7, 24 rows), wanted <= 6" in text
    assert "About 72 more rows like these would tell (raise" in text
    assert "not checked  ppo/first_kl = 0.5, wanted <= 0.02" in text
    assert "Does not apply: it starts apart." in text


def test_as_many_answers_as_asked_for(run: Run) -> None:
    assert [f"{PROMPT} ({number})" in printed(run, 80) for number in range(3)] == [True, True, False]
    (run.directory / "config.yaml").write_text("evaluate:\n  num_shown: 0\n")
    assert PROMPT not in printed(run, 80)
    assert PROMPT not in write_report(run).read_text()


def test_what_models_write_is_shown_and_not_interpreted(run: Run) -> None:
    text = printed(run, 120)
    assert "I love this `beautiful` chair, it makes me happy every day!" in text  # one line
    run.stages["evaluate"]["metrics"] = {}
    row = json.loads(Path(run.stages["evaluate"]["artifact"], "comparison.jsonl").read_text().splitlines()[0])
    del row["ppo"]
    Path(run.stages["evaluate"]["artifact"], "comparison.jsonl").write_text(json.dumps(row))
    text = printed(run, 120)
    assert "The [bold]chair[/] stands [/] there, \ufffd[31mwith" in text
    assert "\x1b" not in text + write_report(run).read_text()


def test_an_answer_without_a_score_is_shown(run: Run) -> None:
    path = Path(run.stages["evaluate"]["artifact"], "comparison.jsonl")
    path.write_text(path.read_text().replace('"gold": 0.25', '"gold": null'))
    assert "gold -" in printed(run, 120)
    assert "(gold -, score -1.50)" in write_report(run).read_text()


def test_report_says_the_same(run: Run) -> None:
    report = write_report(run).read_text(encoding="utf-8")
    assert "# Run demo" in report
    assert "| sft | ran | 1:11 | loss before 2.410, after 2.010 |" in report
    assert "| gold score | +0.310 | +0.200 | +0.620 |" in report
    assert "| win rate against SFT | 0.60 | - | 0.78 |" in report
    assert "|   95% interval, over prompts | 0.52..0.68 | - | 0.70..0.86 |" in report
    assert "- SFT: (empty) (gold +0.25, score -1.50)" in report
    assert "- PPO: `I love this 'beautiful' chair, it makes me happy every day!`" in report
    assert "- **failed**: evaluate/win_rate = 0.45, wanted >= 0.5. Try: raise ppo.steps." in report
    assert "- cannot tell: ppo/kl = 5 (95%: 3 to 7, 24 rows), wanted <= 6. About 72 more rows" in report
    assert "`artifacts/evaluate/comparison.jsonl`" in report


def test_a_run_of_one_stage(run: Run) -> None:
    run.stages = {"sft": run.stages["sft"]}
    run.gates = []
    text = printed(run, 80)
    assert "SFT model" in text
    assert "prompts" not in text
    assert "## Policies" not in write_report(run).read_text()


def test_a_run_whose_evaluation_failed(run: Run) -> None:
    run.stages["evaluate"] |= {"status": "failed", "artifact": None, "metrics": {}}
    assert row_of(printed(run, 80), "evaluate")[0] == "failed"


def test_two_policies(run: Run) -> None:
    run.stages["evaluate"] |= stage("evaluate", evaluation(("base", "sft")), run.directory / "none")
    run.stages["evaluate"]["artifact"] = None
    text = printed(run, 80)
    assert row_of(text, "96 prompts") == ["base", "SFT"]
    assert row_of(text, "gold score") == ["+0.310", "+0.200"]
    assert "win rate" not in text


def test_a_page_that_cannot_be_written_is_said_and_loses_nothing(run: Run) -> None:
    (run.directory / "report.html").mkdir()
    out = io.StringIO()
    print_summary(run, Console(file=out, width=400))
    assert f"Page: {run.directory}/report.html could not be written (IsADirectoryError: " in out.getvalue()
    assert "Verdict. It did not work.\nImproved: " in out.getvalue()  # a gate failed
    report = (run.directory / "report.md").read_text()
    assert "**Verdict.** It did not work.\n\n- Improved: " in report and "\n- First failed gate: " in report


@pytest.mark.parametrize(
    ("unscored", "said"), [(0.0, "score +1.00"), (11.0, "score +1.00, answers without a score 11")]
)
def test_answers_without_a_score_are_told_where_there_are_some(
    tmp_path: Path, unscored: float, said: str
) -> None:
    figures = {"score_mean": 1.0, "unscored": unscored}
    run = Run(tmp_path, {"generate": stage("generate", figures)}, chain=build().stages)
    ((*_, told),) = stage_cells(run).rows
    assert told == said
