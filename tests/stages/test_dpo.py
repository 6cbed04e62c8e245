"""Learning from preferences on the tiny model: what each loss sees, TRL's losses and gradients, the
reference, and going on after an interruption."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.chains import Chain, Outcome
from helpers.encoded import ids_of
from helpers.experiments import build_stage
from helpers.gradients import agree, ours
from helpers.jobs import TINY, SmallJob, on_cpu, run_in, small_job, tiny_base, user
from rlhf.config import ConfigError
from rlhf.data.arrow import map_table
from rlhf.data.schema import PairRow, Split, ThumbRow
from rlhf.distributed.signals import Stopped
from rlhf.models.base import load_tokenizer
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel, pack_sequences
from rlhf.pipeline.checks import check
from rlhf.pipeline.stage import View
from rlhf.stages.dpo import DpoStage
from rlhf.supervised.preferences import (
    ABSENT,
    Preferences,
    all_logps,
    logps,
    preference_step,
    read_reference,
    reference_point,
    write_reference,
)

SETTINGS = (
    "model=tiny", "dpo.optim.lr=3e-2", "dpo.batch_rows=4", "dpo.epochs=2", "dpo.evaluations=2",
    "dpo.peft=none", "dpo.init=base", "stage=dpo",
)  # fmt: skip
LOSSES = {
    "dpo": ("dpo.label_smoothing=0.1", "dpo.sft_weight=0.2"),
    "ipo": ("dpo.loss=ipo", "dpo.beta=0.5"),
    "kto": ("dpo.loss=kto", "dpo.beta=0.5", "dpo.undesirable_weight=1.5"),
    "thumbs": ("dpo.loss=kto", "dpo.data=thumbs.jsonl"),
    "simpo": ("dpo.loss=simpo", "dpo.beta=2", "dpo.gamma=0.5"),
}
Preference = PairRow | ThumbRow


def pair(number: int) -> PairRow:
    return PairRow(
        user(f"Say {number}{' please' * (number % 3)}"), f"It is {number}", "No" * (number % 4 + 1)
    )


def thumb(number: int) -> ThumbRow:
    is_up = number % 3 > 0
    return ThumbRow(user(f"Say {number}"), f"It is {number}" if is_up else "No" * (number % 4 + 1), is_up)


def stage_of(*overrides: str) -> DpoStage:
    return build_stage(DpoStage, *SETTINGS, *overrides)


def job_of(
    directory: Path, model: Path, *, num_train: int = 10, num_held_out: int = 6, **settings: Any
) -> SmallJob:
    job = small_job("dpo", directory, tiny_base(model), **settings)
    splits: dict[Split, range] = {"train": range(num_train), "held_out": range(20, 20 + num_held_out)}
    for split, numbers in splits.items():
        job.data.write("pairs", split, [pair(number) for number in numbers])
        job.data.write("dpo", split, [thumb(number) for number in numbers])
    return job


def run(directory: Path, model: Path, *overrides: str) -> SmallJob:
    job = job_of(directory, model)
    torch.manual_seed(0)
    run_in(stage_of(*overrides), job)
    return job


def logged(job: SmallJob, name: str) -> list[float]:
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()
    ]
    return [line[f"dpo/{name}"] for line in lines if f"dpo/{name}" in line and "summary" not in line]


def summary(job: SmallJob) -> dict[str, float]:
    return job.summary


def preferences(model: Path, rows: Sequence[Preference], max_tokens: int = 1000) -> Preferences:
    return Preferences.of(rows, ids_of(load_tokenizer(model, TINY), rows), max_tokens)


def tiny(model: Path) -> PreTrainedModel:
    return load_causal_lm(model, TINY, torch.float32)


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """Another policy than the one it was."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return model


def plain_logp(model: nn.Module, prompt: Tensor, answer: Tensor) -> float:
    """One sequence at a time, with a whole softmax."""
    with torch.no_grad():
        logp_TV = model(torch.cat([prompt, answer])[None]).logits[0].log_softmax(-1)
    return sum(float(logp_TV[len(prompt) - 1 + place, token]) for place, token in enumerate(answer.tolist()))


def test_each_side_has_its_log_probability_and_both_share_their_prompts_pass(tiny_model: Path) -> None:
    rows = preferences(tiny_model, [pair(1), thumb(2), pair(5), thumb(3)])
    model, sides = tiny(tiny_model), rows.sides()
    assert rows.has_B2.tolist() == [[True, True], [True, False], [True, True], [False, True]]
    found_B2 = logps(ResponseModel(model), rows, on_cpu())
    expected = [plain_logp(model, prompt, answer) for prompt, answer in zip(*sides, strict=True)]
    assert found_B2[torch.from_numpy(rows.has_B2)].tolist() == pytest.approx(expected, rel=1e-5)
    assert found_B2[torch.from_numpy(~rows.has_B2)].tolist() == [0.0, 0.0]
    packed = pack_sequences(*sides, torch.device("cpu")).packed
    prompts = sides.prompts[0], sides.prompts[3]
    assert packed.size <= len(packed.ids_T) - sum(map(len, prompts))


def test_ktos_other_answers_are_to_other_prompts(tiny_model: Path) -> None:
    same = pair(1)
    rows = preferences(tiny_model, [same, same, thumb(3), thumb(4)]).with_others()
    numbers = {
        (row, side): number for row, pair in enumerate(rows.side_B2) for side, number in enumerate(pair)
    }
    assert rows.other_B2.tolist() == [
        [numbers[2, 1]] * 2,  # not the next row, whose prompt is the same; and a thumb has one side
        [numbers[2, 1]] * 2,
        [ABSENT, numbers[3, 0]],
        [numbers[0, 0], ABSENT],  # behind the last comes the first
    ]
    others, sides = rows.others(), rows.sides()
    assert [prompt.tolist() for prompt in others.prompts] == [prompt.tolist() for prompt in sides.prompts]
    assert others.answers[-1].tolist() == sides.answers[0].tolist()
    tokens = [len(prompt) + len(answer) for prompt, answer in zip(*others, strict=True)]
    assert rows.other_lengths == [sum(tokens[:2]), sum(tokens[2:4]), *tokens[4:]]
    short = preferences(tiny_model, [pair(1), pair(2)], 60).with_others().others()
    assert all(len(p) + len(a) <= 60 for p, a in zip(*short, strict=True))
    with pytest.raises(ConfigError, match="all rows of a split have the same prompt"):
        preferences(tiny_model, [same, same]).with_others()


def test_ktos_reference_point_is_the_mean_log_ratio_of_other_answers(tiny_model: Path) -> None:
    stage, rows = (
        stage_of("dpo.loss=kto"),
        preferences(tiny_model, [pair(1), thumb(2), thumb(3)]).with_others(),
    )
    reference, policy, compute = tiny(tiny_model), moved(tiny(tiny_model)), on_cpu()
    ratios = []
    for signed in (policy, reference):
        ratios.append([plain_logp(signed, *each) for each in zip(*rows.others(), strict=True)])
    expected = sum(p - r for p, r in zip(*ratios, strict=True)) / 4
    for one, other, wanted in ((policy, reference, expected), (reference, policy, -expected)):
        asked = all_logps(ResponseModel(other), rows, 500, compute, others=True).numpy()
        ready = rows.with_reference(rows.reference_B2, asked)
        for budget in (1, 10_000):
            point = reference_point(ResponseModel(one), stage, ready, budget, compute)
            assert float(point) == pytest.approx(max(0.0, wanted), rel=1e-4)


def test_a_reference_that_says_no_number_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """It would count as probability 1: what is absent is 0 too."""
    rows = preferences(tiny_model, [pair(1), thumb(2), pair(5)])
    asked_B2, path = rows.reference_B2 - 3.5, tmp_path / "reference.arrow"
    write_reference(path, rows.with_reference(asked_B2, asked_B2))
    again = read_reference(path, rows)
    assert again.reference_B2.tolist() == [[-3.5, -3.5], [-3.5, 0.0], [-3.5, -3.5]]
    assert again.other_reference_B2.tolist() == [[0.0, 0.0]] * 3
    for value in (math.nan, -math.inf):
        asked_B2[2, 1] = value
        told = rf"not finite in 1 of 3 rows, first in row 2 \(from 0\), where it is {value}"
        with pytest.raises(ConfigError, match=told):
            rows.with_reference(asked_B2, rows.other_reference_B2)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_trl_has_the_same_loss_and_gradient(tmp_path: Path, tiny_model: Path, loss: str) -> None:
    """The same token ids, policy and reference, in fp32, with TRL 1.16's trainer; ours by the stage's own
    step."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = preferences(tiny_model, [pair(number) for number in range(5)])
    stage = stage_of(f"dpo.loss={loss}", "dpo.beta=0.3")
    reference, policy, compute = tiny(tiny_model), moved(tiny(tiny_model)), on_cpu()
    asked = all_logps(ResponseModel(reference), rows, 1000, compute).numpy()
    ready = rows.with_reference(asked, rows.other_reference_B2)
    mine = ours(
        policy, ResponseModel(policy),
        lambda engine: preference_step(engine, stage, ready, 10_000, compute),
    )  # fmt: skip

    theirs, tokenizer = moved(load_plain(tiny_model)), load_tokenizer(tiny_model, TINY)
    sides = rows.sides()
    examples = [
        {
            "prompt_ids": sides.prompts[2 * index].tolist(),
            "chosen_ids": sides.answers[2 * index].tolist(),
            "rejected_ids": sides.answers[2 * index + 1].tolist(),
        }
        for index in range(len(rows))
    ]
    trainer = DPOTrainer(
        model=theirs, ref_model=load_plain(tiny_model), processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        args=DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            beta=0.3, loss_type={"dpo": "sigmoid"}.get(loss, loss), max_length=None,
            gradient_checkpointing=False,
        ),
    )  # fmt: skip
    found = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    found.backward()
    gradients = {name: each.grad for name, each in trainer.model.named_parameters()}
    agree(mine, (float(found.detach()), gradients))


def load_plain(directory: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.train(mode=False)
    return model


@pytest.mark.parametrize(
    ("loss", "first"),
    [
        ("dpo", math.log(2)),  # and the SFT term
        ("ipo", 1.0),  # (1 / (2 beta))^2
        ("kto", (0.5 + 1.5 * 0.5) / 2),
        ("thumbs", 0.5),
        ("simpo", None),
    ],
)
def test_each_loss_starts_where_it_must_and_falls(
    tmp_path: Path, tiny_model: Path, loss: str, first: float | None
) -> None:
    job, split = (
        run(tmp_path / str(budget), tiny_model, *LOSSES[loss], f"dpo.micro_batch_tokens={budget}")
        for budget in (100_000, 1)
    )
    found = summary(job)
    assert found == pytest.approx(summary(split), rel=1e-3, abs=1e-4)
    losses = logged(job, "loss")
    assert len(losses) == found["steps"] == 6 and losses == pytest.approx(logged(split, "loss"), abs=1e-4)
    if loss == "dpo":
        first = found["held_out_loss_before"]
        assert first > math.log(2)
    elif first is not None:
        assert losses[0] == pytest.approx(first, abs=1e-5)
        assert found["held_out_loss_before"] == pytest.approx(first, abs=1e-5)
        assert logged(job, "train_accuracy")[0] == 0.5  # nobody is ahead
    else:
        assert losses[0] == pytest.approx(simpo_by_hand(tiny_model), rel=1e-4)
    assert found["held_out_loss"] < found["held_out_loss_before"] and found["held_out_loss_change_high"] < 0
    assert found["accuracy"] == 1.0 and found["margin"] > 0
    assert found["accuracy_over_baseline"] == pytest.approx(1.0 - found["baseline_accuracy"])
    assert found["baseline_accuracy"] >= 0.5 and ("longer_wins_accuracy" in found) == (loss != "thumbs")
    assert {name for name in found if not name.endswith(("_low", "_high", "_rows"))} <= {
        *stage_of().metrics, "held_out_rows", "train_rows"
    }  # fmt: skip
    assert (job.directory / "reference.arrow").exists() == (loss != "simpo")
    assert found["chosen_change"] > found["rejected_change"]
    assert len(logged(job, "held_out_loss")) == 3 and logged(job, "held_out_accuracy")[-1] == 1.0


def simpo_by_hand(model: Path) -> float:
    """The loss of the first batch, as the seed shuffles it."""
    from rlhf.distributed.batching import shuffled_batches

    policy, total = tiny(model), 0.0
    batch = shuffled_batches(range(10), 4, 2, 0)[0]
    sides = preferences(model, [pair(number) for number in batch]).sides()
    means = [plain_logp(policy, prompt, answer) / len(answer) for prompt, answer in zip(*sides, strict=True)]
    for chosen, rejected in zip(means[::2], means[1::2], strict=True):
        total += math.log1p(math.exp(-(2 * (chosen - rejected) - 0.5)))
    return total / 4


def test_the_reference_is_the_start_and_lies_in_the_artifact(tmp_path: Path, tiny_model: Path) -> None:
    """Also where the method of tuning changes the policy before its first step."""
    job = run(tmp_path / "job", tiny_model, "dpo.peft={method: prefix, tokens: 5}", "dpo.epochs=1")
    table = map_table(job.directory / "reference.arrow")
    model, rows = tiny(tiny_model), preferences(tiny_model, [pair(number) for number in range(10)])
    expected = [plain_logp(model, *each) for each in zip(*rows.sides(), strict=True)]
    assert table["chosen"].to_pylist() == pytest.approx(expected[::2], rel=1e-5)
    assert table["rejected"].to_pylist() == pytest.approx(expected[1::2], rel=1e-5)
    assert table["chosen_of_next"].null_count == table.num_rows == 10
    assert abs(logged(job, "train_margin")[0]) > 1e-4  # it does not start as its own reference


@pytest.mark.parametrize(
    "overrides",
    [("dpo.peft=lora",), ("dpo.loss=kto", "dpo.data=thumbs.jsonl"), ("dpo.loss=simpo", "dpo.beta=2")],
)
def test_it_goes_on_bit_for_bit_and_asks_the_reference_once(
    tmp_path: Path, tiny_model: Path, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(*overrides)
    through = job_of(tmp_path / "through", tiny_model)
    torch.manual_seed(0)
    run_in(stage, through)
    checkpoints = tmp_path / "checkpoints"
    first = job_of(tmp_path / "first", tiny_model, checkpoints=checkpoints)
    first.checkpoints.signals.received = 15
    torch.manual_seed(0)
    with pytest.raises(Stopped):
        run_in(stage, first)

    def asked_again(*arguments: object) -> None:
        raise AssertionError("the reference was asked again")

    monkeypatch.setattr(DpoStage, "measure_reference", asked_again)
    second = job_of(tmp_path / "second", tiny_model, checkpoints=checkpoints)
    assert second.checkpoints.newest is not None
    torch.manual_seed(1)
    run_in(stage, second)
    for file in through.directory.rglob("*.safetensors"):
        expected, found = load_file(file), load_file(second.directory / file.relative_to(through.directory))
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    ours, theirs = (
        {name: value for name, value in summary(job).items() if not name.startswith("token_seconds")}
        for job in (second, through)
    )
    assert ours == theirs


def test_a_damaged_reference_is_made_anew(tmp_path: Path, tiny_model: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    first = job_of(tmp_path / "first", tiny_model, checkpoints=checkpoints)
    run_in(stage_of(), first)
    for path in checkpoints.glob("kept-*"):
        path.write_bytes(path.read_bytes()[:-8])
    again = job_of(tmp_path / "again", tiny_model, checkpoints=checkpoints)
    stage_of().run(again)
    assert (first.directory / "reference.arrow").read_bytes() == (
        again.directory / "reference.arrow"
    ).read_bytes()


def test_the_best_weights_on_held_out_rows_are_published(tmp_path: Path, tiny_model: Path) -> None:
    """With a rate that ruins the policy, the start itself is the best."""
    job = run(tmp_path / "job", tiny_model, "dpo.optim.lr=30", "dpo.loss=ipo", "dpo.optim.schedule=constant")
    found = summary(job)
    assert found["best_step"] == 0 and found["held_out_loss_last"] > found["held_out_loss_before"]
    assert found["held_out_loss"] == found["held_out_loss_before"] and found["held_out_loss_change"] == 0
    expected = tiny(tiny_model).state_dict()
    assert all(
        torch.equal(each, expected[name]) for name, each in load_plain(job.directory).state_dict().items()
    )


@pytest.mark.parametrize(
    ("overrides", "sizes", "complaint"),
    [
        (
            ("dpo.data=thumbs.jsonl",),
            (4, 4),
            "dpo.data=thumbs.jsonl has rows with a thumb, and this loss compares",
        ),
        ((), (4, 1), "reward.pairs: 1 held-out row, but at least 2 are needed"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_trains(
    tmp_path: Path, tiny_model: Path, overrides: tuple[str, ...], sizes: tuple[int, int], complaint: str
) -> None:
    job = job_of(tmp_path / "job", tiny_model, num_train=sizes[0], num_held_out=sizes[1])
    with pytest.raises(ConfigError, match=complaint):
        check(stage_of(*overrides), View({}, data=job.data, base=job.base))


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path: Path, tiny_model: Path) -> None:
    lengths = preferences(tiny_model, [pair(number) for number in range(10)]).lengths
    job = run(tmp_path / "job", tiny_model, "dpo.max_tokens=47", "dpo.epochs=1")
    assert 0 < summary(job)["rows_too_long"] < len(lengths)
    with pytest.raises(ConfigError, match=r"dpo\.max_tokens=9: 0 train rows of reward.pairs are that short"):
        run(tmp_path / "none", tiny_model, "dpo.max_tokens=9")


def test_a_policy_that_never_got_better_is_said_to_be_its_start(tmp_path: Path, tiny_model: Path) -> None:
    printed = StringIO()
    job = job_of(tmp_path / "job", tiny_model, console=Console(file=printed, width=300))
    run_in(stage_of("dpo.optim.lr=1e-30", "dpo.epochs=1"), job)
    assert summary(job)["best_step"] == 0
    assert (
        "dpo: no evaluation in" in printed.getvalue() and "the one that it started from" in printed.getvalue()
    )


def test_a_single_pair_can_be_learned(tmp_path: Path, tiny_model: Path) -> None:
    job = job_of(tmp_path / "job", tiny_model, num_train=1)
    run_in(stage_of(), job)
    assert summary(job)["train_rows"] == 1 and summary(job)["held_out_loss"] > 0


def test_smoothing_that_a_loss_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dpo\.label_smoothing=0\.1: dpo.loss=kto has none"):
        stage_of("dpo.loss=kto", "dpo.label_smoothing=0.1")


@pytest.mark.slow
def test_what_the_other_stages_make_of_it(finished_chain: tuple[Chain, Outcome]) -> None:
    """Its policy is evaluated, compared and sampled from; the pairs of those samples teach the next one."""
    chain, _ = finished_chain
    small = ("dpo.batch_rows=8", "compare.num_questions=2", "compare.max_new_tokens=4", "gates=warn")
    named = ("generate.policy=dpo", "evaluate.policies=[base,sft,dpo]", "compare.artifacts=[dpo]")
    outcome = chain.run("stage=[dpo,generate,evaluate,compare]", *small, *named, "generate.num_prompts=16")
    assert outcome.code == 0, outcome.err
    ran = {name for name, status in outcome.statuses.items() if status == "ran"}
    assert ran == {"dpo", "generate", "evaluate", "compare"} and "ppo" not in outcome.statuses
    metrics = outcome.summary["stages"]["evaluate"]["metrics"]
    assert "evaluate/kl/dpo" in metrics and metrics["evaluate/gold_gain"] == metrics["evaluate/gold_gain/dpo"]
    assert "compare/rouge_l/dpo" in outcome.summary["stages"]["compare"]["metrics"]
    assert "| base | SFT | DPO |" in (outcome.directory / "report.md").read_text()
    pairs, start = outcome.artifact("generate") / "pairs.jsonl", outcome.artifact("dpo")
    settings = (f"dpo.init={start}", f"dpo.data={pairs}", "dpo.batch_rows=2", "prepare.held_out_fraction=0.6")
    again = chain.run("stage=dpo", "gates=warn", *settings)
    assert again.code == 0, again.err
    assert again.statuses == {"prepare": "ran", "dpo": "ran"}
