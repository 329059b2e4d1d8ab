"""Stock Megatron-Core on a CPU with gloo: "the current CUDA device" comes to mean the CPU.

Megatron-Core asks torch for its CUDA device in some two hundred places. None of them needs a GPU; they need an answer.
This file is the whole list of answers. It changes names inside `torch` and, for the random state, inside
`megatron.core.tensor_parallel.random`, for the life of the process: a process that called `prepare` runs on the CPU.
The type errors that are ignored here are those of a name that gets another function than torch says.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_capgap.devices import cpu_kernels, transformer_engine_cpu
from megatron_capgap.devices.base import Component, Device

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "empty_like",
    "zeros_like",
    "ones_like",
)


class _Inert:
    """Stands for streams and events, which a CPU has no use for: every method can be called and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def prepare(with_engine: bool = False) -> Device:
    """Patches once, then describes the CPU as a `Device`.

    Args:
        with_engine: whether a model is built of Transformer Engine's layers, over emulated kernels.

    Raises:
        UserError: it is, and Transformer Engine's Python modules are not installed.
    """
    # Megatron and Transformer Engine decorate element-wise functions with torch.compile, SwiGLU among them; importing
    # the compiler costs seconds, and using it would need a C++ compiler.
    torch.compile = _as_it_is  # type: ignore[assignment]
    if with_engine:
        transformer_engine_cpu.install()  # before the patches below, which import some of Megatron
    else:
        # Megatron looks for it, and without the emulation it would look for a GPU.
        sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    if not getattr(torch.cuda, "_capgap_cpu", False):
        _answer_for_cuda()
        _rewrite_factories()
        _share_random_state()
        _name_types()
        _share_event_loop()
        cpu_kernels.install()
        _tune_allocator()
        torch.cuda._capgap_cpu = True  # type: ignore[attr-defined]
    why = "its own modules on emulated kernels: for study, not for speed" if with_engine else "not asked for"
    return Device(
        name="cpu",
        backend="gloo",
        torch_device=_CPU,
        default_engine="local",
        capability=None,
        send_keeps_data=False,
        components=(
            Component("Transformer Engine layers", with_engine, why),
            Component("scaled-dot-product attention", True, "torch; no score matrix is kept"),
            Component("rotary positions, SwiGLU", True, "kernels of its own, in few passes of memory"),
            Component("Apex kernels", False, "need an NVIDIA GPU"),
            Component("fused AdamW", True, "torch"),
        ),
        peak_memory=peak_resident_bytes,
        release_memory=_return_free_memory,
        finish=lambda: None,
        between_steps=_tidy(),
        between_micro_batches=_return_free_memory,
        tune_optimizer=_fuse_adam,
    )


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """A decorator that changes nothing, with or without arguments."""
    return function or (lambda wrapped: wrapped)


# glibc's names for its settings (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


# Pages that are given back cost a fault each when they come again: a tenth of a step if it were every step.
_STEPS_TO_A_TRIM = 8


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def _tune_allocator() -> None:
    """Keeps glibc from scattering activations: one arena, and blocks from 4 MiB up in mappings of their own.

    By default the threshold grows with the first large block that is freed, and the resident set comes to twice what is
    alive. A lower threshold would halve it again, at the price of a page fault for every page of every activation. What
    is free at the end of the heap stays, or its pages would fault anew several times a step: `_tidy` gives it back.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        library.mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def _return_free_memory() -> None:
    """Gives free pages of the heap back to the system."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _tidy() -> Callable[[], None]:
    """What to call after each step: every few steps it closes the gaps of the heap, which would go on growing."""
    steps = itertools.count(1)

    def after_a_step() -> None:
        if next(steps) % _STEPS_TO_A_TRIM == 0:
            _return_free_memory()

    return after_a_step


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    Linux: VmHWM, since `ru_maxrss` survives exec and would begin with the peak of whoever started this process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _answer_for_cuda() -> None:
    """Device queries, synchronisation, streams and memory statistics.

    Every name gets a function object of its own: torch's compiler keeps a rule for each and refuses to share.
    """

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    cuda = torch.cuda
    answers = {"current_device": _CPU, "device_count": 1, "get_device_capability": (0, 0), "memory_stats": {}}
    answers |= dict.fromkeys(("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"))
    answers |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0)
    for name, value in answers.items():
        setattr(cuda, name, answer(value))
    cuda.Stream = type("Stream", (_Inert,), {})  # type: ignore[misc, assignment]
    cuda.Event = type("Event", (_Inert,), {})  # type: ignore[misc, assignment]
    cuda.current_stream, cuda.default_stream = answer(_Inert()), answer(_Inert())
    cuda.stream = lambda *args: contextlib.nullcontext()  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _rewrite_factories() -> None:
    """`torch.zeros(..., device="cuda")` makes a CPU tensor.

    Only the factories are wrapped: a TorchFunctionMode would do the same at the price of a Python call per operator.
    """

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return wrapped

    # `with torch.device("meta")` looks factories up in a set made at its first use; it must hold torch's own, or a
    # model that transformers loads in this process gets buffers that nothing fills.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _share_random_state() -> None:
    """Megatron's CUDA random state is the CPU generator's: on a CPU there is but one."""

    def manual_seed(seed: int) -> torch.Generator:
        return torch.manual_seed(seed)

    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    torch.cuda.manual_seed = torch.cuda.random.manual_seed = manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_rng_state  # type: ignore[assignment]

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _name_types() -> None:
    """`Tensor.type()` names a CPU float tensor as Megatron's optimizer expects it: torch.cuda.FloatTensor."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def named(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if args or kwargs or not isinstance(answer, str) or answer.startswith("torch.cuda."):
            return answer
        return answer.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = named  # type: ignore[method-assign, assignment]


def _share_event_loop() -> None:
    """All gloo groups of this process talk through one event loop.

    torch gives each group a loop of its own, a thread that wakes a hundred times a second even where nothing happens.
    Megatron makes some forty groups for two layouts: that is a fiftieth of a core, in every rank, for waiting.
    """
    gloo = torch.distributed.ProcessGroupGloo
    original = gloo.__init__

    @functools.cache
    def device() -> Any:
        return gloo.create_default_device()

    @functools.wraps(original)
    def initialise(self: Any, store: Any, rank: int, size: int, *args: Any, timeout: Any = None, **kwargs: Any) -> None:
        if args or kwargs or timeout is None:  # whoever brings options knows what they want
            original(self, store, rank, size, *args, **kwargs)
            return
        options = gloo._Options()  # type: ignore[attr-defined]
        options._devices, options._threads, options._timeout = [device()], _THREADS_OF_A_GROUP, timeout
        original(self, store, rank, size, options)

    gloo.__init__ = initialise  # type: ignore[method-assign]


_THREADS_OF_A_GROUP = 2  # as torch has it: they run the collectives that were not waited for


def _fuse_adam(optimizer: torch.optim.Optimizer) -> None:
    """Megatron makes torch's AdamW with its default loop; the fused kernel reads and writes each parameter once."""
    for group in optimizer.param_groups:
        group["fused"] = True
        group["foreach"] = False
