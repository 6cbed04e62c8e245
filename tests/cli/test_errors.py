"""A mistake is told once, in the user's own keys, without a traceback, and loses nothing that is finished."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers.chains import STAGES, Chain, Outcome

CONTEXT = 1024  # of the tiny model
BY_RULE = ("ppo.critic.init=sft", "ppo.score.normalize=running", "stage=ppo")
CALLS: list[int] = []
"""How many responses each call of `fails_at_first` got."""
REHEARSED = 2
"""Rows that every reward is asked about before anything trains."""


def never_a_number(prompts: list[str], responses: list[str]) -> list[float]:
    return [math.nan] * len(responses)


def never_in_training(prompts: list[str], responses: list[str]) -> list[float]:
    """Fine in the rehearsal and on the four held-out prompts, never on the eight of a rollout."""
    return [0.5 if len(responses) <= 4 else math.nan] * len(responses)


def fails_at_first(prompts: list[str], responses: list[str]) -> list[float]:
    """The first rollout (the second call: the held-out prompts come before) has one infinite score."""
    scores = [float(len(response)) for response in responses]
    if len(responses) == REHEARSED:
        return scores
    CALLS.append(len(responses))
    return [math.inf, *scores[1:]] if len(CALLS) == 2 else scores


def fails_at_third(prompts: list[str], responses: list[str]) -> list[float]:
    """The second rollout (the third call) has one infinite score."""
    scores = [float(len(response)) for response in responses]
    if len(responses) == REHEARSED:
        return scores
    CALLS.append(len(responses))
    return [math.inf, *scores[1:]] if len(CALLS) == 3 else scores


def one_for_all(prompts: list[str], responses: list[str]) -> list[float]:
    return [1.0]


def forgets_to_return(prompts: list[str], responses: list[str]) -> None:
    pass


def in_words(prompts: list[str], responses: list[str]) -> list[str]:
    return ["good"] * len(responses)


@pytest.fixture
def chain(finished_chain: tuple[Chain, Outcome]) -> Chain:
    return finished_chain[0]


def complaint(outcome: Outcome) -> str:
    """The one message of a run that ended with exit code 2."""
    assert outcome.code == 2, outcome.out + outcome.err
    assert outcome.err.startswith("Error: ")
    assert (outcome.out + outcome.err).count("Error") == 1
    assert "Traceback" not in outcome.out + outcome.err
    return outcome.err.removeprefix("Error: ")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.kl.cof=1", ["ppo.kl.cof"]),
        ("colour=red", ["colour"]),
        ("model=huge", ["model=huge", "tiny"]),
        ("ppo.kl.coef=[", ["ppo.kl.coef"]),
        ("stage=rl", ["stage=rl", "no such stage", "all, prepare, sft, reward, generate, ppo, "]),
        ("stage=[sft,rl]", ["stage=rl"]),
        ("force=[all]", ["force=all", "no such stage"]),
        ("ppo.steps=many", ["ppo.steps='many'", "integer"]),
        ("ppo.steps=2.5", ["ppo.steps=2.5", "integer"]),
        ("sft.optim.lr=0", ["sft.optim.lr=0", "greater than 0"]),
        ("ppo.gamma=1.5", ["ppo.gamma=1.5", "less than or equal to 1"]),
        ("ppo.minibatch_episodes=9", ["ppo.minibatch_episodes=9 is more than ppo.batch_episodes=8."]),
        ("ppo.score.missing_stop=-1 ppo.score.missing_stop_penalty=1", ["Set only one of ppo.score"]),
        ("seed=-1", ["seed=-1"]),
        ("precision=fp16", ["precision='fp16': fp16 is not offered", "the loss is scaled", "Use auto, bf16"]),
        ("precision=fp64", ["precision='fp64'", "'auto', 'bf16' or 'fp32'"]),
        ("sft.peft=lorra", ["sft.peft='lorra'", "'none', 'lora'"]),
        ("sft.peft={method:freeze,rank:4}", ["sft.peft.method=freeze does not read rank", "Remove"]),
        ("gates=maybe", ["gates='maybe'", "'enforce' or 'warn'"]),
        ("ppo.reward=happiness", ["ppo.reward='happiness'", "python:MODULE:FUNCTION"]),
        ("ppo.reward=http://localhost:abc/score", ["ppo.reward", "'abc'", "http://HOST:PORT/PATH"]),
        ("ppo.steps=5 ppo.critic.warmup_steps=5", ["ppo.critic.warmup_steps=5 leaves none of ppo.steps=5"]),
        ("ppo.reward=vader ppo.critic.init=reward", ["init=reward: vader is no", "Use ppo.critic.init=sft."]),
        ("tracker.mode=loud", ["tracker.mode"]),
        ("model=hub", ["model=hub needs model.id=OWNER/NAME"]),
        ("model=local", ["model=local needs model.path=DIR"]),
        ("model=local model.path=nowhere", ["model.path=nowhere: no config.json"]),
        ("generate.splits=[]", ["generate.splits", "it must name at least one"]),
        ("evaluate.retention=[a/test.txt,b/test.txt]", ["evaluate.retention has two", "test, test"]),
        ("model.chat_template=fancy", ["model.chat_template=fancy", "chatml, plain"]),
        ("store_dir=sft.jsonl", ["store_dir=sft.jsonl"]),
        ("runs_dir=sft.jsonl", ["runs_dir=sft.jsonl"]),
        ("sft.data=nowhere.jsonl", ["sft.data=nowhere.jsonl: there is no such file"]),
        ("sft.data=samples:nothing", ["sft.data=samples:nothing", "instructions"]),
        ("sft.data={path:a.jsonl,hub:b}", ["sft.data", "exactly one of path, samples, hub"]),
        ("ppo.max_new_tokens=1024", ["ppo.max_new_tokens=1024 leaves no room", str(CONTEXT)]),
    ],
)  # fmt: skip
def test_a_mistaken_setting(chain: Chain, override: str, words: list[str]) -> None:
    outcome = chain.run(*override.split(" "))
    message = complaint(outcome)
    for word in words:
        assert word in message
    assert " ran" not in outcome.out and "runs (" not in outcome.out.replace("prepare runs (", "")


def test_a_cut_off_file(chain: Chain) -> None:
    text = (chain.directory / "sft.jsonl").read_text()
    (chain.directory / "cut.jsonl").write_text(text[: len(text) // 2])
    message = complaint(chain.run("sft.data=cut.jsonl"))
    assert message.startswith("sft.data: cut.jsonl line 1")
    assert "cut off" in message and "prepare.on_bad_row=drop" in message


@pytest.mark.parametrize(
    ("key", "content", "words"),
    [
        ("sft.data", "", ["sft.data=bad.jsonl: it holds no rows. Add rows, or name another source."]),
        ("sft.data", '{"prompt": "a"}\n', ["sft.data: bad.jsonl line 1", "answer"]),
        (
            "reward.pairs",
            '{"prompt": "a", "chosen": "b"}\n',
            ["reward.pairs: bad.jsonl line 1", '"rejected"'],
        ),
        (
            "ppo.prompts",
            json.dumps({"prompt": "x" * CONTEXT}),
            ["ppo.prompts: no rows are left", "1 too long (bad.jsonl line 1)", str(CONTEXT)],
        ),
        ("evaluate.prompts", "[1]\n", ["evaluate.prompts: bad.jsonl line 1", "found list"]),
    ],
)
def test_a_bad_data_set(chain: Chain, key: str, content: str, words: list[str]) -> None:
    (chain.directory / "bad.jsonl").write_text(content)
    message = complaint(chain.run(f"{key}=bad.jsonl"))
    for word in words:
        assert word in message


def test_prompts_without_answers_cannot_be_learned_from(chain: Chain) -> None:
    message = complaint(chain.run("sft.data=prompts.jsonl"))
    assert message.startswith("sft.data: prompts.jsonl line 1")
    assert "answer" in message or "completion" in message


@pytest.fixture(scope="module")
def foreign_reward(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with one token more than the policy has."""
    directory = tmp_path_factory.mktemp("foreign")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.add_tokens(["tell"]) == 1
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_critic_never_reads_another_models_token_ids(chain: Chain, foreign_reward: Path) -> None:
    asked = ("stage=ppo", f"ppo.reward=model:{foreign_reward}", "ppo.critic.init=reward")
    message = complaint(chain.run(*asked))
    assert message.startswith("ppo.critic.init=reward")
    assert "another tokenizer" in message and "Use ppo.critic.init=sft" in message


def test_a_reward_model_with_another_tokenizer_may_score(chain: Chain, foreign_reward: Path) -> None:
    outcome = chain.run("stage=ppo", f"ppo.reward=model:{foreign_reward}", "ppo.critic.init=sft")
    assert outcome.code == 0
    assert outcome.statuses["ppo"] == "ran"
    assert "reward" not in outcome.statuses  # our own reward model is not needed


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("python:no.such.module:f", ["no.such.module", "PYTHONPATH"]),
        (f"python:{__name__}:one_for_all", ["returned shape (1,) for 2 responses"]),
        (f"python:{__name__}:forgets_to_return", ["forgets_to_return: it returned nothing (None)"]),
        (f"python:{__name__}:in_words", ["in_words: it returned ['good', 'good'], which holds no numbers"]),
        (f"python:{__name__}:nothing", ["nothing", "Name a function"]),
        ("model:nowhere", ["model:nowhere: no config.json"]),
    ],
)
def test_a_reward_that_cannot_be_had(chain: Chain, reward: str, words: list[str]) -> None:
    outcome = chain.run(f"ppo.reward={reward}", *BY_RULE)
    message = complaint(outcome)
    for word in [reward.partition(":")[2].partition(":")[0], *words]:
        assert word in message


def weights_are_finite(directory: Path) -> bool:
    model = AutoModelForCausalLM.from_pretrained(directory)
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_reward_that_is_never_a_number_is_told_before_anything_trains(chain: Chain) -> None:
    outcome = chain.run(f"ppo.reward=python:{__name__}:never_a_number", "seed=7", *BY_RULE)
    message = complaint(outcome)
    assert message.startswith("ppo.reward")
    assert "gave no finite score for any response" in message
    assert outcome.statuses == {"prepare": "reused"}  # sft, of another seed, was not begun


def test_too_many_bad_steps_stop_the_run(chain: Chain) -> None:
    outcome = chain.run(f"ppo.reward=python:{__name__}:never_in_training", "ppo.max_bad_steps=1", *BY_RULE)
    message = complaint(outcome)
    assert message.startswith("ppo: step 2: 2 steps were skipped, more than ppo.max_bad_steps=1")
    assert f"Fix ppo.reward=python:{__name__}:never_in_training" in message
    assert "ppo: step 1 skipped: the reward gave nan" in outcome.out
    assert "ppo: step 2 skipped: the reward gave nan" in outcome.out
    batch = outcome.directory / "ppo-step2.jsonl"
    assert f"Its batch is in {batch.relative_to(chain.directory)}." in message
    rows = [json.loads(line) for line in batch.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8 and all(isinstance(row["response"], str) for row in rows)
    assert outcome.statuses == {"prepare": "reused", "sft": "reused", "ppo": "failed"}
    assert outcome.summary["stages"]["ppo"]["artifact"] is None
    assert chain.run().statuses == dict.fromkeys(STAGES, "reused")  # nothing finished was lost


@pytest.mark.parametrize(
    ("limit", "higher", "kept"),
    [("ppo.max_kl=0.01", "ppo.max_kl=null", 1), ("ppo.max_bad_steps=0", "ppo.max_bad_steps=1", 0)],
)
def test_with_a_higher_limit_the_same_command_goes_on(
    tmp_path: Path, limit: str, higher: str, kept: int
) -> None:
    """`kept` steps before the one that stopped it."""
    chain = Chain(tmp_path)
    CALLS.clear()
    settings = ["ppo.steps=4", "ppo.optim.lr=0.05", f"ppo.reward=python:{__name__}:fails_at_third", *BY_RULE]
    settings += ["ppo.max_bad_steps=9"] if "max_kl" in limit else []
    stopped = chain.run(*settings, limit)
    message = complaint(stopped)
    assert message.startswith("ppo: step ") and limit in message
    step = int(message.split()[2].removesuffix(":"))
    assert 1 < step < 4
    assert complaint(chain.run(*settings, limit)).startswith(("ppo: step ", "ppo.max_bad_steps=0: 1 steps"))
    gone_on = chain.run(*settings, higher)
    assert gone_on.code == 0, gone_on.err
    assert gone_on.key("ppo") == stopped.key("ppo")
    assert f"ppo: continues from step {step - kept} (" in gone_on.out
    lines = [json.loads(line) for line in (gone_on.directory / "metrics.jsonl").read_text().splitlines()]
    told = [line["step"] for line in lines if "ppo/kl_coef" in line]
    assert told == [1, 2, 3, 4]
    assert not list((tmp_path / "store" / "ppo").glob(".*.checkpoints"))  # published: no longer needed


def test_a_run_without_one_good_step_is_no_success(chain: Chain) -> None:
    outcome = chain.run(f"ppo.reward=python:{__name__}:never_in_training", "ppo.max_bad_steps=9", *BY_RULE)
    message = complaint(outcome)
    assert "every step was skipped" in message
    assert f"Fix ppo.reward=python:{__name__}:never_in_training" in message


def test_one_bad_step_is_skipped_counted_and_poisons_nothing(chain: Chain) -> None:
    CALLS.clear()
    outcome = chain.run(
        f"ppo.reward=python:{__name__}:fails_at_first", "ppo.steps=3", "ppo.optim.lr=0.01",
        "ppo.max_bad_steps=1", *BY_RULE,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    metrics = outcome.summary["stages"]["ppo"]["metrics"]
    assert metrics["ppo/bad_steps"] == 1
    lines = [json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "ppo/policy_loss" in line] == [2, 3]
    assert [line["ppo/bad_steps"] for line in lines if "ppo/kl_coef" in line] == [1, 1, 1]
    assert weights_are_finite(outcome.artifact("ppo"))
    assert metrics["ppo/first_kl"] == pytest.approx(0.0, abs=1e-4)  # step 2 began where step 1 did
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_learning_rate_that_explodes_is_named_as_the_cause(chain: Chain) -> None:
    outcome = chain.run("stage=ppo", "ppo.optim.lr=1e30", "ppo.critic.optim.lr=1e30")
    message = complaint(outcome)
    assert "not finite" in message
    assert "ower ppo.optim.lr" in message or "ower the learning rate" in message
    assert outcome.statuses["ppo"] == "failed"


def test_weights_that_were_cut_off_are_told_before_anything_trains(
    chain: Chain, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-10])
    outcome = chain.run("model=local", f"model.path={model}")
    assert "not a whole safetensors file" in complaint(outcome)
    assert outcome.statuses.keys() == {"prepare"}


def test_generated_scores_must_be_numbers(chain: Chain) -> None:
    outcome = chain.run("stage=generate", f"generate.reward=python:{__name__}:never_a_number")
    assert f"generate.reward=python:{__name__}:never_a_number gave nan" in complaint(outcome)
    assert "fix the reward, or use another one." in complaint(outcome)
    outcome = chain.run("stage=generate", f"generate.reward=python:{__name__}:never_in_training")
    message = complaint(outcome)
    assert message.startswith(
        f"generate.reward=python:{__name__}:never_in_training gave nan for the response"
    )
    assert "fix the reward for such responses, or use another one. The answers are in runs/" in message
    assert outcome.statuses["generate"] == "failed"


def test_the_process_itself_ends_with_2_and_one_message(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "model=tiny", "ppo.clip=-1"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "Error: ppo.clip=-1: it must be greater than 0.\n"
    assert not (tmp_path / "runs").exists()
