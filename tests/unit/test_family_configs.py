"""config.json of every family: read as transformers reads it, or refused with the key."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoConfig

from megatron_capgap.checkpoint.metadata import CheckpointMetadata
from megatron_capgap.common.errors import UserError
from megatron_capgap.config import derived
from megatron_capgap.config.architectures import ARCHITECTURES, FamilyName
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.conversion.exporting import config_of
from megatron_capgap.conversion.hf_config import read_config
from megatron_capgap.conversion.registry import FAMILIES
from megatron_capgap.conversion.tokenizer_files import Copied
from megatron_capgap.data.tokenizer_folder import LoadedTokenizer

SIZES = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES |= {"vocab_size": 301, "max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}
WINDOWS = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, '"dynamic" is not supported'),
    ("llama", {"rope_scaling": {"rope_type": ["yarn"]}}, "is not supported, default"),
    ("llama", {"rope_scaling": [8.0]}, "rope_scaling: [8.0] is not an object"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor: 0.5"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.5}}, "attention_factor is"),
    ("llama", {"rope_parameters": NESTED}, "full_attention is not supported with default"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    ("llama", {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
    ("llama", {"rope_theta": float("nan")}, "rope_theta: nan"),
    ("llama", {"mlp_bias": True}, "mlp_bias: true is not supported"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "is not a list of names"),
    ("llama", {"head_dim": 7}, "rotate 7 channels of a head"),
    ("mistral", {"sliding_window": 0}, "attention_window: 0"),
    ("qwen2", WINDOWS, "use_sliding_window: true is not supported"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention is supported"),
    ("qwen2", {"layer_types": 3}, "layer_types: 3 is not a list of names"),
    ("qwen3", {"attention_bias": True}, "attention_bias: true is not supported"),
    ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual: false is not supported, true is"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias: false is not supported"),
    ("gpt_neox", {"hidden_act": "gelu_new"}, '"gelu_new" is not supported'),
    ("gpt_neox", {"rotary_pct": 0.4}, "rotate 3 channels"),
    ("gpt2", {"activation_function": "relu"}, '"relu" is not supported'),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "true is not supported"),
]


def read(family: str, **changes: Any) -> ModelShape:
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 301} if family == "gpt2" else SIZES
    return read_config(Path("config.json"), {"model_type": family, **sizes, **changes})[1]


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED, ids=[f"{f}-{w[:30]}" for f, _, w in REFUSED])
def test_what_is_not_computed_is_refused(family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        read(family, **changes)
    assert words in str(error.value) and "\n" not in str(error.value), error.value
    assert str(error.value).startswith("config.json: ")


# What each family's models were published with over the years, and what they leave to the defaults.
READ: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 2, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("llama", {"rope_theta": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
    (
        "llama",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 2e4, **LLAMA3},
            "rope_theta": 7e4,
        },
    ),
    ("llama", {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "rope_parameters": None}),
    ("mistral", {"num_key_value_heads": 3, "sliding_window": None, "rope_theta": 1e6, "head_dim": 16}),
    ("mistral", {"num_key_value_heads": 2}),
    ("qwen2", {"num_key_value_heads": None, "tie_word_embeddings": True, "rope_theta": 1e6, "sliding_window": 9}),
    ("qwen2", {"num_key_value_heads": 2, "layer_types": ["full_attention"] * 2}),
    ("qwen3", {"num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": None, "head_dim": 16}),
    ("gpt_neox", {}),
    ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 777}),
    ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5}}),
    ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_pct": 1.0}),
]


@pytest.mark.parametrize(("family", "changes"), READ)
def test_numbers_are_those_of_transformers(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SIZES, **changes}))
    theirs, ours = AutoConfig.from_pretrained(tmp_path), read(family, **changes)
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    assert (ours.rope_scaling.kind if ours.rope_scaling else "default") == rope["rope_type"]
    if ours.rope_scaling:
        assert ours.rope_scaling.factor == rope["factor"]
    if family != "gpt_neox":
        assert derived.kv_heads(ours) == theirs.num_key_value_heads
        assert derived.head_dim(ours) == getattr(theirs, "head_dim", 8)
        assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.rotary_share == rope.get("partial_rotary_factor", 1.0)
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.attention_window == (theirs.sliding_window if family == "mistral" else None)


def meta(shape: ModelShape) -> CheckpointMetadata:
    return CheckpointMetadata(
        step=1,
        steps=1,
        tokens=64,
        model=shape,
        tokenizer="",
        tokenizer_fingerprint="",
        stage="distill",
        seed=0,
        parallel_sizes=(1, 1, 1, 1),
        sequence_length=64,
    )


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_student_takes_no_numbers_from_the_model_whose_tokenizer_it_speaks(tmp_path: Path, family: str) -> None:
    teacher = {"model_type": family, **SIZES, "head_dim": 16, "num_key_value_heads": 2, "layer_types": None}
    teacher |= {"max_window_layers": 2, "attention_dropout": 0.1, "bos_token_id": 7, "eos_token_id": 8}
    teacher |= {"pad_token_id": 9, "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(teacher))
    words = words_with(7, 8)
    student = ModelShape(family=family, layers=1, hidden=32, heads=4, ffn=24, vocab=301)
    found = config_of(FAMILIES[family], meta(student), tmp_path, words)
    assert read_config(Path("config.json"), found)[1].hidden == 32
    assert found.get("head_dim") in (None, 8) and "num_nextn_predict_layers" not in found
    assert [found[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [7, 8, 9]
    same = read_config(Path("config.json"), teacher)[1]
    kept = config_of(FAMILIES[family], meta(same), tmp_path, words)
    assert kept["attention_dropout"] == 0.1 and kept["head_dim"] == 16 and kept["num_nextn_predict_layers"] == 1


def words_with(bos: int | None, eos: int | None) -> Copied:
    """A tokenizer of which nothing counts but where texts begin and end."""
    ends = frozenset() if eos is None else frozenset({eos})
    return Copied(LoadedTokenizer(Tokenizer(models.BPE()), bos, eos, ends, (), (), {}), ends)


def test_a_llama_that_transformers_would_not_load_is_not_exported() -> None:
    shape = ModelShape(layers=2, hidden=50, heads=6, head_dim=8, ffn=72, vocab=301)
    with pytest.raises(UserError, match="transformers loads no llama whose heads do not divide hidden"):
        config_of(FAMILIES["llama"], meta(shape), None, words_with(None, None))
    config_of(
        FAMILIES["mistral"],
        meta(ModelShape(**{**vars(shape), "family": "mistral"})),
        None,
        words_with(None, None),
    )


def test_every_family_that_a_configuration_may_name_has_a_row_in_the_tables() -> None:
    assert get_args(FamilyName) == tuple(ARCHITECTURES)
    assert set(FAMILIES) == set(ARCHITECTURES)
