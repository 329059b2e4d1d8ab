"""Cost: the figures of the paper's 3B student."""

import pytest

from megatron_capgap.law import cost
from tests.support.law import record


@pytest.mark.parametrize(("teacher", "flops"), [(7e9, 4.03e21), (13e9, 5.54e21), (70e9, 1.99e22)])
def test_three_billion_at_126_billion_tokens(teacher: float, flops: float) -> None:
    assert float(f"{cost.distill_flops(3e9, teacher, 126e9):.3g}") == flops


def test_hours() -> None:
    assert cost.gpu_hours(cost.distill_flops(3e9, 7e9, 126e9), mfu=0.4, peak=312e12) == pytest.approx(8974, abs=1)
    assert cost.training_flops(7e9, 1e12) == 4.2e22


def test_untold_flops_follow_the_rule() -> None:
    assert cost.spent(record(flops=None)) == (6 * 1_500_000 + 2 * 3_300_000) * 5_000_000
