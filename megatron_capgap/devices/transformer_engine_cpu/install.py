"""Installs the emulated extension where Transformer Engine looks for it, and patches its queries for a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from megatron_capgap.common.errors import UserError
from megatron_capgap.devices.transformer_engine_cpu import extension, files, quantize

# Blackwell's capability: the first on which Transformer Engine supports all four recipes, and FP8 GEMMs of any layout.
_CAPABILITY = (10, 0)
_CUDA = "13.0"
_FIX = "run tools/install_transformer_engine_cpu.py with this Python"
# Libraries that Transformer Engine imports for features that are not used on the CPU.
_OPTIONAL = ("triton", "onnx", "onnxscript")
_MEGATRON = ("megatron.core.extensions.transformer_engine", "megatron.core.fp8_utils", "megatron.core.optimizer")


def install() -> None:
    """Makes `import transformer_engine` work on this machine's CPU, for the life of the process.

    Call it before Megatron-Core's layers are first imported, before or after `cpu.prepare`. A second call does nothing.

    Raises:
        UserError: Transformer Engine's Python files are missing, or of another release than 2.20.
    """
    if getattr(sys.modules.get(extension.NAME), "_capgap_cpu", False):
        return
    found = files.installed()
    if found is None:
        raise UserError(f"precision.engine: transformer_engine, but its Python files are not installed; {_FIX}")
    place, version = found
    if version.split(".")[:2] != files.VERSION.split(".")[:2]:
        raise UserError(
            f"precision.engine: transformer_engine {version} in {place} is not {files.VERSION}, the release that is "
            f"emulated on a CPU; remove it and {_FIX}"
        )
    early = [name for name in _MEGATRON if name in sys.modules]
    assert not early, f"{early} looked for Transformer Engine before install() was called"
    if str(place) not in sys.path:
        sys.path.append(str(place))
    standing_in = extension.module()
    vars(standing_in).update(_capgap_cpu=True)
    sys.modules[extension.NAME] = standing_in
    _import(place)
    _answer()


def _import(place: Path) -> None:
    """Imports Transformer Engine with its shared-library loader disabled."""
    name = "transformer_engine.common"
    file = place / "transformer_engine" / "common" / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None and spec.loader is not None, "Python has a loader for every .py file"
    common = importlib.util.module_from_spec(spec)
    sys.modules[name] = common
    # With this variable set, `common` loads no shared library.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    with _optional_modules():
        spec.loader.exec_module(common)
        vars(common).update(load_framework_extension=lambda framework: None)
        import transformer_engine

        transformer_engine.common = common
        import transformer_engine.pytorch
    del os.environ["NVTE_PROJECT_BUILDING"]


def _answer() -> None:
    """Patches device queries, assertions and kernels for which Transformer Engine's Python code needs a GPU."""
    from transformer_engine.pytorch import constants, distributed, optimizers, quantization, utils
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.module import base
    from transformer_engine.pytorch.tensor.storage import mxfp8_tensor_storage

    utils._get_device_compute_capability = lambda device: _CAPABILITY
    # These cache their first result, so they are called while torch is patched to answer as a GPU.
    with (
        _replaced(torch.cuda, "get_device_capability", lambda *args: _CAPABILITY),
        _replaced(torch.cuda, "current_device", lambda: torch.device("cpu")),
        _replaced(torch.version, "cuda", _CUDA),
    ):
        answers = [utils.is_non_tn_fp8_gemm_supported()]
        checks = ("check_fp8_support", "check_mxfp8_support", "check_fp8_block_scaling_support")
        answers += [getattr(quantization, check)()[0] for check in checks]
    assert all(answers), answers
    gemm.get_cublas_workspace_size_bytes = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    # Read and set around recomputed layers; on a CPU the "CUDA" generator is torch's own.
    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _wrap_modules(base.TransformerEngineBaseModule)
    # The original moves the tensor to the GPU first. Those of other recipes are read by torch in host memory.
    mxfp8_tensor_storage._FromMXFP8Func.forward = staticmethod(
        lambda context, tensor, dtype: quantize.dequantize(tensor, constants.TE_DType[dtype])
    )
    # Without these, Megatron uses torch's AdamW and its own norms, as with the local engine.
    for kernel in ("FusedAdam", "FusedSGD", "multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale"):
        delattr(optimizers, kernel)
    _coalesce_by_type()


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute within the context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _wrap_modules(module: type) -> None:
    """Makes the two GPU checks of `TransformerEngineBaseModule` pass, only inside the checking methods."""
    build, prepare = module.__init__, module.prepare_forward  # type: ignore[misc, attr-defined]

    @functools.wraps(build)
    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        with _replaced(torch.cuda, "is_available", lambda: True):
            build(self, *args, **kwargs)

    @functools.wraps(prepare)
    def prepared(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
        try:
            return prepare(self, *args, **kwargs)
        finally:
            del torch.Tensor.is_cuda  # restores torch's own attribute

    module.__init__, module.prepare_forward = built, prepared  # type: ignore[misc, attr-defined]


class _Done:
    """A completed work handle."""

    def wait(self) -> None:
        """Returns at once."""


def _coalesce_by_type() -> None:
    """Splits coalesced collectives by dtype: gloo corrupts data if one coalesced call mixes dtypes.

    Transformer Engine's quantised all-gather (the only caller that names a device) sends bytes and scales; its
    collectives run immediately. Megatron's gather of FP8 and BF16 parameters is split by dtype.
    """
    coalesce = torch.distributed._coalescing_manager
    recorded = torch.distributed.distributed_c10d._world.pg_coalesce_state

    @contextlib.contextmanager
    def by_type(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        if device is not None:
            yield _Done()
            return
        key = group or torch.distributed.group.WORLD
        assert key is not None, "collectives need a default group"
        with coalesce(group, None, async_ops) as manager:
            yield manager
            dtypes = [collective.tensor.dtype for collective in recorded[key]]
            others = [one for one, dtype in zip(recorded[key], dtypes, strict=True) if dtype != dtypes[0]]
            recorded[key][:] = [one for one, dtype in zip(recorded[key], dtypes, strict=True) if dtype == dtypes[0]]
        if others:
            with by_type(group, None, async_ops) as more:
                recorded[key].extend(others)
            manager.works.extend(more.works)

    torch.distributed._coalescing_manager = by_type


class _Anything:
    """Usable as a decorator, a type or a number by module-level code that uses an absent library."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _Finder:
    """Import finder that creates empty modules for absent libraries and their submodules."""

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = roots

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """A specification for any name that starts with one of the roots."""
        if name.split(".")[0] not in self.roots:
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]  # duck-typed loader

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        """An empty module that has every attribute."""
        made = types.ModuleType(spec.name)
        vars(made).update(__version__="0", __getattr__=lambda name: getattr(_Anything(), name))
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing."""


@contextlib.contextmanager
def _optional_modules() -> Iterator[None]:
    """Makes optional libraries that are not installed importable within the context only, because other code probes
    them."""
    finder = _Finder([name for name in _OPTIONAL if importlib.util.find_spec(name) is None])
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            if name.split(".")[0] in finder.roots:
                del sys.modules[name]
