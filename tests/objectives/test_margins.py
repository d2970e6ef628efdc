"""The loss over all pairs of a list against a loop over pairs, MarginMSE, and what must change nothing."""

import itertools

import pytest
import torch

from polyrank.objectives.margins import all_margins_mse


def by_pairs(student, teacher, mask):
    """The definition: the mean over queries of the mean squared error of the margins of all pairs."""
    means = []
    for s, t, keep in zip(student.tolist(), teacher.tolist(), mask.tolist(), strict=True):
        places = [place for place, kept in enumerate(keep) if kept]
        errors = [((s[a] - s[b]) - (t[a] - t[b])) ** 2 for a, b in itertools.combinations(places, 2)]
        if errors:
            means.append(sum(errors) / len(errors))
    return sum(means) / len(means)


@pytest.fixture
def scores():
    torch.manual_seed(0)
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0]], dtype=torch.bool
    )
    return student, torch.randn(4, 6, dtype=torch.float64), mask


def test_it_is_the_mean_over_pairs(scores):
    student, teacher, mask = scores
    assert all_margins_mse(student, teacher, mask).item() == pytest.approx(by_pairs(student, teacher, mask), abs=1e-12)
    everything = torch.ones_like(mask)
    assert all_margins_mse(student, teacher).item() == pytest.approx(by_pairs(student, teacher, everything), abs=1e-12)


def test_two_documents_are_margin_mse(scores):
    student, teacher = (x[:, :2] for x in scores[:2])
    margins = [x[:, 0] - x[:, 1] for x in (student, teacher)]
    assert torch.allclose(all_margins_mse(student, teacher), torch.nn.functional.mse_loss(*margins), atol=1e-14)


def test_constants_of_a_query_change_nothing_and_a_teacher_that_is_the_student_costs_nothing(scores):
    student, teacher, mask = scores
    moved = teacher + torch.tensor([[5.0], [-3.0], [0.5], [100.0]])
    assert torch.allclose(all_margins_mse(student, moved, mask), all_margins_mse(student, teacher, mask), atol=1e-12)
    loss = all_margins_mse(student, student.detach() + 2, mask)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-24)
    assert grad.abs().max().item() < 1e-12


def test_what_is_masked_gets_no_gradient(scores):
    student, teacher, mask = scores
    (grad,) = torch.autograd.grad(all_margins_mse(student, teacher, mask), student)
    assert (grad[~mask] == 0).all()
    assert (grad[3] == 0).all()
    assert (grad[mask][:9] != 0).all()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"scores must be \(B, D\), both; got \(2, 3\) and \(2, 2\)"):
        all_margins_mse(torch.zeros(2, 3), torch.zeros(2, 2))
