"""What follows from a configuration and the world size: the nulls resolved, in one place."""

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


def ranks_per_model(layout: Layout) -> int:
    """Ranks that one copy of a model is cut over."""
    return layout.tensor * layout.pipeline * layout.context


def data_parallel(layout: Layout, world: int) -> int:
    """Copies of the model that work side by side; `checks` has seen that the world holds whole ones."""
    assert world % ranks_per_model(layout) == 0, (layout, world)
    return world // ranks_per_model(layout)


def global_batch(config: Config, layout: Layout, world: int) -> int:
    """Sequences in one optimizer step over all ranks.

    Args:
        config: `train.global_batch` of null means one micro-batch for each copy of the student.
        layout: the student's.
        world: number of ranks.
    """
    return config.train.global_batch or config.train.micro_batch * data_parallel(layout, world)


def micro_batches(config: Config, layout: Layout, world: int) -> int:
    """Micro-batches of `train.micro_batch` sequences that each copy of the student runs in one step."""
    portion = config.train.micro_batch * data_parallel(layout, world)
    batch = global_batch(config, layout, world)
    assert batch % portion == 0, (batch, portion)
    return batch // portion


def loss_chunk_tokens(on_cpu: bool) -> int:
    """Tokens whose logits exist at a time where nobody says otherwise: for a CPU the fewest whose matrix products are
    near their full speed, for a GPU more, which hides more of the work between them (benchmarks/loss.py)."""
    return 192 if on_cpu else 512


def loss_chunks_together(divergence: str, tensor: int) -> int:
    """Such chunks whose logits exist at a time. A divergence without a chain rule takes two rounds of messages between
    tensor-parallel ranks; each speaks of two chunks, so that there are no more messages than for the others."""
    return 2 if tensor > 1 and divergence in WITHOUT_CHAIN_RULE else 1


def head_dim(shape: ModelShape) -> int:
    """Width of one attention head."""
    return shape.head_dim or shape.hidden // shape.heads


def kv_heads(shape: ModelShape) -> int:
    """Number of key/value heads (query groups)."""
    return shape.kv_heads or shape.heads


def stages_of_layers(layers: int, layout: Layout) -> list[int]:
    """The pipeline rank of each layer; `checks` has seen that pipeline * virtual_pipeline divides their number.

    With virtual stages the chunks of layers go round over the pipeline ranks.
    """
    a_chunk = layers // (layout.pipeline * layout.virtual_pipeline)
    return [layer // a_chunk % layout.pipeline for layer in range(layers)]


def projected_pairs(config: Config, student: ModelShape, teacher: ModelShape | None) -> tuple[LayerPair, ...]:
    """The matched pairs of layers that need a linear map from the student's width to the teacher's."""
    return config.objective.matching if teacher is not None and student.hidden != teacher.hidden else ()


def projection_names(config: Config, student: ModelShape, teacher: ModelShape | None) -> tuple[str, ...]:
    """Their names, ascending."""
    return tuple(sorted(pair.name for pair in projected_pairs(config, student, teacher)))


def teacher_section(config: Config) -> TeacherConfig:
    """The section `teacher`. Needs a teacher."""
    assert config.teacher is not None, "asked for where there is a teacher alone"
    return config.teacher


def teacher_layout(config: Config) -> Layout:
    """How the teacher is cut: teacher.layout, or as the student, but no virtual stages. Needs a teacher."""
    student = config.student.layout
    return teacher_section(config).layout or Layout(
        tensor=student.tensor, pipeline=student.pipeline, context=student.context, sequence=student.sequence
    )


def teacher_ranks(config: Config, world: int) -> range:
    """The ranks that the teacher is cut over: all, or the last ones where it has its own. Needs a teacher."""
    return range(student_world(config, world) if _own_ranks(config) else 0, world)


def student_world(config: Config, world: int) -> int:
    """How many ranks the student is cut over: the first ones that are not the teacher's own."""
    return world - _own_ranks(config)


def _own_ranks(config: Config) -> int:
    """Ranks that are the teacher's alone."""
    teacher = config.teacher
    return (teacher.ranks or 0) if teacher is not None and teacher.placement == "disjoint" else 0


def teacher_runs(config: Config, stage: str) -> bool:
    """Whether the stage's teacher makes forward passes. On the student's ranks it stays unbuilt where nothing in the
    objective looks at it; ranks of its own always run."""
    if config.teacher is None or stage not in STAGES_WITH_TEACHER:
        return False
    return config.objective.divergence_weight > 0 or bool(config.objective.matching) or _own_ranks(config) > 0


def teacher_micro_batch(config: Config) -> int:
    """Sequences in one forward pass of the teacher. Needs a teacher."""
    return teacher_section(config).micro_batch or config.train.micro_batch


def student_precision(config: Config) -> Precision:
    """The student's arithmetic: its own section, or the common one."""
    return config.student.precision or config.precision


def teacher_precision(config: Config) -> Precision:
    """The teacher's arithmetic: its own section, or the common one. Needs a teacher."""
    return teacher_section(config).precision or config.precision


def precisions(config: Config) -> tuple[Precision, ...]:
    """The arithmetic of each model, the student's first."""
    teacher = (teacher_precision(config),) if config.teacher else ()
    return (student_precision(config), *teacher)


def engine(precision: Precision, default: str) -> str:
    """local or transformer_engine: what precision.engine comes to.

    Args:
        default: what `auto` is on the device at hand, without FP8.
    """
    if precision.engine != "auto":
        return precision.engine
    return "transformer_engine" if precision.fp8 else default
