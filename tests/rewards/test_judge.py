"""`judge:URL` against a server that speaks OpenAI's protocol, on a real socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import Chain
from helpers.endpoint import Endpoint, served_endpoint
from helpers.jobs import TINY, on_cpu, user
from rlhf.config import ConfigError
from rlhf.data.schema import PromptRow
from rlhf.rewards import http as remote
from rlhf.rewards.combined import CombinedReward, scored
from rlhf.rewards.http import RewardServerConfig
from rlhf.rewards.kinds import RewardMix, RewardPart, reward_digest
from rlhf.rewards.model import make_reward
from rlhf.rewards.reward import RewardError

SERVER = RewardServerConfig(timeout=5.0, retries=1)
KEY = "judge-secret-4711"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    with served_endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def args(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rubric.txt").write_text("Be strict.")
    return {"model": "m", "rubric": str(tmp_path / "rubric.txt"), "cache": str(tmp_path / "judge.sqlite")}


def mix(source: str, args: dict[str, Any]) -> RewardMix:
    return RewardMix(of=[RewardPart(source=source, args=args)])


def made(source: str, args: dict[str, Any]) -> CombinedReward:
    reward = make_reward(mix(source, args), {}, TINY, on_cpu(), 1000, SERVER)
    assert isinstance(reward, CombinedReward)
    return reward


ROWS = [PromptRow(user(text), columns={"completion": "a baseline"}) for text in ("Say hi", "Say no")]


def test_a_judge_scores_and_what_it_did_is_counted(endpoint: Endpoint, args: dict[str, Any]) -> None:
    endpoint.says = lambda question: "Score: 9" if "hello" in question else "I cannot say"
    reward = made(endpoint.source, args | {"price_in": 10.0, "price_out": 1000.0})
    found = scored(reward, ROWS, ["hello", "what"])
    assert found.score_B[0] == 9.0 and found.score_B[1].isnan()
    assert found.usage == {
        "judge_asked/judge": 2.0, "judge_cached/judge": 0.0, "judge_failures/judge": 1.0,
        "judge_disagreements/judge": 0.0, "judge_tokens_in/judge": 200.0, "judge_tokens_out/judge": 4.0,
        "judge_cost/judge": pytest.approx((200 * 10 + 4 * 1000) / 1e6),
    }  # fmt: skip
    body = next(each for each in endpoint.asked if "hello" in each["messages"][1]["content"])
    assert (body["model"], body["temperature"]) == ("m", 0.0)
    assert body["messages"][0] == {"role": "system", "content": "Be strict."}
    assert "user: Say hi" in body["messages"][1]["content"]


@pytest.mark.parametrize(
    ("text", "score"), [("11", None), ("0", None), ("10", 10.0), ("4.5", 4.5), ("", None)]
)
def test_a_number_outside_the_range_is_a_failure(
    endpoint: Endpoint, args: dict[str, Any], text: str, score: float | None
) -> None:
    endpoint.says = lambda question: text
    found = scored(made(endpoint.source, args), ROWS[:1], ["x"])
    assert (None if found.score_B.isnan() else float(found.score_B)) == score


def prefers(word: str) -> Callable[[str], str]:
    """The place of the response that holds a word."""
    return lambda question: "A" if word in question.split("[Response B]")[0] else "The answer is B."


@pytest.mark.parametrize(("says", "score", "disagreements"), [
    (prefers("mine"), 1.0, 0),
    (prefers("baseline"), 0.0, 0),
    (lambda question: "A", 0.5, 1),  # always the first
    (lambda question: "T", 0.5, 0),
    (lambda question: "A tie", 0.5, 0),
    (lambda question: "It's a tie: A and B say the same.", 0.5, 0),
    (lambda question: "B is longer.\n\n**A**\n", 0.5, 1),  # the last line is the verdict
    (lambda question: "A good answer, but B is better", None, 0),  # which of them?
    (lambda question: "neither", None, 0),
])  # fmt: skip
def test_a_pair_is_asked_twice_with_the_places_swapped(
    endpoint: Endpoint, args: dict[str, Any], says: Any, score: float | None, disagreements: int
) -> None:
    endpoint.says = says
    found = scored(made(endpoint.source, args | {"mode": "pairwise"}), ROWS[:1], ["mine"])
    assert (None if found.score_B.isnan() else float(found.score_B)) == score
    assert len(endpoint.asked) == 2
    assert found.usage["judge_disagreements/judge"] == disagreements
    assert found.usage["judge_failures/judge"] == (score is None)
    alone = scored(made(endpoint.source, args | {"mode": "pairwise"}), [PromptRow(user("Say hi"))], ["mine"])
    assert alone.score_B.isnan() and len(endpoint.asked) == 2  # nothing to compare with


def test_replies_are_kept_by_model_rubric_prompt_and_response(
    endpoint: Endpoint, args: dict[str, Any]
) -> None:
    for _ in range(2):
        found = scored(made(endpoint.source, args), ROWS, ["a", "a"])
    assert len(endpoint.asked) == 2
    assert (found.usage["judge_asked/judge"], found.usage["judge_cached/judge"]) == (0.0, 2.0)
    scored(made(endpoint.source, args), ROWS[:1], ["b"])
    scored(made(endpoint.source, args | {"model": "other"}), ROWS[:1], ["a"])
    Path(args["rubric"]).write_text("Be kind.")
    scored(made(endpoint.source, args), ROWS[:1], ["a"])
    assert len(endpoint.asked) == 5


def test_model_and_rubric_are_in_the_key_and_places_and_prices_are_not(
    endpoint: Endpoint, args: dict[str, Any]
) -> None:
    before = reward_digest(mix(endpoint.source, args))
    dumped = mix(endpoint.source, args).model_dump(mode="json")
    assert dumped["of"][0]["args"] == {"model": "m"}
    Path(args["rubric"]).write_text("Be kind.")
    assert reward_digest(mix(endpoint.source, args)) != before
    Path(args["rubric"]).unlink()
    with pytest.raises(ConfigError, match=r"args\.rubric=.*Give a text file that says how to judge"):
        reward_digest(mix(endpoint.source, args))


def test_the_api_key_is_the_environments_alone(
    endpoint: Endpoint, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(made(endpoint.source, args), ROWS[:1], ["a"])
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    scored(made(endpoint.source, args), ROWS[:1], ["b"])
    assert endpoint.keys == [None, f"Bearer {KEY}"]
    assert KEY.encode() not in Path(args["cache"]).read_bytes()
    with pytest.raises(ValueError, match="use a name with KEY, TOKEN or SECRET"):
        mix(endpoint.source, args | {"key_variable": "HOME"})


def test_an_endpoint_that_is_away_is_asked_again_and_then_told(
    endpoint: Endpoint, args: dict[str, Any]
) -> None:
    endpoint.failing = 1
    assert scored(made(endpoint.source, args), ROWS[:1], ["a"]).score_B.tolist() == [7.0]
    endpoint.failing = 2
    with pytest.raises(RewardError, match="does not answer, asked 2 times"):
        scored(made(endpoint.source, args), ROWS[:1], ["b"])


@pytest.mark.parametrize(("source", "more", "said"), [
    ("judge:http://h:1/v1", {"model": None}, "args.model"),
    ("judge:http://h:1/v1", {"mode": "ranked"}, "args.mode"),
    ("judge:http://h:1/v1", {"lowest": 10}, "highest=10 is not above lowest=10"),
    ("judge:nowhere", {}, "judge:URL"),
])  # fmt: skip
def test_what_is_wrong_is_told_with_the_config(
    args: dict[str, Any], source: str, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        mix(source, args | more)
    assert said in str(caught.value)


@pytest.mark.slow
def test_a_judge_in_a_run(endpoint: Endpoint, args: dict[str, Any], tmp_path: Path) -> None:
    endpoint.says = lambda question: str(1 + len(question) % 10)
    shown = ",".join(f"{name}:'{value}'" for name, value in args.items())
    outcome = Chain(tmp_path).run(
        f"generate.reward=[{{source:'{endpoint.source}',args:{{{shown}}}}}]", "stage=generate", "gates=warn",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    metrics = outcome.summary["stages"]["generate"]["metrics"]
    assert metrics["generate/judge_asked/judge"] + metrics["generate/judge_cached/judge"] > 0
    assert metrics["generate/judge_tokens_in/judge"] > 0


@pytest.mark.parametrize(("mode", "says", "ties"), [
    ("pairwise", prefers("love"), 0),
    ("scored", lambda question: "9" if "love" in question else "2", 0),
    ("pairwise", lambda question: "A", 8),  # always the first
])  # fmt: skip
def test_a_judge_labels_pairs(
    endpoint: Endpoint, args: dict[str, Any], tmp_path: Path, mode: str, says: Any, ties: int
) -> None:
    endpoint.says = says
    chain = Chain(tmp_path)
    pairs = [{"prompt": f"Rate {n}", "first": f"I love {n}", "second": f"I hate {n}"} for n in range(8)]
    shown = ",".join(f"{name}:'{value}'" for name, value in (args | {"mode": mode}).items())
    outcome = chain.run(
        "stage=label", f"label.pairs={chain.write('two.jsonl', pairs)}", "label.annotator=judge",
        f"label.reward=[{{source:'{endpoint.source}',args:{{{shown}}}}}]",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    metrics = outcome.summary["stages"]["label"]["metrics"]
    made = (outcome.artifact("label") / "pairs.jsonl").read_text().splitlines()
    assert metrics["label/ties"] == ties and len(made) == 8 - ties
    assert all("love" in json.loads(row)["chosen"] for row in made)
    assert metrics["label/judge_asked/judge"] == len(endpoint.asked) == 16
