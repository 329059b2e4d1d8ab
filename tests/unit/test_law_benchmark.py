"""benchmarks/law.py: what it calls the truth of a new student."""

import numpy as np

from benchmarks.law import Cell, draw
from megatron_capgap.law.cells import SAME_SIZE


def test_a_student_of_the_data_keeps_its_own_optimum() -> None:
    """Under scattered optima, a new student of the size of one of the data is that one; others have their own."""
    cell, twins = Cell("scattered", 0.0, (3, 5, 1, 3)), 0
    for number in range(100):
        records, new, loss = draw(cell, number)
        own = {each.student_params for each in records}
        near = min(own, key=lambda size: abs(np.log(new / size)))
        fine = np.geomspace(1.2 * new, 10 * new, 2001)
        k = fine[np.argmin([loss(size) for size in fine])] / new
        scatter = 0.2 * np.random.default_rng([number, 7]).standard_normal(4)
        same = abs(np.log(new / near)) < SAME_SIZE
        wanted = scatter[sorted(own).index(near)] if same else scatter[-1]
        assert abs(np.log(k / 2.5) - wanted) < 0.01
        twins += same
    assert 5 < twins < 20
