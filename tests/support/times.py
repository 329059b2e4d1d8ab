"""Where a run of the tests spends its time: `python tests/support/times.py FOLDER`, with pytest's junit files in it."""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

SLOWEST = 10


def seconds_of(folder: Path) -> dict[tuple[str, str], float]:
    """Seconds of every test, its fixtures included, by module and name."""
    found: dict[tuple[str, str], float] = {}
    for file in sorted(folder.glob("*.xml")):
        for case in ElementTree.parse(file).iter("testcase"):
            found[case.attrib["classname"], case.attrib["name"]] = float(case.attrib["time"])
    return found


def report(seconds: dict[tuple[str, str], float]) -> str:
    """The ten slowest tests, and the time of each folder, which tests beside each other spend at the same time."""
    lines = [f"== the {SLOWEST} slowest tests"]
    for module, name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:SLOWEST]:
        lines.append(f"{seconds[module, name]:8.1f} s  {module.removeprefix('tests.').replace('.', '/')}.py::{name}")
    folders: Counter[str] = Counter()
    for (module, _), spent in seconds.items():
        folders[module.split(".")[1]] += spent
    lines.append("== time per folder, summed over processes")
    lines += [f"{spent:8.1f} s  tests/{folder}" for folder, spent in folders.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(seconds_of(Path(sys.argv[1]))))
