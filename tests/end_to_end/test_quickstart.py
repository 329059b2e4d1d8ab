"""The commands of the quickstart's script, as bash makes them, on a small corpus and for two steps."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_capgap.cli import main
from tests.support.corpus import texts, write_jsonl
from tests.support.pool import WorkerPool
from tests.support.processes import ROOT, environment
from tools import convert_hf, prepare_data

TOOLS = {"prepare_data.py": prepare_data.main, "convert_hf.py": convert_hf.main}
# What so small a corpus can fill, in the script and in the configurations.
SMALLER = {r"\b2048\b": "500", r"\bsteps: \d+": "steps: 2", r"\bbatches: \d+": "batches: 1"}
SMALLER |= {r"global_batch: \d+": "global_batch: 8", r"micro_batch: \d+": "micro_batch: 4"}
# The script's own Python: it writes down what it is asked to do, a line a command.
RECORDER = '#!/bin/sh\n(IFS="\t"; printf "%s\\n" "$*") >> "$RECORD"\n'


def small_copy(folder: Path) -> Path:
    """The quickstart's folder with everything made smaller, and its script without the installation."""
    copy = Path(shutil.copytree(ROOT / "examples/quickstart", folder / "quickstart", ignore=lambda *_: ["work"]))
    for file in [*copy.glob("*.yaml"), copy / "run.sh"]:
        text = file.read_text()
        for pattern, value in SMALLER.items():
            text = re.sub(pattern, value, text)
        file.write_text(text)
    script = copy / "run.sh"
    script.write_text(re.sub(r'^source .*install\.sh".*$', 'python="$RECORDER"', script.read_text(), flags=re.M))
    return copy


def commands(copy: Path) -> list[list[str]]:
    """What the script asks Python to do."""
    recorder, record = copy / "recorder", copy / "record"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    names = {"RECORDER": str(recorder), "RECORD": str(record)}
    subprocess.run(["bash", copy / "run.sh"], env={**os.environ, **names}, check=True, capture_output=True)
    return [line.split("\t") for line in record.read_text().splitlines()]


def in_folder(folder: str, tool: str, words: list[str]) -> int:
    """Runs in a worker."""
    os.chdir(folder)
    return TOOLS.get(tool, main)(words)


@pytest.mark.slow("runs every command of the quickstart, each in an interpreter of its own")
def test_the_script_s_commands_run(pool: WorkerPool, tmp_path: Path) -> None:
    copy, table = small_copy(tmp_path), ""
    work = str(copy / "work")
    for words in commands(copy):
        name, world = Path(words[0]).name, 1
        if name == "corpus.py":
            write_jsonl(copy / "work" / "reviews.jsonl", texts(2500, seed=11))
        elif name == "-m" or name in TOOLS:
            if "--nproc-per-node" in words:
                world, words = int(words[3]), words[4:]
            words = words[1:] if name in TOOLS else words[2:]
            ranks = pool.run(in_folder, work, name, words, world=world, initialise=False, capture=True)
            assert [rank.value for rank in ranks] == [0] * world, (words, ranks)
        elif name != "generate.py":  # a test of the conversion runs it
            said = subprocess.check_output([sys.executable, *words], cwd=work, env=environment(), text=True)
            table += said if name == "table.py" else ""
    rows = re.findall(r"^(teacher|student: \S.*?)  +([\d,]+) ", table, flags=re.M)
    assert [name for name, _ in rows][:2] == ["teacher", "student: pruned"] and len(rows) >= 5, table
    counts = {name: int(count.replace(",", "")) for name, count in rows}
    assert counts["teacher"] > counts["student: pruned"] == counts["student: pruned, distilled"]
