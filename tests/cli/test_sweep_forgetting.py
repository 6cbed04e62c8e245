"""`+sweep=forgetting`: four ways of tuning, what each learned and forgot, and the picture."""

from __future__ import annotations

from typing import Any

import pytest

import rlhf.pipeline.settings
from helpers.chains import Chain, Outcome, sweep_file, trial_run

SWEEP = ("+sweep=forgetting", "run_name=forgetting", "sft.replay=general.txt", "sft.epochs=2")
REMEDIES = ["full", "lora", "replay", "interpolation"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Outcome]:
    chain = Chain(tmp_path_factory.mktemp("forgetting"))
    lines = [f"Iron melts at {number} degrees.\n" for number in range(24)]
    (chain.directory / "general.txt").write_text("".join(lines))
    outcome = chain.run(*SWEEP)
    assert outcome.code == 0, outcome.out + outcome.err
    return chain, outcome


def summary(chain: Chain, number: int) -> dict[str, Any]:
    stages: dict[str, Any] = trial_run(chain, "forgetting", number).summary["stages"]
    return stages


@pytest.mark.slow
def test_each_remedy_is_a_trial_and_shares_what_it_can(swept: tuple[Chain, Outcome]) -> None:
    chain, _ = swept
    trials = sweep_file(chain, "forgetting")["trials"]
    assert [trial["overrides"] for trial in trials] == [{"+remedy": remedy} for remedy in REMEDIES]
    assert [trial["status"] for trial in trials] == ["done"] * 4
    full, lora, replay, half = (summary(chain, number) for number in range(4))
    assert [stages["sft"]["status"] for stages in (full, lora, replay, half)] == [
        "ran",
        "ran",
        "ran",
        "reused",
    ]
    assert half["sft"]["key"] == full["sft"]["key"]
    assert list(half) == ["prepare", "sft", "merge", "evaluate"]
    trained = [stages["sft"]["metrics"]["sft/trained_parameters"] for stages in (full, lora, replay)]
    assert trained[1] < trained[0] == trained[2]
    replayed = [stages["sft"]["metrics"]["sft/replayed_rows"] for stages in (full, lora, replay)]
    assert replayed[0] == replayed[1] == 0 < replayed[2]


@pytest.mark.slow
def test_both_sides_are_in_the_table_and_the_picture(swept: tuple[Chain, Outcome]) -> None:
    chain, outcome = swept
    for number, trial in enumerate(sweep_file(chain, "forgetting")["trials"]):
        metrics = summary(chain, number)["evaluate"]["metrics"]
        last = "merge" if number == 3 else "sft"
        for name in ("task_gain", "retention_loss"):
            assert trial["metrics"][f"evaluate/{name}"] == metrics[f"evaluate/{name}/{last}"]
    gains = [trial["metrics"]["evaluate/task_gain"] for trial in sweep_file(chain, "forgetting")["trials"]]
    assert gains[0] > gains[3] > 0
    assert "evaluate/retention_loss" in outcome.out
    directory = chain.directory / "runs" / "forgetting"
    assert (directory / "pareto.png").is_file()
    assert "![" in (directory / "sweep.md").read_text()


@pytest.mark.slow
def test_one_remedy_alone_and_then_all_again(swept: tuple[Chain, Outcome]) -> None:
    chain, _ = swept
    alone = chain.run(*SWEEP, "run_name=alone", "+remedy=lora")
    assert alone.code == 0, alone.err
    assert [path.name for path in sorted((chain.directory / "runs").glob("alone*"))] == ["alone", "alone-0"]
    again = chain.run(*SWEEP)
    assert again.code == 0
    assert {stage["status"] for number in range(4) for stage in summary(chain, number).values()} == {"reused"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.pareto.loss=ppo/kl", "sweep.pareto.loss=ppo/kl: the trials have no such stage"),
        ("sweep.pareto.gain=gain", "sweep.pareto.gain='gain'"),
        ("sft.replay=null", "sft.replay_fraction=0.3 needs sft.replay"),
    ],
)
def test_a_mistake_is_told_before_the_first_trial(
    swept: tuple[Chain, Outcome], override: str, words: str
) -> None:
    chain, _ = swept
    outcome = chain.run(*SWEEP, "run_name=mistake", override)
    assert outcome.code == 2
    assert words in outcome.err
    assert not (chain.directory / "runs" / "mistake").exists()


@pytest.mark.slow
def test_a_picture_needs_matplotlib(swept: tuple[Chain, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    chain, _ = swept
    # an environment without matplotlib, which these tests themselves need
    monkeypatch.setattr(rlhf.pipeline.settings, "find_spec", lambda name: None)
    outcome = chain.run(*SWEEP, "run_name=mistake")
    assert outcome.code == 2
    assert "sweep.pareto draws with matplotlib: pip install -e '.[compare]'" in outcome.err
