"""Measures the cost of checksums: writing a checkpoint, computing the checksums of its files, and verifying them.

python benchmarks/checkpoint.py [--mib 512] [--folder DIR]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from tests.support.pool import WorkerPool

ROUNDS = 3
ROWS = 4096


def measure(folder: Path, mib: int) -> dict[str, float]:
    """Median seconds of each part, from barrier to barrier on this rank's clock."""
    from megatron_capgap.checkpoint import integrity, streaming, writer
    from megatron_capgap.checkpoint.metadata import CheckpointMetadata
    from megatron_capgap.checkpoint.metadata import write as write_manifest
    from megatron_capgap.config.schema import ModelShape

    rank, world = dist.get_rank(), dist.get_world_size()
    entry = streaming.TensorEntry("weight", (ROWS, mib * 2**20 // 4 // ROWS), torch.float32, layered=False)
    rows = ROWS // world
    piece = streaming.Block(entry, 0, rank * rows, rows)
    data = torch.randn(rows, entry.shape[1])
    shape = ModelShape(layers=1, hidden=8, heads=1, ffn=8, vocab=8)
    meta = CheckpointMetadata(1, 1, 1, shape, "", "", "adapt", 0, (1, 1, 1, world), 8)
    seconds: dict[str, list[float]] = {"write": [], "list": [], "verify": []}

    def timed(name: str, work: Callable[[], None]) -> None:
        dist.barrier()
        start = time.perf_counter()
        work()
        dist.barrier()
        seconds[name].append(time.perf_counter() - start)

    seal = integrity.write_checksums
    for turn in range(ROUNDS):
        place = folder / str(turn)
        if rank == 0:
            place.mkdir()
        writer.contents.write_checksums = lambda folder, group: None
        timed("write", lambda: streaming.write(place, [piece], lambda piece: data))  # noqa: B023
        writer.contents.write_checksums = seal
        timed("list", lambda: seal(place))  # noqa: B023
        if rank == 0:
            write_manifest(meta, place)
        timed("verify", lambda: integrity.verify(place))  # noqa: B023
        if rank == 0:
            shutil.rmtree(place)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Prints one row per number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512, help="size of the checkpoint")
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    words = parser.parse_args()
    pool = WorkerPool()
    print(f"{words.mib} MiB, median of {ROUNDS}; files are in the page cache when they are checked")
    print("| ranks | write and fsync, s | list, s | list, GB/s | verify, s | verify, GB/s |\n|---|---|---|---|---|---|")
    for world in (1, 2):
        with tempfile.TemporaryDirectory(dir=words.folder) as folder:
            found = pool.run(measure, Path(folder), words.mib, world=world)[0]
        rates = {name: words.mib * 2**20 / 1e9 / value for name, value in found.items()}
        print(
            f"| {world} | {found['write']:.2f} | {found['list']:.2f} | {rates['list']:.2f} | "
            f"{found['verify']:.2f} | {rates['verify']:.2f} |"
        )
    pool.close()


if __name__ == "__main__":
    main()
