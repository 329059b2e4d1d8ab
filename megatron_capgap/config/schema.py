"""Configuration schema: frozen dataclasses, with a docstring under every field.

`--help` and the configuration reference print the docstrings. A constraint on one key is a type (`Positive`,
`Fraction`); constraints between keys are in `validation/`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pydantic import Field

from megatron_capgap.config.architectures import FamilyName
from megatron_capgap.config.finetune import FinetuneConfig
from megatron_capgap.config.prune import PruneConfig
from megatron_capgap.config.recompute import Recompute
from megatron_capgap.config.track import TrackConfig
from megatron_capgap.config.training import CheckpointConfig, OptimizerConfig, ProfileConfig, RuntimeConfig, TrainConfig
from megatron_capgap.config.types import (
    STRICT,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seed,
)

STAGES = ("adapt", "prune", "distill", "finetune", "evaluate")
STAGES_WITH_TEACHER = ("distill", "finetune")  # the student learns from the teacher
DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "soft_cross_entropy",
]
DIVERGENCES: tuple[str, ...] = get_args(DivergenceName)
# Divergences that need the full distribution: no chain rule over vocabulary shards, see losses/divergences.py.
WITHOUT_CHAIN_RULE = ("jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")
MatchingName = Literal["mse", "cosine"]
MATCHINGS: tuple[str, ...] = get_args(MatchingName)


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary positions for sequences longer than those of the original training."""

    __pydantic_config__ = STRICT

    kind: Literal["llama3", "linear"] = "llama3"
    """llama3: scales low frequencies only, with a smooth transition to unscaled high frequencies; linear: scales all
    frequencies."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 8.0
    """Factor by which low frequencies (linear: all frequencies) are stretched."""
    low_frequency_factor: PositiveFloat = 1.0
    """llama3: wavelengths above original_max_positions / low_frequency_factor are scaled by the full factor."""
    high_frequency_factor: PositiveFloat = 4.0
    """llama3: wavelengths below original_max_positions / high_frequency_factor are not scaled."""
    original_max_positions: Positive = 8192
    """llama3: longest sequence of the original training, in tokens."""


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a model that is not read from a checkpoint."""

    __pydantic_config__ = STRICT

    layers: Positive
    """Number of transformer layers."""
    hidden: Positive
    """Hidden size: width of the residual stream."""
    heads: Positive
    """Number of attention (query) heads."""
    ffn: Positive
    """Intermediate size of the feed-forward layer; in a gated layer, the width of the gate and of the up projection
    each."""
    vocab: Positive
    """Vocabulary size, before padding for tensor parallelism; at least the number of tokens of data.tokenizer."""
    family: FamilyName = "llama"
    """Architecture. llama and mistral: RMSNorm, SwiGLU, rotary positions, no biases. qwen2: as llama, with query, key
    and value biases. qwen3: as llama, with query and key norms. gpt2: LayerNorm, GELU, biases, learned positions.
    gpt_neox: LayerNorm, GELU, biases, rotary positions, parallel residual."""
    kv_heads: Positive | None = None
    """Number of key/value heads (query groups of grouped-query attention); null: equal to heads."""
    head_dim: Positive | None = None
    """Width of one attention head; null: hidden / heads."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of rotary positions; null: none."""
    rotary_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of each head's channels that are rotated (0.25 in Pythia); gpt_neox only."""
    max_positions: Positive | None = None
    """Longest sequence that the model is designed for, in tokens; required for gpt2, which has one embedding per
    position."""
    attention_window: Positive | None = None
    """Sliding attention window in tokens; data.sequence_length must not exceed it, so that the window has no effect.
    null: no window."""
    norm_epsilon: PositiveFloat = 1.0e-5
    """Epsilon of the norms."""
    tied_embeddings: bool = False
    """Whether the LM head shares the weights of the input embedding."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections into the residual stream use init_std / sqrt(2 *
    layers)."""


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of one model. Data-parallel size = number of ranks / (tensor * pipeline * context)."""

    __pydantic_config__ = STRICT

    tensor: Positive = 1
    """Tensor-parallel size: number of shards of each weight matrix."""
    pipeline: Positive = 1
    """Pipeline-parallel size: number of pipeline stages that the layers are partitioned into."""
    stage_layers: tuple[Positive, ...] | None = None
    """Transformer layers of each pipeline stage, first to last, for example [9, 9, 9, 5]; null: as many on each. The
    last stage also computes the LM head and the loss: `--check` prints how much work each stage has. Not with virtual
    stages."""
    virtual_pipeline: Positive = 1
    """Number of model chunks per pipeline rank; values above 1 use the interleaved schedule."""
    context: Positive = 1
    """Context-parallel size: number of shards of the sequence. data.sequence_length must be divisible by 2 * context,
    and by 2 * context * tensor under sequence parallelism."""
    sequence: bool = False
    """Sequence parallelism: shard norms and residuals by tokens over the tensor-parallel ranks; requires tensor > 1."""


@dataclass(frozen=True)
class FP8:
    """FP8 matrix products in the linear layers of the transformer layers, with Transformer Engine."""

    __pydantic_config__ = STRICT

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    """Scaling recipe. delayed: per tensor, from the maxima of earlier steps; tensorwise: per tensor, from its current
    values; blockwise: per 128 x 128 block of weights and 1 x 128 block of other tensors; mxfp8: per 32 values
    (Blackwell GPUs)."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: E4M3 in the forward pass and E5M2 for gradients; e4m3: E4M3 for both."""
    first_last_layers_bf16: NonNegative = 0
    """Number of layers at each end of the model that use the compute type instead of FP8; must be 0 with recipe
    delayed."""
    amax_history: Positive = 1024
    """Length of the history of maxima, in steps; recipe delayed only."""
    amax_algorithm: Literal["max", "most_recent"] = "max"
    """How a scale is derived from the history. max: its largest value; most_recent: its last value. Recipe delayed
    only."""
    param_gather: bool = False
    """Store weights in FP8 and all-gather them in FP8 over data-parallel ranks after each step; the optimizer keeps
    fp32 master weights. Requires compute bf16; not supported with recipe mxfp8."""


@dataclass(frozen=True)
class Precision:
    """Number formats and layer implementation."""

    __pydantic_config__ = STRICT

    compute: Literal["fp32", "bf16"] = "fp32"
    """Data type of weights and activations; with bf16 the optimizer keeps fp32 master weights and gradients."""
    engine: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation. local: Megatron-Core's own layers; transformer_engine: Transformer Engine's modules, on a
    CPU with emulated kernels; auto: transformer_engine if fp8 is set, or on a GPU if Transformer Engine is installed;
    otherwise local."""
    fp8: FP8 | None = None
    """FP8 matrix products; null: none. LM heads, embeddings, norms, attention scores and the loss stay in the compute
    type or wider."""


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained, evaluated or created by prune (which reads only layout and recompute, for scoring)."""

    __pydantic_config__ = STRICT

    checkpoint: str | None = None
    """Source of the weights: RUN/checkpoints/step_N, or a run directory (its best step after early stopping, otherwise
    its latest). Set exactly one of checkpoint and model."""
    model: ModelShape | None = None
    """Dimensions of a model with random initial weights, or the name of a published model, for example llama-3.2-1b.
    Set exactly one of checkpoint and model."""
    layout: Layout = field(default_factory=Layout)
    """Parallel sizes of the student."""
    precision: Precision | None = None
    """Precision of the student; null: the section precision."""
    recompute: Recompute | None = None
    """Activation recomputation in training; null: every activation is saved."""


@dataclass(frozen=True)
class TeacherConfig:
    """The model that the student is distilled or pruned from; its weights do not change."""

    __pydantic_config__ = STRICT

    checkpoint: str | None = None
    """Source of the weights: RUN/checkpoints/step_N, or a run directory (its best step after early stopping, otherwise
    its latest). Required by a run."""
    layout: Layout | None = None
    """Parallel sizes of the teacher; null: those of student.layout, with virtual_pipeline 1."""
    placement: Literal["colocated", "disjoint"] = "colocated"
    """colocated: teacher and student alternate on all ranks; disjoint: the teacher runs on its own ranks."""
    ranks: Positive | None = None
    """Number of ranks of the teacher, the last ones of the job; required with placement disjoint, not allowed with
    colocated."""
    ahead: Positive = 1
    """Number of global batches that the teacher may compute ahead of the student; its ranks store their hidden states.
    Placement disjoint only."""
    micro_batch: Positive | None = None
    """Sequences per forward pass of one teacher replica; null: train.micro_batch."""
    offload: bool = False
    """Keep the teacher's weights in host memory between its forward passes; no effect on a CPU."""
    longer_sequences: bool = False
    """Allow data.sequence_length to exceed the length that the teacher was trained on."""
    precision: Precision | None = None
    """Precision of the teacher; null: the section precision."""
    model: ModelShape | None = None
    """Dimensions in place of checkpoint, for --check and --plan only; or the name of a published model, or a Hugging
    Face folder."""


@dataclass(frozen=True)
class DataConfig:
    """Tokenizer and datasets."""

    __pydantic_config__ = STRICT

    tokenizer: str
    """Path of a SentencePiece model file or of a Hugging Face tokenizer folder."""
    train: tuple[str, ...] = ()
    """Training data: prefixes of Megatron indexed datasets (PREFIX.bin and PREFIX.idx); in finetune, .jsonl files of
    conversations."""
    train_weights: tuple[PositiveFloat, ...] | None = None
    """Sampling weight of each entry of data.train; null: proportional to their token counts. Not allowed in
    finetune."""
    valid: tuple[str, ...] = ()
    """Held-out data: dataset prefixes or .jsonl files, as in data.train."""
    sequence_length: Positive = 1024
    """Tokens per sample."""


@dataclass(frozen=True)
class LayerPair:
    """A student layer and a teacher layer whose outputs (the residual stream after the layer) are matched."""

    __pydantic_config__ = STRICT

    student_layer: Positive
    """Student transformer layer, counted from 1."""
    teacher_layer: Positive
    """Teacher transformer layer, counted from 1."""
    kind: MatchingName = "mse"
    """mse: squared difference, averaged over the width; cosine: 1 minus the cosine similarity."""
    weight: PositiveFloat = 1.0
    """Weight of this pair in the loss."""

    @property
    def name(self) -> str:
        """Name of the pair's projection in a checkpoint."""
        return f"{self.student_layer}_{self.teacher_layer}_{self.kind}"


@dataclass(frozen=True)
class ObjectiveConfig:
    """Training objective: divergence_weight * divergence + cross_entropy_weight * cross-entropy + sum of weighted
    matching losses."""

    __pydantic_config__ = STRICT

    divergence: DivergenceName = "forward_kl"
    """Divergence between the next-token distributions of teacher and student."""
    temperature: PositiveFloat = 1.0
    """Both models' logits are divided by the temperature in the divergence, which is then multiplied by
    temperature^2."""
    divergence_weight: NonNegativeFloat = 0.5
    """Weight of the divergence."""
    cross_entropy_weight: NonNegativeFloat = 0.5
    """Weight of the cross-entropy with the true next token."""
    skew_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the other distribution that is mixed in by the skew divergences."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of the generalised Jensen-Shannon divergence (jsd)."""
    matching: tuple[LayerPair, ...] = ()
    """Layer pairs whose hidden states are matched, with a learned linear projection if the hidden sizes differ."""


@dataclass(frozen=True)
class Config:
    """One run of one stage."""

    __pydantic_config__ = STRICT

    run_dir: str
    """Run directory: resolved.yaml, metrics.jsonl, logs/, tensorboard/, checkpoints/, latest; runs resume from it."""
    student: StudentConfig
    """The model that is trained, measured or created; prune does not require the section."""
    data: DataConfig
    """Tokenizer and datasets."""
    seed: Seed = 1234
    """Seed of initial weights, data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if a GPU is visible, otherwise cpu."""
    teacher: TeacherConfig | None = None
    """The model that the student is distilled from (distill; optional in finetune) or pruned from (prune)."""
    prune: PruneConfig | None = None
    """Size of the student to prune; required by prune."""
    finetune: FinetuneConfig | None = None
    """Conversation training. In evaluate: if the section is present, data.valid names conversations."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training length, batch sizes, evaluation and stop conditions."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning-rate schedule."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Training objective."""
    precision: Precision = field(default_factory=Precision)
    """Precision of student and teacher, unless their sections have their own."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are saved, and how many are kept."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Timeouts and monitoring."""
    profile: ProfileConfig | None = None
    """Traces of torch's profiler, as Chrome traces in run_dir/profile; null: none."""
    track: TrackConfig | None = None
    """Experiment trackers: Weights & Biases, MLflow; null: none."""
