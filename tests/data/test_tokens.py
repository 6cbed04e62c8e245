"""Token ids are made once, on all cores, and a rank reads those of its share."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest

from helpers.encoded import MANY, TALK, answers_of, ids_of, on_one_core, pairs_of, stored, wanted
from helpers.jobs import TINY, small_job, tiny_base, user
from rlhf.config import ConfigError
from rlhf.data.answers import Answers
from rlhf.data.arrow import ArrowWriter, map_table, pick_batches
from rlhf.data.chat_template import Encoded, exchange_ids, prompt_ids
from rlhf.data.cores import MIN_PIECES, on_all_cores
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PairRow, SftRow
from rlhf.data.tokens import TokenIds, TokenWriter, batch_of, write_tokens
from rlhf.distributed.batching import equal_tokens, shuffled_batches
from rlhf.distributed.compute import Compute
from rlhf.models.base import load_tokenizer


def rows(number: int) -> list[SftRow]:
    return [SftRow(user(f"Größe {n} 🙂"), "x" * (n % 5) + "é") for n in range(number)]


def test_pieces_keep_their_order_and_stay_here_if_they_are_few() -> None:
    def worked(piece: int) -> tuple[int, int]:
        return piece * piece, os.getpid()

    few = [*on_all_cores(worked, range(MIN_PIECES - 1))]
    assert few == [(piece * piece, os.getpid()) for piece in range(MIN_PIECES - 1)]
    squares, workers = zip(*on_all_cores(worked, range(100)), strict=True)
    assert squares == tuple(piece * piece for piece in range(100))
    assert len(os.sched_getaffinity(0)) == 1 or os.getpid() not in workers


def test_an_error_of_a_worker_is_raised_here() -> None:
    def refuse(piece: int) -> int:
        if piece == 40:
            raise ConfigError("the fortieth")
        return piece

    with pytest.raises(ConfigError, match="the fortieth"):
        list(on_all_cores(refuse, range(100)))


class TwoPartError(Exception):
    """It cannot be unpickled: pickle calls it with the one argument of `args`."""

    def __init__(self, place: str, fault: str) -> None:
        super().__init__(f"{place}: {fault}")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core has no workers")
def test_an_error_that_cannot_be_unpickled_keeps_its_text() -> None:
    def refuse(piece: int) -> None:
        raise TwoPartError(f"row {piece}", "no answer")

    with pytest.raises(RuntimeError, match=r"^TwoPartError: row 0: no answer$"):
        list(on_all_cores(refuse, range(100)))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core has no workers")
def test_a_worker_that_is_killed_is_told() -> None:
    def die(piece: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ConfigError, match="was killed"):
        list(on_all_cores(die, range(100)))


KILLS_ITS_PARENT = """
import os, signal
from rlhf.data.cores import on_all_cores
def kill(piece):
    os.kill(os.getppid(), signal.SIGKILL)
list(on_all_cores(kill, range(100)))
"""


def test_workers_end_when_their_parent_is_killed() -> None:
    """They hold its output: `communicate` waits for the last of them."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLS_ITS_PARENT], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as parent:
        parent.communicate(timeout=120)
    assert parent.returncode == -9 or len(os.sched_getaffinity(0)) == 1


WANTS_NO_MORE = """
import os
from rlhf.data.cores import on_all_cores
nobody_writes, writer = os.pipe()
def work(piece):
    if piece:
        os.read(nobody_writes, 1)
    return piece
results = on_all_cores(work, range(100))
print(next(results))
results.close()
print("closed")
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core has no workers")
def test_workers_leave_their_pieces_when_nobody_wants_the_results() -> None:
    """As after Ctrl-C. These pieces would never end."""
    with subprocess.Popen([sys.executable, "-c", WANTS_NO_MORE], stdout=subprocess.PIPE, text=True) as parent:
        try:
            out, _ = parent.communicate(timeout=60)
        finally:
            parent.kill()
    assert (out.split(), parent.returncode) == (["0", "closed"], 0)


STOPPED_AS_IT_FORKS = """
import os, signal
from rlhf.data.cores import on_all_cores
from rlhf.distributed.signals import Stopped, StopSignals
signals, fork, workers = StopSignals(), os.fork, []
def interrupted():
    workers.append(fork())
    if workers[-1] and len(workers) == len(os.sched_getaffinity(0)):
        os.kill(os.getpid(), signal.SIGINT)
        while signals.received is None:
            pass
    return workers[-1]
os.fork = interrupted
with signals.installed(), signals.watchdog(lambda signum, is_second: os._exit(3)):
    try:
        list(on_all_cores(str, range(100)))
    except Stopped:
        print("stopped")
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core has no workers")
def test_ctrl_c_while_workers_are_forked_ends_them() -> None:
    """Workers that the pool does not know wait for the parent's end, which would wait for theirs."""
    command = [sys.executable, "-c", STOPPED_AS_IT_FORKS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        try:
            out, _ = parent.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
    assert (out, parent.returncode) == ("stopped\n", 0)


def test_a_file_of_ids_is_what_the_rows_encode_to_on_any_number_of_cores(
    tmp_path: Path, tiny_model: Path
) -> None:
    tokenizer, data = (
        load_tokenizer(tiny_model, TINY),
        [*rows(MANY), SftRow([], "plain"), SftRow(TALK, "29029")],
    )
    write_tokens(tmp_path / "all", tokenizer, data)
    with on_one_core():
        write_tokens(tmp_path / "one", tokenizer, data)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "all").read_bytes()
    assert stored(TokenIds(tmp_path / "all")) == wanted(tokenizer, data)


def test_a_shared_prefix_is_what_two_neighbours_begin_with(tmp_path: Path) -> None:
    """Of sequences that another file's pieces part, also of long prefixes and of none."""
    draw = random.Random(0)
    lists = [[1] * draw.choice([0, 1, 63, 64, 65, 130, 200]) + [draw.randrange(2, 4)] for _ in range(300)]
    lists[7] = []
    writer = TokenWriter(tmp_path / "ids", "digest")
    with writer.file:
        for begin in range(0, 300, 40):
            some = lists[begin : begin + 40]
            writer.add(batch_of([Encoded(each, [])] for each in some), len(some))
    ids = TokenIds(tmp_path / "ids")
    assert [ids[place].tolist() for place in ids.row] == lists
    places = sorted(draw.sample(range(300), 200))
    for most in (1, 100, 1000):
        cut = [lists[place][:most] for place in places]
        wanted = [0, *(equal_tokens(one, other) for one, other in pairwise(cut))]
        found = ids.shared_prefix(numpy.array(places), numpy.array([len(each) for each in cut], numpy.int32))
        assert found.tolist() == wanted


def test_picked_rows_lie_in_the_pieces_of_rows_that_are_added(tmp_path: Path) -> None:
    texts = ["é" * (3_000_000 if number in (1500, 1501, 1502) else number % 50) for number in range(3000)]
    schema, kept = pyarrow.schema([("row", pyarrow.string())]), [n for n in range(3000) if n % 7]
    with ArrowWriter(tmp_path / "all", schema) as file:
        for begin in range(0, 3000, 130):
            file.add_batch(pyarrow.record_batch({"row": texts[begin : begin + 130]}))
    with ArrowWriter(tmp_path / "added", schema) as file:
        for number in kept:
            file.add({"row": texts[number]})
    with ArrowWriter(tmp_path / "picked", schema) as file:
        lengths = numpy.array([len(texts[number]) for number in kept])
        for batch in pick_batches(map_table(tmp_path / "all"), numpy.array(kept), lengths):
            file.add_batch(batch)
    assert (tmp_path / "picked").read_bytes() == (tmp_path / "added").read_bytes()
    assert len(map_table(tmp_path / "picked").to_batches()) == 4  # the long ones end one early


def test_a_stage_takes_the_ids_of_prepare_and_makes_those_of_another_tokenizer(
    tmp_path: Path, tiny_model: Path
) -> None:
    tokenizer, data = load_tokenizer(tiny_model, TINY), rows(3)
    job = small_job("sft", tmp_path / "job", tiny_base(tiny_model))
    job.data.write("sft", "train", data)
    kept = job.data.tokens_path("sft", "train")
    write_tokens(kept, tokenizer, data[:1])  # fewer than there are, to know them again
    assert len(job.tokens("sft", "train", tokenizer)) == 1
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    before = {*job.run_directory.iterdir()}
    found = job.tokens("sft", "train", tokenizer)
    assert stored(found) == wanted(tokenizer, data)
    assert {*job.run_directory.iterdir()} == before  # nothing stays


class Watched(TokenIds):
    """Notes which sequences are read."""

    def __init__(self, ids: TokenIds) -> None:
        self.__dict__.update(vars(ids))
        self.read: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.read.append(int(index))
        return super().__getitem__(index)


@pytest.mark.parametrize("batch_rows", [1, 3, 8])
def test_two_ranks_read_each_row_of_a_step_once_however_uneven_their_shares(
    tiny_model: Path, batch_rows: int
) -> None:
    data = [SftRow(user("?"), "x" * length) for length in (900, 5, 4, 300, 2, 2, 1, 70, 1, 1, 8)]
    tokenizer = load_tokenizer(tiny_model, TINY)
    ids = [Watched(ids_of(tokenizer, data)) for _ in range(2)]
    for rank, own in enumerate(ids):
        answers = Answers.of(data, own, 600, all_turns=True)
        compute = Compute("cpu", "float32", rank=rank, world_size=2)
        for batch in shuffled_batches(range(len(answers)), batch_rows, 1, seed=3):
            part = answers.pick(batch)
            assert own.read == [] or batch_rows < len(data)
            for indices, weight, _ in compute.micro_batches(part.lengths.tolist(), 400):
                before = len(own.read)
                lengths = [len(part[index]) for index in indices]
                assert lengths == [int(part.lengths[index]) for index in indices]
                if not weight:  # a pass that keeps it in step reads a row again
                    del own.read[before:]
    assert sorted([*ids[0].read, *ids[1].read]) == list(range(len(data)))


def test_answers_are_cut_counted_and_left_out_by_numbers_alone(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, TINY)
    data = [SftRow(user("a"), "bc"), SftRow(user("long " * 30), "never read"), SftRow(user("a"), "b" * 200)]
    prompt = len(prompt_ids(tokenizer, user("a")))
    found = answers_of(tokenizer, data, prompt + 10)
    assert (len(found), found.num_rows, found.num_cut, found.num_apart) == (2, 2, 1, 0)
    assert found.learned.tolist() == [3, 10]  # two bytes and the end of the turn
    assert [len(row) for row in found] == found.lengths.tolist() == [prompt + 3, prompt + 10]
    assert [(row.learned, row.is_cut) for row in found] == [(3, False), (10, True)]
    assert found[1:].as_json(0) == {"prompt": user("a"), "completion": "b" * 200}
    assert not answers_of(tokenizer, [], 10)


def test_pairs_are_both_sides_and_those_that_are_too_long_are_left_out(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, TINY)
    data = [
        PairRow(user("a"), "bb", "c"),
        PairRow(user("a"), "b", "c" * 2000),
        PairRow(user("d"), "e", "", 1.5, 0.5),
    ]
    found = pairs_of(tokenizer, data)
    assert len(found) == 2
    for index, row in enumerate((data[0], data[2])):
        sides = [exchange_ids(tokenizer, row.prompt, text) for text in (row.chosen, row.rejected)]
        assert [side.tolist() for side in found[index]] == [ids for ids, _ in sides]
        assert found.lengths[index].tolist() == [len(ids) for ids, _ in sides]
        assert found.answer_lengths[index].tolist() == [len(ids) - begin for ids, begin in sides]
    first, second = found.gold_gaps()
    assert first != first and second == 1.0
    assert found.pick([1]).as_json(0) == {"prompt": user("d"), "chosen": "e", "rejected": ""}


def test_one_row_is_enough_for_a_file(tmp_path: Path, tiny_model: Path) -> None:
    data = PreparedData(tmp_path)
    data.write("sft", "train", rows(1))
    assert [*data.rows("sft", "train")] == rows(1)
    assert len(ids_of(load_tokenizer(tiny_model, TINY), rows(1))) == 1


def test_the_mean_answer_is_of_all_answers_of_training_rows(tiny_model: Path, tmp_path: Path) -> None:
    data, tokenizer = PreparedData(tmp_path), load_tokenizer(tiny_model, TINY)
    assert data.mean_answer("sft") is None
    rows = [SftRow(user("How long?"), "a" * length) for length in (3, 5, 10)]
    data.write("sft", "train", rows)
    write_tokens(data.tokens_path("sft", "train"), tokenizer, rows)
    assert data.mean_answer("sft") == 6 + 1  # a byte is a token, and one ends the turn
