"""Values derived from a configuration and the world size: nulls resolved to numbers."""

from megatron_capgap.config.recompute import Recompute
from megatron_capgap.config.schema import (
    STAGES_WITH_TEACHER,
    WITHOUT_CHAIN_RULE,
    Config,
    LayerPair,
    Layout,
    ModelShape,
    Precision,
    TeacherConfig,
)

BYTES = {"fp32": 4, "bf16": 2}
"""Bytes of a number of each compute type."""


def ranks_per_model(layout: Layout) -> int:
    """Ranks per model replica: tensor * pipeline * context."""
    return layout.tensor * layout.pipeline * layout.context


def data_parallel(layout: Layout, world: int) -> int:
    """Data-parallel size. `validation.checks` has verified that it is a whole number."""
    assert world % ranks_per_model(layout) == 0, (layout, world)
    return world // ranks_per_model(layout)


def global_batch(config: Config, layout: Layout, world: int) -> int:
    """Sequences per optimizer step, over all ranks.

    Args:
        config: if `train.global_batch` is null, the result is one micro-batch per student replica.
        layout: the student's layout.
        world: number of the student's ranks.
    """
    return config.train.global_batch or config.train.micro_batch * data_parallel(layout, world)


def num_microbatches(config: Config, layout: Layout, world: int) -> int:
    """Micro-batches of `train.micro_batch` sequences that each student replica runs per step."""
    portion = config.train.micro_batch * data_parallel(layout, world)
    batch = global_batch(config, layout, world)
    assert batch % portion == 0, (batch, portion)
    return batch // portion


def context_chunks(rank: int, size: int) -> tuple[int, int]:
    """The two of 2 * `size` equal chunks of a sequence that a context-parallel rank holds, in Megatron's order: an
    early and a late one, so that causal attention costs every rank the same."""
    return rank, 2 * size - 1 - rank


def length_unit(layout: Layout) -> int:
    """Tokens of which a sequence's length must be a multiple: 2 chunks per context-parallel rank, each sharded over the
    tensor-parallel ranks under sequence parallelism."""
    return (2 * layout.context if layout.context > 1 else 1) * (layout.tensor if layout.sequence else 1)


def context_factor(layout: Layout) -> str:
    """The context-parallel size within a product of parallel sizes, for messages; empty if it is 1."""
    return f" x context {layout.context}" if layout.context > 1 else ""


LOGITS_BUDGET = 1 << 30
"""Bytes of both models' logits of one chunk on a GPU."""


def loss_chunk_tokens(on_cpu: bool, row_bytes: int | None = None) -> int:
    """Default number of tokens per chunk of logits.

    CPU: the smallest chunk with near-peak matrix-product speed (benchmarks/loss.py). GPU with Triton kernels: what
    fits `LOGITS_BUDGET`, a multiple of 1024 and 2048 to 8192, because small matrix products use a part of a GPU, and
    each chunk needs an all-gather. GPU without them: fewer, since the passes need temporaries of the same size.

    Args:
        on_cpu: whether the loss runs on a CPU.
        row_bytes: bytes of one token's logits of one model on one rank, in the type of the matrix products; None
            without Triton kernels.
    """
    if on_cpu or row_bytes is None:
        return 192 if on_cpu else 512
    return min(max(LOGITS_BUDGET // (2 * row_bytes) // 1024 * 1024, 2048), 8192)


def loss_chunks_together(divergence: str, tensor: int) -> int:
    """Number of chunks whose logits exist at one time. Divergences without a chain rule need two rounds of
    tensor-parallel collectives; with two chunks per round the number of collectives equals that of the other
    divergences."""
    return 2 if tensor > 1 and divergence in WITHOUT_CHAIN_RULE else 1


def head_dim(shape: ModelShape) -> int:
    """Width of one attention head."""
    return shape.head_dim or shape.hidden // shape.heads


def kv_heads(shape: ModelShape) -> int:
    """Number of key/value heads (query groups)."""
    return shape.kv_heads or shape.heads


def chunk_layers(layers: int, layout: Layout) -> list[int]:
    """Number of layers of each model chunk, in the model's order: of each pipeline stage, or of each virtual stage.

    `validation.checks` has verified that they are all layers.
    """
    chunks = layout.pipeline * layout.virtual_pipeline
    return [layers // chunks] * chunks if layout.stage_layers is None else list(layout.stage_layers)


def stages_of_layers(layers: int, layout: Layout) -> list[int]:
    """Pipeline rank of each layer. With virtual stages the model chunks are assigned round-robin to the pipeline
    ranks."""
    chunks = enumerate(chunk_layers(layers, layout))
    return [chunk % layout.pipeline for chunk, count in chunks for _ in range(count)]


def layers_on_stage(layers: int, layout: Layout, stage: int) -> int:
    """Number of layers on a pipeline stage."""
    return sum(chunk_layers(layers, layout)[stage :: layout.pipeline])


def recomputed_linears(recompute: Recompute | None, layers: int, layout: Layout) -> list[int]:
    """Number of linears of each layer, of four, whose forward pass runs again in the backward pass."""
    if recompute is None:
        return [0] * layers
    if recompute.what == "mlp":
        return [2] * layers
    chunks = chunk_layers(layers, layout)
    return [4 if layer < (recompute.layers or count) else 0 for count in chunks for layer in range(count)]


def projected_pairs(config: Config, student: ModelShape, teacher: ModelShape | None) -> tuple[LayerPair, ...]:
    """Matched layer pairs that need a linear projection from the student's hidden size to the teacher's."""
    return config.objective.matching if teacher is not None and student.hidden != teacher.hidden else ()


def projection_names(config: Config, student: ModelShape, teacher: ModelShape | None) -> tuple[str, ...]:
    """Names of these projections, in ascending order."""
    return tuple(sorted(pair.name for pair in projected_pairs(config, student, teacher)))


def teacher_section(config: Config) -> TeacherConfig:
    """The section `teacher`. Needs a teacher."""
    assert config.teacher is not None, "callers check that there is a teacher"
    return config.teacher


def teacher_layout(config: Config) -> Layout:
    """Layout of the teacher: teacher.layout, or the student's without virtual stages. Requires a teacher."""
    student = config.student.layout
    return teacher_section(config).layout or Layout(
        tensor=student.tensor, pipeline=student.pipeline, context=student.context, sequence=student.sequence
    )


def teacher_rank_range(config: Config, world: int) -> range:
    """Ranks of the teacher: all ranks if colocated, the last `teacher.ranks` if disjoint. Requires a teacher."""
    return range(student_world(config, world) if _own_ranks(config) else 0, world)


def student_world(config: Config, world: int) -> int:
    """Number of the student's ranks: the first ranks, without those of a disjoint teacher."""
    return world - _own_ranks(config)


def _own_ranks(config: Config) -> int:
    """Number of ranks of a disjoint teacher; 0 if there is none."""
    teacher = config.teacher
    return (teacher.ranks or 0) if teacher is not None and teacher.placement == "disjoint" else 0


def teacher_runs(config: Config, stage: str) -> bool:
    """Whether the stage runs teacher forward passes. A colocated teacher is not built if the objective does not use it;
    a disjoint teacher always runs."""
    if config.teacher is None or stage not in STAGES_WITH_TEACHER:
        return False
    return config.objective.divergence_weight > 0 or bool(config.objective.matching) or _own_ranks(config) > 0


def teacher_micro_batch(config: Config) -> int:
    """Sequences per forward pass of one teacher replica. Requires a teacher."""
    return teacher_section(config).micro_batch or config.train.micro_batch


def student_precision(config: Config) -> Precision:
    """Precision of the student: student.precision, or the section precision."""
    return config.student.precision or config.precision


def teacher_precision(config: Config) -> Precision:
    """Precision of the teacher: teacher.precision, or the section precision. Requires a teacher."""
    return teacher_section(config).precision or config.precision


def precisions(config: Config) -> tuple[Precision, ...]:
    """Precision of each model, the student first."""
    teacher = (teacher_precision(config),) if config.teacher else ()
    return (student_precision(config), *teacher)


def engine(precision: Precision, default: str) -> str:
    """Layer implementation that precision.engine resolves to: local or transformer_engine.

    Args:
        precision: precision of the model.
        default: result for `auto` without FP8 on the current device.
    """
    if precision.engine != "auto":
        return precision.engine
    return "transformer_engine" if precision.fp8 else default
