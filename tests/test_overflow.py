"""Where u = q/p is too large or too small for a float, values and gradients are right as long as a float can hold them.

The references are the textbook formulas, computed with hundreds of digits.
"""

import math

import mpmath
import numpy
import pytest
import torch
from conftest import new_model

from nano_opd import arithmetic, divergences, gkd, grpo, opd, opdplus, topk
from nano_opd.evaluate import evaluate
from nano_opd.tokenizer import PAD

NAMES = [*divergences.DIVERGENCES, *(f"alpha={a}" for a in (-2, -0.5, 0, 0.3, 0.5, 1, 1.1, 2, 3)), "jsd,c=-0.34"]
# to the ends of float32, where u overflows at 88.7, and of float64, where it does at 709.8, and beyond
SIZES = (1e-3, 0.05, 1, 10, 19, 21, 30, 39, 41, 44, 60, 79, 81, 88, 89, 100, 300, 700, 2e3)
LOG_U = [0.0] + [sign * size for size in SIZES for sign in (1, -1)]
ln = mpmath.log


def jsd(u):
    return (u * ln(u) - (1 + u) * ln((1 + u) / 2)) / 2


def jsd_prime(u):
    return ln(2 * u / (1 + u)) / 2


def jsd_second(u):
    return 1 / (2 * u * (1 + u))


# f, f′ and f″ as functions of u
TEXTBOOK = {
    "reverse_kl": (lambda u: -ln(u), lambda u: -1 / u, lambda u: u**-2),
    "forward_kl": (lambda u: u * ln(u), lambda u: ln(u) + 1, lambda u: 1 / u),
    "jsd": (jsd, jsd_prime, jsd_second),
    "pearson_chi2": (lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1), lambda u: 2),
    "neyman_chi2": (lambda u: (u - 1) ** 2 / u, lambda u: 1 - u**-2, lambda u: 2 * u**-3),
    "hellinger": (
        lambda u: (mpmath.sqrt(u) - 1) ** 2,
        lambda u: 1 - 1 / mpmath.sqrt(u),
        lambda u: u ** mpmath.mpf(-1.5) / 2,
    ),
    "tv": (lambda u: abs(u - 1) / 2, lambda u: mpmath.sign(u - 1) / 2, lambda u: 0),
    "k3": (lambda u: u - 1 - ln(u), lambda u: 1 - 1 / u, lambda u: u**-2),
    "jsd_falling": (lambda u: jsd(u) - ln(2) / 2 * (u - 1), lambda u: jsd_prime(u) - ln(2) / 2, jsd_second),
    "jsd,c=-0.34": (
        lambda u: jsd(u) - mpmath.mpf("0.34") * (u - 1),
        lambda u: jsd_prime(u) - mpmath.mpf("0.34"),
        jsd_second,
    ),
}


def alpha_family(name):
    """f, f′ and f″ of a member of the α-family."""
    a = mpmath.mpf(name.removeprefix("alpha="))
    if a == 0:
        return TEXTBOOK["k3"]
    if a == 1:
        return (lambda u: u * ln(u) - u + 1), (lambda u: ln(u)), (lambda u: 1 / u)
    f = lambda u: (u**a - a * u - (1 - a)) / (a * (a - 1))
    return f, (lambda u: (u ** (a - 1) - 1) / (a - 1)), (lambda u: u ** (a - 2))


def textbook(name):
    return alpha_family(name) if name.startswith("alpha=") else TEXTBOOK[name]


def value_and_slope(name, which, x):
    """f, f′ or w_f at x = log u, and its slope in x."""
    f, f_prime, f_second = textbook(name)
    u = mpmath.exp(x)
    if which == "f":
        return f(u), u * f_prime(u)
    if which == "f_prime":
        return f_prime(u), u * f_second(u)
    return u * f_prime(u) - f(u), u**2 * f_second(u)


def require_right(got, expected, dtype, where):
    """Within rounding where the dtype can hold the number, infinite where it cannot, and never NaN."""
    largest = torch.finfo(dtype).max
    relative, absolute = (2e-4, 1e-6) if dtype == torch.float32 else (1e-9, 1e-14)
    assert not math.isnan(got), where
    if abs(expected) > 4 * largest:
        assert got == math.copysign(math.inf, expected), (where, got)
    elif abs(expected) < largest / 20:
        assert abs(got - expected) <= relative * abs(expected) + absolute, (where, got, float(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("which", ["f", "f_prime", "w_f"])
@pytest.mark.parametrize("name", NAMES)
def test_f_and_f_prime_and_w_f_are_right_to_the_ends_of_floats(name, which, dtype):
    x = torch.tensor(LOG_U, dtype=dtype, requires_grad=True)
    value = getattr(divergences.get(name), which)(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    for log_u, got, got_slope in zip(x.tolist(), value.tolist(), slope.tolist()):
        with mpmath.workdps(2000 if abs(log_u) > 1e3 else 700):
            expected, expected_slope = value_and_slope(name, which, mpmath.mpf(log_u))
            require_right(got, expected, dtype, (log_u, "value"))
            if not (name == "tv" and log_u == 0):  # |u − 1| has a kink there
                require_right(got_slope, expected_slope, dtype, (log_u, "slope"))


# ------------------------------------------------------------------------------------------- over the whole vocabulary

SCALES = (1, 10, 40)
EVERY = [*divergences.DIVERGENCES, "alpha=-2", "alpha=-0.5", "alpha=0.5", "alpha=1.1", "alpha=3", "jsd,c=-0.34"]


def logits_of(scale):
    """Student and teacher, (25, 4, 7) each; at a scale of 40 log u reaches 250."""
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(2, 25, 4, 7, generator=generator)


def require_close_where_representable(got, expected, size):
    """expected is float64: equal within the rounding of terms of this size, or infinite beyond float32."""
    assert not got.isnan().any()
    small = expected.abs() < 1e37
    allowed = 1e-3 * expected.abs() + 2e-6 * size + 1e-5
    assert ((got.double() - expected).abs() <= allowed)[small].all()
    assert got[expected.abs() > 1e39].isinf().all()


def divergence_of_each_prefix(name, logits, stop_gradient):
    """Value of every prefix's own divergence by gkd.loss, (N,), and its gradient in the student's logits, (N, V)."""
    student, teacher = logits.flatten(1, 2).unsqueeze(2)  # (N, 1, V) each
    student = student.clone().requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    values = [
        gkd.loss(student[n : n + 1], teacher[n : n + 1], mask, divergences.get(name), stop_gradient)
        for n in range(len(student))
    ]
    values = torch.stack(values)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient.squeeze(1)


def exact_divergence_of_each_prefix(name, logits, stop_gradient):
    """The same by p f(q/p), with hundreds of digits: value and Σ_v ∇p_v m_v with m = f − u f′, or f; max |p_v m_v|."""
    f, f_prime, _ = textbook(name)
    student, teacher = logits.double().flatten(1, 2)
    values = []
    gradients = []
    sizes = []
    with mpmath.workdps(400):
        for z, y in zip(student.tolist(), teacher.tolist()):
            p = softmax(z)
            q = softmax(y)
            u = [b / a for a, b in zip(p, q)]
            cost = [f(x) for x in u]
            marginal = cost if stop_gradient else [c - x * f_prime(x) for c, x in zip(cost, u)]
            mean = sum(a * m for a, m in zip(p, marginal))
            values.append(to_float(sum(a * c for a, c in zip(p, cost))))
            gradients.append([to_float(a * (m - mean)) for a, m in zip(p, marginal)])
            sizes.append([to_float(max(abs(a * m) for a, m in zip(p, marginal)))])
    return [torch.tensor(numbers, dtype=torch.float64) for numbers in (values, gradients, sizes)]


def softmax(logits):
    weights = [mpmath.exp(z) for z in logits]
    total = sum(weights)
    return [w / total for w in weights]


def to_float(x):
    """A float64, infinite beyond its range."""
    return float(x) if abs(x) < mpmath.mpf("1e300") else math.copysign(math.inf, x)


@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EVERY)
def test_the_divergence_over_the_vocabulary_is_right_wherever_float32_can_hold_it(name, scale, stop_gradient):
    logits = logits_of(scale)
    value, gradient = divergence_of_each_prefix(name, logits, stop_gradient)
    expected, expected_gradient, size = exact_divergence_of_each_prefix(name, logits, stop_gradient)
    require_close_where_representable(value, expected, size=0.0)
    representable = (expected.abs() < 1e36) & (size.squeeze(1) < 1e36)
    require_close_where_representable(gradient[representable], expected_gradient[representable], size[representable])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EVERY)
def test_the_exact_baselines_are_right_wherever_float32_can_hold_them(name, scale):
    logits = logits_of(scale)
    f, f_prime, _ = textbook(name)
    divergence = divergences.get(name)
    got = [method.exact_baseline(*logits, divergence).flatten() for method in (opd, opdplus)]
    expected = []
    with mpmath.workdps(400):
        for z, y in zip(*logits.double().flatten(1, 2).tolist()):
            p = softmax(z)
            u = [b / a for a, b in zip(p, softmax(y))]
            cost = sum(a * f(x) for a, x in zip(p, u))
            expected.append((to_float(-cost), to_float(sum(a * x * f_prime(x) for a, x in zip(p, u)) - cost)))
    log_u = (logits[1].log_softmax(-1) - logits[0].log_softmax(-1)).flatten(0, 1)
    apart = log_u.abs().amin(-1) > 1e-5  # total variation's w_f jumps at u = 1, and rounding may cross it
    for baseline, column in zip(got, torch.tensor(expected, dtype=torch.float64).T):
        require_close_where_representable(baseline[apart], column[apart], size=float(scale))


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "hellinger", "reverse_kl"])
def test_the_top_k_loss_is_finite_where_u_overflows(name):
    """A top token that the student all but forbids: p w_f(u) log p is e^-120 · w_f(e^120) · -120."""
    student = torch.tensor([[[0.0, -120.0, -1.0]]], requires_grad=True)
    teacher = torch.tensor([[[-5.0, 0.0, -3.0]]])
    tokens = torch.tensor([[0]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    wide = student.detach().double().requires_grad_()
    A = divergences.get(name).w_f
    got = topk.loss(student, teacher, tokens, mask, A, 2)
    expected = topk.loss(wide, teacher.double(), tokens, mask, A, 2)
    got.backward()
    expected.backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-3, atol=1e-6)


def test_a_token_that_neither_model_can_say_adds_nothing():
    """Vocabularies are padded with −∞. The value, its gradient, and the baselines are those without the padding."""
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(logits, (0, 2), value=-torch.inf)
    mask = torch.ones(3, 4, dtype=torch.bool)
    for name in EVERY:
        divergence = divergences.get(name)
        for stop_gradient in (False, True):
            student = logits[0].clone().requires_grad_()
            wide = padded[0].clone().requires_grad_()
            loss = gkd.loss(student, logits[1], mask, divergence, stop_gradient)
            same = gkd.loss(wide, padded[1], mask, divergence, stop_gradient)
            torch.testing.assert_close(loss, same)
            loss.backward()
            same.backward()
            torch.testing.assert_close(student.grad, wide.grad[..., :5])
        for method in (opd, opdplus):
            narrow = method.exact_baseline(*logits, divergence)
            torch.testing.assert_close(narrow, method.exact_baseline(*padded, divergence))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_summed_in_float32(dtype):
    logits = torch.randn(2, 3, 4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.ones(3, 4, dtype=torch.bool)
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    jsd = divergences.get("jsd")
    for loss in (
        lambda p, q: gkd.loss(p, q, mask, jsd),
        lambda p, q: topk.loss(p, q, tokens, mask, jsd.w_f, 3),
        lambda p, q: opdplus.exact_baseline(p, q, jsd, mask).sum(),
    ):
        low = loss(*logits)
        high = loss(*logits.float())
        assert low.dtype == torch.float32 and torch.equal(low, high)


def test_a_new_divergence_needs_no_formula_for_large_u():
    """Its dual follows from f, f′ and w_f: Jeffreys' divergence, f = (u − 1) ln u, whose mean is Σ (q − p) ln(q/p)."""
    jeffreys = divergences.Divergence(
        "jeffreys",
        f=lambda x: torch.expm1(x) * x,
        f_prime=lambda x: x - torch.expm1(-x),
        w_f=lambda x: x + torch.expm1(x),
    )
    logits = logits_of(40)
    student, teacher = logits.double().log_softmax(-1)
    value = jeffreys.weighted_f(*logits.log_softmax(-1)).sum(-1)
    expected = ((teacher.exp() - student.exp()) * (teacher - student)).sum(-1)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- ratios and rewards


@pytest.mark.parametrize("advantage,loss", [(1.0, -1.28), (0.0, 0.0)])
def test_a_ratio_that_overflows_has_the_loss_and_the_gradient_of_a_clipped_one(advantage, loss):
    logp = torch.zeros(1, 1, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    got = grpo.clipped_surrogate(logp, torch.full((1, 1), -100.0), torch.tensor([advantage]), mask, 0.2, 0.28)
    got.backward()
    assert got.item() == pytest.approx(loss) and logp.grad.item() == 0


def test_a_large_ratio_with_blame_keeps_its_gradient():
    """With A < 0 the surrogate has no upper clip: at ρ = e^30 the loss is e^30, and so is its slope."""
    logp = torch.zeros(1, 1, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    got = grpo.clipped_surrogate(logp, torch.full((1, 1), -30.0), torch.tensor([-1.0]), mask, 0.2, 0.28)
    got.backward()
    assert got.item() == pytest.approx(math.exp(30)) and logp.grad.item() == pytest.approx(math.exp(30))


def test_the_kl_and_the_entropy_of_an_evaluation_ignore_what_the_student_never_says():
    """Both models have −∞ for a token: 0 · ∞ would make the columns NaN without a word."""
    student = new_model(20)
    teacher = new_model(20, n_layer=1)
    for model in (student, teacher):
        forbid(model, PAD)
    problems = arithmetic.sample_problems("add", 2, 30, numpy.random.default_rng(0))
    measured = evaluate(student, teacher, problems, 8, torch.Generator().manual_seed(0))
    assert measured["kl"] > 0 and measured["entropy"] > 0


def forbid(model, token):
    """Give one token the logit −∞ after every prefix."""
    forward = model.forward

    def without_token(*arguments, **options):
        logits = forward(*arguments, **options)
        return logits.index_fill(-1, torch.tensor(token), -torch.inf) if logits.shape[-1] > token else logits

    model.forward = without_token
