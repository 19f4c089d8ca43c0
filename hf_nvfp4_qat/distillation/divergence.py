"""The divergence between teacher and student, without a second copy of the logits in float32."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Logits that are float32 at a time: 128 MiB a tensor.
_CHUNK_SIZE = 2**25

IGNORED = -100
"""Label of tokens that do not count, as everywhere in Transformers."""


def divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL(teacher || student) of next-token predictions, summed over the tokens that have a label.

    ``temperature**2 * sum_v p_v * (log p_v - log q_v)`` with ``p, q = softmax(logits / temperature)``, so that
    gradients keep their size when the temperature changes. (Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the
    Knowledge in a Neural Network", 2015.) The gradient is computed along with the loss, chunk by chunk: beside both
    logits there is one tensor of their size, in the student's dtype.

    Args:
        student_logits: ``[B, T, V]``, floating.
        teacher_logits: ``[B, T, V]``; no gradient flows into it. -inf for a token that never comes (a padded
            vocabulary) adds nothing to the sum; -inf from the student for a token that does come makes it infinite.
        labels: int64 ``[B, T]``, the tokens themselves (they are shifted here); -100 for those that do not count:
            whatever the logits are there, NaN too, the loss does not see them and their gradient is 0.
        temperature: of both softmaxes.
        cross_entropy_weight: of the summed cross entropy that is added to the loss.

    Returns:
        The loss, differentiable; the sum of KL alone, of the cross entropy alone, and of the teacher's cross entropy,
        not differentiable; all float32 ``[]``, in nats.

    Raises:
        ValueError: the two vocabularies differ in size, or a temperature that is not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Teacher and student must predict the same tokens; the student's logits are {list(student_logits.shape)}, "
            f"the teacher's {list(teacher_logits.shape)}. Use a teacher with the same vocabulary."
        )
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive; got {temperature}.")
    targets = labels[:, 1:].reshape(-1)
    student, teacher = (logits[:, :-1].flatten(0, 1) for logits in (student_logits, teacher_logits.detach()))
    return _Divergence.apply(student, teacher, targets, temperature, cross_entropy_weight)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temperature: float, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        kl, cross_entropy, teacher_cross_entropy = torch.zeros(3, device=student.device).unbind()
        num_rows = max(1, _CHUNK_SIZE // student.shape[-1])
        for start in range(0, len(student), num_rows):
            rows = slice(start, start + num_rows)
            counted = (targets[rows] != IGNORED)[:, None]
            logits = student[rows].float()
            own = torch.log_softmax(logits / temperature, dim=-1)
            teacher_logits = teacher[rows].float()
            theirs = torch.log_softmax(teacher_logits / temperature, dim=-1)
            probability = theirs.exp()
            # Selected, not multiplied: 0 * NaN is NaN, and so is 0 * (-inf - x) where the teacher rules a token out.
            terms = torch.where(counted & (probability != 0), probability * (theirs - own), 0.0)
            kl += temperature**2 * terms.sum()
            own_at_one = own if temperature == 1 else torch.log_softmax(logits, dim=-1)
            labels = targets[rows].clamp(min=0)[:, None]
            cross_entropy -= torch.where(counted, own_at_one.gather(1, labels), 0.0).sum()
            theirs_at_one = theirs if temperature == 1 else torch.log_softmax(teacher_logits, dim=-1)
            teacher_cross_entropy -= torch.where(counted, theirs_at_one.gather(1, labels), 0.0).sum()
            if gradient is not None:
                part = temperature * (own.exp() - probability)
                if weight:
                    part += weight * own_at_one.exp()
                    part.scatter_add_(1, labels, torch.full_like(labels, -weight, dtype=part.dtype))
                gradient[rows] = part
        ctx.gradient, ctx.ignored = gradient, (targets == IGNORED)[:, None]
        ctx.mark_non_differentiable(kl, cross_entropy, teacher_cross_entropy)
        return kl + weight * cross_entropy, kl, cross_entropy, teacher_cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                "The divergence was differentiated twice; its gradient is kept for one backward. Compute it again."
            )
        # Only now: the loss may have been divided by no tokens at all, and 0 * inf is NaN.
        return gradient.mul_(grad_loss).masked_fill_(ctx.ignored, 0.0), None, None, None, None
