"""Conversations are trained on every assistant turn, each behind the very ids that it is sampled after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.chains import Chain
from helpers.encoded import answers_of
from helpers.jobs import TINY
from helpers.stages import sft_job, sft_stage
from rlhf.data.answers import EncodedAnswer
from rlhf.data.chat_template import CHATML, PLAIN, TurnsDifferError, conversation_ids
from rlhf.data.formats import sft_row
from rlhf.data.schema import Message, SftRow, each_turn
from rlhf.models.base import load_tokenizer
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel
from rlhf.supervised.answers import answer_losses, answer_step
from rlhf.training.engine import PlainEngine


def said(role: Any, text: str) -> Message:
    return Message(role=role, content=text)


CONVERSATION = SftRow(
    [
        said("system", "Be brief."), said("assistant", "Hello!"), said("user", "Where is the cat?"),
        said("assistant", "<think>look</think>On the mat."), said("user", "And the dog?"),
        said("assistant", "Outside."), said("user", "Thanks."),
    ],
    "You are welcome.", turns=3,
)  # fmt: skip
ANSWERS = ["<think>look</think>On the mat.", "Outside.", "You are welcome."]
KEPT = "message['content'] if loop.last else message['content'].split('</think>')[-1]"
FORGETFUL = CHATML.replace("message['content']", f"({KEPT})")
SPACED = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}<|im_end|>"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def encoded(words: Any, row: SftRow, max_tokens: int = 1000) -> EncodedAnswer:
    (found,) = answers_of(words, [row], max_tokens)
    return found


def tokenizer(directory: Path, template: str) -> Any:
    found = load_tokenizer(directory, TINY)
    found.chat_template = template
    return found


@pytest.mark.parametrize("template", [CHATML, PLAIN, SPACED])
def test_what_is_learned_is_each_answer_and_its_end(tiny_model: Path, template: str) -> None:
    words = tokenizer(tiny_model, template)
    row = encoded(words, CONVERSATION)
    learned = words.decode(row.answer[row.mask])
    assert learned == "".join(f"{answer}<|im_end|>" for answer in ANSWERS)
    assert row.learned == len(words(learned)["input_ids"])
    whole = words.decode(torch.cat([row.prompt, row.answer]))
    assert whole.count("Where is the cat?") == whole.count("Thanks.") == 1
    for turn in each_turn(CONVERSATION):  # each stands behind what it is sampled after
        alone = encoded(words, turn)
        ids = torch.cat([alone.prompt, alone.answer])
        assert torch.equal(torch.cat([row.prompt, row.answer])[: len(ids)], ids)


def test_a_cut_conversation_keeps_its_first_answers(tiny_model: Path) -> None:
    words = tokenizer(tiny_model, CHATML)
    whole = encoded(words, CONVERSATION)
    cut = encoded(words, CONVERSATION, len(whole.prompt) + 5)
    assert (cut.is_cut, cut.learned, len(cut)) == (True, 5, len(whole.prompt) + 5)
    assert not answers_of(words, [CONVERSATION], len(whole.prompt))


def test_one_sequence_teaches_what_its_turns_teach_apart(tiny_model: Path, tmp_path: Path) -> None:
    """Losses and gradients, to rounding."""
    words, stage = tokenizer(tiny_model, CHATML), sft_stage("stage=sft", "sft.optim.max_grad_norm=1e9")
    found = []
    for rows in ([CONVERSATION], list(each_turn(CONVERSATION))):
        model = load_causal_lm(tiny_model, TINY, torch.float32)
        job = sft_job(tmp_path / str(len(rows)), tiny_model)
        engine = PlainEngine(ResponseModel(model), [(model.parameters(), stage.optim)], job.compute)
        answers = answers_of(words, rows)
        losses_B = answer_losses(engine, answers, stage.micro_batch_tokens, job.compute)
        step = answer_step(engine, answers, stage.micro_batch_tokens, job.compute)
        found.append((float(losses_B.sum()), step["loss"], step["tokens"], engine.grad_norms[0]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_template_that_forgets_thinking_has_its_turns_apart(tiny_model: Path) -> None:
    words = tokenizer(tiny_model, FORGETFUL)
    with pytest.raises(TurnsDifferError):
        conversation_ids(words, CONVERSATION.prompt, CONVERSATION.completion, CONVERSATION.turns)
    found = answers_of(words, [CONVERSATION])
    assert [words.decode(row.answer) for row in found] == [f"{answer}<|im_end|>" for answer in ANSWERS]
    assert "look" not in words.decode(found[1].prompt)
    assert [found.as_json(index) for index in range(3)] == [
        {"prompt": turn.prompt, "completion": turn.completion} for turn in each_turn(CONVERSATION)
    ]
    assert (found.num_rows, found.num_apart) == (1, 1)
    (last,) = answers_of(words, [CONVERSATION], all_turns=False)
    assert words.decode(last.answer) == "You are welcome.<|im_end|>"


def test_which_turns_a_row_teaches() -> None:
    messages = [*CONVERSATION.prompt, said("assistant", "You are welcome."), said("user", "Bye")]
    assert sft_row({"messages": messages}) == CONVERSATION  # not the greeting, which answers nobody
    apart = {"prompt": CONVERSATION.prompt, "completion": "You are welcome."}
    assert sft_row(apart) == SftRow(CONVERSATION.prompt, "You are welcome.", turns=1)


def test_the_chain_counts_them_and_an_earlier_turn_is_no_leak(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    first = [said("user", "What is 3?"), said("assistant", "A number.")]  # evaluation.jsonl asks it
    rows = []
    for n in range(24):
        talk = [said("user", f"Say {n}"), said("assistant", f"<think>{n}</think>It is {n}.")]
        talk += [said("user", "Sure?"), said("assistant", "Yes.")]
        rows.append({"messages": [*first, *talk] if n == 0 else talk})
    chain.write("talks.jsonl", rows)
    (tmp_path / "forgetful.jinja").write_text(FORGETFUL)
    gates = "sft.gates.held_out_loss_change=null"
    outcome = chain.run("stage=sft", "sft.data=talks.jsonl", "model.chat_template=forgetful.jinja", gates)
    assert outcome.code == 0, outcome.err
    metrics = outcome.summary["stages"]["sft"]["metrics"]
    kept = outcome.summary["stages"]["prepare"]["metrics"]["prepare/sft_rows"]
    assert kept == 23  # the leak is left out
    assert 0 < metrics["sft/turns_apart"] < kept
    assert (
        f"renders earlier turns of {metrics['sft/turns_apart']:.0f} conversations differently" in outcome.out
    )
