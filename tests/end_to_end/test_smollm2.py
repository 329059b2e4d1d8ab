"""The example with real weights; and on a file of its kind that is small: what llama.cpp writes is read back."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_capgap.cli import main
from tests.support import hf_models
from tests.support.corpus import write_jsonl
from tests.support.pool import WorkerPool
from tests.support.processes import ROOT, environment
from tools import convert_hf, generate, prepare_data

HEADS, GROUPS, WIDTH = 4, 2, 64
SIZES = {"vocab_size": 261, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "max_position_embeddings": 128}
Q4 = gguf.GGMLQuantizationType.Q4_1


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/smollm2/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows: the two channels that turn together beside each other."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def write(file: Path, model: torch.nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Writes a model as llama.cpp would, matrices in 4 bits; returns the weights that its readers see."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    bytewise = hf_models.tokenizer()
    pieces = [*(bytewise.convert_ids_to_tokens(i) for i in range(len(bytewise))), "th", "the", "12"]
    kinds = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(pieces) - 2)
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h", "th e", "1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    seen = {}
    for name, values in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        rows = values.float().numpy()
        kind = gguf.GGMLQuantizationType.F32 if rows.ndim == 1 else Q4
        heads = {"q_proj": HEADS, "k_proj": GROUPS}.get(name.split(".")[-2])
        packed = gguf.quantize(neighbours(rows, heads) if heads else rows, kind)
        writer.add_tensor(names[name], packed, raw_dtype=kind)
        plain = torch.from_numpy(gguf.dequantize(gguf.quantize(rows, kind), kind))
        seen[name] = plain.bfloat16()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return seen


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    module = example("gguf_to_hf")
    names = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in module.OUTER.items()}
    for layer in range(2):
        for ours, theirs in module.LAYER.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{ours}.weight"
    hf_models.CASES["of_gguf"] = ("LlamaConfig", {**SIZES, "tie_word_embeddings": True})
    expected = write(tmp_path / "model.gguf", hf_models.build("of_gguf"), names)
    module.convert(tmp_path / "model.gguf", tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = model.state_dict()
    for name, values in expected.items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], values), name
    config = model.config
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps, config.tie_word_embeddings) == (1e5, 1e-5, True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    words = "the 1212 <s>caf\u00e9"
    ids = tokenizer(words).input_ids
    assert tokenizer.decode(ids) == words
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[0] == "the" and "<s>" in pieces and "12" not in pieces, "digits stand alone"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1) and tokenizer.chat_template


@pytest.fixture(scope="module")
def imported(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, the real weights, and `runs/smollm2`, what they were imported to. Downloads 93 MB."""
    folder = tmp_path_factory.mktemp("smollm2")
    script = str(ROOT / "examples/smollm2/gguf_to_hf.py")
    subprocess.run([sys.executable, script, "--out", str(folder / "hf")], env=environment(), check=True)
    must(pool, convert_hf.main, "import", "--hf", folder / "hf", "--out", folder / "runs/smollm2")
    return folder


def must(pool: WorkerPool, tool: Callable[[list[str]], int], *words: object) -> str:
    """What a call that succeeds says."""
    (rank,) = pool.run(tool, [str(word) for word in words], world=1, initialise=False, capture=True)
    assert rank.value == 0, rank.stdout + rank.stderr
    return rank.stdout


@pytest.mark.slow("converts 135 million parameters both ways")
def test_real_weights_go_in_and_out(pool: WorkerPool, imported: Path) -> None:
    """Needs 1.5 GB of memory."""
    hf, run, back = imported / "hf", imported / "runs/smollm2", imported / "back"
    must(pool, convert_hf.main, "verify", "--hf", hf, "--checkpoint", run, "--tokens", 32)
    must(pool, convert_hf.main, "export", "--checkpoint", run, "--out", back)
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, back))
    assert before.keys() == after.keys() and len(before) == 272
    assert all(torch.equal(before[name], after[name]) for name in before)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(back), AutoTokenizer.from_pretrained(back)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0]).endswith("Paris")


@pytest.mark.slow("generates from 135 million parameters")
def test_the_megatron_model_answers_a_chat_prompt(pool: WorkerPool, imported: Path) -> None:
    run, prompts = imported / "runs/smollm2", imported / "chat.jsonl"
    question = "What is the capital of France? Answer in one sentence."
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n")
    words = ["--checkpoint", run, "--tokenizer", run / "huggingface", "--prompts", prompts, "--max-new-tokens", 8]
    assert "Paris" in json.loads(must(pool, generate.main, *words, "--device", "cpu").splitlines()[-1])["text"]


def compared(folder: str, off: float) -> int:
    """Runs in a worker: the example's comparison, with a perplexity of ours that is off by a factor."""
    os.chdir(folder)
    file = Path("runs/evaluate/evaluation.json")
    sound = file.read_text()
    result = json.loads(sound)
    file.write_text(json.dumps({**result, "valid_perplexity": off * result["valid_perplexity"]}))
    module = example("compare")
    sys.argv = ["compare.py", "evaluate.yaml", "hf", "hf"]
    try:
        return module.main()
    finally:
        file.write_text(sound)


@pytest.mark.slow("evaluates 135 million parameters twice")
def test_perplexity_is_transformers_s(pool: WorkerPool, imported: Path) -> None:
    """A thousand tokens of real text, this project's README."""
    text = write_jsonl(imported / "readme.jsonl", [(ROOT / "README.md").read_text()[:4000]])
    words = ["--input", text, "--tokenizer", imported / "runs/smollm2/huggingface", "--out", imported / "reviews"]
    must(pool, prepare_data.main, *words, "--workers", 1)
    shutil.copyfile(ROOT / "examples/smollm2/evaluate.yaml", imported / "evaluate.yaml")
    must(pool, evaluated, imported)
    for off, code in ((1.0, 0), (1.002, 1)):
        (rank,) = pool.run(compared, str(imported), off, world=1, initialise=False, capture=True)
        assert rank.value == code, rank.stdout
        assert "perplexity on 1,024 tokens" in rank.stdout


def evaluated(words: list[str]) -> int:
    """Runs in a worker, in the folder that the paths in the example's configuration are relative to."""
    os.chdir(words[0])
    return main(["evaluate", "--config", "evaluate.yaml"])
