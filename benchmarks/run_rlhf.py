"""Timed steps of this project's PPO, GRPO or RLOO on given prompts; `ppo_step.py` starts it like the peers.

    python benchmarks/run_rlhf.py work.json

The steps are the product's own (`rlhf.ppo.trainer.PolicyTrainer.step`), built by the stage from its
config. The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from forced_lengths import check_lengths, force
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from peer_work import CLOCKS
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

import rlhf
from rlhf.config import ConfigError
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PromptRow
from rlhf.distributed.compute import Compute, make_compute
from rlhf.distributed.device import matmul_speed
from rlhf.distributed.signals import StopSignals
from rlhf.generation import policy_model, sampler
from rlhf.models.base import BaseModelFiles, ModelConfig
from rlhf.models.value_head import ActorCritic
from rlhf.pipeline.experiment import Experiment, build_experiment
from rlhf.pipeline.job import Job
from rlhf.pipeline.sampling_engine import make_vllm
from rlhf.pipeline.store import Artifact, Manifest
from rlhf.ppo.stage import PolicyStage
from rlhf.ppo.trainer import PolicyTrainer, repeated
from rlhf.rewards.http import RewardServerConfig
from rlhf.rl.rollout import Rollout
from rlhf.tracking.progress import Progress
from rlhf.tracking.timer import StepTimer
from rlhf.tracking.tracker import Tracker
from rlhf.training.checkpoint import CheckpointConfig, Checkpointer


def stage_name(work: dict[str, Any]) -> str:
    """Name of the stage of the work's algorithm."""
    return "ppo" if work["algorithm"] == "ppo" else "grpo"


OF_ALGORITHM = {
    "ppo": ["ppo.critic.init=reward"],
    "grpo": ["grpo.advantage=grpo", "grpo.kl.place=loss", "grpo.kl.estimator=k3", "grpo.loss_mean=token"],
    "rloo": [
        "grpo.advantage=rloo", "grpo.kl.place=reward", "grpo.kl.estimator=k1", "grpo.policy_loss=gspo",
        "grpo.loss_mean=sequence",
    ],
}  # fmt: skip
"""Keys that give the settings of TRL's trainer of that name."""


def overrides(work: dict[str, Any]) -> list[str]:
    """The work as overrides of this project's keys."""
    stage = stage_name(work)
    critic = [
        f"ppo.critic.optim.lr={work['lr']}", f"ppo.gamma={work['gamma']}", f"ppo.lam={work['lam']}",
        f"ppo.value_clip={work['value_clip']}",
    ]  # fmt: skip
    return [
        "model=local", f"model.path={work['model']}", f"ppo.reward=model:{work['reward']}",
        f"precision={work['precision']}", f"seed={work['seed']}", f"{stage}.steps={len(work['prompts'])}",
        f"{stage}.batch_episodes={len(work['prompts'][0]) * work['answers']}",
        f"{stage}.minibatch_episodes={work['minibatch_episodes']}", f"{stage}.epochs={work['epochs']}",
        f"ppo.max_new_tokens={work['new_tokens']}", f"ppo.temperature={work['temperature']}",
        f"{stage}.optim.lr={work['lr']}", f"{stage}.kl.coef={work['kl_coef']}",
        f"{stage}.clip={work['clip']}", f"{stage}.peft={work['peft']}",
        "ppo.score.normalize=none", "ppo.score.missing_stop_penalty=0",
        *OF_ALGORITHM[work["algorithm"]],
        *(critic if stage == "ppo" else [f"grpo.samples_per_prompt={work['answers']}"]),
        *work.get("overrides", []),
    ]  # fmt: skip


def make_experiment(overrides: list[str]) -> Experiment:
    """Compose an experiment like the command line."""
    with initialize_config_module("rlhf.conf", version_base="1.3"):
        node = compose("config", overrides=overrides)
    resolved = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return build_experiment({str(key): value for key, value in resolved.items()})


def make_single(overrides: list[str]) -> Experiment:
    """An experiment for one process that samples by itself.

    Raises:
        ConfigError: the overrides need more than one process.
    """
    experiment = make_experiment(overrides)
    zero, generation = experiment.settings.zero, experiment.settings.generation
    if generation == "auto":  # a run resolves `auto`, but this is no run
        generation = "local"
    for key, value, can in (("zero", zero, "none"), ("generation", generation, "local")):
        if value != can:
            raise ConfigError(f"{key}={value}: the benchmarks run one process by itself. Use {key}={can}.")
    return experiment


def about_this_process(device: torch.device) -> dict[str, Any]:
    """Figures that every runner reports at its end; on CUDA the memory is the device's."""
    on_cuda = device.type == "cuda"
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device)
        if on_cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {
            "rlhf": rlhf.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def make_trainer(work: dict[str, Any], scratch: Path) -> tuple[PolicyTrainer, str]:
    """The trainer as the stage creates it, with the given model as its SFT model."""
    experiment = make_experiment(overrides(work))
    stage = experiment.stages[stage_name(work)]
    assert isinstance(stage, PolicyStage)
    compute, how = make_compute(experiment.settings.device, experiment.settings.precision)
    job = make_job(Path(work["model"]), compute, work["seed"], scratch)
    job.vllm = make_vllm(experiment, compute)
    return stage.trainer(job), how


def make_job(model: Path, compute: Compute, seed: int, scratch: Path) -> Job:
    """The job that the pipeline would give to the stage; the seed initializes adapters and heads."""
    torch.manual_seed(seed)
    manifest = Manifest(
        stage="sft", key="0", recipe={}, config={}, metrics={}, seconds=0.0, created="", git_revision=None,
        packages={}, hardware="", files={},
    )  # fmt: skip
    tracker = Tracker(scratch, [])
    tracker.begin(scratch)
    settings = {"every_steps": None, "every_minutes": None, "background": False, "keep": 1, "resume": False}
    checkpoints = Checkpointer(
        scratch / "checkpoints", CheckpointConfig.model_validate(settings), compute, tracker, StopSignals(),
        lambda text: None, "ppo",
    )  # fmt: skip
    config = ModelConfig(kind="local", path=str(model))
    return Job(
        stage="ppo", seed=seed, compute=compute, base=BaseModelFiles(model, "benchmark", config),
        inputs={"sft": Artifact(model, manifest)}, data=PreparedData(scratch), directory=scratch,
        tracker=tracker, progress=Progress(Console(quiet=True)), checkpoints=checkpoints,
        reward_server=RewardServerConfig(timeout=60.0, retries=0), run_directory=scratch,
    )  # fmt: skip


def take_step(trainer: PolicyTrainer, rows: list[PromptRow], number: int) -> dict[str, float]:
    """Take step `number`, counted from 1."""
    trainer.learner.begin(number, trainer.config.steps, {0: trainer.config.warmup_steps})
    return trainer.step(rows)


class Positions:
    """Counts positions in the policy's passes when it scores and learns. A critic has the same batches."""

    def __init__(self, model: ActorCritic) -> None:
        self.real_tokens, self.positions, self._is_counting = 0, 0, False
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)
        model.policy.get_input_embeddings().register_forward_pre_hook(self._count_positions)

    @property
    def a_token(self) -> float:
        """Positions per token of prompts and responses: padding makes it more than 1, shared prefixes
        less."""
        return self.positions / self.real_tokens

    def _begin(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        half, batch = inputs[:2]
        self._is_counting = half == "policy"
        if self._is_counting:
            self.real_tokens += sum(batch.packed.lengths) + len(
                batch.packed.lengths
            )  # the last token is not an input

    def _end(self, *_: Any) -> None:
        self._is_counting = False

    def _count_positions(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._is_counting:  # not while sampling
            self.positions += inputs[0].numel()


def force_lengths(batches: Sequence[Sequence[int]], stop_id: int, never: Sequence[int]) -> None:
    """Patch the local engine: its n-th rollout has the n-th batch's lengths, row by row
    (forced_lengths.py)."""
    draw, coming = sampler._sample, iter(batches)
    left: list[int] = []  # tokens left by unfinished row, in the sampler's order: longest prompt first

    def forced_draw(
        logits_BV: Tensor, temperature: float, top_p: float, uniform_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        left_B = torch.tensor(left, device=logits_BV.device)
        due_B = left_B == 1
        left[:] = [tokens - 1 for tokens in left if tokens > 1]
        token_B, logp_B = draw(force(logits_BV, left_B, stop_id, never), temperature, top_p, uniform_B)
        # the policy's log-probabilities; excluding forbidden tokens hardly changes those of other tokens
        logp_B[due_B] = (logits_BV[due_B] / temperature).log_softmax(-1)[:, stop_id]
        return token_B, logp_B

    def forced_generate(model: PreTrainedModel, prompts: Sequence[Tensor], **settings: Any) -> Rollout:
        lengths = next(coming)
        left[:] = [lengths[row] for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))]
        sampler._sample = forced_draw
        rollout = sampler.generate(model, prompts, **settings)
        sampler._sample = draw
        check_lengths(rollout.response_lengths.tolist(), lengths)
        return rollout

    vars(policy_model)["generate"] = forced_generate


def matmul_peak(compute: Compute) -> float:
    """Matmul speed of the device in the run's precision, GFLOP/s: the best of several square products."""
    return max(matmul_speed(compute.dtype, compute.device) for _ in range(5))


def main() -> None:
    """Run the work and print the measurements."""
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        trainer, precision = make_trainer(work, Path(scratch))
        if not work["honour_stop"]:
            trainer.policy.stop_ids = []
        if work["lengths"] is not None:
            force_lengths(work["lengths"], work["stop_id"], work["never"])
        assert isinstance(trainer.engine.model, ActorCritic)
        positions, peak = Positions(trainer.engine.model), matmul_peak(trainer.compute)
        clock = CLOCKS[work["clock"]]
        if work["clock"] == "cpu":
            StepTimer._now = lambda timer: clock()  # type: ignore[method-assign, assignment]  # the phases' clock
        steps, times = [], [clock()]
        for number, batch in enumerate(work["prompts"], 1):
            rows = repeated([PromptRow(prompt) for prompt in batch], work["answers"])
            steps.append(take_step(trainer, rows, number))
            times.append(clock())
        if trainer.policy.vllm is not None:
            trainer.policy.vllm.close()
    about = about_this_process(trainer.compute.device)
    phases = [{name: step[name] for name in step if name.startswith("seconds_")} for step in steps]
    print(
        json.dumps(
            {
                "seconds": [later - earlier for earlier, later in pairwise(times)],
                "episodes": [len(batch) * work["answers"] for batch in work["prompts"]],
                "phases": phases,
                "metrics": steps,
                "micro_batch_tokens": trainer.config.micro_batch_tokens,
                "new_tokens": [step["response_tokens"] for step in steps],
                "positions_a_token": positions.a_token,
                "matmul_peak": max(peak, matmul_peak(trainer.compute)),
                "precision": precision,
                **about,
            }
        )
    )


if __name__ == "__main__":
    main()
