"""Stage evaluate: loss, perplexity and bits per byte on held-out text or conversations, in any layout."""

from __future__ import annotations

import json

from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.data.pretrain import PackedTextDataset
from megatron_capgap.devices import Device
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.stages import context, datasets
from megatron_capgap.stages.plan import RunPlan
from megatron_capgap.training.evaluate import evaluate


def run(plan: RunPlan, environment: Environment, device: Device) -> int:
    """Evaluates and writes RUN/evaluation.json; returns the exit code."""
    with context.stage_context(plan, environment, device) as ctx:
        config, plan = ctx.config, ctx.plan
        chunks = context.build_student(ctx, trains=False)
        samples = datasets.open_validation(plan)
        assert samples is not None, "guaranteed by config.loader"
        context.commit_run_dir(ctx)
        result = evaluate(
            chunks,
            ctx.parallel,
            samples,
            vocab_size=plan.student.vocab,
            byte_lengths=context.padded_byte_lengths(plan),
            micro_batch=config.train.micro_batch,
            global_batch=plan.global_batch,
            batches=config.train.eval_batches,
            device=ctx.device.torch_device,
        )
        assert result is not None, "evaluation without a stop condition always completes"
        step = plan.student_source.meta.step if plan.student_source else 0
        entry = result.entry(step)
        ctx.log.record(entry)
        whole = config.train.eval_batches is None
        left_out = samples.left_out if isinstance(samples, PackedTextDataset) and whole else 0
        if left_out:
            ctx.log.info(f"{left_out} tokens at the ends of the datasets do not fill a row and are skipped")
        if ctx.log.is_rank0:
            facts = {
                **entry,
                "tokens": result.tokens,
                "tokens_left_out": left_out,
                "samples": result.samples,
                "checkpoint": config.student.checkpoint,
            }
            write_atomically(ctx.run_dir / "evaluation.json", json.dumps(facts, indent=1) + "\n")
        rows = [(f"{result.loss:.4f}", f"{result.perplexity:.3f}", f"{result.bits_per_byte:.4f}", str(result.tokens))]
        ctx.log.table(f"step {step}", ("loss per token", "perplexity", "bits per byte", "tokens"), rows)
    return 0
