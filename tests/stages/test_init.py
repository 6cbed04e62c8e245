"""PPO and the reward model start from the SFT model, from the base model, or from a directory."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.chains import Chain, Outcome
from helpers.costs import gpus
from helpers.experiments import build
from helpers.jobs import small_job, tiny_base
from rlhf.config import ConfigError
from rlhf.costs.stage_cost import StageCost
from rlhf.digests import weights_digest
from rlhf.models import base
from rlhf.models.start import ModelDirectory, architecture_complaints, check_start, init_digest
from rlhf.pipeline.costing import cost_of
from rlhf.pipeline.graph import sampled_models


def weights(outcome: Outcome, stage: str) -> dict[str, torch.Tensor]:
    return load_file(outcome.artifact(stage) / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ("", ["prepare", "sft", "reward", "generate", "ppo", "evaluate"]),
        ("ppo.init=base reward.init=base", ["prepare", "reward", "generate", "ppo", "evaluate"]),
        ("ppo.init=base", ["prepare", "sft", "reward", "generate", "ppo", "evaluate"]),
        ("ppo.init=base reward.init=base stage=[ppo,sft]", ["prepare", "sft", "reward", "generate", "ppo"]),
        ("ppo.init=base ppo.reward=vader ppo.critic.init=sft", ["prepare", "generate", "ppo", "evaluate"]),
        ("ppo.reward=vader ppo.critic.init=sft", ["prepare", "sft", "generate", "ppo", "evaluate"]),
        ("ppo.init=base reward.init=base stage=compare", ["prepare", "reward", "generate", "ppo", "compare"]),
        ("ppo.init=some/where reward.init=some/where", ["prepare", "reward", "generate", "ppo", "evaluate"]),
        ("generate.policy=dpo stage=generate", ["prepare", "sft", "reward", "dpo", "generate"]),
        ("generate.policy=dpo dpo.init=base reward.init=base stage=generate",
         ["prepare", "reward", "dpo", "generate"]),
        ("generate.policy=./dpo stage=generate", ["prepare", "sft", "reward", "generate"]),
        ("generate.policy=merge generate.reward=vader stage=generate",
         ["prepare", "sft", "merge", "generate"]),
        ("ppo.init=dpo dpo.init=base ppo.reward=vader ppo.critic.init=sft stage=ppo",
         ["prepare", "dpo", "generate", "ppo"]),
        ("generate.policy=ppo ppo.reward=vader ppo.critic.init=sft ppo.score.normalize=none stage=generate",
         ["prepare", "sft", "ppo", "generate"]),
    ],
)  # fmt: skip
def test_no_model_is_trained_that_nothing_reads(overrides: str, needed: list[str]) -> None:
    assert build("model=tiny", *overrides.split()).needed() == needed


def test_the_policies_that_are_compared_follow() -> None:
    def policies(*overrides: str) -> list[str]:
        found: list[str] = build(*overrides).resolved["evaluate"]["policies"]
        return found

    assert policies() == ["base", "sft", "ppo"]
    assert policies("ppo.init=base") == ["base", "ppo"]
    assert policies("ppo.init=some/where") == ["base", "init", "ppo"]
    assert policies("ppo.init=dpo") == ["base", "dpo", "ppo"]
    with pytest.raises(ConfigError, match=r"evaluate\.gates.win_rate=null"):
        build("ppo.init=base", "evaluate.policies=[sft,ppo]")
    with pytest.raises(ConfigError, match=r"init is a directory, and evaluate\.init=base"):
        build("ppo.init=base", "evaluate.policies=[base,init,ppo]")


def test_a_start_that_is_no_text_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.init=\['sft'\]: "):
        build("ppo.init=[sft]")


def test_scores_are_normalised_by_the_start_of_the_policy() -> None:
    assert build("ppo.init=base").resolved["generate"]["policy"] == "base"
    with pytest.raises(ConfigError, match=r"generate\.policy=sft: .* so this must be base"):
        build("ppo.init=base", "generate.policy=sft")


@pytest.mark.slow
def test_an_instruction_tuned_model_needs_pairs_alone(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    outcome = chain.run("ppo.init=base", "reward.init=base", "sft.data=null", "evaluate.prompts=reward.pairs")
    assert outcome.code == 0, outcome.err
    assert outcome.statuses == dict.fromkeys(["prepare", "reward", "generate", "ppo", "evaluate"], "ran")
    metrics = outcome.summary["stages"]["evaluate"]["metrics"]
    assert {"evaluate/kl/ppo", "evaluate/win_rate", "evaluate/gold_gain"} <= metrics.keys()
    assert not {"evaluate/kl/base", "evaluate/task_gain"} & metrics.keys()
    assert outcome.summary["stages"]["ppo"]["metrics"]["ppo/first_kl"] == 0.0
    origins = [
        json.loads((outcome.artifact(stage) / "adapter" / "base.json").read_bytes())
        for stage in ("reward", "ppo")
    ]
    base = (outcome.artifact("ppo") / origins[1]["directory"]).resolve()
    assert {origin["digest"] for origin in origins} == {weights_digest(base)}
    assert base.parent.name == "base"
    assert "win rate against base " in outcome.out
    assert "KL from base, nats per sequence" in outcome.out


@pytest.mark.slow
def test_a_directory_is_as_good_as_the_stage_that_made_it(
    finished_chain: tuple[Chain, Outcome], tmp_path: Path
) -> None:
    chain, by_sft = finished_chain
    mine, moved = tmp_path / "mine", tmp_path / "moved"
    shutil.copytree(by_sft.artifact("sft"), mine)
    (mine / "manifest.json").unlink()

    def run(directory: Path, *overrides: str) -> Outcome:
        return chain.run(f"ppo.init={directory}", f"reward.init={directory}", *overrides)

    outcome = run(mine)
    assert outcome.code == 0, outcome.err
    assert "sft" not in outcome.statuses
    for stage in ("reward", "ppo"):
        assert equal(weights(outcome, stage), weights(by_sft, stage))
    found, wanted = (each.summary["stages"]["evaluate"]["metrics"] for each in (outcome, by_sft))
    for name in ("win_rate", "gold_gain", "kl/ppo", "task_loss/base"):
        assert found[f"evaluate/{name}"] == wanted[f"evaluate/{name}"], name
    assert found["evaluate/task_loss/init"] == wanted["evaluate/task_loss/sft"]
    assert "win rate against PPO's start " in outcome.out

    mine.rename(moved)
    assert set(run(moved, "stage=ppo").statuses.values()) == {"reused"}
    (moved / "README.md").write_text("Another model.")
    changed = run(moved, "stage=reward")
    assert changed.statuses == {"prepare": "reused", "reward": "ran"}
    assert changed.key("reward") != outcome.key("reward")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            "config.json",
            "ppo.init=.*: no config.json there. Use base, a stage that makes a policy .*, or a save",
        ),
        ("model.safetensors", r"ppo.init=.*: no \*.safetensors there. .*: merge an adapter first"),
        ("", "not a whole safetensors file"),
        ("tokenizer.json", "^ppo.init=.*/mine: cannot be read as a model: .* tokenizer.*save them again"),
    ],
)
def test_a_directory_that_is_no_model_is_told_before_anything_trains(
    tiny_model: Path, tmp_path: Path, damage: str, words: str
) -> None:
    directory = tmp_path / "mine"
    shutil.copytree(tiny_model, directory)
    if damage:
        (directory / damage).unlink()
    else:
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    base = tiny_base(tiny_model)
    with pytest.raises(ConfigError, match=words):
        init_digest("ppo.init", ModelDirectory(directory))
        check_start("ppo.init", ModelDirectory(directory), base)


LONGER = "{% set unused = 'x' %}" + "A long opening. " * 9
"""Of a chat template: 144 tokens more to each conversation, a byte each."""


def another_start(tiny_model: Path, directory: Path, *, context: int, template: str = "") -> Path:
    """The tiny model with another context, and more words in its chat template."""
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    known = directory / "chat_template.jinja"
    own = known.read_text() if known.exists() else settings["chat_template"]
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    known.write_text(template + own)
    return directory


@pytest.mark.parametrize(("context", "template"), [(512, LONGER), (100, "")])
def test_prompts_that_do_not_fit_the_start_are_told_before_anything_trains(
    tiny_model: Path, tmp_path: Path, context: int, template: str
) -> None:
    start = another_start(tiny_model, tmp_path / "start", context=context, template=template)
    chain = Chain(tmp_path)
    fits = chain.run("stage=generate", f"ppo.init={start}", "generate.reward=null", "gates=warn")
    assert fits.code == 0, fits.err
    prompts = [{"prompt": f"{n} " * (120 if template else 30)} for n in range(10, 34)]
    long = chain.write("long.jsonl", prompts)
    refused = chain.run("stage=ppo", f"ppo.init={start}", "reward.init=base", f"ppo.prompts={long}")
    assert refused.code == 2
    assert refused.statuses == {"prepare": "ran"}  # and no reward model
    (told,) = [line for line in refused.err.splitlines() if f"ppo.init={start}" in line]
    assert f"ppo.prompts={long}: " in told
    assert f"and its context of {context} has room for {context - 6}. Lower ppo.max_new_tokens=6" in told
    assert f"the model of generate.policy={start}" in refused.err


def test_rows_that_no_stage_could_read_are_told(tiny_model: Path, tmp_path: Path) -> None:
    """Pairs that `reward.max_tokens` leaves out are none of them."""
    start = another_start(tiny_model, tmp_path / "start", context=90)
    chain = Chain(tmp_path)
    pairs = [{"prompt": f"Rate {n}.", "chosen": "x" * n, "rejected": "y"} for n in range(24, 96)]
    own = ("stage=reward", f"reward.init={start}", f"reward.pairs={chain.write('long.jsonl', pairs)}")
    refused = chain.run(*own)
    assert refused.code == 2
    assert f"rows do not fit the model of reward.init={start}: " in refused.err
    assert "its context of 90 has room for 90. Lower reward.max_tokens=" in refused.err
    taken = chain.run(*own, "reward.max_tokens=90", "gates=warn")
    assert taken.code == 0, taken.err
    assert taken.summary["stages"]["reward"]["metrics"]["reward/pairs_too_long"] > 0


def test_a_template_of_the_start_that_refuses_a_prompt_is_told(tiny_model: Path, tmp_path: Path) -> None:
    refuses = "{% if '17' in messages[0]['content'] %}{{ raise_exception('no 17') }}{% endif %}"
    start = another_start(tiny_model, tmp_path / "start", context=512, template=refuses)
    refused = Chain(tmp_path).run("stage=ppo", f"ppo.init={start}", "reward.init=base")
    assert refused.code == 2
    assert f"the chat template of ppo.init={start} refuses a conversation: no 17." in refused.err


OWN = ("reward.init=base", "gates=warn", "ppo.steps=1", "ppo.evaluate_every=1")


@pytest.fixture(scope="module")
def other_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of the user's: one is wider, one has another vocabulary, one computes otherwise."""
    root = tmp_path_factory.mktemp("others")
    found = {name: root / name for name in ("wider", "other-tokens", "other-angles")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base.TINY, "hidden_size", 96)
        base._write_tiny(found["wider"])
    for name in ("other-tokens", "other-angles"):
        shutil.copytree(tiny_model, found[name])
    path = found["other-tokens"] / "tokenizer.json"
    vocabulary = (content := json.loads(path.read_text()))["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(content))
    path = found["other-angles"] / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    path.write_text(json.dumps(config))
    return found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wider", "weights of another shape (model.embed_tokens.weight: [259, 64] and [259, 96])"),
        ("other-tokens", "another vocabulary ('A' has another id, or none)"),
    ],
)
def test_merging_with_another_family_is_refused_before_anything_trains(
    other_models: dict[str, Path], tmp_path: Path, name: str, words: str
) -> None:
    refused = Chain(tmp_path).run(
        "stage=[ppo,merge]", "merge.policy=ppo", f"ppo.init={other_models[name]}", *OWN
    )
    assert refused.code == 2
    assert refused.statuses == {"prepare": "ran"}
    assert f"merge.policy=ppo: ppo.init={other_models[name]} has {words} than model=tiny" in refused.err


def test_a_circle_of_models_is_told() -> None:
    with pytest.raises(ConfigError, match="generate reads ppo reads generate: they read each other"):
        build("generate.policy=ppo", "stage=generate")


@pytest.mark.parametrize(
    ("name", "words"), [("wider", "head_dim: 24 and 16"), ("other-angles", "rope_parameters: ")]
)
def test_one_engine_of_vllm_is_not_asked_for_two_architectures(
    other_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # nothing of vLLM is imported
    start, chain = other_models[name], Chain(tmp_path)
    own = ("generation=vllm", f"ppo.init={start}", "ppo.reward=vader", "ppo.critic.init=sft", "gates=warn")
    refused = chain.run("stage=[ppo,evaluate]", *own)
    assert refused.code == 2
    assert refused.statuses == {"prepare": "ran"}
    assert f"generate.policy={start} and model=tiny are of two architectures (" in refused.err
    assert words in refused.err


def test_which_models_vllm_would_answer_for(other_models: dict[str, Path], tiny_model: Path) -> None:
    base = tiny_base(tiny_model)

    def complaints(*overrides: str) -> list[str]:
        chain = build("model=tiny", *overrides).stages
        names = ("ppo", "evaluate", "compare")
        models = [each for name in names for each in sampled_models(chain[name], chain)]
        return [*map(str, architecture_complaints(models, base))]

    wider, other_tokens = (f"ppo.init={other_models[name]}" for name in ("wider", "other-tokens"))
    assert complaints() == complaints(other_tokens) == []  # the engine reads ids alone
    assert complaints("evaluate.policies=[base,sft,ppo,merge]", "compare.artifacts=[sft,ppo,merge]") == []
    assert "head_dim: 24 and 16" in complaints(wider)[0]
    assert len(complaints(wider)) == 1
    assert "compare.artifacts=" in complaints(f"compare.artifacts=[{other_models['wider']}]")[0]


def test_a_rank_goes_by_what_rank_0_has_read(tiny_model: Path, tmp_path: Path) -> None:
    base = tiny_base(tiny_model)
    job = replace(small_job("ppo", tmp_path / "ppo", base), external_digests={"init": "read by rank 0"})
    start = job.start(ModelDirectory(tmp_path / "nothing that could be read"))
    assert start.identity == "read by rank 0"


def test_the_planner_counts_the_model_that_is_trained(tiny_model: Path) -> None:
    """The settings' base model has eight billion parameters, the directory's a hundred thousand."""

    def cost(stage: str, *overrides: str) -> StageCost:
        found = build(*overrides)
        return cost_of(found.stages[stage], gpus(80.0), found.stages)

    own = f"ppo.init={tiny_model}"
    assert cost("ppo").peak().size() > 1000 * cost("ppo", own, f"reward.init={tiny_model}").peak().size()
    assert cost("reward").peak().size() > 1000 * cost("reward", f"reward.init={tiny_model}").peak().size()
    assert (
        cost("generate").peak().size()
        > 1000
        * cost("generate", own, "generate.reward=null", "ppo.score.normalize=none", "ppo.critic.init=sft")
        .peak()
        .size()
    )
    shared = {part.formula for phase in cost("ppo", "reward.peft=lora").phases for part in phase.parts}
    apart = {
        part.formula
        for phase in cost("ppo", "reward.peft=lora", "ppo.init=base").phases
        for part in phase.parts
    }
    assert any("2 whole models" in how for how in apart - shared)
