"""Peak memory of PPO on one device, by phase, in a process of its own: `python -m helpers.memory ...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, pstdev
from typing import TypeVar

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.experiments import build
from helpers.jobs import TINY, small_job, tiny_base
from helpers.ppo import SETTINGS, prompts, take_step
from rlhf.costs.hardware import LIBRARIES
from rlhf.costs.memory import LOADING
from rlhf.costs.model_shape import shape_in
from rlhf.data.chat_template import prompt_ids
from rlhf.data.prepared import LengthStats
from rlhf.distributed.compute import Compute
from rlhf.models.base import load_tokenizer
from rlhf.models.peft.merge import publish_policy
from rlhf.pipeline.costing import cost_of
from rlhf.pipeline.preflight import cost_context
from rlhf.stages.ppo import PpoStage

Result = TypeVar("Result")
SIZES = {"cuda": (2048, 16, 16, 5632), "cpu": (512, 8, 8, 2048)}
"""Hidden size, layers, heads, size of the MLP."""
BATCHES = {
    "cuda": ("ppo.batch_episodes=64", "ppo.minibatch_episodes=32", "ppo.max_new_tokens=256"),
    "cpu": ("ppo.batch_episodes=16", "ppo.minibatch_episodes=8", "ppo.max_new_tokens=64"),
}
PUBLISHING = "publishing"


class Meter:
    """The most that was held while something ran, beside what was held when this began."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peaks = device, dict[str, float]()
        self._before = 0.0 if device.type == "cuda" else float(psutil.Process().memory_info().rss)

    def during(self, phase: str, work: Callable[[], Result]) -> Result:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident size (proc(5))
        result = work()
        self.peaks[phase] = self._peak() - self._before
        return result

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])


def write_model(directory: Path, tiny: Path, kind: str) -> None:
    """A random Llama whose weights outweigh what libraries hold."""
    hidden, layers, heads, intermediate = SIZES[kind]
    config = LlamaConfig(
        vocab_size=259, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=intermediate, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    load_tokenizer(tiny, TINY).save_pretrained(directory)


def main(model: Path, scratch: Path, device: torch.device) -> dict[str, tuple[float, float]]:
    """Bytes, predicted and measured, by phase."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    experiment = build(*SETTINGS, *BATCHES[device.type])
    stage = experiment.stages["ppo"]
    assert isinstance(stage, PpoStage)
    rows, tokenizer = prompts(range(100, 100 + stage.batch_episodes)), load_tokenizer(model, TINY)
    lengths = [float(len(prompt_ids(tokenizer, row.prompt))) for row in rows]
    sizes = LengthStats(len(rows), mean(lengths), pstdev(lengths), round(max(lengths)))
    compute = Compute(str(device), dtype)
    job = small_job("ppo", scratch / "ppo", tiny_base(model), {"sft": model}, compute=compute)
    on = cost_context(experiment.settings, shape_in(model), compute, lambda role, split: sizes)
    cost, on_host = cost_of(stage, on, experiment.stages), None if on.on_cpu else False

    meter = Meter(device)
    trainer = meter.during(LOADING, lambda: stage.trainer(job))
    trainer.engine.set_rates(0, 10)
    take_step(trainer, rows, 1)  # from now on the optimizer has its moments
    meter.during(
        "sampling",
        lambda: trainer.policy.sample(
            [row.prompt for row in rows], max_new_tokens=stage.max_new_tokens, temperature=1.0,
            generator=torch.Generator(), batch_rows=len(rows),
        ),
    )  # fmt: skip
    meter.during("a step", lambda: take_step(trainer, rows, 2))
    weights = scratch / "trained"
    trainer.engine.save_trained(trainer.policy.model, weights)
    meter.during(
        PUBLISHING,
        lambda: publish_policy(
            scratch / "published", weights, trainer.policy.tokenizer, start=model, key="0", settings=TINY,
            dtype=compute.dtype, peft=stage.peft,
        ),
    )  # fmt: skip
    libraries = LIBRARIES if on.on_cpu else 0.0
    predicted = {phase.name: phase.size(on_host=on_host) + libraries for phase in cost.phases}
    predicted["a step"] = max(size for name, size in predicted.items() if name not in (LOADING, PUBLISHING))
    return {name: (predicted[name], peak) for name, peak in meter.peaks.items()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), torch.device(sys.argv[3]))))
