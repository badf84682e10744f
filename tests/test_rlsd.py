"""RLSD against a scalar loop in plain Python floats, and the promises of its clip."""

import math
import random

import pytest
import torch

from nano_opd import rlsd


def scalar_loop(A, teacher, student, mask, lam, eps_w, negative_only, span):
    """The paper's three lines, one token at a time; A of B floats, the rest B lists of R."""
    rows = []
    for a, t_row, s_row, m_row, span_row in zip(A, teacher, student, mask, span):
        row = []
        for t, s, m, inside in zip(t_row, s_row, m_row, span_row):
            sign = (a > 0) - (a < 0)
            w = math.exp(sign * (t - s)) if m else 1.0
            clipped = min(max(w, 1 - eps_w), 1 + eps_w)
            weight = (1 - lam) + lam * clipped
            if (negative_only and a >= 0) or not inside:
                weight = 1.0
            row.append(a * weight if m else 0.0)
        rows.append(row)
    return rows


@pytest.fixture
def batch():
    """A of both signs and 0, log-probs and mask of 9 responses of up to 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    A = torch.tensor([1.5, -0.7, 0.0, 1.0, -1.0, 0.3, -2.0, 0.0, 0.9])
    teacher, student = -3 * torch.rand(2, 9, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 5, 4, 3, 2, 1, 6, 6, 6])[:, None]
    return A, teacher, student, mask


def drawn(B, R, draw):
    """Return B rows of R numbers, each drawn."""
    numbers = [draw() for _ in range(B * R)]
    return [numbers[b * R : (b + 1) * R] for b in range(B)]


def test_it_equals_a_scalar_loop_over_random_cases():
    rng = random.Random(0)
    for case in range(300):
        B = rng.randint(1, 6)
        R = rng.randint(1, 7)
        A = [rng.choice([0.0, rng.gauss(0, 1)]) for _ in range(B)]
        teacher = drawn(B, R, lambda: -rng.expovariate(0.7))
        student = drawn(B, R, lambda: -rng.expovariate(0.7))
        lengths = [rng.randint(1, R) for _ in range(B)]
        mask = [[n < length for n in range(R)] for length in lengths]
        span = drawn(B, R, lambda: rng.random() < 0.6)
        lam = rng.random()
        eps_w = rng.choice([0.05, 0.2, 0.8, 3.0])
        negative_only = rng.random() < 0.3
        want = scalar_loop(A, teacher, student, mask, lam, eps_w, negative_only, span)
        got = rlsd.advantage(
            torch.tensor(A, dtype=torch.float64),
            teacher_logp=torch.tensor(teacher, dtype=torch.float64),
            student_logp=torch.tensor(student, dtype=torch.float64),
            mask=torch.tensor(mask),
            lam=lam,
            eps_w=eps_w,
            negative_only=negative_only,
            span=torch.tensor(span),
        )
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=f"case {case}")


@pytest.mark.parametrize("lam,eps_w", [(0.0, 0.2), (0.0, 5.0), *((n / 37, 0.0) for n in range(1, 38))])
def test_lambda_zero_and_eps_zero_are_grpo_bit_for_bit(lam, eps_w, batch):
    A, teacher, student, mask = batch
    teacher = teacher.clone()
    teacher[:, 1] = -math.inf  # not even a token the teacher forbids
    got = rlsd.advantage(A, teacher, student, mask, lam, eps_w)
    assert torch.equal(got, torch.where(mask, A[:, None], 0.0))


@pytest.mark.parametrize("lam", [0.5, 1.0])
@pytest.mark.parametrize("eps_w", [0.2, 0.99, 1.0, 10.0])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_sign_never_changes_and_the_size_stays_inside_the_clip(lam, eps_w, scale, batch):
    A, teacher, student, mask = batch
    got = rlsd.advantage(A, scale * teacher, student, mask, lam, eps_w)
    low = 1 - lam * min(eps_w, 1.0)
    high = 1 + lam * eps_w
    size = (got.abs() / A.abs()[:, None])[mask & (A != 0)[:, None]]
    assert (size >= low - 1e-6).all() and (size <= high + 1e-6).all()
    assert torch.where(mask, got * A[:, None] >= 0, got == 0).all()
    if eps_w < 1:
        assert (got[mask].sign() == A[:, None].sign().expand_as(got)[mask]).all()
    assert (got[A == 0] == 0).all()  # groups that teach nothing still teach nothing


def test_credit_goes_where_the_reference_agrees_and_blame_where_it_does_not():
    """Δ = +1 at the first token and −1 at the second."""
    teacher = torch.tensor([[-1.0, -2.0]] * 2)
    student = torch.tensor([[-2.0, -1.0]] * 2)
    mask = torch.ones(2, 2, dtype=torch.bool)
    right, wrong = rlsd.advantage(torch.tensor([1.0, -1.0]), teacher, student, mask, 0.5, 0.2)
    torch.testing.assert_close(right, torch.tensor([1.1, 0.9]))
    torch.testing.assert_close(wrong, torch.tensor([-0.9, -1.1]))


def test_negative_only_and_the_span_leave_the_rest_to_grpo(batch):
    A, teacher, student, mask = batch
    plain = torch.where(mask, A[:, None], 0.0)
    full = rlsd.advantage(A, teacher, student, mask, 1.0, 0.5)
    got = rlsd.advantage(A, teacher, student, mask, 1.0, 0.5, negative_only=True)
    assert torch.equal(got, torch.where((A < 0)[:, None], full, plain)) and not torch.equal(got, full)
    span = torch.arange(6) < 2
    got = rlsd.advantage(A, teacher, student, mask, 1.0, 0.5, span=span.expand(9, 6))
    assert torch.equal(got, torch.where(span, full, plain)) and not torch.equal(got, full)


def test_what_stands_behind_the_mask_never_matters_and_nothing_carries_a_gradient(batch):
    A, teacher, student, mask = batch
    dirty = torch.where(mask, teacher, torch.tensor([math.inf, -math.inf, math.nan, 999.0, -999.0, 0.0]))
    clean = rlsd.advantage(A, teacher, student, mask, lam=0.5, eps_w=0.2)
    assert torch.equal(rlsd.advantage(A, dirty, student, mask, lam=0.5, eps_w=0.2), clean)
    teacher.requires_grad_()
    student.requires_grad_()
    assert not rlsd.advantage(A, teacher, student, mask, lam=0.5, eps_w=0.2).requires_grad


def test_the_clipped_fraction_counts_the_tokens_that_the_clip_binds(batch):
    A, teacher, student, mask = batch
    bound = 0
    count = 0
    for b in range(9):
        for n in range(6):
            if mask[b, n] and A[b] != 0:
                w = math.exp(math.copysign(1, A[b]) * (teacher[b, n] - student[b, n]))
                bound = bound + (not 0.7 <= w <= 1.3)
                count = count + 1
    assert rlsd.clip_fraction(A, teacher, student, mask, 0.3).item() == pytest.approx(bound / count)
    assert rlsd.clip_fraction(torch.zeros(9), teacher, student, mask, 0.3).item() == 0


def test_lambda_stays_or_falls_to_zero():
    assert [rlsd.lam_at(step, 0.5) for step in (0, 1, 1000)] == [0.5] * 3
    assert [rlsd.lam_at(step, 0.8, 4) for step in range(6)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
    for step, decay in [(1, -1), (-1, 0), (-1, 5)]:
        with pytest.raises(ValueError, match="must not be negative"):
            rlsd.lam_at(step, 0.5, decay)


def test_misuse_is_refused(batch):
    A, teacher, student, mask = batch
    for lam in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\]"):
            rlsd.advantage(A, teacher, student, mask, lam, 0.2)
    for eps_w in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="eps_w must be finite"):
            rlsd.advantage(A, teacher, student, mask, 0.5, eps_w)
    with pytest.raises(ValueError, match="shapes must be equal"):
        rlsd.advantage(A, teacher, student[:, :4], mask, 0.5, 0.2)
    with pytest.raises(ValueError, match=r"advantage \(3,\), responses \(9,\)"):
        rlsd.advantage(A[:3], teacher, student, mask, 0.5, 0.2)
