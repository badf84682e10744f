"""GRPO's and RLSD's expected gradients, by enumerating every group of two responses in float64."""

import pytest
import torch

from nano_opd import exact, grpo, rlsd
from nano_opd.exact import World

V, R = 3, 2
CLIP = 0.2, 0.28


@pytest.fixture(scope="module", params=[None, V - 1], ids=["fixed", "eos"])
def world(request):
    return World.of(exact.random_tabular(V, R, 0), exact.random_tabular(V, R, 1), V, R, request.param)


def reward(tokens):
    """A verifier: right when the tokens have an even sum."""
    return (tokens.sum(-1) % 2 == 0).double()


def at(tokens, logits):
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def surrogate(advantage):
    """GRPO's loss on its first epoch, with what `advantage` makes of (A, P_T, P_S, mask)."""

    def estimator(tokens, mask, student_logits, teacher_logits):
        student_logp, teacher_logp = at(tokens, student_logits), at(tokens, teacher_logits)
        A = advantage(reward(tokens), teacher_logp, student_logp, mask)
        old_logp = student_logp.detach()  # drops nothing: the policy that sampled is a constant
        return grpo.clipped_surrogate(student_logp, old_logp, A, mask, *CLIP)

    return estimator


def plain(normalize_std):
    return surrogate(lambda rewards, *_: grpo.advantage(rewards, 2, normalize_std))


def reweighted(lam, eps_w):
    return surrogate(lambda rewards, *rest: rlsd.advantage(grpo.advantage(rewards, 2, False), *rest, lam, eps_w))


def mean(world, estimator):
    return exact.moments(world, estimator, batch_size=2).mean


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def weighted_score(world, weight):
    """Σ_y p(y) Σ_n weight_n(y) ∇log p(y_n|s_n), written as one sum over responses; weight (S, R)."""

    def total(theta):
        logp = at(world.tokens, world.student(theta, world.tokens))
        return (world.probability() * torch.where(world.mask, weight * logp, 0.0).sum(1)).sum()

    return torch.func.grad(total)(world.theta)


def test_grpo_is_the_gradient_of_the_expected_reward_up_to_a_factor(world):
    """Two responses share their mean, so A_1 = (R_1 − R_2)/2: half of ∇E[R]; dividing by a std of ½ makes it whole."""
    expected_reward = lambda theta: (world.probability(theta) * reward(world.tokens)).sum()
    ascent = torch.func.grad(expected_reward)(world.theta)
    assert relative(mean(world, plain(normalize_std=False)), -ascent / 2) < 1e-9
    assert relative(mean(world, plain(normalize_std=True)), -ascent * 0.5 / (0.5 + grpo.EPSILON)) < 1e-9


@pytest.mark.parametrize("lam,eps_w", [(0.5, 0.2), (1.0, 0.2), (1.0, 5.0)])
def test_rlsd_is_the_reward_weighted_by_the_evidence(lam, eps_w, world):
    """A right response is credited against each wrong partner with (P_T/P_S)^{+1}, a wrong one blamed with ^{−1}."""
    R_y, p = reward(world.tokens), world.probability()
    rate = (p * R_y).sum()
    u = (at(world.tokens, world.teacher_logits) - at(world.tokens, world.student(world.theta, world.tokens))).exp()
    bracket = lambda w: (1 - lam) + lam * w.clamp(1 - eps_w, 1 + eps_w)
    credit, blame = R_y * (1 - rate), (1 - R_y) * rate  # probability of a partner of the other kind
    weight = (credit[:, None] * bracket(u) - blame[:, None] * bracket(1 / u)) / 2
    got = mean(world, reweighted(lam, eps_w))
    assert relative(got, -weighted_score(world, weight)) < 1e-9
    assert relative(got, mean(world, plain(normalize_std=False))) > 1e-2  # and so no gradient of the reward any more


@pytest.mark.parametrize("lam,eps_w", [(0.0, 0.2), (1.0, 0.0)])
def test_rlsd_without_evidence_is_grpo(lam, eps_w, world):
    assert torch.equal(mean(world, reweighted(lam, eps_w)), mean(world, plain(normalize_std=False)))
