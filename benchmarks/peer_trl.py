"""Time TRL's PPOTrainer, of the last release that has one: `PEER_PYTHON benchmarks/peer_trl.py work.json`.

    python3 -m venv trl
    trl/bin/pip install trl==1.12.0 peft==0.21.2 transformers==5.24.0 accelerate==1.15.0 torch==2.13.0

Everything is the default of `trl.experimental.ppo`, except these choices:

- Batches are those in work.json, in that order: `trainer.dataloader`, which shuffles, is replaced by an
  iterable. It records the time whenever the trainer requests a batch; a step lasts from there to the next
  request, and the last one until `train()` returns. Nothing else of the trainer is changed.
- One micro-batch per minibatch (gradient_accumulation_steps=1). With more, TRL steps the optimizer only after
  all micro-batches of the whole batch, so that num_mini_batches has no effect.
- precision=bf16 sets the variable that `accelerate launch --mixed_precision bf16` sets. PPOTrainer makes its
  own Accelerator, which since transformers 5 does not see PPOConfig's `bf16=True`: without the variable
  everything is fp32.
- numpy is seeded too: PPOTrainer seeds torch only, and shuffles its minibatches with numpy.
- peft=lora puts an adapter into all linear layers of the policy, and the policy without it is the reference.
  TRL trains the value model in full all the same.
- If work.json has lengths, answers have these lengths: `generate` gets a logits processor
  (forced_lengths.py).
- If work.json requests evaluations, the policy answers `held_out` when the iterable above is asked for the
  batch after that many steps. It samples as in training, but with a separate random generator, and the clock
  is paused.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from forced_lengths import force_transformers
from peer_work import Report, Work, run_peer
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.models.utils import unwrap_model_for_generation

PACKAGES = ["trl", "transformers", "accelerate", "peft", "torch"]


def measure(work: Work) -> Report:
    """Train on work's batches."""
    torch.set_num_threads(work.threads)
    set_seed(work.seed)
    if work.precision == "bf16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
        meter = Meter(work, tokenizer.pad_token_id)
        trainer = _trainer(work, directory, tokenizer, meter)
        meter.report.precision = _precision(trainer)
        trainer.dataloader = InOrder(work, trainer, meter.report)
        if work.lengths is not None:
            force_transformers(trainer.model.policy, work.lengths, work.stop_id, work.never)
        trainer.train()
        meter.report.ask()
        evaluate(work, trainer, meter.report, len(work.batches))
    return meter.report


class Meter(TrainerCallback):
    """Takes the mean score from the trainer's log, and lengths from the reward model's inputs."""

    def __init__(self, work: Work, pad_id: int) -> None:
        self.report = Report(precision="", clock=work.clock)
        self._work, self._pad_id = work, pad_id

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store a step's metrics."""
        self.report.score_mean.append(kwargs["logs"]["objective/scores"])
        self.report.kl.append(kwargs["logs"]["objective/kl"])

    def count_tokens(self, _: torch.nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """A forward pre-hook of the reward model: it sees the responses as TRL truncated them."""
        step = len(self.report.asked) - 1
        prompt_width = max(map(len, self._work.batches[step]))
        unpadded = arguments["attention_mask"][:, prompt_width:].sum(1).tolist()
        if step == len(self.report.new_tokens):
            self.report.new_tokens.append(0)
        self.report.new_tokens[step] += self._work.response_tokens(unpadded, self._pad_id)


class InOrder:
    """TRL's dataloader without the shuffling."""

    def __init__(self, work: Work, trainer: PPOTrainer, report: Report) -> None:
        self._work, self._trainer, self._report = work, trainer, report

    def __iter__(self) -> Iterator[Any]:
        for step, batch in enumerate(self._work.batches):
            evaluate(self._work, self._trainer, self._report, step)
            self._report.ask()
            yield self._trainer.data_collator([{"input_ids": ids} for ids in batch])


def evaluate(work: Work, trainer: PPOTrainer, report: Report, done: int) -> None:
    """Let the policy answer the held-out prompts, if an evaluation is due after `done` steps."""
    is_last = done == len(work.batches)
    if not work.evaluate_every or (done % work.evaluate_every and not is_last):
        return
    with report.paused(), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(work.seed)
        report.evaluations.append((done, _answers(work, trainer)))


def _answers(work: Work, trainer: PPOTrainer) -> list[list[int]]:
    tokenizer = trainer.processing_class
    batch = trainer.data_collator([{"input_ids": ids} for ids in work.held_out])
    config = GenerationConfig(
        max_new_tokens=work.new_tokens, temperature=work.temperature, top_k=0, top_p=1.0, do_sample=True,
        eos_token_id=work.stop_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with unwrap_model_for_generation(trainer.model, trainer.accelerator) as model:
        found = model.policy.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config
        )
    rows = found[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(work.stop_id) + 1] if work.stop_id in row else row for row in rows]


def _trainer(work: Work, directory: str, tokenizer: Any, meter: Meter) -> PPOTrainer:
    """The trainer, with models as in TRL's example script: fp32 weights, value model from the reward
    model."""

    def scalar_model() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            work.reward, num_labels=1, dtype=torch.float32
        )

    reward_model = scalar_model()
    backbone = getattr(reward_model, reward_model.base_model_prefix)
    backbone.register_forward_pre_hook(meter.count_tokens, with_kwargs=True)
    return PPOTrainer(
        args=_config(work, directory),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32),
        ref_model=None,  # TRL copies the policy, or turns the adapter off
        reward_model=reward_model,
        value_model=scalar_model(),
        train_dataset=Dataset.from_dict({"input_ids": [ids for batch in work.batches for ids in batch]}),
        callbacks=[meter],
        peft_config=_lora(work) if work.peft == "lora" else None,
    )


def _config(work: Work, directory: str) -> PPOConfig:
    return PPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=work.precision == "bf16",
        seed=work.seed,
        report_to="none",
        save_strategy="no",
        num_sample_generations=0,
        disable_tqdm=True,
        learning_rate=work.lr,
        lr_scheduler_type=work.lr_schedule,
        adam_epsilon=work.adam_eps,
        total_episodes=work.episodes * len(work.batches),
        per_device_train_batch_size=work.episodes,
        gradient_accumulation_steps=1,
        num_mini_batches=work.episodes // work.minibatch_episodes,
        num_ppo_epochs=work.epochs,
        response_length=work.new_tokens,
        stop_token_id=work.stop_id if work.honour_stop else None,
        missing_eos_penalty=work.missing_stop_penalty or None,
        temperature=work.temperature,
        kl_coef=work.kl_coef,
        gamma=work.gamma,
        lam=work.lam,
        cliprange=work.clip,
        cliprange_value=work.value_clip,
    )


def _lora(work: Work) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=work.lora_rank, lora_alpha=work.lora_alpha, target_modules="all-linear"
    )


def _precision(trainer: PPOTrainer) -> str:
    if trainer.accelerator.mixed_precision == "no":
        return "fp32"
    return (
        f"fp32 weights; the update's forward passes under {trainer.accelerator.mixed_precision} autocast "
        "(accelerate); generation, reference, values and scores of the rollout in fp32"
    )


if __name__ == "__main__":
    run_peer(measure, PACKAGES)
