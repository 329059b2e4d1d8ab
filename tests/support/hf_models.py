"""Tiny random models of every family, written by transformers, with odd sizes wherever a family allows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

VOCAB = 301
_LLAMA = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4}
_LLAMA |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
_STRETCHED = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
_STRETCHED |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_NEOX = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 4}
_NEOX |= {"num_attention_heads": 4, "max_position_embeddings": 64, "rotary_pct": 0.5, "rotary_emb_base": 500}

# name: (class of the configuration, its arguments)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA, "head_dim": 12, "rope_theta": 500.0}),
    "llama3": ("LlamaConfig", {**_LLAMA, "rope_parameters": _STRETCHED, "rms_norm_eps": 1e-5}),
    "llama_linear": (
        "LlamaConfig",
        {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "smollm": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "llama_odd_heads": (
        "LlamaConfig",
        {**_LLAMA, "hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "mistral": ("MistralConfig", {**_LLAMA, "head_dim": 12, "sliding_window": 48}),
    # As pruning leaves a model: heads of a width of their own, and a hidden size that they do not divide.
    "mistral_narrow": ("MistralConfig", {**_LLAMA, "hidden_size": 46, "head_dim": 10, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**_LLAMA, "tie_word_embeddings": True, "rope_theta": 2000.0}),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 12}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 64, "n_inner": 104},
    ),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
}

# More key/value heads than two, so that layers can keep different numbers of them.
_GROUPED = {**_LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4}
GROUPED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_grouped": ("LlamaConfig", _GROUPED),
    "qwen3_grouped": ("Qwen3Config", {**_GROUPED, "head_dim": 12}),
}


def build(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A model of a case in fp32 whose gains and biases are no ones and zeros, so that dropping one is seen."""
    kind, settings = {**CASES, **GROUPED}[name]
    settings = {**settings, "bos_token_id": 0, "eos_token_id": 1}  # of `tokenizer`
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            mean = 1.0 if parameter.ndim == 1 and key.endswith("weight") else 0.0
            parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """Writes a case with a tokenizer."""
    build(name).to(dtype).save_pretrained(folder, **how)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """A byte-level tokenizer without merges: 256 bytes and two special tokens."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    built = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")
