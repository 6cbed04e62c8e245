"""Write a model directory that transformers can load without this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.data.chat_template import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a model directory. Its generation config stops at the token that ends this template's turns."""
    save_settings(model, tokenizer, directory)
    write_model(model, directory)


def save_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write everything of a policy except its weights."""
    from transformers import GenerationConfig

    generation = model.generation_config
    assert generation is not None
    generation.eos_token_id = stop_ids(tokenizer, generation.eos_token_id)
    try:
        generation.validate(strict=True)
    except ValueError:  # sampling values without do_sample (Llama 2), which transformers reads, never writes
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = GenerationConfig(**{name: getattr(generation, name) for name in ids})
        model.generation_config = generation
    model.config.save_pretrained(directory)
    generation.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_model(model: PreTrainedModel, directory: Path) -> None:
    """Write config and weights. transformers writes file by file, straight from the weights: so those that
    are mapped take no memory."""
    from rlhf.training import trained  # of torch

    model.save_pretrained(directory, max_shard_size=trained.FILE_BYTES)
