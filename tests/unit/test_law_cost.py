"""Cost: the figures of the paper's 3B student, and when a pilot has paid for itself."""

import pytest

from megatron_capgap.law import cost
from tests.support.law import record


@pytest.mark.parametrize(("teacher", "flops"), [(7e9, 4.03e21), (13e9, 5.54e21), (70e9, 1.99e22)])
def test_three_billion_at_126_billion_tokens(teacher: float, flops: float) -> None:
    assert float(f"{cost.distill_flops(3e9, teacher, 126e9):.3g}") == flops


def test_search_saving_and_hours() -> None:
    saving = cost.saving(3e9, 7e9, [7e9, 13e9, 70e9], 126e9, [record(flops=1e21), record(seed=2, flops=2e22)])
    assert f"{saving.search:.3g}" == "2.95e+22" and f"{saving.search / saving.chosen:.2g}" == "7.3"
    assert cost.gpu_hours(saving.chosen, mfu=0.4, peak=312e12) == pytest.approx(8974, abs=1)
    assert saving.saved == pytest.approx(2.545e22, rel=1e-3)
    # 2.1e22 for the pilot; its one teacher of 3.3M on 10M tokens hardly counts.
    assert saving.breaks_even(False) == 1
    assert saving.pilot_teachers == 6 * 3_300_000 * 10_000_000
    dear = cost.saving(3e9, 7e9, [7e9, 13e9], 126e9, [record(flops=1e22)])
    assert dear.breaks_even(False) == 2  # 1e22 / 5.54e21
    assert cost.saving(3e9, 7e9, [7e9], 126e9, [record()]).breaks_even(False) is None


def test_untold_flops_follow_the_rule() -> None:
    assert cost.spent(record(flops=None)) == (6 * 1_500_000 + 2 * 3_300_000) * 5_000_000
