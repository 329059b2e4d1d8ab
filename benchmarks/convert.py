"""Compares import and export of a synthetic LLaMA with a plain copy of the same bytes: seconds, GB/s and peak memory.

    python benchmarks/convert.py [--gigabytes 2] [--folder DIR]

Every call is a separate process; the peak of a call on a tiny model (interpreter, torch, Megatron) is subtracted from
its peak. Files are in the page cache when they are read, for both the copy and the conversion.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megatron_capgap.conversion.safetensors import Writer  # noqa: E402
from tests.support import hf_models  # noqa: E402

# One call: seconds without the imports, and the peak memory of the process.
CALL = """
import sys, time
import megatron_capgap.conversion.exporting
from tools import convert_hf
from megatron_capgap.devices.cpu import peak_resident_bytes
began = time.monotonic()
code = convert_hf.main(sys.argv[1:])
print(time.monotonic() - began, peak_resident_bytes())
sys.exit(code)
"""


def make(folder: Path, layers: int, hidden: int, vocab: int) -> int:
    """Writes a bf16 LLaMA whose ffn is 2.75 times its hidden size; returns its bytes."""
    ffn, heads = 11 * hidden // 4, hidden // 64
    config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "vocab_size": vocab}
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        inner = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        inner |= {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
        inner |= {f"self_attn.{name}_proj": (hidden // 2, hidden) for name in "kv"}
        inner |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
        shapes |= {f"model.layers.{layer}.{name}": size for name, size in inner.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    hf_models.tokenizer().save_pretrained(folder)
    writer = Writer(folder / "model.safetensors", {f"{n}.weight": (torch.bfloat16, s) for n, s in shapes.items()})
    for name, size in shapes.items():
        writer.write(f"{name}.weight", 0, torch.randint(1 << 15, size, dtype=torch.int16).view(torch.bfloat16))
    writer.close()
    return (folder / "model.safetensors").stat().st_size


def call(*words: object) -> tuple[float, int]:
    """Seconds without the imports, and the peak memory of the process in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CALL, *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of weights (2)")
    parser.add_argument("--folder", help="where to work (a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        place = Path(name)
        make(place / "tiny", 2, 128, 300)
        layer = 2 * (3 * 2048**2 + 3 * 2048 * 5632)
        nbytes = make(place / "hf", max(1, round((args.gigabytes * 1e9 - 4 * 32000 * 2048) / layer)), 2048, 32000)
        _, base = call("import", "--hf", place / "tiny", "--out", place / "tiny_run")
        shutil.copyfile(place / "hf/model.safetensors", place / "warm")
        (place / "warm").unlink()
        began = time.monotonic()
        with open(place / "hf/model.safetensors", "rb") as source, open(place / "copy", "wb") as copy:
            shutil.copyfileobj(source, copy, 16 << 20)
            os.fsync(copy.fileno())
        rows = [("copy", time.monotonic() - began, None)]
        rows.append(("import", *call("import", "--hf", place / "hf", "--out", place / "run")))
        rows.append(("export", *call("export", "--checkpoint", place / "run", "--out", place / "back")))
        print(f"{nbytes / 1e9:.2f} GB of bf16 weights, one process; seconds without its imports")
        print(f"{'':8}{'seconds':>9}{'GB/s':>8}{'of copy':>9}{'peak MB':>9}{'of model':>10}")
        for title, seconds, peak in rows:
            line = f"{title:8}{seconds:9.1f}{nbytes / seconds / 1e9:8.2f}{rows[0][1] / seconds:9.2f}"
            print(line + (f"{(peak - base) / 1e6:9.0f}{(peak - base) / nbytes:10.1%}" if peak else ""))


if __name__ == "__main__":
    main()
