"""Tests every reward on two rows before anything trains, so that a broken one does not fail after hours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice

from rich.console import Console
from rich.markup import escape

from rlhf.config import ConfigError
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import Message, PromptRow, Row, text_of
from rlhf.distributed.compute import Compute
from rlhf.models.base import BaseModelFiles
from rlhf.pipeline.stage import Stage
from rlhf.rewards.http import RewardServerConfig
from rlhf.rewards.kinds import RewardMix, RewardPart, keyed_parts, reward_kind, stage_of
from rlhf.rewards.reward import with_token_ids

NUM_ROWS = 2
TEST_PROMPT = PromptRow([Message(role="user", content="Is this a test?")], columns={"completion": "No."})
"""The prompt for a stage that reads no data."""
TEST_ANSWER = "Yes."
"""The answer to a prompt without one."""
MICRO_BATCH_TOKENS = 4096


def rehearse_rewards(
    stages: Iterable[Stage],
    data: PreparedData,
    base: BaseModelFiles,
    compute: Compute,
    server: RewardServerConfig,
    console: Console,
) -> None:
    """Test each reward that these stages name on two rows, except learned ones, which do not exist yet.

    Raises:
        ConfigError: a reward does not answer with one number per row, or none of them is finite.
    """
    import torch

    from rlhf.rewards.model import make_reward

    tokenizer = cache(base.load_tokenizer)
    tested: list[RewardPart] = []
    for stage in sorted(stages, key=lambda stage: stage.repeats_keys):
        for key, part in keyed_parts(stage.reads().rewards):
            check_columns(key, part, stage, data)
            one = part.model_copy(update={"weight": 1.0})
            if stage_of(part.source) or one in tested:
                continue
            tested.append(one)
            rows = list(islice(prompts_and_answers(stage, data), NUM_ROWS)) or [(TEST_PROMPT, TEST_ANSWER)]
            prompts, completions = zip(*rows, strict=True)
            ids = [torch.tensor(tokenizer().encode(text)) for text in completions]
            try:
                alone = RewardMix(of=[one])
                reward = make_reward(alone, {}, base.config, compute, MICRO_BATCH_TOKENS, server)
                score_B = reward(with_token_ids(prompts, ids), completions)
            except ConfigError as error:
                raise ConfigError(
                    f"{key}: tested on {len(completions)} rows before anything trains: {error}"
                ) from error
            is_finite_B = score_B.isfinite()
            if bool(is_finite_B.all()):
                continue
            index = int((~is_finite_B).nonzero()[0])
            result = (
                f"{key}={part.source} gave {float(score_B[index])} for the response {completions[index]!r}"
            )
            if not bool(is_finite_B.any()):
                raise ConfigError(
                    f"{result}, and gave no finite score for any response that it was tested on before "
                    "anything trains. A score must be a finite number: fix the reward, or use another one."
                )
            console.print(
                f"[yellow]{escape(result)}[/]: such answers cannot be learned from.", highlight=False
            )


def check_columns(key: str, part: RewardPart, stage: Stage, data: PreparedData) -> None:
    """Refuse a reward that needs a column which no row of its data has.

    Raises:
        ConfigError: it names the missing column, and those that there are.
    """
    for name in sorted(reward_kind(part.source).needs(part)):
        seen: dict[str, None] = {}
        for row, _ in (
            prompts_and_answers(stage, data) if stage.reads().roles else [(TEST_PROMPT, TEST_ANSWER)]
        ):
            seen |= dict.fromkeys(row.columns)
            if name in row.columns:
                break
        else:
            others = ", ".join(seen) or "none"
            raise ConfigError(
                f"{key}={part.source} needs the column {name}, and no row of the prompts that it scores has "
                f"it (other columns: {others}). Add it to the file, or name another column."
            )


def prompts_and_answers(stage: Stage, data: PreparedData) -> Iterator[tuple[PromptRow, str]]:
    """(prompt, answer) of the first data that a stage reads."""
    for role in stage.reads().roles[:1]:
        rows: Sequence[Row] = data.rows(role, data.roles[role].splits[0])
        for row in rows:
            prompt, answer = row.exchanges()[0]
            text = None if answer is None else text_of(answer)
            prompt_row = (
                row if isinstance(row, PromptRow) else PromptRow(prompt, columns={"completion": text})
            )
            yield prompt_row, TEST_ANSWER if text is None else text
