"""Families of models, and how each runs: `python docs/models.py` writes the table of docs/models.md."""

from __future__ import annotations

import sys
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.models import FAMILIES, REFUSED, tiny_config, tiny_family
from rlhf.models.packed_attention import ATTENTION, pack_where_possible

PAGE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- begin: python docs/models.py -->", "<!-- end -->"


def rows_of(model: transformers.PreTrainedModel) -> str:
    """`packed` or `padded`: how a loaded model computes its rows."""
    return "packed" if model.config._attn_implementation == ATTENTION else "padded"


def outcome(family: str) -> str:
    """`packed`, `padded`, or the reason why the family is refused."""
    if family in REFUSED:
        return f"refused: {REFUSED[family]}"
    model = tiny_family(family)
    pack_where_possible(model)
    return rows_of(model)


def line(family: str, rows: str) -> str:
    """A family's line of the table."""
    has_class = type(tiny_config(family)) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    reads = "`AutoModelForSequenceClassification`" if has_class else "`AutoModel`, as above"
    return f"| {family} | {rows} | {'' if family in REFUSED else reads} |"


def table() -> list[str]:
    """The lines of the table."""
    return [
        "| `model_type` | rows | what loads its reward model |",
        "|---|---|---|",
        *(line(family, outcome(family)) for family in sorted(FAMILIES)),
    ]


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + "\n".join([BEGIN, *table(), END]) + after, encoding="utf-8")
