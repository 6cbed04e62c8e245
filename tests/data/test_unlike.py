"""What tells data sets apart that should be alike."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlhf.data.formats import pair_row, prompt_row, sft_row
from rlhf.data.schema import Message, PairRow, PromptRow, Row, SftRow
from rlhf.data.sources import SourceConfig
from rlhf.data.unlike import MIN_TEXTS, find_differences

HINDI = "\u0927\u0928\u094d\u092f\u0935\u093e\u0926"
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


def answers(frame: str, count: int = MIN_TEXTS) -> list[Row]:
    return [SftRow(user(text), frame.format(text)) for text in sentences(count)]


def pairs(chosen: str = "{}", rejected: str = "{}", count: int = MIN_TEXTS) -> list[Row]:
    return [
        PairRow(user(text), chosen.format(text), rejected.format(f"{text} {text}"))
        for text in sentences(count)
    ]


def prompts(frame: str) -> list[Row]:
    return [PromptRow(user(frame.format(text))) for text in sentences(MIN_TEXTS)]


def test_the_packaged_data_belong_together() -> None:
    assert [*find_differences(packaged())] == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            {"sft": answers("<p>{}</p>"), "pairs": pairs()},
            'The answers of sft.data have "/" (100%), "<" (100%), ">" (100%); the answers of reward.pairs '
            "hardly ever.",
        ),
        (
            {"sft": answers("{}"), "pairs": pairs("{} Indeed", "{} Indeed")},
            'The answers of reward.pairs have "indeed" (100%); the answers of sft.data hardly ever.',
        ),
        (
            {"dpo": pairs("{} 7", rejected="It is the quiet: sorry 7")},
            'The chosen answers of dpo.data have "." (100%); the rejected answers of dpo.data hardly ever. '
            'The rejected answers of dpo.data have "sorry" (100%), "it" (100%), ":" (100%); the chosen '
            "answers of dpo.data hardly ever.",
        ),
        (
            {"ppo": prompts("{}"), "evaluate": prompts("Q: {}")},
            'The prompts of evaluate.prompts have ":" (100%), "q" (100%); the prompts of ppo.prompts hardly '
            "ever.",
        ),
    ],
)  # fmt: skip
def test_what_most_texts_have_and_hardly_any_of_the_others(rows: dict[str, Sequence[Row]], said: str) -> None:
    assert [*find_differences(rows)] == [said]


def test_few_texts_tell_nothing_and_rare_words_neither() -> None:
    assert [*find_differences({"sft": answers("<p>{}</p>", MIN_TEXTS - 1), "pairs": pairs()})] == []
    half = [*answers("<p>{}</p>", MIN_TEXTS), *answers("{}", MIN_TEXTS)]
    assert [*find_differences({"sft": half, "pairs": pairs()})] == []
    mixed = [*pairs("<p>{}", "<p>{}", 1), *pairs(count=MIN_TEXTS)]
    assert [*find_differences({"sft": answers("<p>{}", MIN_TEXTS), "pairs": mixed})] == []


def test_prompts_are_what_users_say() -> None:
    texts: list[Row] = [SftRow([], f"<p>{text}</p>") for text in sentences(MIN_TEXTS)]
    assert [*find_differences({"sft": texts, "ppo": prompts("{}")})] == []  # plain text asks nothing
    turns: list[Row] = [
        PromptRow([*user(text), {"role": "assistant", "content": "Certainly."}, *user(text)])
        for text in sentences(MIN_TEXTS)
    ]
    assert [
        *find_differences({"ppo": turns, "evaluate": prompts("{}")})
    ] == []  # nor are the joints line breaks


def test_letters_digits_and_line_breaks_are_told() -> None:
    small: list[Row] = [PairRow(user(text), text, text.lower()) for text in sentences(MIN_TEXTS)]
    (said,) = find_differences({"pairs": small})
    assert "chosen answers of reward.pairs have capital letters (100%); the" in said
    (said,) = find_differences({"sft": answers("{}\n7"), "pairs": pairs("{}\n", "{}\n")})
    assert "answers of sft.data have line breaks (100%)" in said


def test_a_share_is_never_rounded_up() -> None:
    nearly = [*pairs("Certainly {}", count=299), *pairs(count=1)]
    (said,) = find_differences({"pairs": nearly})
    assert '"certainly" (99%)' in said


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        ("\u60a8\u597d\uff0c{}", "\u60a8\u597d{}", [","]),  # the same greeting, with and without a comma
        ("\u975e\u5e38\u611f\u8c22{}", "{}", ["\u5e38\u611f", "\u611f\u8c22", "\u975e\u5e38"]),
        (f"{HINDI} {{}}", "{}", [HINDI]),
        ("{}\u0e04\u0e23\u0e31\u0e1a", "{}", ["\u0e04\u0e23", "\u0e23\u0e31", "\u0e31\u0e1a"]),
        ("Z\u00fcrich {}", "Zu\u0308rich {}", []),  # the same letters in two Unicode forms
        ("\U0001f469\u200d\U0001f467 {}", "{}", ["\U0001f467", "\U0001f469"]),  # without the joiner
    ],
)
def test_words_of_other_scripts(chosen: str, rejected: str, words: list[str]) -> None:
    said = [*find_differences({"pairs": pairs(chosen + "\u3002", rejected + "\u3002")})]
    listed = ", ".join(f'"{word}" (100%)' for word in words)
    has = (
        f"The chosen answers of reward.pairs have {listed}; the rejected answers of reward.pairs hardly ever."
    )
    assert said == ([has] if words else [])


def test_a_mark_of_the_terminal_is_made_visible() -> None:
    (said,) = find_differences({"sft": answers("\x1b {}"), "pairs": pairs()})
    assert "\x1b" not in said and "sft.data have" in said


def test_a_long_word_is_cut() -> None:
    (said,) = find_differences({"sft": answers("{} " + 1000 * "x"), "pairs": pairs()})
    assert f'"{20 * "x"}..."' in said
