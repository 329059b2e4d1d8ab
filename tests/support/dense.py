"""A LLaMA of Hugging Face's with the weights of a Megatron model: what the parallel stack must agree with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from megatron_capgap.config.loader import load
from megatron_capgap.config.schema import LayerPair, Layout, ModelShape, Precision
from tests.support import plain_steps, runs
from tests.support.plain_steps import Weights
from tests.support.pool import WorkerPool


@dataclass(frozen=True)
class Source:
    """Which model a worker is to build."""

    shape: ModelShape
    seed: int
    checkpoint: Path | None = None
    pairs: tuple[LayerPair, ...] = ()
    """Matched pairs that have a projection."""
    taught_width: int = 0


def megatron_weights(source: Source) -> Weights:
    """Runs in a worker of its own world: the weights by the names of Megatron's local modules."""
    from megatron_capgap.checkpoint import loader, run_directory
    from megatron_capgap.devices import choose
    from megatron_capgap.distributed import parallel_context
    from megatron_capgap.models import gpt, projections
    from megatron_capgap.models.sharded_state import initialise

    device = choose("cpu", 0)
    parallel = parallel_context.build(Layout(), source.seed)
    chunks = gpt.build(source.shape, parallel, Precision(), device, sequence_length=8)
    projections.add(chunks, source.pairs, source.taught_width)
    if source.checkpoint is None:
        initialise(chunks, source.shape, parallel, source.seed)
    else:
        loader.load_weights(run_directory.locate(str(source.checkpoint)), chunks, parallel)
    return {name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()}


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
    pool: WorkerPool, stage: str, raw: dict[str, Any], teacher: dict[str, Any] = runs.TEACHER
) -> list[dict[str, float]]:
    """The run that a configuration means, on LLaMAs with the weights of the stack.

    Args:
        raw: of a run that has been made, since its indices of samples are read.
        teacher: the shape of its teacher.
    """
    config = load(runs.write_config(raw), [], stage).config
    shape, seed = config.student.model, config.seed
    assert shape is not None
    taught, pairs, width = None, (), 0
    if config.teacher is not None:
        source = Source(ModelShape(**teacher), seed, Path(config.teacher.checkpoint))
        taught = llama(source.shape, pool.run(megatron_weights, source, world=1)[0])
        width = source.shape.hidden
        pairs = config.objective.matching if width != shape.hidden else ()
    weights = pool.run(megatron_weights, Source(shape, seed, None, pairs, width), world=1)[0]
    student = llama(shape, weights)
    maps = {pair.name: weights[f"projections.{pair.name}.weight"].double().requires_grad_() for pair in pairs}
    return plain_steps.steps(pool, config, student, taught, maps)
