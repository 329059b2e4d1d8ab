"""Every key of a configuration file: frozen dataclasses, a docstring under every field.

The docstrings are what `--help` prints. Bounds that concern one key alone stand in its type (`Positive`, `Fraction`);
what two keys must agree on is in `checks.py`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pydantic import Field

from megatron_capgap.config.architectures import FamilyName
from megatron_capgap.config.finetune import FinetuneConfig
from megatron_capgap.config.prune import PruneConfig
from megatron_capgap.config.types import (
    STRICT,
    Decay,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seed,
)

STAGES = ("adapt", "prune", "distill", "finetune", "evaluate")
STAGES_WITH_TEACHER = ("distill", "finetune")  # where a teacher is one that the student learns from
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
# Those whose formulas want the probabilities of the whole vocabulary: see losses/divergences.py.
WITHOUT_CHAIN_RULE = ("jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation")
MatchingName = Literal["mse", "cosine"]
MATCHINGS: tuple[str, ...] = get_args(MatchingName)


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions stretched over longer sequences than the model was first trained on."""

    __pydantic_config__ = STRICT

    kind: Literal["llama3", "linear"] = "llama3"
    """llama3: only low frequencies are stretched, with a smooth passage; linear: all of them."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 8.0
    """How far the low frequencies are stretched."""
    low_frequency_factor: PositiveFloat = 1.0
    """llama3: wavelengths above original_max_positions / this are stretched in full."""
    high_frequency_factor: PositiveFloat = 4.0
    """llama3: wavelengths below original_max_positions / this stay as they are."""
    original_max_positions: Positive = 8192
    """llama3: longest sequence before the stretching."""


@dataclass(frozen=True)
class ModelShape:
    """A model described by numbers, in place of a checkpoint."""

    __pydantic_config__ = STRICT

    layers: Positive
    """Number of transformer layers."""
    hidden: Positive
    """Width of the residual stream."""
    heads: Positive
    """Number of attention (query) heads."""
    ffn: Positive
    """Width of the feed-forward layer; where it is gated, of its gate and its up projection each."""
    vocab: Positive
    """Vocabulary size of the tokenizer, before any padding for tensor parallelism."""
    family: FamilyName = "llama"
    """Architecture: llama and mistral are RMSNorm, SwiGLU, rotary positions, no biases; qwen2 adds biases of queries,
    keys and values, qwen3 norms of queries and keys; gpt2 and gpt_neox are LayerNorm, GELU and biases, gpt2 with
    learned positions, gpt_neox with rotary ones and parallel residuals."""
    kv_heads: Positive | None = None
    """Number of key/value heads (grouped-query attention); null means one for each query head."""
    head_dim: Positive | None = None
    """Width of one head; null means hidden / heads."""
    rope_theta: PositiveFloat = 10000.0
    """Base period of the rotary positions."""
    rope_scaling: RopeScaling | None = None
    """How the rotary positions are stretched; null means not at all."""
    rotary_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head's channels that are rotated (gpt_neox: 0.25 in Pythia)."""
    max_positions: Positive | None = None
    """Longest sequence the model is made for; learned positions need it, for they have an embedding each."""
    attention_window: Positive | None = None
    """Tokens that attention looks back over; sequences may be at most as long, where the window changes nothing."""
    norm_epsilon: PositiveFloat = 1.0e-5
    """Epsilon inside the norms."""
    tied_embeddings: bool = False
    """Whether the LM head shares the weights of the input embedding."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections into the residual stream get init_std / sqrt(2 layers)."""


@dataclass(frozen=True)
class Layout:
    """How a model is cut over ranks; the data-parallel size is what remains: world / (tensor * pipeline * context)."""

    __pydantic_config__ = STRICT

    tensor: Positive = 1
    """Tensor-parallel size: every matrix is cut into this many shards."""
    pipeline: Positive = 1
    """Pipeline-parallel size: the layers are cut into this many stages."""
    virtual_pipeline: Positive = 1
    """Model chunks on each pipeline rank; above 1 the interleaved schedule runs."""
    context: Positive = 1
    """Context-parallel size: the sequence is cut into this many parts inside attention."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals are cut along the sequence over the tensor-parallel ranks."""


@dataclass(frozen=True)
class FP8:
    """8-bit matrix products of the transformer layers' linears, by Transformer Engine."""

    __pydantic_config__ = STRICT

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    """Where scales come from: delayed (a tensor's largest values in earlier steps), tensorwise (the tensor at hand),
    blockwise (128 x 128 of a weight, 1 x 128 of the rest), mxfp8 (32 values; Blackwell)."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: E4M3 forward and E5M2 for gradients; e4m3: E4M3 everywhere."""
    first_last_layers_bf16: NonNegative = 0
    """So many layers at either end of the model stay in the type of compute; not with recipe delayed."""
    amax_history: Positive = 1024
    """Steps that recipe delayed remembers."""
    amax_algorithm: Literal["max", "most_recent"] = "max"
    """What recipe delayed takes from its history."""
    param_gather: bool = False
    """Keep the weights themselves in FP8, and gather those over data-parallel ranks after each step; the optimizer's
    masters stay in fp32. Needs compute bf16; not with recipe mxfp8."""


@dataclass(frozen=True)
class Precision:
    """Arithmetic."""

    __pydantic_config__ = STRICT

    compute: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations; with bf16 the optimizer keeps fp32 master weights and gradients."""
    engine: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers are built: local is Megatron's own; auto is transformer_engine where fp8 is given or a GPU is used
    and Transformer Engine is installed, local otherwise. On a CPU transformer_engine runs its modules on emulated
    kernels."""
    fp8: FP8 | None = None
    """8-bit matrix products; null means none. LM heads, embeddings, norms, attention scores and the loss stay in the
    type of compute or wider."""


@dataclass(frozen=True)
class StudentConfig:
    """The model that a stage trains (adapt, distill, finetune), measures (evaluate) or makes (prune; only layout is
    given)."""

    __pydantic_config__ = STRICT

    checkpoint: str | None = None
    """Where the weights come from: a run directory (its latest step) or RUN/checkpoints/step_N."""
    model: ModelShape | None = None
    """The model in numbers, started from random weights; give either this or checkpoint."""
    layout: Layout = field(default_factory=Layout)
    """How this model is cut over ranks."""
    precision: Precision | None = None
    """This model's own arithmetic, in place of the section precision; null means that section."""


@dataclass(frozen=True)
class TeacherConfig:
    """The model that a student learns from or is cut out of; its weights stay as they are."""

    __pydantic_config__ = STRICT

    checkpoint: str
    """Where the weights come from: a run directory (its latest step) or RUN/checkpoints/step_N."""
    layout: Layout | None = None
    """How the teacher is cut over ranks; null means as the student is (without virtual stages)."""
    placement: Literal["colocated", "disjoint"] = "colocated"
    """colocated: teacher and student take turns on all ranks; disjoint: the teacher has ranks of its own."""
    ranks: Positive | None = None
    """disjoint: how many ranks are the teacher's, the last ones."""
    ahead: Positive = 1
    """disjoint: how many global batches the teacher may be ahead of the student; their hidden states wait on its
    ranks."""
    micro_batch: Positive | None = None
    """Sequences in one teacher forward pass; null means train.micro_batch."""
    offload: bool = False
    """Keep the teacher's weights in host memory between its turns; on a CPU that is where they are."""
    longer_sequences: bool = False
    """Let data.sequence_length exceed the length that the teacher was trained on."""
    precision: Precision | None = None
    """The teacher's own arithmetic, in place of the section precision; null means that section."""


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    __pydantic_config__ = STRICT

    tokenizer: str
    """A SentencePiece model file or a Hugging Face tokenizer folder."""
    train: tuple[str, ...] = ()
    """Prefixes of Megatron indexed datasets (PREFIX.bin and PREFIX.idx) to train on; in finetune jsonl files of
    conversations."""
    train_weights: tuple[PositiveFloat, ...] | None = None
    """Share of the samples from each entry of data.train; null means in proportion to their tokens."""
    valid: tuple[str, ...] = ()
    """Prefixes of the held-out datasets, or held-out jsonl files of conversations."""
    sequence_length: Positive = 1024
    """Tokens in one sample."""


@dataclass(frozen=True)
class TrainConfig:
    """How long and in what portions."""

    __pydantic_config__ = STRICT

    steps: Positive | None = None
    """Optimizer steps in the whole run; required where something is trained, but for finetune, whose epochs decide."""
    global_batch: Positive | None = None
    """Sequences in one optimizer step over all ranks; null means micro_batch times the data-parallel size."""
    micro_batch: Positive = 1
    """Sequences in one forward pass of one rank."""
    eval_every: NonNegative = 0
    """Steps between evaluations on data.valid; 0 means only after the last step."""
    eval_batches: Positive | None = None
    """Global batches in one evaluation; null means the whole held-out set."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout rate of attention and residual branches."""
    max_grad_norm: PositiveFloat | None = None
    """A batch whose gradient norm, before clipping, is above this is a bad one, as is one that is not finite."""
    max_skipped: NonNegative = 0
    """Bad batches that a run may leave out over all its starts, learning nothing from them; the next one stops it."""
    log_every: Positive = 1
    """Steps between lines on the console; metrics.jsonl holds every step."""
    exit_after_minutes: PositiveFloat | None = None
    """Minutes after its start at which a run saves and ends as after a signal; null means that only signals do that."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    __pydantic_config__ = STRICT

    lr: PositiveFloat = 3.0e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate that the schedule comes to after the last update."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from lr, at the first update after the warm-up, to min_lr."""
    warmup_fraction: Fraction = 0.01
    """Share of train.steps, rounded up, during which the learning rate rises linearly from 0."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 means no clipping."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    epsilon: PositiveFloat = 1.0e-8
    """Adam's epsilon."""


@dataclass(frozen=True)
class LayerPair:
    """A student layer whose output, the residual stream behind it, is to resemble that of a teacher layer."""

    __pydantic_config__ = STRICT

    student_layer: Positive
    """Which of the student's transformer layers, counted from 1."""
    teacher_layer: Positive
    """Which of the teacher's."""
    kind: MatchingName = "mse"
    """mse: the squared difference, mean over the width; cosine: 1 minus the cosine of the angle between them."""
    weight: PositiveFloat = 1.0
    """Weight of this pair in the loss."""

    @property
    def name(self) -> str:
        """What a checkpoint calls the pair's projection."""
        return f"{self.student_layer}_{self.teacher_layer}_{self.kind}"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student minimises: divergence_weight * divergence + cross_entropy_weight * cross-entropy + matching."""

    __pydantic_config__ = STRICT

    divergence: DivergenceName = "forward_kl"
    """Distance from the teacher's next-token distribution to the student's."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits inside the divergence, which is then multiplied by temperature squared."""
    divergence_weight: NonNegativeFloat = 0.5
    """Weight of the divergence."""
    cross_entropy_weight: NonNegativeFloat = 0.5
    """Weight of the cross-entropy with the true next token."""
    skew_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the other distribution mixed in by the skew divergences."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of the generalised Jensen-Shannon divergence."""
    matching: tuple[LayerPair, ...] = ()
    """A list of layer pairs whose hidden states are matched, through a learned linear map where the widths differ."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept."""

    __pydantic_config__ = STRICT

    every: NonNegative = 0
    """Steps between checkpoints; 0 means only after the last step."""
    keep: Positive = 2
    """Number of newest checkpoints that stay on disk."""
    async_save: bool = False
    """Whether training goes on while a checkpoint is written, from a copy of the state in host memory."""


@dataclass(frozen=True)
class RuntimeConfig:
    """The ground a run stands on."""

    __pydantic_config__ = STRICT

    timeout_seconds: Positive = 600
    """How long a collective may wait for the other ranks before the job stops."""
    peak_tflops: PositiveFloat | None = None
    """What one GPU can do at best; given, the console shows the share of it that a run reaches."""
    tensorboard: bool = True
    """Whether to write TensorBoard events below run_dir/tensorboard."""


@dataclass(frozen=True)
class Config:
    """One run of one stage."""

    __pydantic_config__ = STRICT

    run_dir: str
    """Directory of this run: resolved.yaml, metrics.jsonl, tensorboard/, checkpoints/, latest."""
    student: StudentConfig
    """The model that is trained, measured or made; prune may do without the section."""
    data: DataConfig
    """What is read."""
    seed: Seed = 1234
    """Decides initial weights, data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes cuda where a GPU is visible, else cpu."""
    teacher: TeacherConfig | None = None
    """The model that the student learns from (distill, and finetune where given) or is cut out of (prune)."""
    prune: PruneConfig | None = None
    """What of the teacher stays; prune needs it."""
    finetune: FinetuneConfig | None = None
    """How conversations are read and learned; with it evaluate reads conversations, too."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and in what portions."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning-rate schedule."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What the student minimises."""
    precision: Precision = field(default_factory=Precision)
    """Arithmetic of student and teacher, where they have no section of their own."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """The ground a run stands on."""
