"""Time torchtune's single-device PPO recipe: `PEER_PYTHON benchmarks/peer_torchtune.py work.json`.

    python3 -m venv tune
    tune/bin/pip install torchtune==0.6.1 torchao==0.10.0 torch==2.13.0

The recipe is the one in the wheel. Its config differs from the example (mistral/7B_full_ppo_low_memory) where
that one needs a GPU or saves memory at the cost of time: no activation checkpointing; torch's fused AdamW in
place of bitsandbytes' paged one; no compilation, which took a minute on two cores and gained nothing (two
layers tried). A minibatch is one micro-batch, as there. The recipe trains all parameters; it has no LoRA. Its
docstring says that CPUs are not supported, but its code runs on them. It has no default precision:
--precision auto is its example's, bf16.

Models, data, tokenizer, checkpoints and log are components that a config names, so the batches and
measurements need no change of the recipe. A step lasts from the request for its first prompt to the next such
request, and the last one until `train()` returns.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import OmegaConf
from peer_work import CLOCKS, Report, Work, run_peer
from torchtune.training import FullModelHFCheckpointer
from torchtune.training.metric_logging import StdoutLogger

PACKAGES = ["torchtune", "torchao", "torch"]


def measure(work: Work) -> Report:
    """Train on work's batches."""
    if work.peft != "none":
        raise ValueError(f"peft={work.peft}: torchtune's PPO recipe trains all parameters. Use peft=none.")
    torch.set_num_threads(work.threads)
    reason = " (auto: the recipe's example has it)" if work.precision == "auto" else ""
    report = Report(precision=f"pure {_dtype(work)}{reason}: weights, gradients and optimizer states")
    with tempfile.TemporaryDirectory() as directory:
        config = OmegaConf.create(_config(work, directory))
        recipe = _recipe_class()(config)
        recipe.setup(config)
        dataset, log = recipe._dataloader.dataset, recipe._metric_logger
        recipe.train()
        report.asked = [*dataset.asked, CLOCKS[work.clock]()]
    report.score_mean = log.scores
    report.new_tokens = [round((last_index + 1) * work.episodes) for last_index in log.last_indices]
    return report


class Prompts(torch.utils.data.Dataset[dict[str, list[int]]]):
    """A data set component: all prompts in order. Records when a step's first prompt is requested."""

    def __init__(self, tokenizer: Any, work: str) -> None:
        self._work = Work(**json.loads(work))
        self._batches = self._work.batches
        self.asked: list[float] = []

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        step, row = divmod(index, len(self._batches[0]))
        if row == 0:
            self.asked.append(CLOCKS[self._work.clock]())
        ids = self._batches[step][row]
        return {"tokens": ids, "labels": ids}


class TokenIds:
    """A tokenizer component: prompts are token ids already, so only the special tokens are needed."""

    def __init__(self, pad_id: int, eos_id: int, stop_tokens: list[int]) -> None:
        self.pad_id, self.eos_id, self.stop_tokens = pad_id, eos_id, stop_tokens


class LoadOnly(FullModelHFCheckpointer):  # type: ignore[misc]  # torchtune has no types here
    """A checkpointer component that leaves out the checkpoint after the last step."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing."""


class KeepSteps(StdoutLogger):  # type: ignore[misc]  # torchtune has no types here
    """A metric logger component that stores the metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[float] = []
        self.last_indices: list[float] = []
        """Index of the last response token, which the recipe calls length; means over the episodes."""

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        """Store a step's metrics."""
        super().log_dict(payload, step)
        self.scores.append(payload["scores"].item())
        self.last_indices.append(payload["response_lengths"].item())


def _recipe_class() -> Any:
    """The recipe's class. torchtune's recipes are files outside the package, which have no import name."""
    path = Path(torchtune.__file__).parents[1] / "recipes" / "ppo_full_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PPOFullFinetuneRecipeSingleDevice


def _dtype(work: Work) -> str:
    return "bf16" if work.precision == "auto" else work.precision


def _config(work: Work, directory: str) -> dict[str, Any]:
    """The config of the recipe."""
    architecture = _architecture(Path(work.model))
    policy = _checkpointer(work.model, "LLAMA3_2", f"{directory}/policy")
    scalar = _checkpointer(work.reward, "REWARD", f"{directory}/value")
    return {
        "output_dir": directory,
        "tokenizer": _special_tokens(work),
        "dataset": {"_component_": f"{__name__}.Prompts", "work": json.dumps(asdict(work))},
        "policy_model": {
            "_component_": "torchtune.models.llama3_2._component_builders.llama3_2",
            "scale_factor": 1,  # plain rotary embeddings
            **architecture,
        },
        # the recipe's example builds its classifier with this; Llama's layers are the same
        "reward_and_value_model": {
            "_component_": "torchtune.models.mistral._component_builders.mistral_classifier",
            "num_classes": 1,
            **architecture,
        },
        "checkpointer": policy,
        "ref_policy_checkpointer": policy,
        "value_checkpointer": scalar,
        "reward_checkpointer": scalar,
        "resume_from_checkpoint": False,
        "seed": work.seed,
        "shuffle": False,
        "device": "cpu",
        "dtype": _dtype(work),
        "batch_size": work.episodes,
        "forward_batch_size": work.episodes,
        "num_steps": work.episodes * len(work.batches),
        "ppo_epochs": work.epochs,
        "ppo_batch_size": work.minibatch_episodes,
        "gradient_accumulation_steps": 1,
        "compile": False,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": work.lr, "fused": True},
        "optimizer_in_bwd": True,
        "enable_activation_checkpointing": False,
        "enable_kv_cache": True,
        "max_generated_tokens": work.new_tokens,
        "temperature": work.temperature,
        "top_k": None,
        "min_response_length": None,
        "penalise_no_eos": False,
        "reward_penalty": 0,
        "whiten_rewards": False,
        "gamma": work.gamma,
        "lmbda": work.lam,
        "loss": {
            "_component_": "torchtune.rlhf.loss.PPOLoss",
            "epsilon": work.clip,
            "value_coeff": 0.1,
            "value_clip_range": work.value_clip,
        },
        "kl_coeff": work.kl_coef,
        "metric_logger": {"_component_": f"{__name__}.KeepSteps"},
        "log_every_n_steps": 1,
    }


def _architecture(model: Path) -> dict[str, Any]:
    """Arguments of torchtune's builders from transformers' config of a Llama."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"], "torchtune's llama3_2 ties the embeddings"
    return {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "max_seq_len": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_base": config["rope_parameters"]["rope_theta"],
    }


def _special_tokens(work: Work) -> dict[str, Any]:
    pad_id = json.loads((Path(work.model) / "config.json").read_text(encoding="utf-8"))["pad_token_id"]
    return {
        "_component_": f"{__name__}.TokenIds",
        "pad_id": pad_id,
        "eos_id": work.stop_id,
        "stop_tokens": [work.stop_id] if work.honour_stop else [],
    }


def _checkpointer(directory: str, model_type: str, output_dir: str) -> dict[str, Any]:
    return {
        "_component_": f"{__name__}.LoadOnly",
        "checkpoint_dir": directory,
        "checkpoint_files": sorted(path.name for path in Path(directory).glob("*.safetensors")),
        "model_type": model_type,
        "output_dir": output_dir,
    }


if __name__ == "__main__":
    run_peer(measure, PACKAGES)
