"""Runs tasks of lm-evaluation-harness on a checkpoint, in any layout.

    python tools/evaluate_tasks.py --checkpoint RUN_DIR --tasks mytask.yaml --out results.json
    torchrun --nproc-per-node 4 tools/evaluate_tasks.py --checkpoint RUN_DIR --tensor 2 --pipeline 2 --tasks gsm8k

A task is a name in the harness's registry, whose data are downloaded, or a YAML file; paths in the file are relative to
the working directory. Ranks beyond tensor x pipeline are data-parallel replicas that share the requests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_capgap.evaluation.dispatcher import Rank0Dispatcher

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone, without installation

from megatron_capgap.common.errors import UserError, not_installed
from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.distributed import collectives, process_group
from megatron_capgap.distributed.environment import Environment, read_environment
from megatron_capgap.runtime import third_party
from tools.command import run_tool_on_ranks


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2, with one line on stderr, on a user error; 130 after Ctrl-C."""
    args = parse_arguments(argv)
    return run_tool_on_ranks("evaluate_tasks", partial(run, args))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate_tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN_DIR", help="run directory, or RUN_DIR/checkpoints/step_N"
    )
    parser.add_argument("--tasks", required=True, nargs="+", metavar="TASK", help="task names, patterns or YAML files")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="SentencePiece model or Hugging Face folder (default: the checkpoint's)"
    )
    parser.add_argument("--out", metavar="FILE.json", help="write results as JSON; a table is always printed")
    parser.add_argument("--limit", type=int, metavar="N", help="documents per task (default: all)")
    parser.add_argument("--shots", type=int, metavar="N", help="few-shot examples per question (default: the task's)")
    parser.add_argument("--log-samples", action="store_true", help="include every request and answer in the JSON")
    parser.add_argument("--bos", action="store_true", help="start each text with bos, as LLaMA's tokenizers do")
    parser.add_argument("--truncate", action="store_true", help="truncate contexts that are too long, on the left")
    parser.add_argument("--run-code", action="store_true", help="allow tasks to execute code that the model generates")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor-parallel size (default: 1)")
    parser.add_argument("--pipeline", type=int, default=1, metavar="N", help="pipeline-parallel size (default: 1)")
    parser.add_argument("--sequence", action="store_true", help="enable sequence parallelism")
    parser.add_argument(
        "--micro-batch", type=int, default=8, metavar="N", help="requests per forward pass (default: 8)"
    )
    parser.add_argument(
        "--compute",
        choices=("fp32", "bf16"),
        default="fp32",
        help="data type of weights and activations (default: fp32)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if available (default: auto)"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace, environment: Environment) -> int:
    check(args)
    third_party.prepare()
    from megatron_capgap.config.schema import Precision
    from megatron_capgap.devices import choose
    from megatron_capgap.distributed import parallel_context

    precision = Precision(compute=args.compute)
    device = choose(args.device, environment.local_rank, (precision,))
    # Long time-out: other ranks wait while rank 0 downloads data or computes metrics.
    process_group.init_process_group(environment, device, timeout_seconds=24 * 3600)
    try:
        ranks = gather_ranks(args, device, precision)
        if environment.rank > 0:
            ranks.worker_loop()
        results = collectives.run_on_rank0(lambda: lead(args, ranks))
    finally:
        parallel_context.destroy()
    if environment.rank == 0:
        from lm_eval.utils import make_table

        print(make_table(results), end="")
        if "groups" in results:
            print(make_table(results, "groups"), end="")
        if args.out:
            write_atomically(Path(args.out), json.dumps(results, indent=1, default=str) + "\n")
    return 0


def check(args: argparse.Namespace) -> None:
    """Validates the arguments before anything is loaded; raises UserError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(not_installed("lm-eval", "eval"))
    for name, least in (("limit", 1), ("shots", 0), ("tensor", 1), ("pipeline", 1), ("micro_batch", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: {value} given; use at least {least}")
    if args.sequence and args.tensor == 1:
        raise UserError("--sequence: requires tensor > 1; add --tensor 2 or remove --sequence")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"--out: {args.out}: no such folder; create it first")


def gather_ranks(args: argparse.Namespace, device: Any, precision: Any) -> Rank0Dispatcher:
    """Loads the checkpoint in the given layout. Collective."""
    from megatron_capgap.checkpoint import loader, metadata, run_directory
    from megatron_capgap.config.schema import Layout
    from megatron_capgap.config.validation.checks import check_flags
    from megatron_capgap.data.chat_template import stop_tokens
    from megatron_capgap.data.tokenizer import open_tokenizer
    from megatron_capgap.distributed import parallel_context as layouts
    from megatron_capgap.evaluation.dispatcher import Rank0Dispatcher
    from megatron_capgap.evaluation.scoring import Scorer
    from megatron_capgap.models import gpt

    folder = run_directory.locate(args.checkpoint)
    meta = metadata.read(folder)
    shape, cut = meta.model, Layout(tensor=args.tensor, pipeline=args.pipeline, sequence=args.sequence)
    check_flags(shape, cut, read_environment().world)
    tokenizer = open_tokenizer(args.tokenizer or meta.tokenizer)
    if tokenizer.special_ids_of(meta.tokenizer_fingerprint) is None:
        raise UserError(
            f"--tokenizer: differs from the tokenizer that {args.checkpoint} was trained with; use that one"
        )
    longest = min(filter(None, (shape.max_positions or meta.sequence_length, shape.attention_window)))
    if cut.sequence:
        longest -= longest % cut.tensor
    parallel = layouts.build(cut, seed=0, timeout_seconds=24 * 3600)
    chunks = gpt.build(shape, parallel, precision, device, sequence_length=longest)
    loader.load_weights(folder, chunks, parallel)
    for chunk in chunks:
        chunk.eval()
    ends, warning = stop_tokens(tokenizer, meta.chat_template, shape.vocab)
    for line in filter(None, (*tokenizer.remarks, warning) if read_environment().rank == 0 else ()):
        print(line, file=sys.stderr)
    return Rank0Dispatcher(
        Scorer(chunks, parallel, shape.vocab, args.micro_batch, longest, device.torch_device), tokenizer, ends
    )


def lead(args: argparse.Namespace, ranks: Rank0Dispatcher) -> dict[str, Any]:
    """Runs the harness on rank 0, while the other ranks run the worker loop."""
    try:
        from megatron_capgap.evaluation.harness import MegatronLM, run_tasks

        model = MegatronLM(ranks, bos=args.bos, truncate=args.truncate)
        results = run_tasks(
            model,
            args.tasks,
            limit=args.limit,
            shots=args.shots,
            log_samples=args.log_samples,
            unsafe=args.run_code,
        )
        model_facts = {name: vars(args)[name] for name in ("checkpoint", "tensor", "pipeline", "sequence", "compute")}
        return {"model": model_facts, **json.loads(json.dumps(results, default=str))}
    finally:
        ranks.shutdown()


if __name__ == "__main__":
    sys.exit(main())
