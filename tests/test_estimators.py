"""OPD, OPD+, GKD and the policy gradient on hand-made batches: signs, masks, returns, detached or not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_opd import divergences, gkd, opd, opdplus, policy_gradient, topk
from nano_opd.checks import NumericalFault

NAMES = [*divergences.DIVERGENCES, "alpha=0.5"]


@pytest.fixture
def batch():
    """log u (6, 5) with responses of length 5, 4, …, 1 and 0."""
    log_u = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([[5], [4], [3], [2], [1], [0]])
    return log_u, mask


@pytest.fixture
def logits():
    student, teacher = torch.randn(2, 6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return student, teacher


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_advantages_equal_the_formula_term_by_term(name, gamma, batch):
    log_u, mask = batch
    d = divergences.get(name)
    baseline = torch.arange(30, dtype=torch.float64).view(6, 5) + 1
    for method, own in [(opd, d.reward), (opdplus, d.w_f)]:
        A = method.advantage(log_u, mask, d, gamma)
        torch.testing.assert_close(
            method.advantage(log_u, mask, d, gamma, baseline), A - torch.where(mask, baseline, 0.0)
        )
        for b in range(6):
            L = int(mask[b].sum())
            for n in range(5):
                want = 0.0
                if n < L:
                    want = own(log_u[b, n]).item()
                    want += sum(gamma ** (m - n) * d.reward(log_u[b, m]).item() for m in range(n + 1, L))
                assert A[b, n].item() == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("method", [opd, opdplus])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_what_stands_behind_the_mask_never_matters(method, gamma, batch):
    log_u, mask = batch
    d = divergences.get("pearson_chi2")
    dirty = torch.where(mask, log_u, torch.tensor([float("inf"), float("-inf"), float("nan"), 90.0, -90.0]))
    torch.testing.assert_close(method.advantage(dirty, mask, d, gamma), method.advantage(log_u, mask, d, gamma))


@pytest.mark.parametrize("method", [opd, opdplus])
def test_advantages_and_baselines_are_detached(method, batch, logits):
    log_u, mask = batch
    student, teacher = logits
    d = divergences.get("jsd")
    assert not method.exact_baseline(student.requires_grad_(), teacher, d).requires_grad
    assert not method.exact_baseline(student.detach(), teacher.requires_grad_(), d).requires_grad
    assert not method.advantage(log_u, mask, d, 0.5, log_u.clone().requires_grad_()).requires_grad
    assert not method.advantage(log_u.requires_grad_(), mask, d, 0.5).requires_grad


def test_the_teacher_is_not_trained(logits):
    """One network may be both (self-distillation): its gradient is the student's alone."""
    jsd = divergences.get("jsd")
    mask = torch.ones(6, 5, dtype=torch.bool)
    for loss in (
        lambda p, q: gkd.loss(p, q, mask, jsd),
        lambda p, q: topk.loss(p, q, mask.long(), mask, jsd.w_f, 2),
    ):
        student = logits[0].clone().requires_grad_()
        teacher = logits[1].clone().requires_grad_()
        loss(student, teacher).backward()
        assert student.grad.norm() > 0 and teacher.grad is None


def test_what_a_top_k_is_not_given_is_refused_and_nothing_behind_the_mask_reaches_it(logits):
    mask = torch.arange(5) < torch.tensor([[5], [4], [3], [2], [1], [0]])
    tokens = torch.zeros(6, 5, dtype=torch.long)
    A = divergences.get("jsd").w_f
    gradients = []
    for behind in (0.0, torch.nan):
        student = logits[0].where(mask.unsqueeze(-1), behind).requires_grad_()
        teacher = logits[1].where(mask.unsqueeze(-1), behind).requires_grad_()
        topk.loss(student, teacher, tokens, mask, A, 2).backward()
        gradients.append(student.grad)
    assert torch.equal(*gradients) and (gradients[0] != 0).any(-1).sum() == mask.sum()
    for wrong, match in (
        ({"k": -1}, "must not be negative"),
        ({"tokens": tokens[:, :4]}, "shapes"),
        ({"mask": mask.float()}, "bool"),
        ({"teacher_logits": logits[1][..., :2]}, "shapes"),
    ):
        given = dict(student_logits=logits[0], teacher_logits=logits[1], tokens=tokens, mask=mask, advantage=A, k=2)
        with pytest.raises(ValueError, match=match):
            topk.loss(**given | wrong)


def test_a_top_token_that_the_student_cannot_say_adds_nothing_where_its_advantage_is_finite():
    """Its p A log p is 0 · ½ · (−∞): under total variation only the sampled token, outside the top 1, has a loss."""
    student = torch.tensor([[[-math.inf, 0.0, 1.0, 2.0]]], requires_grad=True)
    teacher = torch.tensor([[[3.0, 0.0, 1.0, 2.0]]])
    sampled = torch.tensor([[3]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = topk.loss(student, teacher, sampled, mask, divergences.get("tv").w_f, k=1)
    loss.backward()
    student_logp = student.detach().log_softmax(-1)[0, 0, 3]
    assert loss.item() == pytest.approx(0.5 * student_logp.item())  # the teacher is less sure of it: A = −½
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_a_few_responses_at_a_time_are_all_of_them(stop_gradient, logits, monkeypatch):
    """As for a large vocabulary: the same loss, gradient and baseline as in one piece."""
    mask = torch.arange(5) < torch.tensor([[5], [4], [3], [2], [1], [0]])
    d = divergences.get("jsd")
    got = []
    for rows in (99, 4, 1):
        monkeypatch.setattr(policy_gradient, "rows_at_once", lambda *_, rows=rows: rows)
        student = logits[0].clone().requires_grad_()
        loss = gkd.loss(student, logits[1], mask, d, stop_gradient)
        (loss + topk.loss(student, logits[1], mask.long(), mask, d.w_f, 2)).backward()
        within = opdplus.exact_baseline(
            student.where(mask[..., None], torch.nan), logits[1], d, mask
        )  # as NaN behind it
        assert torch.equal(within[mask], opdplus.exact_baseline(*logits, d)[mask]) and (within[~mask] == 0).all()
        got.append((loss.detach(), student.grad, opdplus.exact_baseline(*logits, d)))
    for loss, gradient, baseline in got[1:]:
        torch.testing.assert_close(loss, got[0][0])
        torch.testing.assert_close(gradient, got[0][1])
        assert torch.equal(baseline, got[0][2])
    monkeypatch.undo()
    assert policy_gradient.rows_at_once(256, 50257) == 1 and policy_gradient.rows_at_once(32, 19) > 2000


@pytest.mark.parametrize("name", NAMES)
def test_exact_baselines_are_the_means_over_the_vocabulary(name, logits):
    student, teacher = logits
    d = divergences.get(name)
    p = student.softmax(-1)
    u = (teacher.softmax(-1) / p).log()
    torch.testing.assert_close(opd.exact_baseline(student, teacher, d), (p * d.reward(u)).sum(-1))
    torch.testing.assert_close(opdplus.exact_baseline(student, teacher, d), (p * d.w_f(u)).sum(-1))
    assert (opd.exact_baseline(student, teacher, d) < 0).all()  # −D_f


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_gkd_is_the_mean_over_the_token_of_the_sampled_gradient(name, stop_gradient, logits):
    """Σ_v p_v A_v ∇log p_v at every prefix, with and without the exact baseline, against autograd through the loss."""
    student, teacher = logits
    mask = torch.arange(5) < torch.tensor([[5], [4], [3], [2], [1], [0]])
    d = divergences.get(name)
    method = opd if stop_gradient else opdplus
    student = student.requires_grad_()
    (got,) = torch.autograd.grad(gkd.loss(student, teacher, mask, d, stop_gradient), student)
    for with_baseline in (False, True):
        baseline = method.exact_baseline(student, teacher, d) if with_baseline else None
        logp = student.log_softmax(-1)
        total = torch.zeros((), dtype=torch.float64)
        for v in range(7):  # every token in turn, weighted by its probability
            log_u = teacher.log_softmax(-1)[..., v] - logp[..., v].detach()
            A = method.advantage(log_u, mask, d, 0.0, baseline)
            total = total + policy_gradient.loss(logp[..., v], A * logp[..., v].detach().exp(), mask)
        (want,) = torch.autograd.grad(total, student)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_gkd_value_is_the_divergence(logits):
    student, teacher = logits
    mask = torch.ones(6, 5, dtype=torch.bool)
    p = student.softmax(-1)
    q = teacher.softmax(-1)
    loss = gkd.loss(student, teacher, mask, divergences.get("forward_kl"))
    torch.testing.assert_close(loss, (q * (q / p).log()).sum() / 6)


def test_a_token_the_teacher_forbids_is_no_accident(logits):
    """q(v) = 0: a divergence that is finite there has a finite gradient, −Σ_v w ∇p; others are infinite."""
    student, teacher = logits
    teacher[..., 2] = -torch.inf
    mask = torch.ones(6, 5, dtype=torch.bool)
    for name in NAMES:
        d = divergences.get(name)
        student = student.detach().requires_grad_()
        loss = gkd.loss(student, teacher, mask, d)
        if name in ("reverse_kl", "k3", "neyman_chi2"):
            assert loss == torch.inf
        else:
            loss.backward()
            assert loss.isfinite() and student.grad.isfinite().all(), name
            p = student.detach().softmax(-1)
            w = d.w_f(teacher.log_softmax(-1) - p.log())
            want = -p * (w - (p * w).sum(-1, keepdim=True)) / 6  # −Σ_v ∇p_v w_v by hand
            torch.testing.assert_close(student.grad, want, rtol=1e-8, atol=1e-10)


def test_the_policy_gradient_is_minus_A_grad_logp_over_B(batch):
    A, mask = batch
    logp = (-torch.rand(6, 5, dtype=torch.float64)).requires_grad_()
    policy_gradient.loss(logp, A, mask).backward()
    torch.testing.assert_close(logp.grad, torch.where(mask, -A / 6, 0.0))
    logp.grad = None
    policy_gradient.loss(logp, A, mask, "token_mean").backward()
    torch.testing.assert_close(logp.grad, torch.where(mask, -A / 15, 0.0))
    logp.grad = None
    policy_gradient.loss(logp, A, mask, "sequence_mean").backward()
    torch.testing.assert_close(logp.grad, torch.where(mask, -A / (6 * mask.sum(1, keepdim=True)), 0.0))


def test_a_longer_cap_or_infinite_padding_does_not_change_the_loss(batch):
    A, mask = batch
    logp = -torch.rand(6, 5, dtype=torch.float64)
    padded = [torch.nn.functional.pad(x, (0, 3), value=v) for x, v in [(logp, -torch.inf), (A, 0.0), (mask, False)]]
    torch.testing.assert_close(policy_gradient.loss(*padded), policy_gradient.loss(logp, A, mask))


def test_misuse_is_refused(batch, logits):
    log_u, mask = batch
    d = divergences.get("jsd")
    with pytest.raises(ValueError, match="carries a gradient"):
        policy_gradient.loss(log_u, log_u.clone().requires_grad_(), mask)
    with pytest.raises(ValueError, match="mask must be bool .B, R., not torch.float64"):
        policy_gradient.loss(log_u, log_u, mask.double())
    with pytest.raises(ValueError, match=r"logp \(6, 5\), advantage \(1, 5\)"):
        policy_gradient.loss(log_u, log_u[:1], mask)
    with pytest.raises(ValueError, match="unknown normalize 'mean'"):
        policy_gradient.loss(log_u, log_u, mask, "mean")
    for gamma in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
            opd.advantage(log_u, mask, d, gamma)
        with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
            opdplus.advantage(log_u, mask, d, gamma)
    for method in (opd, opdplus):
        with pytest.raises(ValueError, match=r"log_u \(6, 5\), mask \(6, 4\)"):
            method.advantage(log_u, mask[:, :4], d)
        with pytest.raises(ValueError, match=r"baseline \(6, 1\)"):
            method.advantage(log_u, mask, d, 0.0, log_u[:, :1])
        for bad in (torch.nan, torch.inf):
            with pytest.raises(ValueError, match="holds NaN or .inf"):
                method.advantage(torch.full_like(log_u, bad), mask, d)
        with pytest.raises(ValueError, match="log_u must be floating-point, not torch.int64"):
            method.advantage(log_u.long(), mask, d)
    with pytest.raises(ValueError, match="is NaN"):
        gkd.loss(logits[0] * torch.nan, logits[1], mask, d)
    with pytest.raises(ValueError, match="shapes must be equal"):
        gkd.loss(logits[0], logits[1][:, :, :6], mask, d)
    with pytest.raises(ValueError, match="shapes must be equal"):
        gkd.loss(*logits, mask[:, :4], d)


@given(data=st.data(), lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_rows_are_independent_and_empty_responses_weigh_nothing(data, lengths):
    """The advantages of a batch are those of its rows alone; an empty response adds nothing but its place in B."""
    name = data.draw(st.sampled_from(NAMES))
    gamma = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    values = data.draw(st.lists(st.floats(-20, 20), min_size=6 * len(lengths), max_size=6 * len(lengths)))
    log_u = torch.tensor(values, dtype=torch.float64).view(len(lengths), 6)
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    d = divergences.get(name)
    for method in (opd, opdplus):
        A = method.advantage(log_u, mask, d, gamma)
        assert A.isfinite().all() and (A[~mask] == 0).all()
        for b, L in enumerate(lengths):
            if L:
                alone = method.advantage(log_u[b : b + 1, :L], mask[b : b + 1, :L], d, gamma)
                torch.testing.assert_close(A[b : b + 1, :L], alone)
        total = policy_gradient.loss(log_u, A, mask) * len(lengths)
        parts = [policy_gradient.loss(log_u[b : b + 1], A[b : b + 1], mask[b : b + 1]) for b in range(len(lengths))]
        torch.testing.assert_close(total, sum(parts))


@pytest.mark.parametrize("name,limit", [("jsd", -math.log(2) / 2), ("forward_kl", 0.0), ("tv", -0.5)])
def test_a_sampled_token_that_the_teacher_forbids_has_the_limit_for_its_advantage(name, limit):
    A = opdplus.advantage(torch.tensor([[-math.inf, 0.0]]), torch.ones(1, 2, dtype=torch.bool), divergences.get(name))
    assert A[0, 0].item() == pytest.approx(limit) and A[0, 1].isfinite()


@pytest.mark.parametrize("method", [opd, opdplus])
def test_an_infinite_advantage_is_refused_in_one_sentence(method):
    """Reverse KL pays −∞ for a token that the teacher forbids; behind the mask nothing is paid."""
    log_u = torch.tensor([[-math.inf, 0.0]])
    with pytest.raises(NumericalFault, match="under reverse_kl is not finite: the teacher gives a sampled token no"):
        method.advantage(log_u, torch.ones(1, 2, dtype=torch.bool), divergences.get("reverse_kl"))
    A = method.advantage(log_u, torch.tensor([[False, True]]), divergences.get("reverse_kl"))
    assert A.isfinite().all()
