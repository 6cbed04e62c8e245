"""docs/python.md, as a notebook: in a real kernel, whose main thread has a running event loop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
IN_A_LOOP = "import asyncio; assert asyncio.get_running_loop().is_running()"
PATIENCE_SECONDS = 300


def shown(cell: Any) -> str:
    """What a cell printed and what its last line is."""
    return "".join(each.get("text", "") or each["data"].get("text/plain", "") for each in cell.outputs)


@pytest.mark.slow
def test_its_cells_run_in_a_notebook(tmp_path: Path) -> None:
    codes = [IN_A_LOOP, *re.findall(r"```python\n(.*?)```", PAGE, re.S)]
    cells = [nbformat.v4.new_code_cell(code) for code in codes]  # type: ignore[no-untyped-call]  # it has none
    notebook = nbformat.v4.new_notebook(cells=cells)  # type: ignore[no-untyped-call]  # nor this
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=PATIENCE_SECONDS, resources=resources).execute()
    _, first, figures, policies, page, several, error = notebook.cells
    assert "dpo done in" in shown(first) and "runs/first: " in shown(first)
    assert "; cannot be told; Your data and settings work" in shown(first)
    assert "cannot be told | Your data and settings work" in shown(figures) and "margin" in shown(figures)
    assert shown(policies) == ""
    assert "runs/first/report.html" in shown(page)
    assert "sft" not in shown(several) and "0.05" in shown(several)  # quiet
    assert "dpo.betta: there is no such key. Did you mean dpo.beta?" in shown(error)
