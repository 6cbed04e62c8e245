"""A trainer of TRL as a stage, between this project's stages and on their data.

Reads   prepared rows (SFT: `sft.data`; Reward, DPO: `reward.pairs`; GRPO: `ppo.prompts`); the model of
        `trl.init`; GRPO: the reward of `trl.reward`.
Writes  a plain model directory.

TRL gets the token ids that this project's own trainers get. The training itself is TRL's. Source:
github.com/huggingface/trl.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf.config import Complaint, ConfigError, did_you_mean
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.costs.training import artifact_bytes
from rlhf.data.chat_template import exchange_ids
from rlhf.data.schema import PairRow, PromptRow, Row, SftRow
from rlhf.digests import DirectoryDigest
from rlhf.models.peft.config import Peft
from rlhf.pipeline.fields import Model, Reads, Score, reads_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Healthy, Metric, named
from rlhf.pipeline.stage import Stage, View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"SFT": "sft", "Reward": "pairs", "DPO": "pairs", "GRPO": "ppo"}
"""Trainer -> the role whose rows it learns from."""
PEFT_METHODS = ("none", "lora", "dora", "ia3")
"""Tuning methods that TRL can train, and whose adapter merges into the weights."""
RESERVED_KEYS = {
    "output_dir", "seed", "data_seed", "report_to", "use_cpu", "bf16", "fp16", "save_strategy", "save_steps",
    "push_to_hub", "disable_tqdm", "resume_from_checkpoint", "deepspeed", "fsdp", "run_name", "project",
}  # fmt: skip
"""Keys of TRL's configs that the user may not set: this project's own keys decide them."""
PUBLISHED_METRICS = (
    "train_loss",
    "eval_loss",
    "eval_rewards/accuracies",
    "eval_accuracy",
    "eval_mean_token_accuracy",
)
"""Metrics of TRL that the stage publishes, if the trainer has them."""


class ByTrainer:
    """Descriptor of `makes`: trainer=Reward makes a reward model, the others make a policy."""

    def __get__(self, stage: TrlStage | None, owner: type[TrlStage]) -> Literal["policy", "reward"]:
        return "reward" if stage is not None and stage.trainer == "Reward" else "policy"


class TrlStage(Stage):
    """The keys `trl.*`. Values: conf/stages/trl.yaml."""

    title, version, in_chain, repeats_keys = "TRL", 2, False, True
    makes: ClassVar[Any] = ByTrainer()
    metrics: ClassVar[Mapping[str, Metric]] = {
        "train_loss": Metric("loss", ".3f"),
        "eval_loss": Metric("held-out loss", ".3f"),
        "eval_accuracy": Metric(healthy=Healthy(min=0.5)),
        "eval_rewards/accuracies": Metric(healthy=Healthy(min=0.5)),
        **named(
            "eval_mean_token_accuracy", "held_out_accuracy", "steps", "trained_parameters", "artifact_bytes"
        ),
        "accuracy": Metric(healthy=Healthy(min=0.5), is_curve=True),
        "rewards/accuracies": Metric(healthy=Healthy(min=0.5), is_curve=True),
    }

    trainer: Literal["SFT", "Reward", "DPO", "GRPO"]
    """The trainer of TRL."""
    args: dict[str, Any] | None
    """Keys of the trainer's own config (`SFTConfig`, ...), such as `{learning_rate: 1e-5}`."""
    init: Model
    """The model that it starts from: `sft`, `base`, or a `save_pretrained` directory."""
    peft: Peft
    reward: Score
    """GRPO: the reward that scores a response."""

    def reads(self) -> Reads:
        """The rows of the trainer's role; a reward only for GRPO."""
        fields_read = reads_of(self, without=() if self.trainer == "GRPO" else ("reward",))
        return fields_read._replace(roles=(ROLES[self.trainer],))

    def not_checked(self) -> dict[str, str]:
        """Only trainers that learn from pairs have `held_out_accuracy`."""
        return {} if ROLES[self.trainer] == "pairs" else {"held_out_accuracy": f"trl.trainer={self.trainer}"}

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """TRL's version."""
        return {"trl": _version()}

    def complaints(self, view: View) -> Iterator[Complaint]:
        """TRL supports the settings, and `trl.args` sets nothing that other keys decide."""
        if view.compute is None:
            return
        if view.compute.zero != "none":
            yield Complaint(f"zero={view.compute.zero}", "TRL would shard in its own way.", "Use zero=none.")
        if self.peft.method not in PEFT_METHODS:
            why = f"TRL gets {', '.join(PEFT_METHODS)}."
            yield Complaint(f"trl.peft={self.peft.method}", why, "Use one of these.")
        given = self.args or {}
        if taken := sorted(RESERVED_KEYS & {*given}):
            yield Complaint(f"trl.args.{taken[0]}", "this project's own keys decide that.", "Remove it.")
        known = sorted(each.name for each in fields(self._classes()[1]))
        for name in (each for each in given if each not in known and each not in taken):
            why = f"{self.trainer}Config (TRL {_version()}) has none."
            yield Complaint(f"trl.args.{name}", why, did_you_mean(name, known).strip())

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """The bytes that it writes. TRL's memory and time are not predicted."""
        weights = artifact_bytes(on, self.peft, is_scalar=self.trainer == "Reward")
        return StageCost(artifact=weights, checkpoint=3 * weights)

    def run(self, job: Job) -> Mapping[str, float]:
        """Train, and publish the model with its adapter merged."""
        from rlhf.models.peft.attach import count_parameters
        from rlhf.models.save import save_policy, write_model

        scratch = job.directory / "trainer"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of libraries that TRL calls
            trainer = self._trainer(job, scratch)
            trained, _ = count_parameters(trainer.model)
            state = Resumable(trainer)
            job.checkpoints.restore(state)
            with job.checkpoints.training():
                figures = trainer.train(resume_from_checkpoint=state.directory).metrics
            if self.trainer != "GRPO":
                figures |= trainer.evaluate()
        model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        if job.compute.is_main:
            shutil.rmtree(scratch, ignore_errors=True)  # it may not exist: the trainer need not write there
            model = model if self.peft.method == "none" else model.merge_and_unload()
            model.to(device="cpu", dtype=job.compute.dtype)
            if self.trainer == "Reward":
                write_model(model, job.directory)
                tokenizer.save_pretrained(job.directory)
            else:
                save_policy(model, tokenizer, job.directory)
        job.compute.barrier()
        accuracy = figures.get("eval_accuracy", figures.get("eval_rewards/accuracies"))
        ranked = (
            {} if accuracy is None else held_out_accuracy(accuracy, len(job.data.rows("pairs", "held_out")))
        )
        return {
            **{name: figures[name] for name in PUBLISHED_METRICS if name in figures},
            **ranked,
            "steps": trainer.state.global_step,
            "trained_parameters": trained,
            "artifact_bytes": sum(file.stat().st_size for file in job.directory.glob("*.safetensors")),
        }  # fmt: skip

    def _classes(self) -> tuple[Any, Any]:
        """TRL's trainer and its config class, with the Hub's telemetry turned off."""
        from huggingface_hub import constants

        constants.HF_HUB_DISABLE_TELEMETRY = True
        import trl

        return getattr(trl, f"{self.trainer}Trainer"), getattr(trl, f"{self.trainer}Config")

    def _trainer(self, job: Job, scratch: Path) -> Any:
        """TRL's trainer, with this project's logging, stops and checkpoints."""
        import datasets
        import torch
        import transformers

        from rlhf.models.peft.attach import tuner_config

        class Steps(transformers.TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                job.log(rest["logs"], state.global_step)

            def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if step := state.global_step:  # the step before has been logged
                    job.checkpoints.after_step(step, Resumable(trainer), {"step": step})

        kind, config = self._classes()
        try:
            settings = config(**{
                "logging_steps": 1, **({"completion_only_loss": True} if self.trainer == "SFT" else {}),
                **(self.args or {}), "output_dir": str(scratch), "seed": job.seed,
                "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
                "use_cpu": job.compute.device.type == "cpu", "bf16": job.compute.dtype == torch.bfloat16,
            })  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ConfigError(f"trl.args={self.args}: {error}") from None
        transformers.set_seed(job.seed)
        start, is_reward = job.start(self.init), self.trainer == "Reward"
        tokenizer, tuner, auto, head = start.load_tokenizer(), None, "CausalLM", {}
        if is_reward:
            auto, head = "SequenceClassification", {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
        made = getattr(transformers, f"AutoModelFor{auto}").from_pretrained
        model = made(start.directory, dtype=torch.float32, **head)  # fp32 weights: bf16 is by autocast
        if self.peft.method != "none":
            tuner = tuner_config(model, self.peft)
            tuner.task_type = "SEQ_CLS" if is_reward else "CAUSAL_LM"
        train, held_out = (
            datasets.Dataset.from_list([
                self._example(tokenizer, index, row)
                for index, row in enumerate(job.data.rows(ROLES[self.trainer], split))
            ])
            for split in ("train", "held_out")
        )  # fmt: skip
        if self.trainer == "DPO":  # of these trainers DPO alone would tokenise texts
            kind = type(kind.__name__, (kind,), {"_prepare_dataset": lambda self, dataset, *_: dataset})
        trainer = kind(
            model=model, args=settings, train_dataset=train, processing_class=tokenizer, peft_config=tuner,
            callbacks=[Steps()],
            **(
                {"reward_funcs": self._reward_function(job)}
                if self.trainer == "GRPO"
                else {"eval_dataset": held_out}
            ),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def _example(self, tokenizer: PreTrainedTokenizerBase, index: int, row: Row) -> dict[str, Any]:
        """Token ids, as this project's own trainers read them; GRPO's prompts as messages."""
        if isinstance(row, PromptRow):
            return {"prompt": row.prompt, "row": index}
        if isinstance(row, SftRow):
            ids, begin = exchange_ids(tokenizer, row.prompt, row.completion)
            return {"input_ids": ids, "completion_mask": [0] * begin + [1] * (len(ids) - begin)}
        assert isinstance(row, PairRow)
        chosen, begin = exchange_ids(tokenizer, row.prompt, row.chosen)
        rejected, _ = exchange_ids(tokenizer, row.prompt, row.rejected)
        if self.trainer == "Reward":
            return {"chosen_ids": chosen, "rejected_ids": rejected}
        return {"prompt_ids": chosen[:begin], "chosen_ids": chosen[begin:], "rejected_ids": rejected[begin:]}

    def _reward_function(self, job: Job) -> Any:
        """This project's reward as TRL calls it. TRL scores each rank's own answers; this project's reward
        scores those of all ranks together, which share the work."""
        from accelerate.utils import gather_object

        reward, rows = job.reward(self.reward, 4096), job.data.rows("ppo", "train")

        def score(prompts: Any, completions: Any, row: list[int], **columns: Any) -> list[float | None]:
            own = [
                (index, completion[-1]["content"]) for index, completion in zip(row, completions, strict=True)
            ]
            asked, begin = gather_object(own), job.compute.rank * len(own)
            scores = reward([rows[index] for index, _ in asked], [text for _, text in asked]).tolist()
            return [None if value != value else value for value in scores[begin:][: len(own)]]

        return score


def held_out_accuracy(accuracy: float, pairs: int) -> dict[str, float]:
    """TRL's share of correctly ranked pairs with its interval, so that a gate can bound it.

    Args:
        pairs: number of held-out pairs.
    """
    import torch

    from rlhf.evaluation.intervals import share

    return share(torch.full((pairs,), accuracy, dtype=torch.float64)).metrics("held_out_accuracy")


class Resumable:
    """A TRL trainer's checkpoint as one of this project's: hashed, and renamed when it is complete."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.directory: str | None = None
        """The checkpoint to resume from."""

    def state(self) -> None:
        """None: `save` writes files instead."""

    def save(self, directory: Path) -> None:
        """Let the trainer save, and move its files into the directory."""
        self.trainer._save_checkpoint(self.trainer.model, None)
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.is_world_process_zero():
            (written,) = Path(self.trainer.args.output_dir).glob("checkpoint-*")
            for file in written.iterdir():
                shutil.move(file, directory / file.name)
            written.rmdir()

    def load(self, directory: Path) -> None:
        """Remember the directory: the trainer reads it when it begins."""
        self.directory = str(directory)


def _version() -> str:
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("stage=trl needs TRL: pip install -e '.[trl]'.") from None
