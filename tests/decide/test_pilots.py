"""The log of pilots: what a process wrote, another one reads."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.decide.pilots import Ended, Pilot, PilotLog, Trial

TRIAL = Trial("sft_lora", 1 / 3, "choosing", 0)


def pilot(trial: Trial = TRIAL, start: float = 0.0, seconds: float = 10.0, ended: Ended = "done") -> Pilot:
    return Pilot(
        trial, f"demo-{trial.candidate}", start, seconds, 9.5, ended, "" if ended == "done" else "why",
        planned={"sft": 4.0, "evaluate": 5.5}, stages={"sft": 4.5} if ended == "done" else {},
    )  # fmt: skip


def test_another_process_reads_what_one_wrote(tmp_path: Path) -> None:
    log = PilotLog(tmp_path / "pilots.jsonl")
    assert log.pilots == [] and log.spent == 0.0
    log.add(pilot())
    log.add(pilot(TRIAL._replace(part="sealed", seed=2), start=10.0, ended="failed"))
    other = PilotLog(log.path)
    assert other.pilots == log.pilots and len(other.pilots) == 2
    assert isinstance(other.pilots[1].trial, Trial)
    other.add(pilot(start=20.0))
    assert PilotLog(log.path).pilots == [*log.pilots, other.pilots[2]]
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert {"candidate", "share", "part", "seed", "run", "start", "seconds", "ended"} <= lines[0].keys()
    assert lines[0]["share"] == 1 / 3 and "trial" not in lines[0]


def test_only_a_pilot_that_ran_to_its_end_is_done(tmp_path: Path) -> None:
    log = PilotLog(tmp_path / "pilots.jsonl")
    log.add(pilot(ended="stopped"))
    log.add(pilot(ended="failed"))
    assert log.done(TRIAL) is None
    log.add(pilot(start=10.0))
    log.add(pilot(start=20.0))
    log.add(pilot(start=30.0, ended="stopped"))
    assert log.done(TRIAL) == log.pilots[3]  # the newest
    for changed in ({"share": 0.5}, {"part": "sealed"}, {"seed": 1}, {"candidate": "sft"}):
        assert log.done(TRIAL._replace(**changed)) is None


def test_spent_is_the_end_of_the_last_pilot(tmp_path: Path) -> None:
    """Time between pilots is spent too, and so is that of a pilot that was stopped."""
    log = PilotLog(tmp_path / "pilots.jsonl")
    log.add(pilot(start=5.0, seconds=10.0))
    log.add(pilot(start=40.0, seconds=2.5, ended="stopped"))
    assert log.spent == PilotLog(log.path).spent == 42.5
