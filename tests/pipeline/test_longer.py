"""A longer training continues a shorter one, and makes what it makes in one go, to the bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers.chains import Chain, Outcome, RealChain, run_main
from helpers.experiments import build
from rlhf.pipeline.key import knobs
from rlhf.pipeline.longer import Course
from rlhf.pipeline.preflight import Attempt
from rlhf.training.checkpoint import Checkpointer

CHANGING = re.compile(r"time$|seconds|latency|memory|tokens_per|throughput")
"""Keys of figures that vary from run to run, as in benchmarks/same_results.py."""


def open_end(*optims: str) -> tuple[str, ...]:
    return tuple(
        f"{optim}.{each}" for optim in optims for each in ("schedule=constant", "warmup_steps=2", "lr=1e-2")
    )


POLICY = (
    f"ppo.reward=python:{__name__}:length", "ppo.score.normalize=running", "ppo.critic.init=sft",
    "ppo.evaluate_every=3",
)  # fmt: skip


class Case(NamedTuple):
    """A stage that trains in rungs. The last evaluation of rungs 1 and 2 is none of rung 4."""

    stage: str
    length: str
    overrides: tuple[str, ...]


CASES = {
    "sft": Case("sft", "sft.epochs", open_end("sft.optim")),
    "reward": Case("reward", "reward.epochs", (*open_end("reward.optim"), "checkpoint.background=true")),
    "dpo": Case("dpo", "dpo.epochs", (*open_end("dpo.optim"), "dpo.evaluations=1", "dpo.batch_rows=8")),
    "ppo": Case(
        "ppo", "ppo.steps",
        (
            *POLICY, *open_end("ppo.optim", "ppo.critic.optim"), "ppo.ptx.coef=0.5",
            "ppo.kl.controller=adaptive", "ppo.kl.horizon=100",
        ),
    ),
    "grpo": Case(
        "grpo", "grpo.steps",
        (
            *POLICY, *open_end("grpo.optim"), "grpo.batch_episodes=8", "grpo.minibatch_episodes=8",
            "grpo.peft=none",
        ),
    ),
}  # fmt: skip
"""By default SFT trains all weights, and the others LoRA adapters."""


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain with an SFT model."""
    directory = tmp_path_factory.mktemp("begun") / "chain"
    directory.mkdir()
    assert Chain(directory).run("stage=sft", "sft.epochs=1", "precision=fp32", "gates=warn").code == 0
    return directory


@pytest.fixture
def chains(begun: Path, tmp_path: Path) -> tuple[Chain, Chain]:
    """Two such chains: in rungs, and in one go."""
    return chain_at(begun, tmp_path / "rungs"), chain_at(begun, tmp_path / "one_go")


@pytest.fixture
def chain(chains: tuple[Chain, Chain]) -> Chain:
    return chains[0]


def chain_at(begun: Path, directory: Path) -> Chain:
    return Chain(shutil.copytree(begun, directory, symlinks=True))


def train(chain: Chain, case: Case, rung: float, *overrides: str, code: int = 0) -> Outcome:
    others = () if case.stage == "sft" else ("sft.epochs=1",)
    settings = (f"stage={case.stage}", f"{case.length}={rung}", "precision=fp32", "gates=warn")
    found = chain.run(*settings, *others, *case.overrides, *overrides)
    assert found.code == code, found.err
    return found


def continued(outcome: Outcome, case: Case) -> list[str]:
    """How it continued, without the directory of the checkpoint."""
    lines = re.findall(rf"\b{case.stage}: (continues .*) \(.*\)$", outcome.out, re.M)
    return [str(line) for line in lines]


def steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: steady(each) for key, each in value.items() if not CHANGING.search(key)}
    return [steady(each) for each in value] if isinstance(value, list) else value


def content(artifact: Path) -> dict[str, Any]:
    """Every byte of an artifact, and its manifest's metrics and recipe; without times."""
    files: dict[str, Any] = {}
    for path in sorted(artifact.rglob("*")):
        name = str(path.relative_to(artifact))
        if path.suffix == ".jsonl":
            files[name] = [steady(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.is_file() and name != "manifest.json":
            files[name] = path.read_bytes()
    manifest = json.loads((artifact / "manifest.json").read_text())
    return {**files, **{key: steady(manifest[key]) for key in ("metrics", "recipe", "input_digests", "key")}}


def assert_equal(found: Path, expected: Path) -> None:
    ours, theirs = content(found), content(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if json_or_bytes(ours[name]) != json_or_bytes(theirs[name])] == []


def json_or_bytes(value: Any) -> Any:
    return value if isinstance(value, bytes) else json.dumps(value, sort_keys=True)  # NaN equals NaN here


def kept(chain: Chain, stage: str) -> list[int]:
    """Steps of the checkpoints that stayed."""
    found = (chain.directory / "store" / stage).glob(".*.last/step-*")
    return [int(path.name.removeprefix("step-")) for path in found]


@pytest.mark.parametrize("name", CASES)
def test_in_rungs_and_killed_it_makes_what_it_makes_in_one_go(
    name: str, chains: tuple[Chain, Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, other = chains
    case = CASES[name]
    stage = case.stage
    assert continued(train(chain, case, 1), case) == []
    (steps,) = kept(chain, stage)
    second = train(chain, case, 2)
    assert continued(second, case) == [f"continues the shorter run from step {steps} of {2 * steps}"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "after_step", killing(2 * steps + 1))
        train(chain, case, 4, "checkpoint.every_steps=1", code=1)
    last = train(chain, case, 4, "checkpoint.every_steps=1")
    assert continued(last, case) == [f"continues from step {2 * steps + 1}"]
    assert_equal(last.artifact(stage), train(other, case, 4).artifact(stage))
    assert kept(chain, stage) == [4 * steps]
    assert not [*(chain.directory / "store" / stage).glob(".*.checkpoints")]
    if name == "sft":
        shutil.rmtree(other.directory / "store" / stage)
        assert_equal(second.artifact(stage), train(other, case, 2).artifact(stage))


def killing(at: int) -> Any:
    """`Checkpointer.after_step` that raises after the checkpoint of this step."""
    after_step = Checkpointer.after_step

    def raising(self: Checkpointer, step: int, *arguments: Any) -> None:
        after_step(self, step, *arguments)
        if step == at:
            self._complete()
            raise RuntimeError("killed")

    return raising


def test_another_knob_starts_anew(chain: Chain) -> None:
    case = CASES["sft"]
    chain.write("other.jsonl", [{"prompt": f"Say {n}", "completion": f"No {n}."} for n in range(24)])
    train(chain, case, 1)
    for change in ("optim.lr=2e-2", "batch_rows=4", "data=other.jsonl", "optim.warmup_steps=1"):
        assert continued(train(chain, case, 2, f"sft.{change}"), case) == [], change
    assert continued(train(chain, case, 2, "seed=1"), case) == []
    assert len(kept(chain, "sft")) == 6
    assert continued(train(chain, case, 2), case) == ["continues the shorter run from step 2 of 4"]


def test_a_schedule_over_the_length_leaves_no_checkpoint(chain: Chain) -> None:
    case = CASES["sft"]
    for rung in (1, 2):
        assert continued(train(chain, case, rung, "sft.optim.schedule=linear"), case) == []
    assert not [*(chain.directory / "store" / "sft").glob(".*.last")]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sft", "sft.optim.schedule=cosine"),
        ("sft", "sft.optim.warmup_steps=null"),  # a share of all steps
        ("dpo", "dpo.evaluations=2"),  # spread over the length
        ("ppo", "ppo.critic.optim.schedule=linear"),
        ("ppo", "ppo.optim.warmup_steps=null"),
    ],
)
def test_what_depends_on_the_length(name: str, change: str) -> None:
    overrides = CASES[name].overrides
    assert build(*overrides).stages[name].has_open_end()
    assert not build(*overrides, change).stages[name].has_open_end()


def test_a_shorter_run_neither_uses_nor_replaces_the_checkpoint(chain: Chain) -> None:
    case = CASES["sft"]
    train(chain, case, 2)
    assert continued(train(chain, case, 1), case) == []
    assert kept(chain, "sft") == [4]
    train(chain, case, 2, "force=[sft]")
    assert continued(train(chain, case, 4), case) == ["continues the shorter run from step 4 of 8"]


def test_force_and_resume_forget_the_checkpoint(chain: Chain) -> None:
    case = CASES["sft"]
    train(chain, case, 1)
    assert continued(train(chain, case, 2, "force=[sft]"), case) == []
    assert continued(train(chain, case, 4, "checkpoint.resume=false"), case) == []
    assert kept(chain, "sft") == [8]


def test_a_damaged_checkpoint_is_said_and_not_used(chain: Chain) -> None:
    case = CASES["sft"]
    train(chain, case, 1)
    (path,) = (chain.directory / "store" / "sft").glob(".*.last/step-*/optimizer.pt")
    path.write_bytes(b"damaged")
    verified = run_main(chain.directory, ["verify"], chain.directory)
    assert verified.code == 3 and ".last/step-00000002 is damaged: optimizer.pt" in verified.out
    outcome = train(chain, case, 2)
    assert continued(outcome, case) == [] and "checkpoint step-00000002 is damaged" in outcome.out
    assert kept(chain, "sft") == [4]
    assert run_main(chain.directory, ["verify"], chain.directory).code == 0


def test_gc_shows_it_and_removes_it(chain: Chain) -> None:
    case = CASES["sft"]
    train(chain, case, 1)
    assert run_main(chain.directory, ["status"], chain.directory).code == 0
    outcome = run_main(chain.directory, ["gc", "yes=true"], chain.directory)
    assert "  (the last checkpoint of a stage that has ended, for a longer run)\n" in outcome.out
    assert kept(chain, "sft") == []
    assert continued(train(chain, case, 2), case) == []


def test_it_is_told_with_why_and_the_time_left_counts_it(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, found = Course.attempt, list[Attempt]()

    def remembered(course: Course) -> Attempt:
        found.append(attempt(course))
        return found[-1]

    monkeypatch.setattr(Course, "attempt", remembered)
    case = CASES["sft"]
    train(chain, case, 1)
    outcome = train(chain, case, 4, "why=true")
    assert continued(outcome, case) == ["continues the shorter run from step 2 of 8"]
    assert re.search(r"sft runs \(\w+\): .*sft\.epochs", outcome.out)
    first, second = found
    assert (first.share, first.seconds) == (0.0, 0.0)
    assert second.share == 0.25 and second.seconds > 0.0


def test_keys_of_other_configs_stay() -> None:
    """Without `warmup_steps` no recipe has it."""
    optim = knobs(build().stages["sft"])["optim"]
    assert "warmup_fraction" in optim and "warmup_steps" not in optim


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealChain:
    made = RealChain(tmp_path_factory.mktemp("ranks"))
    (made.directory / "lengths.py").write_text("def score(prompts, texts):\n    return [*map(len, texts)]\n")
    return made


def on_ranks(zero: str, ranks: int, steps: int) -> tuple[str, ...]:
    reward = ("ppo.reward=python:lengths:score", *POLICY[1:])
    rates = open_end("ppo.optim", "ppo.critic.optim")
    return (
        *reward,
        *rates,
        f"zero={zero}",
        f"launch.processes={ranks}",
        "sft.epochs=1",
        f"ppo.steps={steps}",
    )


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "fsdp2", "zero3"])
def test_on_two_ranks_killed_it_makes_what_it_makes_in_one_go(real: RealChain, zero: str) -> None:
    name, one_go = f"rungs_{zero}", f"one_go_{zero}"
    real.run(name, *on_ranks(zero, 2, 2))
    real.run_killed("ppo", 3, name, "checkpoint.every_steps=1", *on_ranks(zero, 2, 4))
    out, _ = real.run(name, *on_ranks(zero, 2, 4))
    assert "ppo: continues from step 3 (" in out
    real.run(one_go, *on_ranks(zero, 2, 4))
    runs = real.directory / "runs"
    assert_equal(runs / name / "artifacts" / "ppo", runs / one_go / "artifacts" / "ppo")


@pytest.mark.slow
def test_on_another_number_of_ranks_or_engine(real: RealChain) -> None:
    real.run("ranks", *on_ranks("zero3", 2, 1))
    out, _ = real.run("ranks", *on_ranks("zero3", 1, 2))
    assert "ppo: continues the shorter run from step 1 of 2 (" in out
    out, _ = real.run("ranks", *on_ranks("none", 1, 3))  # which cannot read it
    assert "ppo: continues" not in out
