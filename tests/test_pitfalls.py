"""The mathematics of notebook 02 that its cells do not assert themselves, in random worlds."""

import math

import pytest
import torch
from lab import field
from pitfalls import (
    TEACHERS,
    Museum,
    at,
    full,
    goal,
    group,
    jsd,
    jsd_in,
    kl_div,
    of,
    other_eos,
    own_f,
    plus,
    ratio_and_kept_mass,
    reverse_kl,
    rewarded,
    sampler,
    top_k,
    top_p,
)

from nano_opd import exact, grpo, policy_gradient

WORLDS = Museum(1.0, 2).worlds


def each(world, loss):
    """The gradient of every response."""
    return exact.estimates(world, loss, torch.arange(len(world.tokens))[:, None])


@pytest.mark.parametrize("world", WORLDS)
def test_a_forgotten_detach_multiplies_the_correction_by_logp_and_a_separate_f_is_opdplus(world):
    def correction_times_logp(tokens, mask, p, q):
        logp = at(tokens, p)
        x = torch.where(mask, at(tokens, q) - logp, 0.0).detach()  # drops nothing: an advantage is a constant
        A = -jsd.f(x) + torch.exp(x) * jsd.f_prime(x) * logp.detach()  # −f + u f′ ln p
        return policy_gradient.loss(logp, A, mask)

    assert torch.allclose(each(world, own_f(False, False)), each(world, correction_times_logp))
    assert torch.allclose(each(world, own_f(True, True)), each(world, exact.sampled(plus(jsd))))


def test_who_may_stay_at_the_teacher():
    """At p = q a top-k sum without its tail has a gradient. With a bucket or −p + q it has none, and stays above 0."""
    summed = lambda tail: of(lambda tokens, mask, p, q: policy_gradient.reduce(top_k("teacher", tail)(p, q), mask))
    for world in Museum(0.0, 2).worlds:
        assert summed("")(world).mean.norm() > 0.01
        assert all(summed(tail)(world).mean.norm() < 1e-12 for tail in ("bucket", "−p + q"))
    for world in WORLDS:
        logits = world.student(world.theta, world.tokens), world.teacher_logits
        assert top_k("teacher")(*logits).min() < 0 < 1e-12 + top_k("teacher", "bucket")(*logits).min()
        assert top_k("teacher", "−p + q")(*logits).min() > -1e-12


def test_the_smallest_top_k_below_zero():
    """Student (0.6, 0.4), teacher (0.9, 0.1), k = 1: below 0, so clamp_min(0) leaves no gradient; the KL is 0.311."""
    p, q = torch.tensor([0.6, 0.4]).log().requires_grad_(), torch.tensor([0.9, 0.1]).log()
    assert top_k("teacher", k=1)(p, q).item() == pytest.approx(0.6 * math.log(0.6 / 0.9))
    assert torch.autograd.grad(top_k("teacher", k=1)(p, q).clamp_min(0), p)[0].abs().max() == 0
    assert top_k("teacher", "bucket", k=1)(p, q).item() == pytest.approx(0.311, abs=5e-4)


@pytest.mark.parametrize("world", WORLDS)
def test_the_importance_ratio_of_a_truncated_sampler_is_the_kept_mass(world):
    for truncate in (top_p, lambda x: x.masked_fill(x < x.topk(2).values[..., -1:], -torch.inf)):
        ratio, kept, share = ratio_and_kept_mass(world, truncate)
        assert torch.allclose(ratio, kept) and ratio.min() < 0.99 and float(share.sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_as_its_own_teacher_finds_the_wrong_one(name):
    for world in WORLDS:
        p = world.student(world.theta, world.tokens)
        assert (at(world.tokens, TEACHERS[name](p)) - at(world.tokens, p))[world.mask].abs().max() > 0.1


def test_against_a_uniform_teacher_the_jsd_of_a_confident_student_nears_ln_2():
    gaps = []
    for size in (5, 100, 50_257):
        sure = torch.full((size,), -30.0).double().index_fill(0, torch.tensor(0), 30.0)
        gaps.append(math.log(2) - jsd_in(torch.float64)(sure, torch.zeros_like(sure)).item())
    assert gaps == sorted(gaps, reverse=True) and 0 < gaps[-1] < 1e-3


def test_a_brief_teacher_with_another_eos_teaches_long_responses():
    world = WORLDS[0]
    brief = world.teacher_logits + 3 * torch.eye(5).double()[4]
    short, long = (sampler(world, lambda _, q=q: q) for q in (brief, other_eos(brief)))
    length = lambda w: (w.probability() @ w.mask.sum(1).double()).item()
    assert length(long) > 2 * length(short)


@pytest.mark.parametrize("world", WORLDS)
def test_the_generalised_jsd_divided_by_its_small_weight_is_a_kl(world):
    g = goal(reverse_kl)(world)
    mean = full(field.jsd(0.999))(world).mean
    assert mean.norm() < 0.01 * g.norm() and (mean / 0.001 - g).norm() < 0.01 * g.norm()


@pytest.mark.parametrize("world", WORLDS)
def test_kl_div_is_the_kl_from_its_second_argument(world):
    assert torch.allclose(of(kl_div("teacher"))(world).mean, goal(reverse_kl)(world))
    assert not torch.allclose(of(kl_div("student"))(world).mean, goal(reverse_kl)(world), rtol=0.05)


def test_the_verifier_of_the_museum_rewards_even_sums():
    world = Museum(1.0, 0).small[0]

    def plain(tokens, mask, p, q):
        A = grpo.advantage((tokens.sum(1) % 2 == 0).double(), 2, normalize_std=False)
        return policy_gradient.loss(at(tokens, p), A[:, None].expand(mask.shape), mask)

    assert torch.allclose(rewarded(world), exact.moments(world, plain, batch_size=2).mean)
    assert group(lambda A, *_: A, lambda s: s < 0)(world).mean.norm() == 0
