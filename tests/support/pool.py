"""A pool of gloo worker processes that all tests share.

The workers are forked from a server that has imported torch and Megatron-Core already (`forks`), and live until the
tests end. Each call makes a fresh process group of exactly the world size it asks for.
"""

import faulthandler
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

from megatron_capgap.distributed.process_group import reserved_port
from tests.support import forks

STREAMS = ("stdout", "stderr")
SEED = 0
"""Torch's, at the start of every call."""
SECONDS_AFTER_A_FAILURE = 30.0  # what the other ranks get to notice that one of them is gone
GRACE_SECONDS = 0.05  # of a refusal: no launcher is here that would end a rank while the first one speaks


@dataclass(frozen=True)
class RankResult:
    """What one rank returned and wrote; with `pool.run(..., capture=True)`."""

    value: Any
    stdout: str
    stderr: str


@dataclass(frozen=True)
class RankFailure:
    """How one rank failed."""

    reason: str
    """The traceback, or one line saying that the rank died or did not answer."""
    stdout: str
    stderr: str


class WorkerError(RuntimeError):
    """At least one rank failed. The message holds the traceback and the output of every rank that did.

    Args:
        failures: for each failed rank, how it failed.
        world: number of ranks of the call.
    """

    def __init__(self, failures: dict[int, RankFailure], world: int) -> None:
        self.failures = failures
        parts = [f"{len(failures)} of {world} ranks failed: {sorted(failures)}; torch's seed at the start: {SEED}"]
        for rank, failure in sorted(failures.items()):
            parts.append(f"---- rank {rank}\n{failure.reason.rstrip()}")
            for name, text in (("stdout", failure.stdout), ("stderr", failure.stderr)):
                if text.strip():
                    parts.append(f"---- rank {rank} {name} (last 4000 characters)\n{text[-4000:].rstrip()}")
        super().__init__("\n".join(parts))


@dataclass(frozen=True)
class _Call:
    """What one worker is told to do."""

    work: bytes
    """The pickled (function, args); unpickled inside the worker's own `try`, so that a bad import is seen."""
    rank: int
    world: int
    initialise: bool
    limit: float
    port: int
    folder: Path
    path: tuple[str, ...]
    """The caller's sys.path: test modules may have been added to it since the worker was forked."""


class WorkerPool:
    """Up to `size` gloo workers, started when a call first needs them.

    Args:
        size: the largest world that `run` accepts.
        fresh: workers that have imported nothing yet, for what must come before Megatron's import.
    """

    def __init__(self, size: int = 8, fresh: bool = False) -> None:
        self.size = size
        self._context = multiprocessing.get_context("spawn") if fresh else forks.context()
        self._workers: list[tuple[multiprocessing.Process, connection.Connection]] = []

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        world: int = 2,
        initialise: bool = True,
        limit: float = 180.0,
        capture: bool = False,
    ) -> list[Any]:
        """Runs `function(*args)` on ranks 0 .. world-1 and returns what each rank returned.

        Every rank starts with torch's seed at `SEED`, and RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
        MASTER_ADDR and MASTER_PORT in its environment.

        Args:
            function: a function at the top of its module (it travels by name).
            args: its arguments; they and the return value travel by pickle, tensors by value.
            world: number of ranks.
            initialise: make the gloo group around the call; False where the function makes its own.
            limit: seconds before the pool gives up on the call and replaces its workers.
            capture: return a `RankResult` for each rank instead of the bare value.

        Raises:
            WorkerError: a rank raised, died or did not answer in time.
        """
        assert 1 <= world <= self.size, f"world {world} is not within 1..{self.size}"
        self._grow(world)
        folder = Path(tempfile.mkdtemp(prefix="capgap-pool-"))
        try:
            work = _dumps((function, args))
            with reserved_port() as port:
                for rank in range(world):
                    call = _Call(work, rank, world, initialise, limit, port, folder, tuple(sys.path))
                    self._workers[rank][1].send_bytes(pickle.dumps(call))
                values, reasons = self._collect(world, limit)
            if reasons and not initialise:
                self.close()  # a group that was made by half leaves its sockets behind, where the next call would wait
            out = [[_read(folder / f"{rank}.{name}") for name in STREAMS] for rank in range(world)]
        except BaseException:  # the test's own limit: the ranks are busy with a call whose answer nobody will read
            self.close()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if reasons:
            raise WorkerError({rank: RankFailure(why, *out[rank]) for rank, why in reasons.items()}, world)
        return [RankResult(values[rank], *out[rank]) if capture else values[rank] for rank in range(world)]

    def close(self) -> None:
        """Ends the workers."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []

    def _grow(self, world: int) -> None:
        while len(self._workers) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world: int, limit: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Waits for all ranks; returns values and reasons of failure by rank. A lost rank costs the pool."""
        started, deadline = time.monotonic(), time.monotonic() + limit
        values: dict[int, Any] = {}
        reasons: dict[int, str] = {}
        waiting = {self._workers[rank][1]: rank for rank in range(world)}
        lost = False
        while waiting and (ready := connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, answer = pickle.loads(pipe.recv_bytes())
                    (values if ok else reasons)[rank] = answer
                except EOFError:
                    self._workers[rank][0].join()
                    reasons[rank] = f"the process died with exit code {self._workers[rank][0].exitcode}"
                    lost = True
            if reasons:
                deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
        self._dump_stacks(list(waiting.values()))
        for rank in waiting.values():
            reasons[rank] = f"no answer after {time.monotonic() - started:.1f} s; the process was killed"
        if waiting or lost:
            self.close()
        return values, reasons

    def _dump_stacks(self, ranks: list[int]) -> None:
        """Has ranks that do not answer write the stacks of their threads to stderr; they end with that."""
        for rank in ranks:
            os.kill(self._workers[rank][0].pid, signal.SIGABRT)  # faulthandler's
        for rank in ranks:
            self._workers[rank][0].join(5)


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _serve(pipe: connection.Connection) -> None:
    """The life of a worker: one call after the other until the pool closes the pipe."""
    import torch

    from megatron_capgap import cli

    faulthandler.enable(file=2)  # SIGABRT writes all stacks to whatever descriptor 2 is then
    torch.set_num_threads(1)
    cli._GRACE_SECONDS = GRACE_SECONDS
    # Daemonic, so that a worker never outlives the tests; but Megatron's checkpoint writer forks children of its own.
    multiprocessing.current_process()._config["daemon"] = False
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    while True:
        try:
            call: _Call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        sys.path[:] = call.path
        with _output_into(call.folder, call.rank), _environment(call):
            answer = _answer(call)
        pipe.send_bytes(answer)


class _Pickler(pickle.Pickler):
    """Writes plain tensors in words of its own: torch's pickles of them name a function of Megatron-Core 0.19 once that
    is imported, and a fresh worker must not import it before it is asked to."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if type(value) is not torch.Tensor or value.requires_grad or value.layout is not torch.strided:
            return NotImplemented
        flat = value.detach().contiguous().view(-1).view(torch.uint8)
        return _tensor, (flat.numpy().tobytes(), value.dtype, tuple(value.shape))


def _tensor(content: bytes, dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).view(shape)


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def _answer(call: _Call) -> bytes:
    """Runs the call; returns the pickled (True, value) or (False, traceback)."""
    import torch

    torch.manual_seed(SEED)
    try:
        if call.initialise:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{call.folder}/store",
                rank=call.rank,
                world_size=call.world,
                timeout=timedelta(seconds=call.limit),
            )
            torch.distributed.barrier()  # no rank may fail, and close its sockets, while another still connects
        function, args = pickle.loads(call.work)
        return _dumps((True, function(*args)))
    except BaseException:  # SystemExit of a command under test included
        return pickle.dumps((False, traceback.format_exc()))
    finally:
        _forget_groups()


def _forget_groups() -> None:
    """Destroys what the call left behind: Megatron's groups first, for they live inside torch's."""
    import torch

    if parallel_state := sys.modules.get("megatron.core.parallel_state"):
        parallel_state.destroy_model_parallel()
    if calculator := sys.modules.get("megatron.core.num_microbatches_calculator"):
        calculator.unset_num_microbatches_calculator()
    if engine := sys.modules.get("transformer_engine.pytorch.quantization"):
        engine.FP8GlobalStateManager.reset()  # it would go on to reduce the maxima of modules that are gone
    if torch.distributed.is_initialized():
        with suppress(Exception):  # a group whose peer is gone may not close cleanly; the call has failed already
            torch.distributed.destroy_process_group()


@contextmanager
def _environment(call: _Call) -> Iterator[None]:
    """The variables that torchrun would set, the working directory and the arguments, restored afterwards."""
    before, folder, arguments = dict(os.environ), os.getcwd(), sys.argv
    os.environ.update(
        RANK=str(call.rank),
        LOCAL_RANK=str(call.rank),
        WORLD_SIZE=str(call.world),
        LOCAL_WORLD_SIZE=str(call.world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(call.port),
        GLOO_SOCKET_IFNAME="lo",  # the host's own name need not resolve
        OMP_NUM_THREADS="1",
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        os.chdir(folder)
        sys.argv = arguments


@contextmanager
def _output_into(folder: Path, rank: int) -> Iterator[None]:
    """Sends file descriptors 1 and 2 into files, so that what C++ and child processes write is kept too."""
    saved = [os.dup(1), os.dup(2)]
    for number, name in enumerate(STREAMS, 1):
        file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    try:
        yield
    finally:
        for stream, number, copy in ((sys.stdout, 1, saved[0]), (sys.stderr, 2, saved[1])):
            stream.flush()
            os.dup2(copy, number)
            os.close(copy)
