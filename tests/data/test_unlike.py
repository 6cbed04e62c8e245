"""What tells data sets apart that should be alike."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlhf.data.formats import pair_row, prompt_row, sft_row
from rlhf.data.schema import Message, PairRow, PromptRow, Row, SftRow
from rlhf.data.sources import SourceConfig
from rlhf.data.unlike import FEW, unlike

PLACES = ("garden", "lake", "street", "shop", "tower", "bridge")


def packaged() -> dict[str, Sequence[Row]]:
    names = (
        ("sft", "instructions", sft_row), ("pairs", "pairs", pair_row), ("ppo", "prompts", prompt_row),
        ("evaluate", "prompts", prompt_row),
    )  # fmt: skip
    return {role: [*map(parse, raw_rows(name))] for role, name, parse in names}


def raw_rows(name: str) -> list[dict[str, object]]:
    source = SourceConfig(samples=name)
    return [raw for _, content in source.unread("sft.data") if isinstance(raw := source.read(content), dict)]


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def sentences(count: int) -> list[str]:
    return [f"The {place} {number} is quiet." for number in range(count) for place in PLACES][:count]


def answers(frame: str, count: int = FEW) -> list[Row]:
    return [SftRow(user(text), frame.format(text)) for text in sentences(count)]


def pairs(chosen: str = "{}", rejected: str = "{}", count: int = FEW) -> list[Row]:
    return [
        PairRow(user(text), chosen.format(text), rejected.format(f"{text} {text}"))
        for text in sentences(count)
    ]


def prompts(frame: str) -> list[Row]:
    return [PromptRow(user(frame.format(text))) for text in sentences(FEW)]


def test_the_packaged_data_belong_together() -> None:
    assert [*unlike(packaged())] == []


@pytest.mark.parametrize(
    ("rows", "role", "said"),
    [
        (
            {"sft": answers("<p>{}</p>"), "pairs": pairs()}, "sft",
            'At least 100% of the answers of sft.data have "/" and "<" and ">", and hardly any of the '
            "answers of reward.pairs do.",
        ),
        (
            {"sft": answers("{}"), "pairs": pairs("{} Indeed", "{} Indeed")}, "sft",
            'At least 100% of the answers of reward.pairs have "indeed", and hardly any of the answers of '
            "sft.data do.",
        ),
        (
            {"dpo": pairs(rejected="I am sorry: {}")}, "dpo",
            'At least 100% of the rejected answers of dpo.data have "sorry" and "am" and ":", and hardly any '
            "of the chosen answers of dpo.data do.",
        ),
        (
            {"ppo": prompts("{}"), "evaluate": prompts("Q: {}")}, "evaluate",
            'At least 100% of the prompts of evaluate.prompts have ":" and "q", and hardly any of the '
            "prompts of ppo.prompts do.",
        ),
    ],
)  # fmt: skip
def test_what_most_texts_have_and_hardly_any_of_the_others(
    rows: dict[str, Sequence[Row]], role: str, said: str
) -> None:
    assert [*unlike(rows)] == [(role, said)]


def test_few_texts_tell_nothing_and_rare_words_neither() -> None:
    assert [*unlike({"sft": answers("<p>{}</p>", FEW - 1), "pairs": pairs()})] == []
    half = [*answers("<p>{}</p>", FEW), *answers("{}", FEW)]
    assert [*unlike({"sft": half, "pairs": pairs()})] == []
    texts: list[Row] = [SftRow([], f"<p>{text}</p>") for text in sentences(FEW)]
    assert [*unlike({"sft": texts, "ppo": prompts("{}")})] == []  # plain text asks nothing
    mixed = [*pairs("<p>{}", "<p>{}", 1), *pairs(count=FEW)]
    assert [*unlike({"sft": answers("<p>{}", FEW), "pairs": mixed})] == []


def test_letters_digits_and_line_breaks_are_told() -> None:
    small: list[Row] = [PairRow(user(text), text, text.lower()) for text in sentences(FEW)]
    ((_, said),) = unlike({"pairs": small})
    assert "chosen answers of reward.pairs have capital letters, and" in said
    ((_, said),) = unlike({"sft": answers("{}\n7"), "pairs": pairs("{}\n", "{}\n")})
    assert "answers of sft.data have line breaks and" in said


def test_a_mark_of_the_terminal_is_made_visible() -> None:
    ((_, said),) = unlike({"sft": answers("\x1b {}"), "pairs": pairs()})
    assert "\x1b" not in said and "sft.data have" in said


def test_a_long_word_is_cut() -> None:
    ((_, said),) = unlike({"sft": answers("{} " + 1000 * "x"), "pairs": pairs()})
    assert f'"{20 * "x"}"' in said
