"""The benchmark of the CPU's kernels leaves out what there is, and puts it back."""

from __future__ import annotations

import pytest
from cpu_kernels import WITHOUT, changed


@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_left_out_exists_and_comes_back(name: str) -> None:
    before = [vars(owner)[attribute] for owner, attribute, _ in WITHOUT[name]]
    with changed(WITHOUT[name]):
        assert [vars(owner)[attribute] for owner, attribute, _ in WITHOUT[name]] != before or not before
    assert [vars(owner)[attribute] for owner, attribute, _ in WITHOUT[name]] == before
