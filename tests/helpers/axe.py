"""The accessibility checker of browser tests: a file of the npm package axe-core."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path


def axe_script(directory: Path) -> str | None:
    """Its script, for `page.evaluate`; None where npm's cache does not have it (`npm pack axe-core@4.14.1`).

    Args:
        directory: an empty one, for what is unpacked.
    """
    if shutil.which("npm") is None:
        return None
    pack = ["npm", "pack", "--offline", "axe-core@4.14.1"]
    done = subprocess.run(pack, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    with tarfile.open(directory / done.stdout.split()[-1]) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode()
