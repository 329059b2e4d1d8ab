"""Refuses a run of a sweep whose teacher or student is a run of the same sweep that is not finished.

python unfinished.py CONFIG.yaml OUT/runs/
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a clone, without installation

import yaml

from megatron_capgap.checkpoint import metadata, run_directory


def main(config_file: str, runs: str) -> None:
    """Exits with a message if a checkpoint that the configuration names below `runs` is not of its run's last step."""
    config = yaml.safe_load(Path(config_file).read_text())
    for model in (config.get("teacher"), config.get("student")):
        run = (model or {}).get("checkpoint")
        if run and run.startswith(runs):
            newest = run_directory.latest(Path(run))
            if newest is None or (found := metadata.read(newest)).step < found.steps:
                sys.exit(f"array.sbatch: error: {run} is not finished; correct it and call submit.sh again")


if __name__ == "__main__":
    main(*sys.argv[1:])
