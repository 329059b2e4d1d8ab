"""Hooks of mkdocs.yml: generated parts of the documentation, and repository files that pages link to.

Called by `mkdocs build --strict`. Links out of docs/ (`../examples/...`, `../CONTRIBUTING.md`) work on a code host
unchanged; for the site, the files are copied and the links point to the copies.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from megatron_capgap.config import help

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()[\w./-]+(?=[)#])")
REFERENCE = """# Configuration reference

Every key of a configuration file, generated from the schema. `python -m megatron_capgap STAGE --help` prints the same.

"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the configuration reference and every file outside docs/ that a page links to."""
    files.append(File.generated(config, "configuration_reference.md", content=REFERENCE + help.reference()))
    pages = [file for file in files if file.src_uri.endswith(".md")]
    while pages:
        page = pages.pop()
        for path in _links(page.src_uri, page.content_string):
            if files.get_file_from_path(path) is None and (ROOT / path).is_file():
                level = InclusionLevel.NOT_IN_NAV if "/" in path else InclusionLevel.INCLUDED
                file = File.generated(config, path, abs_src_path=str(ROOT / path), inclusion=level)
                files.append(file)
                pages += [file] if path.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links into the repository to links within the site, and inserts the import table."""
    here = posixpath.dirname(page.file.src_uri)
    markdown = markdown.replace("<!-- import table -->", import_table())
    return LINK.sub(lambda link: posixpath.relpath(_in_site(page.file.src_uri, link[0]), here or "."), markdown)


def import_table() -> str:
    """Markdown table of allowed imports between folders, from `ROOMS` in tests/unit/test_architecture.py."""
    tree = ast.parse((ROOT / "tests/unit/test_architecture.py").read_text())
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id.startswith(("_", "ROOMS")):
                exec(compile(ast.Module([node], []), "ROOMS", "exec"), values)
    rows = [(room, ", ".join(f"`{other}`" for other in sorted(below))) for room, below in values["ROOMS"].items()]
    return "\n".join(["| folder | may import |", "|---|---|", *(f"| `{room}` | {below} |" for room, below in rows)])


def _links(source: str, markdown: str) -> Iterator[str]:
    yield from (_in_site(source, link[0]) for link in LINK.finditer(markdown))


def _in_site(source: str, link: str) -> str:
    """Site path of a link target: docs/ is the site's root, other files of the repository are copied beside it."""
    page = f"docs/{source}" if (ROOT / "docs" / source).is_file() or source == "configuration_reference.md" else source
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link)).removeprefix("docs/")
