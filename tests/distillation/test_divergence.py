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


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_positions_that_do_not_count_change_nothing_whatever_the_logits_are(bad, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 6, 32), torch.randn(1, 6, 32)
    labels = torch.tensor([[-100, -100, -100, 5, 6, 7]])
    found = []
    for value in (0.0, bad):
        logits = [tensor.clone() for tensor in (student, teacher)]
        for tensor in logits:
            tensor[:, [0, 1, 5]] = value
        own = logits[0].requires_grad_()
        loss, *parts = divergence(own, logits[1], labels, temperature=temperature, cross_entropy_weight=0.5)
        loss.backward()
        assert torch.equal(own.grad[:, [0, 1, 5]], torch.zeros(1, 3, 32)) and own.grad.any()
        found.append([loss, *parts, own.grad])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_a_loss_over_no_tokens_at_all_has_no_gradient():
    student = torch.randn(1, 4, 8, requires_grad=True)
    labels = torch.full((1, 4), -100)
    loss, *_ = divergence(student, torch.randn(1, 4, 8), labels)
    (loss / (labels != -100).sum()).backward()
    assert loss == 0 and torch.equal(student.grad, torch.zeros(1, 4, 8))


@pytest.mark.parametrize("student_too", [False, True])
def test_tokens_that_the_teacher_rules_out_add_nothing(student_too):
    """As over a vocabulary without them, but that the student's softmax has them where it does not rule them out."""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 6, 32), torch.randn(1, 6, 32)
    teacher[..., 30:] = float("-inf")
    if student_too:
        student[..., 30:] = float("-inf")
    student.requires_grad_()
    labels = torch.arange(6)[None]
    loss, kl, cross_entropy, of_teacher = divergence(student, teacher, labels, cross_entropy_weight=0.5)
    loss.backward()
    gradient, student.grad = student.grad, None
    own, theirs = (logits[:, :-1].log_softmax(-1) for logits in (student, teacher))
    expected = F.kl_div(own[..., :30], theirs[..., :30], log_target=True, reduction="sum")
    expected = expected + 0.5 * F.nll_loss(own.flatten(0, 1), labels[0, 1:], reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert kl.isfinite() and cross_entropy.isfinite() and of_teacher.isfinite()
    expected.backward()
    torch.testing.assert_close(gradient, student.grad.nan_to_num(), rtol=1e-4, atol=1e-6)


def test_a_token_that_only_the_student_rules_out_makes_the_divergence_infinite():
    student = torch.randn(1, 3, 8)
    student[..., 2] = float("-inf")
    assert divergence(student, torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.long))[1] == float("inf")


def test_nan_where_it_counts_stays_nan():
    teacher = torch.randn(1, 3, 8)
    teacher[0, 1] = float("nan")
    assert divergence(torch.randn(1, 3, 8), teacher, torch.ones(1, 3, dtype=torch.long))[1].isnan()


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
