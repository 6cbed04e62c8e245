"""Checks that the local engine's decoding agrees with one forward pass over the whole text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config import ConfigError
from rlhf.distributed.compute import Compute
from rlhf.generation.sampler import generate
from rlhf.models.logprobs import pack_sequences, response_statistics
from rlhf.rl.rollout import Rollout

PROMPTS, TOKENS, ROWS = (6, 4, 3, 2, 1), 6, 3
"""Tokens of each prompt and of a whole answer, and rows decoded together: two batches of padded rows."""
EXACT, ROUNDED = 0.01, 0.25
"""Largest error of a row's log-probabilities in fp32 and in 16 bits, as a share of what their context without
its last token changes in them.

A model that forgets is off by a quarter or more. Correct random models of 50 families were off by 1e-5 in
fp32; in bf16, as SmolLM2, by at most 0.02, and one mixture of experts, whose router flips, by 0.11."""
TOO_LITTLE = 0.01
"""Nats a token, below which a difference is none: bf16 makes up to five times as much of SmolLM2's."""


class UndecodableError(ConfigError):
    """The local engine would not sample what the model says."""


@torch.no_grad()
def check_decoding(model: PreTrainedModel, *, copies: bool = True, together: Compute | None = None) -> None:
    """Refuse a model whose state is not all in its cache. A few answers are sampled, and their
    log-probabilities compared with those of one pass over the whole texts.

    The rows differ in length, some end before others in their batch, and a second batch follows the first.

    Args:
        copies, together: as of `generate`.

    Raises:
        UndecodableError: the local engine would not sample what the model says.
        ConfigError: the model's logits are not finite.
    """
    try:
        off, context = _measured(model, copies, together)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise _refused(model, f"decoding with a KV cache fails: {reason}") from error
    share = EXACT if model.dtype == torch.float32 else ROUNDED
    if not off <= max(share * context, TOO_LITTLE):
        raise _refused(
            model,
            f"decoded with a KV cache its log-probabilities are {off:.2g} nats per token off those of one "
            "pass over the whole text, so it keeps a state elsewhere",
        )


def _refused(model: PreTrainedModel, reason: str) -> UndecodableError:
    return UndecodableError(
        f"generation=local: {type(model).__name__} cannot be sampled from: {reason}. Use generation=vllm, or "
        "another model."
    )


def _measured(model: PreTrainedModel, copies: bool, together: Compute | None) -> tuple[float, float]:
    """For the row with the largest error, in nats: the mean |difference| between decoding and one pass, and
    the mean effect of the context on that pass."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    prompts = [torch.randint(size, (length,), generator=generator) for length in PROMPTS]
    uniform_BR = torch.rand(len(prompts), TOKENS, generator=generator)
    first = _sampled(model, prompts, uniform_BR[:, :2], [], copies, together)
    begun = {int(ids[0]) for ids in first.response_ids}
    # the longest row of each batch ends early, and none at once: rows leave the cache, and columns too
    stops = [stop for row in (0, ROWS) if (stop := int(first.response_ids[row][1])) not in begun]
    rollout = _sampled(model, prompts, uniform_BR, stops, copies, together)
    assert rollout.sampled_logp is not None
    answers = rollout.response_ids
    # in one pass: every answer behind its prompt, and each decoded token behind the one before it alone
    before = [*prompts, *(token for ids in answers for token in ids[:-1, None])]
    behind = [*answers, *(token for ids in answers for token in ids[1:, None])]
    batch = pack_sequences(before, behind, model.device)
    logp_N = response_statistics(model, batch, 1.0).logp_N.cpu()
    *whole, alone_N = logp_N.split([*map(len, answers), sum(len(ids) - 1 for ids in answers)])
    # an answer's first token is from the prompt's own pass
    engine = [logp[1:] for logp in rollout.sampled_logp]
    own = [logp[1:] for logp in whole]
    off = [float((a - b).abs().mean()) for a, b in zip(engine, own, strict=True) if len(a) > 0]
    return max(off), float((torch.cat(own) - alone_N).abs().mean())


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
        batch_rows=ROWS,
        copies=copies,
        together=together,
    )
