"""`stage=plan` for models and GPUs that are not here, from a config.json: what it proposes is accepted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.chains import Outcome, run_main
from helpers.costs import GIB, LARGE, NO_CHECKPOINTS
from helpers.experiments import build
from rlhf.costs.hardware import CUDA_CONTEXT, NCCL_BUFFERS, Machine, Speed
from rlhf.costs.model_shape import ModelShape, shape_in
from rlhf.costs.setup import CostContext
from rlhf.data.prepared import LengthStats
from rlhf.distributed.compute import Compute
from rlhf.pipeline.checks import check
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.preflight import Attempt, Disk, preflight
from rlhf.pipeline.stage import View

CONFIGS = Path(__file__).parents[1] / "costs" / "configs"
MODELS = ("llama_8b", "qwen_32b", "llama_70b")
SIXTY_FOUR = ("plan.nodes=8", "plan.gpus=8", "plan.gpu_memory=80GiB")


def planned(directory: Path, model: str, *overrides: str) -> Outcome:
    """The plan of a model of which there is a config.json and nothing else."""
    base = directory / model
    base.mkdir(exist_ok=True)
    if not (base / "config.json").exists():
        shutil.copy(CONFIGS / f"{model}.json", base / "config.json")
    arguments = ["stage=plan", "device=cpu", "model=local", f"model.path={base}", "run_name=plan", *overrides]
    outcome = run_main(directory, arguments, directory / "runs" / "plan")
    assert outcome.code == 0, outcome.err
    return outcome


def shape_of_file(model: str, directory: Path) -> ModelShape:
    base = directory / "shape" / model
    base.mkdir(parents=True)
    shutil.copy(CONFIGS / f"{model}.json", base / "config.json")
    return shape_in(base)


@pytest.mark.parametrize(
    ("model", "billions"), [("llama_8b", 8.03), ("qwen_32b", 32.76), ("llama_70b", 70.55)]
)
def test_parameters_are_those_of_the_published_models(model: str, billions: float, tmp_path: Path) -> None:
    assert shape_of_file(model, tmp_path).parameters / 1e9 == pytest.approx(billions, abs=0.005)


class Taken(NamedTuple):
    """What the preflight of all ranks says of a planned experiment."""

    experiment: Experiment
    refused: list[str]


def taken(outcome: Outcome, shape: ModelShape, ranks: int, memory: float = 80.0) -> Taken:
    """Compose the planned experiment, and check each of its stages on so many GPUs of so many GiB."""
    found = build(
        f"hydra.searchpath=[file://{outcome.directory / 'artifacts' / 'plan'}]", "+experiment=planned"
    )
    stages, settings = [found.stages[name] for name in found.needed()], found.settings
    compute = Compute("cuda", "bfloat16", settings.zero, world_size=ranks)
    for stage in stages:
        check(stage, View(found.stages, compute=compute))
    machine = Machine(
        "cuda",
        "a test",
        memory * GIB,
        64.0 * GIB,
        CUDA_CONTEXT + (NCCL_BUFFERS if ranks > 1 else 0.0),
        ranks,
        Speed(3e5, 2e3),
        min(ranks, 8),
    )

    def sizes(role: str, split: str) -> LengthStats:
        tokens = 1024 if role in ("sft", "pairs") else 512
        return LengthStats(10_000, float(tokens), 0.0, tokens)

    vllm = settings.vllm if settings.generation == "vllm" else None
    on = CostContext(shape, 2, settings.zero, machine, sizes, vllm)
    attempts = {stage.name: Attempt() for stage in stages}
    checked = preflight(stages, found.stages, on, Disk(Path("/"), LARGE), NO_CHECKPOINTS, attempts)
    assert {"sft", "reward", "generate", "ppo"} <= set(checked.costs)
    return Taken(found, [*checked.refused, *checked.warned])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("methods", ["null", "[none]"])
def test_what_is_planned_for_64_gpus_is_accepted_by_the_preflight_of_these_ranks(
    model: str, methods: str, tmp_path: Path
) -> None:
    outcome = planned(tmp_path, model, *SIXTY_FOUR, f"plan.methods={methods}")
    experiment, refused = taken(outcome, shape_of_file(model, tmp_path), 64)
    assert refused == []
    sft, ppo = experiment.stages["sft"].model_dump(), experiment.stages["ppo"].model_dump()
    assert sft["batch_rows"] == ppo["batch_episodes"] == ppo["minibatch_episodes"] == 64
    assert ppo["max_new_tokens"] == 2 * 512
    assert sft["peft"]["method"] == ppo["peft"]["method"]
    if methods == "[none]":
        assert ppo["peft"]["method"] == "none"
    if model != "llama_8b":
        assert experiment.settings.zero not in ("none", "zero2") and ppo["frozen_placement"] == "sharded"


def test_vllm_starts_from_what_is_planned_for_smaller_gpus(tmp_path: Path) -> None:
    """Of the model's whole context of 131,072 tokens, one row would want 16 GiB of cache."""
    one = ("plan.gpus=1", "plan.gpu_memory=48GiB", "generation=vllm", "plan.methods=[lora]")
    experiment, refused = taken(
        planned(tmp_path, "llama_8b", *one), shape_of_file("llama_8b", tmp_path), 1, 48.0
    )
    assert refused == []
    vllm = experiment.settings.vllm
    assert vllm.max_model_len is None and vllm.kv_cache_gib < 16


def test_a_plan_says_what_it_proposes_and_what_it_assumes(tmp_path: Path) -> None:
    outcome = planned(tmp_path, "llama_70b", *SIXTY_FOUR, "plan.methods=[none]", "plan.answer_tokens=400")
    said = " ".join(outcome.out.split())
    for words in (
        "zero=", "vllm.tensor_parallel=", "sft.batch_rows=64", "ppo.activation_checkpointing=true",
        "ppo.frozen_placement=sharded", "ppo.max_new_tokens=800", "tokens/s a GPU",
        "plan.rows=10000", "plan.answer_tokens=400", "of 312 TFLOP/s 0.39 reading",
        "907 tokens/s a GPU (verl 0.3", "1562 (NeMo-RL 0.4",
    ):  # fmt: skip
        assert words in said, words
    text = (outcome.artifact("plan") / "plan.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| ppo, learning")]
    assert re.fullmatch(r"(\| [^|]+ )+\|", row.strip())
    (speed,) = re.findall(r"^\| ppo \| (\d+) to (\d+) \|", text, re.MULTILINE)
    assert 0 < int(speed[0]) < int(speed[1]) < 1000


H100 = (
    "plan.gpus=8", "plan.gpu_memory=80GiB", "plan.gpu_tflops=989", "plan.gpu_bandwidth=3.35TB",
    "plan.gpu_link=450GB", "plan.network=50GB", "plan.methods=[none]",
)  # fmt: skip
VERL = (
    "plan.trains=[ppo]", "ppo.batch_episodes=1024", "ppo.minibatch_episodes=256", "plan.prompt_tokens=128",
    "plan.answer_tokens=256", "plan.longest_answer=512",
)  # fmt: skip
NEMO = (
    "plan.nodes=2", "plan.trains=[grpo]", "ppo.reward=vader", "grpo.batch_episodes=2048",
    "grpo.minibatch_episodes=512", "grpo.samples_per_prompt=32", "plan.prompt_tokens=150",
    "plan.answer_tokens=910", "plan.longest_answer=3900",
)  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "model", "setting", "published"),
    [("ppo", "qwen2_7b", VERL, 907), ("grpo", "llama_8b", NEMO, 1562)],
)
def test_published_speeds_are_within_the_planned_range(
    stage: str, model: str, setting: tuple[str, ...], published: int, tmp_path: Path
) -> None:
    text = (planned(tmp_path, model, *H100, *setting).artifact("plan") / "plan.md").read_text()
    (row,) = re.findall(rf"^\| {stage} \| (\d+) to (\d+) \| (\d+) to (\d+) \|", text, re.MULTILINE)
    least, most, larger_least, larger_most = map(int, row)
    assert least < published < most < 3.1 * least
    assert least < larger_least and most < larger_most  # larger batches are faster


@pytest.mark.parametrize(("precision", "weights"), [("auto", 2), ("fp32", 4)])
def test_the_first_line_names_the_precision_of_the_figures(
    precision: str, weights: int, tmp_path: Path
) -> None:
    outcome = planned(tmp_path, "llama_8b", "plan.gpus=2", "plan.trains=[sft]", "plan.methods=[lora]",
                      f"precision={precision}")  # fmt: skip
    name = "fp32" if weights == 4 else "bf16"
    assert f"2 ranks of 80.0 GiB, {name}, 312000 GFLOP/s" in " ".join(outcome.out.split())
    assert f"parameters x {weights} B" in (outcome.artifact("plan") / "plan.md").read_text()


def test_what_is_out_of_reach_says_why_and_what_is_not(tmp_path: Path) -> None:
    one = ("plan.gpus=1", "plan.gpu_memory=80GiB")
    outcome = planned(tmp_path, "llama_70b", *one)
    said = " ".join(outcome.out.split())
    assert "No strategy is possible" in said and "sft alone fits with QLoRA" in said
    (needed,) = re.findall(r"all parameters fit on (\d+) of these GPUs", said)
    assert int(needed) in (32, 64)
    again = " ".join(planned(tmp_path, "llama_70b", *one, "plan.trains=[sft]").out.split())
    assert "The fastest training that fits: LoRA (as fast, within the planner's error: QLoRA)" in again
    text = (tmp_path / "runs" / "plan" / "artifacts" / "plan" / "plan.md").read_text()
    (full,) = [line for line in text.splitlines() if line.startswith("| no | full ")]
    assert "of the host memory, and at most 90% may be used; instead: LoRA" in full


@pytest.mark.parametrize(
    ("override", "memory"),
    [("plan.gpu_memory=2GiB", "GPU memory"), ("plan.host_memory=2GiB", "host memory")],
)
def test_a_row_that_does_not_fit_names_the_memory(override: str, memory: str, tmp_path: Path) -> None:
    sizes = ("plan.gpus=1", "plan.trains=[sft]", "plan.methods=[lora]", override)
    text = (planned(tmp_path, "llama_8b", *sizes).artifact("plan") / "plan.md").read_text()
    words = rf"does not fit: sft, [\w ]+ needs (\d+)% of the {memory}, and at most 90% may be used"
    (share,) = re.findall(words, text)
    assert int(share) > 90


def test_advice_beyond_the_given_methods_names_both_keys(tmp_path: Path) -> None:
    outcome = planned(tmp_path, "llama_70b", "plan.gpus=1", "plan.methods=[none]")
    said = " ".join(outcome.out.split())
    assert "sft alone fits with QLoRA: plan.trains=[sft] plan.methods=[qlora]" in said


def test_larger_ranks_share_a_batch_that_is_proposed(tmp_path: Path) -> None:
    outcome = planned(tmp_path, "llama_8b", "plan.gpus=3", "plan.trains=[sft]", "plan.methods=[lora]")
    assert "sft.batch_rows=18" in outcome.out


def short_context(directory: Path, tokens: int) -> ModelShape:
    """Make `planned` plan for Llama 8B with a context of so many tokens. Returns its shape."""
    base = directory / "llama_8b"
    base.mkdir()
    config = json.loads((CONFIGS / "llama_8b.json").read_text()) | {"max_position_embeddings": tokens}
    (base / "config.json").write_text(json.dumps(config))
    return shape_in(base)


def test_assumed_lengths_fit_the_context(tmp_path: Path) -> None:
    shape = short_context(tmp_path, 1024)
    outcome = planned(tmp_path, "llama_8b", "plan.gpus=1", "plan.methods=[lora]", "generation=local")
    assert "planned: 1 node of 1 GPU: 1 rank of 80.0 GiB, bf16," in outcome.out
    assert (
        "To run it: python -m rlhf --config-dir runs/plan/artifacts/plan +experiment=planned" in outcome.out
    )
    assert "the model's context of 1024 tokens: plan.longest_answer=512" in " ".join(outcome.out.split())
    experiment, refused = taken(outcome, shape, 1)
    assert refused == [] and experiment.stages["ppo"].model_dump()["max_new_tokens"] == 512


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("plan.answer_tokens=1000",), "have 1512 tokens with plan.longest_answer=1000"),
        (("plan.longest_answer=600",), "have 1112 tokens with plan.longest_answer=600"),
        (("plan.trains=[ppo]", "plan.prompt_tokens=1024"), "have 1536 tokens with plan.longest_answer=512"),
    ],
)
def test_given_lengths_that_exceed_the_context_are_refused_in_each_row(
    overrides: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    short_context(tmp_path, 1024)
    outcome = planned(tmp_path, "llama_8b", "plan.gpus=1", "plan.methods=[lora]", *overrides)
    (row,) = re.findall(r"^\| no \| LoRA .*", (outcome.artifact("plan") / "plan.md").read_text(), re.M)
    assert f"ppo: a prompt and its answer {words}, and the context has 1024" in row
