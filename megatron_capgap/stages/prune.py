"""prune: a student is cut out of a teacher, by what each part of it is worth on the training text."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_capgap.checkpoint import manifest as manifests
from megatron_capgap.checkpoint import store
from megatron_capgap.checkpoint.manifest import Origin
from megatron_capgap.config import derive
from megatron_capgap.config.files import write_atomically
from megatron_capgap.config.load import Loaded
from megatron_capgap.config.schema import Prune
from megatron_capgap.data.batch import MicroBatch, Samples, global_batch_samples, micro_batches
from megatron_capgap.losses import language_model_loss
from megatron_capgap.models import gpt, memory, size
from megatron_capgap.models.fp8_weights import hold_in_fp8
from megatron_capgap.pruning import plan as plans
from megatron_capgap.pruning import scores as files
from megatron_capgap.pruning.apply import apply
from megatron_capgap.pruning.importance import Importance
from megatron_capgap.pruning.plan import Plan
from megatron_capgap.pruning.scores import Scores
from megatron_capgap.runtime import launch
from megatron_capgap.runtime.devices import Device
from megatron_capgap.runtime.launch import Environment
from megatron_capgap.runtime.signals import StopRequest
from megatron_capgap.stages import common, material
from megatron_capgap.stages.common import Ground
from megatron_capgap.stages.resolve import Resolved, Source
from megatron_capgap.training.loop import peak_memory


def run(loaded: Loaded, environment: Environment, device: Device) -> int:
    """Scores, plans and cuts; returns the exit code."""
    with common.ground(loaded, "prune", environment, device) as ground:
        teacher = ground.resolved.teacher
        assert teacher is not None
        begun = launch.on_first_rank(lambda: files.read(ground.run_dir, teacher, facts_of(ground.resolved)))
        if ground.resolved.resumed is not None:
            ground.log.say(
                f"nothing to do: {ground.run_dir} holds the pruned student; choose another run_dir to prune anew"
            )
            return 0
        scores = score(ground, *begun)
        if scores is not None:
            _cut(ground, scores)
    return 0


def facts_of(resolved: Resolved) -> dict[str, Any]:
    """What the scores depend on, by the keys that say it."""
    config, wanted, source = resolved.config, _wanted(resolved), _teacher(resolved)
    return {
        "teacher.checkpoint": str(source.folder),
        "prune.importance": wanted.importance,
        "prune.batches": wanted.batches,
        "train.global_batch": resolved.global_batch,
        "train.micro_batch": config.train.micro_batch,
        "data.train": list(config.data.train),
        "data.train_weights": list(config.data.train_weights) if config.data.train_weights else None,
        "data.sequence_length": config.data.sequence_length,
        "seed": config.seed,
    }


def score(ground: Ground, begun: Scores, done: int) -> Scores | None:
    """Scores the teacher on what is left of its global batches, and keeps the sums in RUN/scores.json. Collective.

    Args:
        ground: what the stage stands on.
        begun: sums of an earlier start.
        done: global batches they are sums of.

    Returns:
        The sums of all batches; None after a signal.
    """
    wanted = _wanted(ground.resolved)
    if done >= wanted.batches:
        ground.log.say(f"scores: all {done} global batches are in {ground.run_dir / files.FILE}")
        common.begin(ground)
        return begun
    importance = _open(ground)
    samples = material.open_training(ground.resolved)
    common.begin(ground)
    every = ground.config.checkpoint.every
    ground.log.bar(done, wanted.batches)
    with StopRequest(ground.device.torch_device, deadline=ground.stop_at) as stop:
        while True:
            batches = _batches(ground, samples, done)
            importance.run(batches, lambda hidden, head, batch: _loss(ground, hidden, head, batch))
            done += 1
            ground.log.advance(done, wanted.batches, "scored", ground.config.train.log_every)
            reason = stop.agreed()
            if reason or done == wanted.batches or (every and done % every == 0):
                scores = _added(begun, importance.scores())
                _keep(ground, scores, done)
            if done == wanted.batches:
                return scores
            if reason:
                ground.log.say(f"stopped by {reason} after batch {done}; the same command goes on from there")
                if ground.log.speaks:
                    launch.leave_word("stopped")
                return None


def _keep(ground: Ground, scores: Scores, done: int) -> None:
    """Writes RUN/scores.json. Collective."""
    launch.on_first_rank(lambda: files.write(ground.run_dir, scores, done, facts_of(ground.resolved)))


def _added(one: Scores, other: Scores) -> Scores:
    return Scores(**{name: value + getattr(other, name) for name, value in vars(one).items()})


def _open(ground: Ground) -> Importance:
    """Builds the teacher and loads its weights. Collective."""
    resolved, config, source = ground.resolved, ground.config, _teacher(ground.resolved)
    shape, precision = source.manifest.model, derive.teacher_precision(config)
    gradient = _wanted(resolved).importance == "gradient"
    chunks = gpt.build(
        shape,
        ground.grid,
        precision,
        ground.device,
        sequence_length=config.data.sequence_length,
        virtual=False,
    )
    store.load_weights(source.folder, chunks, ground.grid)
    hold_in_fp8(chunks, precision, backward=gradient)
    for chunk in chunks:
        chunk.register_forward_pre_hook(lambda *_: ground.device.between_micro_batches())
    return Importance(chunks, ground.grid, shape, gradient=gradient)


def _batches(ground: Ground, samples: Samples, done: int) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of the global batch after `done`: which samples share one does not depend
    on the layout."""
    numbers = global_batch_samples(done, ground.resolved.global_batch)
    rows, grid = ground.config.train.micro_batch, ground.grid
    return list(micro_batches(samples, numbers, rows, grid.data_rank, grid.data_size, ground.device.torch_device))


def _loss(ground: Ground, hidden: Tensor, head: Tensor, batch: MicroBatch) -> Tensor:
    """Mean cross-entropy of a micro-batch."""
    out = language_model_loss(
        hidden.flatten(0, 1),
        head,
        *batch.flat(),
        vocab_size=ground.resolved.student.vocab,
        group=ground.grid.groups.tp,
        sequence_parallel=ground.grid.layout.sequence,
    )
    return out.loss_sum / out.num_tokens


def _cut(ground: Ground, scores: Scores) -> None:
    """Writes the plan and the student's checkpoint. Collective."""
    resolved, run_dir, source = ground.resolved, ground.run_dir, _teacher(ground.resolved)
    plan = plans.make(source.manifest.model, resolved.student, scores, _wanted(resolved).layers_by, resolved.budget)
    staged = run_dir / "checkpoints" / ".step_0.incomplete"

    def begin() -> None:
        write_atomically(run_dir / plans.FILE, plans.text(plan, scores, facts_of(resolved)))
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)

    def finish() -> None:
        origin = Origin.of(source.folder, source.manifest)
        words = common.describe(ground, 0)
        manifests.write(replace(words, steps=0, model=plan.student, pruned_from=origin, padding=plan.padding), staged)
        manifests.publish(staged, run_dir, step=0, keep=1)

    launch.on_first_rank(begin)
    apply(source.folder, plan, staged)
    launch.on_first_rank(finish)
    _report(ground, plan)


def _report(ground: Ground, plan: Plan) -> None:
    """What went, in a table, and what it took. Collective."""
    before, after = plan.teacher, plan.student
    rows = [
        (name, str(getattr(before, name)), str(getattr(after, name))) for name in ("layers", "hidden", "heads", "ffn")
    ]
    rows.insert(3, ("kv_heads", *(str(derive.kv_heads(shape)) for shape in (before, after))))
    for name, count in (("parameters", size.parameters), ("non-embedding", size.non_embedding_parameters)):
        rows.append((name, f"{count(before):,}", f"{count(after):,}"))
    ground.log.table(f"pruned: {ground.run_dir}/checkpoints/step_0", ("", "teacher", "student"), rows)
    if ground.resolved.budget is not None:
        for name, counts in plan.kept_parts.items():
            ground.log.say(f"{name} kept, layer by layer: {' '.join(map(str, counts))}")
        stored, share = size.parameters(after), plan.padding / size.parameters(after)
        ground.log.say(f"parameters: {stored - plan.padding:,} kept, {stored:,} stored ({share:.1%} are zeros)")
    on_cpu = ground.device.name == "cpu"
    need = memory.estimate(ground.config, "prune", after, before, ground.resolved.world, on_cpu=on_cpu)
    ground.log.say(f"{peak_memory(ground.device, ground.memory_at_start, need.total)} for the scores")


def _wanted(resolved: Resolved) -> Prune:
    assert resolved.config.prune is not None, "load refuses a prune configuration without the section"
    return resolved.config.prune


def _teacher(resolved: Resolved) -> Source:
    assert resolved.teacher_source is not None, "load refuses a prune configuration without a teacher"
    return resolved.teacher_source
