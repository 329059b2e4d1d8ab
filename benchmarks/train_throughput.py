"""Compares distillation speed and memory of this project with a plain PyTorch loop on Hugging Face models.

    python benchmarks/train_throughput.py [--rounds 3] [--steps 12] [--json FILE]

Both train the same student (9.3M parameters) from the same teacher (34M) on the same samples: batch 8 x 256, vocabulary
8192, fp32, AdamW (fused), clipped gradients, 0.5 cross-entropy + 0.5 forward KL. They run alternately, each in separate
processes. The speed is the median over the steps after the first few; the memory is the peak resident set of a process
above that after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "student": {"layers": 6, "hidden": 256, "heads": 8, "kv_heads": 8, "ffn": 768, "vocab": 8192},
    "teacher": {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 8, "ffn": 1376, "vocab": 8192},
}
BATCH, LENGTH, WARM_UP = 8, 256, 3
MIB = 1 << 20


def main() -> int:
    """Runs all implementations `--rounds` times alternately and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        result = CONTENDERS[options.contender](options.folder, options.steps)
        print("RESULT " + json.dumps(result))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        results: dict[str, list[dict[str, float]]] = {name: [] for name in RANKS}
        for _ in range(options.rounds):
            for name, ranks in RANKS.items():
                results[name].append(run_contender(name, ranks, Path(folder), options.steps))
    table = summarise(results)
    if options.json:
        options.json.write_text(json.dumps({"rounds": results, "summary": table}, indent=1) + "\n")
    return 0


def prepare(folder: Path) -> None:
    """Creates text, tokenizer, datasets and a teacher checkpoint."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]
    with open(folder / "text.jsonl", "w") as file:
        for _ in range(600):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=200))}) + "\n")
    tool = [sys.executable, str(ROOT / "tools/prepare_data.py")]
    call(
        [*tool, "--input", "text.jsonl", "--tokenizer", "tok.model", "--train-tokenizer", "2000", "--out", "data"],
        folder,
    )
    common = {
        "seed": 1,
        "device": "cpu",
        "data": {"train": ["data"], "sequence_length": LENGTH, "tokenizer": "tok.model"},
        "runtime": {"tensorboard": False},
    }
    adapt = {
        **common,
        "run_dir": "teacher",
        "student": {"model": SHAPES["teacher"]},
        "train": {"steps": 1, "global_batch": BATCH, "micro_batch": BATCH},
    }
    (folder / "adapt.json").write_text(json.dumps(adapt))
    distill = {
        **common,
        "student": {"model": SHAPES["student"]},
        "teacher": {"checkpoint": "teacher"},
        "train": {"global_batch": BATCH, "micro_batch": BATCH},
    }
    (folder / "distill.json").write_text(json.dumps(distill))
    call([sys.executable, "-m", "megatron_capgap", "adapt", "--config", "adapt.json"], folder)


def call(command: list[str], folder: Path) -> str:
    """Runs a command in `folder` and returns its output; prints the output if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def run_contender(name: str, ranks: int, folder: Path, steps: int) -> dict[str, float]:
    """Starts one process per rank, each with its share of the threads; returns rank 0's result."""
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder), "--steps", str(steps)]
    answers = start(command, ranks, threads=max(1, 2 // ranks))
    return {**answers[0], "peak": max(answer["peak"] for answer in answers)}


def start(command: list[str], ranks: int, threads: int) -> list[dict[str, float]]:
    """Starts one process per rank; returns what each prints after RESULT."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(error for _, error in outputs))
    return [json.loads(out.split("RESULT ")[1]) for out, _ in outputs]


def ours(layout: dict[str, object]) -> object:
    """The distill stage of this project."""

    def baseline(folder: Path, steps: int) -> dict[str, float]:
        from megatron_capgap.cli import main as capgap
        from megatron_capgap.runtime import third_party

        # The imports of `capgap` itself, in its order, so that the baseline memory is that of a run.
        third_party.prepare()
        from megatron_capgap import devices

        devices.choose("cpu", 0)
        import megatron_capgap.stages.distill  # noqa: F401
        from megatron_capgap.devices.cpu import peak_resident_bytes

        base = peak_resident_bytes()
        os.chdir(folder)
        run_dir = Path(f"run_{os.environ['MASTER_PORT']}")
        words = [f"--student.layout.{key}={value}" for key, value in layout.items()]
        sys.stdout.flush()
        code = capgap(["distill", "--config", "distill.json", f"--run_dir={run_dir}", f"--train.steps={steps}", *words])
        assert code == 0
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        speeds = [line["tokens_per_second"] for line in lines[WARM_UP:]]
        return {
            "tokens_per_second": statistics.median(speeds),
            "peak": peak_resident_bytes() - base,
            "loss": lines[0]["loss"],
        }

    return baseline


def plain_loop(folder: Path, steps: int) -> dict[str, float]:
    """The comparison: Hugging Face models, sdpa attention, materialised logits, torch's optimizer."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_capgap.config.schema import DataConfig
    from megatron_capgap.data import pretrain
    from megatron_capgap.devices.cpu import peak_resident_bytes

    base = peak_resident_bytes()
    torch.manual_seed(1)
    teacher, student = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocab"],
                hidden_size=shape["hidden"],
                intermediate_size=shape["ffn"],
                num_hidden_layers=shape["layers"],
                num_attention_heads=shape["heads"],
                num_key_value_heads=shape["kv_heads"],
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        for shape in (SHAPES["teacher"], SHAPES["student"])
    )
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    data = DataConfig(train=(str(folder / "data"),), sequence_length=LENGTH, tokenizer="unused")
    pretrain.build_indices(data, SHAPES["student"]["vocab"], 1, folder / "peer_cache")
    samples = pretrain.open_training(data, 1, folder / "peer_cache")
    speeds, first = [], 0.0
    for step in range(steps):
        start = time.perf_counter()
        rows = torch.stack([torch.from_numpy(samples.tokens(step * BATCH + i)) for i in range(BATCH)])
        tokens, labels = rows[:, :-1], rows[:, 1:]
        with torch.no_grad():
            target = F.log_softmax(teacher(tokens).logits, dim=-1)
        logits = student(tokens).logits
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        divergence = F.kl_div(
            F.log_softmax(logits, dim=-1).flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean"
        )
        loss = 0.5 * cross_entropy + 0.5 * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        first = first or loss.item()
        speeds.append(BATCH * LENGTH / (time.perf_counter() - start))
    return {
        "tokens_per_second": statistics.median(speeds[WARM_UP:]),
        "peak": peak_resident_bytes() - base,
        "loss": first,
    }


def summarise(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Prints medians over the rounds, and ratios computed per round."""
    peer = results["plain PyTorch loop"]
    table = {}
    print(f"{'':<24}{'tokens/s':>10}{'x peer':>8}{'peak MiB a rank':>17}{'x peer':>8}{'first loss':>12}")
    for name, rounds in results.items():
        speed = statistics.median(r["tokens_per_second"] for r in rounds)
        peak = statistics.median(r["peak"] for r in rounds)
        faster = statistics.median(
            r["tokens_per_second"] / p["tokens_per_second"] for r, p in zip(rounds, peer, strict=True)
        )
        larger = statistics.median(r["peak"] / p["peak"] for r, p in zip(rounds, peer, strict=True))
        table[name] = {"tokens_per_second": speed, "speed_ratio": faster, "peak_bytes": peak, "peak_ratio": larger}
        print(f"{name:<24}{speed:>10.0f}{faster:>8.2f}{peak / MIB:>17.0f}{larger:>8.2f}{rounds[0]['loss']:>12.4f}")
    return table


RANKS = {"plain PyTorch loop": 1, "capgap, 1 process": 1, "capgap, tensor 2": 2}
CONTENDERS = {
    "plain PyTorch loop": plain_loop,
    "capgap, 1 process": ours({}),
    "capgap, tensor 2": ours({"tensor": 2, "sequence": "true"}),
}

if __name__ == "__main__":
    sys.exit(main())
