"""The distillation objective: divergence, temperature and loss weights."""

from dataclasses import dataclass
from difflib import get_close_matches

from megatron_capgap.common.errors import UserError
from megatron_capgap.config.schema import ObjectiveConfig
from megatron_capgap.losses.divergences import DIVERGENCES, Divergence


@dataclass(frozen=True)
class DistillationObjective(ObjectiveConfig):
    """Loss per token: divergence_weight * T^2 * D(teacher / T, student / T) + cross_entropy_weight * cross_entropy.

    T is the temperature; it divides the logits of both models in the divergence, not in the cross-entropy. Fields and
    defaults are those of the configuration's section `objective`:
    `DistillationObjective(**dataclasses.asdict(config.objective))`.

    With divergence_weight 0 the teacher is not used. With cross_entropy_weight 0 the cross-entropy is still reported.
    `distillation_loss` ignores `matching`, which concerns intermediate layers: its formulas are in
    `losses.hidden_matching`, and the distill stage attaches them to the layers.

    Raises:
        UserError: an unknown divergence, or a number out of range.
    """

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            closest = get_close_matches(str(self.divergence), DIVERGENCES, n=1, cutoff=0.0)[0]
            known = ", ".join(DIVERGENCES)
            raise UserError(
                f"objective.divergence: {self.divergence!r} is unknown; did you mean {closest!r}? Valid values: {known}"
            )
        for key in ("divergence_weight", "cross_entropy_weight"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise UserError(f"objective.{key}: {getattr(self, key)} must be a number of at least 0")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"objective.temperature: {self.temperature} must be a number above 0")
        for key in ("skew_alpha", "jsd_beta"):
            if not 0 < getattr(self, key) < 1:
                raise UserError(f"objective.{key}: {getattr(self, key)} must be between 0 and 1, both excluded")

    @property
    def report(self) -> tuple[str, ...]:
        """Names of the parts of the loss."""
        parts = {"cross_entropy": True, "divergence": self.divergence_weight > 0, "matching": bool(self.matching)}
        return tuple(name for name, used in parts.items() if used)

    @property
    def row(self) -> Divergence:
        """The divergence's row of the table `DIVERGENCES`."""
        return DIVERGENCES[self.divergence]
