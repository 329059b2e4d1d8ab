"""The CPU device: what it changes in torch, and initial weights that no layout and no padding shows in."""

import importlib.util
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import Layout, ModelShape, Precision
from megatron_capgap.devices import choose, cuda
from megatron_capgap.runtime import releases
from tests.support import runs
from tests.support.pool import WorkerPool
from tests.support.processes import environment

# Patches of torch stay in a process, so that all of this runs in workers.


@pytest.mark.parametrize("release", ["0.15.3", "0.20.0", "0.20.0rc1", "1.0"])
def test_another_megatron_is_one_line(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(releases, "megatron", lambda: release)
    with pytest.raises(UserError) as caught:
        choose("cpu", 0)
    expected = f"megatron-core {release} is outside the tested range; pip install 'megatron-core>=0.16,<0.20'"
    assert str(caught.value) == expected


@pytest.mark.parametrize("release", ["0.16.0", "0.16.1", "0.16.1.post1", "0.17.1", "0.19.2", "0.16.0rc0"])
def test_the_tested_range_passes(release: str) -> None:
    assert releases.complaint(release) is None


def test_no_megatron_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "megatron", lambda: None)
    with pytest.raises(UserError, match=r"^megatron-core is not installed; pip install 'megatron-core>=0\.16,<0\.20'$"):
        choose("cpu", 0)


@pytest.mark.parametrize(
    ("gpus", "rank", "message"),
    [
        (0, 0, "--device: cuda, but torch finds no usable GPU; use cpu"),
        (2, 2, "--device: cuda, but rank 2 of this node sees 2 GPUs; use cpu, or at most 2 ranks per node"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, gpus: int, rank: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError) as caught:
        choose("cuda", rank)
    assert str(caught.value) == message
    with pytest.raises(UserError, match=r"^run\.yaml:3: device: cuda, but "):
        choose("cuda", rank, place="run.yaml:3: device")


def test_no_transformer_engine_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with pytest.raises(UserError, match=r"^precision\.engine: .* not installed; run pip install -e '\.\[fp8\]',"):
        cuda.prepare(0, [Precision(engine="transformer_engine")])


APEX = {"Apex fused weight gradient": "fused_weight_gradient_mlp_cuda", "Apex fused Adam": "apex"}


@pytest.mark.parametrize("present", [(), ("apex",), tuple(APEX.values())])
def test_the_start_up_table_says_what_of_apex_is_used(monkeypatch: pytest.MonkeyPatch, present: tuple[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in present else None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    rows = {row.name: row for row in cuda.prepare(0, [Precision()]).components}
    for name, package in APEX.items():
        assert rows[name].active == (package in present)
        absent = f"{package} is not installed; torch's own kernels are used"
        assert (rows[name].why == absent) == (package not in present)


def apex_on_a_cpu() -> list[tuple[bool, str]]:
    """The row of the start-up table on a machine where everything can be imported."""
    from megatron_capgap.devices import cpu

    find, importlib.util.find_spec = importlib.util.find_spec, lambda name: name
    try:
        return [(row.active, row.why) for row in cpu.prepare().components if row.name.startswith("Apex")]
    finally:
        importlib.util.find_spec = find


def test_a_cpu_has_no_use_for_apex(pool: WorkerPool) -> None:
    assert pool.run(apex_on_a_cpu, world=1) == [[(False, "need an NVIDIA GPU")]]


def prepare_twice() -> tuple[bool, str]:
    """Whether a second call leaves every name in torch alone."""
    from megatron_capgap.devices import cpu

    places = (torch, torch.cuda, torch.cuda.random, torch.Tensor, torch.nn.Module)
    first = cpu.prepare()
    before = [dict(vars(place)) for place in places]
    second = cpu.prepare()
    after = [dict(vars(place)) for place in places]
    same = all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(before, after, strict=True))
    return same and first.components == second.components, second.name


def test_preparing_twice_is_preparing_once(pool: WorkerPool) -> None:
    assert pool.run(prepare_twice, world=1) == [(True, "cpu")]


def ask_for_cuda() -> dict[str, str]:
    """The device of tensors that were asked for on the GPU, by how."""
    from megatron_capgap.devices import cpu

    cpu.prepare()
    like = torch.zeros(2)
    made: dict[str, Tensor] = {
        "tensor": torch.tensor([1.0], device="cuda"),
        "zeros": torch.zeros(2, device="cuda:0"),
        "ones": torch.ones(2, device=torch.device("cuda", 0)),
        "empty": torch.empty(2, device=torch.cuda.current_device()),
        "full": torch.full((2,), 3.0, device="cuda"),
        "arange": torch.arange(3, device="cuda"),
        "randn": torch.randn(2, device="cuda"),
        "zeros_like": torch.zeros_like(like, device="cuda"),
        "cuda": like.cuda(),
        "module": next(torch.nn.Linear(2, 2).cuda().parameters()),
        "without a device": torch.zeros(2),
        "meta": torch.zeros(2, device="meta"),
    }
    return {name: str(tensor.device) for name, tensor in made.items()}


def test_what_is_asked_for_on_the_gpu_is_made_on_the_cpu(pool: WorkerPool) -> None:
    (devices,) = pool.run(ask_for_cuda, world=1)
    assert devices.pop("meta") == "meta"
    assert set(devices.values()) == {"cpu"}


def ask_for_types() -> dict[str, Any]:
    from megatron_capgap.devices import cpu

    cpu.prepare()
    numbers = torch.tensor([1.5, -2.5])
    as_integers, as_double = numbers.type(torch.int64), numbers.type("torch.DoubleTensor")
    return {
        "float": numbers.type(),
        "bfloat16": numbers.bfloat16().type(),
        "int": numbers.int().type(),
        "parameter": torch.nn.Parameter(numbers).type(),
        "again": numbers.type(),
        "as_integers": (as_integers.dtype, as_integers.tolist()),
        "as_double": (as_double.dtype, as_double.tolist()),
        "by keyword": numbers.type(dtype=torch.float16).dtype,
    }


def test_types_have_the_names_that_megatron_looks_for(pool: WorkerPool) -> None:
    (types,) = pool.run(ask_for_types, world=1)
    assert types == {
        "float": "torch.cuda.FloatTensor",
        "bfloat16": "torch.cuda.BFloat16Tensor",
        "int": "torch.cuda.IntTensor",
        "parameter": "torch.cuda.FloatTensor",
        "again": "torch.cuda.FloatTensor",
        "as_integers": (torch.int64, [1, -2]),
        "as_double": (torch.float64, [1.5, -2.5]),
        "by keyword": torch.float16,
    }


def random_numbers() -> tuple[list[float], list[float], list[float]]:
    """Draws before and after Megatron's random state was saved and restored, and from a named stream."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_capgap.devices import cpu
    from megatron_capgap.distributed import parallel_context

    cpu.prepare()
    parallel_context.build(Layout(tensor=2), seed=1)
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3).tolist()
    torch.cuda.set_rng_state(state)
    with get_cuda_rng_tracker().fork():
        shared_over_nothing = torch.rand(3).tolist()
    return first, torch.rand(3).tolist(), shared_over_nothing


def test_the_random_state_of_the_gpu_is_the_cpus(pool: WorkerPool) -> None:
    ours, theirs = pool.run(random_numbers, world=2)
    assert ours[0] == ours[1] == theirs[0], "a fork leaves the default stream alone, which tensor ranks share"
    assert ours[2] != theirs[2], "and every tensor rank has a stream of its own for its heads"


def initial_shards(shape: ModelShape, layout: Layout) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]:
    """(name, shape of the whole, offset in it, values) of each shard that a rank holds after initialisation."""
    from megatron_capgap.devices import choose
    from megatron_capgap.distributed import parallel_context as layouts
    from megatron_capgap.models import gpt
    from megatron_capgap.models.sharded_state import initialise, shards

    device = choose("cpu", 0)
    parallel = layouts.build(layout, seed=7)
    chunks = gpt.build(shape, parallel, Precision(), device, sequence_length=8)
    initialise(chunks, shape, parallel, seed=7)
    return [(s.key, s.global_shape, s.global_offset, s.data.detach().clone()) for s in shards(chunks, parallel)]


def whole(pool: WorkerPool, shape: ModelShape, layout: Layout, world: int) -> dict[str, Tensor]:
    """Puts the shards of all ranks together; every element must be given, and by every rank alike."""
    tensors: dict[str, Tensor] = {}
    for rank in pool.run(initial_shards, shape, layout, world=world):
        for key, size, offset, values in rank:
            target = tensors.setdefault(key, torch.full(size, torch.nan))
            if values.ndim < len(size):
                values = values.reshape((1,) * (len(size) - values.ndim) + values.shape)
            place = target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))]
            assert place.isnan().all() or torch.equal(place, values), f"{key} differs between ranks"
            place.copy_(values)
    assert not [key for key, tensor in tensors.items() if tensor.isnan().any()]
    return tensors


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def on_one_rank(request: pytest.FixtureRequest, pool: WorkerPool) -> tuple[ModelShape, dict[str, Tensor]]:
    """A shape and its initial weights on one rank."""
    shape = ModelShape(**runs.STUDENT, tied_embeddings=request.param)
    return shape, whole(pool, shape, Layout(), 1)


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        (Layout(tensor=2, pipeline=2, sequence=True), 4),
        (Layout(pipeline=2, virtual_pipeline=2), 2),
        (Layout(tensor=2), 2),
    ],
    ids=["tp2_pp2", "pp2_vp2", "tp2"],
)
def test_initial_weights_do_not_depend_on_the_layout(
    pool: WorkerPool, on_one_rank: tuple[ModelShape, dict[str, Tensor]], layout: Layout, world: int
) -> None:
    shape, expected = on_one_rank
    found = whole(pool, shape, layout, world)
    assert found.keys() == expected.keys()
    rows = shape.vocab
    for key, tensor in found.items():
        if key.startswith(("embedding.", "output_layer.")):
            assert tensor.shape[0] == rows + (rows % 2 if layout.tensor == 2 else 0)
            assert not tensor[rows:].any(), f"{key}: padding of the vocabulary is zero"
            tensor = tensor[:rows]
        assert torch.equal(tensor, expected[key]), key
    assert 0.015 < expected["embedding.word_embeddings.weight"].std() < 0.025


def make_groups() -> tuple[int, list[float]]:
    """How many event loops gloo runs in this process when it has five more groups, and what each group sums up."""
    from megatron_capgap.devices import cpu

    cpu.prepare()
    groups = [torch.distributed.new_group([0, 1], timeout=timedelta(seconds=number + 30)) for number in range(5)]
    sums = []
    for group in groups:
        tensor = torch.ones(3)
        torch.distributed.all_reduce(tensor, group=group)
        sums.append(float(tensor.sum()))
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    assert timeouts == [timedelta(seconds=number + 30) for number in range(5)]
    return names.count("gloo_tcp_loop\n"), sums


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_groups_share_an_event_loop(pool: WorkerPool) -> None:
    assert pool.run(make_groups, world=2) == [(1, [6.0] * 5)] * 2


def test_models_can_still_be_made_on_the_meta_device() -> None:
    """transformers loads every model there first."""
    program = (
        "from megatron_capgap.devices import choose; choose('cpu', 0); import torch\n"
        "with torch.device('meta'): assert torch.empty(3).is_meta and torch.arange(3).is_meta and torch.ones(3).is_meta"
    )
    # A process of its own: whether torch has made its list of factories depends on what ran before.
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_peak_memory_is_this_process_s_own() -> None:
    """A child started by a large process; `ru_maxrss` would report the parent's peak in it."""
    child = "from megatron_capgap.devices.cpu import peak_resident_bytes as peak; print(peak())"
    parent = (
        "import subprocess, sys; block = bytearray(b'x') * (1500 << 20); "
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent], env=environment(), capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 1000 << 20
