"""Every reward is asked about two rows before anything trains, so that it cannot fail first after hours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice

from rich.console import Console
from rich.markup import escape

from rlhf.config import ConfigError
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import ROLES
from rlhf.data.schema import Message, PromptRow, Row
from rlhf.distributed.compute import Compute
from rlhf.models.base import BaseModelFiles
from rlhf.pipeline.stage import Stage
from rlhf.rewards.http import RewardServerConfig
from rlhf.rewards.reward import with_token_ids

ROWS = 2
PROMPT = PromptRow([Message(role="user", content="Is this a test?")])
"""For a stage that reads no data."""
ANSWER = "Yes."
"""The answer to a prompt that comes without one."""
MICRO_BATCH_TOKENS = 4096


def rehearse_rewards(
    stages: Iterable[Stage],
    data: PreparedData,
    base: BaseModelFiles,
    compute: Compute,
    server: RewardServerConfig,
    console: Console,
) -> None:
    """Ask each reward that these stages name about two rows. The learned one does not exist yet.

    Raises:
        ConfigError: it does not answer with one number per row, or none of them is finite.
    """
    import torch

    from rlhf.rewards.model import make_reward

    tokenizer = cache(base.load_tokenizer)
    asked: set[str] = set()
    for stage in sorted(stages, key=lambda stage: stage.repeats_keys):
        for key, source in stage.rewards().items():
            if source == "learned" or source in asked:
                continue
            asked.add(source)
            rows = list(islice(some_rows(stage, data), ROWS)) or [(PROMPT, ANSWER)]
            prompts, completions = zip(*rows, strict=True)
            ids = [torch.tensor(tokenizer().encode(text)) for text in completions]
            try:
                reward = make_reward(source, None, base.config, compute, MICRO_BATCH_TOKENS, server)
                score_B = reward(with_token_ids(prompts, ids), completions)
            except ConfigError as error:
                raise ConfigError(
                    f"{key}: tested on {len(completions)} rows before anything trains: {error}"
                ) from error
            is_finite_B = score_B.isfinite()
            if bool(is_finite_B.all()):
                continue
            index = int((~is_finite_B).nonzero()[0])
            said = f"{key}={source} gave {float(score_B[index])} for the response {completions[index]!r}"
            if not bool(is_finite_B.any()):
                raise ConfigError(
                    f"{said}, and gave no finite score for any response that it was tested on before "
                    "anything trains. A score must be a finite number: fix the reward, or use another one."
                )
            console.print(f"[yellow]{escape(said)}[/]: such answers cannot be learned from.", highlight=False)


def some_rows(stage: Stage, data: PreparedData) -> Iterator[tuple[PromptRow, str]]:
    """(prompt, answer) of the first data that a stage reads."""
    for role in stage.datasets()[:1]:
        rows: Sequence[Row] = data.rows(role, ROLES[role].splits[0])
        for row in rows:
            prompt, answer = row.exchanges()[0]
            asked = row if isinstance(row, PromptRow) else PromptRow(prompt, columns={"completion": answer})
            yield asked, ANSWER if answer is None else answer
