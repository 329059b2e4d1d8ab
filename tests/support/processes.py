"""Runs as a user starts them: one Python process a rank, to be killed, signalled and started again."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import megatron_capgap
from megatron_capgap.runtime.launch import free_port

ROOT = Path(megatron_capgap.__file__).parents[1]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Job:
    """The ranks of one command; what rank r says goes to `stdout(r)` and `stderr(r)`."""

    def __init__(self, words: Sequence[str], world: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        port = str(free_port())
        self.ranks = [self._start(words, rank, world, port) for rank in range(world)]

    def _start(self, words: Sequence[str], rank: int, world: int, port: str) -> subprocess.Popen[bytes]:
        values = (str(rank), str(world), str(rank), str(world), "127.0.0.1", port)
        with open(self._folder / f"{rank}.out", "wb") as out, open(self._folder / f"{rank}.err", "wb") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "megatron_capgap", *words],
                env={**environment(), **dict(zip(LAUNCHER, values, strict=True)), "GLOO_SOCKET_IFNAME": "lo"},
                stdout=out,
                stderr=err,
                start_new_session=True,  # a process group for each rank and what it starts
            )

    def stdout(self, rank: int = 0) -> str:
        """What a rank has written so far."""
        return (self._folder / f"{rank}.out").read_text()

    def stderr(self, rank: int = 0) -> str:
        """What a rank has complained about so far."""
        return (self._folder / f"{rank}.err").read_text()

    def signal(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Sends a signal to some ranks, or to all."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            self.ranks[rank].send_signal(number)

    def wait(self, limit: float = 120.0) -> list[int]:
        """Exit codes of all ranks; negative numbers are signals."""
        deadline = time.monotonic() + limit
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.ranks]

    def left_behind(self) -> list[int]:
        """Ranks that have ended while processes which they started have not."""
        return [rank for rank, process in enumerate(self.ranks) if _group_lives(process.pid)]

    def wait_until(self, condition: Callable[[], bool], limit: float = 120.0) -> None:
        """Looks often, for what is waited for may be over soon."""
        deadline = time.monotonic() + limit
        while not condition():
            codes = [process.poll() for process in self.ranks]
            assert codes == [None] * len(codes), f"exit codes {codes}: {self.stderr()}"
            assert time.monotonic() < deadline, f"nothing after {limit} s: {self.stdout()}"
            time.sleep(0.005)


@contextmanager
def job(words: Sequence[str], world: int, folder: Path) -> Iterator[Job]:
    """Starts the ranks of a command; none of them outlives the `with` block."""
    started = Job(words, world, folder)
    try:
        yield started
    finally:
        for process in started.ranks:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], bool], limit: float, what: str, say: Callable[[], str] = str) -> None:
    """Looks ten times a second; fails with what `say` says."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {limit:.0f} s\n{say()}"
        time.sleep(0.1)


def cpu_seconds() -> float:
    """Of all processes that this one has waited for; what a busy machine does to a clock does not show in it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def environment() -> dict[str, str]:
    """This process's environment without a launcher in it, with the checkout importable, one thread a rank."""
    launchers = (*LAUNCHER, "SLURM_STEP_ID", "SLURM_PROCID")
    kept = {name: value for name, value in os.environ.items() if name not in launchers}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
