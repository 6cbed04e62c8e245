"""Workloads to time: models, prompts and lengths, as one JSON file for this project and its peers."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from rlhf.data.chat_template import prompt_ids, stop_ids
from rlhf.data.schema import Message
from rlhf.models.base import ModelConfig, base_files, base_identity, load_tokenizer
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.saved import save_adapter
from rlhf.models.value_head import load_scalar_model, reset_head, save_scalar_model

PACKAGED = Path(__file__).parent.parent / "data"
HH = Path(os.environ.get("RLHF_HH", "../shared/data/hh-helpful-base/pairs.jsonl.gz"))
"""Anthropic's HH helpful-base as rows of prompt, chosen, rejected."""
SHAPES: dict[str, dict[str, Any]] = {
    "uniform": {"episodes": 16, "new_tokens": 48, "honour_stop": False},
    "skewed": {"episodes": 16, "new_tokens": 256, "honour_stop": True},
    "skewed-packaged": {"episodes": 16, "new_tokens": 64, "honour_stop": True},
}
ANSWERS = {"ppo": 1, "grpo": 4, "rloo": 4}
"""Answers to each prompt, by algorithm."""
PPO: dict[str, Any] = {
    "temperature": 1.0, "epochs": 1, "lr": 1e-6, "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "clip": 0.2,
    "value_clip": 0.2, "lora_rank": 16, "lora_alpha": 32, "seed": 0, "algorithm": "ppo",
    "answers": 1, "clock": "wall",
}  # fmt: skip


def make_work(
    name: str,
    directory: Path,
    *,
    steps: int,
    peft: str,
    precision: str,
    model: str = "embedded",
    policy: Path | None = None,
    algorithm: str = "ppo",
    natural: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """A runner's complete input.

    Args:
        name: `uniform` (prompts of 36 to 63 tokens, every response equally long) or `skewed` (first turns of
            HH, lengths from `draw_lengths`; the packaged prompts if HH is absent).
        policy: directory of another model to use, with its tokenizer.
        algorithm: `ppo`, or one without a critic, whose prompts have several answers each.
        natural: for `skewed`: lengths of a model that is tuned on HH's answers, instead of drawn lengths.
        changes: changes to the shape, such as episodes=8.
    """
    if name == "skewed" and not HH.exists():
        print(
            f"{HH} is absent (RLHF_HH=FILE names another place): the packaged prompts instead.",
            file=sys.stderr,
        )
        name = "skewed-packaged"
    shape = {**SHAPES[name], **changes}
    if policy is None and name.startswith("skewed"):
        policy = tuned_model(directory, model, name) if natural else short_template(directory, model)
    policy = policy or base_model(directory, model)
    tokenizer = load_tokenizer(policy, ModelConfig(kind="local", path=str(policy)))
    episodes, answers = shape["episodes"], ANSWERS[algorithm]
    size, rest = divmod(episodes, answers)
    if rest:
        sys.exit(f"--episodes {episodes}: {algorithm} answers each prompt {answers} times.")
    prompts = draw(candidates(name, tokenizer), steps * size)
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    is_drawn = shape["honour_stop"] and not natural
    lengths = draw_lengths(steps, episodes, shape["new_tokens"]) if is_drawn else None
    stops = stop_ids(tokenizer, AutoConfig.from_pretrained(policy).eos_token_id)
    return {
        **PPO, **shape, "minibatch_episodes": episodes, "model": str(policy),
        "algorithm": algorithm, "answers": answers, "lengths": lengths,
        "never": sorted({*stops, tokenizer.pad_token_id}),
        "reward": str(reward_model(directory, policy, peft)), "prompts": batches,
        "batches": [[prompt_ids(tokenizer, prompt) for prompt in batch] for batch in batches],
        "stop_id": tokenizer.eos_token_id, "peft": peft, "precision": precision,
        "threads": len(os.sched_getaffinity(0)),
    }  # fmt: skip


def candidates(name: str, tokenizer: PreTrainedTokenizerBase) -> list[list[Message]]:
    """Prompts that a workload draws from."""
    if name == "skewed":
        with gzip.open(HH, "rt", encoding="utf-8") as file:
            rows = [json.loads(line)["prompt"] for line in file]
        return list({row[0]["content"]: row for row in rows if len(row) == 1}.values())
    texts = [json.loads(line)["prompt"] for line in (PACKAGED / "prompts.jsonl").open("rb")]
    if name == "uniform":  # 36 to 63 tokens: every other prompt is followed by a fact
        facts = [json.loads(line)["text"] for line in (PACKAGED / "retention_sentences.jsonl").open("rb")]
        texts = [
            f"{text} {facts[place % len(facts)]}" if place % 2 else text for place, text in enumerate(texts)
        ]
        texts = [text for text in texts if 36 <= len(prompt_ids(tokenizer, [as_user(text)])) <= 63]
    return [[as_user(text)] for text in texts]


def as_user(text: str) -> Message:
    """A user's turn."""
    return Message(role="user", content=text)


def draw(prompts: list[list[Message]], count: int) -> list[list[Message]]:
    """Draw `count` prompts in a fixed order; it starts again when they are used up."""
    order = random.Random(0).sample(prompts, len(prompts))
    return [order[place % len(order)] for place in range(count)]


def draw_lengths(steps: int, episodes: int, new_tokens: int) -> list[list[int]]:
    """Tokens of each answer by step, always the same.

    They are exponentially distributed with a mean of half of new_tokens, and cut at new_tokens, like the
    answers of a model that was tuned on HH: 110 tokens of at most 256. A step of n answers draws one length
    from each of n equal parts of the distribution, so that few steps are representative.
    """
    drawn = random.Random(0)

    def of_step() -> list[int]:
        shares = [(place + drawn.random()) / episodes for place in range(episodes)]
        beyond_1 = [round(-math.log1p(-share) * new_tokens / 2) for share in shares]
        lengths = [min(new_tokens, 1 + tokens) for tokens in beyond_1]
        drawn.shuffle(lengths)
        return lengths

    return [of_step() for _ in range(steps)]


def base_model(directory: Path, kind: str) -> Path:
    """The project's embedded or tiny model as a directory, with its tokenizer."""
    target = directory / f"{kind}-base"

    def build(content: list[str], write: Callable[[Path], None]) -> Path:
        if not (target / "config.json").exists():
            target.mkdir(parents=True)
            write(target)
        return target

    config = ModelConfig.model_validate({"kind": kind})
    return base_files(config, base_identity(config), build).directory


def short_template(directory: Path, kind: str) -> Path:
    """The same model with this project's chat template for it, which has no system message."""
    target = directory / f"{kind}-short-template"
    if not (target / "config.json").exists():
        base = base_model(directory, kind)
        shutil.copytree(base, target)
        template = {"embedded": "chatml", "tiny": None}[kind]
        config = ModelConfig(kind="local", path=str(base), chat_template=template)
        load_tokenizer(base, config).save_pretrained(target)
    return target


def tuned_model(directory: Path, kind: str, name: str) -> Path:
    """The model from which PPO starts, which ends its answers: tuned on HH's better answers, or on the
    packaged ones. `python -m rlhf stage=sft` creates it, once."""
    source = f"sft.data={{path: {HH.resolve()}, fields: {{completion: chosen}}}}"
    own = [source, "evaluate.prompts=samples:prompts", "sft.epochs=0.3", "prepare.on_bad_row=drop"]
    data = own if name == "skewed" else []
    run = ["-m", "rlhf", f"model={kind}", "stage=sft", "gates=warn", f"run_name={kind}-{name}", *data]
    subprocess.run([sys.executable, *run], cwd=directory, check=True, stdout=sys.stderr)
    return (directory / "runs" / f"{kind}-{name}" / "artifacts" / "sft").resolve()


def reward_model(directory: Path, policy: Path, peft: str) -> Path:
    """The policy's trunk with a random head. With peft=lora a random adapter is merged into it, and is also
    saved next to it, as by the reward stage."""
    target = directory / f"reward_model-{peft}-{policy.name}"
    if not (target / "config.json").exists():
        config = ModelConfig(kind="local", path=str(policy))
        torch.manual_seed(0)
        scalar = load_scalar_model(policy, config, torch.bfloat16, new_head=True)
        reset_head(scalar)
        adapter = attach(scalar.model, PeftConfig.model_validate({"method": peft}))
        with torch.no_grad():
            for name, parameter in scalar.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=1e-3)
        target.mkdir(parents=True)
        save_adapter(adapter, target, policy, policy.name, scalar.head.weight)
        adapter.merge()
        save_scalar_model(scalar, load_tokenizer(policy, config), target)
    return target
