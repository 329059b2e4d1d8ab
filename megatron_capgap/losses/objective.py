"""What the student minimises, as an object."""

from dataclasses import dataclass
from difflib import get_close_matches

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses.divergences import DIVERGENCES, Divergence


@dataclass(frozen=True)
class DistillationObjective(ObjectiveConfig):
    """divergence_weight * T^2 * D(teacher / T, student / T) + cross_entropy_weight * cross-entropy.

    The fields and their defaults are those of the section `objective` of a configuration:
    `DistillationObjective(**dataclasses.asdict(config.objective))`. With divergence_weight 0 no teacher is
    looked at; with cross_entropy_weight 0 the cross-entropy is still reported. `matching` speaks of layers that
    distillation_loss does not see: `losses.matching` has its formulas, the stage distill attaches them to the layers.

    Raises:
        UserError: a divergence that is not in the table, or a number out of its range.
    """

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            closest = get_close_matches(str(self.divergence), DIVERGENCES, n=1, cutoff=0.0)[0]
            known = ", ".join(DIVERGENCES)
            raise UserError(
                f"objective.divergence: {self.divergence!r} is unknown; did you mean {closest!r}? There are {known}"
            )
        for key in ("divergence_weight", "cross_entropy_weight"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise UserError(f"objective.{key}: {getattr(self, key)} must be a number of at least 0")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"objective.temperature: {self.temperature} must be a number above 0")
        for key in ("skew_alpha", "jsd_beta"):
            if not 0 < getattr(self, key) < 1:
                raise UserError(f"objective.{key}: {getattr(self, key)} must lie between 0 and 1, both excluded")

    @property
    def row(self) -> Divergence:
        """The divergence's row of the table."""
        return DIVERGENCES[self.divergence]
