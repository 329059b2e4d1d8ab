"""In, compared and out again: every family, type and layout, against transformers; and what a training run leaves."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.data.tokenizer import open_tokenizer
from megatron_capgap.models import size
from tests.support import dense, hf_models, runs
from tests.support.corpus import texts
from tests.support.pool import RankResult, WorkerPool
from tests.support.processes import ROOT, environment
from tests.support.runs import Fixtures
from tools import convert_hf

LAYOUTS = {"one": (1, []), "tp2": (2, ["--tensor", "2"]), "pp2": (2, ["--pipeline", "2"])}
LAYOUTS["tp2_pp2"] = (4, ["--tensor", "2", "--pipeline", "2"])
THREE = {"one": LAYOUTS["one"], "tp3": (3, ["--tensor", "3"]), "pp2": LAYOUTS["pp2"]}


def convert(pool: WorkerPool, *words: object, world: int = 1) -> list[RankResult]:
    return pool.run(convert_hf.main, [str(word) for word in words], world=world, initialise=False, capture=True)


def must(pool: WorkerPool, *words: object, world: int = 1) -> str:
    """What the first rank says of a call that succeeds on all."""
    ranks = convert(pool, *words, world=world)
    assert [rank.value for rank in ranks] == [0] * world, ranks
    assert all(not rank.stdout for rank in ranks[1:]), "only the first rank speaks"
    return ranks[0].stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_folders(mine: Path, theirs: Path) -> None:
    """The same bits under the same names, and configurations that mean the same."""
    found, expected = weights(mine), weights(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (mine, theirs)]
    for config in configs:
        config.pop("_name_or_path")
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", hf_models.CASES)
def test_round_trip_is_bit_equal(pool: WorkerPool, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    hf = hf_models.save(name, tmp_path / "hf", dtype, max_shard_size="60KB")
    must(pool, "import", "--hf", hf, "--out", tmp_path / "run", world=2)
    must(
        pool,
        "export",
        "--checkpoint",
        tmp_path / "run",
        "--out",
        tmp_path / "back",
        "--max-shard-size",
        "90KB",
        world=2,
    )
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_equal_folders(tmp_path / "back", hf)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    shape = metadata.read(run_directory.locate(str(tmp_path / "run"))).model
    assert size.parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    text = "Tokens, 1 2 3"
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "back", hf))
    assert ours(text).input_ids == theirs(text).input_ids
    assert (hf / "generation_config.json").read_bytes() == (tmp_path / "back/generation_config.json").read_bytes()


@pytest.mark.parametrize("name", hf_models.CASES)
def test_logits_are_those_of_transformers_in_every_layout(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    hf = hf_models.save(name, tmp_path / "hf")
    must(pool, "import", "--hf", hf, "--out", tmp_path / "run")
    for world, cut in (THREE if "odd_heads" in name else LAYOUTS).values():
        said = must(pool, "verify", "--hf", hf, "--checkpoint", tmp_path / "run", *cut, world=world)
        (apart,) = re.findall(r"max difference (\S+),", said)
        assert float(apart) <= 1e-4 and "greedy token equal 100.00%" in said, said


def swap_query_rows(hf: Path) -> None:
    """The order of interleaved rotary positions."""
    found = load_file(hf / "model.safetensors")
    rows = found["model.layers.2.self_attn.q_proj.weight"]
    found["model.layers.2.self_attn.q_proj.weight"] = (
        rows.view(6, 2, -1, 48).transpose(1, 2).reshape_as(rows).contiguous()
    )
    save_file(found, hf / "model.safetensors", {"format": "pt"})


def drop_bias(hf: Path) -> None:
    found = load_file(hf / "model.safetensors")
    found["model.layers.1.self_attn.v_proj.bias"].zero_()
    save_file(found, hf / "model.safetensors", {"format": "pt"})


def other_theta(hf: Path) -> None:
    edit_json(hf / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 600.0})


def other_positions(hf: Path) -> None:
    found = load_file(hf / "model.safetensors")
    found["transformer.wpe.weight"].mul_(1.01)
    save_file(found, hf / "model.safetensors", {"format": "pt"})


def other_final_norm(hf: Path) -> None:
    found = load_file(hf / "model.safetensors")
    found["gpt_neox.final_layer_norm.bias"].zero_()
    save_file(found, hf / "model.safetensors", {"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


BREAKS = [
    ("llama", swap_query_rows, "first in layer 2"),
    ("qwen2", drop_bias, "first in layer 1"),
    ("llama", other_theta, "first in layer 0"),
    ("gpt2", other_positions, "first in the embeddings"),
    ("gpt_neox", other_final_norm, "first after the last layer"),
]


@pytest.mark.parametrize("name, damage, where", BREAKS, ids=[damage.__name__ for _, damage, _ in BREAKS])
def test_verify_finds_the_layer_where_they_part(
    pool: WorkerPool, tmp_path: Path, name: str, damage: Any, where: str
) -> None:
    hf = hf_models.save(name, tmp_path / "hf")
    must(pool, "import", "--hf", hf, "--out", tmp_path / "run")
    damage(hf)
    ranks = convert(pool, "verify", "--hf", hf, "--checkpoint", tmp_path / "run", "--pipeline", 2, world=2)
    assert [rank.value for rank in ranks] == [1, 1] and where in ranks[0].stdout, ranks


@pytest.mark.parametrize("world, cut", [(2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2}), (2, {})])
def test_a_trained_model_is_exported(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path, world: int, cut: dict[str, Any]
) -> None:
    """A padded vocabulary under tensor parallelism, optimizer state beside the weights, a SentencePiece tokenizer."""
    changes = {"student__layout": cut, "train__steps": 2, "train__global_batch": 8}
    if not cut:  # a learned map between hidden states lies in the checkpoint, and is no part of the model
        changes["objective__matching"] = [{"student_layer": 1, "teacher_layer": 2}]
    raw = runs.distill_config(fixtures, tmp_path / "run", teacher, **changes)
    run_dir = runs.train(pool, "distill", raw, world)
    must(pool, "export", "--checkpoint", run_dir, "--out", tmp_path / "hf", world=world)
    shape = ModelShape(**runs.STUDENT)
    source = dense.Source(shape, 0, run_dir)
    expected = dense.llama(shape, pool.run(dense.megatron_weights, source, world=1)[0])
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.get_input_embeddings().weight.shape[0] == runs.VOCAB
    ids = torch.randint(runs.VOCAB, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model.double()(ids).logits, expected(ids).logits, rtol=0, atol=1e-9)
    card = (tmp_path / "hf" / "README.md").read_text()
    for fact in ("distillation", "| teacher | `teacher` |", "| tokens trained on | 512 |", "held-out perplexity"):
        assert fact in card, card
    must(pool, "verify", "--hf", tmp_path / "hf", "--checkpoint", run_dir)


def test_a_sentencepiece_tokenizer_gives_the_same_ids(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    must(pool, "export", "--checkpoint", teacher, "--out", tmp_path / "hf")
    ours, theirs = (
        open_tokenizer(str(fixtures.folder / "tokenizer.model")),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    assert open_tokenizer(str(tmp_path / "hf")).fingerprint == ours.fingerprint
    odd = [
        "",
        " ",
        "  a  b ",
        "\t\n\n x",
        "1234567",
        "caf\u00e9 \u4e2d\u6587 \U0001f600",
        "\u2581 a",
        "a\u00a0b",
        "x" * 200,
    ]
    for text in [*texts(60, seed=9), *odd]:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids), repr(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    command = [sys.executable, str(ROOT / "examples/quickstart/generate.py"), str(tmp_path / "hf"), "This"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("This"), done.stderr


@pytest.mark.parametrize("known", [True, False], ids=["with settings", "the model alone"])
def test_a_sentencepiece_model_that_came_along(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, known: bool
) -> None:
    """transformers' own settings of it stay, its chat template too; without any, it would cut texts in another way."""
    hf_models.build("llama").save_pretrained(tmp_path / "hf")
    shutil.copyfile(fixtures.folder / "tokenizer.model", tmp_path / "hf" / "tokenizer.model")
    if known:
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": "{{ messages }}"}
        (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    must(pool, "import", "--hf", tmp_path / "hf", "--out", tmp_path / "run")
    must(pool, "export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "back")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    expected = open_tokenizer(str(fixtures.folder / "tokenizer.model")).encode("Tokens, 1 2 3")
    assert tokenizer("Tokens, 1 2 3").input_ids == ([tokenizer.bos_token_id] if known else []) + expected
    assert (tokenizer.chat_template is not None) == known
    assert (tmp_path / "back" / "tokenizer.json").is_file() != known


def test_dtype_changes_only_when_asked(pool: WorkerPool, tmp_path: Path) -> None:
    hf = hf_models.save("qwen2", tmp_path / "hf")
    must(pool, "import", "--hf", hf, "--out", tmp_path / "run", "--dtype", "bf16")
    must(pool, "export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "back")
    must(pool, "export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "wide", "--dtype", "fp32")
    narrow, wide = weights(tmp_path / "back"), weights(tmp_path / "wide")
    for name, tensor in weights(hf).items():
        assert torch.equal(narrow[name], tensor.bfloat16()) and torch.equal(wide[name], tensor.bfloat16().float())
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


def test_verify_compares_the_files_whatever_type_the_configuration_speaks_of(pool: WorkerPool, tmp_path: Path) -> None:
    """transformers would round fp32 weights to the type in config.json."""
    hf = hf_models.save("llama", tmp_path / "hf")
    edit_json(hf / "config.json", dtype="bfloat16")
    must(pool, "import", "--hf", hf, "--out", tmp_path / "run")
    assert "they agree" in must(pool, "verify", "--hf", hf, "--checkpoint", tmp_path / "run")


def test_what_transformers_does_not_load_is_one_line(pool: WorkerPool, tmp_path: Path) -> None:
    hf = hf_models.save("llama", tmp_path / "hf")
    must(pool, "import", "--hf", hf, "--out", tmp_path / "run")
    edit_json(hf / "config.json", bos_token_id="first")
    ranks = convert(pool, "verify", "--hf", hf, "--checkpoint", tmp_path / "run", "--tensor", 2, world=2)
    assert [rank.value for rank in ranks] == [2, 2]
    assert "transformers does not load it" in ranks[0].stderr.splitlines()[-1], ranks[0].stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool], ids=str)
def test_an_old_file_of_the_bare_model_with_buffers(pool: WorkerPool, tmp_path: Path, dtype: torch.dtype) -> None:
    """GPT-2 as it was first published: no prefix, and the causal mask of every layer among the weights."""
    hf = hf_models.save("gpt2", tmp_path / "hf")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(hf / "model.safetensors").items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril().to(dtype) for layer in range(4)}
    save_file(bare, hf / "model.safetensors", {"format": "pt"})
    said = must(pool, "import", "--hf", hf, "--out", tmp_path / "run")
    assert "skipped 4 buffers that are not weights, for example transformer.h.0.attn.bias" in said
    must(pool, "export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "back")
    assert_equal_folders(tmp_path / "back", hf_models.save("gpt2", tmp_path / "plain"))


def test_a_pythia_with_its_masks(pool: WorkerPool, tmp_path: Path) -> None:
    """As published: the causal mask of every layer in bytes."""
    hf = hf_models.save("gpt_neox", tmp_path / "hf")
    found = load_file(hf / "model.safetensors")
    mask = torch.ones(1, 1, 64, 64).tril().to(torch.uint8)
    save_file(found | {"gpt_neox.layers.0.attention.bias": mask}, hf / "model.safetensors", {"format": "pt"})
    must(pool, "import", "--hf", hf, "--out", tmp_path / "run")
    must(pool, "export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "back")
    assert_equal_folders(tmp_path / "back", hf_models.save("gpt_neox", tmp_path / "plain"))


def test_a_copy_of_the_tied_embedding_is_left_out(pool: WorkerPool, tmp_path: Path) -> None:
    hf = hf_models.save("smollm", tmp_path / "hf")
    found = load_file(hf / "model.safetensors")
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    save_file(found, hf / "model.safetensors", {"format": "pt"})
    must(pool, "import", "--hf", hf, "--out", tmp_path / "run")
    must(pool, "export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "back")
    assert "lm_head.weight" not in weights(tmp_path / "back")
    found["lm_head.weight"][5, 7] += 1
    save_file(found, hf / "model.safetensors", {"format": "pt"})
    (rank,) = convert(pool, "import", "--hf", hf, "--out", tmp_path / "other")
    assert rank.value == 2 and "differs from the embedding, but config.json ties them" in rank.stderr


def test_force_replaces_an_import_and_spares_a_run(pool: WorkerPool, teacher: Path, tmp_path: Path) -> None:
    hf = hf_models.save("llama", tmp_path / "hf")
    must(pool, "import", "--hf", hf, "--out", tmp_path / "run")
    before = runs.files_of(tmp_path / "run")
    (rank,) = convert(pool, "import", "--hf", hf, "--out", tmp_path / "run")
    assert rank.value == 2 and "--force" in rank.stderr and runs.files_of(tmp_path / "run") == before
    must(pool, "import", "--hf", hf, "--out", tmp_path / "run", "--force")
    shutil.copytree(hf, tmp_path / "run" / "hf")
    (rank,) = convert(pool, "import", "--hf", tmp_path / "run" / "hf", "--out", tmp_path / "run", "--force")
    assert rank.value == 2 and "contains the input" in rank.stderr and (tmp_path / "run" / "hf").is_dir()
    shutil.copytree(teacher, tmp_path / "trained")
    before = runs.files_of(tmp_path / "trained")
    (rank,) = convert(pool, "import", "--hf", hf, "--out", tmp_path / "trained", "--force")
    assert rank.value == 2 and "so --force does not replace it" in rank.stderr
    assert runs.files_of(tmp_path / "trained") == before
