"""Compares teacher placements: in the student's layout, in its own layout, on its own ranks; measured, and predicted at
scale.

    python benchmarks/teacher_layouts.py [--parts runs schedules memory scale] [--steps 8] [--json FILE]

Four parts. (1) Whole runs on 4 ranks, one after the other: step time, and peak memory of the rank that uses most. (2) A
simulator of pipeline schedules, compared with Megatron's own schedules over gloo, whose stages sleep instead of
computing, so that the schedule is measured and not this machine's cores. It also covers a teacher inside the student's
schedule, as in modelopt: every stage runs both models' layers, and the activations are sent concatenated. The benchmark
fails if simulation and measurement differ by more than `AGREE`. (3) Memory of the teacher on a rank, by arithmetic and
by the measurements of benchmarks/loss.py. (4) The simulator's predictions for 8 to 64 pipeline stages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import train_throughput

from megatron_capgap.planning.schedule import Schedule

PARTS = ("runs", "schedules", "memory", "scale")
WARM_UP = 2
TP2_PP2 = {"tensor": 2, "pipeline": 2}
# name: (the student's layout, the teacher's section)
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "colocated, both tensor 2 x pipeline 2": (TP2_PP2, {}),
    "colocated, teacher tensor 4": (TP2_PP2, {"layout": {"tensor": 4}}),
    "colocated, teacher data 4": (TP2_PP2, {"layout": {}}),
    "disjoint, 2 + 2: student tensor 2, teacher data 2": (
        {"tensor": 2},
        {"layout": {}, "placement": "disjoint", "ranks": 2},
    ),
}
# Time of one micro-batch in one pipeline stage of the student is 1; the teacher has 2.5 times its parameters.
STUDENT, BACKWARD, TEACHER = 1.0, 2.0, 2.5
AGREE = (0.85, 1.05)
"""Accepted ratios of simulated to measured time; gloo and the operating system add time."""
# Multiple of one model's fp32 logits of a micro-batch at the peak of modelopt's LogitsKLLoss and Megatron's
# cross-entropy, measured by benchmarks/loss.py for both vocabularies: 1311 of 131 MB, 6223 of 622.
LOGITS_ALIVE = 10


def main() -> int:
    """Runs the parts and prints their tables; returns 1 if the simulator does not agree with the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        print("RESULT " + json.dumps(rank_of(options.rank_of, options.folder, options.steps)))
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "runs" in options.parts:
            results["runs"] = runs(Path(folder), options.steps)
        if "schedules" in options.parts:
            results["schedules"] = schedules(Path(folder))
    if "memory" in options.parts:
        results["memory"] = memories()
    if "scale" in options.parts:
        results["scale"] = foreseen()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    apart = [name for name, found in results.get("schedules", {}).items() if not agree(**found)]
    for name in apart:
        print(f"simulated and measured are apart: {name}: {results['schedules'][name]}", file=sys.stderr)
    return 1 if apart else 0


def agree(measured: float, simulated: float) -> bool:
    """Whether simulation and measurement agree."""
    return AGREE[0] <= simulated / measured <= AGREE[1]


def runs(folder: Path, steps: int) -> dict[str, Any]:
    """Measures step time and peak memory of whole runs; prints the table."""
    train_throughput.prepare(folder)
    print("| 4 ranks, 34M teacher, 9.3M student, 8 x 256 | seconds a step | peak MiB a rank |\n|---|---|---|")
    found = {}
    for name in RUNS:
        ranks = start(f"run {name}", 4, folder, steps)
        found[name] = {"seconds": ranks[0]["seconds"], "peak": max(rank["peak"] for rank in ranks) / (1 << 20)}
        print(f"| {name} | {found[name]['seconds']:.2f} | {found[name]['peak']:.0f} |", flush=True)
    return found


def schedules(folder: Path) -> dict[str, Any]:
    """Compares the simulator with Megatron's schedules; prints the table."""
    print("\n| Megatron's schedule over gloo, stages that sleep | measured s | simulated s |\n|---|---|---|")
    found = {}
    for name, case in SLEEPING.items():
        measured = max(rank["seconds"] for rank in start(f"sleep {name}", case.stages, folder, 3))
        found[name] = {"measured": measured, "simulated": case.simulated()}
        print(f"| {name} | {measured:.3f} | {case.simulated():.3f} |", flush=True)
    return found


def start(what: str, ranks: int, folder: Path, steps: int) -> list[dict[str, float]]:
    """Starts one single-threaded process per rank; returns every rank's result."""
    command = [sys.executable, __file__, "--rank-of", what, "--folder", str(folder), "--steps", str(steps)]
    return train_throughput.start(command, ranks, threads=1)


def rank_of(what: str, folder: Path, steps: int) -> dict[str, float]:
    """Executes one rank of a measurement."""
    kind, name = what.split(" ", 1)
    return run(name, folder, steps) if kind == "run" else sleep_through(SLEEPING[name], steps)


def run(name: str, folder: Path, steps: int) -> dict[str, float]:
    """Runs the distill stage in one placement."""
    import megatron.core  # noqa: F401
    import torch  # noqa: F401

    from megatron_capgap.cli import main as capgap
    from megatron_capgap.devices.cpu import peak_resident_bytes

    base = peak_resident_bytes()
    os.chdir(folder)
    student, teacher = RUNS[name]
    run_dir = Path(f"run_{os.environ['MASTER_PORT']}")
    words = [f"--student.layout={json.dumps(student)}", f"--run_dir={run_dir}", f"--train.steps={steps}"]
    words += ["--train.micro_batch=1", "--teacher.micro_batch=1"]
    words += [f"--teacher.{key}={json.dumps(value)}" for key, value in teacher.items()]
    sys.stdout.flush()
    assert capgap(["distill", "--config", "distill.json", *words]) == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["tokens"] / line["tokens_per_second"] for line in lines[WARM_UP:] if "loss" in line]
    return {"seconds": statistics.median(seconds), "peak": peak_resident_bytes() - base}


MS = 0.02
SLEEPING = {
    "student alone, 4 stages, 8 micro-batches": Schedule(4, 8, MS, 2 * MS),
    "student alone, 4 stages of 2 chunks, 8 micro-batches": Schedule(4, 8, MS, 2 * MS, virtual=2),
    "teacher alone, 4 stages, 8 micro-batches": Schedule(4, 8, 2.5 * MS),
    "both in one schedule, concatenated, 4 stages, 8 micro-batches": Schedule(4, 8, 3.5 * MS, 2 * MS, width=224),
    "both in one schedule, concatenated, 8 stages, 16 micro-batches": Schedule(8, 16, 3.5 * MS, 2 * MS, width=224),
}


def sleep_through(case: Schedule, steps: int) -> dict[str, float]:
    """Runs one rank of Megatron's own schedule over stages that sleep."""
    import torch

    from megatron_capgap.devices import choose

    device = choose("cpu", 0)
    import torch.distributed as dist
    from megatron.core.transformer.enums import ModelType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_capgap.config.schema import Layout
    from megatron_capgap.distributed import parallel_context, process_group
    from megatron_capgap.distributed.environment import read_environment
    from megatron_capgap.models import pipeline_schedule

    process_group.init_process_group(read_environment(), device, 600)
    parallel = parallel_context.build(Layout(pipeline=case.stages, virtual_pipeline=case.virtual), 0)
    config = TransformerConfig(
        num_layers=case.stages * case.virtual,
        hidden_size=case.width,
        num_attention_heads=1,
        pipeline_model_parallel_size=case.stages,
        virtual_pipeline_model_parallel_size=case.virtual if case.virtual > 1 else None,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        batch_p2p_comm=case.virtual == 1,
        overlap_p2p_comm=case.virtual > 1,
        use_cpu_initialization=True,
    )

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            time.sleep(case.forward / case.virtual)
            return states.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            time.sleep(case.backward / case.virtual)
            return gradient

    class Stage(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.given, self.model_type = config, None, ModelType.encoder_or_decoder

        def set_input_tensor(self, given: Any) -> None:
            self.given = given[0] if isinstance(given, list) else given

        def forward(self, tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            given = torch.zeros(16, 1, case.width, requires_grad=True) if self.given is None else self.given
            return Sleep.apply(given)

    @dataclass
    class Batch:
        tokens: torch.Tensor
        position_ids: torch.Tensor
        attention_mask: None = None

    def last_stage(hidden: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict]:
        return hidden.sum(), torch.ones((), dtype=torch.int), {}

    batches = [Batch(torch.zeros(1, 16), torch.zeros(1, 16))] * case.micro_batches
    chunks = [Stage() for _ in range(case.virtual)]
    seconds = []
    for _ in range(steps):
        dist.barrier()
        began = time.perf_counter()
        pipeline_schedule.run(chunks, parallel, batches, last_stage, forward_only=not case.backward, shape=(16, 1))
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds)}


# name: (student, teacher, layout of both, sequence length, micro-batches of 1 in a step, type)
MODELS = {"layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256}
MEMORIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int, int, str]] = {
    "34M to 9.3M, vocabulary 8192, 8 x 256, tensor 2 x pipeline 2": (
        train_throughput.SHAPES["student"],
        train_throughput.SHAPES["teacher"],
        TP2_PP2,
        train_throughput.LENGTH,
        train_throughput.BATCH,
        "fp32",
    ),
    "8B to 3B, vocabulary 128256, 32 x 4096, tensor 4 with sequence x pipeline 8": (
        {**MODELS, "hidden": 2560, "ffn": 8192},
        {**MODELS, "hidden": 4096, "ffn": 14336},
        {"tensor": 4, "pipeline": 8, "sequence": True},
        4096,
        32,
        "bf16",
    ),
}


def memories() -> dict[str, dict[str, float]]:
    """Memory of the teacher on the student's last stage for both methods in one layout; prints the table."""
    print("\n| beside weights and activations, MiB on a rank of the last stage | ours | one schedule |\n|---|---|---|")
    found = {}
    for name, case in MEMORIES.items():
        ours, concatenated = (bytes_ / (1 << 20) for bytes_ in taught(*case))
        found[name] = {"ours": ours, "one schedule": concatenated}
        print(f"| {name} | {ours:,.0f} | {concatenated:,.0f} |")
    return found


def taught(
    student: dict[str, Any], teacher: dict[str, Any], cut: dict[str, Any], length: int, count: int, compute: str
) -> tuple[int, int]:
    """Bytes of both methods. Ours: the teacher's states of a global batch and a chunk of both models' logits. Both
    models in one schedule: the teacher's states of a micro-batch and the loss on that micro-batch's logits.
    """
    from megatron_capgap.config import derived
    from megatron_capgap.config.schema import (
        Config,
        DataConfig,
        Layout,
        ModelShape,
        Precision,
        StudentConfig,
        TeacherConfig,
    )
    from megatron_capgap.config.training import TrainConfig
    from megatron_capgap.models import memory, size

    shapes, layout = (ModelShape(**student), ModelShape(**teacher)), Layout(**cut)
    config = Config(
        "run",
        StudentConfig(layout=layout),
        DataConfig("tokenizer", sequence_length=length),
        teacher=TeacherConfig("teacher"),
        train=TrainConfig(global_batch=count, micro_batch=1),
        precision=Precision(compute=compute),
    )
    last = layout.pipeline - 1
    waiting = memory.teacher_memory(config, *shapes, layout.tensor * layout.pipeline, last, last).needed
    a_token = 4 * size.padded_vocab(shapes[0].vocab, layout.tensor) // layout.tensor
    chunk = min(length, derived.loss_chunk_tokens(False))
    return waiting + 2 * chunk * a_token, waiting // count + LOGITS_ALIVE * length * a_token


def foreseen() -> list[dict[str, float]]:
    """Predicted step times at scale, in units of one student stage's forward pass; prints the table.

    All use the same number of ranks: 11 pipelines of the student, or 6 of them and 5/11 of the ranks for the teacher.
    Tensor- and data-parallel teachers have no stages, hence no bubble; communication is neglected except for an
    efficiency factor.
    """
    header = ["stages", "micro-batches", "one schedule", "same layout", "teacher without stages", "at 75% efficiency"]
    header += ["the same, student of 2 chunks", "disjoint, 6 : 5"]
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    rows = []
    for stages in (8, 16, 32, 64):
        for count in (2 * stages, 8 * stages):
            numbers = predicted(stages, count)
            print(f"| {stages} | {count} | " + " | ".join(f"{number:.0f}" for number in numbers) + " |")
            rows.append(dict(zip(header, [stages, count, *numbers], strict=True)))
    return rows


def predicted(stages: int, count: int) -> Sequence[float]:
    """Step times of each method for one number of stages and of micro-batches per pipeline."""
    student = Schedule(stages, count, STUDENT, BACKWARD).simulated()
    chunks = Schedule(stages, count, STUDENT, BACKWARD, virtual=2).simulated()
    fused = Schedule(stages, count, STUDENT + TEACHER, BACKWARD).simulated()
    same = student + Schedule(stages, count, TEACHER).simulated()
    without = count * TEACHER
    apart = max(Schedule(stages, -(-11 * count // 6), STUDENT, BACKWARD).simulated(), 11 / 5 * without)
    return [fused, same, student + without, student + without / 0.75, chunks + without, apart]


if __name__ == "__main__":
    raise SystemExit(main())
