"""`prepare` on rows that others, or their own prompts, show to be wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers.experiments import build_stage
from helpers.stages import Bench, write_rows
from rlhf.config import ConfigError
from rlhf.data.formats import pair_row
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import JUDGE, ROLES
from rlhf.data.schema import SftRow, copied_answer
from rlhf.data.sources import SourceConfig
from rlhf.stages.prepare import PrepareStage

ANSWER = "It opens at nine in the morning and closes late at night."
PLACES = ("tram", "lake", "mill", "shop", "tower", "bridge", "garden", "street")
STORY = (
    "Mara walks to the mill of the village each morning, buys two loaves of bread and feeds the smaller one "
    "to the swans that wait below the bridge. Today a stranger sits there in a grey coat. What is next?"
)


def questions(count: int = 40) -> list[str]:
    return [f"What do you know of the {PLACES[n % 8]} in town {n}?" for n in range(count)]


def says_of(bench: Bench, role: str, reason: str) -> dict[str, Any]:
    found: dict[str, Any] = bench.report[role]["removed"][reason]
    return found


@pytest.mark.parametrize("frame", ["{}.", "{} please", "Please, {}", "{}!!"])
def test_evaluation_prompts_that_are_near_training_prompts_are_left_out(bench: Bench, frame: str) -> None:
    bench.rows["ppo"] = [{"prompt": text} for text in questions()]
    near = [{"prompt": frame.format(text.removesuffix("?"))} for text in questions()[:10]]
    bench.rows["evaluate"] = [*bench.rows["evaluate"][:30], *near]
    data = bench.prepare()
    assert len(data.rows("evaluate", "evaluation")) == bench.summary["evaluation_prompts"] == 30
    assert bench.summary["near_duplicates"] == 10
    assert bench.summary["near_duplicate_share"] == 10 / 40
    assert bench.summary["ppo_prompts"] == 40  # they are trained on
    assert (bench.summary["dropped"], bench.summary["bad_share"], bench.summary["leaks"]) == (10, 0, 0)
    found = says_of(bench, "evaluate", "near_duplicate")
    assert (found["count"], len(found["examples"])) == (10, 3)
    first = near[0]["prompt"]
    assert found["examples"][0] == (
        f'evaluate.jsonl line 31: "{first}" and ppo.jsonl line 1: "{questions()[0]}"'
    )
    assert f"evaluate.prompts: 10 near duplicate ({found['examples'][0]}" in bench.output


def test_near_duplicates_across_drawn_splits_are_left_out_too(bench: Bench) -> None:
    """Each question stands there three times, and the hash puts the three into different splits."""
    texts = [
        form.format(text.removesuffix("?")) for text in questions(80) for form in ("{}?", "{}", "{} please?")
    ]
    bench.rows["ppo"] = [{"prompt": text} for text in texts]
    bench.prepare(held_out_fraction=0.5)
    assert bench.summary["near_duplicates"] > 10
    assert bench.summary["near_duplicate_share"] == 0  # of the evaluation
    bench.sources["evaluate"] = str(bench.directory / "ppo.jsonl")
    data = bench.prepare()
    split = {name: said(data, "ppo", name) for name in ("train", "held_out")}
    split["evaluation"] = said(data, "evaluate", "evaluation")
    assert all(split.values())
    assert not split["train"] & split["held_out"]
    assert not (split["train"] | split["held_out"]) & split["evaluation"]
    rows = sum(len(data.rows("ppo", each)) for each in ("train", "held_out"))
    rows += len(data.rows("evaluate", "evaluation"))
    assert bench.summary["near_duplicates"] == len(texts) - rows > 10
    counts = [says_of(bench, role, "near_duplicate")["count"] for role in ("ppo", "evaluate")]
    assert sum(counts) == len(texts) - rows and min(counts) > 0


def said(data: PreparedData, role: str, split: str) -> set[str]:
    return {row.asked().removesuffix("?").removesuffix(" please") for row in data.rows(role, split)}


def test_long_texts_and_retention_rows_are_compared_too(bench: Bench) -> None:
    bench.rows["sft"][:3] = [
        {"prompt": STORY, "completion": "yes"}, {"text": "The Fact, is this"},
    ]  # fmt: skip
    bench.rows["evaluate"][7] = {"prompt": STORY.replace("grey", "red")}
    bench.rows["texts"][5] = {"text": "the fact is this."}
    bench.rows["questions"][5] = {"question": "Sft 20?", "choices": ["a", "b"], "answer": 0}
    data = bench.prepare()
    assert says_of(bench, "evaluate", "near_duplicate")["count"] == 1
    begin = f'"{STORY[:80]}..."'
    assert says_of(bench, "evaluate", "near_duplicate")["examples"] == [
        f"evaluate.jsonl line 8: {begin} and sft.jsonl line 1: {begin}"
    ]
    assert says_of(bench, "retention", "near_duplicate")["count"] == 2
    assert len(data.rows("retention", "evaluation")) == 78


def test_a_judge_is_tested_on_what_others_learn_from(bench: Bench) -> None:
    role = replace(ROLES["pairs"], key="reward@judge.pairs", metrics=(), lends_prompts=False)
    bench.roles = {**ROLES, JUDGE: role}
    bench.rows["pairs"] = [
        {"prompt": form.format(text.removesuffix("?")), "chosen": "good", "rejected": "bad"}
        for text in questions(60)
        for form in ("{}?", "{} please")
    ]
    bench.sources[JUDGE] = str(bench.directory / "pairs.jsonl")
    data = bench.prepare()
    taught, tests, trained = (
        said(data, role, split) for role, split in ((JUDGE, "train"), (JUDGE, "held_out"), ("pairs", "train"))
    )
    assert taught and not taught & tests
    assert tests & trained


def test_numbers_and_words_make_other_questions(bench: Bench) -> None:
    sums = [f"What is {n % 9} + {n // 9}?" for n in range(81)]
    bench.rows["ppo"] = [{"prompt": text} for text in sums]
    bench.rows["evaluate"] = [{"prompt": f"What is {n % 9} - {n // 9}?"} for n in range(81)]
    bench.prepare()
    assert bench.summary["near_duplicates"] == bench.summary["near_duplicate_share"] == 0
    assert bench.summary["evaluation_prompts"] == 81


def test_an_evaluation_that_is_all_trained_on_is_refused(bench: Bench) -> None:
    bench.rows["evaluate"] = [{"prompt": f"{row['prompt']}."} for row in bench.rows["ppo"]]
    complaint = bench.complaint()
    assert complaint.startswith(
        "evaluate.prompts: no rows are left for evaluation: 40 read; 0 kept; 40 near "
    )
    assert complaint.endswith(
        "What is evaluated is trained on, so it cannot judge. Name prompts in evaluate.prompts that no stage "
        "trains on."
    )


def run_file(bench: Bench, rows: list[dict[str, Any]], manifest: str = '{"stage": "generate"}') -> str:
    """Rows as a stage writes them."""
    (bench.directory / "artifact").mkdir(exist_ok=True)
    (bench.directory / "artifact" / "manifest.json").write_text(manifest)
    return write_rows(bench.directory / "artifact" / "responses.jsonl", rows)


@pytest.mark.parametrize("manifest", ['{"stage": "generate"}', "[]"])
def test_an_evaluation_that_a_run_wrote_of_training_prompts_is_named(bench: Bench, manifest: str) -> None:
    rows = [{**row, "response": "yes", "score": 1.0} for row in bench.rows["ppo"]]
    bench.sources["evaluate"] = path = run_file(bench, rows, manifest)
    complaint = bench.complaint()
    assert "ppo.prompts: no rows are left for train: 40 read; 0 kept; 40 leak (ppo.jsonl line 1," in complaint
    assert "What is evaluated is trained on, so it cannot judge." in complaint
    written = f"evaluate.prompts={path} was written by the stage generate of a run. A prompt is in the same"
    assert (written in complaint) is (manifest != "[]")
    assert "Give more rows" not in complaint
    run_file(bench, rows[:10], manifest)
    bench.prepare()
    assert "LEAK: 10 training rows" in bench.output
    assert (written in bench.output) is (manifest != "[]")


def test_held_out_rows_that_a_run_did_not_write_are_asked_for(bench: Bench) -> None:
    """The same hash decides in every run: what one trained on, no other holds out."""
    bench.rows["ppo"] = [{"prompt": text} for text in questions(80)]
    train = [{"prompt": row.prompt, "completion": "yes"} for row in bench.prepare().rows("ppo", "train")]
    bench.sources["sft"] = path = run_file(bench, train)
    assert bench.complaint() == (
        f"sft.data: no rows are left for held_out: {len(train)} read; {len(train)} kept. sft.data={path} was "
        "written by the stage generate of a run. A prompt is in the same split in every run: answers to "
        "training prompts are for training alone, and those to prompts of the evaluation for nothing else. "
        "Add rows with other prompts; held-out rows also come from "
        "generate.splits=[train,held_out]."
    )


def test_prompts_that_a_run_wrote_and_lends_are_named(bench: Bench) -> None:
    """As where evaluate.prompts is left out beside a run's own rows."""
    bench.rows["ppo"] = [{"prompt": text} for text in questions(80)]
    bench.sources["evaluate"] = "ppo.prompts"
    chosen = bench.prepare().rows("ppo", "train"), bench.prepare().rows("ppo", "held_out")
    bench.sources["ppo"] = path = run_file(bench, [{"prompt": row.prompt} for rows in chosen for row in rows])
    with pytest.raises(ConfigError) as refused:
        bench.prepare().check_not_empty("evaluate")
    assert f"ppo.prompts={path} was written by the stage generate of a run" in str(refused.value)


def contradicting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


@pytest.mark.parametrize("role", ["pairs", "dpo"])
def test_pairs_in_both_orders_are_left_out(bench: Bench, role: str) -> None:
    bench.rows[role] = [
        {"prompt": text, "chosen": f"{n}", "rejected": "bad"} for n, text in enumerate(questions())
    ]
    key = {"pairs": "reward.pairs", "dpo": "dpo.data"}[role]
    bench.rows[role] += [
        *contradicting(bench.rows[role][5:7]),
        {"prompt": questions()[0], "chosen": "another", "rejected": "0"},  # no contradiction: a third answer
    ]
    bench.prepare()
    asked = [f"{text[:26]}..." for text in questions()]

    def line(number: int) -> str:
        return f"{role}.jsonl line {number}"

    assert says_of(bench, role, "contradiction") == {
        "count": 4,
        "examples": [
            f'{line(6)}: "{asked[5]}" > "5" > "bad" and {line(41)}: "{asked[5]}" > "bad" > "5"',
            f'{line(7)}: "{asked[6]}" > "6" > "bad" and {line(42)}: "{asked[6]}" > "bad" > "6"',
            f'{line(41)}: "{asked[5]}" > "bad" > "5" and {line(6)}: "{asked[5]}" > "5" > "bad"',
        ],
    }  # fmt: skip
    assert sum(bench.report[role]["kept"].values()) == 39
    assert bench.summary["contradictions"] == bench.summary["dropped"] == 4
    assert (bench.summary["contradiction_share"], bench.summary["bad_share"]) == (4 / 43, 0)
    assert f'{key}: 4 contradiction ({role}.jsonl line 6: "{asked[5]}" > "5"' in bench.output


def test_of_a_pair_that_several_people_judged_the_majority_stays(bench: Bench) -> None:
    """Duplicates are votes too: five say that the first is better, two do not; of others two and two. The
    second time the question ends with another mark."""
    first, second, third = bench.rows["pairs"][:3]
    other_mark = {**first, "prompt": f"{first['prompt']} ."}
    bench.rows["pairs"] += [first] * 4 + contradicting([other_mark, first])
    bench.rows["pairs"] += [second, *contradicting([second] * 2), *contradicting([third])]
    bench.prepare()
    assert says_of(bench, "pairs", "outvoted")["count"] == 2
    assert says_of(bench, "pairs", "contradiction")["count"] == 4 == bench.summary["contradictions"]
    assert bench.summary["bad_share"] == 0
    assert sum(bench.report["pairs"]["kept"].values()) == 38


def test_a_reply_that_the_assistant_repeats_is_no_copy(bench: Bench) -> None:
    chat = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": ANSWER},
    ]  # fmt: skip
    bench.rows["sft"] += [{"messages": chat}]
    bench.prepare()
    assert bench.summary["copied_answers"] == 0


def test_thumbs_up_and_down_for_the_same_answer_are_left_out(bench: Bench) -> None:
    bench.rows["dpo"] += [{"prompt": "DPO 7", "completion": "yes ", "label": False}]
    bench.rows["dpo"] += [{"prompt": "dpo 8", "completion": "no", "label": True}]
    bench.prepare()
    found = says_of(bench, "dpo", "contradiction")
    assert found["count"] == 2
    assert found["examples"][0] == (
        'dpo.jsonl line 8: "dpo 7" > "yes" > "thumb up" and dpo.jsonl line 41: "DPO 7" > "yes" > "thumb down"'
    )


def copying(role: str, text: str) -> dict[str, Any]:
    """A row of this role whose prompt holds its answer."""
    transcript = [
        {"role": "user", "content": f"A chat:\n{text}\n{ANSWER}\n"},
        {"role": "assistant", "content": "I see."}, {"role": "user", "content": "What was said?"},
    ]  # fmt: skip
    rows: dict[str, dict[str, Any]] = {
        "sft": {"prompt": f"{text}\n\n{ANSWER}", "completion": ANSWER},
        "replay": {"prompt": transcript, "completion": ANSWER},
        "ptx": {"messages": [*transcript, {"role": "assistant", "content": ANSWER}]},
        "pairs": {"prompt": transcript, "chosen": ANSWER, "rejected": "bad"},
        "dpo": {"prompt": transcript, "completion": ANSWER, "label": True},
    }
    return rows[role]


@pytest.mark.parametrize("role", ["sft", "replay", "ptx", "pairs", "dpo"])
def test_answers_that_stand_in_their_prompts_are_left_out(bench: Bench, role: str) -> None:
    own: dict[str, dict[str, Any]] = {
        "pairs": {"prompt": ANSWER, "chosen": "bad", "rejected": ANSWER},  # it repeats the question
        "dpo": {"prompt": f"Say yes: {questions()[0]}", "completion": "yes", "label": True},  # a short answer
    }
    bench.rows[role] = [copying(role, text) for text in questions(4)] + bench.rows[role][:35]
    bench.rows[role] += [own[role]] if role in own else []
    read = len(bench.rows[role])
    bench.prepare()
    found = says_of(bench, role, "copied_answer")
    assert (found["count"], found["examples"][0]) == (4, f'{role}.jsonl line 1: "{ANSWER}"')
    assert sum(bench.report[role]["kept"].values()) == read - 4
    assert bench.summary["copied_answers"] == bench.summary["dropped"] == 4
    assert bench.summary["copied_answer_share"] == 4 / read
    if role == "pairs":  # what is asked is no answer
        bench.sources["ppo"] = "reward.pairs"
        bench.prepare()
        assert says_of(bench, role, "copied_answer")["count"] == bench.summary["copied_answers"] == 4
        assert bench.summary["ppo_prompts"] == read
    bench.prepare(on_copied_answer="keep")
    assert sum(bench.report[role]["kept"].values()) == read
    assert bench.summary["copied_answers"] == bench.summary["copied_answer_share"] == 0


def test_a_set_of_such_rows_alone_is_refused_with_advice(bench: Bench) -> None:
    good = bench.rows["pairs"]
    bench.rows["pairs"] = [*good, *contradicting(good)]
    assert "80 read; 0 kept; 80 contradiction (pairs.jsonl line 1: " in bench.complaint()
    assert bench.complaint().endswith("Were columns exchanged, or labels joined to the wrong rows?")
    bench.rows["pairs"] = [copying("pairs", text) for text in questions()]
    assert "40 read; 0 kept; 40 copied answer (pairs.jsonl line 1: " in bench.complaint()
    assert "made from whole transcripts?" in bench.complaint()
    assert "set prepare.on_copied_answer=keep." in bench.complaint()


def test_what_a_tool_said_may_be_repeated() -> None:
    said = f"The hours: {ANSWER}"
    assert copied_answer(SftRow([{"role": "user", "content": said}], f"{ANSWER} ")) == ANSWER
    assert copied_answer(SftRow([{"role": "tool", "name": "hours", "content": said}], ANSWER)) is None


@pytest.mark.parametrize(
    ("name", "bound"),
    [("near_duplicate_share", 0.2), ("contradiction_share", 0.1), ("copied_answer_share", 0.2)],
)
def test_more_than_a_bound_is_refused(name: str, bound: float) -> None:
    gate = build_stage(PrepareStage).gates[name]
    assert gate is not None
    assert gate.holds(bound) and not gate.holds(bound + 0.01) and gate.advice


def test_what_is_found_is_the_same_in_every_run(bench: Bench) -> None:
    bench.rows["evaluate"][:20] = [{"prompt": f"{row['prompt']}!"} for row in bench.rows["ppo"][:20]]
    before = bench.prepare().digest("evaluate"), bench.report
    assert (bench.prepare().digest("evaluate"), bench.report) == before


def test_the_packaged_pairs_say_one_thing() -> None:
    source = SourceConfig(samples="pairs")
    raws = [
        raw for _, content in source.unread("reward.pairs") if isinstance(raw := source.read(content), dict)
    ]
    rows = [*map(pair_row, raws)]
    assert len({frozenset((row.asked(), row.chosen, row.rejected)) for row in rows}) == len(rows) == 1454
