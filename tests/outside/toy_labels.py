"""A data role from outside the package: prompts with a label, `labels.data=FILE`.

The stage is toy_dpo's: it learns to prefer a prompt's label to the other one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from toy_dpo import DpoStage

from rlhf.data.formats import prompt_row
from rlhf.data.roles import Role
from rlhf.data.schema import PairRow, PromptRow, RowError
from rlhf.data.sources import SourceConfig
from rlhf.pipeline.fields import Rows

LABELS = ("odd", "even")


@dataclass(frozen=True)
class LabelledRow(PromptRow):
    """A prompt and what it is."""

    label: str


def labelled(raw: Mapping[str, Any]) -> LabelledRow:
    """A row of any form that has a prompt, with a label beside it."""
    label = raw.get("label")
    if label is None:
        raise RowError("missing field", f'"label" is missing (found: {", ".join(raw)}).')
    if label not in LABELS:
        raise RowError("unknown label", f'"label" must be {" or ".join(LABELS)}, found {label!r}.')
    return LabelledRow(prompt_row(raw).prompt, label)


class LabelsStage(DpoStage):
    """The keys `labels.*`. Values: conf/stages/labels.yaml."""

    title: ClassVar[str] = "labels"
    role: ClassVar[str] = "labels"
    roles: ClassVar[Mapping[str, Role]] = {
        "labels": Role(
            key="labels.data",
            row_types=(LabelledRow,),
            parse=labelled,
            columns=("prompt", "label"),
            metrics=("labelled_prompts",),
            lends_prompts=True,
        )
    }

    data: Annotated[SourceConfig | None, Rows("labels")]

    def pair(self, row: Any) -> PairRow:
        """The label that a row has, and the one that it has not."""
        (other,) = (label for label in LABELS if label != row.label)
        return PairRow(row.prompt, row.label, other)
