"""The table of the field: each row's advantage is the gradient of what the row says, or of nothing; by enumeration."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from lab.field import (
    LAMBDA,
    ROWS,
    generalised_jsd,
    in_top_k,
    reference,
    skewed_forward_kl,
    skewed_reverse_kl,
    target,
)
from torch import exp

from nano_opd import divergences, exact
from nano_opd.exact.judge import STUDENTS, TEACHER, judge, paths, update

BY_NAME = {row.name: row for row in ROWS}
Z, TEACHERS = 1.5 * torch.randn(2, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
P, Q = Z.log_softmax(-1), TEACHERS.log_softmax(-1)
X = torch.linspace(-6, 6, 100, dtype=torch.float64)
REVERSE, FORWARD = divergences.get("reverse_kl"), divergences.get("forward_kl")
FIXED, ENDS = (exact.World.of(exact.random_tabular(3, 3, 0), exact.random_tabular(3, 3, 1), 3, 3, e) for e in (None, 2))
close = torch.testing.assert_close


def descent(of, log_q=Q, z=Z):
    """−∇ of a function of both distributions in the student's logits, by autograd, which knows nothing of A."""
    z = z.clone().requires_grad_()
    return -torch.autograd.grad(of(z.log_softmax(-1), log_q).sum(), z)[0]


@cache
def verdict(name):
    return judge(BY_NAME[name].advantage)  # it is told the advantage alone


def value(d):
    return lambda p, q: (exp(p) * d.f(q - p)).sum(-1)


def at(tokens, logits):
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.descends])
def test_what_each_advantage_descends(name):
    close(update(BY_NAME[name].advantage, P, Q), descent(BY_NAME[name].descends), rtol=1e-7, atol=1e-9)


def test_the_judge_finds_a_gradient_where_the_row_names_a_function():
    for row in ROWS:
        v = verdict(row.name)
        assert (v.gradient and v.length > 0.01) == (row.descends is not None), row.name
        assert v.wrong or row.descends


def test_the_names_that_the_judge_finds():
    names = {name: verdict(name).name for name in BY_NAME if verdict(name).length > 0.01}
    assert {name: found for name, found in names.items() if found} == {
        "OPD, reverse KL": "1 reverse_kl",
        "OPD+, every f": "1 jsd",
        "GKD, JSD(β)": "1 JSD(β=0.3)",
        "TOP-D, the token's own reward": "1.25 JSD(β=0.2)",
        "TV-OPD, before its shared factor": "2 tv",
        "k2 as a loss": "1 reverse_kl",
        "k3 as a loss": "1 forward_kl",
        "k3 as a reward": "1 reverse_kl − 1 forward_kl",
        "k1 or k3 as a loss times p/b, both differentiated": "1 reverse_kl",
        "top k and a sampled tail": "1 reverse_kl",
        "MiniLLM, single step": "1 reverse_kl",
    }


def test_which_rows_lead_to_the_teacher():
    """All but these, from 55 students of 55."""
    away = {name for name in BY_NAME if verdict(name).arrive < 55}
    assert away == {
        "OPD, forward KL",
        "OPD, Jensen–Shannon",
        "k2 as a reward",
        "k3 as a reward",
        "k1 as a loss",
        "one constant for all tokens",
        "a constant for tokens less likely than τ",
        "G-OPD, ExOPD for λ > 1",
        "the same, its forward KL on the teacher's top k",
        "top k of the student, the rest dropped",
        "top k of the teacher, the rest dropped",
        "top k of the teacher, both renormalised",
    }


@pytest.mark.parametrize(
    "d",
    [generalised_jsd(0.3), skewed_forward_kl(0.2), skewed_reverse_kl(0.2), generalised_jsd(0.5)],
    ids=lambda d: d.name,
)
def test_the_mixtures_are_divergences(d):
    """f as written has the f′ and w_f as written, f(1) = 0, f″ > 0; and JSD(½) is that of divergences.py."""
    x = X.clone().requires_grad_()
    close(torch.autograd.grad(d.f(x).sum(), x)[0] * exp(-x), d.f_prime(x))
    close(d.w_f(X), -d.f(X) + exp(X) * d.f_prime(X), rtol=1e-9, atol=1e-9)
    assert d.f(torch.zeros(1)).abs() < 1e-7 and (d.f_prime(X).diff() > 0).all()
    if d.name == "JSD(β=0.5)":
        close(d.f(X), divergences.get("jsd").f(X), rtol=1e-9, atol=1e-12)


def test_the_ends_of_the_generalised_jsd():
    """It is β KL(q‖p) near 0 and (1−β) KL(p‖q) near 1."""
    small = 1e-5
    close(value(generalised_jsd(small))(P, Q) / small, value(FORWARD)(P, Q), rtol=1e-3, atol=0)
    close(value(generalised_jsd(1 - small))(P, Q) / small, value(REVERSE)(P, Q), rtol=1e-3, atol=0)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_skewed_divergences(alpha):
    """By their definitions as sums; the forward one's advantage is bounded, the reverse one's f never rises."""
    mixed = lambda a, b: torch.logaddexp(a + math.log(alpha), b + math.log(1 - alpha))  # ln(α a + (1−α) b)
    close(value(skewed_forward_kl(alpha))(P, Q), (exp(Q) * (Q - mixed(Q, P))).sum(-1))
    close(value(skewed_reverse_kl(alpha))(P, Q), (exp(P) * (P - mixed(P, Q))).sum(-1))
    assert (skewed_forward_kl(alpha).w_f(X) <= (1 - alpha) / alpha).all() and (
        skewed_reverse_kl(alpha).f(X).diff() < 0
    ).all()


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.9])
def test_topd_is_opdplus_under_the_generalised_jsd(alpha):
    A = lambda x: (alpha * exp(x) + 1 - alpha).log()
    close(A(X), generalised_jsd(alpha).w_f(X) / (1 - alpha))
    close(A(X), skewed_reverse_kl(1 - alpha).reward(X))  # and OPD under KL(p ‖ αq + (1−α)p)


@pytest.mark.parametrize("alpha", [0.5, 1, 2, 5])
def test_poweropd_is_a_bregman_divergence_and_no_f_divergence(alpha):
    def bregman(p, q):  # of φ(t) = t^(α+1)/(α+1): φ(p) − φ(q) − φ′(q) (p − q)
        phi = lambda t: exp((alpha + 1) * t) / (alpha + 1)
        return (phi(p) - phi(q) - exp(alpha * q) * (exp(p) - exp(q))).sum(-1)

    A = lambda p, q: exp(alpha * q) - exp(alpha * p)
    close(update(A, P, Q), descent(bregman))
    written = (exp((alpha + 1) * P) - (alpha + 1) * exp(alpha * Q + P) + alpha * exp((alpha + 1) * Q)).sum(-1)
    close(written / (alpha + 1), bregman(P, Q))
    assert (bregman(P, Q) > 0).all() and judge(A).generator is None
    halves = lambda x: torch.cat([x, x], -1) - math.log(2)  # no f-divergence changes when a token is cut in two
    assert ((bregman(halves(P), halves(Q)) - bregman(P, Q)).abs() > 0.1 * bregman(P, Q)).all()
    close(value(FORWARD)(halves(P), halves(Q)), value(FORWARD)(P, Q))
    if alpha == 1:
        close(bregman(P, Q), (exp(P) - exp(Q)).square().sum(-1) / 2)


def test_poweropd_is_reverse_kl_in_the_limit():
    A = lambda p, q: (exp(1e-6 * q) - exp(1e-6 * p)) / 1e-6
    close(update(A, P, Q), descent(value(REVERSE)), rtol=1e-4, atol=1e-6)


def test_exopd_ends_beyond_the_teacher():
    """At t ∝ ref (q/ref)^λ; a teacher of which the reference knows less is sharpened."""
    by_hand = exp(reference(Q)) * exp(LAMBDA * (Q - reference(Q)))
    close(exp(target(Q)), by_hand / by_hand.sum(-1, keepdim=True))
    row = BY_NAME["G-OPD, ExOPD for λ > 1"]
    assert update(row.advantage, target(Q), Q).abs().max() < 1e-12
    close(verdict(row.name).ends, exp(target(TEACHER.log())).expand(55, 3), rtol=0, atol=1e-3)
    entropy = lambda x: -(exp(x) * x).sum(-1)
    assert entropy(target(TEACHER.log())) < entropy(TEACHER.log()) - 0.005


def test_what_a_top_k_of_the_teacher_leaves():
    """Dropped tail: 1/e of the teacher's mass on the top k, in its proportions. Renormalised: only the proportions."""
    ends = verdict("top k of the teacher, the rest dropped").ends
    close(ends[:, 1:], TEACHER[1:].expand(55, 2) / math.e, rtol=0, atol=1e-3)
    renormalised = BY_NAME["top k of the teacher, both renormalised"].advantage
    ends = paths(renormalised, STUDENTS.log(), TEACHER.log())[-1]
    close(ends[:, 1] / ends[:, 2], torch.full((55,), 0.6, dtype=torch.float64), rtol=0, atol=0.02)
    assert ends[:, 0].max() > 0.7 and ends[:, 0].min() < 0.1


def test_a_bucket_leaves_the_tail_alone():
    """Equal on the top k and in the mass of the tail, however that is shared; and never more than reverse KL."""
    row = BY_NAME["top k of the teacher and a bucket for its tail"]
    shared = torch.where(in_top_k(Q), Q, torch.where(in_top_k(Q), -torch.inf, P).log_softmax(-1) + _tail(Q))
    close(shared.logsumexp(-1), torch.zeros(40, dtype=torch.float64))
    assert update(row.advantage, shared, Q).abs().max() < 1e-12 and (shared - Q).abs().max() > 0.1
    assert (row.descends(P, Q) < value(REVERSE)(P, Q)).all()


def _tail(x):
    return x.masked_fill(in_top_k(x), -torch.inf).logsumexp(-1, keepdim=True)


def test_a_sampled_tail_is_unbiased_and_quieter():
    """Σ_{v ∈ top k of p} p_v (x_v − 1) ∇ln p_v, and the sampled token's own where it lies outside."""

    def estimator(tokens, mask, p, q):
        log_p, A = p.log_softmax(-1), (q.log_softmax(-1) - p.log_softmax(-1) - 1).detach()
        kept = in_top_k(log_p)
        head = torch.where(kept, log_p.detach().exp() * A * log_p, 0.0).sum(-1)
        outside = torch.where(kept, 0.0, A * log_p).gather(-1, tokens[..., None])[..., 0]
        return -torch.where(mask, head + outside, 0.0).sum() / len(mask)

    got = exact.moments(ENDS, estimator)
    close(got.mean, exact.gradient(ENDS, REVERSE, "prefix"))
    whole = exact.moments(ENDS, exact.sampled(lambda log_u, mask, *_: torch.where(mask, log_u.detach() - 1, 0.0)))
    assert got.variance < 0.7 * whole.variance


def test_a_token_against_all_others():
    """The KL of {sampled token, rest}, the draw not differentiated, is on average the row's advantage."""

    def loss(z, log_q):
        p, q = z.log_softmax(-1), log_q
        rest = lambda x: torch.log1p(-exp(x))
        return (exp(p).detach() * (exp(p) * (p - q) + exp(rest(p)) * (rest(p) - rest(q)))).sum()

    z = Z.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss(z, Q), z)
    close(update(BY_NAME["KL of {the sampled token, all others}"].advantage, P, Q), -got)


def test_importance_weights_on_and_off_the_policy():
    """Tokens drawn from b. Weighted by p/b, all is as on the policy; k1 and k3 with the weight differentiated: reverse
    KL; without a weight it depends on b, and b = q makes ½ E_q[ln² u] of k1 as a reward and of k2 as a loss."""
    world = exact.World.of(exact.random_tabular(5, 1, 0), exact.random_tabular(5, 1, 1), 5, 1)
    b = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    teacher = world.teacher_logits[0, 0].log_softmax(-1)

    def mean(loss, drawn=b):
        def estimator(tokens, mask, p, q):
            log_p = at(tokens, p)
            return loss(log_p, at(tokens, q) - log_p, exp(log_p - drawn[tokens])).mean()

        return exact.moments(world, estimator, probability=exp(drawn)).mean[0]

    truth = {d.name: exact.gradient(world, d, "prefix")[0] for d in (REVERSE, FORWARD)}
    k1, k2, k3 = lambda x: -x, lambda x: x**2 / 2, lambda x: torch.expm1(x) - x
    for k in (k1, k3):
        close(mean(lambda log_p, x, rho, k=k: rho * k(x)), truth["reverse_kl"])
    assert (mean(lambda log_p, x, rho: rho * k2(x)) - truth["reverse_kl"]).norm() > 0.05
    close(mean(lambda log_p, x, rho: rho.detach() * k2(x)), truth["reverse_kl"])
    close(mean(lambda log_p, x, rho: rho.detach() * k3(x)), truth["forward_kl"])
    close(mean(lambda log_p, x, rho: -rho.detach() * x.detach() * log_p), truth["reverse_kl"])
    unweighted = -descent(
        BY_NAME["k1 as a reward on the teacher's samples, unweighted"].descends, teacher, world.theta[0]
    )
    close(mean(lambda log_p, x, rho: -x.detach() * log_p, teacher), unweighted)
    close(mean(lambda log_p, x, rho: k2(x), teacher), unweighted)


def test_a_constant_teaches_length_alone():
    """Summed over the tokens, nothing. Divided by the own length, c ∇E[1/L]: c < 0 makes responses longer."""
    constant = lambda log_u, mask, *_: torch.where(mask, -0.5, 0.0).double()
    assert exact.moments(ENDS, exact.sampled(constant)).mean.norm() < 1e-12
    shorter = lambda theta: (ENDS.probability(theta) / ENDS.mask.sum(1)).sum()
    got = exact.moments(ENDS, exact.sampled(constant, "sequence_mean")).mean
    close(got, 0.5 * torch.func.grad(shorter)(ENDS.theta))  # the loss descends, so E[1/L] falls
    length = lambda theta: (ENDS.probability(theta) * ENDS.mask.sum(1)).sum()
    assert length(ENDS.theta - 0.1 * got) > length(ENDS.theta) + 1e-4


def iw(log_u, mask, *_):
    """x_t (1 + γ (1 − Σ_{k<t} |x_k| / Σ_k |x_k|)), γ = ½."""
    size = torch.where(mask, log_u.abs(), 0.0).detach()
    before = (size.cumsum(1) - size) / size.sum(1, keepdim=True)
    return torch.where(mask, log_u.detach() * (1 + 0.5 * (1 - before)), 0.0)


def test_iw_opd_at_the_first_and_at_the_last_token():
    world = exact.World.of(exact.random_tabular(3, 2, 0), exact.random_tabular(3, 2, 1), 3, 2)
    got = -exact.moments(world, exact.sampled(iw)).mean
    p, q = world.theta.log_softmax(-1), exact.random_tabular(3, 2, 1)[1].log_softmax(-1)
    close(got[0], 1.5 * update(lambda p, q: q - p, p[0], q[0]))
    for first in range(3):  # the row of the table has c = 1
        c = (q - p)[0, first].abs()
        last = lambda p, q, c=c: (q - p) * (1 + 0.5 * (q - p).abs() / (c + (q - p).abs()))
        close(got[1 + first], p[0, first].exp() * update(last, p[1 + first], q[1 + first]))
        assert not judge(last).falls and judge(last).arrive == 55


def test_on_whole_responses_only_the_undiscounted_return_is_a_gradient():
    """The expected update in the logits of all prefixes: its Jacobian is symmetric for γ = 1. It is not for γ = 0,
    where prefixes are held fixed, nor in between, nor for MiniLLM's return over the length that is left."""
    world = exact.World.of(exact.random_tabular(3, 2, 0), exact.random_tabular(3, 2, 1), 3, 2)

    def asymmetry(gamma, left):
        def advantage(log_u, mask, *_):
            A = torch.stack([log_u[:, 0] + gamma * log_u[:, 1], log_u[:, 1]], 1).detach()
            return A / (torch.tensor([2.0, 1.0]) if left else 1)

        field = lambda theta: exact.moments(replace(world, theta=theta), exact.sampled(advantage)).mean.flatten()
        step = 1e-4 * torch.eye(12, dtype=torch.float64).view(12, 4, 3)
        J = torch.stack([(field(world.theta + e) - field(world.theta - e)) / 2e-4 for e in step])
        return ((J - J.T).norm() / (2 * J.norm())).item()

    assert asymmetry(1.0, left=False) < 1e-6
    assert min(asymmetry(0.0, False), asymmetry(0.95, False), asymmetry(1.0, True), asymmetry(0.95, True)) > 0.005
