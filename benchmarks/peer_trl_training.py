"""Time TRL's SFTTrainer, RewardTrainer and DPOTrainer: `python benchmarks/peer_trl_training.py work.json`.

It uses TRL 1.16, which this project's `bench` extra installs. The trainer is created as in its documentation,
with the model by name. So everything is the default (fp32 weights under bf16 autocast, gradient
checkpointing, batches padded to their longest row), except these choices:

- Rows come as token ids, in the order in which this project takes them (train_sampling_strategy=sequential),
  so that every step sees the same tokens on both sides. DPO's trainer tokenizes rows itself, so it gets them
  when it is made.
- Batch size, learning rate, Adam's epsilon and the weight that centers scores are this project's.
- Every step is logged (logging_steps=1), as in this project; nothing is saved.
- --peer-checkpointing off turns gradient checkpointing off: faster, but more memory.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from peer_work import CLOCKS
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

Config: TypeAlias = SFTConfig | RewardConfig | DPOConfig
Trainer: TypeAlias = SFTTrainer | RewardTrainer | DPOTrainer


class Meter(TrainerCallback):
    """Records when each step ends, and the tokens that went through the model until then."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.positions_at_end: list[int] = []
        self.tokens_at_end: list[int] = []
        self._positions, self._tokens = 0, 0

    def count(self, _: torch.nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """A forward pre-hook of the model. DPO's reference, whose pass has no gradient, does not count."""
        if not torch.is_grad_enabled():
            return
        self._positions += arguments["input_ids"].numel()
        self._tokens += int(arguments["attention_mask"].sum())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once a step."""
        self.ends.append(self._clock())
        self.positions_at_end.append(self._positions)
        self.tokens_at_end.append(self._tokens)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store a step's loss; the last call has none."""
        if "loss" in kwargs["logs"]:
            self.losses.append(float(kwargs["logs"]["loss"]))


def on_cuda(work: dict[str, Any]) -> bool:
    """Whether it runs on CUDA, as this project chooses (device=)."""
    return work["device"] != "cpu" and torch.cuda.is_available()


def peak_bytes(work: dict[str, Any]) -> int:
    """Peak memory of the process, or on CUDA of the device."""
    if on_cuda(work):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_config(work: dict[str, Any], directory: str) -> Config:
    """TRL's default config with the choices above."""
    shared = {
        "output_dir": directory,
        "use_cpu": not on_cuda(work),
        "seed": work["seed"],
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": work["batch"],
        "num_train_epochs": 1,
        "learning_rate": work["lr"],
        "adam_epsilon": work["eps"],
        "max_length": work["max_tokens"],
        "train_sampling_strategy": "sequential",
    }
    if work["precision"] == "fp32":
        shared["bf16"] = False
    if not work["checkpointing"]:
        shared["gradient_checkpointing"] = False
    if work["stage"] == "sft":
        return SFTConfig(**shared)
    if work["stage"] == "dpo":
        return DPOConfig(**shared, beta=0.1)
    return RewardConfig(**shared, center_rewards_coefficient=work["center"])


def make_trainer(work: dict[str, Any], directory: str, meter: Meter) -> Trainer:
    """The trainer of the stage."""
    trainer_class, task = {
        "sft": (SFTTrainer, "CAUSAL_LM"), "reward": (RewardTrainer, "SEQ_CLS"),
        "dpo": (DPOTrainer, "CAUSAL_LM"),
    }[work["stage"]]  # fmt: skip
    lora = LoraConfig(
        task_type=task, r=work["lora_rank"], lora_alpha=work["lora_alpha"], target_modules="all-linear"
    )
    encoded = Dataset.from_list(work["encoded"])
    texts = Dataset.from_list([{"prompt": "What?", "chosen": "This.", "rejected": "That."}])
    trainer: Trainer = trainer_class(
        model=work["model"],
        args=make_config(work, directory),
        train_dataset=texts if work["stage"] == "dpo" else encoded,
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
        callbacks=[meter],
        peft_config=lora if work["peft"] == "lora" else None,
    )
    trainer.train_dataset = encoded
    trainer.model.register_forward_pre_hook(meter.count, with_kwargs=True)
    return trainer


def describe(trainer: Trainer) -> str:
    """Precision and checkpointing, in words."""
    weights = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    autocast = trainer.accelerator.mixed_precision
    return (
        f"{str(weights.dtype).removeprefix('torch.')} weights, "
        f"{'no autocast' if autocast == 'no' else f'{autocast} autocast'}, gradient checkpointing "
        f"{'on' if trainer.args.gradient_checkpointing else 'off'}"
    )


def main() -> None:
    """Run the work and print the measurements."""
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    meter = Meter(CLOCKS[work["clock"]])
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(work, directory, meter)
        how = describe(trainer)
        trainer.train()
    print(
        json.dumps(
            {
                "ends": meter.ends,
                "losses": meter.losses,
                "positions": meter.positions_at_end,
                "tokens": meter.tokens_at_end,
                "peak_bytes": peak_bytes(work),
                "versions": {
                    name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")
                },
                "precision": how,
            }
        )
    )


if __name__ == "__main__":
    main()
