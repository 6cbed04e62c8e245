"""The documentation site: `make docs` builds it into docs/_build/html; warnings are errors."""

from __future__ import annotations

import re
from pathlib import Path

from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

from rlhf.cli.keys import markdown_page
from rlhf.cli.schema import json_schema

logger = logging.getLogger(__name__)

project = "rlhf"
copyright = "the authors of rlhf, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rlhf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).with_name("scorer.js"))
html_extra_path = ["_build/schema.json"]
html_copy_source = False
myst_heading_anchors = 4
default_role = "code"  # `NAME` in a docstring
autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Elements that load something when a page is opened, and where they name it."""

kept: dict[str, list[str]] = {}
"""Name -> docstring, before napoleon has read it."""


def write_generated() -> None:
    """The page of all keys, and the schema: they are in no commit."""
    here = Path(__file__).parent
    (here / "_build").mkdir(exist_ok=True)
    for path, text in ((here / "keys.md", markdown_page()), (here / "_build/schema.json", json_schema())):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def check_own_host(app: Sphinx, error: Exception | None) -> None:
    """Warn of every page that loads anything from another host."""
    if error is not None:
        return
    found = []
    for page in sorted(Path(app.outdir).rglob("*.html")):
        for element in BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").find_all([*LOADED]):
            address = str(element.get(LOADED[element.name], ""))
            if "//" in address and not address.startswith("data:"):
                found.append(f"{page.name}: {address}")
    for sheet in sorted(Path(app.outdir).rglob("*.css")):
        places = re.findall(r"url\([\"']?((?:https?:)?//[^)]*)", sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.name}: {place}" for place in places]
    for place in found:
        logger.warning("loads from another host: %s", place)


class Pictures(SphinxTransform):
    """`<picture>` shows the right picture on GitHub. Here the reader may choose the theme with a button,
    which `<picture>` does not see: both images are on the page, and furo hides one."""

    default_priority = 200

    def apply(self) -> None:
        """Replace every `<picture>` of a page."""
        for raw in list(self.document.findall(nodes.raw)):
            picture = BeautifulSoup(raw.astext(), "html.parser").picture
            if picture is None:
                continue
            shown = nodes.paragraph()
            for theme, element, place in (("light", picture.img, "src"), ("dark", picture.source, "srcset")):
                assert picture.img is not None and element is not None, raw.astext()
                words = {"uri": str(element[place]), "alt": str(picture.img["alt"])}
                shown += nodes.image("", classes=[f"only-{theme}"], **words)
            raw.replace_self(shown)


def keep(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """An attribute's text as it is written: napoleon takes what stands before its first colon for a type."""
    kept[name] = list(lines)


def restore(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Undo what napoleon made of it."""
    text = kept.pop(name)
    if what in ("attribute", "data", "property"):
        lines[:] = text


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    write_generated()
    app.add_transform(Pictures)
    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", restore, priority=600)
    app.connect("build-finished", check_own_host)
