"""Supervised tuning of the tiny model: what it learns from, and that TRL comes to the same weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.encoded import answers_of
from helpers.jobs import TINY, SmallJob, run_in, user
from helpers.stages import GENERAL, HELD_OUT, TRAIN, sft_job, sft_stage
from rlhf.config import ConfigError
from rlhf.data.answers import Answers
from rlhf.data.schema import SftRow
from rlhf.distributed.batching import shuffled_batches
from rlhf.models.base import load_tokenizer
from rlhf.models.load import load_causal_lm
from rlhf.supervised.answers import cut_share, with_replay


def run_stage(directory: Path, model: Path, *overrides: str) -> SmallJob:
    job = sft_job(directory, model)
    torch.manual_seed(0)
    run_in(sft_stage(*overrides), job)
    return job


def published(job: SmallJob) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(job.directory, dtype=torch.float32)
    return model


def distance(left: PreTrainedModel, right: PreTrainedModel) -> float:
    """The largest difference of any weight."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def logged(job: SmallJob, name: str) -> list[float]:
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()
    ]
    return [line[f"sft/{name}"] for line in lines if f"sft/{name}" in line and "summary" not in line]


def test_trl_comes_to_the_same_weights(tmp_path: Path, tiny_model: Path) -> None:
    """Our stage in micro-batches of its own; TRL 1.16's trainer with torch's AdamW on whole batches."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    job = run_stage(tmp_path / "job", tiny_model, "sft.micro_batch_tokens=90")

    stage, tokenizer = sft_stage(), load_tokenizer(tiny_model, TINY)
    rows = answers_of(tokenizer, TRAIN, stage.max_tokens)
    assert any(row.is_cut for row in rows)
    batches = shuffled_batches(rows, stage.batch_rows, stage.epochs, job.seed)
    assert [len(batch) for batch in batches] == [4, 4, 4, 2] * 2
    model = load_causal_lm(tiny_model, TINY, torch.float32)
    examples = [
        {
            "input_ids": [*row.prompt.tolist(), *row.answer.tolist()],
            "labels": [*[-100] * len(row.prompt), *row.answer.tolist()],
        }
        for batch in batches
        for row in batch
    ]

    class InOurOrder(torch.utils.data.Sampler[list[int]]):
        """The stage's batches: an epoch's last one is smaller."""

        def __iter__(self) -> Iterator[list[int]]:
            start = 0
            for batch in batches:
                yield list(range(start, start + len(batch)))
                start += len(batch)

        def __len__(self) -> int:
            return len(batches)

    class Trainer(SFTTrainer):  # type: ignore[misc]  # trl has no types
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_sampler=InOurOrder(), collate_fn=self.data_collator
            )

    matrices, norms = (
        [each for each in model.parameters() if (each.ndim > 1) == is_one] for is_one in (True, False)
    )
    spared: dict[str, Any] = {"params": norms, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": matrices}, spared], lr=3e-3, weight_decay=0.1, eps=1e-8)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, num_train_epochs=1,
        per_device_train_batch_size=4, max_grad_norm=0.5, report_to="none", save_strategy="no",
        disable_tqdm=True, activation_checkpointing=False, max_length=None, remove_unused_columns=False,
        logging_steps=1,
    )  # fmt: skip
    warmed_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / 3 if step < 2 else max(0.0, (8 - step) / 6)
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(examples), processing_class=tokenizer,
        optimizers=(optimizer, warmed_up),
    )  # fmt: skip
    trainer.train()

    assert distance(published(job), model) < 2e-5
    assert distance(load_causal_lm(tiny_model, TINY, torch.float32), model) > 5e-3
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert logged(job, "loss") == pytest.approx(losses, abs=2e-4)


def test_micro_batches_do_not_matter(tmp_path: Path, tiny_model: Path) -> None:
    whole, split = (
        run_stage(tmp_path / str(tokens), tiny_model, f"sft.micro_batch_tokens={tokens}")
        for tokens in (100_000, 1)
    )
    assert distance(published(whole), published(split)) < 2e-5
    gains = [each.pop("prompt_gain") for each in (whole.summary, split.summary)]  # differences of losses
    assert gains[0] == pytest.approx(gains[1], abs=1e-6)
    assert split.summary == pytest.approx(whole.summary, rel=1e-4)
    assert whole.summary["held_out_loss"] < whole.summary["held_out_loss_before"]
    assert whole.summary["rows_cut"] > 0


def test_a_prompt_is_read_but_not_learned(tmp_path: Path, tiny_model: Path) -> None:
    """The loss is the mean over the answers' tokens alone, of the model before the step."""
    job = run_stage(tmp_path / "job", tiny_model, "sft.batch_rows=14", "sft.epochs=1")
    model, tokenizer = load_causal_lm(tiny_model, TINY, torch.float32), load_tokenizer(tiny_model, TINY)
    nats, tokens = 0.0, 0
    for row in answers_of(tokenizer, TRAIN, 80):
        ids = torch.cat([row.prompt, row.answer])
        with torch.no_grad():
            logp_TV = model(ids[None]).logits[0].log_softmax(-1)
        first = len(row.prompt)
        nats -= sum(float(logp_TV[place - 1, ids[place]]) for place in range(first, len(ids)))
        tokens += len(row.answer)
    assert logged(job, "loss") == [pytest.approx(nats / tokens, rel=1e-4)]
    assert logged(job, "tokens") == [tokens]


def nats(model: PreTrainedModel, prompt: torch.Tensor, answer: torch.Tensor) -> float:
    ids = torch.cat([prompt, answer])
    with torch.no_grad():
        logp_TV = model(ids[None]).logits[0].log_softmax(-1)
    return -sum(float(logp_TV[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))


def test_what_its_prompt_is_worth_to_an_answer(tmp_path: Path, tiny_model: Path) -> None:
    """Each answer is asked again behind the next prompt that is another one and leaves room for it."""
    job, tokenizer = sft_job(tmp_path / "job", tiny_model), load_tokenizer(tiny_model, TINY)
    held_out = [
        SftRow(user("name the sun"), "it is far"), SftRow(user("name the sun"), "it is hot"),
        SftRow(user("who is it"), "she is it"), SftRow(user("w" * 58), "much"),
    ]  # fmt: skip
    job.data.write("sft", "held_out", held_out)
    run_in(sft_stage(), job)
    rows = answers_of(tokenizer, held_out, 80)
    assert len(rows) == 4
    moved = {0: 2, 1: 2, 2: 0, 3: 0}  # the fourth's prompt leaves no room for the others' answers
    model = published(job)
    gained = sum(
        nats(model, rows[other].prompt, rows[place].answer)
        - nats(model, rows[place].prompt, rows[place].answer)
        for place, other in moved.items()
    )
    assert job.summary["prompt_gain"] == pytest.approx(gained / sum(row.learned for row in rows), abs=1e-5)
    assert job.summary["prompt_gain_rows"] == 4


def test_one_prompt_alone_tells_nothing_of_its_worth(tmp_path: Path, tiny_model: Path) -> None:
    job = sft_job(tmp_path / "job", tiny_model)
    job.data.write("sft", "held_out", [SftRow(user("the same"), answer) for answer in ("one", "two")])
    run_in(sft_stage(), job)
    assert (job.summary["prompt_gain_rows"], job.summary["prompt_gain_low"]) == (0, -math.inf)


def test_every_epoch_sees_each_row_once_in_another_order() -> None:
    rows = list(range(14))
    batches = [*shuffled_batches(rows, 4, 2.0, seed=0)]
    first = [row for batch in batches[:4] for row in batch]
    second = [row for batch in batches[4:] for row in batch]
    assert sorted(first) == sorted(second) == rows
    assert first != second
    assert [*shuffled_batches(rows, 4, 2.0, seed=0)] == batches
    assert [*shuffled_batches(rows, 4, 2.0, seed=1)] != batches


@pytest.mark.parametrize(("epochs", "steps"), [(0.25, 1), (0.5, 2), (1.0, 4), (1.3, 6), (2.0, 8)])
def test_a_part_of_an_epoch_is_a_part_of_its_batches(epochs: float, steps: int) -> None:
    rows = list(range(14))
    batches = shuffled_batches(rows, 4, epochs, seed=0)
    assert len(batches) == steps
    assert [*batches] == shuffled_batches(rows, 4, 2.0, seed=0)[:steps]


@pytest.mark.parametrize(("epochs", "steps"), [(1.1, 55), (1.11, 56), (1e-9, 1)])  # 1.1 x 50 > 55 in floats
def test_a_part_of_an_epoch_is_as_it_is_written(epochs: float, steps: int) -> None:
    assert len(shuffled_batches(list(range(50)), 1, epochs, seed=0)) == steps


def encoded(directory: Path, rows: list[SftRow]) -> Answers:
    return answers_of(load_tokenizer(directory, TINY), rows, 80)


REPLAY = "sft.replay=samples:retention_sentences"


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.75])
def test_replay_is_its_share_of_the_learned_tokens(tiny_model: Path, fraction: float) -> None:
    task, general = encoded(tiny_model, TRAIN), encoded(tiny_model, GENERAL)
    both, batches = Answers.joined(task, general), shuffled_batches(range(len(task)), 4, 2.0, seed=0)
    mixed = with_replay(batches, task, general, fraction, seed=0)
    longest = max(len(row.answer) for row in general)
    learned = replayed = 0
    for batch, own in zip(mixed, batches, strict=True):
        assert batch[: len(own)] == own  # the task is learned as without replay
        assert min(batch[len(own) :], default=len(task)) >= len(task)
        learned += sum(len(both[index].answer) for index in batch)
        replayed += sum(len(both[index].answer) for index in batch[len(own) :])
        assert 0 <= replayed - fraction * learned < longest
    order = [index - len(task) for batch in mixed for index in batch if index >= len(task)]
    passes = [order[start : start + 6] for start in range(0, len(order) - 5, 6)]
    assert all(sorted(each) == list(range(6)) for each in passes)  # none comes again before all have come
    again = with_replay(batches, task, general, fraction, seed=0)
    assert [*again] == [*mixed]  # so that a resumed run is the same run
    if fraction == 0.75:
        assert len({tuple(each) for each in passes}) > 1
        assert [*with_replay(batches, task, general, fraction, seed=1)] != [*mixed]


def test_what_is_replayed_is_learned(tmp_path: Path, tiny_model: Path) -> None:
    jobs = {
        fraction: run_stage(tmp_path / fraction, tiny_model, REPLAY, f"sft.replay_fraction={fraction}")
        for fraction in ("0", "0.5")
    }
    rows, losses = encoded(tiny_model, GENERAL), {}
    for fraction, job in jobs.items():
        model = load_causal_lm(job.directory, TINY, torch.float32)
        with torch.no_grad():
            found = [
                model(torch.cat([row.prompt, row.answer])[None]).logits[0].log_softmax(-1) for row in rows
            ]
        losses[fraction] = -sum(
            float(logp_TV[torch.arange(len(row.answer)), row.answer].sum())
            for logp_TV, row in zip(found, rows, strict=True)
        ) / sum(len(row.answer) for row in rows)
    assert losses["0.5"] < losses["0"] - 0.1
    assert jobs["0"].summary["replayed_rows"] == 0 < jobs["0.5"].summary["replayed_rows"]
    assert logged(jobs["0.5"], "tokens")[0] > logged(jobs["0"], "tokens")[0]


def test_replay_needs_something_to_replay(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"replay_fraction=0\.2 needs sft\.replay, a source of general data"
    ):
        sft_stage("sft.replay_fraction=0.2")
    stage = sft_stage(REPLAY, "sft.replay_fraction=0.2")
    job = sft_job(tmp_path / "job", tiny_model)
    job.data.write("replay", "train", [SftRow(user("x" * 90), "never read")])
    with pytest.raises(
        ConfigError, match=r"sft\.replay=samples:retention_sentences: no row .* sft\.max_tokens=80"
    ):
        run_in(stage, job)
    assert sft_stage(REPLAY).reads().roles == ("sft",)
    assert stage.reads().roles == ("sft", "replay")


def test_rows_of_which_nothing_is_left_to_learn_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no training row has anything to learn within sft\.max_tokens=5\."
    ):
        run_stage(tmp_path, tiny_model, "sft.max_tokens=5")


def test_a_row_whose_prompt_fills_the_limit_is_left_out_and_counted(tmp_path: Path, tiny_model: Path) -> None:
    without = run_stage(tmp_path / "without", tiny_model)
    job = sft_job(tmp_path / "job", tiny_model)
    too_long = SftRow(user("x" * 90), "never read")
    job.data.write("sft", "train", [*TRAIN, too_long])
    job.data.write("sft", "held_out", [*HELD_OUT, too_long])
    torch.manual_seed(0)
    run_in(sft_stage(), job)
    assert (without.summary["rows_left_out"], job.summary["rows_left_out"]) == (0, 1)
    assert job.summary["held_out_loss"] == without.summary["held_out_loss"]
    assert distance(published(job), published(without)) == 0.0


def test_a_learning_rate_that_explodes_ends_with_the_batch_and_a_way_out(
    tmp_path: Path, tiny_model: Path
) -> None:
    job = sft_job(tmp_path / "job", tiny_model)
    with pytest.raises(ConfigError, match="sft: in step 4 and the 2 before it the gradients were not finite"):
        run_in(sft_stage("sft.optim.lr=1e38", "sft.optim.warmup_fraction=0"), job)
    lines = (job.run_directory / "sft-step4.jsonl").read_text(encoding="utf-8").splitlines()
    batch = shuffled_batches(TRAIN, 4, 2.0, seed=job.seed)[3]
    assert [json.loads(line) for line in lines] == [
        {"prompt": row.prompt, "completion": row.completion} for row in batch
    ]


def test_lora_publishes_a_plain_model_that_differs(tmp_path: Path, tiny_model: Path) -> None:
    job = run_stage(tmp_path / "job", tiny_model, "sft.peft=lora", "sft.optim.lr=0.05")
    model = published(job)
    assert not [name for name in model.state_dict() if "lora" in name]
    assert distance(model, load_causal_lm(tiny_model, TINY, torch.float32)) > 1e-3
    assert job.summary["trained_parameters"] < sum(p.numel() for p in model.parameters()) / 2


def test_answers_that_an_export_cut_are_seen() -> None:
    whole = [f"This is answer number {number}, a whole one of its own." for number in range(8)]
    whole += [f"{'x' * number} and so on." for number in range(20, 30)]

    def rows(texts: Iterable[str]) -> list[SftRow]:
        return [SftRow([], text) for text in texts]

    assert cut_share(rows(whole)).value == 0
    cut = cut_share(rows(f"{number} {text}"[:24] for number, text in enumerate(whole)))
    assert cut.value == 17 / 18 and cut.low > 0.2  # one may be whole
    assert cut_share(rows("yes" for _ in whole)).value == 0, "short"
    assert cut_share(rows(whole[0][:24] for _ in whole)).value == 0, "one answer, many times"
    assert cut_share([]).rows == 0
