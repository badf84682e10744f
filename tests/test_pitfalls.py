"""The mathematics of notebook 02 that its cells do not assert themselves, in random worlds."""

import math

import pytest
import torch
from lab import field
from pitfalls import (
    TEACHERS,
    Museum,
    estimator_from_loss,
    estimator_of_prefixes,
    exact_gradient,
    f_times_logp,
    full_vocabulary,
    grpo_estimator,
    grpo_mean,
    jsd,
    jsd_computed_in,
    keep_top_k,
    keep_top_p,
    kl_div,
    kl_over_top_k,
    nothing_is_right,
    opdplus_advantage,
    ratio_and_kept_mass,
    reverse_kl,
    sampling_world,
    with_another_eos,
)

from nano_opd import exact, grpo, policy_gradient
from nano_opd.policy_gradient import logprobs_of as at

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

    assert torch.allclose(each(world, f_times_logp(detach_f=False)), each(world, correction_times_logp))
    assert torch.allclose(
        each(world, f_times_logp(detach_f=True, add_f=True)), each(world, exact.sampled(opdplus_advantage(jsd)))
    )


def test_who_may_stay_at_the_teacher():
    """At p = q a top-k sum without its tail has a gradient. With a bucket or −p + q it has none, and stays above 0."""
    summed = lambda tail: estimator_of_prefixes(kl_over_top_k("teacher", tail))
    for world in Museum(0.0, 2).worlds:
        assert summed("")(world).mean.norm() > 0.01
        assert all(summed(tail)(world).mean.norm() < 1e-12 for tail in ("bucket", "−p + q"))
    for world in WORLDS:
        logits = world.student(world.theta, world.tokens), world.teacher_logits
        assert kl_over_top_k("teacher")(*logits).min() < 0 < 1e-12 + kl_over_top_k("teacher", "bucket")(*logits).min()
        assert kl_over_top_k("teacher", "−p + q")(*logits).min() > -1e-12


def test_the_smallest_top_k_below_zero():
    """Student (0.6, 0.4), teacher (0.9, 0.1), k = 1: below 0, so clamp_min(0) leaves no gradient; the KL is 0.311."""
    p, q = torch.tensor([0.6, 0.4]).log().requires_grad_(), torch.tensor([0.9, 0.1]).log()
    assert kl_over_top_k("teacher", k=1)(p, q).item() == pytest.approx(0.6 * math.log(0.6 / 0.9))
    assert torch.autograd.grad(kl_over_top_k("teacher", k=1)(p, q).clamp_min(0), p)[0].abs().max() == 0
    assert kl_over_top_k("teacher", "bucket", k=1)(p, q).item() == pytest.approx(0.311, abs=5e-4)


@pytest.mark.parametrize("world", WORLDS)
def test_the_importance_ratio_of_a_truncated_sampler_is_the_kept_mass(world):
    for truncate in (keep_top_p, keep_top_k):
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
        gaps.append(math.log(2) - jsd_computed_in(torch.float64)(sure, torch.zeros_like(sure)).item())
    assert gaps == sorted(gaps, reverse=True) and 0 < gaps[-1] < 1e-3


def test_a_brief_teacher_with_another_eos_teaches_long_responses():
    world = WORLDS[0]
    brief = world.teacher_logits + 3 * torch.eye(5).double()[4]
    short, long = (sampling_world(world, lambda _, q=q: q) for q in (brief, with_another_eos(brief)))
    length = lambda w: (w.probability() @ w.mask.sum(1).double()).item()
    assert length(long) > 2 * length(short)


@pytest.mark.parametrize("world", WORLDS)
def test_the_generalised_jsd_divided_by_its_small_weight_is_a_kl(world):
    g = exact_gradient(reverse_kl)(world)
    mean = full_vocabulary(field.generalised_jsd(0.999))(world).mean
    assert mean.norm() < 0.01 * g.norm() and (mean / 0.001 - g).norm() < 0.01 * g.norm()


@pytest.mark.parametrize("world", WORLDS)
def test_kl_div_is_the_kl_from_its_second_argument(world):
    assert torch.allclose(estimator_from_loss(kl_div("teacher"))(world).mean, exact_gradient(reverse_kl)(world))
    assert not torch.allclose(
        estimator_from_loss(kl_div("student"))(world).mean, exact_gradient(reverse_kl)(world), rtol=0.05
    )


def test_the_verifier_of_the_museum_rewards_even_sums():
    world = Museum(1.0, 0).small[0]

    def plain(tokens, mask, p, q):
        A = grpo.advantage((tokens.sum(1) % 2 == 0).double(), 2, normalize_std=False)
        return policy_gradient.loss(at(tokens, p), A[:, None].expand(mask.shape), mask)

    assert torch.allclose(grpo_mean(world), exact.moments(world, plain, batch_size=2).mean)
    assert grpo_estimator(verifier=nothing_is_right)(world).mean.norm() == 0
