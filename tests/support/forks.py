"""Processes forked from one server that has imported torch and Megatron-Core, which costs seconds of a core each time.

The server starts with the first process and lives as long as this one does.
"""

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOADED = [
    "tests.support.on_the_cpu",
    "torch",
    "torch.distributed",
    "torch._dynamo",  # torch's optimizers import it when they are first made
    "megatron.core",
    *(f"megatron_capgap.stages.{name}" for name in ("adapt", "prune", "distill", "finetune", "evaluate")),
    "pytest",
    "tests.support.frozen",
]


def context() -> ForkServerContext:
    """Whose processes begin with the imports done."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return server


class ForkedModule:
    """`python -X faulthandler -m MODULE WORDS` in a process group of its own, with the part of subprocess.Popen's
    interface that tests use.

    Args:
        module: one that has `if __name__ == "__main__"`.
        words: its command line.
        environment: all of the process's variables. Those that libraries read while they are imported come too late;
            the number of threads is always one.
        out: file for what it writes to stdout.
        err: and to stderr.
    """

    def __init__(self, module: str, words: Sequence[str], environment: dict[str, str], out: Path, err: Path) -> None:
        for path in (
            out,
            err,
        ):  # there at once, as Popen's are: whoever waits for a word in them looks before it is said
            path.write_bytes(b"")
        arguments = (module, list(words), environment, os.getcwd(), out, err)
        self._process = context().Process(target=_run, args=arguments)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As Popen's; negative numbers are signals."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As Popen's."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """As Popen's."""
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """As Popen's."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _run(module: str, words: list[str], environment: dict[str, str], folder: str, out: Path, err: Path) -> None:
    import torch

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    faulthandler.enable(file=2)
    torch.set_num_threads(1)
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:  # what multiprocessing leaves out of an interpreter's end
        threading._shutdown()
        atexit._run_exitfuncs()
