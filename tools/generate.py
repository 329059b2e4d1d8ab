"""Generates text from a checkpoint, in any layout.

    python tools/generate.py --checkpoint RUN_DIR --tokenizer PATH --prompt "Once upon a time"
    torchrun --nproc-per-node 2 tools/generate.py --checkpoint RUN_DIR --tokenizer PATH --prompts FILE.jsonl --tensor 2

A line of FILE.jsonl is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}; conversations are
formatted with a chat template. Each output line is the input line with the model's output in "text". Ranks beyond
tensor x pipeline are data-parallel replicas that share the prompts.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone, without installation

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.common.errors import UserError
from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.config.schema import Layout, ModelShape, Precision
from megatron_capgap.config.validation.checks import check_flags
from megatron_capgap.data.chat_template import open_template, stop_tokens
from megatron_capgap.data.prompts import Prompt, encode_prompt, read_prompts
from megatron_capgap.data.tokenizer import open_tokenizer
from megatron_capgap.distributed import process_group
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.runtime import third_party
from tools.command import run_tool_on_ranks


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2, with one line on stderr, on a user error; 130 after Ctrl-C."""
    args = parse_arguments(argv)
    return run_tool_on_ranks("generate", functools.partial(run, args))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN_DIR", help="run directory, or RUN_DIR/checkpoints/step_N")
    add("--tokenizer", required=True, metavar="PATH", help="SentencePiece model or Hugging Face folder")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="one text to continue")
    asked.add_argument("--prompts", metavar="FILE.jsonl", help="file of prompts or conversations, one per line")
    add("--out", metavar="FILE.jsonl", help="output file (default: standard output)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="most new tokens per prompt (default: 128)")
    add("--temperature", type=float, default=0.0, metavar="X", help="sampling temperature; 0: greedy (default: 0)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens; 0: all (default: 0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling: probability mass (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: 0)")
    add("--bos", action="store_true", help="start each prompt with the tokenizer's bos")
    add("--template", choices=("tokenizer", "default"), default="tokenizer", help="for messages (default: tokenizer)")
    add("--batch", type=int, default=32, metavar="N", help="prompts per forward pass (default: 32)")
    add("--tensor", type=int, default=1, metavar="N", help="tensor-parallel size (default: 1)")
    add("--pipeline", type=int, default=1, metavar="N", help="pipeline-parallel size (default: 1)")
    add("--compute", choices=("fp32", "bf16"), default="fp32", help="weights and activations (default: fp32)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if available (default: auto)")
    args = parser.parse_args(argv)
    for name in ("max_new_tokens", "batch", "tensor", "pipeline"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(args, name)} is less than 1")
    return args


def run(args: argparse.Namespace, environment: Environment) -> int:
    folder = run_directory.locate(args.checkpoint)
    meta = metadata.read(folder)
    tokenizer = open_tokenizer(args.tokenizer)
    if tokenizer.special_ids_of(meta.tokenizer_fingerprint) is None:
        raise UserError(
            f"--tokenizer: {args.tokenizer} differs from the tokenizer that {args.checkpoint} was trained with"
        )
    layout = Layout(tensor=args.tensor, pipeline=args.pipeline)
    check_flags(meta.model, layout, environment.world)
    prompts: list[Prompt] = [args.prompt] if args.prompt is not None else read_prompts(args.prompts)
    template = functools.cache(lambda: open_template(args.template, tokenizer, args.tokenizer))
    ids = [encode_prompt(prompt, tokenizer, template, args.bos) for prompt in prompts]
    length = longest(ids, args.max_new_tokens, meta.model)
    turns = template().end_of_turn_ids() if any(not isinstance(prompt, str) for prompt in prompts) else frozenset()
    ends, warning = stop_tokens(tokenizer, meta.chat_template, meta.model.vocab, turns)
    for remark in filter(None, (*tokenizer.remarks, warning) if environment.rank == 0 else ()):
        print(remark, file=sys.stderr)
    found = continuations(args, environment, folder, meta.model, layout, tokenizer.vocab_size, ends, ids, length)
    if environment.rank == 0:
        lines = [line(prompt, tokenizer.decode(new)) for prompt, new in zip(prompts, found, strict=True)]
        if args.out:
            write_atomically(Path(args.out), "".join(lines))
        else:
            print("".join(lines), end="")
    return 0


def longest(prompts: list[list[int]], new: int, shape: ModelShape) -> int:
    """Sequence length that the model is built for."""
    length = max(map(len, prompts)) + new
    most = min(filter(None, (shape.max_positions, shape.attention_window)), default=None)
    if most is not None and length > most:
        raise UserError(
            f"--max-new-tokens: {new} after the longest prompt of {length - new} tokens exceeds the {most} tokens that "
            "the model supports; use fewer"
        )
    return length


def continuations(
    args: argparse.Namespace,
    environment: Environment,
    folder: Path,
    shape: ModelShape,
    layout: Layout,
    known: int,
    ends: frozenset[int],
    prompts: list[list[int]],
    length: int,
) -> list[list[int]]:
    """New token ids of each prompt. Collective."""
    third_party.prepare()
    from megatron_capgap.devices import choose

    precision = Precision(compute=args.compute)
    device = choose(args.device, environment.local_rank, [precision])
    process_group.init_process_group(environment, device, timeout_seconds=3600)

    from megatron_capgap.checkpoint import loader
    from megatron_capgap.distributed import parallel_context as layouts
    from megatron_capgap.generation import Sampling, generate
    from megatron_capgap.models import gpt

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    parallel = layouts.build(layout, args.seed)
    chunks = gpt.build(shape, parallel, precision, device, sequence_length=length)
    loader.load_weights(folder, chunks, parallel)
    found = generate(
        chunks,
        parallel,
        prompts,
        vocab_size=min(shape.vocab, known),
        max_new_tokens=args.max_new_tokens,
        ends=ends,
        sampling=sampling,
        batch=args.batch,
    )
    layouts.destroy()
    return found


def line(prompt: Prompt, text: str) -> str:
    """One line of the output."""
    if isinstance(prompt, str):
        prompt_fields = {"prompt": prompt}
    else:
        prompt_fields = {"messages": [message.content() for message in prompt]}
    return json.dumps({**prompt_fields, "text": text}, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
