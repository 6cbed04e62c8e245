"""`prepare` makes token ids once, and the same ones on any number of cores."""

from __future__ import annotations

from contextlib import nullcontext

from helpers.encoded import MANY, TALK, on_one_core, stored, wanted
from helpers.stages import Bench
from rlhf.data.roles import ROLES
from rlhf.data.schema import Message
from rlhf.data.tokens import TokenIds


def test_prepare_writes_the_ids_of_every_role_and_of_lent_prompts(bench: Bench) -> None:
    """Also those of a conversation of several turns, and of a row that two roles read."""
    talk = [*TALK, Message(role="assistant", content="29029.")]
    bench.rows["sft"] += [{"messages": talk}]
    bench.stage()
    bench.sources |= {
        "ppo": "sft.data",
        "evaluate": "reward.pairs",
        "replay": str(bench.directory / "sft.jsonl"),
    }
    data, tokenizer = bench.prepare(), bench.job.base.load_tokenizer()
    several = 0
    for role, entry in ROLES.items():
        for split in entry.splits:
            ids = TokenIds(data.tokens_path(role, split))
            assert stored(ids) == wanted(tokenizer, data.rows(role, split)), (role, split)
            several += sum(len(ids.encoded(n).spans) > 1 for n in range(len(ids)))
    assert several == 2  # of sft and of replay
    assert [*data.rows("replay", "train")] == [*data.rows("sft", "train")]
    assert bench.summary["ppo_prompts"] == bench.summary["sft_rows"] == 41


def test_an_artifact_depends_neither_on_cores_nor_on_its_place(bench: Bench) -> None:
    bench.rows["sft"] = [{"prompt": f"sft {n}", "completion": "yes"} for n in range(MANY)]
    bench.sources["ppo"] = "sft.data"
    first = bench.prepare()
    with on_one_core():
        second = bench.prepare()
    names = sorted(path.name for path in first.directory.iterdir() if path.name != "metrics.jsonl")
    assert {"sft.train.arrow", "sft.train.tokens.arrow", "report.json"} <= {*names}
    for name in names:
        assert (first.directory / name).read_bytes() == (second.directory / name).read_bytes(), name
    assert bench.report["sft"]["read"] == MANY
    assert len(first.rows("sft", "train")) + len(first.rows("sft", "held_out")) == MANY


def test_a_limit_chooses_the_same_rows_on_all_cores_and_encodes_them_alone(bench: Bench) -> None:
    bench.rows["ppo"] = [{"prompt": f"ppo {n}"} for n in range(MANY)]
    bench.stage()
    bench.sources["ppo"] = {"path": str(bench.directory / "ppo.jsonl"), "limit": 30}
    found = []
    for cores in (nullcontext, on_one_core):
        with cores():
            data = bench.prepare()
        found.append([*data.rows("ppo", "train"), *data.rows("ppo", "held_out")])
        assert bench.report["ppo"]["removed"]["beyond limit"]["count"] == MANY - 30
        assert len(TokenIds(data.tokens_path("ppo", "train"))) == len(data.rows("ppo", "train"))
    assert found[0] == found[1] and len(found[0]) == 30


def test_an_empty_split_has_ids_too(bench: Bench) -> None:
    bench.sources["replay"] = None
    data = bench.prepare()
    ids = TokenIds(data.tokens_path("replay", "train"))
    assert (len(ids), ids.row.tolist(), ids.lengths.tolist(), ids.spans.tolist()) == (0, [], [], [])
