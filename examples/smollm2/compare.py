"""What came out beside what went in: perplexity of transformers on the samples of our evaluation, and every tensor.

python compare.py EVALUATION.yaml HF_IN HF_OUT
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from megatron_capgap.runtime import third_party

third_party.prepare()

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megatron_capgap.config.loader import load  # noqa: E402
from megatron_capgap.devices import choose  # noqa: E402

choose("cpu", 0)  # before Megatron is imported

from megatron_capgap.data import pretrain  # noqa: E402
from megatron_capgap.stages.datasets import cache_dir  # noqa: E402

TOLERANCE = 1e-3
"""Relative, of the perplexities."""


def main() -> int:
    """Prints both; exit status 1 where the perplexities differ by more than the tolerance, or a tensor does at all."""
    config = load(sys.argv[1], [], "evaluate").config
    before, after = Path(sys.argv[2]), Path(sys.argv[3])
    ours = json.loads((Path(config.run_dir) / "evaluation.json").read_text())
    loss, tokens = transformers_loss(before, pretrain.open_validation(config.data, cache_dir(config)))
    mine, theirs = ours["valid_perplexity"], math.exp(loss)
    print(f"perplexity on {tokens:,} tokens: ours {mine:.4f}, transformers {theirs:.4f}")
    equal = equal_tensors(before / "model.safetensors", after / "model.safetensors")
    print(f"{equal} tensors, each equal bit by bit")
    return int(abs(mine / theirs - 1) > TOLERANCE)


def transformers_loss(folder: Path, samples: pretrain.PackedTextDataset) -> tuple[float, int]:
    """Nats a token over all samples, in fp32; and the tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for k in range(len(samples)):
            ids = torch.from_numpy(samples.tokens(k))
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
            total += torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="sum").item()
    tokens = len(samples) * samples.sequence_length
    return total / tokens, tokens


def equal_tensors(before: Path, after: Path) -> int:
    """How many there are; fails where one differs in name, type or any bit."""
    with safe_open(before, "pt") as one, safe_open(after, "pt") as other:
        assert set(one.keys()) == set(other.keys()), set(one.keys()) ^ set(other.keys())
        for name in one.keys():
            first, second = one.get_tensor(name), other.get_tensor(name)
            assert first.dtype == second.dtype and torch.equal(first, second), name
        return len(one.keys())


if __name__ == "__main__":
    sys.exit(main())
