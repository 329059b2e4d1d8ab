"""Rows of the table of divergences as Triton functions, by tracing.

A formula of `divergences.py` runs on symbols, which record each operation as a line of Triton source. A new row
therefore needs no kernel; if it uses an operation that has no counterpart here, tracing raises an error that names it.
The objective's numbers become constants of the source, in the type in which the kernel computes: Triton would pass a
number as a kernel argument in fp32.
"""

from __future__ import annotations

import linecache
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses.divergences import DIVERGENCES

TRITON_TYPES = {torch.float32: "tl.float32", torch.float64: "tl.float64"}
"""Types in which the kernels compute, as Triton source."""


class UnknownOperation(NotImplementedError):
    """A formula uses an operation that has no Triton counterpart in this module."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name} has no Triton counterpart; write the formula without it, or add it to losses/kernels/formulas.py"
        )


class _Trace:
    """Source lines of one formula."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.lines = dtype, list[str]()

    def record(self, expression: str) -> _Symbol:
        """A symbol for the value of an expression."""
        name = f"x{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return _Symbol(name, self)

    def source_of(self, operand: object) -> str:
        """The operand's name, or a constant of the kernel's type."""
        if isinstance(operand, _Symbol):
            return operand.name
        assert isinstance(operand, int | float), f"{operand!r} is not a number"
        return f"tl.full((), {float(operand)!r}, {TRITON_TYPES[self.dtype]})"

    def quotient(self, above: str, below: str) -> str:
        """Correctly rounded, so that x / x is 1; Triton's own division of fp32 is an approximation."""
        return f"{above} / {below}" if self.dtype == torch.float64 else f"tl.div_rn({above}, {below})"


class _Symbol:
    """Stands for a tensor in a formula."""

    def __init__(self, name: str, trace: _Trace) -> None:
        self.name, self.trace = name, trace

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the kernel computes."""
        return self.trace.dtype

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> _Symbol:
        name = getattr(function, "__name__", str(function))
        if function is torch.lerp and not kwargs:
            start, end, weight = args
            return start + (end - start) * weight
        if not kwargs and name in _EXPRESSIONS and isinstance(args[0], cls):
            result: _Symbol = getattr(args[0], name)(*args[1:])
            return result
        raise UnknownOperation(f"torch.{name}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnknownOperation(f"Tensor.{name}")


_EXPRESSIONS = {
    "add": "{0} + {1}",
    "radd": "{1} + {0}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "rmul": "{1} * {0}",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt({0})",
    "square": "{0} * {0}",
    "clamp_min": "tl.maximum({0}, {1})",
    "clamp_max": "tl.minimum({0}, {1})",
    "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})",
    "sign": "tl.where({0} > 0, {2}, {3}) - tl.where({0} < 0, {2}, {3})",
}
"""Operations by their name in torch; {2} and {3} are the constants 1 and 0."""


_Expression = Callable[[_Trace, list[str]], str]


def _define(name: str, expression: _Expression) -> None:
    """Gives symbols an operation: as an operator, as a method, and as a method that replaces the symbol's value."""

    def new(self: _Symbol, *others: object) -> _Symbol:
        operands = [self.name, *map(self.trace.source_of, others)]
        return self.trace.record(expression(self.trace, operands))

    def in_place(self: _Symbol, *others: object) -> _Symbol:
        self.name = new(self, *others).name
        return self

    for spelling, method in ((f"__{name}__", new), (name, new), (f"{name}_", in_place)):
        setattr(_Symbol, spelling, method)


def _by_pattern(pattern: str) -> _Expression:
    def expression(trace: _Trace, operands: list[str]) -> str:
        first, second = (operands * 2)[:2]
        return pattern.format(first, second, trace.source_of(1), trace.source_of(0))

    return expression


for _name, _pattern in _EXPRESSIONS.items():
    _define(_name, _by_pattern(_pattern))
for _name in ("div", "truediv"):
    _define(_name, lambda trace, operands: trace.quotient(operands[0], operands[1]))
_define("rtruediv", lambda trace, operands: trace.quotient(operands[1], operands[0]))


def triton_source(name: str, objective: ObjectiveConfig, dtype: torch.dtype) -> str:
    """A row's formula as the source of a Triton function of (p, q, log_p, log_q), each of any shape.

    Args:
        name: a divergence of the table.
        objective: its numbers become constants.
        dtype: fp32 or float64, in which the kernel computes.

    Raises:
        UnknownOperation: the formula uses an operation without a counterpart.
    """
    trace = _Trace(dtype)
    p, q, log_p, log_q = (cast(Tensor, _Symbol(argument, trace)) for argument in ("p", "q", "log_p", "log_q"))
    results = DIVERGENCES[name].formula(p, q, log_p, log_q, objective)
    lines = [*trace.lines, f"return {', '.join(map(trace.source_of, results))}"]
    return "\n    ".join([f"def {name}(p, q, log_p, log_q):", *lines]) + "\n"


@cache
def _compiled(name: str, source: str) -> Any:
    # Triton asks inspect for the source of a function, and inspect asks linecache.
    file = f"<divergence {name} {zlib.crc32(source.encode()):08x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    namespace: dict[str, Any] = {"tl": tl, "__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    return triton.jit(namespace[name])


@cache
def triton_formula(objective: ObjectiveConfig, dtype: torch.dtype) -> Any:
    """The objective's divergence as a Triton function: (p, q, log p, log q) -> (value, logit gradient term).

    Args and Raises: as in `triton_source`.
    """
    return _compiled(objective.divergence, triton_source(objective.divergence, objective, dtype))
