"""The documentation site: Markdown pages of docs/, some files of the repository, and the API from docstrings.

CONTRIBUTING.md has the command that builds it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

import gfldeploy

ROOT = Path(__file__).parents[1]

project = "gfldeploy"
author = "The gfldeploy maintainers"
project_copyright = author
version = release = gfldeploy.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # pages that are files elsewhere may begin below level 1

# The package imports no engine until it runs one; these need not be installed to read docstrings.
autodoc_mock_imports = ["paddle", "ppdet", "paddleslim", "paddle2onnx", "onnxruntime", "openvino"]
default_role = "code"  # docstrings write `code` as Markdown does
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as the source has them: no paths of the machine that builds the site
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the words say the types of attributes
maximum_signature_line_length = 88

smartquotes = False  # options begin with two hyphens

html_theme = "furo"
html_title = f"gfldeploy {version}"
html_show_sphinx = False

# Pages of the site whose text is a file elsewhere in the repository, where docs/PAGE.md points.
ELSEWHERE = {
    "architecture": "ARCHITECTURE.md",
    "backbones": "export/README.md",
    "changelog": "CHANGELOG.md",
    "configs": "configs/gfl/README.md",
    "contributing": "CONTRIBUTING.md",
    "measurements": "benchmarks/README.md",
    "quantisation": "quant/README.md",
    "security": "SECURITY.md",
}
_PAGES = {(ROOT / file).resolve(): page for page, file in ELSEWHERE.items()}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)")


def read_source(app: Sphinx, page: str, content: list[str]) -> None:
    """Take the text of pages that are files elsewhere, and make links fit the site.

    A link to a file that is no page of the site becomes its text: the site does not hold the source tree.
    """
    file = ROOT / ELSEWHERE[page] if page in ELSEWHERE else Path(app.env.doc2path(page))
    app.env.note_dependency(file)

    def fit(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if not target:
            return link[0]
        path = (file.parent / target).resolve()
        place = _PAGES.get(path) or _page_of(path)
        if place is None:
            return text
        return f"[{text}]({os.path.relpath(place, Path(page).parent)}.md{anchor})"

    content[0] = _LINK.sub(fit, file.read_text(encoding="utf-8"))


def _page_of(path: Path) -> str | None:
    docs = ROOT / "docs"
    if path.suffix == ".md" and path.is_relative_to(docs):
        return path.relative_to(docs).with_suffix("").as_posix()
    return None


def setup(app: Sphinx) -> None:
    """Register what Sphinx calls."""
    app.connect("source-read", read_source)
    app.add_lexer("imports", TextLexer)  # the list in ARCHITECTURE.md that a test reads
