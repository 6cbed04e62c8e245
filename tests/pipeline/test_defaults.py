"""The changed keys that a run reports: those with another value than the packaged one."""

from __future__ import annotations

from helpers.experiments import compose
from rlhf.pipeline.defaults import changed_keys, references


def table(*overrides: str) -> dict[str, tuple[str, str]]:
    return {each["key"]: (each["default"], each["value"]) for each in changed_keys(compose(*overrides))}


def test_without_an_override_nothing_differs() -> None:
    assert changed_keys(compose()) == []


def test_what_was_typed_and_what_a_choice_sets_differ() -> None:
    found = table("model=tiny", "ppo.init=base", "sft.data=[a.jsonl,b.jsonl]", "run_name=x")
    assert found["ppo.init"] == ("sft", "base")
    assert found["sft.data"] == ("auto", '["a.jsonl", "b.jsonl"]')
    assert found["model.kind"] == ("embedded", "tiny")
    assert found["ppo.steps"] == ("12", "4")
    assert not {"evaluate.init", "generate.policy", "run_name"} & {*found}  # they repeat ppo.init


def test_the_keys_of_a_named_instance_are_told_as_they_are_typed() -> None:
    found = table(*(f"++instances.dpo-at-2.{own}" for own in ("init=dpo", "optim.lr=0.5", "epochs=1")))
    lr = table("dpo.optim.lr=0.5")["dpo.optim.lr"]
    assert found == {"dpo@2.init": ("sft", "dpo"), "dpo@2.optim.lr": lr}  # the epochs are DPO's own


def test_some_keys_take_their_value_from_another() -> None:
    assert references()["generate.max_new_tokens"] == "ppo.max_new_tokens"
    assert "ppo.max_new_tokens" not in references()


def test_a_secret_is_left_out() -> None:
    found = table("ppo.reward=http://me:pass-1234@host/score", "+own={token: hf-123456789}")
    assert found["ppo.reward"] == ("learned", "http://<redacted>@host/score")
    assert found["own"] == ("null", '{"token": "<redacted>"}')
    assert changed_keys({"own_token": "hf-123456789"})[0]["value"] == "<redacted>"
