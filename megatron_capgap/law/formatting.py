"""Formats sizes and laws for reports."""

from megatron_capgap.law.fit import Law


def short(size: float) -> str:
    """A number of parameters with at most three digits: 302k, 1.21M, 7B."""
    for letter, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(size) >= 0.9995 * scale:
            return f"{size / scale:.3g}{letter}"
    return f"{size:.3g}"


def formula(law: Law) -> str:
    """A law with its numbers, for example `T = 2.48 S`."""
    values = law.values()
    if law.form.name == "proportional":
        return f"T = {values['k']:.3g} S"
    if law.form.name == "affine":
        return f"T = {values['k']:.3g} S {'+' if values['b'] >= 0 else '-'} {short(abs(values['b']))}"
    return f"T = {values['c']:.3g} S^{values['g']:.3g}"
