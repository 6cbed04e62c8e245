"""Roles: what each data set is for. The tables here decide everything that depends on a role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlhf.data.formats import Raw, pair_row, preference_row, prompt_row, retention_row, sft_row
from rlhf.data.schema import PairRow, PromptRow, QuestionRow, Row, SftRow, Split, TextRow, ThumbRow

TRAINING: tuple[Split, ...] = ("train", "held_out")
EVALUATION: tuple[Split, ...] = ("evaluation",)


@dataclass(frozen=True)
class Role:
    """What a data set is for: the key that names it, the types of its rows, and its splits."""

    key: str
    """The config key of its source. Every error about its rows starts with it."""
    row_types: tuple[type[Row], ...]
    """The types that `parse` returns."""
    parse: Callable[[Raw], Row]
    """Makes a row from the columns in a source. Raises RowError if it cannot."""
    columns: tuple[str, ...]
    """Columns that a row needs, by our names. `fields` maps them to the source's columns."""
    splits: tuple[Split, ...] = TRAINING
    """TRAINING: `prepare.held_out_fraction` of its prompts are held out, and none is used for evaluation.
    EVALUATION: no stage trains on its prompts."""
    metrics: tuple[str, ...] = ()
    """Names of the metrics in which `prepare` counts its rows: one for each of `row_types`, or none."""
    lends_prompts: bool = False
    """Whether `ppo.prompts` and `evaluate.prompts` may name its key, to use the prompts of its rows."""
    advice: str = ""
    """How to run without its data."""


Roles = Mapping[str, Role]
"""Name -> role, in the order in which `prepare` reports them."""
ROLES: Roles = {
    "sft": Role(
        "sft.data", (SftRow,), sft_row, ("prompt", "completion"), metrics=("sft_rows",), lends_prompts=True
    ),
    "replay": Role("sft.replay", (SftRow,), sft_row, ("prompt", "completion")),
    "pairs": Role(
        "reward.pairs",
        (PairRow,),
        pair_row,
        ("prompt", "chosen", "rejected"),
        metrics=("reward_pairs",),
        lends_prompts=True,
        advice="Another ppo.reward than learned (function, server, model:DIRECTORY) needs no reward.pairs. "
        "SFT alone needs none: recipe=sft.",
    ),
    "ppo": Role(
        "ppo.prompts", (PromptRow,), prompt_row, ("prompt",), metrics=("ppo_prompts",), lends_prompts=True
    ),
    "ptx": Role("ppo.ptx.data", (SftRow,), sft_row, ("prompt", "completion")),
    "dpo": Role(
        "dpo.data", (PairRow, ThumbRow), preference_row, ("prompt", "chosen", "rejected"), lends_prompts=True
    ),
    "evaluate": Role(
        "evaluate.prompts", (PromptRow,), prompt_row, ("prompt",), EVALUATION, ("evaluation_prompts",)
    ),
    "retention": Role(
        "evaluate.retention",
        (TextRow, QuestionRow),
        retention_row,
        ("text",),
        EVALUATION,
        ("retention_texts", "retention_questions"),
    ),
}
"""The roles of this package's stages. A config may have more: see `rlhf.data.mount.Mount.roles`."""
JUDGE = "pairs@judge"
"""The role of `reward@judge`: pairs whose prompts appear in no other preferences."""


def training_roles(roles: Roles = ROLES) -> tuple[str, ...]:
    """Names of the roles that a stage may train on."""
    return tuple(name for name, role in roles.items() if "train" in role.splits)
