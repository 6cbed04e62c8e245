"""`-m`: trials share what is finished, a failing one leaves the others alone, and a study goes on."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import MissingConfigException
from optuna.distributions import FloatDistribution

import rlhf.cli.sweep.sweepers
from helpers.chains import (
    BY_RULE,
    Chain,
    Outcome,
    check_submitit_sweep,
    finished,
    submitit_sweep_arguments,
    sweep_file,
    trial_run,
)
from rlhf.cli.messages import explain_error
from rlhf.cli.sweep.optuna_study import JOURNAL, Study
from rlhf.cli.sweep.trial import NOTE, read_note, write_note
from rlhf.config import ConfigError
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.settings import SweepConfig
from rlhf.report.sweep_table import SweepTable
from rlhf.report.trial import Outcome as TrialOutcome
from rlhf.report.trial import Trial

OPTUNA = ("-m", "hydra/sweeper=optuna", "sweep.metric=ppo/held_out_score", "run_name=study", *BY_RULE)
LR = "ppo.optim.lr=tag(log,interval(1e-5,1e-3))"
CALLS: list[int] = []


def interrupts_at_first(prompts: list[str], responses: list[str]) -> list[float]:
    """At PPO's first: before anything trains, it was asked about two rows."""
    CALLS.append(len(responses))
    if len(CALLS) == 2:
        raise KeyboardInterrupt
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Outcome]:
    """A study of three trials."""
    chain = Chain(tmp_path_factory.mktemp("study"))
    outcome = chain.run(*OPTUNA, LR, "sweep.trials=3")
    assert outcome.code == 0, outcome.out + outcome.err
    return chain, outcome


@pytest.fixture
def chain(studied: tuple[Chain, Outcome]) -> Chain:
    return studied[0]


@pytest.mark.slow
def test_optunas_trials_train_what_they_share_once(studied: tuple[Chain, Outcome]) -> None:
    chain, outcome = studied
    trials = [trial_run(chain, "study", number) for number in range(3)]
    assert trials[0].statuses == {"prepare": "ran", "sft": "ran", "ppo": "ran"}
    assert trials[1].statuses == trials[2].statuses == {"prepare": "reused", "sft": "reused", "ppo": "ran"}
    assert (finished(chain, "sft"), finished(chain, "ppo")) == (1, 3)
    content = sweep_file(chain, "study")
    rates = [float(trial["overrides"]["ppo.optim.lr"]) for trial in content["trials"]]
    assert len(set(rates)) == 3 and all(1e-5 <= rate <= 1e-3 for rate in rates)
    scores = [trial["metrics"]["ppo/held_out_score"] for trial in content["trials"]]
    measured = [trial.summary["stages"]["ppo"]["metrics"]["ppo/held_out_score"] for trial in trials]
    assert scores == measured
    assert scores[content["best"]] == max(scores)
    assert "(best)" in outcome.out and f"{scores[0]:.4g}" in outcome.out


def test_the_same_command_goes_on_with_the_study(chain: Chain) -> None:
    notes = [chain.directory / "runs" / f"study-{number}" / "trial.json" for number in range(3)]
    before, first = [note.stat().st_mtime_ns for note in notes], sweep_file(chain, "study")
    again = chain.run(*OPTUNA, LR, "sweep.trials=3")
    assert again.code == 0 and "Trial" not in again.out
    more = chain.run(*OPTUNA, LR, "sweep.trials=4")
    assert more.code == 0
    assert [line for line in more.out.splitlines() if "Trial 3: ppo.optim.lr=" in line]
    assert "Trial 2" not in more.out
    assert [note.stat().st_mtime_ns for note in notes] == before  # finished trials are not run again
    now = sweep_file(chain, "study")
    assert now["trials"][:3] == first["trials"] and now["trials"][3]["status"] == "done"


def test_another_search_under_its_name_is_refused(chain: Chain) -> None:
    outcome = chain.run(*OPTUNA, "ppo.optim.lr=tag(log,interval(1e-5,1e-2))")
    assert outcome.code == 2
    assert outcome.err.startswith("Error: run_name=study is a study with another search: it had ppo.optim.lr")
    assert "1e-2" in outcome.err and "Choose another run_name" in outcome.err


@pytest.mark.slow
def test_an_interrupted_trial_is_run_again_with_its_values(chain: Chain) -> None:
    CALLS.clear()
    arguments = (
        *OPTUNA,
        LR,
        "sweep.trials=2",
        "run_name=cut",
        f"ppo.reward=python:{__name__}:interrupts_at_first",
    )
    stopped = chain.run(*arguments)
    assert stopped.code == 130
    first = sweep_file(chain, "cut")
    assert [trial["status"] for trial in first["trials"]] == ["stopped in ppo"]  # the others were not begun
    assert "stopped in ppo" in stopped.out
    done = chain.run(*arguments)
    assert done.code == 0, done.err
    second = sweep_file(chain, "cut")
    assert [trial["status"] for trial in second["trials"]] == ["done", "done"]
    assert second["trials"][0]["overrides"] == first["trials"][0]["overrides"]


def test_a_failing_trial_leaves_the_others_alone(chain: Chain) -> None:
    arguments = ("-m", *BY_RULE, "run_name=grid", "ppo.optim.lr=1e30,1e-4", "ppo.critic.optim.lr=1e-4")
    outcome = chain.run(*arguments)
    assert outcome.code == 2
    content = sweep_file(chain, "grid")
    assert [trial["status"] for trial in content["trials"]] == ["failed in ppo", "done"]
    assert [trial["code"] for trial in content["trials"]] == [2, 0]
    assert content["trials"][1]["overrides"] == {"ppo.optim.lr": "0.0001"}
    assert "ppo/kl" in content["trials"][1]["metrics"]  # without sweep.metric: what has a gate
    assert content["best"] is None
    table = (chain.directory / "runs" / "grid" / "sweep.md").read_text()
    assert "| ppo.optim.lr | 1e+30 | " in table and "| status | failed in ppo | done |" in table
    assert "Sweep grid" in outcome.out and "failed in ppo" in outcome.out


@pytest.mark.slow
def test_optuna_learns_that_a_trial_failed(chain: Chain) -> None:
    outcome = chain.run(
        *OPTUNA, "run_name=failing", "ppo.optim.lr=choice(1e30,1e-4)", "sweep.trials=3", "sweep.seed=1"
    )
    content = sweep_file(chain, "failing")
    statuses = {trial["status"] for trial in content["trials"]}
    assert statuses == {"failed in ppo", "done"}  # sweep.seed is chosen for both to come
    assert outcome.code == 2
    assert content["trials"][content["best"]]["status"] == "done"
    again = chain.run(
        *OPTUNA, "run_name=failing", "ppo.optim.lr=choice(1e30,1e-4)", "sweep.trials=3", "sweep.seed=1"
    )
    assert again.code == 0 and "Trial" not in again.out  # told, so not tried again


def test_a_lost_trial_is_told_and_the_others_go_on(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch is a scheduler that loses a job: submitit then raises in the sweeper's process."""
    run_trial = rlhf.cli.sweep.trial.run_trial

    def killed_at_first(resolved: dict[str, Any], run_name: str) -> TrialOutcome:
        if run_name.endswith("-0"):
            raise RuntimeError("the job has not produced any output")
        return run_trial(resolved, run_name)

    monkeypatch.setattr("rlhf.cli.sweep.trial.run_trial", killed_at_first)
    outcome = chain.run("-m", "stage=prepare", "run_name=lost", "seed=0,1")
    assert outcome.code == 1
    assert "Trial 0 was lost: the job has not produced any output" in outcome.err
    assert [trial["status"] for trial in sweep_file(chain, "lost")["trials"]] == ["unfinished", "done"]


def test_without_a_name_all_trials_share_the_time(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    assert chain.run("-m", "stage=prepare", "run_name=null", "seed=0,1,2").code == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [names[0], *(f"{names[0]}-{number}" for number in range(3))]
    assert {path.name for path in (tmp_path / "runs" / names[0]).iterdir()} == {
        ".lock",
        ".lock.holder",
        "sweep.json",
        "sweep.md",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ppo.kl.coef=interval(0,1)",), "ppo.kl.coef=interval(0,1) needs hydra/sweeper=optuna"),
        (("run_name=20261104", "seed=1,2"), "run_name=20261104: it must be a text. Put a letter in it."),
        (("run_name=a,b",), "run_name: a sweep's trials share it"),
        (("sweep.metric=gold", "seed=1,2"), "sweep.metric='gold'"),
        (("sweep.metric=ppo/held_out_scor", "seed=1,2"), "Did you mean held_out_score"),
        (("sweep.metric=evaluate/gold_maen/ppo", "seed=1,2"), "Did you mean gold_mean/ppo"),
        (("sweep.metric=evaluate/gold_mean/ppo", "stage=ppo", "seed=1,2"), "the trials have no such stage"),
        (("sft.peft=none,lorra",), "sft.peft.method='lorra'"),
        (("hydra/sweeper=optuna", "seed=1,2"), "hydra/sweeper=optuna needs sweep.metric=STAGE/NAME"),
        (("hydra/sweeper=optuna", "sweep.metric=ppo/kl"), "has nothing to search. Give a key an interval"),
        ((*OPTUNA, "run_name=x", "ppo.gamma=interval(1,0)"), "ppo.gamma=interval(1,0): "),
        ((*OPTUNA, "run_name=x", "ppo.gamma=interval(0,2)"), "ppo.gamma=2.0: it must be less than"),
        ((*OPTUNA, "run_name=x", "ppo.gamma=tag(lag,interval(0,1))"), "no tag lag. Known: log"),
        ((*OPTUNA, "run_name=x", "sft.peft=none,lorra"), "sft.peft.method='lorra'"),
        ((*OPTUNA, "run_name=x", LR, "sweep.trials=0"), "sweep.trials=0"),
        (("hydra/sweeper=optima",), "hydra/sweeper=optima: there is no such choice"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_the_first_trial(
    chain: Chain, arguments: tuple[str, ...], words: str
) -> None:
    before = set((chain.directory / "runs").iterdir())
    outcome = chain.run("-m", *(word for word in arguments if word != "-m"))
    assert outcome.code == 2
    assert outcome.err.startswith("Error: ") and words in outcome.err
    assert "Traceback" not in outcome.err
    assert set((chain.directory / "runs").iterdir()) == before


def test_a_metric_that_no_trial_has_ends_the_sweep_after_the_first(chain: Chain) -> None:
    no_adapter = ("sweep.metric=ppo/adapter_bytes", "ppo.peft=none")
    outcome = chain.run(*OPTUNA, LR, "run_name=typo", *no_adapter, "sweep.trials=3")
    assert outcome.code == 2
    assert "sweep.metric=ppo/adapter_bytes: trial 0 has no such metric. Use one of " in outcome.err
    assert "ppo/held_out_score," in outcome.err
    assert "Trial 1" not in outcome.out


def test_missing_packages_are_named(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    # an environment without optuna, which these tests themselves need
    found = lambda name: None if name == "optuna" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(rlhf.cli.sweep.sweepers, "find_spec", found)
    outcome = chain.run(*OPTUNA, LR, "run_name=x")
    assert outcome.code == 2 and "pip install -e '.[optuna]'" in outcome.err
    launcher = "hydra/launcher/submitit_slurm"
    hydras = MissingConfigException(f"In 'config': Could not find '{launcher}'", launcher, ["basic"])
    assert explain_error(hydras, []) == (
        "hydra/launcher=submitit_slurm needs submitit: pip install -e '.[slurm]'."
    )
    mistyped = MissingConfigException("", "hydra/launcher/submitit_lcoal", ["basic"])
    assert explain_error(mistyped, []) == (
        "hydra/launcher=submitit_lcoal: there is no such choice. Did you mean submitit_local? There are: "
        "basic, submitit_local, submitit_slurm."
    )


KNOBS = SweepConfig(metric="ppo/kl", direction="minimize", trials=14, parallel=1, seed=0, pareto=None)
SPACE = {"a": FloatDistribution(0.0, 1.0), "b": FloatDistribution(1e-6, 1.0, log=True)}


def study_in(directory: Path) -> Study:
    directory.mkdir(exist_ok=True)
    return Study(directory, KNOBS, ["a=interval(0,1)"], SPACE)


def result(values: dict[str, str]) -> TrialOutcome:
    return TrialOutcome(code=0, status="done", metrics={"ppo/kl": (float(values["a"]) - 0.3) ** 2})


def test_an_interruption_changes_no_proposal(tmp_path: Path) -> None:
    straight = study_in(tmp_path / "straight")
    proposals = []
    while asked := straight.ask():
        proposals.append(asked)
        straight.tell(asked[0], result(asked[1]))
    assert [number for number, _ in proposals] == list(range(14))
    assert len({values["a"] for _, values in proposals}) == 14  # none is drawn twice
    for number, values in proposals:  # started anew for every trial, and killed in every second one
        cut = study_in(tmp_path / "cut")
        assert cut.ask() == (number, values)
        if number % 2:
            cut = study_in(tmp_path / "cut")
            assert cut.unfinished() == [number]
            assert list(cut.known())[number] == (number, values)
        cut.tell(number, result(values))
        assert cut.unfinished() == []


@pytest.mark.parametrize("code", [None, 75, 130])
def test_a_killed_or_stopped_trial_stays_open(tmp_path: Path, code: int | None) -> None:
    study = study_in(tmp_path / "study")
    asked = study.ask()
    assert asked
    study.tell(0, TrialOutcome(code=code))
    assert study_in(tmp_path / "study").unfinished() == [0]


@pytest.mark.parametrize(("code", "value"), [(1, 0.5), (3, 0.5), (0, None)])
def test_a_failed_trial_is_not_tried_again(tmp_path: Path, code: int, value: float | None) -> None:
    study = study_in(tmp_path / "study")
    assert study.ask()
    study.tell(0, TrialOutcome(code=code, metrics={"ppo/kl": value}))
    assert study_in(tmp_path / "study").unfinished() == []
    again = study.ask()
    assert again and again[0] == 1


def test_a_line_that_was_half_written_is_dropped(tmp_path: Path) -> None:
    study = study_in(tmp_path / "study")
    asked = study.ask()
    assert asked
    with (tmp_path / "study" / JOURNAL).open("a") as journal:
        journal.write('{"op_code": 6, "trial')
    study_in(tmp_path / "study").tell(0, result(asked[1]))
    with pytest.raises(ConfigError, match="another search"):
        Study(tmp_path / "study", KNOBS, ["a=interval(0,2)"], SPACE)
    assert study_in(tmp_path / "study").unfinished() == []


def trials(*values: tuple[str, TrialOutcome | None]) -> list[Trial]:
    return [
        Trial(number, Path(f"runs/t-{number}"), {"seed": "7", "lr": rate}, outcome)
        for number, (rate, outcome) in enumerate(values)
    ]


@pytest.mark.parametrize(("direction", "best"), [("maximize", 2), ("minimize", 0)])
def test_the_table(direction: str, best: int) -> None:
    knobs = SweepConfig.model_validate({**KNOBS.model_dump(), "direction": direction})
    rows = trials(
        ("1e-05", TrialOutcome(0, "done", {"ppo/kl": -1.0})),
        ("0.00012345678", TrialOutcome(3, "failed in ppo: gate kl", {"ppo/kl": 9.0})),
        ("1e-3", TrialOutcome(0, "done", {"ppo/kl": 2.00004})),
        ("1e-2", TrialOutcome(0, "done", {"ppo/kl": None})),
        ("1e-1", TrialOutcome()),
        ("1", None),
    )
    headings, cells = SweepTable(Path("runs/t"), knobs, rows).cells()
    assert headings == ["trial", "run", "lr", "status", "ppo/kl"]  # the seed is everyone's
    assert "(best)" in cells[0][-1] and cells[0][0] == str(best)
    assert not any("(best)" in row[-1] for row in cells[1:])
    assert [int(row[0]) for row in cells[1:]] == [number for number in range(6) if number != best]
    by_number = {row[0]: row for row in cells}
    assert by_number["1"] == ["1", "runs/t-1", "0.0001235", "failed in ppo: gate kl", "9"]
    assert [row[3:] for row in cells[3:]] == [["done", "-"], ["unfinished", "-"], ["not started", "-"]]


def test_the_best_trial_leads_with_its_interval_and_what_does_not_vary_is_hidden(tmp_path: Path) -> None:
    knobs = SweepConfig.model_validate({**KNOBS.model_dump(), "metric": None})

    def outcome(gain: Sampled, other: float) -> TrialOutcome:
        metrics = {f"evaluate/{name}": value for name, value in gain.metrics("gold_gain/ppo").items()}
        metrics |= {"sft/skipped_steps": 0.0, "ppo/kl": other}
        gates = ("evaluate/gold_gain/ppo", "sft/skipped_steps", "ppo/kl")
        return TrialOutcome(0, "done", metrics, gates)

    rows = trials(
        ("1e-05", outcome(Sampled(0.1, 0.05, 0.15, 96), 3.0)),
        ("1e-04", outcome(Sampled(0.3, 0.2, 0.4, 96), 4.0)),
        ("1e-03", outcome(Sampled(0.25, 0.15, 0.35, 96), 5.0)),
    )
    by_gates = SweepTable(tmp_path, knobs, rows)
    assert by_gates.lead == "" and set(by_gates.shown_metrics) == {"evaluate/gold_gain/ppo", "ppo/kl"}
    assert by_gates.left_out == "1 figure that is the same in all trials: see sweep.json."
    named = knobs.model_copy(update={"metric": "evaluate/gold_gain/ppo", "direction": "maximize"})
    table = SweepTable(tmp_path, named, rows)
    assert table.lead == (
        "Best: trial 1 (lr=1e-04), evaluate/gold_gain/ppo = 0.3 (95%: 0.2 to 0.4, 96 rows). "
        "Its interval overlaps that of 1 of the others."
    )
    table.write()
    text = (tmp_path / "sweep.md").read_text()
    assert text.startswith(f"# Sweep {tmp_path.name}\n\n{table.lead}\n\n| trial |")
    by_gates.write()
    assert set(json.loads((tmp_path / "sweep.json").read_text())["trials"][0]["metrics"]) == {
        "evaluate/gold_gain/ppo", "sft/skipped_steps", "ppo/kl",
    }  # fmt: skip


def test_a_grid_of_several_keys(chain: Chain) -> None:
    outcome = chain.run(
        "-m", "stage=prepare", "run_name=two", "seed=0,1", "prepare.on_bad_row=choice(error,drop)"
    )
    assert outcome.code == 0, outcome.err
    pairs = [tuple(trial["overrides"].values()) for trial in sweep_file(chain, "two")["trials"]]
    assert pairs == [("0", "error"), ("0", "drop"), ("1", "error"), ("1", "drop")]


@pytest.mark.slow
def test_jobs_of_submitit_share_the_sft_model(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    outcome = chain.run(*submitit_sweep_arguments("submitit_local", "timeout_min=10"))
    assert outcome.code == 0, outcome.out + outcome.err
    check_submitit_sweep(chain)


@pytest.mark.parametrize("sweeper", ["grid", "optuna"])
def test_sweeping_over_a_secret_is_refused_before_anything_is_written(chain: Chain, sweeper: str) -> None:
    swept = "model.chat_template='a?token=hunter2secret','b?token=other1secret'"
    options = ("sweep.metric=ppo/held_out_score",) if sweeper == "optuna" else ()
    outcome = chain.run("-m", f"hydra/sweeper={sweeper}", "run_name=planted", *options, *BY_RULE, swept)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: model.chat_template: there is a secret among its values")
    assert "hunter2secret" not in outcome.out + outcome.err
    assert not (chain.directory / "runs" / "planted").exists()


def test_what_a_sweep_writes_holds_no_secret(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is a secret of the environment only now, and an override that all trials have."""
    trials = [Trial(0, tmp_path / "planted-0", {"model.path": "hunter2secret", "seed": "0"})]
    monkeypatch.setenv("MODEL_TOKEN", "hunter2secret")
    SweepTable(tmp_path, KNOBS, trials).write()
    fixed = ("run_name=planted_study", "sweep.trials=1", "+model.revision=hunter2secret")
    outcome = chain.run(*OPTUNA, *fixed, LR)
    assert outcome.code == 0, outcome.err
    written = [*tmp_path.glob("sweep.*"), *(chain.directory / "runs" / "planted_study").glob("*")]
    assert {path.name for path in written} >= {"sweep.md", "sweep.json", JOURNAL}
    for path in written:
        assert b"hunter2secret" not in path.read_bytes(), path


@pytest.mark.parametrize("content", ['{"code": 0, "sta', "[]"])
def test_a_note_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    write_note(tmp_path, TrialOutcome(0, "done"))
    assert read_note(tmp_path) == TrialOutcome(0, "done")
    (tmp_path / NOTE).write_text(content)
    with pytest.raises(ConfigError, match=r"trial\.json cannot be read .* Remove it"):
        read_note(tmp_path)
