"""Every divergence: f against its textbook formula, f′ against autograd, w_f against −f + u f′."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_opd import divergences

NAMES = [*divergences.DIVERGENCES, "alpha=-0.5", "alpha=0", "alpha=0.5", "alpha=1", "alpha=1.7", "alpha=-2"]

# f as PAPERS print it, in u: independent of the log-space forms of divergences.py.
TEXTBOOK = {
    "reverse_kl": lambda u: -u.log(),
    "forward_kl": lambda u: u * u.log(),
    "jsd": lambda u: (u * u.log() - (1 + u) * ((1 + u) / 2).log()) / 2,
    "pearson_chi2": lambda u: (u - 1) ** 2,
    "neyman_chi2": lambda u: (u - 1) ** 2 / u,
    "hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "tv": lambda u: (u - 1).abs() / 2,
    "k3": lambda u: u - 1 - u.log(),
    "jsd_falling": lambda u: (u * u.log() - (1 + u) * ((1 + u) / 2).log() - math.log(2) * (u - 1)) / 2,
    "alpha=-0.5": lambda u: (u**-0.5 + 0.5 * u - 1.5) / 0.75,
    "alpha=0": lambda u: u - 1 - u.log(),
    "alpha=0.5": lambda u: (u**0.5 - 0.5 * u - 0.5) / -0.25,
    "alpha=1": lambda u: u * u.log() - u + 1,
    "alpha=1.7": lambda u: (u**1.7 - 1.7 * u + 0.7) / (1.7 * 0.7),
    "alpha=-2": lambda u: (u**-2.0 + 2 * u - 3) / 6,
}

# w_f as the paper's Table 1 and its extension print it.
TABLE = {
    "reverse_kl": lambda u: u.log() - 1,
    "forward_kl": lambda u: u,
    "jsd": lambda u: ((1 + u) / 2).log() / 2,
    "pearson_chi2": lambda u: u**2 - 1,
    "neyman_chi2": lambda u: 2 - 2 / u,
    "hellinger": lambda u: u.sqrt() - 1,
    "tv": lambda u: (u - 1).sign() / 2,
    "k3": lambda u: u.log(),
    "jsd_falling": lambda u: ((1 + u) / 4).log() / 2,
}
NOT_AT_ITS_MINIMUM = ("reverse_kl", "forward_kl", "jsd_falling")  # f changes its sign at u = 1


@pytest.fixture
def log_u():
    return torch.cat([torch.linspace(-8, 8, 161, dtype=torch.float64), torch.tensor([0.0, 1e-3, -1e-3])])


@pytest.mark.parametrize("name", NAMES)
def test_f_equals_the_textbook_formula(name, log_u):
    torch.testing.assert_close(divergences.get(name).f(log_u), TEXTBOOK[name](log_u.exp()), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", TABLE)
def test_unbiased_equals_the_table(name, log_u):
    torch.testing.assert_close(divergences.get(name).w_f(log_u), TABLE[name](log_u.exp()), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_f_prime_is_the_derivative_of_f(name, log_u):
    log_u = log_u[log_u.abs() > 1e-9] if name == "tv" else log_u  # |u − 1| has no slope at u = 1
    log_u.requires_grad_()
    d = divergences.get(name)
    (slope,) = torch.autograd.grad(d.f(log_u).sum(), log_u)  # df/dx = u f′(u)
    torch.testing.assert_close(d.f_prime(log_u), slope / log_u.exp(), rtol=1e-8, atol=1e-9)
    if name != "tv":
        assert torch.autograd.gradcheck(d.f, log_u.detach().clamp(-4, 4).requires_grad_(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_unbiased_is_minus_f_plus_u_f_prime(name, log_u):
    d = divergences.get(name)
    expected = -d.f(log_u) + log_u.exp() * d.f_prime(log_u)
    torch.testing.assert_close(d.w_f(log_u), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(d.reward(log_u), -d.f(log_u), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_f_vanishes_at_one_and_the_divergence_is_not_negative(name):
    d = divergences.get(name)
    assert d.f(torch.zeros(1, dtype=torch.float64)).item() == 0
    logits = torch.randn(2, 400, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    q, p = logits.log_softmax(-1)
    D = (p.exp() * d.f(q - p)).sum(-1)
    assert (D > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_f_is_convex(name):
    u = torch.linspace(0.05, 6, 400, dtype=torch.float64)
    slope = divergences.get(name).f_prime(u.log())
    assert (slope.diff() >= -1e-12).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", ["f", "f_prime", "reward", "w_f"])
def test_float32_is_finite_and_accurate_where_the_value_is_representable(name, function):
    x = torch.cat([torch.linspace(-30, 30, 1201), torch.logspace(-6, -1, 40), -torch.logspace(-6, -1, 40)])
    got = getattr(divergences.get(name), function)(x)
    want = getattr(divergences.get(name), function)(x.double())
    representable = want.abs() < 1e38
    assert got.dtype == torch.float32 and (representable.all() or (name, function) == ("alpha=-2", "f_prime"))
    atol = 1e-6 if name == "jsd_falling" else 1e-30  # f and w_f pass through 0 with a slope
    torch.testing.assert_close(got[representable].double(), want[representable], rtol=3e-5, atol=atol)


def test_float64_forms_near_one_against_the_power_series():
    """f = f″(1) x²/2 + …: the textbook formulas lose all their digits here, so they cannot be the reference."""
    x = torch.tensor([1e-5, -1e-5], dtype=torch.float64)
    for name, second in [
        ("jsd", 0.25),
        ("hellinger", 0.5),
        ("pearson_chi2", 2),
        ("neyman_chi2", 2),
        ("k3", 1),
        ("alpha=0.3", 1),
    ]:
        torch.testing.assert_close(divergences.get(name).f(x), second * x**2 / 2, rtol=1e-4, atol=0)


def test_k3_and_reverse_kl_are_one_divergence_with_two_stop_gradient_rewards(log_u):
    k1 = divergences.get("reverse_kl")
    k3 = divergences.get("k3")
    difference = k3.w_f(log_u) - k1.w_f(log_u)
    torch.testing.assert_close(difference, torch.ones_like(log_u))
    assert (k3.reward(log_u) - k1.reward(log_u)).std() > 1


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("step", [1e-6, -1e-6, 1e-11, -1e-11, 1e-13])
def test_the_alpha_family_is_continuous(alpha, step, log_u):
    at = divergences.get(f"alpha={alpha}")
    near = divergences.get(f"alpha={alpha + step!r}")
    for function in ("f", "f_prime", "w_f"):
        torch.testing.assert_close(getattr(near, function)(log_u), getattr(at, function)(log_u), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name,factor,alpha", [("hellinger", 0.5, 0.5), ("pearson_chi2", 2, 2), ("neyman_chi2", 2, -1), ("forward_kl", 1, 1)]
)
def test_the_alpha_family_contains_the_others(name, factor, alpha, log_u):
    """Equal up to a factor and a multiple of u − 1, that is, w_f up to a constant."""
    difference = divergences.get(name).w_f(log_u) - factor * divergences.get(f"alpha={alpha}").w_f(log_u)
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=1e-9, atol=1e-9)


# f and w_f at u → 0 (a token the teacher forbids) and at u → ∞.
INF = math.inf
LIMITS = {
    "reverse_kl": (INF, -INF, -INF, INF),
    "forward_kl": (0, INF, 0, INF),
    "jsd": (math.log(2) / 2, INF, -math.log(2) / 2, INF),
    "pearson_chi2": (1, INF, -1, INF),
    "neyman_chi2": (INF, INF, -INF, 2),
    "hellinger": (1, INF, -1, INF),
    "tv": (0.5, INF, -0.5, 0.5),
    "k3": (INF, INF, -INF, INF),
    "jsd_falling": (math.log(2), -INF, -math.log(2), INF),
    "alpha=0.5": (2, INF, -2, INF),
    "alpha=-1": (INF, INF, -INF, 1),
    "alpha=3": (1 / 3, INF, -1 / 3, INF),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits(name, dtype):
    d = divergences.get(name)
    ends = torch.tensor([-INF, INF], dtype=dtype)
    f0, f_inf, w0, w_inf = LIMITS[name]
    if name == "reverse_kl":
        f_inf = -INF  # −ln u falls for ever: only its mean under p is a divergence
    torch.testing.assert_close(d.f(ends), torch.tensor([f0, f_inf], dtype=dtype))
    torch.testing.assert_close(d.w_f(ends), torch.tensor([w0, w_inf], dtype=dtype))


def test_names():
    assert divergences.get("alpha=0.25").name == "alpha=0.25"
    for name in ("jsd,c=-0.25", "alpha=0.5,c=2"):
        assert divergences.get(name).name == name
    moved = divergences.get("jsd,c=-0.25")
    jsd = divergences.get("jsd")
    e = torch.ones(1)
    assert moved.f(e).item() == pytest.approx(jsd.f(e).item() - math.expm1(1) / 4)
    with pytest.raises(ValueError, match="unknown divergence 'jds' .did you mean jsd"):
        divergences.get("jds,c=1")
    with pytest.raises(ValueError, match="did you mean forward_kl.*reverse_kl.*alpha=<float>"):
        divergences.get("forwardkl")
    for bad in ("alpha=", "alpha=nan", "alpha=inf", "alpha=x", "alpha=1e60", "jsd,c=", "jsd,c=inf"):
        with pytest.raises(ValueError, match="number from -10 to 10"):
            divergences.get(bad)


@pytest.mark.parametrize("name", [*NAMES, "alpha=0.3", "alpha=1.4", "alpha=-7"])
@given(x=st.floats(-2000, 2000) | st.floats(-80, 80) | st.sampled_from([-math.inf, math.inf]))
@settings(max_examples=80, deadline=None)
def test_no_log_ratio_gives_nan_or_an_infinity_of_the_wrong_sign(name, x):
    """All of u from 0 to ∞; and every f with its minimum at u = 1 is non-negative pointwise."""
    d = divergences.get(name)
    for dtype in (torch.float32, torch.float64):
        log_u = torch.tensor([x], dtype=dtype)
        for function in (d.f, d.f_prime, d.reward, d.w_f):
            assert not function(log_u).isnan().any()
        if name not in NOT_AT_ITS_MINIMUM:
            assert d.f(log_u) >= 0
    if abs(x) <= 300:  # float32 agrees with float64 wherever the value fits
        got = d.f(torch.tensor(x)).double()
        want = d.f(torch.tensor(x, dtype=torch.float32).double())
        if want.abs() < 1e36:  # with room for the division by α(α − 1) still to come
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 if name == "jsd_falling" else 1e-30)
