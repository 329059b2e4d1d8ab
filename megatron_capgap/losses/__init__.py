"""Vocabulary-parallel losses over hidden states and LM heads. Plain torch: no Megatron here.

`distillation_loss` and `language_model_loss` are the face. Both run the LM heads themselves, so logits never
exist as a whole; a divergence is a row of the table in `divergences.py`.
"""

from megatron_capgap.losses.fused import Loss, distillation_loss, language_model_loss
from megatron_capgap.losses.objective import DistillationObjective
from megatron_capgap.losses.teacher_outputs import TeacherHidden, TeacherLogits, TeacherTopK
from megatron_capgap.losses.token_scores import token_scores

__all__ = [
    "DistillationObjective",
    "Loss",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherTopK",
    "distillation_loss",
    "language_model_loss",
    "token_scores",
]
