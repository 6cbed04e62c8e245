"""Perplexity and multiple choice: by hand, against whole logits, and what must not matter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.jobs import TINY
from rlhf.data.chat_template import continuation_ids
from rlhf.data.schema import QuestionRow, TextRow
from rlhf.distributed.compute import make_compute
from rlhf.evaluation import retention
from rlhf.evaluation.intervals import difference, ratio, share
from rlhf.evaluation.retention import Retained, forgetting, likeliest_choice, right_answers
from rlhf.generation.policy_model import PolicyModel

TEXTS = [
    TextRow("Water boils.", "short"), TextRow("The sun is a star, and a rather ordinary one.", "long"),
    TextRow("Ice.", "short"),
]  # fmt: skip
QUESTIONS = [
    ("What falls from cold clouds?", ["snow", "a stone that is very heavy", "music", "chairs and tables"]),
    ("How many legs has a spider?", ["8", "seven or nine", "two", "a hundred and twelve"]),
    ("Which of these is a colour?", ["running quickly", "blue", "Wednesday", "a"]),
]


INTERVAL = {
    f"{name}_{end}" for name in ("perplexity", "question_accuracy") for end in ("low", "high", "rows")
}


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PolicyModel:
    compute, _ = make_compute("cpu", "fp32")
    return PolicyModel.load(tiny_model, TINY, compute)


def whole_logp(policy: PolicyModel, given: list[int], predicted: list[int]) -> float:
    """Nats of predicted after given, from transformers' whole logits: one row, no padding."""
    with torch.no_grad():
        logits_TV = policy.model(input_ids=torch.tensor([given + predicted])).logits[0].double()
    logp_TV = logits_TV.log_softmax(-1)
    return sum(float(logp_TV[len(given) + index - 1, token]) for index, token in enumerate(predicted))


def text_perplexity(policy: PolicyModel, rows: list[TextRow], micro_batch_tokens: int) -> float:
    return retention.retention(policy, rows, micro_batch_tokens).metrics()["perplexity"]


def question_accuracy(policy: PolicyModel, rows: list[QuestionRow], micro_batch_tokens: int) -> float:
    return float(right_answers(policy, rows, micro_batch_tokens).mean())


def retained(nats: list[float], right: list[float]) -> Retained:
    """Two texts, of one token and of three; and questions."""
    tokens = [1.0, 3.0][: len(nats)]
    return Retained(["all"] * len(nats), torch.tensor(nats), torch.tensor(tokens), torch.tensor(right))


def test_perplexity_by_hand() -> None:
    """Nats add up to 4 over 4 tokens. Texts do not count, tokens do."""
    assert retained([3.0, 1.0], []).metrics()["perplexity"] == pytest.approx(math.e)


def test_perplexity_equals_that_of_whole_logits(policy: PolicyModel) -> None:
    total, tokens = 0.0, 0
    for row in TEXTS:
        ids = policy.tokenizer(row.text, add_special_tokens=False)["input_ids"]
        total, tokens = total + whole_logp(policy, [1], ids), tokens + len(ids)
    assert text_perplexity(policy, TEXTS, 4096) == pytest.approx(math.exp(-total / tokens), rel=1e-5)


def test_each_set_of_texts_has_its_own_figure(policy: PolicyModel) -> None:
    known = retention.retention(policy, TEXTS, 4096).metrics()
    assert set(known) - INTERVAL == {"perplexity", "text_loss_short", "text_loss_long"}
    long = math.log(text_perplexity(policy, TEXTS[1:2], 4096))
    assert known["text_loss_long"] == pytest.approx(long, rel=1e-5)
    assert known["text_loss_short"] == pytest.approx(math.log(text_perplexity(policy, TEXTS[::2], 4096)))
    one_set = [dataclasses.replace(row, source="all") for row in TEXTS]
    found = retention.retention(policy, one_set, 4096).metrics()
    assert (set(found) - INTERVAL, found["perplexity"]) == ({"perplexity"}, known["perplexity"])


def test_only_what_there_are_rows_for_is_measured(policy: PolicyModel) -> None:
    questions = [QuestionRow(question, choices, 0) for question, choices in QUESTIONS]
    cases: list[tuple[Sequence[TextRow | QuestionRow], set[str]]] = [
        (questions, {"question_accuracy"}),
        (TEXTS[::2], {"perplexity"}),
        ([*questions, TEXTS[0]], {"perplexity", "question_accuracy"}),
    ]
    for rows, names in cases:
        assert set(retention.retention(policy, rows, 4096).metrics()) - INTERVAL == names


def test_forgetting_by_hand() -> None:
    base = retained([1.0, 3.0], [1.0, 1.0, 1.0, 0.0])
    sft, ppo = retained([1.0, 5.0], [1.0, 1.0, 0.0, 0.0]), retained([1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
    found = forgetting(sft, base)
    assert found["retention_loss"] == pytest.approx(0.5)  # 2 nats more over 4 tokens
    assert found["retention_perplexity_ratio"] == pytest.approx(math.exp(0.5))
    assert forgetting(ppo, base)["retention_loss"] == pytest.approx(-0.5)
    assert [forgetting(each, base)["question_accuracy_change"] for each in (sft, ppo)] == [-0.25, 0.25]
    of_base = forgetting(base, base)
    assert of_base["retention_loss"] == of_base["question_accuracy_change"] == 0.0
    sft, base = (each._replace(right_B=torch.zeros(0)) for each in (sft, base))
    assert not [name for name in forgetting(sft, base) if name.startswith("question")]


def test_forgetting_is_judged_row_by_row() -> None:
    """Texts differ much from each other, and hardly in how much they were forgotten."""
    base, later = retained([1.0, 90.0], [1.0, 0.0]), retained([1.1, 90.3], [1.0, 0.0])
    found = forgetting(later, base)
    change = ratio(torch.tensor([0.1, 0.3]), torch.tensor([1.0, 3.0]))
    assert found["retention_loss_high"] == pytest.approx(change.high, abs=1e-4)
    assert found["retention_perplexity_ratio_high"] == pytest.approx(math.exp(change.high), abs=1e-4)
    assert found["retention_perplexity_ratio_rows"] == 2
    assert found["question_accuracy_change_low"] == pytest.approx(difference(torch.zeros(2)).low)
    assert base.metrics()["question_accuracy_low"] == share(torch.tensor([1.0, 0.0])).low


@pytest.mark.parametrize("micro_batch_tokens", [1, 50, 10_000])
def test_neither_splitting_nor_order_matters(policy: PolicyModel, micro_batch_tokens: int) -> None:
    rows = [QuestionRow(question, choices, 0) for question, choices in QUESTIONS]
    expected = text_perplexity(policy, TEXTS, 100), question_accuracy(policy, rows, 100)
    assert text_perplexity(policy, TEXTS, micro_batch_tokens) == pytest.approx(expected[0], rel=1e-5)
    assert text_perplexity(policy, TEXTS[::-1], micro_batch_tokens) == pytest.approx(expected[0], rel=1e-5)
    assert question_accuracy(policy, rows, micro_batch_tokens) == expected[1]
    assert question_accuracy(policy, rows[::-1], micro_batch_tokens) == expected[1]


def test_likeliest_choice_by_hand() -> None:
    """-4 nats over 2 characters are less likely, a character, than -6 over 6."""
    assert likeliest_choice(torch.tensor([-4.0, -6.0, -30.0]), ["ab", "abcdef", "abc"]) == 1


def test_questions_against_whole_logits(policy: PolicyModel) -> None:
    """A character of this tokenizer is a token, so raw sums and sums per token are known to differ here."""
    best = []
    for question, choices in QUESTIONS:
        given = [
            1,
            *policy.tokenizer(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"],
        ]
        scores = [
            whole_logp(policy, given, policy.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"])
            / len(choice)
            for choice in choices
        ]
        best.append(scores.index(max(scores)))
    right = [QuestionRow(*question, answer) for question, answer in zip(QUESTIONS, best, strict=True)]
    wrong = [QuestionRow(row.question, row.choices, (row.answer + 1) % 4) for row in right]
    assert question_accuracy(policy, right, 4096) == 1.0
    assert question_accuracy(policy, wrong, 4096) == 0.0
    assert question_accuracy(policy, [*right, wrong[0]], 4096) == 0.75


def test_questions_may_differ_in_how_many_choices_they_have(
    policy: PolicyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the second of two and the third of three are the likeliest; both choices have one letter."""
    logp_BR = torch.tensor([[-2.0, -1.0], [-1.0, -1.0], [-3.0, -1.0], [-2.0, -2.0], [-1.5, 0.0]])
    asked: list[tuple[str, str]] = []

    def logp(
        policy: PolicyModel, texts: list[tuple[str, str]], tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        asked.extend(texts)
        return logp_BR, torch.ones(5, 2, dtype=torch.bool)

    monkeypatch.setattr(retention, "continuation_logp", logp)
    first, second = QuestionRow("Which?", ["a", "b"], 1), QuestionRow("What?", ["x", "y", "z"], 2)
    assert question_accuracy(policy, [first, second], 4096) == 1.0
    assert asked[1] == ("Question: Which?\nAnswer:", " b")
    assert asked[2] == ("Question: What?\nAnswer:", " x")
    assert question_accuracy(policy, [first, dataclasses.replace(second, answer=1)], 4096) == 0.5


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


def test_plain_text_follows_the_beginning_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    given, predicted = continuation_ids(tokenizer, "", "ab")
    assert given == [tokenizer.bos_token_id]
    assert tokenizer.convert_ids_to_tokens(predicted) == ["a", "b"]


def test_without_one_the_first_token_is_given(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.bos_token = None
    given, predicted = continuation_ids(tokenizer, "", "ab")
    assert [tokenizer.decode(given), tokenizer.decode(predicted)] == ["a", "b"]
    given, predicted = continuation_ids(tokenizer, "", "a")
    assert given == [tokenizer.eos_token_id] and tokenizer.decode(predicted) == "a"


def test_a_tokenizer_that_begins_texts_with_a_space(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    given, predicted = continuation_ids(tokenizer, "ab", "c")
    assert tokenizer.convert_ids_to_tokens(given[1:]) == ["Ġ", "a", "b"]
    assert tokenizer.convert_ids_to_tokens(predicted) == ["c"]
