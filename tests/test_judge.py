"""The law of the stop-gradient: OPD under f descends D_h with h″ = −f′/u, exactly, and what follows from it."""

import math

import pytest
import torch

from nano_opd import divergences, exact, opd, opdplus
from nano_opd.divergences import shift
from nano_opd.exact.judge import STUDENTS, TEACHER, generator, judge, paths, update

NAMES = [*divergences.DIVERGENCES, "alpha=-0.5", "alpha=0.5", "alpha=1.7"]
NEVER_RISES = ("reverse_kl", "jsd_falling")


REVERSE = lambda log_p, log_q: log_q - log_p
ENTROPY = lambda log_p, log_q: -(log_p.exp() * log_p).sum(-1, keepdim=True) * (log_q - log_p)
TOP_2 = lambda log_p, log_q: (log_p >= log_p.topk(2).values[..., -1:]) * (log_q - log_p - 1)


def world_at(distance: float, seed: int = 0) -> exact.World:
    """A student whose logits differ from the teacher's by about so many nats."""
    (policy, q), noise = exact.random_tabular(4, 3, seed), exact.random_tabular(4, 3, seed + 100)[1]
    return exact.World.of((policy, q + distance * noise), (policy, q), 4, 3, 3)


def mean(world: exact.World, method, d: divergences.Divergence) -> torch.Tensor:
    return exact.moments(world, exact.sampled(lambda log_u, mask, *_: method.advantage(log_u, mask, d))).mean


def value(world: exact.World, d: divergences.Divergence) -> float:
    return exact.objective(world, d, "prefix").item()


@pytest.mark.parametrize("name", NAMES)
def test_what_opd_descends(name):
    """Its mean is the gradient of E_p[h(u)], by autograd through the enumeration, which knows nothing of A."""
    world, d = world_at(1.0), divergences.get(name)
    h = generator(d.reward)
    torch.testing.assert_close(mean(world, opd, d), exact.gradient(world, h, "prefix"), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(mean(world, opd, d), mean(world, opdplus, h), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_of_an_advantage(name):
    """h is u ∫ A/u²: its w_h is A, its second derivative A′/u, and the generator of w_f is f itself."""
    x, d = torch.linspace(-3, 3, 61, dtype=torch.float64), divergences.get(name)
    x = x[x.abs() > 1e-9].requires_grad_()  # |u − 1| has no slope at 1
    h = generator(d.reward)
    in_u = lambda y: torch.autograd.grad(y.sum(), x, create_graph=True)[0] * torch.exp(-x)  # d/du = e^−x d/dx
    first = in_u(h.f(x))
    torch.testing.assert_close(h.f_prime(x), first)
    torch.testing.assert_close(in_u(first), -d.f_prime(x) * torch.exp(-x), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(-h.f(x) + torch.exp(x) * h.f_prime(x), h.w_f(x))
    world = world_at(1.0)
    assert value(world, generator(d.w_f)) == pytest.approx(value(world, d), rel=1e-8)


def test_the_usual_generators_subtract_a_divergence_that_should_fall():
    """What OPD descends, in words; each is its own divergence times a factor, minus another one."""
    world = world_at(1.0)
    D = {name: value(world, divergences.get(name)) for name in NAMES}
    for name, descended in {
        "reverse_kl": D["reverse_kl"],
        "k3": D["reverse_kl"] - D["forward_kl"],
        "hellinger": 2 * D["hellinger"] - D["forward_kl"],
        "neyman_chi2": D["neyman_chi2"] / 2 - D["forward_kl"],
        "pearson_chi2": 2 * D["forward_kl"] - D["pearson_chi2"],
    }.items():
        assert value(world, generator(divergences.get(name).reward)) == pytest.approx(descended, rel=1e-8)
    squares = divergences.Divergence("−½ E_q[ln² u]", lambda x: -torch.exp(x) * x**2 / 2, None, None)
    of_forward = generator(divergences.get("forward_kl").reward)
    assert value(world, of_forward) == pytest.approx(value(world, squares), rel=1e-8)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tv"])
def test_near_the_teacher_the_stop_gradient_multiplies_the_gradient(name):
    """By −f′(1)/f″(1): 1 for −ln u, −1 for u ln u, 0 for every f with its minimum at 1."""
    world, d, zero = world_at(1e-5), divergences.get(name), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (second,) = torch.autograd.grad(d.f_prime(zero).sum(), zero)  # f″(1), since du = dx there
    factor = -(d.f_prime(zero) / second).item()
    assert factor == pytest.approx({"reverse_kl": 1, "forward_kl": -1, "jsd_falling": 2 * math.log(2)}.get(name, 0))
    g = exact.gradient(world, d, "prefix")
    assert ((mean(world, opd, d) - factor * g).norm() / g.norm()).item() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_multiple_of_u_minus_1_takes_forward_kl_away(name):
    world, d, c = world_at(1.0), divergences.get(name), 0.7
    before, after = (value(world, generator(x.reward)) for x in (d, shift(d, c)))
    assert after == pytest.approx(before - c * value(world, divergences.get("forward_kl")), rel=1e-8)


@pytest.mark.parametrize("alpha", [-2, -0.5, 0, 0.3, 0.5, 0.9])
def test_in_its_falling_generator_the_alpha_family_is_opdplus(alpha):
    """For α < 1 the generator f − f′(∞)(u−1) has −f = w_f/(1−α); Hellinger is α = ½ and reverse KL is α = 0."""
    x, d = torch.linspace(-6, 6, 121, dtype=torch.float64), divergences.get(f"alpha={alpha}")
    at_infinity = d.f_prime(torch.tensor([math.inf])).item()
    assert at_infinity == pytest.approx(1 / (1 - alpha))
    torch.testing.assert_close(shift(d, -1 / (1 - alpha)).reward(x), d.w_f(x) / (1 - alpha))


@pytest.mark.parametrize("alpha", [1, 1.5, 3])
def test_from_alpha_1_on_no_generator_falls(alpha):
    assert divergences.get(f"alpha={alpha}").f_prime(torch.tensor([math.inf])).item() == math.inf


def test_jsd_falling_is_jsd():
    x, jsd, falling = torch.linspace(-6, 6, 121, dtype=torch.float64), *map(divergences.get, ("jsd", "jsd_falling"))
    for function in ("f", "f_prime", "w_f"):
        got, want = (getattr(d, function)(x) for d in (falling, shift(jsd, -math.log(2) / 2)))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_has_a_bound_and_what_opd_descends_has_one_only_if_f_never_rises(name):
    """A liked token brings q h(u)/u: it falls for ever as u grows unless f′(∞) ≤ 0. This is the collapse."""
    d, q = divergences.get(name), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    h = generator(d.reward)
    rises = d.f_prime(torch.tensor([math.inf])).item() > 0
    assert rises == (name not in NEVER_RISES)
    assert bool((d.f_prime(torch.linspace(0.1, 8, 80)) > 0).all()) == rises
    per_q = h.f(x := torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=torch.float64)) / torch.exp(x)  # the share of one token
    assert (per_q.diff() < 0).all() and per_q.diff()[-1] < 0.9 * per_q.diff()[0] if rises else (per_q > 0).all()
    p = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)
    D = (p.exp() * h.f(q.log() - p)).sum(-1)
    assert (D < 0).any() == rises


def test_the_expected_update():
    """p (A − E_p[A]) is the mean over the vocabulary of A_v ∇log p_v, by autograd, for any A of p and q."""
    z, log_q = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = lambda log_p, log_q: log_q**2 - log_p.exp()
    z.requires_grad_()
    log_p = z.log_softmax(-1)
    (want,) = torch.autograd.grad((log_p.exp() * A(log_p, log_q)).detach() @ log_p, z)
    torch.testing.assert_close(update(A, log_p.detach(), log_q), want)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "jsd_falling", "hellinger"])
def test_where_the_expected_updates_lead(name):
    """From 25 students: OPD+ to the teacher, OPD only if f never rises, else to a corner; a liked token has u > 50."""
    d, q = divergences.get(name), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    starts = torch.randn(25, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ways = {A: paths(lambda log_p, log_q, A=A: A(log_q - log_p), starts, q.log()) for A in (d.w_f, d.reward)}
    for A, way in ways.items():
        torch.testing.assert_close(way[0], starts.softmax(-1))
        if A == d.w_f or name in NEVER_RISES:
            torch.testing.assert_close(way[-1], q.expand(25, 3), rtol=0, atol=1e-6)
        else:
            assert (way[-1].amax(-1) > 0.999).all() and (q / way[-1]).amax(-1).min() > 50
        steps = way.log().diff(dim=0) - way.log().diff(dim=0).mean(
            -1, keepdim=True
        )  # of the logits, but for a constant
        assert steps.norm(dim=-1).max() <= 0.2 + 1e-9


def prefixes():
    """Those of `judge`: logits (32, 4) of the student, log-probs of the teacher."""
    z, log_q = 1.5 * torch.randn(2, 32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return z, log_q.log_softmax(-1)


def test_the_asymmetry_is_that_of_the_jacobian():
    """By autograd, for an advantage whose Jacobian has both parts. 0 is a gradient; to detach changes nothing."""
    z, log_q = prefixes()
    J = torch.func.vmap(torch.func.jacrev(lambda z, q: update(ENTROPY, z.log_softmax(-1), q)))(z, log_q)
    worst = ((J - J.mT).norm(dim=(1, 2)) / (2 * J.norm(dim=(1, 2)))).max().item()
    verdict = judge(ENTROPY)
    assert verdict.asymmetry == pytest.approx(worst, rel=1e-6) and worst > 0.3 and not verdict.gradient
    assert judge(lambda p, q: REVERSE(p.detach(), q)).asymmetry < 1e-7


def test_a_jump_makes_a_gradient_of_nothing_although_the_jacobian_is_symmetric():
    """The student's top 2. A sign jumps too, and stays a gradient: only at its own u = 1."""
    top_2, sign = judge(TOP_2), judge(lambda p, q: (q - p).sign())
    assert top_2.asymmetry < 1e-6 and top_2.work > 0.1 and not top_2.gradient
    assert sign.asymmetry < 1e-6 and sign.work < 0.005 and sign.gradient and sign.name == "2 tv"


def test_bias_cosine_and_noise_are_those_that_exact_measures():
    """Over 32 worlds of one token, each enumerated."""
    z, log_q = prefixes()
    A = divergences.get("jsd").reward
    verdict, got = judge(lambda p, q: A(q - p), against="hellinger"), []
    for student, teacher in zip(z, log_q):
        world = exact.World.of((exact.tabular, student[None]), (exact.tabular, teacher[None]), 4, 1)
        of = lambda a, world=world: exact.moments(world, exact.sampled(lambda log_u, *_: a(log_u.detach())))
        one, plus = of(A), of(divergences.get("hellinger").w_f)
        got.append(torch.stack([one.mean[0], plus.mean[0], *(m.variance.expand(4) / 4 for m in (one, plus))]))
    f, g, *variance = torch.stack(got).unbind(1)
    assert verdict.bias == pytest.approx(((f - g).norm() / g.norm()).item())
    assert verdict.cosine == pytest.approx(((f * g).sum() / f.norm() / g.norm()).item())
    per_square = lambda v, m: ((v.sum() + 0 * m.sum()) / m.square().sum()).item()
    assert verdict.noise == pytest.approx((per_square(variance[0], f), per_square(variance[1], g)))


def test_where_h_bends_down():
    for name, start in (("forward_kl", 1 / math.e), ("jsd", 1), ("k3", 1)):
        ((low, high),) = judge(lambda p, q, name=name: divergences.get(name).reward(q - p)).falls
        assert low == pytest.approx(start, rel=0.02) and high == math.inf
    verdict = judge(REVERSE)
    assert verdict.falls == [] and verdict.wrong == ""
    x = torch.linspace(-3, 3, 10, dtype=torch.float64)
    torch.testing.assert_close(verdict.generator.f(x), torch.expm1(x) - x)  # reverse KL, flat at u = 1


def test_more_than_u():
    """A baseline of the prefix is no matter, and whatever else depends on p or q alone is."""
    z, log_q = prefixes()
    baselined = judge(lambda p, q: q - p - (p.exp() * (q - p)).sum(-1, keepdim=True))
    assert baselined.name == "1 reverse_kl" and baselined.noise[0] != pytest.approx(judge(REVERSE).noise[0])
    for A in (lambda p, q: q.exp() - p.exp(), ENTROPY, lambda p, q: (q - p) * q.amax(-1, keepdim=True)):
        assert judge(A).generator is None and judge(A).name == ""


def test_the_name_is_found_up_to_factor_constant_and_sum():
    pair = lambda p, q: 3 * (q - p) - 0.5 * (q - p).exp() + 7
    mixture = lambda p, q: (0.3 * (q - p).exp() + 0.7).log()
    assert judge(pair).name == "3 reverse_kl − 0.5 forward_kl"
    assert judge(mixture).name == "1.43 JSD(β=0.3)"
    assert judge(lambda p, q: (q - p).atan()).name == ""


def test_the_teacher_and_where_the_students_end():
    elsewhere = judge(lambda p, q: 2 * q - p)
    z, log_q = prefixes()
    assert elsewhere.at_teacher == pytest.approx(update(lambda p, q: q, log_q, log_q).norm(dim=-1).max().item())
    sharper = (TEACHER**2 / (TEACHER**2).sum()).expand(55, 3)
    torch.testing.assert_close(elsewhere.ends, sharper, rtol=0, atol=1e-3)
    assert elsewhere.arrive == 0 and judge(REVERSE).arrive == 55 and len(STUDENTS) == 55
    assert "all meet at [0.105 0.237 0.658]" in str(elsewhere)


def test_a_wrong_advantage_is_told_in_one_sentence_with_a_number_what_is_wrong():
    """None of these is in the table of notebooks/lab/field.py."""
    for A, sentence in {
        lambda p, q: (
            (q - p) * (1 - p.exp().amax(-1, keepdim=True))
        ): "gradient of nothing (asymmetry of the Jacobian 0.",
        lambda p, q: (q - p) * torch.exp(p - q): "A falls, and h bends down, for u above 2.7.",
        lambda p, q: q + 1: "A student that is the teacher moves by 0.",
        lambda p, q: -3.0: "It teaches nothing: its expected update is 0 (at most ",
    }.items():
        wrong = judge(A).wrong
        assert sentence in wrong and wrong.count(". ") == 0 and wrong in str(judge(A))


def test_a_bent_generator_need_not_lead_away():
    """x e^(−x²) falls for |x| > 0.71, but has the sign of x: where all tokens are paid alike, they all have u = 1."""
    bent = judge(lambda p, q: (q - p) * (-((q - p) ** 2)).exp())
    assert [b for _, b in bent.falls] == pytest.approx([math.exp(-(0.5**0.5)), math.inf], rel=0.02)
    assert bent.arrive == 55 and bent.wrong


def test_an_advantage_of_the_tokens_own_p_and_of_any_teacher_is_a_gradient():
    """−A_v is the slope of a function of p_v alone; here one that no one would use."""
    own = judge(lambda p, q: (3 * p).sin() * q.roll(1, -1) + q.amax(-1, keepdim=True) * p.exp() ** 2)
    assert own.gradient and own.generator is None and own.length > 0.1


def test_a_verdict_against_no_divergence_is_refused():
    with pytest.raises(ValueError, match="unknown divergence"):
        judge(REVERSE, against="reverse_kI")


# --------------------------------------------------------------------------------------------- what people really paste


def largest(log_p):
    return log_p.exp().amax(-1, keepdim=True)


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(-1, keepdim=True)


def mean_under(log_p, values):
    return (log_p.exp() * values).sum(-1, keepdim=True)


def test_a_term_of_log_p_is_more_than_u():
    """A prefix whose mass is split hides it, since c log p then moves by one constant; other probabilities do not."""
    for A in (
        lambda p, q: q,
        lambda p, q: -p,
        lambda p, q: q + p,
        lambda p, q: q - p + 0.1 * p,
        lambda p, q: q - p + 1e-4 * p,
    ):
        verdict = judge(A)
        assert verdict.generator is None and verdict.falls == [] and verdict.name == ""
        assert verdict.gradient and "A depends on more than u" in str(verdict)


def test_a_fall_beyond_e4_is_found():
    """JSD's f + c(u − 1) rises from u = r/(2 − r) on, r = e^−2c; and log u − 0.01 u falls from u = 100 on."""
    almost = judge(lambda p, q: divergences.get("jsd,c=-0.34").reward(q - p))
    ((low, high),) = almost.falls
    r = math.exp(0.68)
    assert low == pytest.approx(r / (2 - r), rel=0.02) and high == math.inf
    assert almost.unbounded and almost.arrive == 55 and almost.cornered == 3
    ((low, high),) = judge(lambda p, q: q - p - 0.01 * (q - p).exp()).falls
    assert low == pytest.approx(100, rel=0.02) and high == math.inf


def test_a_student_sure_of_a_token_may_run_into_its_corner_where_55_others_arrive():
    """`cornered` looks at the first step only; here are 3,000. Under c = −½ ln 2 f never rises: it comes back."""
    for c, end in ((-0.34, 1), (-math.log(2) / 2, 0)):
        A = divergences.shift(divergences.get("jsd"), c).reward
        logits = torch.tensor([0.9998, 0.0001, 0.0001], dtype=torch.float64).log()
        start = logits.softmax(-1)[0]
        for _ in range(3000):
            logits = logits + update(lambda p, q, A=A: A(q - p), logits.log_softmax(-1), TEACHER.log())
        moved = logits.softmax(-1)[0] - start
        assert moved > 0 if end else moved < 0
        assert judge(lambda p, q, A=A: A(q - p)).cornered == 3 * end


def test_a_mean_has_no_lower_bound_where_the_advantage_falls_like_u():
    """The integral of A/u² diverges then: for −u ln u and k3, and not for −½ ln² u or ln u."""
    unbounded = {name: judge(lambda p, q, n=name: divergences.get(n).reward(q - p)).unbounded for name in NAMES}
    assert {name for name in NAMES if not unbounded[name]} == set(NEVER_RISES)
    assert not judge(lambda p, q: -((q - p) ** 2) / 2).unbounded and not judge(REVERSE).unbounded


@pytest.mark.parametrize("bound", [1, 4.5, 5, 6])
def test_a_clipped_log_ratio_is_a_clipped_divergence(bound):
    verdict = judge(lambda p, q: (q - p).clamp(-bound, bound))
    assert verdict.name == "" and verdict.clipped_name == "1 reverse_kl" and verdict.wrong == ""
    assert verdict.clip == pytest.approx((math.exp(-bound), math.exp(bound)), rel=0.01)
    assert "It is a clipped divergence: A is that of 1 reverse_kl for u from" in str(verdict)


def test_what_fades_or_grows_for_ever_is_not_clipped():
    for A in (
        torch.tanh,
        lambda x: (10 * x).tanh(),
        lambda x: (x / 2).exp() * x,
        torch.sign,
        divergences.get("jsd").w_f,
    ):
        assert judge(lambda p, q, A=A: A(q - p)).clip is None


def test_a_gate_of_the_student_is_more_than_u():
    """Of the largest p: it does work around loops of sure students. Of the token's own p: it stays a gradient."""
    by_largest = judge(lambda p, q: (q - p) * (largest(p) < 0.97))
    by_own = judge(lambda p, q: (q - p) * (p.exp() < 0.99))
    assert by_largest.generator is None and not by_largest.gradient and by_largest.wrong
    assert by_own.generator is None and by_own.gradient and "a gate is closed" in str(by_own)


def test_a_function_of_u_alone_is_a_gradient_also_where_it_jumps():
    """ln u for 0.8 < u < 1.2, else 0: A jumps down at both ends, and students whose u all lie outside rest."""
    window = judge(lambda p, q: (q - p) * ((q - p).exp() > 0.8) * ((q - p).exp() < 1.2))
    assert window.gradient and window.generator and window.arrive < 55 and window.clip is None
    assert "for u at 0.8 and at 1.2." in window.wrong and "gradient of a function" in str(window)


@pytest.mark.parametrize(
    "name, A, coarser_than",
    [
        ("float32", lambda p, q: (q - p).float(), 1e-8),
        ("float32, returned in float64", lambda p, q: 2 * (q - p).float().double() / 2, 1e-8),
        ("float16", lambda p, q: (q - p).half(), 1e-4),
        ("bfloat16", lambda p, q: (q - p).bfloat16(), 1e-3),
        ("bfloat16, each", lambda p, q: q.bfloat16().float() - p.bfloat16().float(), 1e-3),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_low_precision_is_told_apart_from_a_wrong_advantage(name, A, coarser_than):
    verdict = judge(A)
    assert verdict.gradient and verdict.arrive == 55 and verdict.falls == []
    assert verdict.name == "1 reverse_kl"
    assert verdict.resolution > coarser_than and "It is computed in low precision" in str(verdict)
    assert bool(verdict.wrong) == (coarser_than > 1e-6)  # float32 is no fault


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fall_is_told_from_rounding_in_low_precision(dtype):
    """−f of JSD falls for u > 1 and −u ln u for u > 1/e; elsewhere they tremble. In bfloat16 the edge is vague."""
    for name, edge, found_to in (("jsd", 1, 0.05), ("forward_kl", 1 / math.e, 0.4)):
        verdict = judge(lambda p, q, name=name: divergences.get(name).reward((q - p).to(dtype)))
        ((low, high),) = verdict.falls
        assert abs(math.log(low / edge)) < found_to and high == math.inf
        assert verdict.gradient and verdict.arrive == 0


def test_few_values_are_not_low_precision():
    for A in (REVERSE, lambda p, q: (q - p).sign(), lambda p, q: (q - p).clamp(-0.1, 0.1), TOP_2):
        assert "low precision" not in str(judge(A))


def test_none_arrive_where_the_teacher_itself_moves():
    """log u − 0.1 log p ends at p ∝ q^(1/1.1), 0.0193 away from the teacher."""
    verdict = judge(lambda p, q: q - p - 0.1 * p)
    end = TEACHER ** (1 / 1.1) / (TEACHER ** (1 / 1.1)).sum()
    torch.testing.assert_close(verdict.ends, end.expand(55, 3), rtol=0, atol=1e-3)
    assert (end - TEACHER).norm() < 0.02 and verdict.arrive == 0


def test_slow_is_not_wrong():
    """Each never falls, and its update is tiny long before the teacher is reached, or beside that of a large u."""
    for A in (lambda x: x**3, lambda x: x**5, lambda x: torch.exp(6 * x)):
        verdict = judge(lambda p, q, A=A: A(q - p))
        assert verdict.arrive == 55 and verdict.slow > 40 and verdict.wrong == ""
        assert "still approaching" in str(verdict)
    assert judge(REVERSE).slow == 0
    assert judge(lambda p, q: (q - p).clamp(max=6).exp().exp()).arrive == 55  # e^u, to 1e175


@pytest.mark.parametrize("factor", [1e-10, 1e10, 1e-100])
def test_the_size_of_an_advantage_changes_no_verdict(factor):
    verdict = judge(lambda p, q: factor * (q - p))
    assert verdict.name == f"{factor:.3g} reverse_kl" and verdict.arrive == 55 and verdict.wrong == ""
    assert judge(lambda p, q: factor * ENTROPY(p, q)).asymmetry == pytest.approx(judge(ENTROPY).asymmetry)
    assert "teaches nothing" in judge(lambda p, q: -factor).wrong


def whitened(log_p, log_q):
    log_u = log_q - log_p
    return (log_u - log_u.mean()) / log_u.std()


@pytest.mark.parametrize(
    "A, reason",
    [
        (whitened, "at one prefix it depends on the other prefixes of the batch"),
        (lambda p, q: q - p + torch.rand_like(p), "or on chance"),
        (lambda p, q: (q - p) - (q - p).mean(0), "at one prefix it depends on the other prefixes of the batch"),
        (lambda p, q: (q - p) / (q - p).abs(), "0/0 in A at u = 1"),
        (lambda p, q: -((q - p) ** 3) / (q - p), "0/0 in A at u = 1"),
        (lambda p, q: (q - p) / (q - p).norm(dim=-1, keepdim=True), "0/0 in A at u = 1"),
        (lambda p, q: (q >= q.topk(5).values[..., -1:]) * (q - p), "at 4 tokens it fails with .*a top k needs a k of"),
        (lambda p, q: (q >= q.topk(4).values[..., -1:]) * (q - p), "at 3 tokens it fails with .*a top k needs a k of"),
        (lambda p, q: (p.exp() * (q - p)).sum(-1), "return as many numbers"),
        (lambda p, q: (p - 1).log(), "A is not finite for some token of 32 ordinary prefixes"),
    ],
)
def test_what_one_prefix_cannot_judge_is_refused_in_one_sentence(A, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        judge(A)
    assert str(refusal.value).count(". ") == 0


def test_a_formula_that_loses_its_digits_does_not_seem_to_fall():
    """u ln(1 + 1/u) rises to 1, but 1 + 1/u has few digits of 1/u left where u is large."""
    assert judge(lambda p, q: (q - p).exp() * (1 + (p - q).exp()).log()).falls == []
    naive = lambda x: -(x.exp() * x - (1 + x.exp()) * ((1 + x.exp()) / 2).log()) / 2
    ((low, high),) = judge(lambda p, q: naive(q - p)).falls
    assert low == pytest.approx(1, rel=0.02) and high == math.inf


def test_what_is_flat_on_both_sides_of_one_rests_short_of_the_teacher():
    """It never falls, and h is convex, but flat at its lowest."""
    verdict = judge(lambda p, q: (q - p) * ((q - p).abs() > 1))
    assert verdict.gradient and verdict.falls == [] and verdict.arrive < 55
    assert verdict.flat == pytest.approx((1 / math.e, math.e), rel=0.01) and "students rest there" in verdict.wrong
    assert judge(REVERSE).flat is None and judge(lambda p, q: (q - p) ** 9).flat is None


def test_a_fall_that_fades_goes_on_and_one_that_ends_does_not():
    """−tanh² x falls for all x > 0, to −1 in float64; a ramp ends; and what falls from 1 on is flat before."""
    ramp = lambda x: -x.clamp(0, 2)
    for A, edges in ((lambda x: -(x.tanh() ** 2), (1, math.inf)), (ramp, (1, math.exp(2)))):
        assert judge(lambda p, q, A=A: A(q - p)).falls == [pytest.approx(edges, rel=0.02)]
    assert judge(lambda p, q: -(torch.relu((q - p).exp() - 1) ** 2)).falls == [pytest.approx((1, math.inf), rel=0.02)]


def test_many_ranges_are_told_briefly():
    """sin(ln u) falls from u = e^(π/2) to e^(3π/2), and so on, up and down: ten times in all."""
    verdict = judge(lambda p, q: (q - p).sin())
    edges = [math.exp(x * math.pi / 2) for x in (-3, -1, 1, 3)]
    assert len(verdict.falls) == 10 and not verdict.unbounded
    assert [*verdict.falls[4], *verdict.falls[5]] == pytest.approx(edges, rel=0.02)
    assert "from 4.8 to 111 and in 7 ranges farther from 1" in verdict.wrong


IN_U = lambda A: lambda log_p, log_q: A(log_q - log_p)

# What follows by hand. A of u alone is a gradient; it rises or falls with x = ln u as its derivative says. A of the
# token's own p and anything of q is a gradient. A positive factor of the prefix leads to the teacher all the same, and
# leaves a gradient only if it is the teacher's or a function of what is descended.
BY_HAND = {
    "x + ½ tanh x": (IN_U(lambda x: x + x.tanh() / 2), dict(alone=True, falls=[], arrive=55, name="")),
    "softplus x: 2 w of JSD, plus a constant": (
        IN_U(torch.nn.functional.softplus),
        dict(alone=True, falls=[], arrive=55, name="2 jsd"),
    ),
    "√u x: slope √u (1 + x/2), negative for x < −2": (
        IN_U(lambda x: (x / 2).exp() * x),
        dict(alone=True, falls=[(0, math.exp(-2))], arrive=55, name=""),
    ),
    "−1/u: half of Neyman's 2 − 2/u": (
        IN_U(lambda x: -(-x).exp()),
        dict(alone=True, falls=[], arrive=55, name="0.5 neyman_chi2"),
    ),
    "u^1.5, of the α-family": (IN_U(lambda x: (1.5 * x).exp()), dict(alone=True, falls=[], arrive=55, name="")),
    "x − E[x²], a baseline": (
        lambda p, q: q - p - mean_under(p, (q - p) ** 2),
        dict(alone=True, falls=[], arrive=55, name="1 reverse_kl"),
    ),
    "max(x, 0): flat below u = 1 only": (
        IN_U(torch.relu),
        dict(alone=True, falls=[], arrive=55, name="", clipped="1 reverse_kl", clip=(1, math.inf)),
    ),
    "min(u, 3)": (
        IN_U(lambda x: x.exp().clamp(max=3)),
        dict(alone=True, falls=[], arrive=55, name="", clipped="1 forward_kl", clip=(0, 3)),
    ),
    "clip(u, 0.8, 1.2)": (
        IN_U(lambda x: x.exp().clamp(0.8, 1.2)),
        dict(alone=True, falls=[], arrive=55, name="", clipped="1 forward_kl", clip=(0.8, 1.2)),
    ),
    "−|x|: less for every difference": (
        IN_U(lambda x: -x.abs()),
        dict(alone=True, falls=[(1, math.inf)], arrive=0, name="", cornered=3),
    ),
    "p x: 0 where all p x are alike, and not all u > 1": (lambda p, q: p.exp() * (q - p), dict(alone=False, arrive=55)),
    "x where q > 0.1": (lambda p, q: (q - p) * (q.exp() > 0.1), dict(alone=False, arrive=55)),
    "x + 0.2 ln(1 − p): moves the teacher": (
        lambda p, q: q - p + 0.2 * torch.log1p(-p.exp()),
        dict(alone=False, arrive=0),
    ),
    "x / (1 + H(q))": (lambda p, q: (q - p) / (1 + entropy(q)), dict(alone=False, arrive=55)),
    "x E_p[u²], a factor of the student": (
        lambda p, q: (q - p) * mean_under(p, (2 * (q - p)).exp()),
        dict(alone=False, arrive=55, gradient=False),
    ),
    "x KL(p‖q): the gradient of ½ KL², and slow": (
        lambda p, q: (q - p) * mean_under(p, p - q),
        dict(alone=False, arrive=55, slow=True),
    ),
    "q: all to the teacher's likeliest token": (lambda p, q: q.exp(), dict(alone=False, arrive=0, cornered=1)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_verdict_is_the_one_that_follows_by_hand(name):
    A, want = BY_HAND[name]
    verdict = judge(A)
    assert (verdict.generator is not None) == want["alone"]
    assert verdict.gradient == want.get("gradient", True)
    assert verdict.arrive == want["arrive"] and verdict.cornered == want.get("cornered", 0)
    assert (verdict.slow > 0) == want.get("slow", False)
    assert verdict.name == want.get("name", "") and verdict.clipped_name == want.get("clipped", "")
    assert len(verdict.falls) == len(want.get("falls", []))
    for found, derived in zip(verdict.falls, want.get("falls", [])):
        assert found == pytest.approx(derived, rel=0.02)
    if "clip" in want:
        assert verdict.clip == pytest.approx(want["clip"], rel=0.02)
