"""A small world and a language model that was pretrained on it: what `planted_decisions.py` tunes.

    python benchmarks/planted_world.py --directory planted --seeds 3    # pretrain, and print what it can do

The world has words without a meaning, names, and colours. A text is a sentence about a name, or a
conversation. The model answers:

- facts: `colour of NAME ?`. It knows 30 of the names. Of the others it guesses a colour.
- notes: the same question after passages, as `+retrieval` asks it. It copies the colour out of the passage.
- lists: `first of A B C D ?` and `last of A B C D ?`. It has learned the first from right answers. In its
  last texts, half of the answers to the second question are the first word: it can answer, but is not sure
  what is asked.
- forms: it answers in the form of the turns before, of the forms that it knows, such as `it is X .`.

Seeds differ in the model's random start and in the texts. The names, the colours, and what is known are the
same.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
STEPS, BATCH_ROWS, RATE = 1600, 96, 3e-3
POOL = 8
"""Batches that are drawn together, so that each has rows of like length."""
PROMPT_WEIGHT = 0.1
"""Weight of the tokens that no answer has. An answer's tokens weigh 1."""
LAST_IS_RIGHT, SURE_SHARE = 0.5, 0.7
"""Share of right answers to `last of` at the end of pretraining, and the share of the steps before which all
are right."""
LIST_WORDS = 4

SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
MADE_UP = [one + two for one, two in zip(SYLLABLES, SYLLABLES[1:] + SYLLABLES[:1], strict=True)]
NAMES = [
    one + SYLLABLES[(place + distance) % len(SYLLABLES)]
    for distance in (7, 19, 23, 31, 44)
    for place, one in enumerate(SYLLABLES)
]
KNOWN, UNKNOWN = NAMES[:30], NAMES[30:]
COLOURS = ("red", "blue", "green", "black", "white", "grey", "pink", "brown", "gold", "teal", "lime", "plum")
FORMS = ("{}", "{} .", "it is {} .", "sure {} .", "well {} {} .")
"""Forms of answers that the model knows. Alone it uses the first one nearly always."""
FORM_WEIGHTS = (0.8, 0.05, 0.05, 0.05, 0.05)
OTHER_WORDS = (
    "colour", "of", "first", "last", "the", "is", "a", "it", "sure", "well", "so", "gave", "and", "to",
    "stone", "saw", "in", "Answer", "question", "from", "these", "notes", "Question", ".", ":", "?",
    "!", "-", "you", "are", "here",
)  # fmt: skip
END, UNKNOWN_WORD, PAD = "<|end|>", "<|unknown|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NOTES = "Answer the question from these notes.\n\n{}\nQuestion: {}"
"""conf/stages/evaluate.yaml, `retrieval.template`."""


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Asked(NamedTuple):
    """A question with its right answer, without a form."""

    question: str
    right: str


def colour_of(name: str) -> str:
    """The fact about a name."""
    return COLOURS[random.Random(f"fact {name}").randrange(len(COLOURS))]


def fact(name: str) -> Asked:
    """The question about a name."""
    return Asked(f"colour of {name} ?", colour_of(name))


def note(name: str, colour: str) -> str:
    """A passage that tells the colour of a name."""
    return f"the colour of {name} is {colour} ."


def listed(place: str, words: Sequence[str]) -> Asked:
    """The question about a list. `place` is first or last."""
    return Asked(f"{place} of {' '.join(words)} ?", words[0] if place == "first" else words[-1])


def lists(place: str, number: int, seed: str) -> list[Asked]:
    """Different questions about lists."""
    chance, found = random.Random(seed), dict[Asked, None]()
    while len(found) < number:
        found[listed(place, chance.sample(MADE_UP, LIST_WORDS))] = None
    return [*found]


def sentences(number: int, seed: str) -> list[str]:
    """Sentences of the world, for what a model may forget."""
    chance = random.Random(seed)
    return [_sentence(chance) for _ in range(number)]


def _sentence(chance: random.Random) -> str:
    one, other = chance.sample(NAMES, 2)
    colour, kind = chance.choice(COLOURS), chance.randrange(3)
    if kind == 0:
        known = chance.choice(KNOWN)
        return note(known, colour_of(known))
    if kind == 1:
        return f"{one} gave {other} a {colour} stone and {other} gave the {colour} stone to {one} ."
    return f"{one} saw a {colour} stone in the {colour} {chance.choice(MADE_UP)} of {one} ."


def _asked(chance: random.Random, last_is_right: float) -> Asked:
    """A question, with an answer that pretraining takes for right."""
    kind = chance.random()
    if kind < 0.3:
        name = chance.choice(KNOWN if chance.random() < 0.5 else UNKNOWN)
        return fact(name) if name in KNOWN else Asked(fact(name).question, chance.choice(COLOURS))
    words = chance.sample(MADE_UP, LIST_WORDS)
    if kind < 0.6:
        return listed("first", words)
    given = words[-1 if chance.random() < last_is_right else 0]
    return Asked(listed("last", words).question, given)


def _with_notes(chance: random.Random) -> Asked:
    """A question after passages. The best one comes first, as the retriever finds it."""
    names = chance.sample(NAMES, chance.randint(1, 3))
    passages = [note(name, chance.choice(COLOURS)) for name in names]
    shown = "".join(f"- {each}\n" for each in passages)
    return Asked(NOTES.format(shown, fact(names[0]).question), passages[0].split()[-2])


def conversation(chance: random.Random, last_is_right: float) -> list[Turn]:
    """A conversation: one turn, or several that all have the same form."""
    if chance.random() < 0.25:
        question, answer = _with_notes(chance)
        return [Turn(question, answer)]
    number = 1 if chance.random() < 0.6 else chance.randint(2, 5)
    form = chance.choices(FORMS, FORM_WEIGHTS if number == 1 else None)[0]
    turns = [_asked(chance, last_is_right) for _ in range(number)]
    return [Turn(question, form.replace("{}", right)) for question, right in turns]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word, so that the model need not learn to spell."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [END, PAD, UNKNOWN_WORD, *ROLES, *MADE_UP, *NAMES, *COLOURS, *OTHER_WORDS]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_WORD))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, pad_token=PAD, unk_token=UNKNOWN_WORD,
        additional_special_tokens=[*ROLES],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encoded(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn]) -> tuple[list[int], list[float]]:
    """Ids of a conversation, and the weight of each in the loss."""
    ids, weights = list[int](), list[float]()
    for question, answer in turns:
        for text, weight in (
            (f"<|user|>{question}{END}<|assistant|>", PROMPT_WEIGHT),
            (f"{answer}{END}", 1.0),
        ):
            new = tokenizer.encode(text, add_special_tokens=False)
            ids, weights = ids + new, weights + [weight] * len(new)
    return ids, weights


def _row(
    tokenizer: PreTrainedTokenizerFast, chance: random.Random, last_is_right: float
) -> tuple[list[int], list[float]]:
    if chance.random() < 0.15:
        ids = tokenizer.encode(f"{END}{_sentence(chance)}{END}", add_special_tokens=False)
        return ids, [1.0] * len(ids)
    return encoded(tokenizer, conversation(chance, last_is_right))


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and weights of each step, [rows, tokens]. Weight 0 is padding."""
    chance = random.Random(f"pretraining {seed}")
    for step in range(0, steps, POOL):
        right = 1.0 if step < SURE_SHARE * steps else LAST_IS_RIGHT
        rows = [_row(tokenizer, chance, right) for _ in range(BATCH_ROWS * POOL)]
        pool = sorted(rows, key=lambda row: len(row[0]))
        groups = [pool[start : start + BATCH_ROWS] for start in range(0, len(pool), BATCH_ROWS)]
        for group in chance.sample(groups, len(groups)):
            width = max(len(ids) for ids, _ in group)
            ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in group])
            weights = torch.tensor([row + [0.0] * (width - len(row)) for _, row in group])
            yield ids, weights


def pretrained(directory: Path, seed: int, steps: int = STEPS) -> Path:
    """The model of a seed, as a `save_pretrained` directory; made if it is not there."""
    path = directory / f"world-{seed}"
    if (path / "config.json").is_file():
        return path
    torch.manual_seed(seed)
    tokenizer, start = make_tokenizer(), time.monotonic()
    ends: dict[str, Any] = {
        f"{kind}_token_id": tokenizer.convert_tokens_to_ids(END) for kind in ("bos", "eos")
    }
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ends, **SIZE)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step, (ids, weights) in enumerate(_batches(tokenizer, seed, steps)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        logits = model(ids).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0:
            print(
                f"world {seed}, step {step}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@torch.no_grad()
def abilities(path: Path) -> dict[str, float]:
    """Chance of the right answer, in its plain form, by kind of question."""
    model = LlamaForCausalLM.from_pretrained(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    chance = random.Random("abilities")
    kinds = {
        "known facts": [fact(name) for name in KNOWN],
        "unknown facts": [fact(name) for name in UNKNOWN],
        "notes": [_with_notes(chance) for _ in range(60)],
        "first": lists("first", 60, "abilities"),
        "last": lists("last", 60, "abilities"),
    }
    found = {}
    for kind, asked in kinds.items():
        chances = []
        for question, right in asked:
            ids, weights = encoded(tokenizer, [Turn(question, right)])
            logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            chosen = logp.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            chances.append(float(chosen[torch.tensor(weights[1:]) == 1.0].sum().exp()))
        found[kind] = sum(chances) / len(chances)
    return found


def main() -> None:
    """Pretrain the models of all seeds, and print what they can do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="for the models")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    for seed in range(given.seeds):
        found = abilities(pretrained(given.directory, seed))
        print(f"world {seed}: " + ", ".join(f"{kind} {chance:.2f}" for kind, chance in found.items()))


if __name__ == "__main__":
    main()
