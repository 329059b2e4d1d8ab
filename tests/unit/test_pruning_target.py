"""The student's shape: from numbers, a sparsity or a count of parameters; and every way of asking for none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_capgap.common.errors import ConfigError
from megatron_capgap.config import derived
from megatron_capgap.config.loader import LoadedConfig, load
from megatron_capgap.config.schema import ModelShape
from megatron_capgap.config.validation import checks
from megatron_capgap.models import size
from megatron_capgap.pruning.student_shape import student_target

LLAMA2 = ModelShape(layers=32, hidden=4096, heads=32, ffn=11008, vocab=49216)
GROUPED = ModelShape(layers=8, hidden=96, heads=12, kv_heads=4, ffn=256, vocab=1000)
GPT2 = ModelShape(layers=12, hidden=768, heads=12, ffn=3072, vocab=50257, family="gpt2", max_positions=1024)
WIDE = ModelShape(layers=8, hidden=96, heads=6, head_dim=32, ffn=256, vocab=1000, family="qwen3")


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A configuration of the stage prune with a section and a layout."""
    monkeypatch.chdir(tmp_path)

    def loaded(prune: dict[str, Any], layout: dict[str, Any] | None = None, **more: Any) -> LoadedConfig:
        config = {"run_dir": "runs/pruned", "teacher": {"checkpoint": "runs/large"}, "prune": prune}
        config |= {"student": {"layout": layout or {}}, "data": {"tokenizer": "t.model", "train": ["a"]}, **more}
        Path("prune.yaml").write_text(yaml.safe_dump(config, sort_keys=False, default_flow_style=None))
        return load("prune.yaml", [], "prune")

    return loaded


def student_shape(loaded: LoadedConfig, teacher: ModelShape) -> ModelShape:
    return student_target(loaded, teacher).shape


def numbers(shape: ModelShape) -> tuple[int, ...]:
    return shape.layers, shape.hidden, shape.heads, derived.kv_heads(shape), shape.ffn


def test_the_shape_of_the_paper(loaded: Any) -> None:
    found = student_shape(loaded({"layers": 24, "hidden": 3072, "heads": 24, "ffn": 8192}), LLAMA2)
    assert numbers(found) == (24, 3072, 24, 24, 8192)
    assert (found.head_dim, found.kv_heads, found.vocab) == (None, None, 49216)
    assert (
        size.parameters(found) == 3_020_442_624 and size.non_embedding_parameters(found) == 2_717_908_992 + 49 * 3072
    )  # norms


@pytest.mark.parametrize(
    ("teacher", "prune", "expected", "head_dim"),
    [
        (GROUPED, {"heads": 6}, (8, 96, 6, 2, 256), 8),  # three queries to a group, as before
        (GROUPED, {"heads": 6, "kv_heads": 3, "hidden": 48}, (8, 48, 6, 3, 256), None),
        (GROUPED, {"kv_heads": 2}, (8, 96, 6, 2, 256), 8),
        (GROUPED, {"heads": 8, "kv_heads": 4}, (8, 96, 8, 4, 256), 8),
        (GROUPED, {"layers": 3}, (3, 96, 12, 4, 256), None),
        (WIDE, {"hidden": 40}, (8, 40, 6, 6, 256), 32),
        (GPT2, {"hidden": 512, "heads": 8}, (12, 512, 8, 8, 3072), None),
    ],
)
def test_numbers(
    loaded: Any, teacher: ModelShape, prune: dict[str, int], expected: tuple[int, ...], head_dim: int | None
) -> None:
    found = student_shape(loaded(prune), teacher)
    assert numbers(found) == expected and found.head_dim == head_dim
    assert derived.head_dim(found) == derived.head_dim(teacher)


def test_epsilon_grows_as_the_mean_square_of_dead_channels_going(loaded: Any) -> None:
    assert student_shape(loaded({"hidden": 2048}), LLAMA2).norm_epsilon == 2 * LLAMA2.norm_epsilon
    assert student_shape(loaded({"ffn": 8192}), LLAMA2).norm_epsilon == LLAMA2.norm_epsilon


def every_sparsity(test: Any) -> Any:
    """Of every teacher, under every tensor-parallel size."""
    teachers = {"llama": LLAMA2, "grouped": GROUPED, "gpt2": GPT2, "wide": WIDE}
    test = pytest.mark.parametrize("teacher", teachers.values(), ids=teachers)(test)
    test = pytest.mark.parametrize("tensor", [1, 2, 4])(test)
    return pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.58, 0.9])(test)


def layers_of(shape: ModelShape) -> int:
    return shape.layers * size.layer_parameters(shape)


@every_sparsity
def test_a_sparsity_makes_what_the_layout_divides(
    loaded: Any, teacher: ModelShape, tensor: int, sparsity: float
) -> None:
    if derived.kv_heads(teacher) % tensor:
        tensor = 1
    said = loaded({"sparsity": sparsity}, {"tensor": tensor})
    found = student_shape(said, teacher)
    checks.check(said, "prune", tensor, found, teacher)
    assert found.ffn % 8 == 0 and found.layers == teacher.layers
    assert all(mine <= theirs for mine, theirs in zip(numbers(found), numbers(teacher), strict=True))
    if teacher is LLAMA2:
        assert layers_of(found) / layers_of(teacher) == pytest.approx(1 - sparsity, abs=0.05)


@every_sparsity
def test_layers_with_numbers_of_their_own_keep_what_the_sparsity_leaves(
    loaded: Any, teacher: ModelShape, tensor: int, sparsity: float
) -> None:
    """Of all layers together, for hidden alone is rounded by much."""
    if derived.kv_heads(teacher) % tensor:
        tensor = 1
    said = loaded({"sparsity": sparsity, "per_layer": True}, {"tensor": tensor})
    found = student_target(said, teacher)
    checks.check(said, "prune", tensor, found.shape, teacher)
    budget = found.budget
    assert budget is not None and budget.unit == 8 and budget.neurons % 8 == 0
    assert all(width % tensor == 0 for width in budget.storable_kv_heads)
    least = sparsity == 0.9 and teacher in (GROUPED, WIDE)  # a key/value head in each layer is more than a tenth
    if not least:
        layers = found.kept - size.non_embedding_parameters(found.shape) + layers_of(found.shape)
        assert layers / layers_of(teacher) == pytest.approx(1 - sparsity, abs=0.01)


def test_numbers_are_means_where_layers_differ(loaded: Any) -> None:
    found = student_target(loaded({"kv_heads": 3, "ffn": 57, "layers": 6, "per_layer": True}, {"tensor": 2}), GROUPED)
    budget = found.budget
    assert budget is not None
    assert (budget.kv_heads, budget.storable_kv_heads, budget.neurons, budget.unit, budget.max_neurons) == (
        18,
        (2, 4),
        342,
        2,
        256,
    )
    assert numbers(found.shape) == (6, 96, 12, 4, 58)
    naive = replace(GROUPED, layers=6, heads=9, kv_heads=3, ffn=57, head_dim=8)
    assert found.kept == size.non_embedding_parameters(naive)


def test_a_count_of_parameters_where_layers_differ(loaded: Any) -> None:
    for teacher, wanted in ((LLAMA2, 2_700_000_000), (GROUPED, 300_000), (GPT2, 40_000_000)):
        found = student_target(loaded({"parameters": wanted, "per_layer": True}), teacher)
        assert found.kept == pytest.approx(wanted, rel=0.003)


def test_a_count_of_parameters(loaded: Any) -> None:
    for wanted in (500_000_000, 2_700_000_000, 6_000_000_000):
        found = student_shape(loaded({"parameters": wanted}, {"tensor": 2}), LLAMA2)
        assert size.non_embedding_parameters(found) == pytest.approx(wanted, rel=0.03)
        assert found.heads % 2 == 0 and found.hidden % found.heads == 0
    fewer = student_shape(loaded({"parameters": 2_700_000_000, "layers": 24}), LLAMA2)
    assert fewer.layers == 24 and size.non_embedding_parameters(fewer) == pytest.approx(2.7e9, rel=0.03)


@pytest.mark.parametrize(
    ("teacher", "prune", "begins", "holds"),
    [
        (LLAMA2, {"hidden": 8192}, "prune.hidden: 8192 is larger than hidden 4096 of runs/large;", "values: 1 to 4096"),
        (LLAMA2, {"layers": 33}, "prune.layers: 33 is larger than layers 32 of runs/large;", "valid values: 1 to 32"),
        (GROUPED, {"kv_heads": 5}, "prune.kv_heads: 5 is larger than kv_heads 4", "valid values: 1 to 4"),
        (GROUPED, {"heads": 7}, "prune.heads: 7 heads do not fill groups of 3", "values: 6 or 9, or give kv_heads"),
        (GROUPED, {"heads": 6, "kv_heads": 4}, "prune.kv_heads: 4 does not divide heads 6;", "values: 1, 2, 3 or 6"),
        (GROUPED, {"heads": 12, "kv_heads": 3}, "prune.kv_heads: 3 makes groups of 4 queries", "; valid values: 4"),
        (GROUPED, {"hidden": 95}, "prune.hidden: 95 is not divisible by heads 12, and transformers", ": 84 or 96"),
        (GPT2, {"hidden": 512}, "prune.hidden: 512 is not heads 12 times their width 64", "; valid values: 768"),
        (GPT2, {"heads": 8}, "prune.hidden: 768 is not heads 8 times their width 64", "; valid values: 512"),
        (LLAMA2, {"hidden": 4096}, "prune: leaves runs/large unchanged;", "layers, hidden, heads or ffn,"),
        (LLAMA2, {"sparsity": 1e-6}, "prune: leaves runs/large unchanged;", "a larger sparsity"),
        (LLAMA2, {"batches": 3}, "prune: does not give the student's size;", "give layers, hidden, heads and ffn"),
        (LLAMA2, {"sparsity": 0.5, "ffn": 8}, "prune.ffn: 8 given, but prune.sparsity", "give only one of them"),
        (LLAMA2, {"sparsity": 0.5, "parameters": 9}, "prune.parameters: 9 given in addition to", "one of"),
        (LLAMA2, {"parameters": 10**10}, "prune.parameters: 10000000000 is not below the 6476271616", "; use e.g. "),
        (LLAMA2, {"layers": 8, "per_layer": True}, "prune.per_layer: true, but every layer", "remove the key"),
        (GPT2, {"per_layer": True, "hidden": 640, "heads": 10}, "prune.per_layer: true, but", "fewer heads"),
        (GPT2, {"per_layer": True, "hidden": 500, "heads": 6}, "prune.hidden: 500 is no whole number", "values: 384"),
        (GPT2, {"per_layer": True, "hidden": 256, "heads": 6}, "prune.hidden: 256 is no whole number", "values: 384"),
        (GROUPED, {"per_layer": True, "hidden": 94, "kv_heads": 3}, "prune.hidden: 94 is not divisible", ": 84 or 96"),
        (GROUPED, {"per_layer": True}, "prune: does not give the student's size;", "give layers, hidden, heads"),
        (LLAMA2, {"parameters": 9}, "prune.parameters: 9 is not near any shape;", ", a smaller prune.multiple"),
    ],
)  # fmt: skip
def test_what_cannot_be(loaded: Any, teacher: ModelShape, prune: dict[str, Any], begins: str, holds: str) -> None:
    with pytest.raises(ConfigError) as error:
        student_shape(loaded(prune), teacher)
    (problem,) = error.value.problems
    place, _, text = problem.partition(": ")
    assert place.startswith("prune.yaml:") and text.startswith(begins) and holds in text, problem


def test_heads_that_the_layout_does_not_divide(loaded: Any) -> None:
    said = loaded({"sparsity": 0.5, "per_layer": True}, {"tensor": 8})
    with pytest.raises(ConfigError, match=r"layout.tensor: 8 does not divide kv_heads 4 of runs/large; .*: 1, 2 or 4"):
        student_shape(said, GROUPED)


def test_a_layout_of_the_teacher_is_not_read(loaded: Any) -> None:
    said = loaded({"ffn": 8}, teacher={"checkpoint": "runs/large", "layout": {"tensor": 2}})
    with pytest.raises(ConfigError, match=r"teacher.layout: prune runs the teacher in student.layout; remove"):
        student_shape(said, LLAMA2)


@pytest.mark.parametrize(
    ("layout", "world", "expected"),
    [
        (
            {"tensor": 2},
            2,
            "student.layout.tensor: 2 does not divide prune.heads 3 and prune.kv_heads 1; valid values: 1",
        ),
        ({"pipeline": 2}, 2, "student.layout.pipeline: 2 does not divide prune.layers 5; valid values: 1 or 5"),
    ],
)
def test_the_layout_must_divide_the_student(loaded: Any, layout: dict[str, int], world: int, expected: str) -> None:
    said = loaded({"layers": 5, "heads": 3, "hidden": 48}, layout)
    with pytest.raises(ConfigError) as error:
        checks.check(said, "prune", world, student_shape(said, GROUPED), GROUPED)
    assert [problem.partition(": ")[2] for problem in error.value.problems] == [expected]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"prune": None}, "prune: required by prune; expected a section: Size of the student"),
        ({"teacher": None}, "teacher: required by prune; expected a section: The model"),
        ({"student": {"checkpoint": "a"}}, "student.checkpoint: prune creates the student from teacher.checkpoint;"),
        ({"prune": {"sparsity": 1.0}}, "prune.sparsity: 1 given; expected a number > 0 and < 1 or null"),
        ({"prune": {"per_layer": "each"}}, 'prune.per_layer: "each" given; expected true or false'),
        ({"prune": {"importance": "grad"}}, 'prune.importance: "grad" given; did you mean gradient?'),
    ],
)
def test_what_the_loader_says(loaded: Any, config: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(**{"prune": {"ffn": 8}, **config})
    assert any(expected in problem for problem in error.value.problems), error.value.problems


def test_other_stages_refuse_the_section(loaded: Any) -> None:
    loaded({"ffn": 8})
    Path("adapt.yaml").write_text(Path("prune.yaml").read_text())
    with pytest.raises(ConfigError) as error:
        load("adapt.yaml", ["--student.checkpoint=a", "--train.steps=1", "--teacher=null"], "adapt")
    assert [p.partition(": ")[2] for p in error.value.problems] == ["prune: adapt does not prune; remove the section"]
