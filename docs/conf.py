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

LOADING_ATTRIBUTES = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""HTML element that loads a resource -> the attribute with its address."""

docstrings: dict[str, list[str]] = {}
"""Name -> lines of its docstring before napoleon changes them."""


def write_generated() -> None:
    """Write the page of all keys and the schema, which are not in git."""
    here = Path(__file__).parent
    (here / "_build").mkdir(exist_ok=True)
    for path, text in ((here / "keys.md", markdown_page()), (here / "_build/schema.json", json_schema())):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def check_own_host(app: Sphinx, error: Exception | None) -> None:
    """Warn about each page and style sheet that loads something from another host."""
    if error is not None:
        return
    addresses = []
    for page in sorted(Path(app.outdir).rglob("*.html")):
        for element in BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").find_all(
            [*LOADING_ATTRIBUTES]
        ):
            address = str(element.get(LOADING_ATTRIBUTES[element.name], ""))
            if "//" in address and not address.startswith("data:"):
                addresses.append(f"{page.name}: {address}")
    for sheet in sorted(Path(app.outdir).rglob("*.css")):
        places = re.findall(r"url\([\"']?((?:https?:)?//[^)]*)", sheet.read_text(encoding="utf-8"))
        addresses += [f"{sheet.name}: {place}" for place in places]
    for address in addresses:
        logger.warning("loads from another host: %s", address)


class Pictures(SphinxTransform):
    """Puts both images of a `<picture>` on the page, of which furo hides one. `<picture>` alone works on
    GitHub, but not on this site, where a button chooses the theme."""

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


def save_docstring(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Save the text of an attribute: napoleon would take the words before its first colon for a type."""
    docstrings[name] = list(lines)


def restore_docstring(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Undo napoleon's change of an attribute's text."""
    text = docstrings.pop(name)
    if what in ("attribute", "data", "property"):
        lines[:] = text


def setup(app: Sphinx) -> None:
    """Register this file's hooks. Sphinx calls it."""
    write_generated()
    app.add_transform(Pictures)
    app.connect("autodoc-process-docstring", save_docstring, priority=400)
    app.connect("autodoc-process-docstring", restore_docstring, priority=600)
    app.connect("build-finished", check_own_host)
