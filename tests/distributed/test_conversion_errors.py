"""Damaged and hostile folders: one clear line, exit code 2, and nothing written."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import hf_models
from tests.support.pool import WorkerPool
from tests.support.runs import files_of
from tools import convert_hf

INDEX = "model.safetensors.index.json"


def edit_json(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON object; `weight_map` is merged."""
    content = json.loads(file.read_text())
    if "weight_map" in changes:
        changes["weight_map"] = {**content["weight_map"], **changes["weight_map"]}
    file.write_text(json.dumps({**content, **changes}))


def shards(hf: Path) -> list[Path]:
    return sorted(hf.glob("*.safetensors"))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda hf: edit_json(hf / "config.json", **changes)


def without_config(*keys: str) -> Callable[[Path], None]:
    def damage(hf: Path) -> None:
        content = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k not in keys}))

    return damage


def index(name: str) -> Callable[[Path], None]:
    return lambda hf: edit_json(hf / INDEX, weight_map={"model.norm.weight": name})


def remove(name: str) -> Callable[[Path], None]:
    return lambda hf: (hf / name).unlink()


def overwrite(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda hf: (hf / file).write_bytes(content)


def token(**changes: Any) -> Callable[[Path], None]:
    return lambda hf: edit_json(hf / "tokenizer_config.json", **changes)


def no_token(**generation: Any) -> Callable[[Path], None]:
    """Special tokens that the tokenizer's files say nothing of, and the settings of generation do."""

    def damage(hf: Path) -> None:
        (hf / "tokenizer_config.json").unlink()
        (hf / "special_tokens_map.json").unlink(missing_ok=True)
        edit_json(hf / "generation_config.json", **generation)

    return damage


def truncate(hf: Path) -> None:
    content = shards(hf)[-1].read_bytes()
    shards(hf)[-1].write_bytes(content[:-8])


def change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """All shards as one file, changed."""

    def damage(hf: Path) -> None:
        tensors = {name: tensor for file in shards(hf) for name, tensor in load_file(file).items()}
        for file in (*shards(hf), hf / INDEX):
            file.unlink()
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, hf / "model.safetensors")

    return damage


def change_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """The header of the first shard, changed, before the same bytes."""

    def damage(hf: Path) -> None:
        content = shards(hf)[0].read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        shards(hf)[0].write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return damage


def twice(hf: Path) -> None:
    """A tensor of the last shard in the first one too."""
    name, tensor = next(iter(load_file(shards(hf)[-1]).items()))
    save_file({**load_file(shards(hf)[0]), name: tensor.clone()}, shards(hf)[0])


def duplicate_key(hf: Path) -> None:
    content = shards(hf)[0].read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + size].rstrip()
    name = next(key for key in json.loads(header) if key != "__metadata__")
    entry = json.dumps({name: json.loads(header)[name]})[1:-1].encode()
    header = header[:-1] + b"," + entry + b"}"
    shards(hf)[0].write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])


def pickles(hf: Path) -> None:
    for file in (*shards(hf), hf / INDEX):
        file.unlink()
    (hf / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def megatron_lm(hf: Path) -> None:
    """A folder as Megatron-LM writes it, as far as its names."""
    (hf / "config.json").unlink()
    (hf / "latest_checkpointed_iteration.txt").write_text("10")


def symlinked_out(hf: Path) -> None:
    edit_json(hf / INDEX, weight_map={"model.norm.weight": "sub/x.safetensors"})


def overlap(header: dict[str, Any]) -> None:
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    entries[1]["data_offsets"] = entries[0]["data_offsets"]
    entries[1]["shape"], entries[1]["dtype"] = entries[0]["shape"], entries[0]["dtype"]


def first_entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: next(e for n, e in header.items() if n != "__metadata__").update(changes)


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (remove("config.json"), "config.json: is missing"),
    "a checkpoint of Megatron-LM": (megatron_lm, "is a checkpoint of Megatron-LM or of another program"),
    "config no json": (overwrite("config.json", b"{"), "config.json: cannot be read"),
    "config a list": (overwrite("config.json", b"[]"), "contains list, not an object"),
    "unknown architecture": (config(model_type="mamba"), "'mamba' is not supported; valid values: llama, mistral"),
    "no LM head": (config(architectures=["LlamaForSequenceClassification"]), "is not supported, LlamaForCausalLM is"),
    "quantised": (config(quantization_config={"bits": 4}), "quantised weights are not supported"),
    "yarn": (config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), '"yarn" is not supported'),
    "llama3 without numbers": (config(rope_parameters={"rope_type": "llama3", "factor": 4.0}), "rope_scaling."),
    "biases": (config(attention_bias=True), "attention_bias: true is not supported, false is"),
    "activation": (config(hidden_act="gelu"), 'hidden_act: "gelu" is not supported'),
    "a size of text": (config(hidden_size="many"), "hidden: 'many'"),
    "a size of zero": (config(num_hidden_layers=0), "layers: 0"),
    "odd groups": (config(num_key_value_heads=4), "4 does not divide 6 heads"),
    "a size out of all proportion": (config(vocab_size=10**12), "the model would have"),
    "layers without end": (config(num_hidden_layers=10**9), "the model would have"),
    "a nest of lists": (overwrite("config.json", b"[" * 10**6), "config.json: cannot be read"),
    "model type a list": (config(model_type=["llama"]), "['llama'] is not supported"),
    "generation settings no json": (
        overwrite("generation_config.json", b"{"),
        "generation_config.json: cannot be read",
    ),
    "architecture a number": (config(architectures=5), "architectures: 5 is not a list of names"),
    "positions a list": (config(rope_parameters=[1]), "rope_parameters: [1] is not an object"),
    "size missing": (without_config("hidden_size"), "hidden_size: is missing"),
    "no tokenizer": (remove("tokenizer.json"), "has neither tokenizer.json nor tokenizer.model"),
    "pickle": (pickles, "pytorch_model.bin: a pickle can run arbitrary code"),
    "no weights": (lambda hf: [file.unlink() for file in (*shards(hf), hf / INDEX)], f"has neither {INDEX}"),
    "index out": (index("../evil.safetensors"), "'../evil.safetensors', which is outside the folder"),
    "index absolute": (index("/etc/passwd"), "'/etc/passwd', which is outside the folder"),
    "index into a folder": (symlinked_out, "'sub/x.safetensors', which is outside the folder"),
    "index no map": (lambda hf: (hf / INDEX).write_text("{}"), "has no weight_map"),
    "index to another file": (lambda hf: index(shards(hf)[0].name)(hf), "fix the index"),
    "missing shard": (lambda hf: shards(hf)[1].unlink(), "is missing, but model.safetensors.index.json names it"),
    "truncated": (truncate, "bytes long, its header implies"),
    "empty file": (lambda hf: shards(hf)[0].write_bytes(b""), "is truncated or not a safetensors file"),
    "header of a tebibyte": (lambda hf: shards(hf)[0].write_bytes(struct.pack("<Q", 1 << 40) + b"{}"), "is truncated"),
    "huge header": (
        lambda hf: shards(hf)[0].write_bytes(struct.pack("<Q", 40 << 20) + b" " * (40 << 20)),
        "exceeds the limit of 33554432",
    ),
    "header no json": (lambda hf: shards(hf)[0].write_bytes(struct.pack("<Q", 2) + b"{]"), "its header is not JSON"),
    "negative offsets": (change_header(first_entry(data_offsets=[-4, 4])), "has a damaged entry"),
    "shape of text": (change_header(first_entry(shape="big")), "has a damaged entry"),
    "shape too large": (change_header(first_entry(shape=[10**9, 10**9])), "bytes, not"),
    "shape beyond all numbers": (change_header(first_entry(shape=[10**30])), "bytes, not"),
    "shape that wraps to nothing": (change_header(first_entry(shape=[2**32, 2**32])), "bytes, not"),
    "header a nest of lists": (
        lambda hf: shards(hf)[0].write_bytes(struct.pack("<Q", 10**6) + b"[" * 10**6),
        "its header is not JSON",
    ),
    "overlap": (change_header(overlap), "begins at byte"),
    "integer weights": (change_header(first_entry(dtype="I8")), "bytes, not"),
    "weights in float64": (
        change_weights(lambda t: t.update({"model.norm.weight": torch.ones(48).double()})),
        "model.norm.weight is of type float64, which is not supported for weights; save the model in one",
    ),
    "a type that is a list": (change_header(first_entry(dtype=["F32"])), "is of type ['F32'], which is not supported"),
    "an unknown type": (change_header(first_entry(dtype="C64")), "is of type 'C64', which is not supported"),
    "a name with an escape": (
        change_weights(lambda t: t.update({"extra\n\x1b[31mrm": torch.ones(2)})),
        "unexpected 'extra\\n\\x1b[31mrm'",
    ),
    "an index and a file of its own": (
        lambda hf: shutil.copy(shards(hf)[0], hf / "model.safetensors"),
        f"has model.safetensors, and {INDEX} without it; remove the one that is not the model",
    ),
    "end of text a list of nothing": (
        token(eos_token={"content": ["</s>"]}),
        "eos_token ['</s>'] is not a string: save the tokenizer again",
    ),
    "end of text by a word": (
        no_token(eos_token_id="two"),
        "eos_token_id 'two' is not an integer: save the model again",
    ),
    "tokenizer settings a nest of lists": (
        overwrite("tokenizer_config.json", b"[" * 10**6),
        "tokenizer_config.json is not valid JSON",
    ),
    "a tensor in two shards": (twice, "it is in model-00001-of-00005.safetensors; fix the index"),
    "a tensor twice in a header": (duplicate_key, "is listed twice"),
    "missing tensor": (change_weights(lambda t: t.pop("model.layers.2.mlp.up_proj.weight")), "missing model.layers.2"),
    "extra tensor": (change_weights(lambda t: t.update(extra=torch.ones(2))), "unexpected extra"),
    "wrong shape": (
        change_weights(lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1]})),
        "lm_head.weight is [300, 48], config.json expects [301, 48]",
    ),
    "mixed types": (
        change_weights(lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.ones(48).half()})),
        "with --dtype",
    ),
}


# One of each place that looks: all ranks stop, and the first alone speaks.
AT_TWO_RANKS = {
    "no folder", "unknown architecture", "a size out of all proportion", "no tokenizer", "pickle", "index out",
    "missing shard", "truncated", "wrong shape", "mixed types",
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged folder of several shards."""
    return hf_models.save("llama", tmp_path_factory.mktemp("sound") / "hf", max_shard_size="100KB")


def fails(pool: WorkerPool, folder: Path, *words: object, world: int = 1) -> str:
    """The one line of a call that fails on every rank and leaves `folder` as it was."""
    before = files_of(folder)
    ranks = pool.run(convert_hf.main, [str(w) for w in words], world=world, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [2] * world, ranks
    assert files_of(folder) == before
    (line,) = [line for line in ranks[0].stderr.splitlines() if "Warning" not in line and "warn(" not in line]
    assert line.startswith("convert_hf: error: ")
    return line


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_folder_is_one_line(pool: WorkerPool, sound: Path, tmp_path: Path, name: str) -> None:
    damage, words = CASES[name]
    hf = tmp_path / "hf"
    shutil.copytree(sound, hf)
    damage(hf)
    world = 2 if name in AT_TWO_RANKS else 1
    line = fails(pool, tmp_path, "import", "--hf", hf, "--out", tmp_path / "run", world=world)
    assert words in line, line
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_one_line(pool: WorkerPool, sound: Path, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    words = ["import", "--hf", str(sound), "--out", str(run)]
    assert pool.run(convert_hf.main, words, world=1, initialise=False) == [0]
    (data,) = run.rglob("*.distcp")
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:1000])
    line = fails(pool, tmp_path, "export", "--checkpoint", run, "--out", tmp_path / "back")
    assert f"{data}: {'cannot be read' if damage == 'missing' else '1000 bytes'}" in line
    assert not list(tmp_path.glob(".*"))


def test_places_and_sizes_are_checked(pool: WorkerPool, sound: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["import", "--hf", str(sound), "--out", str(run)]
    assert pool.run(convert_hf.main, words, world=1, initialise=False) == [0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    place = ["--out", tmp_path / "mine"]
    assert "already exists" in fails(pool, tmp_path, "export", "--checkpoint", run, *place)
    assert "so --force does not replace it" in fails(pool, tmp_path, "export", "--checkpoint", run, *place, "--force")
    assert "no such checkpoint" in fails(pool, tmp_path, "export", "--checkpoint", "nowhere", "--out", tmp_path / "x")
    same = ["verify", "--hf", sound, "--checkpoint", run]
    assert "--nproc-per-node 2" in fails(pool, tmp_path, *same, "--tensor", 2)
    assert "--tensor: 4 does not divide heads 6" in fails(pool, tmp_path, *same, "--tensor", 4, world=4)
    assert "--tokens: 65 is not between 1" in fails(pool, tmp_path, *same, "--tokens", 65)
    other = hf_models.save("qwen3", tmp_path / "other")
    assert "--hf has family qwen3" in fails(pool, tmp_path, "verify", "--hf", other, "--checkpoint", run)


def test_a_folder_that_one_rank_does_not_see(pool: WorkerPool, sound: Path, tmp_path: Path) -> None:
    """Of a disk that only some nodes have: all ranks stop, and the first one says why."""
    ranks = pool.run(import_unseen, str(sound), str(tmp_path), world=2, initialise=False, capture=True)
    assert [rank.value for rank in ranks] == [2, 2]
    assert f"{tmp_path / 'gone'}: no such folder" in ranks[0].stderr
    assert not list(tmp_path.iterdir())


def import_unseen(hf: str, folder: str) -> int:
    """Rank 1 looks for another folder."""
    hf = f"{folder}/gone" if os.environ["RANK"] == "1" else hf
    return convert_hf.main(["import", "--hf", hf, "--out", f"{folder}/run"])


def test_numbers_too_large_for_the_type(pool: WorkerPool, sound: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(sound, hf)
    change_weights(lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[7].fill_(1e5))(hf)
    line = fails(pool, tmp_path, "import", "--hf", hf, "--out", tmp_path / "run", "--dtype", "fp16", world=2)
    assert "model.layers.1.mlp.up_proj.weight: contains 100000, too large for float16" in line
    assert pool.run(
        convert_hf.main, ["import", "--hf", str(hf), "--out", str(tmp_path / "run")], world=1, initialise=False
    ) == [0]
    line = fails(
        pool, tmp_path, "export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "out", "--dtype", "fp16"
    )
    assert "too large for float16" in line


def test_force_spares_a_model_of_somebody_else(pool: WorkerPool, sound: Path, tmp_path: Path) -> None:
    run, hf = tmp_path / "run", tmp_path / "hf"
    shutil.copytree(sound, hf)
    assert pool.run(convert_hf.main, ["import", "--hf", str(sound), "--out", str(run)], world=1, initialise=False) == [
        0
    ]
    fails(pool, tmp_path, "export", "--checkpoint", run, "--out", hf, "--force")


def test_a_tied_head_that_an_index_names_and_no_file_has(pool: WorkerPool, tmp_path: Path) -> None:
    """transformers loads it."""
    hf = hf_models.save("smollm", tmp_path / "hf", max_shard_size="20KB")
    edit_json(hf / INDEX, weight_map={"lm_head.weight": shards(hf)[0].name})
    words = ["import", "--hf", str(hf), "--out", str(tmp_path / "run")]
    (rank,) = pool.run(convert_hf.main, words, world=1, initialise=False, capture=True)
    assert rank.value == 0, rank
