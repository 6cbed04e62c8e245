"""Time TRL's GRPOTrainer or RLOOTrainer: `PEER_PYTHON benchmarks/peer_trl_grpo.py work.json`.

It uses TRL 1.16, which this project's `bench` extra installs. On a GPU it samples with vLLM and needs a
separate environment:

    python3 -m venv grpo
    grpo/bin/pip install 'trl[vllm]==1.16.0' peft==0.21.2

On a CPU transformers samples. The trainer is created as in its documentation, with the models by name. So
everything is the default (fp32 weights under bf16 autocast, sampling in fp32, gradient checkpointing), except
the values in work.json and these choices:

- Prompts are text, in the order of work.json. Their tokens must be those in work.json.
- One micro-batch per minibatch, as for PPO (peer_trl.py).
- If work.json has lengths, answers have these lengths: `generate` gets a logits processor
  (forced_lengths.py).
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from forced_lengths import force_transformers
from peer_work import Report, Work, run_peer
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

PACKAGES = ["trl", "transformers", "accelerate", "peft", "torch"]
SHARE_OF_VLLM = 0.3
"""Share of the GPU's memory."""


class Meter(TrainerCallback):
    """Start and end times of the steps, and TRL's log of them."""

    def __init__(self, work: Work) -> None:
        self.report = Report(precision="", clock=work.clock)
        self._episodes = work.episodes

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """TRL asks for the next step's prompts."""
        self.report.ask()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """The last step is over."""
        self.report.ask()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store a step's metrics; the last call has a summary."""
        logs = kwargs["logs"]
        if "reward" in logs:
            self.report.score_mean.append(logs["reward"])
            self.report.new_tokens.append(round(logs["completions/mean_length"] * self._episodes))


def measure(work: Work) -> Report:
    """Train on work's batches."""
    torch.set_num_threads(work.threads)
    meter, tokenizer = Meter(work), AutoTokenizer.from_pretrained(work.model, padding_side="left")
    prompts = [ids for batch in work.batches for ids in batch]
    texts = [tokenizer.decode(ids) for ids in prompts]
    assert tokenizer(texts)["input_ids"] == prompts, "TRL is asked the same tokens"
    trainer_class = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}[work.algorithm]
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_class(
            model=work.model,
            reward_funcs=work.reward,
            args=_config(work, directory),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[meter],
            peft_config=_lora(work) if work.peft == "lora" else None,
        )
        meter.report.precision = _describe(trainer)
        if work.lengths is not None:
            force_transformers(trainer.model, work.lengths, work.stop_id, work.never)
        trainer.train()
    return meter.report


def _config(work: Work, directory: str) -> GRPOConfig | RLOOConfig:
    on_gpu = torch.cuda.is_available()
    whole = {"ignore_eos": True} if on_gpu else {"min_new_tokens": work.new_tokens}
    shared: dict[str, Any] = {
        "output_dir": directory,
        "use_cpu": not on_gpu,
        "seed": work.seed,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "shuffle_dataset": False,
        "max_steps": len(work.batches),
        "learning_rate": work.lr,
        "lr_scheduler_type": work.lr_schedule,
        "per_device_train_batch_size": work.minibatch_episodes,
        "gradient_accumulation_steps": work.episodes // work.minibatch_episodes,
        "gradient_checkpointing": work.checkpointing,
        "num_generations": work.answers,
        "num_iterations": work.epochs,
        "max_completion_length": work.new_tokens,
        "temperature": work.temperature,
        "beta": work.kl_coef,
        "epsilon": work.clip,
        "generation_kwargs": {} if work.honour_stop else whole,
        "use_vllm": on_gpu,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": SHARE_OF_VLLM,
    }
    if work.precision != "auto":
        shared["bf16"] = work.precision == "bf16"
    return {"grpo": GRPOConfig, "rloo": RLOOConfig}[work.algorithm](**shared)


def _describe(trainer: GRPOTrainer | RLOOTrainer) -> str:
    """Precision and checkpointing, in words."""
    weights = next(trainer.model.parameters())
    autocast = trainer.accelerator.mixed_precision
    return (
        f"{str(weights.dtype).removeprefix('torch.')} weights, "
        f"{'no autocast' if autocast == 'no' else f'{autocast} autocast'}, gradient checkpointing "
        f"{'on' if trainer.args.gradient_checkpointing else 'off'}"
    )


def _lora(work: Work) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=work.lora_rank, lora_alpha=work.lora_alpha, target_modules="all-linear"
    )


if __name__ == "__main__":
    run_peer(measure, PACKAGES)
