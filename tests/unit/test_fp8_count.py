"""How many matrix products FP8 takes, counted by hand."""

import pytest

from megatron_capgap.config.derived import recomputed_linears
from megatron_capgap.config.recompute import Recompute
from megatron_capgap.config.schema import FP8, Layout, ModelShape, Precision
from megatron_capgap.config.validation.fp8 import GemmCount, gemm_count


@pytest.mark.parametrize(
    ("fp8", "trains", "expected"),
    [
        # Five layers of four linears, forward alone or with two products more in the backward pass, and the LM head.
        (None, False, (0, 21)),
        (None, True, (0, 63)),
        (FP8("delayed"), True, (60, 3)),
        (FP8("mxfp8"), False, (20, 1)),
        (FP8("tensorwise", first_last_layers_bf16=1), True, (36, 27)),
        (FP8("blockwise", first_last_layers_bf16=2), False, (4, 17)),
    ],
)
def test_products_of_a_micro_batch(fp8: FP8 | None, trains: bool, expected: tuple[int, int]) -> None:
    shape = ModelShape(layers=5, hidden=64, heads=4, ffn=128, vocab=100)
    assert gemm_count(Precision(fp8=fp8), shape, trains=trains) == GemmCount(*expected)


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        # Four of six layers in FP8, twelve products each; two layers and the LM head in the compute type.
        (None, (48, 27)),
        (Recompute("full"), (64, 35)),
        (Recompute("mlp"), (56, 31)),
        # Layers 0 and 3, the first ones of the two model chunks.
        (Recompute("full", layers=1), (52, 31)),
    ],
)
def test_products_that_are_computed_again(recompute: Recompute | None, expected: tuple[int, int]) -> None:
    shape = ModelShape(layers=6, hidden=64, heads=4, ffn=128, vocab=100)
    again = recomputed_linears(recompute, shape.layers, Layout(pipeline=2))
    precision = Precision(fp8=FP8("tensorwise", first_last_layers_bf16=1))
    assert gemm_count(precision, shape, trains=True, again=again) == GemmCount(*expected)
