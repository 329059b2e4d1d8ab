"""Every command in README.md and the pages of docs/ is run as it stands there, on a small corpus and for two steps."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from megatron_capgap.config.loader import load
from tests.support.processes import ROOT, environment
from tools import make_sweep, prepare_blend

PYTHON = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
# CI itself, and what takes minutes; their configurations have tests of their own.
EXAMPLES = {f"bash examples/{name}/run.sh" for name in ("quickstart", "smollm2", "evaluation", "law_sweep")}
SCRIPTS = {"bash tests/run.sh", "bash tests/run.sh --quick", *EXAMPLES}
# The site has a test of its own.
LEFT_OUT = {*SCRIPTS, "python -m mkdocs build --strict"}
# They measure, for minutes; that of the releases needs an environment for each.
BENCHMARKS = "python benchmarks/"
# Nothing later needs what these leave, so that they run beside the others, one after the other.
ENDS = re.compile(r" --check\b| evaluate | verify |generate\.py|fit_law\.py|runs/adapt_zh|runs/taught|prepare_blend")


def pages() -> list[Path]:
    """README.md, then the site's pages in the order of its navigation, in which their commands build on each other."""
    names = re.findall(r"^ +- [^:]+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    found = [folder / name for name in names for folder in (ROOT / "docs", ROOT) if (folder / name).is_file()]
    assert {*(ROOT / "docs").glob("*.md")} <= {*found}
    return [ROOT / "README.md", *found]


def commands() -> list[str]:
    """The commands of their bash blocks, each once; a backslash continues a line."""
    blocks = [block for page in pages() for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)]
    lines = [line for block in blocks for line in re.sub(r" \\\n +", " ", block).splitlines()]
    return list(dict.fromkeys(line for line in lines if line.strip()))


def run(line: str, folder: Path) -> None:
    """Runs a command of a page, which must succeed, with fewer and smaller steps."""
    program, *words = shlex.split(line)
    if {"adapt", "distill", "finetune"} & set(words) and "--check" not in line:
        words += ["--train.steps=2", "--train.global_batch=8"]
    if "prune" in words:
        words += ["--prune.batches=1", "--train.global_batch=8"]
    if "examples/tutorial/data.py" in words:
        words += ["--megabytes", "1"]
    done = subprocess.run(
        [*PYTHON[program], *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow("starts an interpreter for each of some thirty commands")
def test_the_commands_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "tutorial", tmp_path / "examples" / "tutorial")
    (tmp_path / "examples" / "law_sweep").symlink_to(ROOT / "examples" / "law_sweep")
    for name in ("tools", "megatron_capgap"):
        (tmp_path / name).symlink_to(ROOT / name)
    wanted = [line for line in commands() if line not in LEFT_OUT and not line.startswith(BENCHMARKS)]
    for stage in ("distill", "finetune", "evaluate"):
        assert any(f" {stage} " in line for line in wanted)
    with ThreadPoolExecutor(1) as aside:
        ends = [aside.submit(run, line, tmp_path) if ENDS.search(line) else run(line, tmp_path) for line in wanted]
        for end in filter(None, ends):
            end.result()
    assert (tmp_path / "runs" / "distill" / "latest").read_text() == "step_2\n"
    assert (tmp_path / "runs" / "finetune" / "best").read_text() == "step_2\n"
    assert 0 <= json.loads((tmp_path / "results.json").read_text())["results"]["sentiment"]["acc,none"] <= 1
    one, two = ((tmp_path / "runs" / name / "evaluation.json").read_text() for name in ("evaluate", "evaluate2"))
    assert re.findall(r'"(?:tokens|samples)": \d+', one) == re.findall(r'"(?:tokens|samples)": \d+', two)


def test_only_known_scripts_are_left_out() -> None:
    assert {line for line in commands() if line.startswith("bash ")} == SCRIPTS
    assert set(commands()) >= LEFT_OUT
    for line in (*SCRIPTS, *(line for line in commands() if line.startswith(BENCHMARKS))):
        assert (ROOT / line.split()[1]).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    stage = re.match(r"# (adapt|prune|distill|finetune|evaluate|grid|tasks|blend): ", path.read_text())
    assert stage, f"{path.name} does not begin with the stage that it is for"
    if stage[1] == "grid":
        assert make_sweep.read_grid(path).cells
    elif stage[1] == "blend":
        assert prepare_blend.read_blend(str(path))
    elif stage[1] == "tasks":  # a group of lm-evaluation-harness
        group = yaml.safe_load(path.read_text())
        assert set(group) == {"group", "task"} and group["task"]
    else:
        load(str(path), [], stage[1])
