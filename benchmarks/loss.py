"""Compares the distillation loss with other implementations: time, memory and accuracy of forward and backward,
including both LM heads.

    python benchmarks/loss.py [--sizes 32k 152k] [--rounds 5] [--json FILE]

Other implementations are measured if they can be imported, in the same run, alternating, on the same tensors:
    pip install --no-deps nvidia-modelopt==0.47.0 omegaconf "antlr4-python3-runtime==4.9.3" nvidia-ml-py ninja pulp
    pip install requests          # modelopt imports it
    pip install --no-deps liger-kernel
Preferably in a separate virtual environment, created with --system-site-packages from the project's.

tensor parallel 2 (two gloo processes of one thread): ours; modelopt's LogitsKLLoss and Megatron's
    vocab_parallel_cross_entropy on materialised logits; the four matrix products that each of them needs.
tensor parallel 1 (one process of one thread): ours; Liger's chunked loss, which has no tensor parallelism.
All of them compute 0.5 KL(teacher || student) + 0.5 cross-entropy in fp32.
"""

import argparse
import json
import os
import platform
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_capgap.losses import DistillationObjective, TeacherHidden, distillation_loss

MB = 1e6
CHECKED_TOKENS = 256
LOOKS = 6
MOMENT = 0.02  # seconds
RUN = "a run under the profiler"


@dataclass(frozen=True)
class Size:
    """Sizes of one problem; the vocabulary is sharded over the ranks."""

    tokens: int
    student: int
    teacher: int
    vocab: int


SIZES = {
    "32k": Size(2048, 512, 1024, 32000),
    "152k": Size(2048, 512, 1024, 151936),
    "tiny": Size(600, 16, 24, 320),  # too small for timing
}


@dataclass
class Problem:
    """The tensors of one rank, fp32: hidden [n, h], heads [v/tp, h], labels [n]."""

    size: Size
    world: int
    rank: int
    hidden: Tensor = field(init=False)
    head: Tensor = field(init=False)
    teacher_hidden: Tensor = field(init=False)
    teacher_head: Tensor = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        size, make = self.size, torch.Generator().manual_seed(0)
        self.hidden, self.teacher_hidden = (
            torch.randn(size.tokens, width, generator=make) for width in (size.student, size.teacher)
        )
        self.labels = torch.randint(size.vocab, (size.tokens,), generator=make)
        self.hidden.requires_grad_()
        make.manual_seed(1 + self.rank)
        rows = size.vocab // self.world
        self.head = (torch.randn(rows, size.student, generator=make) * size.student**-0.5).requires_grad_()
        self.teacher_head = torch.randn(rows, size.teacher, generator=make) * 2 * size.teacher**-0.5

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.world > 1 else None


@dataclass(frozen=True)
class Contender:
    """An implementation of the loss; its backward computes the gradients of hidden and head."""

    name: str
    loss: Callable[[Problem], Tensor]
    is_mean: bool = False
    """Whether it returns the mean over tokens, not the sum."""


def ours(chunk_tokens: int) -> Contender:
    objective = DistillationObjective()

    def loss(p: Problem) -> Tensor:
        teacher = TeacherHidden(p.teacher_hidden, p.teacher_head)
        mask = torch.ones(p.size.tokens)
        return distillation_loss(
            p.hidden, p.head, teacher, p.labels, mask,
            objective=objective, vocab_size=p.size.vocab, group=p.group, chunk_tokens=chunk_tokens,
        ).loss_sum  # fmt: skip

    return Contender(f"ours, {chunk_tokens} tokens at a time", loss)


def modelopt(world: int) -> Contender:
    """Raises ImportError if nvidia-modelopt is not installed."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        vocab_parallel_cross_entropy,
    )
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    config = types.SimpleNamespace(tensor_model_parallel_size=world, sequence_parallel=False)
    kl = LogitsKLLoss(config)

    def loss(p: Problem) -> Tensor:
        student = (copy_to_tensor_model_parallel_region(p.hidden) @ p.head.t())[:, None]  # [s, b = 1, v/tp]
        with torch.no_grad():
            teacher = (p.teacher_hidden @ p.teacher_head.t())[:, None]
        divergence = kl(student, teacher)[0].sum()
        # After the divergence, because in fp32 Megatron's cross-entropy overwrites its logits.
        cross_entropy = vocab_parallel_cross_entropy(student, p.labels[:, None]).sum()
        whole = divergence.detach().clone()
        dist.all_reduce(whole)  # modelopt returns this rank's part; the gradient needs the part, the report the sum
        return 0.5 * (divergence + (whole - divergence.detach())) + 0.5 * cross_entropy

    return Contender("modelopt LogitsKLLoss + Megatron CE", loss)


def liger(chunk_tokens: int) -> Contender:
    """Raises ImportError if liger-kernel is not installed."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    def loss(p: Problem) -> Tensor:
        # beta 0 is the forward KL divergence; it returns the mean over tokens.
        return LigerFusedLinearJSDFunction.apply(
            p.hidden, p.head, p.teacher_hidden, p.teacher_head, p.labels, None, None,
            0.5, 0.5, 0.0, -100, 1.0, False, chunk_tokens, False,
        )  # fmt: skip

    return Contender(f"Liger chunked loss, {chunk_tokens} tokens", loss, is_mean=True)


def matrix_products(chunk_tokens: int) -> Callable[[Problem], None]:
    """The matrix products that every loss over two LM heads needs, in the same shapes: two forward, two backward."""

    def run(p: Problem) -> None:
        hidden, head = p.hidden.detach(), p.head.detach()
        head_gradient = torch.zeros_like(head)
        student, teacher = (torch.empty(chunk_tokens, head.shape[0]) for _ in range(2))
        hidden_gradient = torch.empty_like(hidden)
        for first in range(0, p.size.tokens, chunk_tokens):
            rows = slice(first, first + chunk_tokens)
            chunk = hidden[rows]
            logits = torch.mm(chunk, head.t(), out=student[: len(chunk)])
            torch.mm(p.teacher_hidden[rows], p.teacher_head.t(), out=teacher[: len(chunk)])
            torch.mm(logits, head, out=hidden_gradient[rows])
            head_gradient.addmm_(logits.t(), chunk)

    return run


@dataclass
class Row:
    """One line of the table; the fastest round, which is the least disturbed one on a shared machine."""

    name: str
    seconds: float
    cpu_seconds: float
    """Processor time of the busier rank, which is less affected by other processes on the machine."""
    held_mb: float | None = None
    peak_mb: float | None = None
    gradient_error: float | None = None


def measure(problem: Problem, contenders: list[Contender], chunks: list[int], rounds: int) -> list[Row]:
    """Times all implementations alternately, round after round, so that other load affects all equally."""
    runs: dict[str, Callable[[], None]] = {c.name: partial(step, problem, c) for c in contenders}
    for chunk in chunks:
        runs[f"bare matrix products, {chunk} tokens"] = partial(matrix_products(chunk), problem)
    for run in runs.values():  # warms up
        run()
    taken = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(timed(run, problem))
    rows = [Row(name, *(min(column) for column in zip(*of_rounds, strict=True))) for name, of_rounds in taken.items()]
    for row, baseline in zip(rows, contenders, strict=False):
        row.held_mb, row.peak_mb = memory(problem, baseline)
        row.gradient_error = gradient_error(problem, baseline)
    return rows


def step(problem: Problem, baseline: Contender) -> None:
    problem.hidden.grad = problem.head.grad = None
    baseline.loss(problem).backward()


def timed(run: Callable[[], None], problem: Problem) -> tuple[float, float]:
    """Wall-clock and processor seconds of the slower rank."""
    if problem.world > 1:
        dist.barrier()
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    taken = torch.tensor([time.perf_counter() - clock, time.process_time() - cpu])
    if problem.world > 1:
        dist.all_reduce(taken, dist.ReduceOp.MAX)
    return tuple(taken.tolist())


def memory(problem: Problem, baseline: Contender) -> tuple[float, float]:
    """MB on this rank in addition to the inputs: held between forward and backward, and at the peak, with gradients.

    Gloo's own thread releases a buffer with a delay and unseen by the profiler, which then counts it as allocated
    forever. Held memory is therefore measured as the memory freed together with the loss, shortly after the forward.
    Of several measurements the largest freed memory and the lowest peak are reported.
    """
    held, peaks = zip(*(_memory_once(problem, baseline) for _ in range(LOOKS)), strict=True)
    return max(held) / MB, min(peaks) / MB


def _memory_once(problem: Problem, baseline: Contender) -> tuple[int, int]:
    problem.hidden.grad = problem.head.grad = None
    losses = []
    forward, _, let_go = changes(
        lambda: losses.append(baseline.loss(problem)), lambda: time.sleep(MOMENT), losses.clear
    )
    losses.append(baseline.loss(problem))
    (backward,) = changes(losses[0].backward)
    held = -sum(let_go)
    return held, max(most(forward), held + most(backward))


def changes(*runs: Callable[[], None]) -> list[list[int]]:
    """Changes in bytes of this thread's allocated memory during each run, event by event.

    All in one profile, because the profiler does not report the release of memory that was allocated before it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for run in runs:
            with record_function(RUN):
                run()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    of_runs = []
    for event in events:
        if event.name() == RUN:
            of_runs.append([])
        elif event.name() == "[memory]" and of_runs:
            of_runs[-1].append(event.nbytes())
    return of_runs


def most(changes: list[int]) -> int:
    """Maximum of the running sum."""
    return max(accumulate(changes, initial=0))


def gradient_error(problem: Problem, baseline: Contender) -> float:
    """The larger relative error of the two gradients, compared with float64, on the first tokens of the problem."""
    few = replace(problem, size=replace(problem.size, tokens=CHECKED_TOKENS))
    step(few, baseline)
    hidden, teacher_hidden = few.hidden.detach().double(), few.teacher_hidden.double()
    shares = [few.head.detach().double(), few.teacher_head.double()]
    logits = [hidden @ shares[0].t(), teacher_hidden @ shares[1].t()]
    lse = torch.stack([x.logsumexp(1) for x in logits])
    everyone = [torch.empty_like(lse) for _ in range(few.world)]
    if few.world > 1:
        dist.all_gather(everyone, lse)
        lse = torch.stack(everyone).logsumexp(0)
    q, p = ((x - total[:, None]).exp() for x, total in zip(logits, lse, strict=True))
    columns = few.labels - few.rank * q.shape[1]
    here = (columns >= 0) & (columns < q.shape[1])
    gradient = q - 0.5 * p
    gradient[here, columns[here]] -= 0.5
    expected = [gradient @ shares[0], gradient.t() @ hidden]
    if few.world > 1:
        dist.all_reduce(expected[0])
    scale = CHECKED_TOKENS if baseline.is_mean else 1
    got = [few.hidden.grad.double() * scale, few.head.grad.double() * scale]
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(got, expected, strict=True))


def worker(rank: int, world: int, sizes: list[str], rounds: int, folder: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    chunks = [128, 192, 512]
    contenders, missing = [ours(chunk) for chunk in chunks], []
    try:
        contenders.append(modelopt(world) if world > 1 else liger(128))
    except ImportError as error:
        missing.append(f"a peer was not measured: {error}")
    tables = {}
    for size in sizes:
        problem = Problem(SIZES[size], world, rank)
        tables[size] = [asdict(row) for row in measure(problem, contenders, chunks, rounds)]
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps({"tables": tables, "missing": missing}))
    dist.destroy_process_group()


def show(size: Size, world: int, rows: list[dict]) -> None:
    """Prints one table, and below it ours relative to the others."""
    print(
        f"\n{size.tokens} tokens, widths {size.student} and {size.teacher}, vocabulary {size.vocab}, TP {world}, fp32"
    )
    print("| for each rank                        | seconds | cpu seconds | held MB | peak MB | gradient error |")
    print("|--------------------------------------|---------|-------------|---------|---------|----------------|")
    for row in rows:
        held, peak = ("" if row[key] is None else f"{row[key]:.0f}" for key in ("held_mb", "peak_mb"))
        exact = "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
        times = f"{row['seconds']:7.2f} | {row['cpu_seconds']:11.2f}"
        print(f"| {row['name']:36} | {times} | {held:>7} | {peak:>7} | {exact:>14} |")
    mine, products = (
        [row for row in rows if row["name"].startswith(start)] for start in ("ours", "bare matrix products")
    )
    for our, bare in zip(mine, products, strict=True):
        shares = [f"{bare[key] / our[key]:.0%}" for key in ("seconds", "cpu_seconds")]
        print(f"{our['name']}: the matrix products take {shares[0]} of the time, {shares[1]} of the cpu time")
        for peer in (row for row in rows if row not in mine + products):
            times = (our[key] / peer[key] for key in ("seconds", "cpu_seconds"))
            print(
                f"    beside {peer['name']}: {next(times):.2f} of the time, {next(times):.2f} of the cpu time, "
                f"1/{peer['peak_mb'] / our['peak_mb']:.1f} of the peak memory"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["32k", "152k"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worlds", nargs="+", type=int, choices=(1, 2), default=[2, 1])
    parser.add_argument("--json", help="also write everything to this file")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    results = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for world in args.worlds:
            torch.multiprocessing.spawn(worker, (world, args.sizes, args.rounds, folder), nprocs=world)
            result = json.loads(Path(folder, f"{world}.json").read_text())
            for size, rows in result["tables"].items():
                show(SIZES[size], world, rows)
            print("\n".join(result["missing"]))
            results[f"tp{world}"] = result
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
