"""Models of transformers in float64 and plain steps on them: what the parallel stack must agree with."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from megatron_capgap.config.schema import Config, Data, Layout, ModelShape, Objective, Precision
from tests.support.pool import WorkerPool

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """Which model a worker is to build."""

    shape: ModelShape
    seed: int
    checkpoint: Path | None = None


def megatron_weights(source: Source) -> Weights:
    """Runs in a worker of its own world: the weights by the names of Megatron's local modules."""
    from megatron_capgap.checkpoint import manifest, store
    from megatron_capgap.models import gpt
    from megatron_capgap.models.state import initialise
    from megatron_capgap.runtime import layout
    from megatron_capgap.runtime.devices import choose

    grid = layout.build(Layout(), source.seed)
    chunks = gpt.build(source.shape, grid, Precision(), choose("cpu", 0), sequence_length=8)
    if source.checkpoint is None:
        initialise(chunks, source.shape, grid, source.seed)
    else:
        store.load_weights(manifest.locate(str(source.checkpoint)), chunks, grid)
    return {name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()}


def samples(data: Data, seed: int, cache_dir: Path, first: int, count: int) -> Tensor:
    """Runs in a worker: consecutive training samples, int64 `[count, sequence_length + 1]`."""
    from megatron_capgap.data import pretrain

    sequence = pretrain.open_training(data, seed, cache_dir)
    return torch.stack([torch.from_numpy(sequence.tokens(k)) for k in range(first, first + count)])


def llama(shape: ModelShape, weights: Weights) -> LlamaForCausalLM:
    """The same model in float64 without any padding of the vocabulary."""
    kv_heads = shape.kv_heads or shape.heads
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=shape.norm_epsilon,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=shape.tied_embeddings,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).double()
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][: shape.vocab],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])[
            : shape.vocab
        ],
    }
    for layer in range(shape.layers):
        state |= _layer(
            weights, f"decoder.layers.{layer}", f"model.layers.{layer}", kv_heads, shape.hidden // shape.heads
        )
    model.load_state_dict(state)
    return model


def _layer(weights: Weights, theirs: str, ours: str, groups: int, width: int) -> Weights:
    """One layer: each group's rows of the fused projection are its queries, then one key, then one value head."""
    attention, mlp = f"{theirs}.self_attention", f"{theirs}.mlp"
    rows = weights[f"{attention}.linear_qkv.weight"].unflatten(0, (groups, -1))
    queries = rows.shape[1] - 2 * width
    query, key, value = (part.flatten(0, 1) for part in rows.split([queries, width, width], dim=1))
    gate, up = weights[f"{mlp}.linear_fc1.weight"].chunk(2)
    return {
        f"{ours}.input_layernorm.weight": weights[f"{theirs}.input_layernorm.weight"],
        f"{ours}.self_attn.q_proj.weight": query,
        f"{ours}.self_attn.k_proj.weight": key,
        f"{ours}.self_attn.v_proj.weight": value,
        f"{ours}.self_attn.o_proj.weight": weights[f"{attention}.linear_proj.weight"],
        f"{ours}.post_attention_layernorm.weight": weights[f"{theirs}.pre_mlp_layernorm.weight"],
        f"{ours}.mlp.gate_proj.weight": gate,
        f"{ours}.mlp.up_proj.weight": up,
        f"{ours}.mlp.down_proj.weight": weights[f"{mlp}.linear_fc2.weight"],
    }


def steps(
    pool: WorkerPool, config: Config, student: PreTrainedModel, taught: PreTrainedModel | None
) -> list[dict[str, float]]:
    """A run written out: AdamW with clipping, one global batch at a time; entries as in metrics.jsonl."""
    torch.set_num_threads(1)
    batch, wanted = config.train.global_batch, config.optimizer
    assert batch is not None
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": wanted.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=wanted.lr, betas=wanted.betas, eps=wanted.epsilon)
    entries = []
    for step in range(config.train.steps or 0):
        cache = Path(config.run_dir) / "data_cache"
        rows = pool.run(samples, config.data, config.seed, cache, step * batch, batch, world=1)[0]
        optimizer.zero_grad()
        parts = loss(student, taught, rows, config.objective)
        parts["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), wanted.clip_norm)
        optimizer.step()
        numbers = {name: part.item() for name, part in parts.items()}
        entries.append({"step": step + 1, **numbers, "grad_norm": norm.item(), "tokens": rows[:, 1:].numel()})
    return entries


def loss(
    student: PreTrainedModel, teacher: PreTrainedModel | None, rows: Tensor, objective: Objective
) -> dict[str, Tensor]:
    """Means over all tokens of `rows`, `[b, s + 1]`; with a teacher the divergence is its forward KL."""
    tokens, labels = rows[:, :-1], rows[:, 1:]
    logits = student(tokens).logits
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if teacher is None:
        return {"loss": cross_entropy, "cross_entropy": cross_entropy}
    assert objective.divergence == "forward_kl"
    heat = objective.temperature
    with torch.no_grad():
        taught = (teacher(tokens).logits / heat).log_softmax(-1)
    learned = (logits / heat).log_softmax(-1)
    divergence = heat**2 * (taught.exp() * (taught - learned)).sum(-1).mean()
    total = objective.divergence_weight * divergence + objective.cross_entropy_weight * cross_entropy
    return {"loss": total, "cross_entropy": cross_entropy, "divergence": divergence}
