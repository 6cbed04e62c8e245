"""Time TRL's GRPOTrainer, on a GPU with vLLM beside it: `PEER_PYTHON benchmarks/peer_trl_grpo.py work.json`.

    python3 -m venv grpo
    grpo/bin/pip install 'trl[vllm]==1.16.0' peft==0.21.2

GRPO has no critic: it answers each prompt several times and compares the answers. So a step takes a part of
the prompts in work.json, and makes as many episodes of them. On a CPU transformers samples, without vLLM. All
else is what TRL does by itself, but for the values in work.json.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peer_work import Report, Work, run_peer
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PACKAGES = ["trl", "transformers", "accelerate", "peft", "torch"]
ANSWERS = 4
"""Of each prompt."""
SHARE_OF_VLLM = 0.3
"""Of the GPU's memory."""


class Meter(TrainerCallback):
    """When steps begin and end, and what TRL logs of them."""

    def __init__(self, work: Work) -> None:
        self.report = Report(precision="bf16 autocast" if work.precision == "bf16" else "fp32")
        self._episodes = work.episodes

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """TRL asks for the next step's prompts."""
        self.report.ask()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The last step is over."""
        self.report.ask()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once a step; the last one is a summary."""
        logs = kwargs["logs"]
        if "reward" in logs:
            self.report.score_mean.append(logs["reward"])
            self.report.new_tokens.append(round(logs["completions/mean_length"] * self._episodes))


def measure(work: Work) -> Report:
    """Train on work's batches."""
    torch.set_num_threads(work.threads)
    meter, tokenizer = Meter(work), AutoTokenizer.from_pretrained(work.model, padding_side="left")
    prompts = [tokenizer.decode(ids) for batch in work.batches for ids in batch[: work.episodes // ANSWERS]]
    with tempfile.TemporaryDirectory() as directory:
        trainer = GRPOTrainer(
            model=work.model,
            reward_funcs=AutoModelForSequenceClassification.from_pretrained(work.reward, num_labels=1),
            reward_processing_classes=AutoTokenizer.from_pretrained(work.reward),
            args=_config(work, directory),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[meter],
            peft_config=_lora(work) if work.peft == "lora" else None,
        )
        trainer.train()
    return meter.report


def _config(work: Work, directory: str) -> GRPOConfig:
    on_gpu = torch.cuda.is_available()
    whole = {"ignore_eos": True} if on_gpu else {"min_new_tokens": work.new_tokens}
    return GRPOConfig(
        output_dir=directory,
        use_cpu=not on_gpu,
        bf16=work.precision == "bf16",
        seed=work.seed,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        shuffle_dataset=False,
        max_steps=len(work.batches),
        learning_rate=work.lr,
        lr_scheduler_type=work.lr_schedule,
        per_device_train_batch_size=work.minibatch_episodes,
        gradient_accumulation_steps=work.episodes // work.minibatch_episodes,
        num_generations=ANSWERS,
        num_iterations=work.epochs,
        max_completion_length=work.new_tokens,
        temperature=work.temperature,
        beta=work.kl_coef,
        epsilon=work.clip,
        generation_kwargs={} if work.honour_stop else whole,
        use_vllm=on_gpu,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=SHARE_OF_VLLM,
    )


def _lora(work: Work) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=work.lora_rank, lora_alpha=work.lora_alpha, target_modules="all-linear"
    )


if __name__ == "__main__":
    run_peer(measure, PACKAGES)
