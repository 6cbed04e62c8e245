"""What `recipe=decide` makes of its command: the runs of its pilots, and complaints in the user's keys."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import run_main
from helpers.experiments import compose as composed
from rlhf.cli.api import compose
from rlhf.cli.decide import Decision, continues
from rlhf.cli.pilots import Pilots, pilot_arguments, share_of
from rlhf.config import ConfigError, validated
from rlhf.decide.candidate import Candidate, Result, State
from rlhf.decide.pilots import Pilot, PilotLog, Trial
from rlhf.pipeline.experiment import build_experiment, build_settings
from rlhf.pipeline.settings import CandidateConfig, DecideConfig
from rlhf.rewards.kinds import parts_of

TRIED = ["base", "few_shot", "best_of_n", "sft", "rejection_sampling", "ppo"]
"""Candidates whose configs differ most."""


@pytest.fixture(scope="module")
def decision(tmp_path_factory: pytest.TempPathFactory) -> Decision:
    runs = f"runs_dir={tmp_path_factory.mktemp('decision')}"
    given = ["recipe=decide", "model=tiny", "ppo.steps=9", runs, f"decide.only=[{','.join(TRIED)}]"]
    return Decision(compose(*given), "demo", pilot_arguments(given), None)


@pytest.fixture(scope="module")
def pilots(decision: Decision) -> Pilots:
    return decision.pilots


def config_of(pilots: Pilots, name: str, share: float = 1.0, **changes: Any) -> dict[str, Any]:
    return pilots.trial_config(Trial(name, share, "choosing", 0)._replace(**changes), "demo-run")


def test_pilots_get_the_commands_keys_without_those_of_the_decision() -> None:
    kept = [
        "model=tiny", "sft@2.epochs=1", "+sft.optim.x=1", "~sft.gates.lm_eval", "stages.x=1", "budgets=3",
        "evaluate.gold='python:decide.py:f'", "decider=1", "+experiment=mine",
    ]  # fmt: skip
    own = [
        "recipe=decide", "budget=30m", "run_name=demo", "stage=all", "decide.shares=[0.5,1]",
        "+decide.candidates.mine.asks=sft", "~decide.candidates.ppo", "++decide.seeds=2",
        "decide@decide.candidates.mine=sft", "+decide@decide.candidates.mine=sft", "decide=null",
    ]  # fmt: skip
    assert pilot_arguments([*own[:5], *kept, *own[5:]]) == kept


def test_a_pilot_only_evaluates_one_candidate(pilots: Pilots) -> None:
    config = config_of(pilots, "sft")
    assert config["stage"] == ["evaluate"] and config["run_name"] == "demo-run"
    assert (config["budget"], config["decide"]["candidates"], config["gates"]) == (None, {}, "warn")
    evaluate = config["evaluate"]
    assert (evaluate["init"], evaluate["policies"], evaluate["subject"]) == ("base", ["sft"], "sft")
    assert (evaluate["part"], evaluate["num_timed"], evaluate["lm_eval"]) == ("choosing", 0, [])
    assert evaluate["gates"] and {*evaluate["gates"].values()} == {None}
    assert evaluate["reward"] is None and evaluate["num_prompts"] is None
    assert config["sft"]["peft"] == "none" and config["sft"]["optim"]["schedule"] == "constant"
    needed = build_experiment(config).needed()
    assert "sft" in needed and not {"ppo", "dpo", "grpo"} & {*needed}


def test_only_best_of_n_has_a_reward(pilots: Pilots) -> None:
    assert config_of(pilots, "best_of_n")["evaluate"]["reward"] is not None
    assert config_of(pilots, "best_of_n")["evaluate"]["subject"] == "base+best_of_n"
    for name in ("base", "few_shot", "sft", "ppo", "rejection_sampling"):
        assert config_of(pilots, name)["evaluate"]["reward"] is None


def test_the_sealed_questions_are_asked_of_the_base_model_too(pilots: Pilots) -> None:
    policies = {
        name: config_of(pilots, name, part="sealed")["evaluate"]["policies"]
        for name in ("base", "few_shot", "ppo")
    }
    assert policies == {"base": ["base"], "few_shot": ["base", "base+few_shot"], "ppo": ["base", "ppo"]}
    evaluate = config_of(pilots, "sft", part="sealed")["evaluate"]
    assert (evaluate["part"], evaluate["num_timed"], evaluate["subject"]) == ("sealed", 8, "sft")


@pytest.mark.parametrize(
    ("full", "share", "length"),
    [(9, 0.25, 2), (9, 0.5, 4), (9, 1.0, 9), (3, 0.1, 1), (1, 0.25, 1), (1.0, 0.25, 0.25), (3.0, 0.5, 1.5)],
)
def test_a_share_of_a_whole_number_is_a_whole_one(full: float, share: float, length: float) -> None:
    found = share_of(full, share)
    assert found == length and type(found) is type(full)


def test_a_pilot_trains_a_share_of_its_length(pilots: Pilots) -> None:
    """9 steps of PPO: a quarter is 2. Epochs have fractions."""
    assert pilots.share_at("ppo", 0.25) == pytest.approx(2 / 9)
    assert config_of(pilots, "ppo", 2 / 9)["ppo"]["steps"] == 2
    assert config_of(pilots, "ppo", 0.01)["ppo"]["steps"] == 1
    assert config_of(pilots, "ppo")["ppo"]["steps"] == 9
    full = pilots.full_length("sft")
    assert isinstance(full, float) and pilots.share_at("sft", 0.25) == 0.25
    assert config_of(pilots, "sft", 0.25)["sft"]["epochs"] == full / 4
    assert pilots.share_at("base", 0.25) == pilots.share_at("best_of_n", 0.25) == 1.0  # no length


def test_the_length_of_a_named_instance(pilots: Pilots) -> None:
    """Only the second SFT is shortened: the first one made the answers."""
    full = pilots.full_length("rejection_sampling")
    experiment = build_experiment(config_of(pilots, "rejection_sampling", 0.25))
    first, second = (vars(experiment.stages[name]) for name in ("sft", "sft@best"))
    assert second["epochs"] == full / 4 and first["epochs"] == pilots.full_length("sft")
    assert second["init"] == "sft"  # the candidate's own keys of the instance stay
    assert "generate@best" in experiment.needed()


def test_a_length_that_the_candidate_sets_itself_is_shortened_too(pilots: Pilots) -> None:
    own = (*pilots.config.candidates["rejection_sampling"].set, "sft@best.epochs=2")
    found = with_candidate(pilots, asks="sft@best", set=own, length="sft@best.epochs")
    config = found.trial_config(Trial("mine", 0.25, "choosing", 0), None)
    assert vars(build_experiment(config).stages["sft@best"])["epochs"] == 0.5


def test_a_seed_changes_the_runs_seed_and_its_name(pilots: Pilots) -> None:
    trial = Trial("ppo", 2 / 9, "sealed", 2)
    assert config_of(pilots, "ppo", seed=0)["seed"] == 0
    assert pilots.trial_config(trial, None)["seed"] == 2
    assert pilots.run_name(trial) == "demo-ppo-22.2222-sealed-seed2"
    assert pilots.run_name(Trial("sft", 0.25, "choosing", 0)) == "demo-sft-25"
    assert pilots.run_name(Trial("few_shot", 1.0, "choosing", 0)) == "demo-few_shot"


def test_configs_of_trials_are_apart(pilots: Pilots) -> None:
    before = json.dumps(pilots.composed["ppo"])
    config_of(pilots, "ppo", 0.25, part="sealed", seed=1)["ppo"]["kl"]["coef"] = 7
    assert json.dumps(pilots.composed["ppo"]) == before


def test_who_is_trained(decision: Decision) -> None:
    """The demo's reward is learned, so best of n needs training too."""
    trained = {name: each.is_trained for name, each in decision.candidates.items()}
    assert trained == {
        "base": False, "few_shot": False, "best_of_n": True, "sft": True, "rejection_sampling": True,
        "ppo": True,
    }  # fmt: skip


def test_the_command_makes_the_winner_at_full_length(pilots: Pilots) -> None:
    command = pilots.command("rejection_sampling")
    assert command.startswith("python -m rlhf sft.optim.schedule=constant ")
    assert command.endswith(" sft@best.init=sft sft@best.data=stage:generate@best stage=sft@best")
    assert " ppo.steps=9 " in command and "decide" not in command and "epochs" not in command


@pytest.mark.parametrize("place", ["mine.yaml", "sub/my-own.yml", "{here}/mine.yaml"])
def test_the_command_names_an_experiment_file_as_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """So it can be pasted. Mappings too: Hydra gets a null before them."""
    monkeypatch.chdir(tmp_path)
    place = place.format(here=tmp_path)
    Path(place).parent.mkdir(exist_ok=True)
    Path(place).write_text("# @package _global_\nsft:\n  epochs: 3\n")
    gold = "evaluate.gold={source: verify:number}"
    typed = [f"+experiment={place}", gold, "ppo.steps=9", "evaluate.reward=null"]
    arguments = ["recipe=decide", "model=tiny", "decide.only=[base,sft]", *typed]
    found = Decision(compose(*arguments), "demo", pilot_arguments(arguments), tmp_path)
    words = shlex.split(found.pilots.command("sft"))
    assert [each for each in words if each in typed] == typed and "evaluate.gold=null" not in words
    assert not [each for each in words if each.startswith("+experiment") and each not in typed]
    assert words[3:5] == ["--config-dir", str(tmp_path)]


def with_candidate(pilots: Pilots, **keys: Any) -> Pilots:
    """Pilots of one candidate, `mine`."""
    own = CandidateConfig(**{"title": "mine", "asks": "sft"} | keys)
    config = pilots.config.model_copy(update={"candidates": {"mine": own}, "only": None})
    return Pilots(config, pilots.directory, 60.0, ["model=tiny"], None)


@pytest.mark.parametrize("length", ["sft.epoch", "sft.peft", "sftt.epochs", "epochs"])
def test_a_length_that_is_no_number_is_told(pilots: Pilots, length: str) -> None:
    found = with_candidate(pilots, length=length)
    with pytest.raises(
        ConfigError, match=rf"^decide\.candidates\.mine\.length={length}: there is no such key"
    ):
        found.share_at("mine", 0.25)


def test_keys_of_a_candidate_that_cannot_be_used_name_it(pilots: Pilots) -> None:
    with pytest.raises(
        ConfigError, match=r"^decide\.candidates\.mine: its keys .*Did you mean sft\.optim\.lr"
    ):
        with_candidate(pilots, set=("sft.optim.lrr=1",))


def test_a_pilot_that_fails_says_why_and_teaches_no_pace(pilots: Pilots, tmp_path: Path) -> None:
    """Its prompts are missing."""
    own = pilots.config.candidates["base"]
    keys = [f"runs_dir={tmp_path}", f"store_dir={tmp_path / 'store'}", "evaluate.prompts=missing.jsonl"]
    config = pilots.config.model_copy(update={"candidates": {"base": own}})
    (tmp_path / "demo").mkdir()
    found = Pilots(config, tmp_path / "demo", 60.0, ["model=tiny", "device=cpu", *keys], None)
    trial, candidate = Trial("base", 1.0, "choosing", 0), Candidate("base", own, False)
    assert found.run(trial, candidate, {"evaluate": 1.0}, 1.0, 60.0) is None
    assert candidate.state is State.FAILED and "missing.jsonl" in candidate.why
    (pilot,) = PilotLog(tmp_path / "demo" / "pilots.jsonl").pilots
    assert (pilot.trial, pilot.ended, pilot.why) == (trial, "failed", candidate.why)
    assert found.log.done(trial) is None and pilot.seconds > 0
    assert found.pace.overhead == 0.0


def changed(pilots: Pilots, **changes: Any) -> DecideConfig:
    """The section `decide` with these changes, as a run checks it."""
    return validated(DecideConfig, pilots.config.model_dump() | changes, "decide")


@pytest.mark.parametrize(
    "shares", [[0.5, 0.25, 1], [0.25, 0.5], [0.5, 0.5, 1], [0.5, 2], [], [0, 1], [-1, 1]]
)
def test_shares_rise_and_end_with_the_full_length(pilots: Pilots, shares: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"^decide\.shares"):
        changed(pilots, shares=shares)
    assert changed(pilots, shares=[0.1, 1]).shares == [0.1, 1.0]


def test_limits_are_ranges_of_known_figures(pilots: Pilots) -> None:
    limits = pilots.config.limits
    assert limits.ranges == {}
    given = {"stop_rate": {"min": 0.9}, "length_ratio": {"max": 2}}
    ranges = changed(pilots, limits=limits.model_dump() | given).limits.ranges
    assert ranges == {"stop_rate": (0.9, math.inf), "length_ratio": (-math.inf, 2.0)}
    for wrong in ({"stop_rates": {"min": 0.9}}, {"stop_rate": {"mim": 0.9}}):
        with pytest.raises(ConfigError, match=r"^decide\.limits\.stop_rate.*Did you mean"):
            changed(pilots, limits=limits.model_dump() | wrong)
    with pytest.raises(ConfigError, match=r"^decide\.limits\.stop_rate: min=0\.9 is above max=0\.5"):
        changed(pilots, limits=limits.model_dump() | {"stop_rate": {"min": 0.9, "max": 0.5}})
    with pytest.raises(ConfigError, match=r"^decide\.limits\.stop_rates\.min: there is no such key"):
        compose("recipe=decide", "decide.limits.stop_rates.min=0.9")


def test_only_known_candidates_are_tried(pilots: Pilots) -> None:
    assert [*pilots.config.tried] == TRIED and "dpo" in pilots.config.candidates
    assert changed(pilots, only=None).tried == pilots.config.candidates
    with pytest.raises(ConfigError, match=r"decide\.only: there is no candidate ppp\. Did you mean ppo\?"):
        changed(pilots, only=["base", "ppp"])
    with pytest.raises(
        ConfigError, match=r"decide\.only=\[\]: name at least one candidate, or null to try all"
    ):
        changed(pilots, only=[])


@pytest.mark.parametrize(
    ("budget", "recipe", "complaint"),
    [
        ("soon", "decide", "budget=soon: give a time such as 90s"),
        ("0", "decide", "budget=0: give a time such as 90s"),
        ("30m", "rlhf", "budget=30m: only recipe=decide has a budget"),
    ],
)
def test_budget_and_recipe_belong_together(budget: str, recipe: str, complaint: str) -> None:
    config = composed(f"recipe={recipe}", "model=tiny") | {"budget": budget}
    with pytest.raises(ConfigError, match=f"^{complaint}"):
        Decision(config, "demo", [], None)


@pytest.mark.parametrize("value", ["0", "-1", "1.5"])
def test_a_budget_that_is_a_number_is_an_amount(value: str) -> None:
    """What is wrong with it says `recipe=decide`, in its own words."""
    assert build_settings(compose("recipe=decide", "model=tiny", f"budget={value}")).budget == float(value)


def test_a_decision_without_a_name_is_continued_by_the_one_that_it_got() -> None:
    assert continues("mine", "mine").startswith("The same command continues")
    assert continues(None, "20261202-1").startswith("With run_name=20261202-1, the same command continues")


def test_the_range_of_unknown_scores_is_the_largest_difference_on_one_question(tmp_path: Path) -> None:
    """Else three equal differences would look certain. Seeds count like candidates."""
    decision = decision_in(tmp_path, "decide.only=[base,sft]", "evaluate.gold=vader")
    assert decision.score_range is None
    base, sft = decision.candidates.values()
    base.chosen = Result("ab", {"a": 0.5, "b": 9.0}, {}, "run", ())
    sft.chosen = Result("ab", {"a": 2.0}, {}, "run", ())
    assert decision.score_range == 1.5
    base.sealed = [Result("xyz", dict.fromkeys("xyz", 0.0), {}, "run", ())]
    sft.sealed = [Result("xyz", dict.fromkeys("xyz", score), {}, "run", ()) for score in (2.0, 3.0)]
    assert decision.score_range == 3.0


def test_where_base_is_the_best_option_there_is_one_gain_with_one_interval(tmp_path: Path) -> None:
    """Two finalists are corrected for each other, a gain over base alone was not."""
    decision = decision_in(tmp_path, "decide.only=[base,sft,sft_lora]", "evaluate.gold=vader")
    prompts = [str(number) for number in range(40)]
    base, *finalists = decision.candidates.values()
    for place, each in enumerate([base, *finalists]):
        each.train_seconds = 1.0
        scores = {prompt: 0.3 * place + 0.01 * (number % 7) for number, prompt in enumerate(prompts)}
        each.sealed = [Result(prompts, scores, {}, f"run-{place}", [])]
        rows = [{"policy": "base", "prompt": prompt, "response": "", "gold": 0.0} for prompt in range(40)]
        artifact = decision.pilots.run_directory(f"run-{place}") / "artifacts" / "evaluate"
        artifact.mkdir(parents=True)
        (artifact / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decision.pilots.kind = "gold"
    decision.directory.mkdir()
    decision.judge(finalists, base)
    for each in finalists:
        assert each.gain is not None and each.gain_over_base == each.gain


def test_a_secret_in_an_error_stands_in_no_file_of_a_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as where a reward function fails and says how it connects."""
    monkeypatch.setenv("DB_PASSWORD", "planted-pass-1234")
    decision = decision_in(tmp_path, "decide.only=[base,sft]", "evaluate.gold=vader")
    decision.directory.mkdir(parents=True)
    why = "cannot connect with planted-pass-1234"
    sft = decision.candidates["sft"]
    sft.state, sft.why = State.FAILED, why
    decision.pilots.log.add(
        Pilot(Trial("sft", 0.25, "choosing", 0), "demo-sft-25", 0.0, 1.0, 1.0, "failed", why)
    )
    decision.write()
    written = [path.read_text() for path in decision.directory.iterdir() if path.is_file()]
    assert len(written) >= 3 and any("cannot connect" in each for each in written)
    assert not any("planted-pass" in each for each in written)


def test_a_decision_is_not_swept(tmp_path: Path) -> None:
    outcome = run_main(tmp_path, ["-m", "recipe=decide", "model=tiny", "seed=0,1"], tmp_path)
    assert outcome.code == 2 and not [*tmp_path.glob("runs/*/*/summary.json")]
    assert outcome.err.startswith(
        "Error: recipe=decide has pilots of its own, so it cannot be swept. Leave out -m."
    )


def decision_in(directory: Path, *given: str) -> Decision:
    places = (f"runs_dir={directory / 'runs'}", f"store_dir={directory / 'store'}")
    arguments = ["recipe=decide", "model=tiny", "device=cpu", *places, *given]
    return Decision(compose(*arguments), "demo", pilot_arguments(arguments), None)


def test_a_pilot_that_would_learn_nothing_waits_for_a_longer_one(tmp_path: Path) -> None:
    """Of 8 steps, the critic alone learns in 3: more than the 2 of the first rung."""
    decision = decision_in(tmp_path, "decide.only=[base,ppo]", "ppo.steps=8", "ppo.critic.warmup_steps=3")
    decision.check_candidates()
    ppo = decision.candidates["ppo"]
    assert (ppo.state, ppo.first_share) == (State.WAITING, 0.5) and ppo.planned["ppo"] > 0


@pytest.mark.parametrize(
    ("gold", "score_range"),
    [
        ("verify:number", 1.0),
        ("vader", None),
        ("{of: [{source: verify:number}, {source: verify:exact}]}", None),  # their sum is at most 2
    ],
)
def test_only_a_single_verifiers_scores_lie_between_0_and_1(
    tmp_path: Path, gold: str, score_range: float | None
) -> None:
    pilots = decision_in(tmp_path, "decide.only=[base]", f"evaluate.gold={gold}").pilots
    (tmp_path / "candidates.json").write_text('{"quality": "gold"}')
    pilots.find_judge(tmp_path)
    assert pilots.score_range == score_range


@pytest.mark.parametrize(
    ("only", "budget", "reserve"),
    [
        # 50 s for the best option without training, and twice as much for each of 3 finalists
        ("base,sft,sft_lora,sft_prefix,sft_prompt", "2h", 350.0),
        ("base,sft,sft_lora,sft_prefix,sft_prompt", "900s", 300.0),  # a third of the budget
        ("base,sft,sft_lora,sft_prefix,sft_prompt", "60s", 150.0),  # one finalist
        ("base,sft,sft_lora", "2h", 250.0),  # there are only two
        ("base,sft", "2h", 150.0),
        ("base,few_shot", "2h", 150.0),
    ],
)
def test_the_judgement_leaves_time_for_pilots(tmp_path: Path, only: str, budget: str, reserve: float) -> None:
    decision = decision_in(tmp_path, f"decide.only=[{only}]", f"budget={budget}")
    decision.sealed_seconds = 50.0
    decision.reserve_for([])
    assert decision.pilots.reserve == pytest.approx(reserve)


def test_no_time_is_reserved_for_who_cannot_be_a_finalist(tmp_path: Path) -> None:
    decision = decision_in(tmp_path, "decide.only=[base,sft,sft_lora,sft_prefix]", "budget=2h")
    decision.sealed_seconds = 50.0
    sft, lora, prefix = [each for each in decision.candidates.values() if each.is_trained]
    sft.state, lora.state, prefix.state = State.RUNNING, State.WORSE, State.CUT  # the last one had no pilot
    for each in (sft, lora):
        each.chosen = Result("ab", {"a": 0.5}, {}, "run", ())
    decision.reserve_for([])
    assert decision.pilots.reserve == pytest.approx(150.0)
    prefix.chosen = sft.chosen  # it was cut after a pilot, and may be asked
    decision.reserve_for([])
    assert decision.pilots.reserve == pytest.approx(250.0)


@pytest.mark.parametrize(
    ("asks", "given", "said"),
    [
        ("grpo", (), r"^ppo\.reward: learned is no verifier"),
        ("grpo", ("ppo.reward=verify:number", "ppo.score.normalize=none"), ""),
        ("sft", (), ""),  # it reads no reward, so none is missing
        ("base", (), ""),
    ],
)
def test_a_candidate_that_needs_a_verifier(
    tmp_path: Path, asks: str, given: tuple[str, ...], said: str
) -> None:
    """Told before the pairs are missed that a reward model would need."""
    mine = f"+decide.candidates.mine={{title: Mine, asks: {asks}, needs: [verifier]}}"
    data = ("sft.data=mine.jsonl", "ppo.prompts=mine.jsonl", "evaluate.reward=null", "evaluate.reference=a")
    decision = decision_in(tmp_path, mine, "decide.only=[base,mine]", "grpo.init=base", *data, *given)
    if said:
        with pytest.raises(ConfigError, match=said):
            decision.pilots.check_needs("mine")
    else:
        decision.pilots.check_needs("mine")


def test_best_of_n_by_the_right_answers_is_no_option(tmp_path: Path) -> None:
    decision = decision_in(
        tmp_path, "decide.only=[base,best_of_n]", "ppo.reward=verify:exact", "ppo.score.normalize=none"
    )
    with pytest.raises(ConfigError, match=r"evaluate\.reward: it reads the right answers"):
        decision.pilots.check_needs("best_of_n")
    decision.pilots.check_needs("base")


@pytest.mark.parametrize(
    ("gold", "sources"),
    [
        ("{source: verify:regex, args: {pattern: yes}}", ["verify:regex"]),
        ("{of: [{source: verify:number}, {source: learned, weight: 2}]}", ["verify:number", "reward"]),
        ("learned", ["reward"]),
    ],
)
def test_each_seed_has_the_judge_of_the_first_one(tmp_path: Path, gold: str, sources: list[str]) -> None:
    """Only what a seed would train anew is replaced, by the model of the first seed."""
    given = ("decide.only=[base]", f"evaluate.gold={gold}")
    pilots = decision_in(tmp_path, *given).pilots
    model = f"model:{tmp_path / 'runs' / 'demo-base-sealed' / 'artifacts' / 'reward'}"
    config = pilots.trial_config(Trial("base", 1.0, "sealed", 1), None)
    parts = parts_of(vars(build_experiment(config).stages["evaluate"])["gold"])
    assert [each.source for each in parts] == [model if each == "reward" else each for each in sources]
    assert parts[0].args == ({"pattern": "yes"} if sources == ["verify:regex"] else {})
    assert "reward" not in build_experiment(config).needed()


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("length", "sft.epoch", "there is no such key, or it is no number. Did you mean sft.epochs?"),
        ("length", "sft.peft", "there is no such key, or it is no number."),
        ("length", "sftt.epochs", "there is no such key, or it is no number. Did you mean sft.epochs?"),
        ("length", "sft@2.epochs", "there is no such key, or it is no number."),
        ("length", "ppo.steps", "asks=sft runs no ppo."),
        ("asks", "sftt", "no stage of that name makes a model that answers. Did you mean sft?"),
        ("asks", "reward", "no stage of that name makes a model that answers."),
        ("asks", "sftt+retrieval", "no stage of that name makes a model that answers. Did you mean sft?"),
    ],
)
def test_keys_of_an_own_candidate_that_name_nothing_are_refused_at_once(
    tmp_path: Path, key: str, value: str, complaint: str
) -> None:
    own = {"title": "mine", "asks": "sft", "length": "sft.epochs", key: value}
    words = ",".join(f"{name}: '{word}'" for name, word in own.items())
    with pytest.raises(ConfigError) as refused:
        decision_in(tmp_path, "decide.only=[base,mine]", f"+decide.candidates.mine={{{words}}}")
    assert str(refused.value).startswith(f"decide.candidates.mine.{key}={value}: {complaint}")


def test_packaged_candidates_name_stages_and_keys_that_there_are(tmp_path: Path) -> None:
    """Also without data for them: then they cannot run, and the others go on."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    decision = decision_in(tmp_path, f"sft.data={tmp_path / 'a.jsonl'}")
    assert {*decision.candidates} == {*decision.config.candidates}


@pytest.mark.parametrize(
    ("limit", "others", "complaint"),
    [
        ("retention_perplexity_ratio.max=1.15", [], "evaluate.retention is null. Set evaluate.retention=[sa"),
        ("question_accuracy_change.min=-0.1", [], "evaluate.retention is null. Set evaluate.retention=[samp"),
        ("seconds_p95.max=2", ["decide.num_timed=0"], "decide.num_timed is 0. Set decide.num_timed=8"),
        ("retention_perplexity_ratio.max=1.15", ["evaluate.retention=samples:retention_sentences"], None),
        ("seconds_p95.max=2", [], None),
        ("stop_rate.min=0.9", ["decide.num_timed=0"], None),
    ],
)
def test_a_limit_on_what_is_not_measured_is_refused_at_once(
    tmp_path: Path, limit: str, others: list[str], complaint: str | None
) -> None:
    """With data of the user's own no retention set is used by itself."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    data = f"sft.data={tmp_path / 'a.jsonl'}"
    given = ("decide.only=[base,sft]", data, f"decide.limits.{limit}", *others)
    if complaint is None:
        decision_in(tmp_path, *given)
        return
    with pytest.raises(ConfigError) as refused:
        decision_in(tmp_path, *given)
    key = limit.partition(".")[0]
    assert str(refused.value).startswith(
        f"decide.limits.{key}: it is not measured for SFT, all parameters, as {complaint}"
    )
