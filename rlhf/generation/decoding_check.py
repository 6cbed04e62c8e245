"""Check that the local engine's decoding agrees with one forward pass over the full text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config import ConfigError
from rlhf.distributed.compute import Compute
from rlhf.generation.sampler import generate
from rlhf.models.logprobs import pack_sequences, response_statistics
from rlhf.rl.rollout import Rollout

PROMPT_TOKENS, ANSWER_TOKENS, BATCH_ROWS = (6, 4, 3, 2, 1), 6, 3
"""Tokens of each prompt, most tokens of an answer, and rows decoded together: two batches of padded rows."""
MAX_ERROR_FP32, MAX_ERROR_16_BITS = 0.01, 0.25
"""Largest accepted error of a row's log-probabilities in fp32 and in 16 bits, as a share of the effect that
the context without its last token has on them.

A model that loses its state has an error of 0.25 or more. Correct models only round: by 1e-5 in fp32; in bf16
by 0.02, or by 0.11 if a router of experts flips."""
MIN_ERROR_NATS = 0.01
"""Nats per token: an error up to this is always accepted, because rounding in 16 bits can cause it."""


class UndecodableError(ConfigError):
    """The local engine would not sample from the model's own distribution."""


@torch.no_grad()
def check_decoding(model: PreTrainedModel, *, copies: bool = True, together: Compute | None = None) -> None:
    """Refuse a model that has state outside its cache. Sample a few answers, and compare their
    log-probabilities with those of one pass over the full texts.

    The rows differ in length, some end before others in their batch, and a second batch follows the first.

    Args:
        copies, together: as of `generate`.

    Raises:
        UndecodableError: decoding fails, or its log-probabilities differ too much.
        ConfigError: the model's logits are not finite.
    """
    try:
        error_nats, context_nats = _measured(model, copies, together)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise _refused(model, f"decoding with a KV cache fails: {reason}") from error
    share = MAX_ERROR_FP32 if model.dtype == torch.float32 else MAX_ERROR_16_BITS
    if not error_nats <= max(share * context_nats, MIN_ERROR_NATS):
        raise _refused(
            model,
            f"decoded with a KV cache its log-probabilities are {error_nats:.2g} nats per token off those of "
            "one pass over the whole text, so it keeps a state elsewhere",
        )


def _refused(model: PreTrainedModel, reason: str) -> UndecodableError:
    return UndecodableError(
        f"generation=local: {type(model).__name__} cannot be sampled from: {reason}. Use generation=vllm, or "
        "another model."
    )


def _measured(model: PreTrainedModel, copies: bool, together: Compute | None) -> tuple[float, float]:
    """In nats per token: the largest mean |difference| of a row between decoding and one pass, and the mean
    effect on that pass of the context without its last token."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    prompts = [torch.randint(size, (length,), generator=generator) for length in PROMPT_TOKENS]
    uniform_BR = torch.rand(len(prompts), ANSWER_TOKENS, generator=generator)
    first = _sampled(model, prompts, uniform_BR[:, :2], [], copies, together)
    first_ids = {int(ids[0]) for ids in first.response_ids}
    # each batch's longest row ends early, but no row at its first token: rows and columns leave the cache
    stops = [stop for row in (0, BATCH_ROWS) if (stop := int(first.response_ids[row][1])) not in first_ids]
    rollout = _sampled(model, prompts, uniform_BR, stops, copies, together)
    assert rollout.sampled_logp is not None
    answers = rollout.response_ids
    # one pass: every answer after its prompt, and each decoded token after only the token before it
    before = [*prompts, *(token for ids in answers for token in ids[:-1, None])]
    behind = [*answers, *(token for ids in answers for token in ids[1:, None])]
    batch = pack_sequences(before, behind, model.device)
    logp_N = response_statistics(model, batch, 1.0).logp_N.cpu()
    *whole, alone_N = logp_N.split([*map(len, answers), sum(len(ids) - 1 for ids in answers)])
    # skip the first token of an answer: it comes from the prompt's pass, not from decoding
    engine = [logp[1:] for logp in rollout.sampled_logp]
    own = [logp[1:] for logp in whole]
    errors = [float((a - b).abs().mean()) for a, b in zip(engine, own, strict=True) if len(a) > 0]
    return max(errors), float((torch.cat(own) - alone_N).abs().mean())


def _sampled(
    model: PreTrainedModel,
    prompts: list[Tensor],
    uniform_BR: Tensor,
    stops: list[int],
    copies: bool,
    together: Compute | None,
) -> Rollout:
    return generate(
        model,
        prompts,
        max_new_tokens=uniform_BR.shape[1],
        temperature=1.0,
        stop_ids=stops,
        pad_id=0,
        uniform_BR=uniform_BR,
        batch_rows=BATCH_ROWS,
        copies=copies,
        together=together,
    )
