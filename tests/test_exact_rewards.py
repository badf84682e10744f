"""What a token is worth, and GRPO's and RLSD's expected gradients, by enumerating responses and groups in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from nano_opd import exact, grpo, policy_gradient, rlsd
from nano_opd.exact import rewards as exact_rewards
from nano_opd.exact.enumeration import World

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


# ------------------------------------------------------------------------------------------ values and token advantages


@pytest.fixture
def valued(world):
    """A graded reward, and V and Q of it."""
    graded = torch.linspace(0, 1, len(world.tokens), dtype=torch.float64)
    return graded, *exact_rewards.values(world, graded)


def test_values_are_the_mean_rewards_of_the_responses_that_share_a_prefix(world, valued):
    graded, V_, Q = valued
    p = world.probability()
    for y in range(len(world.tokens)):
        for n in range(int(world.mask[y].sum()) + 1):
            through = (world.tokens[:, :n] == world.tokens[y, :n]).all(1)
            torch.testing.assert_close(V_[y, n], (p * graded)[through].sum() / p[through].sum())
            if n < R and world.mask[y, n]:
                for v in range(V):
                    after = through & (world.tokens[:, n] == v)
                    torch.testing.assert_close(Q[y, n, v], (p * graded)[after].sum() / p[after].sum())


def test_token_advantages_have_mean_zero_and_add_up_to_the_reward(world, valued):
    graded, V_, Q = valued
    of_student = world.logps()[0].exp()
    bellman = (of_student * Q).sum(-1)
    torch.testing.assert_close(bellman[world.mask], V_[:, :-1][world.mask])
    torch.testing.assert_close(torch.where(world.mask, V_.diff(), 0.0).sum(1), graded - V_[:, 0])


def test_the_policy_gradient_with_token_advantages_is_the_gradient_of_the_expected_reward(world, valued):
    graded, V_, Q = valued
    ascent = exact_rewards.gradient(world, graded)
    step = 1e-6 * torch.randn(world.theta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    earned = [(world.probability(world.theta + sign * step) * graded).sum() for sign in (1, -1)]
    torch.testing.assert_close((ascent * step).sum(), (earned[0] - earned[1]) / 2, rtol=1e-6, atol=0)
    assert relative(weighted_score(world, V_.diff()), ascent) < 1e-9
    assert relative(weighted_score(world, V_[:, 1:]), ascent) < 1e-9  # Q, without a baseline
    assert weighted_score(world, V_[:, :-1]).norm() < 1e-12  # the baseline alone


@pytest.mark.parametrize("dead", [False, True])
def test_the_evidence_weight_of_the_student_conditioned_on_being_right_is_its_token_advantage(dead, world):
    """The Bayes identity. The teacher is known by what it says of whole responses: p(y) R(y)/E[R]."""
    R_y, p = reward(world.tokens), world.probability()
    R_y = torch.where(world.tokens[:, 0] == 0, 0.0, R_y) if dead else R_y  # no way to be right from there on
    ideal = exact_rewards.conditioned(world, R_y)
    teacher_logp, student_logp = at(world.tokens, ideal.teacher_logits), at(world.tokens, ideal.logps()[0])
    of_response = torch.where(world.mask, teacher_logp, 0.0).sum(1).exp()
    torch.testing.assert_close(of_response, p * R_y / (p * R_y).sum())
    torch.testing.assert_close(ideal.logps()[1].exp().sum(-1), torch.ones_like(teacher_logp))
    V_, _ = exact_rewards.values(world, R_y)
    alive = world.mask & (V_[:, :-1] > 0)
    w = rlsd.evidence_weight(torch.ones_like(p)[:, None], teacher_logp, student_logp, world.mask)
    torch.testing.assert_close(w[alive], (1 + V_.diff() / V_[:, :-1])[alive])
    assert torch.equal(w[~alive], torch.ones_like(w[~alive]))  # nothing to condition on, or no token
    assert (V_[:, 0, None] * w.cumprod(1) - V_[:, 1:]).abs().max() < 1e-12  # the running weight is the value


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_token_of_which_the_student_is_sure_has_hardly_any_advantage(scale):
    """|A_n| ≤ 1 − p(y_n|s_n) for a reward in [0, 1]: others can be no better or worse than 1, and weigh 1 − p."""
    for seed in range(20):
        world = World.of(exact.random_tabular(V, R, seed, scale), exact.random_tabular(V, R, seed), V, R)
        R_y = torch.rand(len(world.tokens), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        R_y = R_y.round() if seed % 2 else R_y
        A, p = exact_rewards.values(world, R_y)[0].diff(), at(world.tokens, world.logps()[0]).exp()
        assert (A.abs() <= 1 - p + 1e-12).all()


# ------------------------------------------------------------------------------------------------------ whole groups


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("name", ["grpo", "rlsd", "exact"])
def test_group_moments_are_those_of_the_enumerated_groups(name, group_size, world):
    R_y = reward(world.tokens)
    V_, _ = exact_rewards.values(world, R_y)
    number = {tuple(y): i for i, y in enumerate(world.tokens.tolist())}
    rows = lambda tokens: V_.diff()[[number[tuple(y)] for y in tokens.tolist()]]
    of = {
        "grpo": lambda A, *_: A[:, None].expand(-1, R),
        "rlsd": partial(rlsd.advantage, lam=0.7, eps_w=0.5),
        "exact": lambda A, teacher_logp, student_logp, mask: V_.diff(),
    }[name]

    def loss(tokens, mask, student_logits, teacher_logits):
        student_logp = at(tokens, student_logits)
        A = grpo.advantage(reward(tokens), group_size)
        A = rows(tokens) if name == "exact" else of(A, at(tokens, teacher_logits), student_logp, mask)
        return policy_gradient.loss(student_logp, A, mask)

    want = exact.moments(world, loss, batch_size=group_size)
    got = exact_rewards.group_moments(world, R_y, of, group_size)
    assert relative(got.mean, want.mean) < 1e-9
    torch.testing.assert_close(got.variance, want.variance)


@pytest.mark.parametrize("R_y", [torch.ones(9), torch.zeros(9), torch.linspace(0, 1, 9)], ids=["all", "none", "graded"])
def test_groups_need_right_and_wrong_responses(R_y):
    world = World.of(exact.random_tabular(V, R, 0), exact.random_tabular(V, R, 1), V, R)
    with pytest.raises(ValueError, match="0 for some responses and 1 for the others"):
        exact_rewards.group_moments(world, R_y.double(), lambda A, *_: A[:, None], 2)


# ------------------------------------------------------------------------------- what RLSD's mean is, over 20 worlds


def draw(seed, scale=1.0):
    """A random world and a random reward of 0 or 1."""
    world = World.of(exact.random_tabular(V, R, seed, scale), exact.random_tabular(V, R, seed + 1000), V, R)
    R_y = (torch.rand(len(world.tokens), generator=torch.Generator().manual_seed(seed)) < 0.4).double()
    if R_y.min() == R_y.max():
        R_y[0] = 1 - R_y[0]
    return world, R_y


TWENTY = [draw(seed) for seed in range(20)]
grpo_credit = lambda A, teacher_logp, *_: A[:, None].expand_as(teacher_logp)


def given(A):
    """The same credit whatever the group."""
    return lambda *_: A


def rlsd_credit(lam, eps_w):
    return partial(rlsd.advantage, lam=lam, eps_w=eps_w)


def compare(world, R_y, credit, G=4):
    """The cosine of the mean with ∇E[R], and noise per signal: the standard deviation over the mean's part along it."""
    ascent, m = exact_rewards.gradient(world, R_y), exact_rewards.group_moments(world, R_y, credit, G)
    signal = -(m.mean * ascent).sum() / ascent.norm()
    return (signal / m.mean.norm()).item(), (m.variance.sqrt() / signal).item()


def asymmetry(world, R_y, credit):
    """‖J − Jᵀ‖ / ‖J + Jᵀ‖ of the mean as a field of θ, by central differences: 0 for the gradient of anything."""

    def field(theta):
        moved = exact_rewards.conditioned(replace(world, theta=theta), R_y)
        return exact_rewards.group_moments(moved, R_y, credit, 2).mean.flatten()

    steps = 1e-5 * torch.eye(world.theta.numel(), dtype=torch.float64).unflatten(1, world.theta.shape)
    J = torch.stack([(field(world.theta + h) - field(world.theta - h)) / 2e-5 for h in steps])
    return ((J - J.T).norm() / (J + J.T).norm()).item()


@pytest.mark.parametrize("G", [2, 4, 5])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_grpo_of_any_group_size_points_along_the_expected_reward(G, normalize_std):
    for world, R_y in TWENTY:
        mean = exact_rewards.group_moments(world, R_y, grpo_credit, G, normalize_std).mean
        ascent = exact_rewards.gradient(world, R_y)
        assert relative(mean * (ascent.norm() / mean.norm()), -ascent) < 1e-6
        if not normalize_std:
            assert relative(mean, -ascent * (G - 1) / G) < 1e-9


def test_the_mean_of_rlsd_is_the_gradient_of_nothing():
    """Not even with the ideal teacher: its Jacobian is not symmetric. GRPO's is."""
    for world, R_y in TWENTY[:5]:
        assert asymmetry(world, R_y, grpo_credit) < 1e-8
        assert 1e-3 < asymmetry(world, R_y, rlsd_credit(0.5, 0.2)) < asymmetry(world, R_y, rlsd_credit(1, 9))


@pytest.mark.parametrize("ideal", [True, False], ids=["ideal", "random"])
@pytest.mark.parametrize("lam,eps_w", [(0.5, 0.2), (1.0, 1.0)])
def test_the_clip_bounds_how_far_rlsd_is_from_grpo(lam, eps_w, ideal):
    """‖mean − GRPO's mean‖ ≤ λ ε_w E[|A| Σ_n ‖∇log p(y_n|s_n)‖], whatever the teacher says."""
    for world, R_y in TWENTY:
        world = exact_rewards.conditioned(world, R_y) if ideal else world
        means = [
            exact_rewards.group_moments(world, R_y, c, 2, False).mean for c in (grpo_credit, rlsd_credit(lam, eps_w))
        ]
        p = world.logps()[0].exp()
        chosen = at(world.tokens, world.logps()[0]).exp()
        length = ((1 - chosen) ** 2 + p.square().sum(-1) - chosen**2).sqrt().sum(1)  # of a one-hot minus p, in a table
        rate = (world.probability() * R_y).sum()
        size = torch.where(R_y == 1, 1 - rate, rate) / 2  # E|A| given y: half the chance of another kind of partner
        bound = lam * eps_w * (world.probability() * size * length).sum()
        assert (means[1] - means[0]).norm() <= bound


def test_how_near_the_clip_keeps_rlsd_to_the_gradient():
    """The ideal teacher at the paper's λ and ε_w, with the clip wide open, and a teacher that knows nothing."""
    cosine = lambda credit, ideal: [
        compare(exact_rewards.conditioned(w, r) if ideal else w, r, credit)[0] for w, r in TWENTY
    ]
    assert min(cosine(rlsd_credit(0.5, 0.2), True)) > 0.99
    assert min(cosine(rlsd_credit(1, 9), True)) < 0.9 < min(cosine(rlsd_credit(1, 1), True))
    assert min(cosine(rlsd_credit(0.5, 0.2), False)) > 0.9 > min(cosine(rlsd_credit(1, 1), False))


def test_q_is_quieter_than_the_reward_under_the_same_baseline():
    """Rao–Blackwell: Q is the reward's mean given the token. In a table no two prefixes share a parameter."""
    for world, R_y in [*TWENTY, *(draw(seed, 4.0) for seed in range(20))]:
        V_, _ = exact_rewards.values(world, R_y)
        centred = (R_y[:, None] - V_[:, :1]).expand(-1, R)
        q, r = (exact_rewards.group_moments(world, R_y, given(A), 2) for A in (V_[:, 1:] - V_[:, :1], centred))
        assert relative(q.mean, r.mean) < 1e-9
        assert q.variance < r.variance * (1 + 1e-12)


def test_the_exact_advantage_need_not_be_quieter_than_the_reward():
    """V(s) is not the baseline of least variance: it loses where the student is sure, though in none of the twenty."""
    ratios = []
    for world, R_y in [*TWENTY, draw(363, 4.0)]:
        V_, _ = exact_rewards.values(world, R_y)
        centred = (R_y[:, None] - V_[:, :1]).expand(-1, R)
        ratios.append(compare(world, R_y, given(V_.diff()))[1] / compare(world, R_y, given(centred))[1])
    assert ratios[-1] > 1.2 and max(ratios[:-1]) < 1


def test_the_ideal_teacher_lowers_noise_per_signal_and_the_exact_advantage_lowers_it_more():
    ratios = []
    for world, R_y in TWENTY:
        ideal, A = exact_rewards.conditioned(world, R_y), exact_rewards.values(world, R_y)[0].diff()
        arms = [grpo_credit, rlsd_credit(0.5, 0.2), rlsd_credit(1, 1), given(A)]
        noise = [compare(ideal, R_y, arm)[1] for arm in arms]
        ratios.append([n / noise[0] for n in noise[1:]])
    paper, wide, perfect = torch.tensor(ratios).mean(0).tolist()
    assert perfect < wide < paper < 1


def chain(decisions, rate):
    """An answer that is right if each of its `decisions` is, `rate` of the time; a wrong one is one token."""
    rows, q = 2**decisions - 1, rate ** (1 / decisions)
    table = torch.tensor([[q, 1 - q]], dtype=torch.float64).log().expand(rows, 2)
    world = World.of((exact.tabular, table.contiguous()), (exact.tabular, table), 2, decisions)
    return world, (world.tokens == 0).all(1).double()


@pytest.mark.parametrize("decisions", [3, 6, 8])
def test_in_a_chain_of_decisions_perfect_credit_saves_little_unless_right_answers_are_rare(decisions):
    """Rollouts for the same noise per signal, as a fraction of GRPO's: its square. Groups of four."""

    def rollouts(rate, credit=None):
        world, R_y = chain(decisions, rate)
        ideal, A = exact_rewards.conditioned(world, R_y), exact_rewards.values(world, R_y)[0].diff()
        noise = [compare(ideal, R_y, arm)[1] for arm in (credit or given(A), grpo_credit)]
        return (noise[0] / noise[1]) ** 2

    assert 0.6 < rollouts(0.48) < 0.95 and rollouts(0.02) < 0.3
    assert rollouts(0.02, rlsd_credit(0.5, 0.2)) > 0.9 and rollouts(0.02, rlsd_credit(1, 1)) > 0.7
    assert 0.85 < rollouts(0.48, rlsd_credit(0.5, 0.2)) < 1
    if decisions == 3:  # as a half-right student of 3-digit addition, in README.md
        assert [rollouts(0.5), rollouts(0.5, rlsd_credit(0.5, 0.2))] == pytest.approx([0.68, 0.89], abs=0.006)


def test_where_the_squared_gradient_of_a_chain_is():
    """At one half it is at first mistakes, which perfect credit blames too, and harder; at 0.02 before them."""
    for decisions, at_mistake in [(2, 0.60), (3, 0.64), (6, 0.68)]:
        for rate in (0.5, 0.02):
            world, R_y = chain(decisions, rate)
            logp, V_ = world.logps()[0], exact_rewards.values(world, R_y)[0]
            square = 1 - 2 * at(world.tokens, logp).exp() + logp.exp().square().sum(-1)  # ‖∇log p‖² in a table
            mistakes = (world.tokens != 0).cumsum(1)
            first = (world.tokens != 0) & (mistakes == 1)
            spent = {
                name: world.probability()[:, None] * A**2 * square
                for name, A in {"reward": (R_y - V_[0, 0])[:, None], "exact": V_.diff()}.items()
            }
            share = lambda name, which, spent=spent: (spent[name][which].sum() / spent[name].sum()).item()
            if rate == 0.5:
                assert share("reward", first) == pytest.approx(at_mistake, abs=0.01) and share("exact", first) > 0.93
                assert (V_.diff()[first] <= -V_[0, 0]).all()
            else:
                assert share("reward", mistakes == 0) > 0.98
                assert spent["exact"].sum() < 0.5 * spent["reward"].sum()
