"""Runs as a user starts them: one Python process a rank, to be killed, signalled and started again."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import yaml

import megatron_capgap
from megatron_capgap.distributed.process_group import reserved_port
from tests.support import forks
from tests.support.failures import last_lines, on_failure

ROOT = Path(megatron_capgap.__file__).parents[1]
LEAVE = 30.0
"""Seconds beyond what is promised that ranks of a busy machine may take to say their last words and to leave."""
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Job:
    """The ranks of one command; what rank r says goes to `stdout(r)` and `stderr(r)`.

    Args:
        words: of the command.
        world: number of ranks.
        folder: for what the ranks say.
        cold: start an interpreter for each rank, where the test is about start-up or memory. Otherwise ranks are forked
            from a process that has done the imports, which is all that it saves.
    """

    def __init__(self, words: Sequence[str], world: int, folder: Path, cold: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._words, self._cold = folder, words, cold
        self._port = ExitStack()
        self.port = self._port.enter_context(reserved_port())
        self.ranks = [self._start(words, rank, world, str(self.port)) for rank in range(world)]
        on_failure(f"{world} ranks of capgap {words[0]}", self.report)

    def _start(
        self, words: Sequence[str], rank: int, world: int, port: str
    ) -> "subprocess.Popen[bytes] | forks.ForkedModule":
        values = (str(rank), str(world), str(rank), str(world), "127.0.0.1", port)
        env = {**environment(), **dict(zip(LAUNCHER, values, strict=True)), "GLOO_SOCKET_IFNAME": "lo"}
        paths = self._folder / f"{rank}.out", self._folder / f"{rank}.err"
        if not self._cold:
            return forks.ForkedModule("megatron_capgap", words, env, *paths)
        with open(paths[0], "wb") as out, open(paths[1], "wb") as err:
            return subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "megatron_capgap", *words],
                env=env,
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
        return self.wait_for(range(len(self.ranks)), limit)

    def wait_for(self, ranks: Iterable[int], limit: float = 120.0) -> list[int]:
        """Exit codes of some ranks, as `wait`; fails where one has not ended after `limit` seconds."""
        deadline = time.monotonic() + limit
        ranks = list(ranks)
        while any(self.ranks[rank].poll() is None for rank in ranks):
            alive = [rank for rank in ranks if self.ranks[rank].poll() is None]
            assert time.monotonic() < deadline, f"ranks {alive} have not ended after {limit} s"
            time.sleep(0.01)
        return [self.ranks[rank].returncode for rank in ranks]

    def report(self) -> str:
        """The command, its seed, and each rank's exit code and last lines."""
        lines = [f"python -m megatron_capgap {shlex.join(self._words)}", f"seed: {seed_of(self._words)}"]
        for rank, process in enumerate(self.ranks):
            lines.append(f"---- rank {rank}: exit code {process.poll()}")
            for name in ("out", "err"):
                if text := last_lines(self._folder / f"{rank}.{name}"):
                    lines.append(f"---- rank {rank} std{name}\n{text}")
        return "\n".join(lines)

    def end(self, with_stacks: bool = False) -> None:
        """Kills what is left of all ranks; `with_stacks` has each write the stacks of its threads to stderr before."""
        alive = [process for process in self.ranks if process.poll() is None]
        if with_stacks:
            for process in alive:
                process.send_signal(signal.SIGABRT)  # faulthandler's
            deadline = time.monotonic() + 5
            while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
                time.sleep(0.01)
        for process in self.ranks:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.send_signal(signal.SIGKILL)  # it may not have come to make its group
            process.wait()
        self._port.close()

    def left_behind(self) -> list[int]:
        """Ranks that have ended while processes which they started have not."""
        return [rank for rank, process in enumerate(self.ranks) if group_lives(process.pid)]

    def places(self) -> list[str]:
        """What each rank last said that it was doing; "" where it has not spoken yet."""
        store = dist.TCPStore("127.0.0.1", self.port, is_master=False, timeout=timedelta(seconds=60))
        said = dist.PrefixStore("default_pg/0//where", store)  # torch's name for the store of a job's first start
        keys = map(str, range(len(self.ranks)))
        return [json.loads(said.get(key))[2] if said.check([key]) else "" for key in keys]

    def wait_until(self, condition: Callable[[], bool], limit: float = 120.0, every: float = 0.005) -> None:
        """Looks every `every` seconds until a condition holds; often, for what is waited for may be over soon."""
        deadline = time.monotonic() + limit
        while not condition():
            codes = [process.poll() for process in self.ranks]
            assert codes == [None] * len(codes), f"exit codes {codes}: {self.stderr()}"
            assert time.monotonic() < deadline, f"nothing after {limit} s: {self.stdout()}"
            time.sleep(every)


@contextmanager
def job(words: Sequence[str], world: int, folder: Path, cold: bool = False) -> Iterator[Job]:
    """Starts the ranks of a command; none of them outlives the `with` block. Where the block fails while ranks still
    run, the failure's report has their stacks."""
    started = Job(words, world, folder, cold)
    failed = True
    try:
        yield started
        failed = False
    finally:
        started.end(with_stacks=failed)


def seed_of(words: Sequence[str]) -> str:
    """Of a command's configuration; what is not set is the schema's."""
    file = Path(words[words.index("--config") + 1]) if "--config" in words else None
    config = yaml.safe_load(file.read_text()) if file and file.is_file() else {}
    return str(config.get("seed", "the default"))


def group_lives(group: int) -> bool:
    """Whether a process of a process group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(
    condition: Callable[[], bool], limit: float, what: str, say: Callable[[], str] = str, every: float = 0.1
) -> None:
    """Looks every `every` seconds until a condition holds; after `limit` seconds it fails with what `say` says."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {limit:.0f} s\n{say()}"
        time.sleep(every)


def has_torch(pid: int) -> bool:
    """Whether a process has begun to import torch: it is no longer what forked it, and not yet at its work."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


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
