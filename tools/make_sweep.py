"""Expand a grid of students, teachers and seeds into runs, and run them on this machine or as SLURM arrays.

    python tools/make_sweep.py GRID.yaml                # configurations, and OUT/slurm/submit.sh for a cluster
    python tools/make_sweep.py GRID.yaml --run          # one run after the other on this machine
    python tools/make_sweep.py GRID.yaml --run --jobs 2 # two at a time, each with a share of the cores

Finished runs are skipped, so both can be stopped or killed at any time and called again. Every call collects the
records of the finished runs in OUT/records.jsonl, which tools/fit_law.py reads.
"""

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import yaml
from filelock import FileLock, Timeout

from megatron_capgap import cli
from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.common.errors import UserError
from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.config.fields import location
from megatron_capgap.config.loader import LoadedConfig, load
from megatron_capgap.config.yaml_source import read_file
from megatron_capgap.data import indexed
from megatron_capgap.data.tokenizer import open_tokenizer
from megatron_capgap.law import sweep as grids
from megatron_capgap.law.records import LawError
from megatron_capgap.law.sweep import Sweep, SweepRun, expand, run_dir
from tools.command import run_tool

RECORD = "record.json"
STAGE = Path(__file__).resolve().parents[1] / "examples" / "slurm" / "stage.sbatch"
TEMPLATES = Path(__file__).resolve().with_name("sweep")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 if runs failed; 2 with one line on stderr for an invalid grid; 130 if stopped."""
    args = parse_arguments(argv)
    return run_tool("make_sweep", lambda: make_sweep(args), place=args.grid)


def make_sweep(args: argparse.Namespace) -> int:
    """Writes the sweep, runs it if asked to, and collects its records; returns the exit status."""
    sweep = read_grid(args.grid)
    absent = missing(sweep, args.grid)
    if absent and args.run:
        raise UserError(absent)
    write_sweep(sweep)
    if absent:
        print(f"note: before these runs can start: {absent}")
    code = 0
    if args.run:
        with lock(Path(sweep.out)):
            code = run(sweep, args.jobs)
    gather(sweep)
    return code


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_sweep",
        description=__doc__,
        epilog=f"GRID.yaml: {grids.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grid", type=Path, metavar="GRID.yaml", help="its keys are listed below")
    parser.add_argument("--run", action="store_true", help="run what is missing, one run after the other")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, sharing the cores (default 1)"
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    return args


def read_grid(path: Path) -> Sweep:
    """Reads the grid's runs and checks the configuration of each.

    Raises:
        UserError: the file cannot be read, is no YAML, or its keys are no valid configuration.
        LawError: the grid is invalid.
    """
    try:
        grid: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a grid as YAML") from None
    try:
        sweep = expand(grid)
    except LawError as error:
        raise LawError(f"{path}: {error}") from None
    with TemporaryDirectory() as folder:
        for cell in sweep.cells:
            file = Path(folder) / f"{cell.name}.yaml"
            file.write_text(as_yaml(cell))
            try:
                load(str(file), (), cell.stage)
            except UserError as error:
                raise UserError(str(error).replace(f"{folder}/", f"{path}: ")) from None
    return sweep


def reads(sweep: Sweep) -> list[tuple[str, str]]:
    """The external inputs of the runs, which no run makes: the end of the key in the grid, and the value."""
    found = []
    for cell in sweep.cells:
        data = cell.config["data"]
        found += [("data.tokenizer", data["tokenizer"])]
        found += [(f"data.{name}", prefix) for name in ("train", "valid") for prefix in data.get(name) or ()]
        checkpoints = [(cell.config.get(role) or {}).get("checkpoint") for role in ("teacher", "student")]
        found += [("checkpoint", run) for run in checkpoints if run and not run.startswith(run_dir(sweep.out, ""))]
    return list(dict.fromkeys(found))


def missing(sweep: Sweep, path: Path) -> str | None:
    """A message about the first external input that does not exist, with its place in the grid; None if all exist."""
    look = {"data.tokenizer": open_tokenizer, "checkpoint": run_directory.locate}
    tree = read_file(str(path))
    for end, value in reads(sweep):
        try:
            look.get(end, indexed.paths)(value)
        except UserError as error:
            keys = (key for key in tree.marks if key.endswith(f".{end}") and value in as_list(tree.get(key)))
            key = next(keys, end)
            where = f"the grid's paths are relative to the current folder, {Path.cwd()}"
            return f"{location(tree.mark(key).text, key)}: {error}; {where}"
    return None


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def write_sweep(sweep: Sweep) -> None:
    """Writes configurations and SLURM scripts below the sweep's folder."""
    out = Path(sweep.out)
    for name in ("configs", "logs", "slurm"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for cell in sweep.cells:
        write_atomically(config_of(sweep, cell), as_yaml(cell))
    for old in (out / "slurm").glob("phase_*.txt"):
        old.unlink()
    for number, cells in enumerate(sweep.phases()):
        lines = [f"{cell.stage} {config_of(sweep, cell)}\n" for cell in cells]
        write_atomically(out / "slurm" / f"phase_{number}.txt", "".join(lines))
    files = [f"{value}.idx" if end in ("data.train", "data.valid") else value for end, value in reads(sweep)]
    values = {
        "OUT": shlex.quote(str(out.absolute())),
        "OPTIONS": "".join(f"#SBATCH {option}\n" for option in sweep.slurm),
        "FOLDER": shlex.quote(str(Path.cwd())),
        "PYTHON": shlex.quote(sys.executable),
        "SCRIPT": shlex.quote(str(STAGE)),
        "SWEEP_TOOLS": shlex.quote(str(TEMPLATES)),
        "RUNS": shlex.quote(f"{sweep.out}/runs/"),
        "NEEDED": " ".join(shlex.quote(str(Path(file).absolute())) for file in files),
    }
    for name in ("array.sbatch", "submit.sh"):
        script = re.sub("@([A-Z_]+)@", lambda found: values[found[1]], (TEMPLATES / name).read_text())
        write_atomically(out / "slurm" / name, script)
    kinds = [f"{sum(cell.stage == stage for cell in sweep.cells)} {stage}" for stage in ("adapt", "prune", "distill")]
    print(f"{len(sweep.cells)} runs ({', '.join(kinds)}) in {out}; on a cluster: bash {out}/slurm/submit.sh")


def config_of(sweep: Sweep, cell: SweepRun) -> Path:
    """The path of a run's configuration."""
    return Path(sweep.out) / "configs" / f"{cell.name}.yaml"


def as_yaml(cell: SweepRun) -> str:
    return yaml.safe_dump(cell.config, sort_keys=False, width=110)


def finished(sweep: Sweep, cell: SweepRun) -> bool:
    """Whether a run is finished.

    Raises:
        UserError: the run was started with a configuration other than the grid's.
    """
    folder = Path(cell.config["run_dir"])
    if not (folder / "resolved.yaml").is_file():
        return False
    wanted = load(str(config_of(sweep, cell)), (), cell.stage)
    begun = load(str(folder / "resolved.yaml"), (), cell.stage)
    if begun.config != wanted.config:
        raise UserError(
            f"{folder}: was started with another configuration than {config_of(sweep, cell)} "
            f"({', '.join(differing(begun, wanted))} differ); remove that folder or give the grid another out"
        )
    if cell.stage == "distill":
        return (folder / RECORD).is_file()
    newest = run_directory.latest(folder)
    if cell.stage == "prune":
        return newest is not None
    return newest is not None and metadata.read(newest).step == wanted.config.train.steps


def differing(one: LoadedConfig, other: LoadedConfig) -> list[str]:
    """Sections that differ."""
    return [name for name, value in vars(one.config).items() if getattr(other.config, name) != value]


class Queue:
    """The runs that are not finished, in the grid's order, with their dependencies."""

    def __init__(self, sweep: Sweep) -> None:
        self._numbers = {cell.name: f"[{number}/{len(sweep.cells)}]" for number, cell in enumerate(sweep.cells, 1)}
        self.done = {cell.name for cell in sweep.cells if finished(sweep, cell)}
        self.failed: set[str] = set()
        self.waiting = [cell for cell in sweep.cells if cell.name not in self.done]

    def take(self) -> SweepRun | None:
        """The next run that can start; None if all that wait depend on one in progress."""
        for cell in list(self.waiting):
            if lost := self.failed & set(cell.after):
                self.waiting.remove(cell)
                self.failed.add(cell.name)
                print(f"{self.label(cell)}: skipped, because {', '.join(sorted(lost))} failed", flush=True)
            elif self.done >= set(cell.after):
                self.waiting.remove(cell)
                return cell
        return None

    def label(self, cell: SweepRun) -> str:
        return f"{self._numbers[cell.name]} {cell.stage} {cell.name}"


def run(sweep: Sweep, jobs: int) -> int:
    """Runs what is not finished, `jobs` at a time, in persistent worker processes; returns the exit code."""
    from megatron_capgap.distributed.worker_pool import WorkerPool

    queue = Queue(sweep)
    if queue.done:
        print(f"{len(queue.done)} of {len(sweep.cells)} runs are already finished")
    if jobs > 1:  # read by the processes started below
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (jobs * sweep.ranks))))
    pools = [WorkerPool(cli.main, sweep.ranks) for _ in range(jobs)]
    idle, busy = list(pools), {}
    try:
        with ThreadPoolExecutor(jobs) as threads, stopping(pools) as stop:
            while (busy or queue.waiting) and not stop:
                while idle and (cell := queue.take()):
                    workers = idle.pop()
                    busy[threads.submit(run_cell, sweep, cell, workers, queue.label(cell))] = (cell, workers)
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    cell, workers = busy.pop(future)
                    (queue.failed if future.result() else queue.done).add(cell.name)
                    idle.append(workers)
    finally:
        for workers in pools:
            workers.close()
    if stop:
        print("stopped; rerun the same command to continue")
        return 130
    return 1 if queue.failed else 0


def run_cell(sweep: Sweep, cell: SweepRun, workers: Any, label: str) -> int:
    """Runs one cell and prints its outcome; returns its exit code, 1 if it ended before its last step."""
    log = Path(sweep.out) / "logs" / f"{cell.name}.log"
    began = time.monotonic()
    code = workers.run([cell.stage, "--config", str(config_of(sweep, cell))], log)
    if not code and not finished(sweep, cell):
        code = 1
    how = f"failed with exit code {code}, see {log}" if code else "done"
    # In one call: print would write the newline separately, and another thread's line could come in between.
    sys.stdout.write(f"{label}: {how} ({time.monotonic() - began:.0f} s)\n")
    sys.stdout.flush()
    return code


@contextmanager
def stopping(pools: list[Any]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM stop all runs at their next step; a second one kills them. Yields the signals received."""
    seen: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        for workers in pools:
            workers.close() if seen else workers.signal(signal.SIGTERM)
        if seen:
            raise SystemExit(130)
        seen.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Locks the sweep, so that two processes do not write the same runs.

    Raises:
        UserError: another process holds the lock.
    """
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{out}: another make_sweep is running; wait for it or give the grid another out") from None


def gather(sweep: Sweep) -> None:
    """Writes the records of all finished runs of the grid to OUT/records.jsonl."""
    wanted = [cell for cell in sweep.cells if cell.stage == "distill"]
    lines = [path.read_text() for cell in wanted if (path := Path(cell.config["run_dir"]) / RECORD).is_file()]
    write_atomically(Path(sweep.out) / "records.jsonl", "".join(lines))
    print(f"{len(lines)} of {len(wanted)} records in {sweep.out}/records.jsonl")


if __name__ == "__main__":
    sys.exit(main())
