"""A stage whose class is derived from a packaged one, under a name of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers.chains import Chain

CONF = Path(__file__).parents[2] / "conf" / "stages"


def test_it_trains_on_the_data_of_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from rlhf.stages.dpo import DpoStage\n\n\nclass MyStage(DpoStage):\n    title = 'Mine'\n"
    )
    (tmp_path / "conf" / "stages").mkdir(parents=True)
    section = yaml.safe_load((CONF / "dpo.yaml").read_text()) | {"_target_": "mine.MyStage"}
    (tmp_path / "conf" / "stages" / "mine.yaml").write_text(yaml.safe_dump(section))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, count in (("others", 20), ("own", 11)):
        chain.write(
            f"{name}.jsonl", [{"prompt": f"Q {n}", "chosen": "Yes!", "rejected": "No."} for n in range(count)]
        )
    outcome = chain.run(
        "--config-dir=conf", "+stages@mine=mine", "stage=mine", "mine.init=base", "mine.data=own.jsonl",
        "dpo.data=others.jsonl", "mine.batch_rows=4", "gates=warn",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    advice = [gate["advice"] for gate in outcome.summary["gates"] if gate["stage"] == "mine"]
    assert "mine.data" in " ".join(advice) and "dpo." not in " ".join(advice)
    metrics = outcome.summary["stages"]["mine"]["metrics"]
    assert metrics["mine/train_rows"] + metrics["mine/held_out_rows"] == 11
