"""Compare two models by their configs, weight shapes and tokenizers, without reading weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.models.base import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IRRELEVANT_SETTINGS = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "label2id", "max_position_embeddings",
    "max_window_layers", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "transformers_version", "use_cache",
}  # fmt: skip
"""Settings of a config that do not change the result of a forward pass within the context length."""


def differing_setting(first: PreTrainedConfig, second: PreTrainedConfig) -> str | None:
    """The first setting by which two models compute differently, such as `hidden_size: 64 and 128`; None if
    there is none."""
    ours, theirs = first.to_dict(), second.to_dict()
    for name in ("model_type", *sorted({*ours, *theirs} - IRRELEVANT_SETTINGS)):
        if ours.get(name) != theirs.get(name):
            return f"{name}: {ours.get(name)} and {theirs.get(name)}"
    return None


def differing_weight(
    first: PreTrainedConfig, second: PreTrainedConfig, *, trust_remote_code: bool
) -> str | None:
    """A weight that only one model has, or that has another shape in the other; None if there is none.

    Raises:
        UnknownShapeError: one of the models is not a causal language model.
    """
    ours, theirs = (
        {
            name: list(weight.shape)
            for name, weight in skeleton(each, trust_remote_code=trust_remote_code).named_parameters()
        }
        for each in (first, second)
    )
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            return f"{name}: {ours.get(name)} and {theirs.get(name)}"
    return None


def differing_token(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """A token that only one tokenizer has, or that has another id in the other; None if there is none."""
    ours, theirs = first.get_vocab(), second.get_vocab()
    return min((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), default=None)
