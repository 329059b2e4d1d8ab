"""The documentation: the site builds without a warning and needs no network; README is short and keeps its headings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_capgap.config.fields import table
from tests.support.processes import ROOT, environment

HEADINGS = (
    "## What it is",
    "## Updates",
    "## Quick Start",
    "## Tutorials",
    "### Adaptation",
    "### Distillation",
    "### Finetuning",
    "### Evaluation",
    "## Future Work",
    "## Bugs or Questions?",
    "## Citation",
)
MOST_LINES = 200
# What a browser fetches by itself; a link that a reader follows (<a href>) may lead anywhere.
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\bsrc="(?:https?:)?//|<link(?![^>]*canonical)[^>]*href="(?:https?:)?//'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `mkdocs build --strict` builds it: a broken link or an unknown anchor is an error."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = {**environment(), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / page.with_suffix(".html").name).is_file()


def test_no_page_fetches_anything_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not FETCHED.search(page.read_text()), page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(?:https?:)?//", sheet.read_text()), sheet.name


def test_the_reference_has_every_key(site: Path) -> None:
    text = (site / "configuration_reference.html").read_text()
    for key in table().values():
        if key.name:
            assert f"<code>{key.name.rpartition('.')[2]}</code>" in text, key.name
        if key.children and key.name:
            assert f'id="{key.name.replace(".", "")}"' in text, key.name


def test_the_loss_is_described(site: Path) -> None:
    text = (site / "api.html").read_text()
    for name in ("distillation_loss", "TeacherHidden", "TeacherLogits", "TeacherTopK", "DistillationObjective"):
        assert f'id="megatron_capgap.losses.{name}"' in text, name


def test_the_import_table_is_filled_in(site: Path) -> None:
    assert "<td><code>stages</code></td>" in (site / "architecture.html").read_text()


def test_the_python_of_pages_runs() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
            exec(compile(block, page.name, "exec"), {})


def test_readme_is_short_and_keeps_its_headings() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MOST_LINES
    found = [line for line in lines if line in HEADINGS]
    assert found == list(HEADINGS)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(name: str) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / name).read_text()):
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_the_citation_is_valid() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["title"] and cited["message"]
    names = [f"{author['family-names']}, {author['given-names']}" for author in cited["preferred-citation"]["authors"]]
    assert " and ".join(names) in (ROOT / "README.md").read_text()
