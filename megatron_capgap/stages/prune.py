"""Stage prune: creates a student from a teacher by importance scores on training text."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_capgap.checkpoint import loader, metadata, run_directory
from megatron_capgap.checkpoint.metadata import ModelRef
from megatron_capgap.common.fileio import write_atomically
from megatron_capgap.config import derived
from megatron_capgap.data.batch import MicroBatch, TokenDataset, global_batch_samples, micro_batches
from megatron_capgap.devices import Device
from megatron_capgap.distributed import collectives, process_group
from megatron_capgap.distributed.environment import Environment
from megatron_capgap.distributed.signals import StopRequest
from megatron_capgap.losses import language_model_loss
from megatron_capgap.models import gpt, memory, size
from megatron_capgap.models.fp8_weights import cast_params_to_fp8
from megatron_capgap.pruning import importance_scores, prune_plan
from megatron_capgap.pruning.apply import apply
from megatron_capgap.pruning.importance import Importance
from megatron_capgap.pruning.importance_scores import Scores
from megatron_capgap.pruning.prune_plan import PruningSelection
from megatron_capgap.stages import context, datasets
from megatron_capgap.stages.context import StageContext
from megatron_capgap.stages.plan import PruningPlan
from megatron_capgap.training.loop import peak_memory_line


def run(plan: PruningPlan, environment: Environment, device: Device) -> int:
    """Computes scores, selects what is kept and writes the student; returns the exit code."""
    with context.stage_context(plan, environment, device) as ctx:
        teacher = ctx.plan.teacher
        begun = collectives.run_on_rank0(lambda: importance_scores.read(ctx.run_dir, teacher, facts_of(ctx.plan)))
        if ctx.plan.resume_metadata is not None:
            ctx.log.info(
                f"nothing to do: {ctx.run_dir} holds the pruned student; choose another run_dir to prune again"
            )
            return 0
        scores = score(ctx, *begun)
        if scores is not None:
            _prune(ctx, scores)
    return 0


def facts_of(plan: PruningPlan) -> dict[str, Any]:
    """Everything that the scores depend on, by key."""
    config, prune_config, source = plan.config, plan.prune_config, plan.teacher_source
    return {
        "teacher.checkpoint": str(source.folder),
        "prune.importance": prune_config.importance,
        "prune.batches": prune_config.batches,
        "train.global_batch": plan.global_batch,
        "train.micro_batch": config.train.micro_batch,
        "data.train": list(config.data.train),
        "data.train_weights": list(config.data.train_weights) if config.data.train_weights else None,
        "data.sequence_length": config.data.sequence_length,
        "seed": config.seed,
    }


def score(ctx: StageContext[PruningPlan], begun: Scores, done: int) -> Scores | None:
    """Computes scores on the remaining global batches and saves their sums in RUN/scores.json. Collective.

    Args:
        ctx: context of the stage.
        begun: sums of an earlier start.
        done: number of global batches in these sums.

    Returns:
        Sums over all batches; None if stopped by a signal.
    """
    prune_config = ctx.plan.prune_config
    if done >= prune_config.batches:
        ctx.log.info(f"scores: all {done} global batches are done, in {ctx.run_dir / importance_scores.FILE}")
        context.commit_run_dir(ctx)
        return begun
    importance = _open(ctx)
    samples = datasets.open_training(ctx.plan)
    context.commit_run_dir(ctx)
    every = ctx.config.checkpoint.every
    ctx.log.bar(done, prune_config.batches)
    with StopRequest(ctx.device.torch_device, deadline=ctx.stop_at) as stop:
        while True:
            batches = _batches(ctx, samples, done)
            importance.run(batches, lambda hidden, lm_head, batch: _loss(ctx, hidden, lm_head, batch))
            done += 1
            ctx.log.progress(done, prune_config.batches, "scored", ctx.config.train.log_every)
            reason = stop.poll_all_ranks()
            if reason or done == prune_config.batches or (every and done % every == 0):
                scores = _added(begun, importance.scores())
                _keep(ctx, scores, done)
            if done == prune_config.batches:
                return scores
            if reason:
                ctx.log.info(f"stopped by {reason} after batch {done}; run the same command to continue")
                if ctx.log.is_rank0:
                    process_group.write_outcome("stopped")
                return None


def _keep(ctx: StageContext[PruningPlan], scores: Scores, done: int) -> None:
    """Writes RUN/scores.json. Collective."""
    collectives.run_on_rank0(lambda: importance_scores.write(ctx.run_dir, scores, done, facts_of(ctx.plan)))


def _added(one: Scores, other: Scores) -> Scores:
    return Scores(**{name: value + getattr(other, name) for name, value in vars(one).items()})


def _open(ctx: StageContext[PruningPlan]) -> Importance:
    """Builds the teacher and loads its weights. Collective."""
    plan, config, source = ctx.plan, ctx.config, ctx.plan.teacher_source
    shape, precision = source.meta.model, derived.teacher_precision(config)
    gradient = plan.prune_config.importance == "gradient"
    chunks = gpt.build(
        shape,
        ctx.parallel,
        precision,
        ctx.device,
        sequence_length=config.data.sequence_length,
        recompute=config.student.recompute if gradient else None,
        virtual=False,
    )
    loader.load_weights(source.folder, chunks, ctx.parallel)
    cast_params_to_fp8(chunks, precision, backward=gradient)
    for chunk in chunks:
        chunk.register_forward_pre_hook(lambda *_: ctx.device.between_micro_batches())
    return Importance(chunks, ctx.parallel, shape, gradient=gradient)


def _batches(ctx: StageContext[PruningPlan], samples: TokenDataset, done: int) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of the next global batch after `done`; micro-batches contain the same
    samples in every layout."""
    numbers = global_batch_samples(done, ctx.plan.global_batch)
    rows, parallel = ctx.config.train.micro_batch, ctx.parallel
    return list(micro_batches(samples, numbers, rows, parallel.dp_rank, parallel.dp_size, ctx.device.torch_device))


def _loss(ctx: StageContext[PruningPlan], hidden: Tensor, lm_head: Tensor, batch: MicroBatch) -> Tensor:
    """Mean cross-entropy of a micro-batch."""
    out = language_model_loss(
        hidden.flatten(0, 1),
        lm_head,
        *batch.flat(),
        vocab_size=ctx.plan.student.vocab,
        group=ctx.parallel.groups.tp,
        sequence_parallel=ctx.parallel.layout.sequence,
    )
    return out.loss_sum / out.num_tokens


def _prune(ctx: StageContext[PruningPlan], scores: Scores) -> None:
    """Writes the prune plan and the student's checkpoint. Collective."""
    plan, run_dir, source = ctx.plan, ctx.run_dir, ctx.plan.teacher_source
    selection = prune_plan.make(source.meta.model, plan.student, scores, plan.prune_config.layers_by, plan.budget)
    staged = run_dir / "checkpoints" / ".step_0.incomplete"

    def begin() -> None:
        write_atomically(run_dir / prune_plan.FILE, prune_plan.text(selection, scores, facts_of(plan)))
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)

    def finish() -> None:
        origin = ModelRef.of(source.folder, source.meta)
        meta = context.checkpoint_metadata(ctx, 0)
        metadata.write(
            replace(meta, steps=0, model=selection.student, pruned_from=origin, padding=selection.padding), staged
        )
        run_directory.publish(staged, run_dir, step=0, keep=1)

    collectives.run_on_rank0(begin)
    apply(source.folder, selection, staged)
    collectives.run_on_rank0(finish)
    _report(ctx, selection)


def _report(ctx: StageContext[PruningPlan], selection: PruningSelection) -> None:
    """Logs teacher and student sizes as a table, and peak memory. Collective."""
    before, after = selection.teacher, selection.student
    rows = [
        (name, str(getattr(before, name)), str(getattr(after, name))) for name in ("layers", "hidden", "heads", "ffn")
    ]
    rows.insert(3, ("kv_heads", str(derived.kv_heads(before)), str(derived.kv_heads(after))))
    for name, count in (("parameters", size.parameters), ("non-embedding", size.non_embedding_parameters)):
        rows.append((name, f"{count(before):,}", f"{count(after):,}"))
    ctx.log.table(f"pruned: {ctx.run_dir}/checkpoints/step_0", ("", "teacher", "student"), rows)
    if ctx.plan.budget is not None:
        for name, counts in selection.kept_parts.items():
            ctx.log.info(f"{name} kept per layer: {' '.join(map(str, counts))}")
        stored, share = size.parameters(after), selection.padding / size.parameters(after)
        ctx.log.info(f"parameters: {stored - selection.padding:,} kept, {stored:,} stored ({share:.1%} are zeros)")
    on_cpu = ctx.device.name == "cpu"
    need = memory.estimate(ctx.config, "prune", after, before, ctx.plan.world, on_cpu=on_cpu)
    ctx.log.info(f"{peak_memory_line(ctx.device, ctx.memory_at_start, need.total)} for the scores")
