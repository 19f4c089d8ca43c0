"""The divergence against the formula written out, its gradient, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F

from hf_nvfp4_qat.distillation import divergence as module
from hf_nvfp4_qat.distillation.divergence import divergence


def plain(student, teacher, labels, temperature, weight):
    """Autograd through the formula, in the dtype given."""
    own, theirs = (F.log_softmax(logits[:, :-1] / temperature, dim=-1) for logits in (student, teacher))
    counted = labels[:, 1:] != -100
    kl = temperature**2 * F.kl_div(own, theirs, log_target=True, reduction="none").sum(-1)[counted].sum()
    logits = student[:, :-1].flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    of_teacher = F.cross_entropy(
        teacher[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    return kl + weight * cross_entropy, kl, cross_entropy, of_teacher


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_the_formula(temperature, weight, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_SIZE", 7 * 50 + 1)
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 9, 50, requires_grad=True) for _ in range(2))
    labels = torch.randint(0, 50, (3, 9))
    labels[0, :4] = -100
    found = divergence(student, teacher, labels, temperature=temperature, cross_entropy_weight=weight)
    (3 * found[0]).backward()
    gradient, student.grad = student.grad, None
    assert teacher.grad is None
    expected = plain(student.double(), teacher.double(), labels, temperature, weight)
    (3 * expected[0]).backward()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-4, atol=1e-6)
    assert not gradient[0, :3].any() and not gradient[:, -1].any()


def test_equal_logits_have_no_divergence_and_no_gradient():
    logits = torch.randn(2, 5, 11, dtype=torch.bfloat16)
    student = logits.clone().requires_grad_()
    loss, kl, cross_entropy, of_teacher = divergence(student, logits, torch.ones(2, 5, dtype=torch.long))
    loss.backward()
    assert kl == 0 and cross_entropy > 0 and torch.isclose(cross_entropy, of_teacher)
    assert not student.grad.any() and student.grad.dtype == torch.bfloat16


def test_no_gradient_is_computed_where_none_is_wanted():
    logits = torch.randn(2, 5, 11)
    with torch.no_grad():
        assert not divergence(logits, -logits, torch.ones(2, 5, dtype=torch.long))[0].requires_grad


@pytest.mark.parametrize(
    ("shape", "temperature", "message"),
    [
        ((1, 4, 12), 1.0, r"student's logits are \[1, 4, 11\], the teacher's \[1, 4, 12\]"),
        ((1, 4, 11), 0.0, "positive"),
    ],
)
def test_refusals(shape, temperature, message):
    with pytest.raises(ValueError, match=message):
        divergence(
            torch.zeros(1, 4, 11), torch.zeros(shape), torch.ones(1, 4, dtype=torch.long), temperature=temperature
        )
