"""Pruning what is dead changes no logit; pruned checkpoints load in any layout and go out to Hugging Face."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_capgap.checkpoint import metadata, run_directory
from megatron_capgap.models import size
from tests.distributed.test_conversion import assert_equal_folders
from tests.support import hf_models, masked, pruning, runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures
from tools import convert_hf


@dataclass(frozen=True)
class Planted:
    """What is dead in a teacher, and the numbers without it."""

    numbers: dict[str, int]
    groups: dict[int, list[int]]
    """By layer, key/value heads."""
    heads: dict[int, list[int]]
    """By layer, query heads, as many of each group that stays."""
    neurons: dict[int, list[int]]
    channels: list[int]


# In each layer others; the channels are the same in all.
CASES = {
    "llama": Planted(
        {"heads": 3, "kv_heads": 1, "hidden": 36, "ffn": 56},
        {0: [1], 1: [0], 2: [0], 3: [1]},
        {},
        {0: [*range(16)], 1: [*range(56, 72)], 2: [*range(0, 32, 2)], 3: [*range(40, 56)]},
        [0, 5, 6, 7, 11, 20, 21, 30, 33, 41, 46, 47],
    ),
    "smollm": Planted(
        {"heads": 4, "kv_heads": 2, "hidden": 40, "ffn": 64},
        {},
        {0: [0, 3], 1: [1, 5], 2: [2, 4], 3: [0, 5]},
        {layer: [layer, 10, 20, 30, 40, 50, 60, 71] for layer in range(4)},
        [1, 2, 3, 13, 24, 30, 40, 47],
    ),
    "gpt2": Planted(
        {"heads": 4, "hidden": 32, "ffn": 96},
        {0: [0, 5], 1: [1, 2], 2: [3, 5], 3: [0, 4]},
        {},
        {layer: [*range(layer, 104, 13)] for layer in range(4)},
        [*range(3, 48, 3), 0],
    ),
    "gpt_neox": Planted(
        {"heads": 3, "hidden": 36, "ffn": 96},
        {0: [0], 1: [1], 2: [2], 3: [3]},
        {},
        {layer: [*range(layer, 104, 13)] for layer in range(4)},
        [*range(2, 48, 4)],
    ),
}


def rows_first(linear: Any) -> torch.Tensor:
    """A view of a matrix as `[out, in]`; GPT-2 keeps its own the other way round."""
    return linear.weight.t() if hasattr(linear, "nf") else linear.weight


@torch.no_grad()
def plant(model: PreTrainedModel, planted: Planted) -> PreTrainedModel:
    """Makes parts dead: a head or neuron that nothing reads, a channel into which nothing is ever written."""
    parts, n = masked.parts_of(model), masked.sizes(model)
    columns, width = n["context"] // n["groups"], n["context"] // n["heads"]
    written = [model.get_input_embeddings().weight]
    if model.config.model_type == "gpt2":
        written.append(model.transformer.wpe.weight)
    for i, (_, _, out, _, _, down) in enumerate(parts.layers):
        for group in planted.groups.get(i, []):
            rows_first(out)[:, group * columns : (group + 1) * columns] = 0
        for head in planted.heads.get(i, []):
            rows_first(out)[:, head * width : (head + 1) * width] = 0
        rows_first(down)[:, planted.neurons[i]] = 0
        written += [
            part for linear in (out, down) for part in (rows_first(linear).t(), linear.bias) if part is not None
        ]
    alive = [c for c in range(n["channels"]) if c not in planted.channels]
    centred = model.config.model_type in ("gpt2", "gpt_neox")
    for part in written:
        part[..., planted.channels] = 0
        if centred:  # LayerNorm's mean over fewer channels is the same where it is 0
            part[..., alive] -= part[..., alive].mean(-1, keepdim=True)
    if centred:  # behind a LayerNorm a channel of 0 is its bias
        for norm in [norm for layer in parts.layers for norm in (layer[0], layer[3])] + [parts.norm]:
            norm.bias[planted.channels] = 0
    return model


def stays(dead: list[int], count: int) -> list[int]:
    """What is not dead."""
    return [i for i in range(count) if i not in dead]


@pytest.fixture(scope="module")
def planted_teacher(pool: WorkerPool, fixtures: Fixtures, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case to (model, teacher's run directory); made once each."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def planted_teacher(name: str, planted: Planted) -> tuple[PreTrainedModel, Path]:
        if name not in made:
            model = plant(hf_models.build(name), planted)
            made[name] = model, pruning.imported(pool, fixtures, model, tmp_path_factory.mktemp(name))
        return made[name]

    return planted_teacher


def assert_what_stays(plan: dict[str, Any], planted: Planted, n: dict[str, int]) -> None:
    """Of plan.json: everything that is not dead."""
    stay = plan["stays"]
    assert stay["layers"] == [0, 1, 2, 3]
    assert stay["channels"] == stays(planted.channels, n["channels"])
    for i in range(4):
        assert stay["groups"][i] == stays(planted.groups.get(i, []), n["groups"])
        if planted.heads:
            assert stay["heads"][i] == stays(planted.heads[i], n["heads"])
        assert stay["neurons"][i] == stays(planted.neurons.get(i, []), n["neurons"])


def assert_the_same_logits(folder: Path, model: PreTrainedModel) -> None:
    """Of a Hugging Face folder and of a model in memory, to 1e-5."""
    pruned = AutoModelForCausalLM.from_pretrained(folder).double()
    tokens = torch.randint(hf_models.VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = pruned(tokens).logits, copy.deepcopy(model).double()(tokens).logits
    assert (found - expected).abs().max() <= 1e-5
    assert expected.std() > 0.1, "logits of nothing would agree as well"


@pytest.mark.parametrize("kind", ["gradient", "activation"])
@pytest.mark.parametrize("layout", ["one", "tp2_pp2_sp"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_dead_goes_and_no_logit_changes(
    pool: WorkerPool, fixtures: Fixtures, planted_teacher: Any, tmp_path: Path, name: str, layout: str, kind: str
) -> None:
    planted = CASES[name]
    world, cut = pruning.LAYOUTS[layout]
    if planted.numbers["heads"] % cut.get("tensor", 1):
        cut = {"pipeline": 4}  # as many ranks
    model, teacher = planted_teacher(name, planted)
    raw = pruning.prune_config(fixtures, teacher, tmp_path / "run", {**planted.numbers, "importance": kind}, cut)
    run_dir = runs.train(pool, "prune", raw, world)
    assert_what_stays(json.loads((run_dir / "plan.json").read_text()), planted, masked.sizes(model))
    pruning.convert(pool, "export", "--checkpoint", str(run_dir), "--out", str(tmp_path / "small"))
    assert_the_same_logits(tmp_path / "small", model)


def test_a_dead_layer_goes_by_importance(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    model = hf_models.build("smollm")
    with torch.no_grad():
        for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            linear.weight.zero_()
    teacher = pruning.imported(pool, fixtures, model, tmp_path)
    for kind in ("gradient", "activation"):
        prune = {"layers": 3, "layers_by": "importance", "importance": kind}
        run_dir = runs.train(pool, "prune", pruning.prune_config(fixtures, teacher, tmp_path / kind, prune, {}))
        assert json.loads((run_dir / "plan.json").read_text())["stays"]["layers"] == [0, 2, 3]
    pruning.convert(pool, "export", "--checkpoint", str(run_dir), "--out", str(tmp_path / "small"))
    assert_the_same_logits(tmp_path / "small", model)


# Queries go from within groups; every bias and norm; heads of a width that hidden / heads is not.
SHAPES = {
    "llama": {"layers": 2, "heads": 4, "kv_heads": 2, "hidden": 40, "ffn": 56},
    "qwen3": {"layers": 2, "heads": 4, "kv_heads": 2, "hidden": 42, "ffn": 56},
    "mistral": {"layers": 2, "heads": 3, "kv_heads": 1, "hidden": 40, "ffn": 56},
    "qwen2": {"layers": 2, "heads": 4, "kv_heads": 2, "hidden": 32, "ffn": 56},
    "gpt2": {"layers": 2, "heads": 4, "hidden": 32, "ffn": 80},
    "gpt_neox": {"layers": 2, "heads": 2, "hidden": 24, "ffn": 80},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_pruned_checkpoint_goes_anywhere(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, name: str) -> None:
    """Cut in one layout, it has the same loss in all others and the logits of transformers, and trains on."""
    teacher = pruning.imported(pool, fixtures, hf_models.build(name), tmp_path)
    world, cut = pruning.LAYOUTS["pp2" if SHAPES[name]["heads"] % 2 else "tp2_pp2_sp"]
    run_dir = runs.train(
        pool, "prune", pruning.prune_config(fixtures, teacher, tmp_path / "pruned", SHAPES[name], cut), world
    )
    pruning.convert(pool, "export", "--checkpoint", str(run_dir), "--out", str(tmp_path / "small"), world=2)
    pruning.convert(pool, "import", "--hf", str(tmp_path / "small"), "--out", str(tmp_path / "again"))
    pruning.convert(pool, "export", "--checkpoint", str(tmp_path / "again"), "--out", str(tmp_path / "back"))
    assert_equal_folders(tmp_path / "back", tmp_path / "small")
    for tensor, pipeline in ((1, 1), (1, 2) if SHAPES[name]["heads"] % 2 else (2, 2)):
        words = ["verify", "--hf", str(tmp_path / "small"), "--checkpoint", str(run_dir), "--tolerance", "1e-5"]
        words += ["--tensor", str(tensor), "--pipeline", str(pipeline)]
        pruning.convert(pool, *words, world=tensor * pipeline)
    losses = []
    for layout in ("one", "pp2") if SHAPES[name]["heads"] % 2 else ("one", "tp2_sp", "pp2"):
        world, cut = pruning.LAYOUTS[layout]
        changes: dict[str, Any] = {"student__model": None, "student__checkpoint": str(run_dir), "student__layout": cut}
        raw = runs.distill_config(fixtures, tmp_path / layout, teacher, **changes)
        losses.append(runs.metrics(runs.train(pool, "distill", raw, world)))
    for found in losses[1:]:
        for mine, theirs in zip(found, losses[0], strict=True):
            runs.assert_close(mine, theirs, 2e-5, name)


def test_what_transformers_would_not_load_is_not_exported(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    """A llama whose heads do not divide hidden, which `prune` does not make, but numbers can."""
    model = {**runs.STUDENT, "hidden": 34, "head_dim": 8}
    raw = runs.adapt_config(fixtures, tmp_path / "run", student__model=model, train__steps=1)
    words = ["export", "--checkpoint", str(runs.train(pool, "adapt", raw)), "--out", str(tmp_path / "out")]
    (rank,) = pool.run(convert_hf.main, words, world=1, initialise=False, capture=True)
    assert rank.value == 2
    (line,) = rank.stderr.splitlines()
    assert "llama of hidden 34 and heads 4: transformers loads no llama whose heads do not divide hidden" in line
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_says_where_it_came_from(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    numbers = {"hidden": 30, "heads": 3, "ffn": 48, "layers": 2}
    run_dir = runs.train(pool, "prune", pruning.prune_config(fixtures, teacher, tmp_path / "pruned", numbers, {}))
    changes = {"student__model": None, "student__checkpoint": str(run_dir), "train__steps": 2}
    trained = runs.train(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "trained", **changes))
    of_teacher = metadata.read(run_directory.locate(str(teacher)))
    for folder, step, stage in ((run_dir, 0, "prune"), (trained, 2, "adapt")):
        found = metadata.read(run_directory.locate(str(folder)))
        assert (found.step, found.stage) == (step, stage)
        origin = found.pruned_from
        assert origin is not None and origin.model == of_teacher.model
        assert (origin.step, origin.tokens) == (of_teacher.step, of_teacher.tokens)
        assert origin.non_embedding == size.non_embedding_parameters(of_teacher.model)
    assert of_teacher.pruned_from is None


def test_pruned_weights_begin_below_random_ones(
    pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path
) -> None:
    numbers = {"hidden": 42, "ffn": 64}
    run_dir = runs.train(pool, "prune", pruning.prune_config(fixtures, teacher, tmp_path / "pruned", numbers, {}))
    shape = json.loads((run_dir / "plan.json").read_text())["after"]
    found = {}
    for name, student in (("pruned", {"checkpoint": str(run_dir)}), ("random", {"model": shape})):
        raw = runs.adapt_config(fixtures, tmp_path / name / "eval", student=student, train__eval_batches=None)
        evaluated = runs.train(pool, "evaluate", raw)
        found[name] = json.loads((evaluated / "evaluation.json").read_text())["valid_loss"]
    assert found["pruned"] < found["random"] - 0.5, found


def test_a_start_goes_on_from_the_scores(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path) -> None:
    """Sums of an earlier start count; a run of other settings is refused; a finished one is left alone."""
    numbers = {"hidden": 42, "ffn": 64, "batches": 4}
    whole = pruning.prune_config(fixtures, teacher, tmp_path / "whole", numbers, {})
    expected = json.loads((runs.train(pool, "prune", whole) / "scores.json").read_text())
    part = pruning.prune_config(fixtures, teacher, tmp_path / "part", {**numbers, "batches": 2}, {})
    run_dir = runs.train(pool, "prune", part)
    # As a run that was stopped after two of four batches leaves it.
    scores = json.loads((run_dir / "scores.json").read_text())
    scores["facts"]["prune.batches"] = 4
    begun = tmp_path / "begun"
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "scores.json").write_text(json.dumps(scores))
    raw = pruning.prune_config(fixtures, teacher, begun, numbers, {})
    found = json.loads((runs.train(pool, "prune", raw, 1) / "scores.json").read_text())
    assert found["facts"] == expected["facts"] and found["batches"] == 4
    for name, sums in expected["sums"].items():
        assert torch.allclose(torch.tensor(found["sums"][name]), torch.tensor(sums), rtol=1e-6, atol=0)
    before = runs.files_of(begun)
    (rank,) = runs.run_stage(pool, "prune", raw)
    assert rank.value == 0 and "nothing to do" in rank.stdout
    raw["prune"]["batches"] = 3
    (rank,) = runs.run_stage(pool, "prune", raw)
    assert rank.value == 2
    assert "scores.json: was computed with prune.batches 4, not 3; choose another run_dir" in rank.stderr
    assert runs.files_of(begun) == before
