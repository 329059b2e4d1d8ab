"""A trained LLaMA with a forward pass of its own in numpy: neither transformers nor Megatron decides what is right.

The package glassllm keeps its matrices `[in, out]` and rotates neighbouring channels; a Hugging Face folder is made of
it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_capgap.checkpoint import loader, metadata, run_directory
from megatron_capgap.config.schema import Layout, Precision
from megatron_capgap.devices import choose
from megatron_capgap.distributed import parallel_context
from megatron_capgap.models import gpt
from tests.support import hf_models
from tests.support.pool import WorkerPool
from tools import convert_hf

HEADS, GROUPS = 4, 2
CONFIG = {"model_type": "llama", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 341}
CONFIG |= {"num_hidden_layers": 4, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
CONFIG |= {"max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
NAMES = {"norm1.gamma": "input_layernorm", "norm2.gamma": "post_attention_layernorm"}
NAMES |= {f"attn.W_{name.upper()}": f"self_attn.{name}_proj" for name in "qkvo"}
NAMES |= {"ffn.W1": "mlp.gate_proj", "ffn.W3": "mlp.up_proj", "ffn.W2": "mlp.down_proj"}


def halves_together(rows: Tensor, heads: int) -> Tensor:
    """From neighbouring channels that turn together to channels that lie half a head apart."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def make_folder(weights: Path, folder: Path, permuted: bool) -> None:
    """Writes the package's model as transformers names and orders it; `permuted=False` leaves its rotation as it is."""
    tensors = {}
    arrays = {name: array for name, array in np.load(weights).items() if array.dtype == np.float16}
    for name, tensor in ((name, torch.from_numpy(array).float()) for name, array in arrays.items()):
        if name == "E":
            tensors["model.embed_tokens.weight"] = tensor
        elif name == "norm_f.gamma":
            tensors["model.norm.weight"] = tensor
        else:
            _, layer, rest = name.split(".", 2)
            tensor = tensor.t() if tensor.ndim == 2 else tensor
            if permuted and rest in ("attn.W_Q", "attn.W_K"):
                tensor = halves_together(tensor, HEADS if rest.endswith("Q") else GROUPS)
            tensors[f"model.layers.{layer}.{NAMES[rest]}.weight"] = tensor.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    hf_models.tokenizer().save_pretrained(folder)


def logits(run_dir: Path, ids: Tensor) -> Tensor:
    """Runs in a worker: what Megatron makes of an imported model, `[b, s, v]`."""
    parallel = parallel_context.build(Layout(), seed=0)
    folder = run_directory.locate(str(run_dir))
    shape = metadata.read(folder).model
    chunks = gpt.build(shape, parallel, Precision(), choose("cpu", 0), sequence_length=ids.shape[1])
    loader.load_weights(folder, chunks, parallel)
    model = gpt.unwrap(chunks[0]).eval()
    with torch.no_grad():
        hidden = model(ids, torch.arange(ids.shape[1]).expand_as(ids), attention_mask=None)
        return (hidden @ model.lm_head().t()).transpose(0, 1)


@pytest.mark.parametrize("language", ["en", "pt"])
def test_logits_are_those_of_the_package(pool: WorkerPool, tmp_path: Path, language: str) -> None:
    glassllm = pytest.importorskip("glassllm")
    oracle, _ = glassllm.load_pretrained(language)
    ids = torch.randint(1024, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = torch.from_numpy(np.asarray(oracle.forward(ids.numpy()).data)).double()
    apart = {}
    for permuted in (True, False):
        folder = tmp_path / f"hf_{permuted}"
        make_folder(Path(glassllm.__file__).parent / "weights" / f"{language}.npz", folder, permuted)
        run_dir = tmp_path / f"run_{permuted}"
        words = ["import", "--hf", str(folder), "--out", str(run_dir)]
        assert pool.run(convert_hf.main, words, world=1, initialise=False) == [0]
        apart[permuted] = (pool.run(logits, run_dir, ids, world=1)[0].double() - expected).abs().max().item()
    assert apart[True] < 1e-4
    assert apart[False] > 1.0, "a permutation that was left out must be seen"
