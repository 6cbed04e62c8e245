"""What `stage=plan` says before anything runs, and that its experiment file runs as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from transformers import MistralConfig, Qwen3Config

import rlhf.costs.hardware
from helpers.chains import Chain, Outcome, run_main
from helpers.costs import gpus
from helpers.experiments import build
from helpers.jobs import on_cpu, tiny_base
from rlhf.costs.hardware import GIB, Machine, Speed, calibrated_speed
from rlhf.costs.model_shape import shape_of_model
from rlhf.costs.peft_costs import COSTS
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, Task
from rlhf.data.prepared import LengthStats
from rlhf.models.base import skeleton
from rlhf.models.peft.methods import METHODS, MethodName
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.fields import peft_of
from rlhf.planner.report import experiment_file
from rlhf.planner.strategies import (
    Figure,
    Strategy,
    UseCase,
    compare_strategies,
    equally_fast,
    fastest,
    prompting_strategies,
)

GIVEN = ("plan.rows=10000", "plan.prompt_tokens=200", "plan.answer_tokens=300")
VIRTUAL: tuple[MethodName, ...] = ("prefix", "prompt", "p_tuning")
PROMPTED = ("zero-shot", "retrieval", "few-shot")
"""The ways without training. Three passages are shorter than four examples, so retrieval is faster."""
EIGHT_GPUS = ("plan.gpus=8", "plan.gpu_memory=80GiB", "plan.price_per_gpu_hour=2", "plan.trains=[sft]")


@pytest.fixture(autouse=True)
def quick_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlhf.costs.hardware, "CALIBRATION_SECONDS", 0.1)


@pytest.fixture(scope="module")
def chain(finished_chain: tuple[Chain, Outcome]) -> Chain:
    return finished_chain[0]


def test_keys_of_gpus_are_not_ignored(chain: Chain) -> None:
    outcome = chain.run("stage=plan", *GIVEN, "plan.gpu_memory=48GiB", "plan.gpu_tflops=900")
    told = "plan.gpu_memory, plan.gpu_tflops: read only with plan.gpus, the GPUs of each node"
    assert outcome.code == 2 and told in outcome.err, outcome.err


@pytest.fixture(scope="module")
def config_of_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but a config.json."""
    directory = tmp_path_factory.mktemp("eight")
    Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
        tie_word_embeddings=False,
    ).save_pretrained(directory)  # fmt: skip
    return directory


def rows(outcome: Outcome) -> dict[str, list[str]]:
    """Strategy -> the cells of its row in plan.md."""
    text = (outcome.artifact("plan") / "plan.md").read_text()
    (block,) = [each for each in text.split("\n\n") if "| strategy |" in each]
    found = [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]
    return {cells[1]: cells for cells in found}


def plan(chain: Chain, model: Path, *overrides: str) -> Outcome:
    outcome = chain.run("stage=plan", "model=local", f"model.path={model}", *GIVEN, *overrides)
    assert outcome.code == 0, outcome.err
    return outcome


def test_a_model_that_is_not_here_on_gpus_that_are_not_here(chain: Chain, config_of_8b: Path) -> None:
    outcome = plan(chain, config_of_8b, *EIGHT_GPUS)
    assert outcome.statuses == {"plan": "ran"}  # lengths are given: nothing to prepare
    table = rows(outcome)
    assert set(table) == {*PROMPTED, *(method.title for method in METHODS.values())}
    assert tuple(table)[:3] == PROMPTED
    # 8.2e9 parameters at 18 B are 137 GiB; two thirds of that sharded over 8 GPUs leave it 15 + 15 + 15
    assert table["full"][2] == "zero2"
    assert table["LoRA"][0] == "yes" and table["LoRA"][2] == "none"
    text = (outcome.artifact("plan") / "plan.md").read_text()
    (found,) = re.findall(r"^## LoRA.*?price: ([\d.]+) to ([\d.]+) hours x 8", text, re.MULTILINE | re.DOTALL)
    hours, most_hours = map(float, found)
    assert 0 < hours < most_hours < 1
    least, most = (float(each.removesuffix(" min")) for each in table["LoRA"][4].split(" to "))
    assert (least, most) == pytest.approx((60 * hours, 60 * most_hours), rel=0.01)
    price, most_price = map(float, table["LoRA"][5].split(" to "))
    assert price == pytest.approx(hours * 8 * 2, rel=0.1)
    assert most_price == pytest.approx(most_hours * 8 * 2, rel=0.1)
    published = outcome.summary["stages"]["plan"]["metrics"]["plan/peak_gib"]
    proposed, others = re.findall(r"The fastest training that fits: (\w+) \(.*error: (.*)\)\.", outcome.out)[
        0
    ]
    assert f"{published:.1f} GiB" == table[proposed][3].partition(" (")[0]
    assert proposed == "LoRA" and "IA3" in others.split(", ")
    assert (
        " Quality is not predicted: `python -m rlhf recipe=decide budget=30m` measures it.\nstage=[sft] "
        "zero=none sft.peft=lora sft.optim.lr="
    ) in outcome.out
    assert re.search(r"- price: [\d.]+ to [\d.]+ hours x 8 ranks x 2 = [\d.]+ to [\d.]+", text)
    assert "| on the GPU | on the host |" in text


def test_every_method_of_peft_is_planned() -> None:
    assert COSTS.keys() == METHODS.keys() == {*get_args(MethodName)}
    assert {name for name, method in COSTS.items() if not method.is_adapter} == {"none", "freeze"}


def test_one_small_gpu_needs_the_hosts_memory(chain: Chain, config_of_8b: Path) -> None:
    table = rows(plan(chain, config_of_8b, "plan.gpus=1", "plan.gpu_memory=48GiB"))
    assert table["full"][2] == "zero3_offload" and table["LoRA"][2] == "none"
    table = rows(plan(chain, config_of_8b, "plan.gpus=1", "plan.gpu_memory=8GiB", "plan.host_memory=16GiB"))
    assert "does not fit" in table["LoRA"][8] and "does not fit" in table["full"][8]


@pytest.mark.parametrize(
    ("overrides", "refused", "words"),
    [
        (["plan.deploy=api_only"], ["full", "LoRA"], "deploy=api_only"),
        (["plan.deploy=many_adapters"], ["full"], "deploy=many_adapters"),
        (
            ["plan.deploy=merged"],
            ["adapter", "prefix", "prompt", "p-tuning"],
            "plan.deploy=merged: this method cannot be merged into the weights",
        ),
        (["plan.hours=0.0001"], ["full", "LoRA"], "and plan.hours=0.0001"),
        (["plan.max_added_latency=0"], ["few-shot", "retrieval"], "and plan.max_added_latency=0"),
        (["compare.few_shot.examples=200"], ["few-shot"], "and the context has 40960"),
        (["sft.max_tokens=499"], ["full", "LoRA"], "a row has 500 tokens, and sft.max_tokens=499 cuts them"),
        (["plan.trains=[sft,reward]"], ["adapter", "prefix"], "it is not merged into the weights, so reward"),
        (["plan.trains=[reward]", "sft.peft=prefix"], ["LoRA"], "sft.peft=prefix: it is"),
        (
            ["generation=vllm", "plan.deploy=many_adapters"],
            ["adapter", "prefix"],
            "generation=vllm: sft.peft=",
        ),
        (["plan.gpu_memory=16GiB"], ["DoRA", "adapter"], "does not fit"),
    ],
)
def test_what_speaks_against(
    chain: Chain, config_of_8b: Path, overrides: list[str], refused: list[str], words: str
) -> None:
    outcome = plan(chain, config_of_8b, *EIGHT_GPUS, *overrides)
    table = rows(outcome)
    for name in refused:
        assert table[name][0] == "no" and words in table[name][8]
    possible = [name for name, cells in table.items() if cells[0] == "yes"]
    assert possible == [*table][: len(possible)] and {table[name][8] for name in possible} == {"-"}
    trained = [name for name in possible if name not in PROMPTED]
    if trained:
        (told,) = re.findall(r"The fastest training that fits: ([\w ]+?)(?:\.| \()", outcome.out)
        assert told in trained
    else:
        assert f"The fastest way without training, as none is possible: {possible[0]}. " in outcome.out


def test_two_nodes_of_eight_gpus(chain: Chain, config_of_8b: Path) -> None:
    outcome = plan(chain, config_of_8b, *EIGHT_GPUS, "plan.nodes=2", "sft.batch_rows=16")
    assert "planned: 2 nodes of 8 GPUs: 16 ranks" in outcome.out
    one, two = (
        each.summary["stages"]["plan"]["metrics"]["plan/hours"]
        for each in (plan(chain, config_of_8b, *EIGHT_GPUS, "sft.batch_rows=16"), outcome)
    )
    assert one / 2 < two < one  # each rank trains half as much, and loads as long
    text = (outcome.artifact("plan") / "plan.md").read_text()
    assert "hours x 16 ranks x 2 =" in text and " / 16 ranks" in text


def test_4_bits_need_a_gpu(chain: Chain, config_of_8b: Path) -> None:
    table = rows(plan(chain, config_of_8b))
    assert table["QLoRA"][0] == "no" and "4-bit weights need a GPU" in table["QLoRA"][8]
    assert "4-bit" not in table["LoRA"][8]


def test_ppo_is_planned_with_its_models(chain: Chain, config_of_8b: Path) -> None:
    outcome = plan(chain, config_of_8b, *EIGHT_GPUS, "plan.trains=[sft,reward,ppo]", "ppo.batch_episodes=64",
                   "ppo.minibatch_episodes=64", "plan.explain=true")  # fmt: skip
    for words in ("ppo, sampling", "reward, optimizer step", "policy and critic: ", "KV cache"):
        assert words in outcome.out
    text = (outcome.artifact("plan") / "plan.md").read_text()
    line = r"^- \w+, [\w ]+: ([\d.]+) GiB on the GPU, ([\d.]+) GiB on the host$((?:\n    - .*)+)"
    sums = re.findall(line, text, re.MULTILINE)
    assert len(sums) > 20
    for device, host, parts in sums:
        each = [float(size) for size in re.findall(r"([\d.]+) GiB$", parts, re.MULTILINE)]
        assert sum(each) == pytest.approx(float(device) + float(host), abs=0.001 * len(each))
    assert "- source: Hu et al. 2021, arXiv:2106.09685" in text


def test_the_experiment_runs_as_it_is(chain: Chain) -> None:
    outcome = chain.run("stage=plan", "plan.methods=[lora]", "sft.epochs=3", "sft.max_tokens=99",
                        "tracker=tensorboard", "force=[sft]",
                        "+sft.gates.tokens={min: 1, advice: more}")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "The fastest training that fits: LoRA. " in outcome.out
    directory = outcome.directory / "artifacts" / "plan"
    written = yaml.safe_load((directory / "experiment" / "planned.yaml").read_text())
    assert written["sft"]["peft"] == "lora" and written["sft"]["optim"]["lr"] == pytest.approx(1e-2)
    assert (written["sft"]["epochs"], written["sft"]["max_tokens"]) == (3, 99)
    assert not {"plan", "run_name", "force"} & set(written)
    assert written["tracker"]["kind"] == "tensorboard"
    assert written["sft"]["gates"] == {"tokens": {"min": 1, "advice": "more"}}
    arguments = [f"--config-dir={directory}", "+experiment=planned", "run_name=planned"]
    ran = run_main(chain.directory, arguments, chain.directory / "runs" / "planned")
    assert ran.code == 0, ran.err
    same = chain.run("stage=sft", "sft.epochs=3", "sft.max_tokens=99", "sft.peft=lora", "sft.optim.lr=0.01")
    assert ran.statuses == {"prepare": "reused", "sft": "ran"}
    assert same.statuses["sft"] == "reused" and same.key("sft") == ran.key("sft")


def test_without_access_to_the_weights_the_fastest_prompt_runs(chain: Chain) -> None:
    outcome = chain.run("stage=plan", "plan.deploy=api_only")
    assert "The fastest way without training, as none is possible: zero-shot. " in outcome.out
    directory = outcome.directory / "artifacts" / "plan"
    arguments = [f"--config-dir={directory}", "+experiment=planned", "run_name=prompted",
                 "compare.max_new_tokens=4"]  # fmt: skip
    ran = run_main(chain.directory, arguments, chain.directory / "runs" / "prompted")
    assert ran.code == 0, ran.err
    assert ran.statuses == {"prepare": "reused", "compare": "ran"}
    lines = (ran.artifact("compare") / "responses.jsonl").read_text().splitlines()
    assert {json.loads(line)["policy"] for line in lines} == {"base"}


def strategy(name: str, hours: float, latency: float = 0.0, objection: str = "") -> Strategy:
    """A strategy with made-up costs; it trains if it takes time."""
    cost = StageCost(work=[Task("train", 3600 * hours, "")])
    return Strategy(
        name, gpus(80), cost, Figure(0.0, ""), Figure(latency, ""), costs={"sft": cost} if hours else {},
        objections=[objection] if objection else [],
    )  # fmt: skip


def test_possible_ways_come_first_then_time_then_latency_then_name() -> None:
    refused = strategy("refused", 1.0, objection="does not fit")
    ordered = [
        strategy("prompted", 0.0, 9.0), strategy("prefix", 2.0), strategy("DoRA", 2.0, 1.0),
        strategy("IA3", 2.0, 1.0), strategy("LoRA", 2.5), strategy("full", 2.6), refused,
        strategy("last layers", 3.0, objection="does not fit"),
    ]  # fmt: skip
    backwards = ordered[::-1]
    assert sorted(backwards, key=lambda each: each.order) == ordered
    equal = [each.name for each in equally_fast(ordered)]
    assert equal == ["LoRA", "DoRA", "IA3", "prefix"]  # 2.5 h is 2 h within 27%, and 2.6 h is not
    assert fastest(ordered).name == "LoRA"  # a prompt takes no time to train, and trains nothing
    assert fastest([ordered[0], refused]).name == "prompted"
    assert fastest([replace(ordered[0], objections=["too slow"]), refused]) is refused


@pytest.mark.parametrize(("num_rows", "shown"), [(100, 4), (3, 3)])
def test_few_shot_is_planned_with_the_examples_that_compare_shows(num_rows: int, shown: int) -> None:
    """Also if all rows would fit into the prompt: whether more examples help is not known."""
    use = UseCase(num_rows, 6.0, 4.0, 4, 3, True, "merged", None, None)
    (way,) = [each for each in prompting_strategies(gpus(80), use) if each.name == "few-shot"]
    assert way.artifact.value == shown * (6 + 4) * 4  # bytes a token
    assert not [key for key in way.overrides if "few_shot." in key]


def test_of_plain_text_nothing_can_be_asked(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("".join(f"The cat number {n} sleeps.\n" for n in range(12)))
    outcome = chain.run("stage=plan", f"sft.data={tmp_path / 'notes.txt'}", "prepare.held_out_fraction=0.2")
    assert outcome.code == 0, outcome.err
    table = rows(outcome)
    for way in PROMPTED:
        assert table[way][0] == "no" and "plain text" in table[way][8]
    assert table["LoRA"][0] != "no"


def test_what_the_model_cannot_have_is_not_planned(chain: Chain, tmp_path: Path) -> None:
    """Mistral's windows lose what stands before a row."""
    MistralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=300
    ).save_pretrained(tmp_path)
    table = rows(plan(chain, tmp_path, "plan.deploy=many_adapters"))
    for method in (METHODS[each].title for each in VIRTUAL):
        assert table[method][0] == "no"
        assert "not every layer of MistralForCausalLM" in table[method][8]
    assert "sft.peft.layers=2: MistralForCausalLM has 1 layers" in table["last layers"][8]
    assert table["LoRA"][0] != "no"


@pytest.mark.parametrize(
    ("trains", "given", "from_sft"),
    [
        (["ppo"], (), ()),
        (["ppo"], ("reward.peft=prefix", "ppo.peft=lora"), VIRTUAL),
        (["ppo"], ("ppo.peft=prompt",), ()),
        (["reward", "ppo"], (), VIRTUAL),
        (["sft"], (), ()),
    ],
)
def test_every_strategy_is_an_experiment_that_is_accepted(
    trains: list[str], given: tuple[str, ...], from_sft: Sequence[str],
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("rlhf.pipeline.experiment.check_qlora", lambda key, device: None)

    def build_here(*overrides: str) -> Experiment:
        return build(f"hydra.searchpath=[file://{tmp_path}]", *overrides)

    before = build_here("model=tiny", "stage=prepare", *given)
    base = skeleton(tiny_base(tiny_model).architecture)
    machine = Machine("cuda", "a test", 80 * GIB, 80 * GIB, 0.0, 1, Speed(1000.0, 1000.0))
    on = CostContext(
        shape_of_model(base), 2, "none", machine, lambda role, split: LengthStats(100, 20.0, 0.0, 20)
    )
    use = UseCase(100, 10.0, 10.0, 1, 1, True, "many_adapters", None, None)
    ways = compare_strategies([before.stages[name] for name in trains], before, base, on, use)
    found = {}
    (tmp_path / "experiment").mkdir()
    for name, method in METHODS.items():
        (way,) = [each for each in ways if each.name == method.title]
        assert not [why for why in way.objections if "peft" in why or "ppo." in why], way.objections
        (tmp_path / "experiment" / f"{name}.yaml").write_text(experiment_file(before.resolved, way, ""))
        experiment = build_here(f"+experiment={name}")
        peft = peft_of(experiment.stages[trains[-1]])
        assert peft is not None and peft.method == name
        found[name] = experiment.stages["ppo"].model_dump()
    assert [name for name in found if found[name]["critic"]["init"] == "sft"] == [*from_sft]


def test_a_plan_is_made_anew_each_time(chain: Chain, config_of_8b: Path) -> None:
    first, second = (plan(chain, config_of_8b, *EIGHT_GPUS) for _ in range(2))
    assert first.statuses == second.statuses == {"plan": "ran"}


def test_another_runs_plan_is_left_as_it_is(chain: Chain, config_of_8b: Path) -> None:
    batch_rows = (8, 32)
    runs = [plan(chain, config_of_8b, *EIGHT_GPUS, f"sft.batch_rows={rows}") for rows in batch_rows]
    written = [run.directory / "artifacts" / "plan" / "experiment" / "planned.yaml" for run in runs]
    assert [yaml.safe_load(path.read_text())["sft"]["batch_rows"] for path in written] == list(batch_rows)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("plan.rows=5", "Give plan.rows, plan.prompt_tokens and plan.answer_tokens together"),
        ("plan.nodes=2", "plan.nodes=2 needs plan.gpus, the GPUs of each node. Set it"),
        ("plan.longest_answer=600", "plan.longest_answer=600 is read only with plan.gpus and lengths that"),
        (
            "plan.gpus=8 plan.longest_answer=256",
            "plan.longest_answer=256 is less than the mean, plan.answer_tokens=512. Use 512",
        ),
        (
            "plan.gpu_memory=80apples",
            "plan.gpu_memory='80apples': no size above 0. Write a number and a unit",
        ),
        (
            "plan.gpu_memory=-4GiB",
            "plan.gpu_memory='-4GiB': no size above 0. Write a number and a unit, such as",
        ),
        ("plan.gpu_memory=0GiB", "plan.gpu_memory='0GiB': no size above 0."),
        ("plan.rows=0", "Error: plan.rows=0: it must be greater than 0 or 'prepared'.\n"),
        ("plan.rows=many", "Error: plan.rows='many': it must be a valid integer or 'prepared'.\n"),
        ("sft.peft=loraa", "Error: sft.peft='loraa': it must be 'none', 'lora'"),
        ("sft.peft={method:loraa}", "Error: sft.peft.method='loraa': it must be 'none', 'lora'"),
        ("plan.methods=[lora,loraa]", "Error: plan.methods='loraa': it must be 'none', 'lora'"),
        ("plan.methods=[]", "Error: plan.methods=[]: it must name at least one.\n"),
        ("plan.trains=[]", "Error: plan.trains=[]: it must name at least one.\n"),
        ("plan.trains=[generate]", "plan.trains"),
    ],
)
def test_what_is_no_plan(chain: Chain, override: str, words: str) -> None:
    outcome = chain.run("stage=plan", *override.split())
    assert outcome.code == 2 and words in outcome.err


@pytest.fixture
def speeds(tmp_path: Path) -> Iterator[Path]:
    calibrated_speed(on_cpu(), tmp_path)
    (path,) = (tmp_path / "speeds").iterdir()
    yield path


def test_the_speed_is_measured_once(speeds: Path, tmp_path: Path) -> None:
    kept = json.loads(speeds.read_text())
    assert kept["gflops"] > 0 and kept["gbytes"] > 0
    speeds.write_text(json.dumps(kept | {"gflops": 7.0}))
    assert calibrated_speed(on_cpu(), tmp_path).gflops == 7.0
    assert calibrated_speed(on_cpu(dtype=torch.bfloat16), tmp_path).gflops != 7.0  # another precision
