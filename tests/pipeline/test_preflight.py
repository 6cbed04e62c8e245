"""A run that cannot fit is refused before a model is loaded, with the knobs that would make it fit."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console
from transformers import (
    GPT2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    RwkvConfig,
    T5Config,
)

from helpers.chains import Chain, Outcome
from helpers.costs import EIGHT, GIB, LARGE, NO_CHECKPOINTS, check, gpus
from helpers.experiments import build
from helpers.jobs import on_cpu, tiny_base
from helpers.models import tiny_family
from rlhf.config import ConfigError
from rlhf.costs.hardware import Speed
from rlhf.costs.memory import VLLM_GRAPHS, MemoryPhase
from rlhf.costs.model_shape import shape_of
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, Task
from rlhf.data.prepared import LengthStats, PreparedData
from rlhf.distributed.compute import Compute, Zero
from rlhf.generation.vllm import VllmConfig
from rlhf.models.base import BaseModelFiles, UnknownShapeError, skeleton
from rlhf.models.peft.attach import check_attachable
from rlhf.pipeline.checks import complaints
from rlhf.pipeline.costing import cost_of
from rlhf.pipeline.preflight import (
    Attempt,
    Disk,
    check_before_loading,
    check_tuning,
    disk_complaints,
    expectations,
    longest_sampled,
    preflight,
    sampling_note,
    with_checkpoint_copy,
    with_sampling_choice,
)
from rlhf.pipeline.stage import Stage, View

MISTRAL = MistralConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
)
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
MAMBA = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64)
RWKV = RwkvConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64)


def test_a_model_that_writes_no_text_is_told() -> None:
    with pytest.raises(UnknownShapeError, match="T5Config: Unrecognized configuration class"):
        shape_of(T5Config())


def test_what_is_not_checked_of_an_unknown_shape_is_said(
    finished_chain: tuple[Chain, Outcome], tmp_path: Path
) -> None:
    T5Config().save_pretrained(tmp_path)
    said = before(finished_chain[1], on_cpu(), "sft", base=tmp_path)
    assert said.startswith("Memory, time, disk and context are not checked: T5Config: Unrecognized")


def test_what_vllm_may_not_sample_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    limited = VllmConfig(
        tensor_parallel=1, kv_cache_gib=1.0, max_num_seqs=8, max_model_len=920, enforce_eager=True
    )
    on, stage = replace(gpus(80), vllm=limited), "generate"
    (line,) = check(tmp_path, on, stage, "stage=generate", "generate.max_new_tokens=40").refused
    assert line.endswith("are 940 tokens, and vllm.max_model_len=920. Use 940 or more.")
    assert not check(tmp_path, on, stage, "stage=generate", "generate.max_new_tokens=20").refused
    assert not check(tmp_path, replace(on, vllm=None), stage, "stage=generate").refused


def test_a_cache_without_room_for_a_row_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    def lines(gib: float, longest: int | None = None) -> list[str]:
        vllm = VllmConfig(
            tensor_parallel=1, kv_cache_gib=gib, max_num_seqs=8, max_model_len=longest, enforce_eager=True
        )
        return check(tmp_path, replace(gpus(80), vllm=vllm), "generate", "stage=generate").refused

    # a prompt of 900 tokens and an answer of 40, in blocks of 16, are 944 x 144 KiB
    (line,) = lines(0.1)
    assert line == (
        "vllm.kv_cache_gib=0.1: one row of 940 tokens needs 132.8 MiB of keys and values on each rank. "
        "Use 1 or more."
    )
    assert not lines(0.13)
    (line,) = lines(4.0, 40_960)  # what vLLM would be built for
    assert "one row of 40960 tokens needs 5.6 GiB" in line
    assert line.endswith("Use 6 or more or lower vllm.max_model_len.")


def test_vllm_is_built_for_the_longest_row_that_the_run_samples(tiny_model: Path, tmp_path: Path) -> None:
    base = tiny_base(tiny_model)
    stages = build("stage=evaluate", "ppo.max_new_tokens=40", "evaluate.max_new_tokens=70").stages
    needed = [stages[name] for name in ("sft", "generate", "ppo", "evaluate")]
    on = gpus(80)
    assert longest_sampled(needed, stages, on, base) == 900 + 70
    assert longest_sampled(needed[:3], stages, on, base) == 900 + 40
    assert longest_sampled(needed[:1], stages, on, base) is None
    short = replace(on, shape=replace(on.shape, context=950))
    assert longest_sampled(needed, stages, short, base) == 950

    class Own(type(stages["generate"])):  # type: ignore[misc]  # a class that a test chooses
        def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
            return StageCost()

    own = Own.model_construct(**dict(stages["generate"]))
    assert longest_sampled([own, *needed], stages, on, base) is None  # it does not say: the model's context
    shutil.copytree(tiny_model, tmp_path / "own")
    mine = build("stage=generate", f"generate.policy={tmp_path / 'own'}").stages
    assert longest_sampled([mine["generate"]], mine, on, base) == 900 + 40
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ messages }}")
    assert longest_sampled([mine["generate"]], mine, on, base) is None  # other tokens than were counted


def test_time_is_for_the_usual_answers_and_memory_for_the_longest(tmp_path: Path) -> None:
    stages = build().stages
    names = ("generate", "ppo", "evaluate")
    pending, attempts = [stages[name] for name in names], dict.fromkeys(names, Attempt())
    args = (pending, stages, gpus(80), Disk(tmp_path, 1e12), NO_CHECKPOINTS, attempts)
    longest, usual = preflight(*args), preflight(*args, answer_tokens=4.0)
    above = preflight(*args, answer_tokens=4000.0)
    for name in names:
        assert usual.costs[name].phases == longest.costs[name].phases == above.costs[name].phases
        assert usual.costs[name].seconds < longest.costs[name].seconds == above.costs[name].seconds


def test_disk_and_memory_count_checkpoints_that_the_longest_answers_would_bring(tmp_path: Path) -> None:
    stages = build("ppo.steps=500").stages
    longest = cost_of(stages["ppo"], gpus(80), stages)
    usual = cost_of(stages["ppo"], replace(gpus(80), answer_tokens=1.0), stages)
    minutes = (longest.seconds + usual.seconds) / 2 / 60
    checkpoints = NO_CHECKPOINTS.model_copy(update={"every_minutes": minutes})
    disk, attempts = Disk(tmp_path, 2 * longest.artifact + longest.checkpoint), {"ppo": Attempt()}
    args = ([stages["ppo"]], stages, gpus(80), disk, checkpoints, attempts)
    assert preflight(*args).refused
    found = preflight(*args, answer_tokens=1.0)
    assert found.refused and found.costs["ppo"].seconds < 60 * minutes


def test_a_cache_without_room_for_a_row_of_a_finished_stage_is_told(tmp_path: Path) -> None:
    vllm = VllmConfig(
        tensor_parallel=1, kv_cache_gib=1.0, max_num_seqs=8, max_model_len=None, enforce_eager=True
    )
    on, disk = replace(gpus(80), vllm=vllm), Disk(tmp_path, 1e12)
    stages = build("stage=generate").stages
    pending, attempts = [stages["generate"]], {"generate": Attempt()}
    assert not preflight(pending, stages, on, disk, NO_CHECKPOINTS, attempts).refused
    (line,) = preflight(pending, stages, on, disk, NO_CHECKPOINTS, attempts, longest=20_000).refused
    assert "one row of 20000 tokens" in line


def test_ranks_that_run_one_engine_together_share_its_weights(tmp_path: Path) -> None:
    def held(ranks: int) -> float:
        vllm = VllmConfig(
            tensor_parallel=ranks, kv_cache_gib=3.0, max_num_seqs=8, max_model_len=None, enforce_eager=True
        )
        on = replace(gpus(8000), vllm=vllm)
        chain = build("stage=generate").stages
        cost = cost_of(chain["generate"], on, chain)
        return sum(part.size for part in cost.phases[0].parts if part.formula.startswith("vLLM's own"))

    assert held(2) == held(1) / 2 > 0


@pytest.mark.parametrize("name", ["generate", "ppo", "evaluate"])
def test_sharded_weights_are_gathered_whole_for_sampling_only_where_there_is_memory(
    name: str, tmp_path: Path
) -> None:
    stages = build("stage=evaluate", "ppo.peft=none", "ppo.gates.first_kl=null").stages
    stage = stages[name]

    def on(gib: float, ranks: int = 64) -> CostContext:
        found = gpus(gib, ranks=ranks)
        return replace(found, zero="fsdp2", machine=replace(found.machine, ranks_here=8))

    def while_sampling(at: CostContext) -> float:
        cost = cost_of(stage, at, stages)
        return max(phase.size(on_host=False) for phase in cost.phases if phase.name == "sampling")

    large = with_sampling_choice(stage, stages, on(800))
    assert large.local_sampling == "whole"
    whole, layers = (while_sampling(replace(large, local_sampling=way)) for way in ("whole", "layers"))
    assert whole - layers > EIGHT.parameters  # of 2 bytes each, less two layers and the embeddings
    between = on((whole + layers) / 2 / GIB)
    assert with_sampling_choice(stage, stages, between).local_sampling == "layers"
    said = sampling_note(stage, stages, between, "layers")
    assert (
        said.startswith(f"{name} samples layer by layer") and f"of {(whole + layers) / 2 / GIB:.1f}" in said
    )
    (line,) = check(tmp_path, on(0.5), name, "ppo.peft=none", "ppo.gates.first_kl=null").refused
    assert line.endswith("Or sample with generation=vllm vllm.tensor_parallel=8.")
    assert (
        with_sampling_choice(stage, stages, replace(between, zero="zero2")).local_sampling == "whole"
    )  # nothing to choose


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_vllm_holds_stays_until_the_run_ends_unless_it_sleeps(
    tmp_path: Path, kind: Literal["cpu", "cuda"]
) -> None:
    vllm = VllmConfig(
        tensor_parallel=1, kv_cache_gib=3.0, max_num_seqs=8, max_model_len=None, enforce_eager=False
    )
    bare = replace(gpus(8000), machine=replace(gpus(8000).machine, kind=kind))
    on, found = replace(bare, vllm=vllm), build("stage=evaluate", "sft.peft=none")
    stages = [found.stages[name] for name in ("sft", "generate", "ppo", "evaluate")]

    def held(costs: Mapping[str, StageCost]) -> dict[str, set[str]]:
        """Stage -> the phases that have vLLM's copy of the weights and its cache."""
        whole = {"vLLM's own: 8.19e9 x 2 B", "vllm.kv_cache_gib"}
        return {
            name: {phase.name for phase in cost.phases if whole <= {part.formula for part in phase.parts}}
            for name, cost in costs.items()
        }

    attempts = dict.fromkeys(found.stages, Attempt())
    together = preflight(stages, found.stages, on, Disk(tmp_path, LARGE), NO_CHECKPOINTS, attempts)
    every = {name: {phase.name for phase in cost.phases} for name, cost in together.costs.items()}
    alone = check(tmp_path, on, "ppo").costs
    if kind == "cuda":  # it sleeps, but its graphs stay
        awake = {name: {"sampling"} for name in ("generate", "ppo", "evaluate")}
        assert held(together.costs) == awake | {"sft": set()}
    else:
        assert held(together.costs) == every | {"sft": set()}
        assert held(alone) == {"ppo": every["ppo"] - {"loading"}}
    (without,) = check(tmp_path, bare, "ppo").costs.values()
    (learning,), (trainers,) = (
        [phase.size() for phase in cost.phases if phase.name == "learning"]
        for cost in (alone["ppo"], without)
    )
    assert learning - trainers == (VLLM_GRAPHS if kind == "cuda" else 2 * EIGHT.parameters + 3 * GIB)


def test_the_store_needs_room_for_artifacts_and_checkpoints(tmp_path: Path) -> None:
    every = NO_CHECKPOINTS.model_copy(update={"every_steps": 5, "keep": 2})
    cost, disk = StageCost(artifact=1.0, checkpoint=10.0), Disk(tmp_path, 12.0)
    assert list(disk_complaints({"sft": cost}, disk, NO_CHECKPOINTS, {"sft": Attempt()})) == []
    written = {"sft": Attempt(30.0)}
    assert list(disk_complaints({"sft": cost}, disk, every, written)) == []
    (line,) = disk_complaints({"sft": cost}, disk, every, {"sft": Attempt()})
    assert line.startswith(f"store_dir={tmp_path}") and "checkpoint.keep" in line


def test_the_disk_holds_checkpoints_that_stay_for_a_longer_run(tmp_path: Path) -> None:
    stages = build("sft.optim.schedule=constant", "sft.optim.warmup_steps=2").stages
    cost = cost_of(stages["sft"], gpus(80), stages)
    disk, attempts = Disk(tmp_path, 2 * cost.artifact + cost.checkpoint), {"sft": Attempt()}
    assert list(disk_complaints({"sft": cost}, disk, NO_CHECKPOINTS, attempts)) == []
    smaller = replace(disk, free=disk.free - 1.0)
    assert len(list(disk_complaints({"sft": cost}, smaller, NO_CHECKPOINTS, attempts))) == 1
    cost = cost_of(build().stages["sft"], gpus(80), stages)
    assert list(disk_complaints({"sft": cost}, smaller, NO_CHECKPOINTS, attempts)) == []


def test_what_an_artifact_is_made_from_is_on_the_disk_too(tmp_path: Path) -> None:
    two = {"sft": StageCost(artifact=4.0), "reward": StageCost(artifact=3.0)}
    attempts, disk = dict.fromkeys(two, Attempt()), Disk(tmp_path, 10.0)
    assert list(disk_complaints({"sft": two["sft"]}, disk, NO_CHECKPOINTS, attempts)) == []
    assert len(list(disk_complaints(two, disk, NO_CHECKPOINTS, attempts))) == 1


@pytest.mark.parametrize(
    ("zero", "background", "share"),
    [
        ("none", True, 1.0), ("fsdp2", True, 0.25), ("zero3", True, 0.0), ("fsdp2", "auto", 0.0),
        ("fsdp2", False, 0.0),
    ],
)  # fmt: skip
def test_the_copy_that_the_background_writes_from_counts(
    zero: Zero, background: Literal["auto", True, False], share: float
) -> None:
    on = replace(gpus(80.0, ranks=4), zero=zero)
    config = NO_CHECKPOINTS.model_copy(update={"background": background, "every_steps": 5})
    cost = StageCost([MemoryPhase("learning"), MemoryPhase("publishing")], checkpoint=8.0)
    assert [each.size(on_host=True) for each in with_checkpoint_copy(cost, on, config).phases] == [
        8.0 * share
    ] * 2
    never = config.model_copy(update={"every_steps": None, "every_minutes": None})
    assert with_checkpoint_copy(cost, on, never) == cost


@pytest.mark.parametrize(
    ("spent", "share", "left"), [(0.0, 0.0, "3:20"), (9.0, 0.7, "2:10"), (999.0, 0.7, "2:10")]
)
def test_what_is_to_come_begins_where_the_checkpoint_is(spent: float, share: float, left: str) -> None:
    """It does not matter how far the time spent is from the prediction."""
    costs = dict.fromkeys(("sft", "ppo"), StageCost(work=[Task("train", 100.0, "")]))
    said = expectations(costs, gpus(80.0), {"sft": Attempt(), "ppo": Attempt(1.0, spent, share)})
    assert said.startswith(f"About {left} to go")


@pytest.fixture(scope="module")
def chain(finished_chain: tuple[Chain, Outcome]) -> Chain:
    return finished_chain[0]


def test_the_chain_says_what_is_to_come(finished_chain: tuple[Chain, Outcome]) -> None:
    out = finished_chain[1].out
    (line,) = [line for line in out.splitlines() if " to go: " in line]
    assert re.match(
        r"\d\d:\d\d:\d\d About \S+ to go: sft \S+ \(\d+\.\d GiB\), reward .*, generate .*, ppo .*, evaluate ",
        line,
    )
    assert out.index(line) < out.index("sft runs")


def test_a_chain_that_is_faster_than_predicted_says_so_after_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a machine that is so much slower
    monkeypatch.setattr("rlhf.pipeline.preflight.quick_speed", lambda compute: Speed(1e-3, 1e-4))
    lines = [line for line in Chain(tmp_path).run("stage=reward").out.splitlines() if " to go" in line]
    first, again = lines
    assert re.search(r"About \d\d:\d\d to go: sft", first), first
    assert re.search(r"About \d:\d\d to go, by what it took so far: reward \d:\d\d\.", again), again


def test_a_model_too_large_is_refused_before_it_is_read(
    chain: Chain, tiny_model: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    for path in tiny_model.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 60, "head_dim": 128,
               "num_attention_heads": 128}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()  # cannot be read
    outcome = chain.run("model=local", f"model.path={tmp_path}", "stage=sft", "sft.peft=none")
    assert outcome.code == 2
    assert "Error: sft needs about" in outcome.err and "GiB (" in outcome.err
    assert "preflight=warn" in outcome.err
    assert outcome.statuses == {"prepare": "ran"}


def test_checkpoints_that_no_disk_holds_are_refused_before_training(chain: Chain) -> None:
    outcome = chain.run("stage=sft", "seed=7", "checkpoint.every_steps=5", f"checkpoint.keep={10**12}")
    assert outcome.code == 2
    assert "Error: store_dir=" in outcome.err and "lower checkpoint.keep" in outcome.err
    assert outcome.statuses == {"prepare": "reused"}


def before(chain: Outcome, compute: Compute, stages: str, *overrides: str, base: Path | None = None) -> str:
    """The output of the preflight of these stages, on the finished chain's data."""
    said = io.StringIO()
    found = build("model=tiny", f"store_dir={chain.directory}", *overrides)
    data = PreparedData(chain.artifact("prepare"))
    files = BaseModelFiles(base or chain.artifact("sft"), "tiny", found.settings.model)
    attempts = {stage: Attempt() for stage in stages.split()}
    check_before_loading(found, attempts, files, compute, data, Console(file=said, width=300))
    return said.getvalue()


def test_an_answer_longer_than_the_context_is_refused_unless_told_otherwise(
    finished_chain: tuple[Chain, Outcome],
) -> None:
    first, long = finished_chain[1], "evaluate.max_new_tokens=1020"
    complaint = (
        r"evaluate.max_new_tokens=1020: the longest sequence could have 10\d\d tokens, and the model's "
    )
    complaint += r"context has 1024. Lower it by \d+\."
    with pytest.raises(ConfigError, match=complaint):
        before(first, on_cpu(), "evaluate", long)
    assert re.search(complaint, before(first, on_cpu(), "evaluate", long, "preflight=warn"))
    assert "context" not in before(first, on_cpu(), "evaluate")


def test_an_answer_that_is_too_long_for_several_stages_is_told_once_by_the_key_that_one_types(
    finished_chain: tuple[Chain, Outcome],
) -> None:
    def complaints(*overrides: str) -> list[str]:
        said = before(finished_chain[1], on_cpu(), "generate ppo evaluate", *overrides, "preflight=warn")
        return re.findall(r"(\S+): the longest sequence could have", said)

    assert complaints("ppo.max_new_tokens=1020") == ["ppo.max_new_tokens=1020"]
    assert complaints("evaluate.max_new_tokens=1021", "ppo.max_new_tokens=1020") == [
        "ppo.max_new_tokens=1020",
        "evaluate.max_new_tokens=1021",
    ]


@pytest.mark.parametrize(("stage", "start"), [("generate", "generate.policy"), ("ppo", "ppo.init")])
def test_the_context_of_a_start_of_ones_own_counts(
    finished_chain: tuple[Chain, Outcome], tiny_model: Path, tmp_path: Path, stage: str, start: str
) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    alone = ("generate.reward=null", "ppo.score.normalize=running", "ppo.critic.init=sft")
    long = f"{stage}.max_new_tokens=60"
    with pytest.raises(ConfigError, match=f"{long}: .* the model's context has 64. Lower"):
        before(finished_chain[1], on_cpu(), stage, f"{start}={tmp_path}", long, *alone)


@pytest.mark.parametrize(
    ("stage", "peft", "complaint"),
    [
        (
            "sft",
            "{method: freeze, layers: 99}",
            r"sft\.peft\.layers=99: LlamaForCausalLM has 2 layers that can be told apart\. "
            r"Use sft\.peft\.layers=2 or less, or sft\.peft=none\.$",
        ),
        ("ppo", "{method: freeze, layers: 99}", r"ppo\.peft\.layers=99: LlamaForCausalLM has 2 layers that"),
        (
            "reward",
            "{method: lora, target_modules: [nope]}",
            r"reward\.peft\.target_modules=\[nope\]: nope is not a linear layer inside LlamaForCausalLM\. "
            r"Leave it out, or use reward\.peft\.target_modules=all-linear, which takes down_proj, ",
        ),
    ],
)
def test_what_the_model_cannot_be_trained_with_is_refused_before_anything_is_trained(
    stage: str, peft: str, complaint: str, finished_chain: tuple[Chain, Outcome]
) -> None:
    with pytest.raises(ConfigError, match=f"^{complaint}"):
        before(finished_chain[1], on_cpu(), stage, f"{stage}.peft={peft}", "preflight=warn")
    assert "peft" not in before(finished_chain[1], on_cpu(), stage)


@pytest.mark.parametrize(
    ("config", "peft", "complaint"),
    [
        (MISTRAL, "prefix", r"sft\.peft=prefix: not every layer of MistralForCausalLM attends to all"),
        (GPT2, "qlora", r"sft\.peft=qlora: bitsandbytes cannot hold the weights of GPT2LMHeadModel"),
        (GPT2, "adapter", r"sft\.peft=adapter: attention and feed-forward of GPT2LMHeadModel cannot be"),
        (MAMBA, "ia3", r"sft\.peft=ia3: peft does not know which layers of a mamba model to scale"),
        (MAMBA, "prompt", r"sft\.peft=prompt: not every layer of MambaForCausalLM attends to all"),
        (RWKV, "prompt", r"sft\.peft=prompt: not every layer of RwkvForCausalLM attends to all"),
        (MISTRAL, "lora", None),
        (GPT2, "prefix", None),
        (GPT2, "ia3", None),
        (MAMBA, "freeze", None),
    ],
)
def test_a_method_that_does_not_know_the_model(
    config: PreTrainedConfig, peft: str, complaint: str | None
) -> None:
    stage = build("stage=prepare", f"sft.peft={peft}").stages["sft"]
    base = skeleton(config)
    if complaint is None:
        check_tuning(stage, base, check_attachable)
        return
    with pytest.raises(ConfigError, match=f"^{complaint}"):
        check_tuning(stage, base, check_attachable)


def test_a_held_out_answer_beyond_the_context_is_cut_and_not_refused(tmp_path: Path) -> None:
    on, long = gpus(80.0), LengthStats(rows=10, mean=50000.0, deviation=0.0, longest=50000)
    sizes = on.sizes
    on = replace(on, sizes=lambda role, split: long if role == "sft" else sizes(role, split))
    assert check(tmp_path, on, "evaluate", "ppo.peft=prefix").refused == []


def test_padded_rows_are_told(finished_chain: tuple[Chain, Outcome]) -> None:
    said = before(finished_chain[1], on_cpu(), "sft", "stage=sft", "sft.peft=prefix")
    assert "sft.peft=prefix: rows are padded, one sequence a row" in said
    assert "padded" not in before(finished_chain[1], on_cpu(), "sft", "stage=sft", "sft.peft=lora")
    padded = ("stage=sft", "sft.peft=prefix", "model.attention=sdpa")  # as they would be anyway
    assert "padded" not in before(finished_chain[1], on_cpu(), "sft", *padded)


def test_what_adapters_stand_beside_is_told_once(finished_chain: tuple[Chain, Outcome]) -> None:
    said = before(finished_chain[1], on_cpu(), "sft", "stage=sft", "sft.peft=lora")
    assert said.count("sft: lora updates down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj.") == 1
    assert "updates" not in before(finished_chain[1], on_cpu(), "sft", "stage=sft", "sft.peft=none")


def test_eager_attention_is_told_once(finished_chain: tuple[Chain, Outcome], tmp_path: Path) -> None:
    tiny_family("gemma2").save_pretrained(tmp_path)
    said = before(finished_chain[1], on_cpu(), "sft", "stage=sft", base=tmp_path)
    assert said.count("model.attention=auto: Gemma2ForCausalLM has eager attention only") == 1
    chosen = before(finished_chain[1], on_cpu(), "sft", "stage=sft", "model.attention=eager", base=tmp_path)
    assert "attention" not in chosen + before(finished_chain[1], on_cpu(), "sft", "stage=sft")


def test_virtual_tokens_and_rows_laid_end_to_end() -> None:
    with pytest.raises(ConfigError, match=r"^model\.attention=packed: .* and with sft\.peft=prompt only the"):
        build("stage=sft", "sft.peft=prompt", "model.attention=packed")
    build("stage=sft", "sft.peft=lora", "model.attention=packed")


@pytest.mark.parametrize(
    ("key", "batch"), [("sft.batch_rows", 7), ("reward.batch_pairs", 7), ("ppo.minibatch_episodes", 9)]
)
def test_ranks_that_cannot_share_a_batch_are_told(key: str, batch: int) -> None:
    chain = build(f"{key}={batch}").stages
    view = View(chain, compute=on_cpu(world_size=2))
    (complaint,) = complaints(chain[key.partition(".")[0]], view)
    assert str(complaint).startswith(f"{key}={batch}: it cannot be divided equally over 2 ranks. Use ")
