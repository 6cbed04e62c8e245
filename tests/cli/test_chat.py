"""`chat`: template, stop tokens and history are right, and a model's text does not command the terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.chains import Chain, Outcome, run_main
from helpers.jobs import TINY, on_cpu
from rlhf.cli.chat import SamplingParams
from rlhf.cli.chat_session import ChatSession
from rlhf.generation.policy_model import PolicyModel

GREEDY = SamplingParams(
    max_new_tokens=12, temperature=0.0, top_p=1.0, seed=0, precision="fp32", device="cpu", system=""
)
STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def say(chain: Chain, text: str, *words: str) -> Outcome:
    """What comes through a pipe, answered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(text))
        return run_main(chain.directory, ("chat", "run_name=run1", *words), chain.directory)


def greedy(directory: Path, messages: list[dict[str, str]]) -> str:
    """What transformers alone answers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def test_a_pipe_is_answered_as_transformers_answers(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, outcome = finished_chain
    quiet = ("temperature=0", "max_new_tokens=12", "precision=fp32")
    for policy in ("sft", "ppo"):
        found = say(chain, "Say 3\n", f"policy={policy}", *quiet)
        assert (found.code, found.err) == (0, ""), found.err
        expected = greedy(outcome.artifact(policy), [{"role": "user", "content": "Say 3"}])
        assert found.out.strip() == CONTROL.sub(lambda each: repr(each[0])[1:-1], expected)


def test_without_a_policy_the_one_that_was_judged_answers_and_the_base_model_can(
    finished_chain: tuple[Chain, Outcome],
) -> None:
    chain, _ = finished_chain
    assert say(chain, "hi", "temperature=0").out == say(chain, "hi", "temperature=0", "policy=ppo").out
    both = say(chain, "hi", "policy=[base,ppo]", "temperature=0").out
    assert both.startswith("base:\n") and "\nppo:\n" in both


def test_a_directory_answers_without_a_run(finished_chain: tuple[Chain, Outcome], tmp_path: Path) -> None:
    directory = finished_chain[1].artifact("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO("Say 3"))
        words = ("chat", f"policy={directory}", "temperature=0", "max_new_tokens=12", "precision=fp32")
        found = run_main(tmp_path, words, tmp_path)
    assert found.code == 0, found.err
    assert found.out == say(finished_chain[0], "Say 3", "policy=sft", *words[2:]).out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("policy=pppo",), "policy=pppo: runs/run1 has no such policy, and there is no model in"),
        (("policy=[base,sft,ppo]",), "at most two can answer side by side"),
        (("run_name=nowhere",), "run_name=nowhere: there is no such run"),
        (("temperature=-1",), "chat.temperature='-1': it must be greater than or equal to 0"),
        (("max_new_tokens=many",), "chat.max_new_tokens='many': it must be a valid integer"),
        (("temprature=1",), "Did you mean temperature?"),
    ],
)  # fmt: skip
def test_a_slip_is_said_before_anything_is_loaded(
    finished_chain: tuple[Chain, Outcome], words: tuple[str, ...], complaint: str
) -> None:
    found = say(finished_chain[0], "hi", *words)
    assert (found.code, complaint in found.err) == (2, True), found.err


def test_nothing_through_the_pipe_is_said(finished_chain: tuple[Chain, Outcome]) -> None:
    found = say(finished_chain[0], "\n")
    assert found.code == 2 and "nothing came through the pipe" in found.err


def test_other_bytes_than_text_are_said(finished_chain: tuple[Chain, Outcome]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
        words = ("chat", "run_name=run1", "policy=sft")
        found = run_main(finished_chain[0].directory, words, finished_chain[0].directory)
    assert found.code == 2 and "is not utf-8 text (byte 3)" in found.err


def test_a_reward_model_cannot_talk(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, outcome = finished_chain
    found = say(chain, "hi", f"policy={outcome.artifact('reward')}")
    assert found.code == 2 and "gives scores and no text" in found.err


def test_what_a_model_writes_does_not_command_the_terminal(finished_chain: tuple[Chain, Outcome]) -> None:
    """Hot, the tiny model draws bytes almost evenly: many of 300 are control characters."""
    found = say(finished_chain[0], "hi", "policy=base", "temperature=50", "max_new_tokens=300")
    assert found.code == 0 and "\\x" in found.out
    assert not CONTROL.search(found.out.replace("\n", ""))


@pytest.fixture
def session(tiny_model: Path) -> ChatSession:
    return ChatSession("tiny", PolicyModel.load(tiny_model, TINY, on_cpu()), GREEDY)


def test_each_turn_is_asked_behind_the_ones_before_it_until_they_are_forgotten(
    session: ChatSession, tiny_model: Path
) -> None:
    said: list[str] = []
    session.answer("One", said.append)
    first = "".join(said).strip()
    assert first == greedy(tiny_model, [{"role": "user", "content": "One"}])
    said.clear()
    assert session.answer("Two", said.append) == "cut"
    assert "".join(said).strip() == greedy(
        tiny_model,
        [
            {"role": "user", "content": "One"}, {"role": "assistant", "content": first},
            {"role": "user", "content": "Two"},
        ],
    )  # fmt: skip
    session.reset()
    said.clear()
    session.answer("One", said.append)
    assert "".join(said).strip() == first and len(session.turns) == 2


def test_ctrl_c_stops_an_answer_whose_begin_stays_in_the_conversation(session: ChatSession) -> None:
    said: list[str] = []

    def show(piece: str) -> None:
        said.append(piece)
        if len(said) == 5:
            raise KeyboardInterrupt

    assert session.answer("One", show) == "stopped"
    assert session.turns[-1]["role"] == "assistant" and len(session.turns) == 2


def test_a_full_context_is_said_and_the_turn_is_not_kept(session: ChatSession) -> None:
    from rlhf.config import ConfigError

    with pytest.raises(ConfigError, match=r"tiny: the conversation has \d+ tokens, and the model reads 1024"):
        session.answer("x" * 1100, lambda piece: None)
    assert session.turns == []


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, directory: Path, *words: str) -> None:
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.chdir(directory)
            os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
            os.execv(sys.executable, [sys.executable, "-m", "rlhf", *words])
        self.said = ""

    def wait_for(self, pattern: str) -> None:
        """Read until it stands behind what was found before."""
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < deadline and select.select([self._file], [], [], 60)[0], self.said
            self.said += STYLE.sub("", os.read(self._file, 4096).decode(errors="replace"))
        self.said = self.said[found.end() :]

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def interrupt_prompt(self) -> None:
        """Ctrl-C while it waits for a key: Python does not notice one right before it begins to wait."""
        process, deadline = psutil.Process(self.pid), time.monotonic() + 60
        while process.status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline, process.status()
            time.sleep(0.01)
        self.type("\x03")

    def ended(self) -> int:
        """The exit code."""
        code = psutil.Process(self.pid).wait(timeout=60)
        os.close(self._file)
        assert code is not None
        return int(code)


@pytest.mark.slow
def test_in_a_terminal_answers_stream_and_ctrl_c_stops_them_then_the_program(
    finished_chain: tuple[Chain, Outcome],
) -> None:
    words = ("chat", "run_name=run1", "policy=sft", "temperature=0", "max_new_tokens=1000")
    terminal = Terminal(finished_chain[0].directory, *words)
    terminal.wait_for(r"sft of runs/run1, temperature 0\. /reset forgets, /quit ends\.\r\n.*> ")
    terminal.type("hello\n")
    terminal.wait_for(r"hello\r\n.")  # the first token: a thousand take a second or more
    terminal.type("\x03")
    terminal.wait_for(r"\(stopped\)\r\n.*> ")
    terminal.type("/reset\n")
    terminal.wait_for(r"The conversation is forgotten\.\r\n.*> ")
    terminal.type("/what\n")
    terminal.wait_for(r"Commands: /reset, /quit\.\r\n.*> ")
    terminal.interrupt_prompt()
    assert terminal.ended() == 0


@pytest.mark.slow
def test_in_a_terminal_two_answer_side_by_side(finished_chain: tuple[Chain, Outcome]) -> None:
    words = ("chat", "run_name=run1", "policy=[sft,ppo]", "max_new_tokens=8")
    terminal = Terminal(finished_chain[0].directory, *words)
    terminal.wait_for(r"/quit ends\.\r\n.*> ")
    terminal.type("hello\n")
    terminal.wait_for(r"sft +ppo")
    terminal.wait_for(r"> ")
    terminal.type("/quit\n")
    assert terminal.ended() == 0
