"""The objective refuses what it cannot mean, in one clear line."""

import dataclasses

import pytest

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses import DistillationObjective


def test_it_is_the_section_of_the_configuration() -> None:
    section = ObjectiveConfig(divergence="jsd", temperature=2.0, jsd_beta=0.1)
    objective = DistillationObjective(**dataclasses.asdict(section))
    assert dataclasses.asdict(objective) == dataclasses.asdict(section)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"divergence": "foward_kl"}, r"objective\.divergence: 'foward_kl' is unknown; did you mean 'forward_kl'"),
        ({"divergence": "tv"}, "did you mean"),
        ({"temperature": 0.0}, r"objective\.temperature: 0\.0"),
        ({"temperature": float("nan")}, r"objective\.temperature: nan"),
        ({"divergence_weight": -1.0}, r"objective\.divergence_weight: -1\.0"),
        ({"cross_entropy_weight": float("inf")}, r"objective\.cross_entropy_weight: inf"),
        ({"skew_alpha": 1.0}, r"objective\.skew_alpha: 1\.0"),
        ({"jsd_beta": 0.0}, r"objective\.jsd_beta: 0\.0"),
    ],
)
def test_wrong_values_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        DistillationObjective(**wrong)
    assert "\n" not in str(caught.value)
