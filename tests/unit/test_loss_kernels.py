"""The loss's Triton kernels: in the interpreter against the float64 reference, their formulas, their compiled code."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import loss_traffic
from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses import (
    DistillationObjective,
    TeacherHidden,
    backend,
    distillation_loss,
    language_model_loss,
)
from megatron_capgap.losses.divergences import DIVERGENCES, Divergence
from tests.support.loss_cases import Case, Tensors
from tests.support.processes import ROOT, environment
from tests.support.reference_loss import reference_loss

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import triton
import triton.language as tl

from megatron_capgap.losses.kernels import chunk, formulas, in_interpreter, passes

RELEASES = [tuple(int(part) for part in version.split(".")[:2]) for version in (triton.__version__, np.__version__)]
if RELEASES[0] < (3, 9) and RELEASES[1] >= (2, 4):
    pytest.skip("the interpreter of triton < 3.9 fails with NumPy >= 2.4", allow_module_level=True)
interpreted = pytest.mark.skipif(not in_interpreter(), reason="the kernels are compiled: see tests/gpu/test_losses.py")
every_row = pytest.mark.parametrize("name", DIVERGENCES)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a row, the last of them cut."""
    for name, size in {"ROW_BLOCK": 32, "GRADIENT_BLOCK": 16, "TOKEN_BLOCK": 2}.items():
        monkeypatch.setattr(chunk, name, size)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def covering(divergence: str, temperature: float, teacher: str) -> Any:
    """A parameter, of which a part runs by default."""
    chosen = (temperature == 1) == (list(DIVERGENCES).index(divergence) % 2 == 0) and teacher == "hidden"
    chosen |= (divergence, temperature, teacher) in (("jsd", 2.5, "ghost"), ("reverse_kl", 1.0, "logits"))
    return pytest.param(divergence, temperature, teacher, marks=() if chosen else pytest.mark.matrix)


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("divergence", "temperature", "teacher"),
    [covering(d, t, h) for d in DIVERGENCES for t in (1.0, 2.5) for h in ("hidden", "logits", "ghost", "renormalise")],
)
def test_loss_and_gradients(divergence: str, temperature: float, teacher: str) -> None:
    case = Case(divergence, temperature, teacher, tokens=5, chunk_tokens=3, vocab=53)
    whole, objective = Tensors(case), case.objective()
    hidden, head = whole.hidden.requires_grad_(), whole.head.requires_grad_()
    out = distillation_loss(
        hidden, head, whole.teacher, whole.labels, whole.mask,
        objective=objective, vocab_size=case.vocab, group=None, chunk_tokens=case.chunk_tokens, kernels="triton",
    )  # fmt: skip
    out.loss_sum.backward()
    expected = reference_loss(hidden, head, whole.teacher, whole.labels, whole.mask, objective, case.vocab)
    assert error(out.loss_sum, expected.loss) <= 1e-10
    assert error(out.report["cross_entropy"], expected.cross_entropy) <= 1e-10
    assert error(out.report["divergence"], expected.divergence) <= 1e-10
    assert error(hidden.grad, expected.hidden_gradient) <= 1e-10
    assert error(head.grad, expected.head_gradient) <= 1e-10


@interpreted
@pytest.mark.usefixtures("small_blocks")
def test_cross_entropy_alone_with_and_without_gradients() -> None:
    case = Case(tokens=5, weights=(0.0, 1.0))
    whole = Tensors(case)
    hidden = whole.hidden.requires_grad_()
    options: dict[str, Any] = {"vocab_size": case.vocab, "group": None, "kernels": "triton"}
    out = language_model_loss(hidden, whole.head, whole.labels, whole.mask, **options)
    out.loss_sum.backward()
    expected = reference_loss(hidden, whole.head, None, whole.labels, whole.mask, case.objective(), case.vocab)
    assert error(out.loss_sum, expected.loss) <= 1e-10 and error(hidden.grad, expected.hidden_gradient) <= 1e-10
    with torch.no_grad():
        again = language_model_loss(hidden, whole.head, whole.labels, whole.mask, **options)
    assert torch.equal(again.loss_sum, out.loss_sum) and set(again.report) == {"cross_entropy"}


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_a_bf16_gradient_is_rounded_once(divergence: str) -> None:
    """The logits' gradient, written in bf16 over bf16 logits, is that of float64 copies of them."""
    case = Case(divergence, tokens=4)
    make = torch.Generator().manual_seed(3)
    logits = {
        dtype: [chunk.rows_of_logits(4, 53, dtype, torch.empty(0)) for _ in range(2)]
        for dtype in (torch.bfloat16, torch.float64)
    }
    for low, exact in zip(*logits.values(), strict=True):
        exact.copy_(low.copy_(torch.randn(4, 53, generator=make)))
    found = []
    for dtype, (student, teacher) in logits.items():
        weight = torch.ones(4, dtype=torch.promote_types(dtype, torch.float32))
        shard = chunk.VocabShard(None, 1, 0, 0, 53)
        one = chunk.TritonPasses(student, teacher, torch.arange(4), case.objective(), shard)
        found.append(one.resolve(one.statistics()[None]).double())
        one.gradient_(weight)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    low, exact = (students[0] for students in logits.values())
    # The interpreter cuts fp32 down to bf16, which a GPU rounds: an ulp instead of half of one.
    assert ((low.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-7).all()


@every_row
@interpreted
def test_equal_models_give_exactly_zero(name: str) -> None:
    case = Case(name, 2.5, tokens=3, dtype=torch.bfloat16, weights=(1.0, 0.0))
    whole = Tensors(case)
    hidden, head = whole.hidden.requires_grad_(), whole.head.requires_grad_()
    out = distillation_loss(
        hidden, head, TeacherHidden(hidden.detach(), head.detach()), whole.labels, whole.mask,
        objective=case.objective(), vocab_size=case.vocab, group=None, kernels="triton",
    )  # fmt: skip
    out.loss_sum.backward()
    assert not hidden.grad.any() and not head.grad.any()
    assert name == "soft_cross_entropy" or out.report["divergence"] == 0


# ------------------------------------------------------------------------------------------------------------ formulas


@triton.jit
def evaluate(p, q, log_p, log_q, value, term, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    one, other = FORMULA(tl.load(p + at), tl.load(q + at), tl.load(log_p + at), tl.load(log_q + at))
    tl.store(value + at, one)
    tl.store(term + at, other)


@every_row
@interpreted
@given(seed=st.integers(0, 2**31), alpha=st.floats(0.05, 0.95), double=st.booleans())
def test_a_traced_formula_is_its_torch_function(name: str, seed: int, alpha: float, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    logits = 4 * torch.randn(2, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_p, log_q = logits.log_softmax(1).to(dtype)
    objective = ObjectiveConfig(divergence=name, skew_alpha=alpha, jsd_beta=1 - alpha)
    arguments = (log_p.exp(), log_q.exp(), log_p, log_q)
    value, term = torch.empty_like(log_p), torch.empty_like(log_p)
    evaluate[(1,)](*arguments, value, term, FORMULA=formulas.triton_formula(objective, dtype), BLOCK=64)
    expected = DIVERGENCES[name].formula(*arguments, objective)
    tolerance = 1e-13 if double else 1e-6
    for found, right in zip((value, term), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("name", [name for name, row in DIVERGENCES.items() if row.shard_weight])
def test_with_a_chain_rule_the_means_give_the_sums(name: str) -> None:
    """What lets one pass suffice. The gradient term differs by a multiple of q, which changes no gradient."""
    make = torch.Generator().manual_seed(2)
    log_q, log_p = torch.randn(2, 5, 40, generator=make, dtype=torch.float64).log_softmax(2)
    row, objective = DIVERGENCES[name], ObjectiveConfig(divergence=name)
    value, term = row.formula(log_p.exp(), log_q.exp(), log_p, log_q, objective)
    weight = (log_p if row.shard_weight == "teacher" else log_q).exp()
    one = torch.ones(5, dtype=torch.float64)
    means = [(weight * x).sum(1) for x in (log_p, log_q)]
    of_means = row.formula(one, one, *means, objective)
    torch.testing.assert_close(of_means[0], value.sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(of_means[1], term.sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("formula", "named"),
    [
        (lambda p, q, log_p, log_q, _: (torch.digamma(p), q), "torch.digamma"),
        (lambda p, q, log_p, log_q, _: (p.cumsum(0), q), "Tensor.cumsum"),
    ],
)
def test_an_operation_without_counterpart_is_named(formula: Any, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIVERGENCES, "new", Divergence(formula))
    with pytest.raises(formulas.UnknownOperation, match=re.escape(f"{named} has no Triton counterpart")):
        formulas.triton_source("new", ObjectiveConfig(), torch.float32)


def test_constants_keep_all_digits() -> None:
    source = formulas.triton_source("jsd", ObjectiveConfig(divergence="jsd", jsd_beta=1 / 3), torch.float64)
    assert f"tl.full((), {1 / 3!r}, tl.float64)" in source and "2.2250738585072014e-308" in source


# -------------------------------------------------------------------------------------------------- choice and refusal


def test_on_a_cpu_the_default_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = torch.zeros(1)
    assert not backend.uses_triton("auto", on_cpu) and not backend.uses_triton("eager", on_cpu)
    with pytest.raises(UserError, match="kernels: 'cuda' is unknown; valid values: auto, eager, triton"):
        backend.uses_triton("cuda", on_cpu)
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    with pytest.raises(UserError, match="kernels: triton needs tensors on a CUDA GPU"):
        backend.uses_triton("triton", on_cpu)
    monkeypatch.setattr(backend, "_installed", lambda: False)
    with pytest.raises(UserError, match="kernels: triton is not installed"):
        backend.uses_triton("triton", on_cpu)


# -------------------------------------------------------------------------------------------------------- compiled code


def compiled(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    variables = {**environment(), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "tests.support.compiled_kernels", *arguments]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow("starts a process that imports PyTorch and compiles eleven kernels")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.matrix)], ids=["part", "all"])
def test_kernels_compile_without_spills_and_with_wide_loads(every: bool, tmp_path: Path) -> None:
    """For A100, H100 and B200, without any of them: what a thread loads of logits comes 16 bytes at a time."""
    rows = compiled(tmp_path, "90", "80", "100", *(["--all"] if every else []))
    assert {row["capability"] for row in rows} == {80, 90, 100}
    assert len({row["kernel"] for row in rows}) == (50 if every else 7)
    for row in rows:
        assert row["stack"] == 0, row
        if not row["kernel"].startswith("resolve"):
            # Of both models, two loads a thread: 16 entries. Single numbers are per token: a label's logit, a sum.
            assert row["accesses"].get("ld.v4.b32") == 4, row
            assert row["accesses"].get("ld.v1.b16", 0) <= 1 and row["accesses"].get("ld.v1.b32", 0) <= 5, row
        if row["kernel"].startswith("gradient"):
            assert row["accesses"]["st.v4.b32"] == 2 and "st.v1.b16" not in row["accesses"], row
    assert passes.WEIGHTS.keys() == {row.shard_weight for row in DIVERGENCES.values()}


@pytest.mark.parametrize(("divergence", "temperature"), [("forward_kl", 1.0), ("reverse_kl", 2.0), ("jsd", 2.0)])
def test_traffic_at_full_size(divergence: str, temperature: float) -> None:
    """On meta tensors: two or three passes over the logits; the head's gradient by its products alone."""
    objective = DistillationObjective(divergence, temperature)
    sizes = (loss_traffic.Size(), loss_traffic.Size(tensor=8))
    for size, kernels, chunk_tokens, found in loss_traffic.rows(objective, sizes):
        chunks = -(-size.tokens // chunk_tokens)
        products = 2.0 * size.tokens * size.width * (3 * size.student + size.teacher)
        assert found.flops == products and loss_traffic.bytes_an_entry(found) >= 10
        if kernels == "triton":
            assert loss_traffic.meets_targets(found, divergence), found
            assert found.launched.count("gradient_kernel") == found.launched.count("statistics_kernel") <= chunks
            assert found.collectives <= (0 if size.tensor == 1 else chunks + 2)
