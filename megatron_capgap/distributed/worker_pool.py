"""Worker pool: ranks that run several commands in turn and import libraries only once.

torchrun and SLURM start new processes for each run; a sweep of short runs on one machine would spend most of its time
on imports.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_capgap.distributed import environment, process_group

Command = Callable[[Sequence[str]], int]
CRASHED = 70
"""Exit code of a command that raised an exception (EX_SOFTWARE)."""


class WorkerPool:
    """Ranks of one run at a time.

    Args:
        command: function that each rank runs, from arguments to an exit code; importable by name.
        world: number of ranks.
    """

    def __init__(self, command: Command, world: int) -> None:
        self._command, self._world = command, world
        # Not forked: a worker must not inherit threads, signal handlers or other workers' pipes.
        self._context = multiprocessing.get_context("spawn")
        # Only this process holds the third element open: it closes when this process dies, however it dies.
        self._ranks: list[tuple[multiprocessing.process.BaseProcess, Connection, Connection]] = []

    def run(self, args: Sequence[str], output: Path) -> int:
        """Runs one command on every rank.

        Args:
            args: arguments of the command.
            output: file to which the ranks' output is appended.

        Returns:
            The highest exit code of the ranks; `CRASHED` if one raised an exception or died. In that case the ranks are
            replaced.
        """
        while len(self._ranks) < self._world:
            self._start(len(self._ranks))
        codes = []
        with process_group.reserved_port() as port:
            for _, pipe, _ in self._ranks:
                pipe.send((list(args), str(output), port))
            for process, pipe, _ in self._ranks:
                try:
                    codes.append(pipe.recv())
                except EOFError:
                    process.join()
                    codes.append(CRASHED)
                if codes[-1] == CRASHED:
                    break  # other ranks may wait for this one forever
        if CRASHED in codes:
            self.close()
        return max(codes)

    def signal(self, number: int) -> None:
        """Sends a signal to all ranks."""
        for process, _, _ in self._ranks:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def close(self) -> None:
        """Kills the ranks."""
        for process, pipe, life in self._ranks:
            process.kill()
            process.join()
            pipe.close()
            life.close()
        self._ranks = []

    def _start(self, rank: int) -> None:
        ours, theirs = self._context.Pipe()
        alive, life = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_serve, args=(self._command, rank, self._world, theirs, alive))
        process.start()
        theirs.close()
        alive.close()
        self._ranks.append((process, ours, life))


def _serve(command: Command, rank: int, world: int, pipe: Connection, alive: Connection) -> None:
    """Main loop of a rank: runs commands until the pipe closes or the parent dies."""
    threading.Thread(target=_exit_with_parent, args=(alive,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
    for name in [
        name for name in os.environ if name.startswith(environment.LAUNCHER_PREFIXES)
    ]:  # of the parent's launcher
        del os.environ[name]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
    )
    while True:
        try:
            args, output, port = pipe.recv()
        except EOFError:
            return
        os.environ["MASTER_PORT"] = str(port)
        _redirect_output(output)
        try:
            code = command(args)
        except BaseException:
            traceback.print_exc()
            code = CRASHED
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send(code)


def _exit_with_parent(alive: Connection) -> None:
    """Exits this process at once when the parent dies, so that no rank of an old sweep writes while a new one
    starts."""
    try:
        alive.recv()
    except (EOFError, OSError):
        os._exit(CRASHED)


def _redirect_output(output: str) -> None:
    """Redirects stdout and stderr of this process and its libraries to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
