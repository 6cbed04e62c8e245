"""A stage that reads two models by its own keys: one that it starts from, and a teacher."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers.chains import Chain
from helpers.experiments import build_stage
from rlhf.config import Strict
from rlhf.pipeline.fields import Memory, Model
from rlhf.pipeline.key import knobs
from rlhf.stages.dpo import DpoStage

CODE = """
from rlhf.pipeline.fields import Model
from rlhf.pipeline.stage import Stage


class DistilStage(Stage):
    init: Model
    teacher: Model | None

    def run(self, job):
        files = [job.start(each) for each in (self.init, self.teacher) if each]
        text = "\\n".join(f"{each.directory} {each.identity}" for each in files)
        (job.directory / "read.txt").write_text(text)
        return {}
"""


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    made = Chain(tmp_path)
    (tmp_path / "distil_stage.py").write_text(CODE)
    (tmp_path / "conf" / "stages").mkdir(parents=True)
    (tmp_path / "conf" / "stages" / "distil.yaml").write_text(
        "_target_: distil_stage.DistilStage\ninit: base\nteacher: null\ngates: {}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "distil_stage", raising=False)
    return made


MOUNTED = ("--config-dir=conf", "+stages@distil=distil", "stage=distil")


def test_the_content_of_both_is_in_the_key(chain: Chain, tiny_model: Path) -> None:
    teacher = chain.directory / "teacher"
    teacher.mkdir()
    for path in tiny_model.iterdir():
        (teacher / path.name).write_bytes(path.read_bytes())

    def run(*overrides: str) -> tuple[str, str]:
        outcome = chain.run(*MOUNTED, *overrides)
        assert outcome.code == 0, outcome.err
        return outcome.statuses["distil"], (outcome.artifact("distil") / "read.txt").read_text()

    alone = run()
    first = run("distil.teacher=teacher")
    assert alone[0] == first[0] == "ran" and first[1].splitlines()[0] == alone[1]
    assert run("distil.teacher=teacher") == ("reused", first[1])
    (chain.directory / "teacher").rename(chain.directory / "moved")
    assert run("distil.teacher=moved")[0] == "reused"  # the content decides
    weights = load_file(chain.directory / "moved" / "model.safetensors")
    save_file(
        {name: 3 * value for name, value in weights.items()}, chain.directory / "moved" / "model.safetensors"
    )
    changed = run("distil.teacher=moved")
    assert changed[0] == "ran" and changed[1].split()[-1] != first[1].split()[-1]
    assert run("distil.init=moved", "distil.teacher=base")[0] == "ran"


def test_a_stage_that_it_names_is_read(chain: Chain) -> None:
    outcome = chain.run(*MOUNTED, "distil.teacher=sft")
    assert outcome.code == 0 and {"sft", "distil"} <= outcome.statuses.keys(), outcome.err


def test_of_a_model_in_a_section_the_place_is_in_no_key() -> None:
    class Teachers(Strict):
        first: Model
        rows: Memory

    class TaughtStage(DpoStage):
        teachers: Teachers

    def key_of(teacher: str, rows: int) -> dict[str, Any]:
        keys = dict(build_stage(DpoStage)) | {"teachers": Teachers(first=teacher, rows=rows)}
        return knobs(TaughtStage.model_construct(**keys))

    one, moved, base = key_of("./teacher", 1), key_of("elsewhere/teacher", 2), key_of("base", 1)
    assert one == moved != base and one["teachers"] == {"first": "directory"}
    assert "micro_batch_tokens" not in one and "data" not in one and one["init"] == "sft"


AS_POLICY = '    title = "Distilled"\n    makes = "policy"\n    init: Model\n'


def write(chain: Chain, old: str, new: str) -> None:
    (chain.directory / "distil_stage.py").write_text(CODE.replace(old, new))
    sys.modules.pop("distil_stage", None)


def test_it_cannot_be_its_own_teacher(chain: Chain) -> None:
    write(chain, "    init: Model\n", AS_POLICY)
    outcome = chain.run(*MOUNTED, "distil.teacher=distil")
    assert outcome.code == 2 and "distil.teacher=distil: a stage cannot read what it makes" in outcome.err


def test_what_publishes_a_policy_and_writes_none_is_told(chain: Chain) -> None:
    write(chain, "    init: Model\n", AS_POLICY)
    outcome = chain.run(*MOUNTED)
    assert outcome.code == 2, outcome.err
    assert "distil: DistilStage publishes a policy, and its run has written no config.json" in outcome.err
    assert not [*(chain.directory / "store").glob("distil/[!.]*")]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("if view.directory == 5: raise ValueError", 0),  # it returns None
        ("return 'distil.init: no.'", 2),
        ("yield 'distil.init: no.'", 2),
        ("from rlhf.config import Complaint; return Complaint('distil.init', 'no.')", 2),
    ],
)
def test_a_complaint_may_be_returned_yielded_or_none(chain: Chain, line: str, code: int) -> None:
    run = "    def run(self, job):"
    write(chain, run, f"    def complaints(self, view):\n        {line}\n\n{run}")
    outcome = chain.run(*MOUNTED)
    assert outcome.code == code and (code == 0 or "Error: distil.init: no.\n" in outcome.err), outcome.err


def test_a_name_of_nothing_is_refused_before_the_run(chain: Chain) -> None:
    outcome = chain.run(*MOUNTED, "distil.teacher=ppoo")
    assert outcome.code == 2 and "distil.teacher=ppoo: no config.json there. Did you mean ppo?" in outcome.err


@pytest.mark.parametrize("returned", ["None", "{'loss': 'low'}", "[('loss', 1.0)]"])
def test_what_is_no_mapping_of_numbers_is_told(chain: Chain, returned: str) -> None:
    write(chain, "return {}", f"return {returned}")
    outcome = chain.run(*MOUNTED)
    assert outcome.code == 2, outcome.err
    assert "distil: DistilStage.run returned " in outcome.err and "Return its summary metrics" in outcome.err
