"""evaluate: loss, perplexity and bits per byte on held-out text or conversations, in any layout."""

from __future__ import annotations

import json

from megatron_capgap.config.files import write_atomically
from megatron_capgap.config.load import Loaded
from megatron_capgap.runtime.devices import Device
from megatron_capgap.runtime.launch import Environment
from megatron_capgap.stages import common, material
from megatron_capgap.training.evaluate import evaluate


def run(loaded: Loaded, environment: Environment, device: Device) -> int:
    """Measures, writes RUN/evaluation.json; returns the exit code."""
    with common.ground(loaded, "evaluate", environment, device) as ground:
        config, resolved = ground.config, ground.resolved
        chunks = common.student_chunks(ground, trains=False)
        samples = material.open_validation(resolved)
        assert samples is not None, "load refuses an evaluation without held-out data"
        common.begin(ground)
        result = evaluate(
            chunks,
            ground.grid,
            samples,
            vocab_size=resolved.student.vocab,
            byte_lengths=common.padded_byte_lengths(resolved),
            micro_batch=config.train.micro_batch,
            global_batch=resolved.global_batch,
            batches=config.train.eval_batches,
            device=ground.device.torch_device,
        )
        step = resolved.student_source.manifest.step if resolved.student_source else 0
        entry = result.entry(step)
        ground.log.record(entry)
        left_out = 0 if resolved.template or config.train.eval_batches else samples.left_out
        if left_out:
            ground.log.say(f"{left_out} tokens at the ends of the data fill no row and are left out")
        if ground.log.speaks:
            facts = {
                **entry,
                "tokens": result.tokens,
                "tokens_left_out": left_out,
                "samples": result.samples,
                "checkpoint": config.student.checkpoint,
            }
            write_atomically(ground.run_dir / "evaluation.json", json.dumps(facts, indent=1) + "\n")
        rows = [(f"{result.loss:.4f}", f"{result.perplexity:.3f}", f"{result.bits_per_byte:.4f}", str(result.tokens))]
        ground.log.table(f"step {step}", ("loss a token", "perplexity", "bits a byte", "tokens"), rows)
    return 0
