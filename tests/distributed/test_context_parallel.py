"""Context parallelism: attention against a dense reference, and whole runs against one rank, for every kind of run.

`test_layouts` and `test_teacher_layouts` combine it with other layouts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.runs import Fixtures

TOLERANCE = 1e-5
LAYOUT = {"context": 2, "tensor": 2, "sequence": True}
MODEL = {"hidden": 32, "heads": 4, "layers": 4, "ffn": 48, "vocab": runs.VOCAB, "max_positions": 40}
MATCHED = [{"student_layer": 1, "teacher_layer": 2}, {"student_layer": 4, "teacher_layer": 3, "kind": "cosine"}]
LENGTH, BATCH, HEADS, WIDTH = 16, 2, 4, 6


def attention_error(kv_heads: int, packed: bool) -> float:
    """Runs in a worker of a context group over all ranks: the largest difference of the output and of the gradients
    from softmax(q k^T) v over whole rows, in float64."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_capgap.data.batch import MicroBatch, context_columns
    from megatron_capgap.models.specs import ScaledDotProductAttention

    rank, ranks = dist.get_rank(), dist.get_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        context_parallel_size=ranks,
        attention_dropout=0.0,
    )
    groups = ProcessGroupCollection()
    groups.cp = dist.group.WORLD
    attention = ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    generator = torch.Generator().manual_seed(3)
    sizes = [(LENGTH, BATCH, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    whole = [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]
    weight = torch.randn(LENGTH, BATCH, HEADS * WIDTH, generator=generator, dtype=torch.float64)

    segments = torch.tensor([[0] * 5 + [1] * 8 + [-1] * 3, [0] * 16]) if packed else torch.zeros(BATCH, LENGTH)
    rows = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    batch = MicroBatch(rows, rows, rows.float(), rows, [0, 1], segments if packed else None)
    places = torch.arange(LENGTH)
    seen = (places[:, None] >= places) & (segments[:, :, None] == segments[:, None, :])
    query, key, value = (tensor.repeat_interleave(HEADS // tensor.shape[2], dim=2) for tensor in whole)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / WIDTH**0.5
    shares = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    expected = torch.einsum("bhqk,kbhd->qbhd", shares, value).flatten(2)
    gradients = torch.autograd.grad((expected * weight).sum(), whole)

    columns = context_columns(LENGTH, rank, ranks, torch.device("cpu"))
    mine = [tensor.detach()[columns].requires_grad_() for tensor in whole]
    found = attention(*mine, batch.context_shard(rank, ranks).attention_mask)
    of_mine = torch.autograd.grad((found * weight[columns]).sum(), mine)
    pairs = [(found, expected[columns]), *((a, b[columns]) for a, b in zip(of_mine, gradients, strict=True))]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
def test_attention_is_that_of_whole_rows(pool: WorkerPool, ranks: int, packed: bool) -> None:
    for kv_heads in (HEADS, 2):
        assert max(pool.run(attention_error, kv_heads, packed, world=ranks)) < 1e-10


def compare(pool: WorkerPool, stage: str, raw: dict[str, Any], layout: dict[str, Any] = LAYOUT, world: int = 4) -> None:
    """Asserts that a run in a layout has the losses and gradient norms of one rank."""
    one = runs.metrics(runs.train(pool, stage, runs.changed(raw, run_dir=raw["run_dir"] + "_one")))
    found = runs.metrics(runs.train(pool, stage, runs.changed(raw, student__layout=layout), world))
    for mine, theirs in zip(found, one, strict=True):
        runs.assert_close(mine, theirs, TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_every_family(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, family: str) -> None:
    changes = {"student__model": {"family": family, **MODEL}, "train__steps": 2, "data__valid": None}
    compare(pool, "adapt", runs.adapt_config(fixtures, tmp_path / "run", **changes))


@pytest.mark.parametrize("layout", [{"context": 2}, LAYOUT], ids=["cp2", "cp2_tp2_sp"])
def test_packed_conversations_with_noise(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, layout: dict[str, Any]
) -> None:
    student = runs.make_student(pool, fixtures)
    raw = runs.finetune_config(fixtures, tmp_path / "run", student, finetune__neftune_alpha=5.0)
    compare(pool, "finetune", raw, layout, layout["context"] * layout.get("tensor", 1))


def test_matched_layers(pool: WorkerPool, fixtures: Fixtures, teacher: Path, tmp_path: Path) -> None:
    """A teacher in one layout, a student in another; states of layers are transferred as those after the last."""
    changes = {"objective__matching": MATCHED, "teacher__layout": {"context": 2, "pipeline": 2}}
    raw = runs.distill_config(fixtures, tmp_path / "run", teacher, **changes, data__valid=None)
    one = runs.changed(raw, run_dir=raw["run_dir"] + "_one", teacher__layout={})
    expected = runs.metrics(runs.train(pool, "distill", one))
    found = runs.metrics(runs.train(pool, "distill", runs.changed(raw, student__layout=LAYOUT), 4))
    for mine, theirs in zip(found, expected, strict=True):
        runs.assert_close(mine, theirs, TOLERANCE)


@pytest.mark.parametrize("recompute", [{"what": "full"}, {"what": "mlp"}], ids=["full", "mlp"])
def test_recomputed_layers_draw_the_same_dropout(
    pool: WorkerPool, fixtures: Fixtures, tmp_path: Path, recompute: dict[str, Any]
) -> None:
    changes = {"train__dropout": 0.1, "train__steps": 2, "data__valid": None, "student__layout": {"context": 2}}
    raw = runs.adapt_config(fixtures, tmp_path / "kept", **changes)
    again = runs.changed(raw, run_dir=str(tmp_path / "again"), student__recompute=recompute)
    kept, found = (runs.metrics(runs.train(pool, "adapt", config, 2)) for config in (raw, again))
    assert found == kept


def test_a_run_is_resumed_in_another_context_size(pool: WorkerPool, fixtures: Fixtures, tmp_path: Path) -> None:
    changes = {"train__steps": 4, "checkpoint__every": 2, "checkpoint__keep": 2, "student__layout": {"context": 2}}
    raw = runs.adapt_config(fixtures, tmp_path / "run", **changes)
    unbroken = runs.train(pool, "adapt", raw, 2)
    for name, world, layout in (("one", 1, {}), ("cp4", 4, {"context": 4})):
        copy = runs.rewind(unbroken, tmp_path / name, step=2)
        runs.train(pool, "adapt", runs.changed(raw, run_dir=str(copy), student__layout=layout), world)
        for mine, theirs in zip(runs.metrics(copy), runs.metrics(unbroken), strict=True):
            runs.assert_close(mine, theirs, TOLERANCE, name)
