"""What each estimator is unbiased for, by enumerating every response in float64: no formula here is taken on trust."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from nano_opd import divergences, exact, gkd, opd, opdplus, policy_gradient, topk
from nano_opd.checks import NumericalFault
from nano_opd.divergences import Divergence
from nano_opd.exact.enumeration import World
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.rollout import response_logits, sample
from nano_opd.tokenizer import EOS, VOCAB_SIZE

NAMES = [*divergences.DIVERGENCES, "alpha=0.5"]
V, R = 4, 3


def tiny_gpt(seed: int, vocab_size: int = V) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, 2 + R, n_layer=2, n_head=2, n_embd=8))
    for p in model.parameters():  # the model's own initialisation makes each block the identity
        torch.nn.init.normal_(p, std=0.5)
    return model


def gpt_policy(model: GPT, prompt: torch.Tensor) -> tuple[exact.Policy, torch.Tensor]:
    """The policy that continues prompt (P,) int64 with `model`, and its θ (T,) float64: all weights in a row."""
    names, weights = zip(*model.named_parameters())

    def policy(theta, tokens):
        pieces = theta.split([w.numel() for w in weights])
        named = {name: piece.view(w.shape) for name, piece, w in zip(names, pieces, weights)}
        call = lambda tokens, **options: functional_call(model, named, (tokens,), options)
        return response_logits(call, torch.cat([prompt.expand(len(tokens), -1), tokens], 1), len(prompt))

    return policy, torch.cat([w.detach().flatten().double() for w in weights])


def build(policy: str, eos: int | None) -> World:
    if policy == "tabular":
        student, teacher = (exact.random_tabular(V, R, seed) for seed in (0, 1))
    else:
        student, teacher = (gpt_policy(tiny_gpt(seed), torch.tensor([1, 2])) for seed in (0, 1))
    return World.of(student, teacher, V, R, eos)


WORLDS = {
    f"{policy}, {length}": build(policy, eos)
    for policy in ("tabular", "gpt")
    for length, eos in (("fixed", None), ("eos", V - 1))
}


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


@pytest.fixture
def ends():
    """A tabular world whose responses end in EOS."""
    return WORLDS["tabular, eos"]


@pytest.fixture
def fixed():
    """A tabular world whose responses all have the same length."""
    return WORLDS["tabular, fixed"]


def distance(a, b):
    """‖a − b‖ relative to ‖b‖."""
    return ((a - b).norm() / b.norm()).item()


def equal(a, b):
    return distance(a, b) < 1e-9


def different(a, b):
    return distance(a, b) > 1e-3


def mean(world, advantage, normalize="batch"):
    """Expected gradient of the score-function estimator with this advantage(log_u, mask, …)."""
    return exact.moments(world, exact.sampled(advantage, normalize)).mean


def unbiased(divergence, gamma=0.0):
    return lambda log_u, mask, *_: opdplus.advantage(log_u, mask, divergence, gamma)


def stop_gradient(divergence, gamma=0.0):
    return lambda log_u, mask, *_: opd.advantage(log_u, mask, divergence, gamma)


def constant(log_u, *_):
    return torch.ones_like(log_u)


def score_weighted(world, weight):
    """E Σ_n weight(log u_n) ∇log p(y_n|s_n), written out as one sum: (S,) probabilities × weights × log-probs."""
    p, teacher_logp = world.probability(), world.logps()[1]
    token = world.tokens.unsqueeze(-1)

    def total(theta):
        logp = world.logps(theta)[0].gather(-1, token)[..., 0]
        log_u = teacher_logp.gather(-1, token)[..., 0] - logp.detach()  # drops ∇u: the weight is a constant
        return (p[:, None] * torch.where(world.mask, weight(log_u) * logp, 0.0)).sum()

    return torch.func.grad(total)(world.theta)


# ---------------------------------------------------------------------------------------------- the enumeration itself


@pytest.mark.parametrize("sizes", [(4, 3, None), (4, 3, 3), (4, 3, 0), (3, 1, 2), (1, 4, 0), (6, 5, 5)])
def test_every_response_is_listed_once(sizes):
    vocab_size, horizon, eos = sizes
    tokens, mask = exact.enumerate_responses(vocab_size, horizon, eos)
    responses = [tuple(t for t, m in zip(row, keep) if m) for row, keep in zip(tokens.tolist(), mask.tolist())]
    others = [v for v in range(vocab_size) if v != eos]
    want = set()
    for length in range(1, horizon + 1):
        for head in itertools.product(others, repeat=length - 1):
            last = range(vocab_size) if length == horizon else [eos] * (eos is not None)
            want |= {(*head, v) for v in last}
    assert len(responses) == len(set(responses)) and set(responses) == want
    assert (mask[:, 1:] <= mask[:, :-1]).all()


def test_what_cannot_be_enumerated_is_refused(ends):
    for sizes in [(0, 3), (3, 0), (10, 7)]:
        with pytest.raises(ValueError, match="cannot enumerate"):
            exact.enumerate_responses(*sizes)
    with pytest.raises(ValueError, match="eos 4 is not in the vocabulary"):
        exact.enumerate_responses(4, 3, 4)
    with pytest.raises(ValueError, match="cannot enumerate 40\\^4 batches"):
        exact.moments(ends, exact.sampled(unbiased(divergences.get("jsd"))), batch_size=4)
    with pytest.raises(ValueError, match="choose from prefix, return, sequence"):
        exact.objective(ends, divergences.get("jsd"), "token")


def test_probabilities_sum_to_one_and_the_score_has_mean_zero(world):
    assert world.probability().sum().item() == pytest.approx(1, abs=1e-12)
    assert mean(world, constant).norm() < 1e-12


def test_the_gpt_policy_is_the_gpt():
    model, prompt = tiny_gpt(0), torch.tensor([1, 2])
    policy, theta = gpt_policy(model, prompt)
    tokens, _ = exact.enumerate_responses(V, R)
    want = response_logits(model.double(), torch.cat([prompt.expand(len(tokens), 2), tokens], 1), 2)
    torch.testing.assert_close(policy(theta, tokens), want)


def test_rollouts_average_to_the_enumeration():
    """The mean over N rollouts of the sampler misses the exact mean by √(variance/N): both numbers are checked."""
    model, N = tiny_gpt(0, VOCAB_SIZE), 4000
    with torch.no_grad():
        model.embedding.weight[EOS] *= 2
    student, teacher = (gpt_policy(m, torch.tensor([1, 2])) for m in (model, tiny_gpt(1, VOCAB_SIZE)))
    world = World.of(student, teacher, VOCAB_SIZE, 2, EOS)
    estimator = exact.sampled(unbiased(divergences.get("jsd"), 1.0))
    want = exact.moments(world, estimator)
    misses = []
    for seed in range(4):
        drawn = sample(model, torch.tensor([[1, 2]]).expand(N, 2), 2, torch.Generator().manual_seed(seed))
        where = {tuple(row): i for i, row in enumerate(world.tokens.where(world.mask, -1).tolist())}
        index = [where[tuple(row)] for row in drawn.responses.where(drawn.mask, -1).tolist()]
        rollouts = World(*student, *(x[index] for x in (world.teacher_logits, world.tokens, world.mask)))
        uniform = torch.full((N,), 1 / N, dtype=torch.float64)
        got = exact.moments(rollouts, estimator, probability=uniform)
        misses.append((N * (got.mean - want.mean).square().sum() / want.variance).item())
    assert 0.7 < sum(misses) / 4 < 1.4


def test_moments_against_one_response_at_a_time():
    """Mean and mean squared error from a loop of ordinary autograd: nothing of vmap, nothing of bias² + variance."""
    world, divergence = WORLDS["gpt, eos"], divergences.get("pearson_chi2")
    target = exact.gradient(world, divergence, "return")
    mean_of_loop, mse = torch.zeros_like(target), 0.0
    for p, tokens, mask, teacher_logits in zip(world.probability(), world.tokens, world.mask, world.teacher_logits):
        theta = world.theta.clone().requires_grad_()
        logp = world.student(theta, tokens[None])[0].log_softmax(-1)[range(R), tokens][mask]
        u = (teacher_logits.log_softmax(-1)[range(R), tokens][mask] - logp).exp().tolist()
        loss = sum(((u[n] - 1) ** 2) * logp[n] for n in range(len(u)))  # −A log p with A = −f(u)
        (g,) = torch.autograd.grad(loss, theta)
        mean_of_loop += p * g
        mse += p * (g - target).square().sum()
    got = exact.moments(world, exact.sampled(stop_gradient(divergence)))
    assert equal(got.mean, mean_of_loop)
    assert (got.bias_squared(target) + got.variance).item() == pytest.approx(mse.item(), rel=1e-9)


@pytest.mark.parametrize("kind", exact.OBJECTIVES)
def test_an_objective_differentiated_in_the_worlds_own_weights_has_its_gradient(kind, ends):
    """The prefixes stay fixed there too, though θ is what decides how often each is visited."""
    d, own = divergences.get("jsd"), replace(ends, theta=ends.theta.clone().requires_grad_())
    exact.objective(own, d, kind).backward()
    assert equal(own.theta.grad, exact.gradient(ends, d, kind))


@pytest.mark.parametrize("name", NAMES)
def test_the_prefix_objective_prefix_by_prefix(name, ends):
    """In a table, the gradient of row s is P(s) ∇D_f at s and nothing else."""
    d = divergences.get(name)
    got = exact.gradient(ends, d, "prefix")
    p, q = ends.theta.softmax(-1), exact.random_tabular(V, R, 1)[1].softmax(-1)
    reach = torch.zeros(len(p), dtype=torch.float64)
    reach[0] = 1
    for s in range(len(p)):
        for v in range(V - 1):  # the EOS leads nowhere
            if (child := s * V + v + 1) < len(p):
                reach[child] = reach[s] * p[s, v]
    value = 0.0
    for s in range(len(p)):
        row = ends.theta[s].clone().requires_grad_()
        D = (row.softmax(-1) * d.f((q[s] / row.softmax(-1)).log())).sum()
        torch.testing.assert_close(got[s], reach[s] * torch.autograd.grad(D, row)[0], rtol=1e-9, atol=1e-14)
        value += reach[s] * D.item()
    assert exact.objective(ends, d, "prefix").item() == pytest.approx(value.item(), rel=1e-9)
    if name != "reverse_kl":
        assert different(got, exact.gradient(ends, divergences.get("reverse_kl"), "prefix")) == (name != "k3")


def test_objectives_are_what_their_names_say(world):
    """KL in its textbook form, at one prefix and over whole responses: which of the two distributions stands first."""
    (p, q), P = world.logps(), world.probability()
    Q = replace(world, student=lambda theta, tokens: q).probability()  # the teacher's, of whole responses
    token = world.tokens.unsqueeze(-1)
    for name, whole, per_prefix in [
        ("reverse_kl", (P * (P / Q).log()).sum(), (p.exp() * (p - q)).sum(-1)),
        ("forward_kl", (Q * (Q / P).log()).sum(), (q.exp() * (q - p)).sum(-1)),
        ("tv", (P - Q).abs().sum() / 2, (p.exp() - q.exp()).abs().sum(-1) / 2),
    ]:
        d = divergences.get(name)
        summed = (P * (per_prefix * world.mask).sum(1)).sum().item()
        log_u = (q - p).gather(-1, token)[..., 0] * world.mask
        assert exact.objective(world, d, "sequence").item() == pytest.approx(whole.item(), rel=1e-9)
        assert exact.objective(world, d, "prefix").item() == pytest.approx(summed, rel=1e-9)
        assert exact.objective(world, d, "return").item() == pytest.approx((P @ d.f(log_u).sum(1)).item(), rel=1e-9)
    assert exact.objective(world, d, "return").item() == pytest.approx(summed, rel=1e-9)  # two gradients, one value


# --------------------------------------------------------------------------------------------- OPD+: unbiased for what


@pytest.mark.parametrize("name", NAMES)
def test_opdplus_is_unbiased_for_the_prefix_objective_at_gamma_0_and_for_J_at_gamma_1(name, world):
    d = divergences.get(name)
    prefix, J = exact.gradient(world, d, "prefix"), exact.gradient(world, d, "return")
    at_0, at_1 = mean(world, unbiased(d, 0.0)), mean(world, unbiased(d, 1.0))
    assert equal(at_0, prefix) and equal(at_1, J)
    assert different(at_0, J) and different(at_1, prefix)


@pytest.mark.parametrize("name", NAMES)
def test_between_the_two_gammas_opdplus_is_unbiased_for_neither(name, world):
    d = divergences.get(name)
    half = mean(world, unbiased(d, 0.5))
    assert all(different(half, exact.gradient(world, d, kind)) for kind in exact.OBJECTIVES)


@pytest.mark.parametrize("name", NAMES)
def test_one_advantage_for_the_whole_response_is_unbiased_for_the_sequence_divergence(name, world):
    """A = w_f(Π u_n); it is the γ = 1 sum for reverse KL alone, however the generator of reverse KL is written."""
    d = divergences.get(name)

    def advantage(log_u, mask, *_):
        log_u = torch.where(mask, log_u, 0.0).sum(1, keepdim=True)  # (B, 1)
        return opdplus.advantage(log_u, torch.ones_like(log_u, dtype=torch.bool), d)

    sequence, J = exact.gradient(world, d, "sequence"), exact.gradient(world, d, "return")
    assert equal(mean(world, advantage), sequence)
    if name in ("reverse_kl", "k3"):
        assert equal(sequence, J)
    else:
        assert different(sequence, J)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [opd, opdplus])
def test_baseline_and_full_vocabulary_have_the_expectation_of_the_sample(method, name, world):
    d = divergences.get(name)
    baselined = lambda log_u, mask, p, q: method.advantage(log_u, mask, d, 0.0, method.exact_baseline(p, q, d))
    full = lambda tokens, mask, p, q: gkd.loss(p, q, mask, d, stop_gradient=method is opd)
    want = mean(world, lambda log_u, mask, *_: method.advantage(log_u, mask, d))
    assert equal(mean(world, baselined), want) and equal(exact.moments(world, full).mean, want)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_any_function_of_the_prefix_may_be_subtracted(gamma, world):
    d = divergences.get("jsd")

    def advantage(log_u, mask, student_logits, teacher_logits):
        baseline = 3 + student_logits[..., 0] * teacher_logits[..., 1]  # a function of s_n, not of y_n
        return opdplus.advantage(log_u, mask, d, gamma, baseline)

    assert equal(mean(world, advantage), mean(world, unbiased(d, gamma)))
    of_the_action = lambda log_u, mask, *_: opdplus.advantage(log_u, mask, d, gamma, baseline=log_u)
    assert different(mean(world, of_the_action), mean(world, unbiased(d, gamma)))


def test_vocabulary_6_and_horizon_5():
    world = World.of(exact.random_tabular(6, 5, 0), exact.random_tabular(6, 5, 1), 6, 5, 5)
    d = divergences.get("jsd")
    assert len(world.tokens) == 3906
    assert equal(mean(world, unbiased(d, 1.0)), exact.gradient(world, d, "return"))


# --------------------------------------------------------------------------------------------- OPD: how wrong, and when


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gamma,kind", [(0.0, "prefix"), (1.0, "return")])
def test_the_error_of_the_stop_gradient_is_the_missing_term(name, gamma, kind, world):
    """E[u f′(u) ∇log p] to the last digit; it vanishes for reverse KL written as −ln u, and only there."""
    d = divergences.get(name)
    truth = exact.gradient(world, d, kind)
    missing = score_weighted(world, lambda log_u: log_u.exp() * d.f_prime(log_u))
    got = mean(world, stop_gradient(d, gamma))
    if name == "reverse_kl":
        assert equal(got, truth) and missing.norm() < 1e-12
    else:
        assert equal(got - truth, missing) and different(got, truth)


@pytest.mark.parametrize("name", NAMES)
def test_a_multiple_of_u_minus_1_changes_the_stop_gradient_and_nothing_else(name, world):
    """f + c(u−1) is the same divergence: OPD's mean moves by c E[(u−1) ∇log p], OPD+'s does not move."""
    d, c = divergences.get(name), 0.7
    shifted = divergences.shift(d, c)
    for kind in exact.OBJECTIVES:
        assert equal(exact.gradient(world, shifted, kind), exact.gradient(world, d, kind))
    for gamma in (0.0, 1.0):
        assert equal(mean(world, unbiased(shifted, gamma)), mean(world, unbiased(d, gamma)))
    moved = mean(world, stop_gradient(shifted)) - mean(world, stop_gradient(d))
    assert equal(moved, c * score_weighted(world, torch.expm1))
    assert moved.norm() > 1e-2 * exact.gradient(world, d, "prefix").norm()


def test_the_stop_gradient_can_be_turned_around_by_the_generator(world):
    """u² − 1 is Pearson's χ² too, and −f is then the exact gradient with its sign reversed; 2 − 2√u doubles it."""
    for name, f, factor in [
        ("pearson_chi2", lambda x: torch.expm1(2 * x), -1),
        ("hellinger", lambda x: -2 * torch.expm1(x / 2), 2),
    ]:
        d = divergences.get(name)
        other = Divergence("other", f=f, f_prime=d.f_prime, w_f=d.w_f)
        truth = exact.gradient(world, d, "prefix")
        assert equal(exact.gradient(world, other, "prefix"), truth)
        assert equal(mean(world, stop_gradient(other)), factor * truth)


def test_k1_k2_and_k3(world):
    """The "KL estimators" as rewards and as losses to differentiate through: four different gradients."""
    reverse = exact.gradient(world, divergences.get("reverse_kl"), "prefix")
    forward = exact.gradient(world, divergences.get("forward_kl"), "prefix")
    assert equal(mean(world, stop_gradient(divergences.get("reverse_kl"))), reverse)
    assert equal(mean(world, stop_gradient(divergences.get("k3"))), reverse - forward)

    def through(k):
        def estimator(tokens, mask, student_logits, teacher_logits):
            log_u = (teacher_logits.log_softmax(-1) - student_logits.log_softmax(-1)).gather(-1, tokens[..., None])
            return torch.where(mask, k(log_u[..., 0]), 0.0).sum() / len(mask)

        return exact.moments(world, estimator).mean

    assert through(lambda log_u: -log_u).norm() < 1e-12
    assert equal(through(lambda log_u: log_u**2 / 2), reverse)
    assert equal(through(lambda log_u: torch.expm1(log_u) - log_u), forward)


def test_k2_is_no_f_divergence():
    """½ ln² u: f″ = (1 − ln u)/u² changes its sign at e, and −f + u f′ = ln u − ½ ln² u."""
    u = torch.tensor([0.1, 0.9, 2.0, 2.7, 2.8, 10.0], dtype=torch.float64, requires_grad=True)
    f = u.log() ** 2 / 2
    (slope,) = torch.autograd.grad(f.sum(), u, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), u)
    assert torch.equal(curvature > 0, u < math.e)
    torch.testing.assert_close(-f + u * slope, u.log() - u.log() ** 2 / 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_that_forgot_to_detach_is_opdplus(name, world):
    """sg(f) log p + f, differentiated through the sample, is w_f: at γ = 0 the "bug" is the correction."""
    d = divergences.get(name)

    def estimator(tokens, mask, student_logits, teacher_logits):
        logp = student_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        f = d.f(teacher_logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] - logp)
        return torch.where(mask, f.detach() * logp + f, 0.0).sum() / len(mask)  # drops ∇f from the product alone

    one_by_one = torch.arange(len(world.tokens))[:, None]
    want = exact.estimates(world, exact.sampled(unbiased(d)), one_by_one)
    torch.testing.assert_close(exact.estimates(world, estimator, one_by_one), want, rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------------- the wrong versions


@pytest.mark.parametrize("name", NAMES)
def test_summing_the_correction_into_the_return_is_biased(name, world):
    """Σ_{m≥n} w_f(u_m): off, unless E[u f′(u)|s] is the same at every prefix still to come: k3's is 0 everywhere, and
    reverse KL's −1 per token is a baseline when all responses have one length."""
    d = divergences.get(name)

    def advantage(log_u, mask, *_):
        w = torch.where(mask, d.w_f(log_u), 0.0).detach()  # drops nothing: an advantage is a constant
        return w + policy_gradient.future_return(w, 1.0)

    harmless = name == "k3" or (name == "reverse_kl" and world.mask.all())
    truth = exact.gradient(world, d, "return")
    assert equal(mean(world, advantage), truth) if harmless else different(mean(world, advantage), truth)


@pytest.mark.parametrize("name", NAMES)
def test_dividing_by_the_own_length_is_biased_where_length_is_sampled(name, world):
    d = divergences.get(name)
    truth = exact.gradient(world, d, "prefix")
    got = mean(world, unbiased(d), "sequence_mean")
    cosine = (got * truth).sum() / got.norm() / truth.norm()
    if world.mask.all():
        assert equal(R * got, truth)
    else:
        assert cosine < 0.9999


def test_the_constant_of_reverse_kl_is_a_free_baseline_only_under_a_constant_divisor(world):
    d = divergences.get("reverse_kl")
    assert equal(mean(world, unbiased(d)), mean(world, stop_gradient(d)))
    plus, minus = (mean(world, a(d), "sequence_mean") for a in (unbiased, stop_gradient))
    assert equal(plus, minus) if world.mask.all() else different(plus, minus)


PAIRS = {
    length: World.of(exact.random_tabular(3, 2, 0), exact.random_tabular(3, 2, 1), 3, 2, eos)
    for length, eos in (("fixed", None), ("eos", 2))
}


def pair_mean(world, advantage, normalize="batch"):
    """Expected gradient of a batch of two responses, over all pairs."""
    return exact.moments(world, exact.sampled(advantage, normalize), batch_size=2).mean


def z_scored(advantage):
    """(A − mean) / std over the sampled tokens of the batch."""

    def scored(log_u, mask, *rest):
        A, count = advantage(log_u, mask, *rest), mask.sum()
        center = A.sum() / count
        std = (torch.where(mask, A - center, 0.0).square().sum() / count).sqrt()
        return torch.where(mask, (A - center) / (std + 1e-6), 0.0)

    return scored


def test_an_estimator_that_couples_responses_is_refused_one_by_one():
    for couples in (exact.sampled(z_scored(unbiased(divergences.get("jsd")))), exact.sampled(constant, "token_mean")):
        with pytest.raises(ValueError, match="couples the responses"):
            exact.moments(PAIRS["eos"], couples)


@pytest.mark.parametrize("length", PAIRS)
def test_dividing_by_the_number_of_sampled_tokens_couples_the_batch(length):
    world, d = PAIRS[length], divergences.get("reverse_kl")
    plus, minus = (pair_mean(world, a(d), "token_mean") for a in (unbiased, stop_gradient))
    assert equal(pair_mean(world, unbiased(d)), exact.gradient(world, d, "prefix"))
    assert equal(plus, minus) if length == "fixed" else different(plus, minus)


@pytest.mark.parametrize("length", PAIRS)
@pytest.mark.parametrize("name", NAMES)
def test_z_scoring_the_batch(name, length):
    """It forgets shift and positive scale: of the nine, only reverse KL has w_f and −f so related, and there nothing
    is left to tell OPD from OPD+. It does not repair the others, and it biases all of them."""
    world, d = PAIRS[length], divergences.get(name)
    plus, minus = (pair_mean(world, z_scored(a(d))) for a in (unbiased, stop_gradient))
    assert equal(plus, minus) if name == "reverse_kl" else different(plus, minus)
    truth = exact.gradient(world, d, "prefix")
    cosine = lambda g: ((g * truth).sum() / g.norm() / truth.norm()).item()
    assert cosine(plus) < 0.9999 and cosine(minus) < 0.9999


def test_z_scoring_is_blind_to_the_choice_among_generators_it_cannot_repair():
    """−(2 − 2√u) = 2w + const: this one writing of Hellinger z-scores to OPD+, the usual one does not."""
    world, d = PAIRS["eos"], divergences.get("hellinger")
    power = Divergence("2 − 2√u", f=lambda x: -2 * torch.expm1(x / 2), f_prime=d.f_prime, w_f=d.w_f)
    plus = pair_mean(world, z_scored(unbiased(d)))
    assert distance(pair_mean(world, z_scored(stop_gradient(power))), plus) < 1e-4  # the ε beside the std
    assert different(pair_mean(world, z_scored(stop_gradient(d))), plus)


@pytest.mark.parametrize("name", NAMES)
def test_discounting_by_absolute_position_is_another_objective(name, world):
    """γ^n A_n instead of A_n: for none of the three objectives, and exactly ∇ E Σ_n γ^n f(u_n), which hardly looks at
    late tokens."""
    d, gamma = divergences.get(name), 0.5
    weight = gamma ** torch.arange(R, dtype=torch.float64)
    got = mean(world, lambda log_u, mask, *_: weight * opdplus.advantage(log_u, mask, d, gamma))
    assert different(got, mean(world, unbiased(d, gamma)))
    assert all(different(got, exact.gradient(world, d, kind)) for kind in exact.OBJECTIVES)

    def discounted(theta):
        student_logp, teacher_logp = world.logps(theta)
        log_u = (teacher_logp - student_logp).gather(-1, world.tokens.unsqueeze(-1))[..., 0]
        f = d.f(torch.where(world.mask, log_u, 0.0))
        return (world.probability(theta) * (weight * f).sum(1)).sum()

    assert equal(got, torch.func.grad(discounted)(world.theta))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_top_k_sum_without_its_tail_is_biased(k, world):
    """Σ_{v ∈ top-k of p} p_v ln(p_v/q_v), unnormalised: mass moved out of the top k is mass not counted."""
    d = divergences.get("reverse_kl")
    truth = exact.gradient(world, d, "prefix")

    def top_k(tokens, mask, student_logits, teacher_logits):
        top = student_logits.topk(k).indices
        p, q = (x.log_softmax(-1).gather(-1, top) for x in (student_logits, teacher_logits))
        return torch.where(mask[..., None], p.exp() * (p - q), 0.0).sum() / len(mask)

    assert different(exact.moments(world, top_k).mean, truth)


def test_a_reward_that_knows_only_the_prefix_teaches_nothing(world):
    state_only = lambda log_u, mask, p, q: opd.exact_baseline(p, q, divergences.get("reverse_kl"))
    assert mean(world, state_only).norm() < 1e-12


@pytest.mark.parametrize("how", ["temperature 0.7", "top 2"])
def test_samples_from_a_sharpened_student_are_off_policy(how, world):
    """Drawn from another distribution than the full softmax that scores them."""
    d = divergences.get("jsd")
    logits = world.student(world.theta, world.tokens)
    second = logits.topk(2).values[..., -1:]
    drawn_from = logits / 0.7 if how == "temperature 0.7" else logits.masked_fill(logits < second, -torch.inf)
    probability = replace(world, student=lambda theta, tokens: drawn_from).probability()
    assert probability.sum().item() == pytest.approx(1)
    got = exact.moments(world, exact.sampled(unbiased(d)), probability=probability).mean
    assert different(got, exact.gradient(world, d, "prefix"))


# ----------------------------------------------------------------------------------------------------------- variance


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_quietest_with_the_full_vocabulary(name, ends, fixed):
    """Where no two prefixes share a parameter, averaging over the action can only remove variance."""
    d = divergences.get(name)
    for world in (ends, fixed):
        sampled = exact.moments(world, exact.sampled(unbiased(d))).variance
        full = exact.moments(world, lambda tokens, mask, p, q: gkd.loss(p, q, mask, d)).variance
        assert 0 < full < sampled
    one_token = World.of(exact.random_tabular(V, 1, 0), exact.random_tabular(V, 1, 1), V, 1)
    full = exact.moments(one_token, lambda tokens, mask, p, q: gkd.loss(p, q, mask, d))
    assert abs(full.variance) < 1e-12 * full.mean.square().sum()  # no prefix to sample, and no action


@pytest.mark.parametrize("name", NAMES)
def test_a_top_k_with_a_sampled_tail_has_the_expectation_of_the_sample(name, world):
    d = divergences.get(name)
    for estimator, A in ((opd, d.reward), (opdplus, d.w_f)):
        sampled = exact.moments(world, exact.sampled(lambda log_u, mask, *_, e=estimator: e.advantage(log_u, mask, d)))
        got = exact.moments(world, lambda tokens, mask, p, q, A=A: topk.loss(p, q, tokens, mask, A, 2))
        assert equal(got.mean, sampled.mean)


@pytest.mark.parametrize("name", NAMES)
def test_the_ends_and_the_variance_of_a_top_k(name):
    """k = 0 is the sample, k = V the whole vocabulary, and between them the variance moves as topk.py says."""
    d, world = divergences.get(name), World.of(exact.random_tabular(V, 1, 0), exact.random_tabular(V, 1, 1), V, 1)
    top = [
        exact.moments(world, lambda tokens, mask, p, q, k=k: topk.loss(p, q, tokens, mask, d.w_f, k))
        for k in range(V + 2)
    ]
    sampled = exact.moments(world, exact.sampled(unbiased(d)))
    assert top[0].variance.item() == pytest.approx(sampled.variance.item())
    for m in top[V:]:
        assert equal(m.mean, sampled.mean) and abs(m.variance) < 1e-12
    p, q = world.theta[0].softmax(-1), world.teacher_logits[0, 0].softmax(-1)
    g = d.w_f((q / p).log())[:, None] * (torch.eye(V) - p)  # A ∇log p in the logits, one token a row
    for k in range(V + 1):
        inside = torch.zeros(V).index_fill(0, q.topk(k).indices, 1.0).bool()
        change = -(p * g.square().sum(1))[inside].sum() + (p @ g).square().sum()
        change = change - (p[~inside] @ g[~inside]).square().sum()
        assert (top[k].variance - top[0].variance).item() == pytest.approx(change.item(), abs=1e-10)


def test_a_token_that_is_not_in_the_sum_is_not_in_the_gradient():
    """The teacher forbids it: its A is −∞. It is not likely, nor sampled. A NaN that is in the sum is reported."""
    student = torch.zeros(1, 1, 4, requires_grad=True)
    teacher, mask = torch.tensor([[[2.0, 1.0, 0.0, -torch.inf]]]), torch.ones(1, 1, dtype=torch.bool)
    reverse = divergences.get("reverse_kl").w_f
    loss = lambda student: topk.loss(student, teacher, torch.tensor([[2]]), mask, reverse, 2)
    loss(student).backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0
    with pytest.raises(NumericalFault, match="loss is NaN"):
        loss(student.detach() * torch.nan)


def test_summing_over_a_top_k_may_add_variance():
    """In this world under Jensen–Shannon one token makes it noisier, and two make it quieter."""
    d, world = divergences.get("jsd"), WORLDS["tabular, eos"]
    top = lambda k: exact.moments(world, lambda tokens, mask, p, q: topk.loss(p, q, tokens, mask, d.w_f, k))
    none, one, two = (top(k).variance for k in (0, 1, 2))
    assert two < none < one


def test_the_exact_baseline_need_not_be_quieter():
    """Forward KL gives a rare token that the teacher avoids weight u ≈ 0; subtracting the mean 1 gives it −1."""
    student = torch.tensor([[0.98, 0.01, 0.01]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.9998, 1e-4, 1e-4]], dtype=torch.float64).log()
    world, d = World.of((exact.tabular, student), (exact.tabular, teacher), 3, 1), divergences.get("forward_kl")
    baselined = lambda log_u, mask, p, q: opdplus.advantage(log_u, mask, d, 0.0, opdplus.exact_baseline(p, q, d))
    sampled, quieter = (exact.moments(world, exact.sampled(a)).variance for a in (unbiased(d), baselined))
    assert quieter > 10 * sampled


@pytest.mark.parametrize("name", NAMES)
def test_the_free_constant_is_a_control_variate(name, world):
    """Var is a parabola in the constant c added to w_f; its lowest point lies below c = 0, the mean stays."""
    d = divergences.get(name)
    shifted = lambda c: exact.moments(world, exact.sampled(lambda log_u, mask, *_: unbiased(d)(log_u, mask) + c))
    at = [shifted(c) for c in (-1, 0, 1)]
    assert all(equal(m.mean, at[1].mean) for m in at)
    low, middle, high = (m.variance.item() for m in at)
    curvature, slope = (low + high) / 2 - middle, (high - low) / 2
    best = -slope / (2 * curvature)
    lowest = shifted(best)
    assert curvature > 0 and equal(lowest.mean, at[1].mean)
    assert lowest.variance.item() == pytest.approx(middle - slope**2 / (4 * curvature), rel=1e-9)
    assert lowest.variance < (1 if name == "tv" else 0.999) * middle  # ±½ is nearly balanced already


@pytest.mark.parametrize("name", ["forward_kl", "pearson_chi2", "neyman_chi2"])
def test_clipping_log_u_trades_variance_for_bias(name, world):
    d = divergences.get(name)
    truth = exact.gradient(world, d, "prefix")
    clipped = lambda c: exact.sampled(lambda log_u, mask, *_: opdplus.advantage(log_u.clamp(-c, c), mask, d))
    free, *bound = (exact.moments(world, clipped(c)) for c in (math.inf, 2.0, 1.0, 0.5))
    assert equal(free.mean, truth) and all(different(m.mean, truth) for m in bound)
    for looser, tighter in itertools.pairwise([free, *bound]):
        assert tighter.bias_squared(truth) > looser.bias_squared(truth) and tighter.variance < looser.variance


@pytest.mark.parametrize("name", NAMES)
def test_how_the_variance_of_the_sequence_level_grows(name):
    """E_p[w_f(u(y))²] for L independent tokens. It grows like a constant to the power L for forward KL and both χ², in
    general where E_p[u^2α] > 1, that is for α < 0 or α > ½; not for the others."""
    d = divergences.get(name)
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.6, 0.4], [0.3, 0.7]))
    second = []
    for L in (20, 40, 80):  # u(y) depends only on how often the first token came
        k = torch.arange(L + 1, dtype=torch.float64)
        log_choose = math.lgamma(L + 1) - torch.lgamma(k + 1) - torch.lgamma(L - k + 1)
        weight = (log_choose + k * p[0].log() + (L - k) * p[1].log()).exp()
        log_u = k * (q[0] / p[0]).log() + (L - k) * (q[1] / p[1]).log()
        second.append((weight @ d.w_f(log_u) ** 2).item())
    exponential = name in ("forward_kl", "pearson_chi2", "neyman_chi2")
    assert (second[2] / second[1] > 1.5 * second[1] / second[0]) == exponential
    if name == "forward_kl":
        chi2 = (q**2 / p).sum().item()  # 1 + χ²(q‖p)
        assert second == pytest.approx([chi2**L for L in (20, 40, 80)], rel=1e-9)


def test_what_the_readme_says_of_the_variance_of_reverse_kl():
    """Notebook 01's world: the constant −1 moves no mean, and adds variance (relative to the squared gradient)."""
    (policy, teacher), noise = exact.random_tabular(5, 4, seed=12, scale=1.5), exact.random_tabular(5, 4, seed=13)[1]
    world, d = World.of((policy, teacher + noise), (policy, teacher), 5, 4, 4), divergences.get("reverse_kl")
    g = exact.gradient(world, d, "prefix")
    got = {}
    for method in (opd, opdplus):
        of = exact.sampled(lambda log_u, mask, *_, method=method: method.advantage(log_u, mask, d))
        got[method] = exact.moments(world, of)
        assert got[method].bias_squared(g) < 1e-20
    relative = [(got[method].variance / g.square().sum()).item() for method in (opdplus, opd)]
    assert relative == pytest.approx([12.28, 3.24], abs=0.005)
