"""Make arithmetic.jsonl and arithmetic_held_out.jsonl, the same rows each time: `python data/arithmetic.py`.

Two numbers that stand together in a held-out problem stand together in no training problem, in neither order
and with no operator.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

SEED = 20
ROWS = {"arithmetic.jsonl": 200, "arithmetic_held_out.jsonl": 50}
"""Problems of each kind in a file, as far as there are so many: products of two digits are few."""
HELD_OUT = 0.2
"""Share of all pairs of numbers that only held-out problems have."""
DRAWS = 20_000

Numbers = tuple[int, ...]
KINDS: tuple[tuple[str, Callable[[int, int, int, int], Numbers], Callable[..., int]], ...] = (
    # text, its numbers from two large and two small ones, its answer
    ("{} + {}", lambda a, b, c, d: (a, c), lambda x, y: x + y),
    ("{} + {}", lambda a, b, c, d: (a, b), lambda x, y: x + y),
    ("{} - {}", lambda a, b, c, d: (a, c), lambda x, y: x - y),
    ("{} - {}", lambda a, b, c, d: (max(a, b), min(a, b)), lambda x, y: x - y),
    ("{} * {}", lambda a, b, c, d: (c, d), lambda x, y: x * y),
    ("{} + {} - {}", lambda a, b, c, d: (a, c, d), lambda x, y, z: x + y - z),
)


def is_held_out(pair: Numbers) -> bool:
    """Decided for each pair of numbers by itself."""
    return random.Random(f"{SEED} {min(pair)} {max(pair)}").random() < HELD_OUT


def problems(rows: int, held_out: bool) -> dict[str, int]:
    """Each problem's text and answer, in random order."""
    draw = random.Random(f"{SEED} {held_out}")
    answers: dict[str, int] = {}
    for form, numbers_of, answer_of in KINDS:
        wanted = len(answers) + rows
        for _ in range(DRAWS):
            large, small = (
                (draw.randint(11, 99), draw.randint(11, 99)),
                (draw.randint(2, 9), draw.randint(2, 9)),
            )
            numbers = numbers_of(*large, *small)
            if all(is_held_out(pair) is held_out for pair in combinations(numbers, 2)):
                answers[form.format(*numbers)] = answer_of(*numbers)
            if len(answers) == wanted:
                break
    return dict(draw.sample(sorted(answers.items()), len(answers)))


def main() -> None:
    """Write both files beside this one."""
    for name, rows in ROWS.items():
        lines = (
            json.dumps({"prompt": f"What is {text}?", "completion": str(answer), "answer": str(answer)})
            for text, answer in problems(rows, held_out="held_out" in name).items()
        )
        Path(__file__).with_name(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
