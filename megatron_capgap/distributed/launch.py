"""`capgap launch -n N STAGE ...`: the ranks of this node, as torchrun starts them, with errors of one line.

torchrun prints some forty lines of its own after a rank's error; here only the rank's are seen. SIGTERM and SIGUSR1
reach the ranks, which save and stop, however long that takes.
"""

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import STAGES

USAGE = """capgap launch: start the ranks of this node

usage: capgap launch [-n N] [TORCHRUN OPTIONS] STAGE --config FILE [--section.key=value ...]

  -n N             ranks on this node; default: its GPUs, or one
  TORCHRUN OPTIONS for several nodes: --nnodes=2 --node-rank=0 --master-addr=HOST --master-port=PORT,
                   or --rdzv-backend, --rdzv-endpoint, --rdzv-id
"""
_COUNT = ("-n", "--nproc-per-node", "--nproc_per_node")
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
_POLL_SECONDS = 0.2
_LOGGERS = ("torch.distributed.run", "torch.distributed.elastic", "torch.distributed.launcher")


def main(argv: Sequence[str]) -> int:
    """Starts the ranks and waits for them.

    Args:
        argv: the arguments after `launch`.

    Returns:
        The exit code of the rank that failed first, 0 if none did.

    Raises:
        UserError: the arguments are no launch; or a rank was killed.
    """
    before, rest = split(argv)
    if not rest:
        if {"-h", "--help"} & set(before):
            sys.stdout.write(USAGE)
            return 0
        raise UserError(f"launch: no stage given; valid values: {', '.join(STAGES)}; see capgap launch --help")
    count, options = ranks_and_options(before)
    return _start([f"--nproc-per-node={count}", *options, "-m", "megatron_capgap", *rest])


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's arguments, and those of each rank, which begin with the stage."""
    at = next((i for i, word in enumerate(argv) if word in STAGES), len(argv))
    return list(argv[:at]), list(argv[at:])


def ranks_and_options(words: Sequence[str]) -> tuple[int, list[str]]:
    """The number of ranks on this node, and the options for torchrun.

    Raises:
        UserError: the number of ranks is none.
    """
    count, options, left = None, [], list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name not in _COUNT:
            options.append(word)
            continue
        value = value if equals else left.pop(0) if left else ""
        if not (value.isdecimal() and int(value) > 0):
            raise UserError(f"launch: {name} {value or 'without a number'}; expected an integer > 0")
        count = int(value)
    return count or _gpus() or 1, options


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _start(words: Sequence[str]) -> int:
    """Runs torchrun's agent in a thread of its own: in the main thread it would kill the ranks half a minute after a
    signal, within a long save."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with _forwarding(), ThreadPoolExecutor(1) as aside:
        agent = aside.submit(run, get_args_parser().parse_args(words))
        while not agent.done():
            wait([agent], _POLL_SECONDS)  # a handler runs between two of these
    try:
        agent.result()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            killer = signal.Signals(-failure.exitcode).name
            raise UserError(f"rank {rank} (process {failure.pid}) was killed by {killer}") from None
        return failure.exitcode  # the rank has printed why
    return 0


@contextmanager
def _forwarding() -> Iterator[None]:
    """Passes signals that ask to save and stop on to the ranks. A terminal sends Ctrl-C to them itself."""
    previous = {number: signal.signal(number, _forward) for number in (*_FORWARDED, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _forward(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children() if number in _FORWARDED else ():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)
