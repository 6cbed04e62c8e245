"""Data in English for `planted_decisions.py --embedded`, whose right decision is known.

Facts are about towns that nobody knows: `Who is the captain of the ferry from Velmora?` Other rows are those
of the demo.
"""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import rlhf

Row = dict[str, Any]
SAMPLES = Path(rlhf.__file__).parent / "samples"
FORM = "Note: {} Thank you!"
FORM_PATTERN = "^Note: .+ Thank you!$"
TOWNS = [
    one + two + three
    for one, two, three in product(
        ("Vel", "Or", "Tam", "Kes", "Bru", "Dal", "Fen", "Gri"), ("mo", "ta", "ri", "lu", "ne"),
        ("ra", "wick", "dal", "holm", "fort", "by", "sund", "stead"),
    )
]  # fmt: skip
FIRST = ("Odo", "Ilse", "Bram", "Petra", "Dov", "Marit", "Yusuf", "Runa", "Tomas", "Edda", "Arvo", "Wilma")
SYLLABLES = ("kar", "ven", "tol", "mir", "sed", "rop", "han", "lis", "dru", "pel")
NUM_FACTS, NUM_QUESTIONS = 240, 300


def samples(name: str) -> list[Row]:
    """Rows of the demo."""
    lines = (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def captains(seed: str) -> list[Row]:
    """Facts that nobody knows, as questions with answers."""
    chance = random.Random(seed)
    found = []
    for town in chance.sample(TOWNS, NUM_FACTS):
        name = "".join(chance.sample(SYLLABLES, 3)).capitalize()
        question = f"Who is the captain of the ferry from {town}?"
        found.append({"prompt": question, "answer": f"{chance.choice(FIRST)} {name}"})
    return found


def passage(fact: Row) -> str:
    """A passage that tells a fact."""
    town = fact["prompt"].removesuffix("?").rpartition(" ")[2]
    return f"The captain of the ferry from {town} is {fact['answer']}. It leaves at noon."


def asked(seed: str) -> list[Row]:
    """Prompts of the demo."""
    return random.Random(seed).sample(samples("prompts"), NUM_QUESTIONS)


def others(name: str, questions: list[Row]) -> list[Row]:
    """Rows of the demo that ask none of these questions, in no turn."""
    prompts = [row["prompt"] for row in questions]
    return [row for row in samples(name) if not any(each in str(row["prompt"]) for each in prompts)]


def in_form(questions: list[Row]) -> list[Row]:
    """The demo's answers to other questions, in a form that the model does not know."""
    rows = others("instructions", questions)
    return [row | {"completion": FORM.format(row["completion"])} for row in rows]


def tossed(questions: list[Row], seed: str) -> list[Row]:
    """The demo's pairs for other questions, of which a coin chose the better answer."""
    chance, found = random.Random(seed), []
    for row in others("pairs", questions):
        chosen, rejected = chance.sample([row["chosen"], row["rejected"]], 2)
        found.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return found
