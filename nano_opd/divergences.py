"""f-divergences D_f(q‖p) = E_p[f(u)] of a teacher q from a student p, where u = q/p at one token.

A divergence is given by its generator f, convex with f(1) = 0. On-policy distillation makes two rewards of it:

    reward   −f(u)                       all that OPD keeps of the gradient
    w_f      w_f(u) = −f(u) + u f′(u)    OPD+'s corrected advantage

    divergence                  f(u)                                         w_f(u)
    reverse KL, KL(p‖q)         −ln u                                        ln u − 1
    forward KL, KL(q‖p)         u ln u                                       u
    Jensen–Shannon              ½[u ln u − (1+u) ln((1+u)/2)]                ½ ln((1+u)/2)
    Pearson χ²                  (u−1)²                                       u² − 1
    Neyman χ²                   (u−1)²/u                                     2 − 2/u
    squared Hellinger           (√u−1)²                                      √u − 1
    total variation             ½|u−1|                                       ½ sign(u−1)
    α-family                    (u^α − αu − (1−α)) / (α(α−1))                (u^α − 1)/α

Source: arXiv 2606.01039, Table 1, for the first three rows; the others follow from the same w_f.

Since E_p[u − 1] = 0, f + c(u−1) is another generator of the same divergence (`shift`). It moves w_f by the constant c,
which changes no expected gradient, but −f by c(1−u), which does. So two entries are one divergence twice: k3 is reverse
KL, and jsd_falling is jsd with c = −½ ln 2, the largest for which f never rises: OPD works from there down (opd.py).

The code computes them from x = log u = log q − log p, in nats, because u itself overflows and u − 1 cancels. Each
function and its slope is right for every x, and infinite only where no float of that dtype can hold the number. The
α-family has f′ = φ_{α−1} and w_f = φ_α with the Box–Cox transform φ_a = (u^a − 1)/a, which is ln u at a = 0. Up to a
factor and a multiple of u − 1, α = 0 is reverse KL, ½ Hellinger, 1 forward KL, 2 Pearson and −1 Neyman.

Over a whole vocabulary the mean E_p[f(u)] is a sum of p f(u). There u can overflow while p f(u) is an ordinary number.
So where u is large the sum takes it from the teacher's side (`Divergence.weighted_f`),

    p f(u)  =  q f(u)/u  =  q [f′(u) − w_f(u)/u]

which needs no formula of its own. This f(u)/u is the dual generator f°(v) = v f(1/v) at v = 1/u.

At a token that the teacher forbids, x = −∞, every function returns its limit at u → 0 (finite or infinite, never NaN).
Functions map tensors of any shape elementwise and are differentiable; nothing here detaches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, exp, expm1, log1p
from torch.nn.functional import softplus

from nano_opd.checks import did_you_mean


@dataclass(frozen=True)
class Divergence:
    """The generator f, its slope f′ and OPD+'s advantage w_f = −f + u f′, each a function of log u."""

    name: str
    f: Callable[[Tensor], Tensor]
    f_prime: Callable[[Tensor], Tensor]
    w_f: Callable[[Tensor], Tensor]
    power: float = 0.0  # α, if f grows like u^α with α > 1 as u → ∞, or with α < 0 as u → 0

    def reward(self, log_u: Tensor) -> Tensor:
        """Return −f(u): the reward of OPD, which forgets that u depends on the student."""
        return -self.f(log_u)

    def weighted_f(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return p f(u) of every token, right also where u = q/p overflows; its sum over the vocabulary is D_f(q‖p).

        The idea: where u is small the product is computed as it stands. Where u is large, f(u) may overflow and p
        underflow, but q, f′(u) and w_f(u)/u stay moderate, and p f(u) = q f(u)/u = q [f′(u) − w_f(u)/u].

        log_p, log_q  log-probs of student and teacher in nats, of one shape. Where both are −∞ the term is 0.
        """
        log_u = log_ratio(log_p, log_q)
        threshold = _threshold(self.power)
        of_small_u = _p_times(self.f, self.power, log_p, log_u.clamp(max=threshold))
        of_large_u = _q_times_f_over_u(self, log_q, log_u.clamp(min=threshold))
        return torch.where(log_u > threshold, of_large_u, of_small_u)

    def weighted_w_f(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return p w_f(u) of every token, right also where u overflows: there it is q · w_f(u)/u.

        Arguments as `weighted_f`.
        """
        log_u = log_ratio(log_p, log_q)
        threshold = _threshold(self.power)
        of_small_u = _p_times(self.w_f, self.power, log_p, log_u.clamp(max=threshold))
        of_large_u = _q_times_w_over_u(self, log_q, log_u.clamp(min=threshold))
        return torch.where(log_u > threshold, of_large_u, of_small_u)

    @property
    def unbiased(self) -> Callable[[Tensor], Tensor]:
        """Return w_f, by its older name."""
        return self.w_f

    @property
    def stop_gradient(self) -> Callable[[Tensor], Tensor]:
        """Return `reward`, by its older name: it stops no gradient."""
        return self.reward


# ------------------------------------------------------------------ formulas of more than one line, for the table below


def _log_mean(x: Tensor) -> Tensor:
    """Return ln((1+u)/2), without cancellation near u = 1 and without overflow."""
    of_small_u = log1p(expm1(x.clamp(max=40)) / 2)
    return torch.where(x > 40, x - math.log(2), of_small_u)


def _jsd_f(x: Tensor) -> Tensor:
    """Return (1+u)/2 · [h tanh h − ln cosh h] with h = x/2: the table's f, without its cancellation near u = 1."""
    h = x.clamp(-80, 80) / 2  # the bracket has reached its limit ln 2 long before
    ln_cosh = log1p(2 * torch.sinh(h / 2) ** 2)
    return (1 + exp(x)) / 2 * (h * torch.tanh(h) - ln_cosh)


def _jsd_falling_f(x: Tensor) -> Tensor:
    """Return jsd − ½ ln 2 (u−1) = ln 2 − ½ [ln(1+u) + u ln(1+1/u)]."""
    ln_1_plus_u = softplus(x)
    u = exp(x.clamp(-1e4, 80))  # beyond these ends, u ln(1+1/u) has reached its limits 0 and 1
    ln_1_plus_1_over_u = softplus(-x.clamp(-1e4, 80))
    return math.log(2) - (ln_1_plus_u + u * ln_1_plus_1_over_u) / 2


def _box_cox(x: Tensor, a: float) -> Tensor:
    """Return φ_a = (u^a − 1)/a, which is x at a = 0.

    For |a| < 1e-12 the two agree to a relative 2e-11 at |x| ≤ 30.
    """
    if abs(a) < 1e-12:
        return x
    return expm1(a * x) / a


def _alpha_f(x: Tensor, alpha: float) -> Tensor:
    """Return f = u φ_{α−1} − φ_α = (φ_α − φ_1)/(α−1), that is (u^α − αu − (1−α)) / (α(α−1)), also at α = 0 and α = 1.

    The first form is for α near 1, the second for u near 0. Near u = 1 the terms of both cancel; there f is a power
    series.
    """
    largest_term = exp(torch.maximum(alpha * x.clamp(-1e6, 1e6), x))
    overflows = largest_term == math.inf  # and f with it
    inside = torch.where(overflows, 0.0, x)  # before the terms: the gradient of ∞ − ∞ would be NaN
    w = _box_cox(inside, alpha)
    u_minus_1 = expm1(inside)
    if abs(alpha - 1) > 0.5:
        f = (w - u_minus_1) / (alpha - 1)
    else:
        f = exp(inside) * _box_cox(inside.clamp(min=-100), alpha - 1) - w  # below, the product is 0 to any precision
    f = torch.where(overflows, largest_term, f)
    near_one = x.abs() * max(1, abs(alpha)) < 0.1
    return torch.where(near_one, _alpha_series(x.clamp(-0.1, 0.1), alpha), f)


def _alpha_series(x: Tensor, alpha: float) -> Tensor:
    """Return f of the α-family near u = 1: Σ_{k≥2} (1 + α + … + α^{k−2}) x^k/k!."""
    f = 0
    for k in range(2, 9):
        powers_of_alpha = sum(alpha**j for j in range(k - 1))
        f = f + powers_of_alpha / math.factorial(k) * x**k
    return f


# A new divergence is one entry: its name, and f, f′ and w_f as functions of x = log u. It needs a `power` only if it
# grows like u^α with α > 1 as u → ∞, or with α < 0 as u → 0; u ln u and ln u need none.
TABLE = [
    Divergence(
        name="reverse_kl",
        f=lambda x: -x,
        f_prime=lambda x: -exp(-x),
        w_f=lambda x: x - 1,
    ),
    Divergence(
        name="forward_kl",
        f=lambda x: exp(x) * x.clamp(min=-1e4),
        f_prime=lambda x: x + 1,
        w_f=exp,
    ),
    Divergence(
        name="jsd",
        f=_jsd_f,
        f_prime=lambda x: -_log_mean(-x) / 2,
        w_f=lambda x: _log_mean(x) / 2,
    ),
    Divergence(
        name="pearson_chi2",
        f=lambda x: expm1(x) ** 2,
        f_prime=lambda x: 2 * expm1(x),
        w_f=lambda x: expm1(2 * x),
        power=2.0,
    ),
    Divergence(
        name="neyman_chi2",
        f=lambda x: 4 * torch.sinh(x / 2) ** 2,
        f_prime=lambda x: -expm1(-2 * x),
        w_f=lambda x: -2 * expm1(-x),
        power=-1.0,
    ),
    Divergence(
        name="hellinger",
        f=lambda x: expm1(x / 2) ** 2,
        f_prime=lambda x: -expm1(-x / 2),
        w_f=lambda x: expm1(x / 2),
    ),
    Divergence(
        name="tv",
        f=lambda x: expm1(x).abs() / 2,
        f_prime=lambda x: x.sign() / 2,
        w_f=lambda x: x.sign() / 2,
    ),
    # u − 1 − ln u. Under a stop-gradient the "k1" and "k3" estimators of one KL become two different gradients.
    Divergence(
        name="k3",
        f=lambda x: _alpha_f(x, alpha=0.0),
        f_prime=lambda x: -expm1(-x),
        w_f=lambda x: x,
    ),
    Divergence(
        name="jsd_falling",
        f=_jsd_falling_f,
        f_prime=lambda x: -softplus(-x) / 2,
        w_f=lambda x: softplus(x) / 2 - math.log(2),
    ),
]
DIVERGENCES = {divergence.name: divergence for divergence in TABLE}


def get(name: str) -> Divergence:
    """Return the divergence called `name`.

    "alpha=<float>" is any member of the α-family, and "jsd,c=-0.25" is jsd in the generator f + c(u−1).
    Raise ValueError, listing the known names, when there is no such divergence.
    """
    if name in DIVERGENCES:
        return DIVERGENCES[name]
    base, comma, c = name.partition(",c=")
    if comma:
        return shift(get(base), _number(c, "c", name))
    if name.startswith("alpha="):
        return _alpha_family(name, _number(name.removeprefix("alpha="), "alpha", name))
    hint = did_you_mean(name, DIVERGENCES)
    raise ValueError(f"unknown divergence {name!r}{hint}; choose from {', '.join(DIVERGENCES)}, alpha=<float>")


def _number(text: str, of: str, name: str) -> float:
    """Return the number that stands in a name. Raise ValueError for anything but a number from −10 to 10."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= 10:
        raise ValueError(f"divergence {name!r}: {of} must be a number from -10 to 10, as in {of}=0.5")
    return number


def _alpha_family(name: str, alpha: float) -> Divergence:
    """Return the member of the α-family, with f′ = φ_{α−1} and w_f = φ_α."""

    def f(x: Tensor) -> Tensor:
        return _alpha_f(x, alpha)

    def f_prime(x: Tensor) -> Tensor:
        return _box_cox(x, alpha - 1)

    def w_f(x: Tensor) -> Tensor:
        return _box_cox(x, alpha)

    return Divergence(name, f, f_prime, w_f, power=alpha)


def shift(divergence: Divergence, c: float) -> Divergence:
    """Return the same divergence in the generator f + c(u−1), which OPD does not take for the same."""

    def f(x: Tensor) -> Tensor:
        return _shifted_f(divergence, c, x)

    def f_prime(x: Tensor) -> Tensor:
        return divergence.f_prime(x) + c

    def w_f(x: Tensor) -> Tensor:
        return divergence.w_f(x) + c

    return Divergence(f"{divergence.name},c={c:g}", f, f_prime, w_f, power=divergence.power)


def _shifted_f(divergence: Divergence, c: float, x: Tensor) -> Tensor:
    """Return f + c(u−1).

    Where u is large, f and c(u−1) could both overflow. There it is u [f′(u) − w_f(u)/u] with f′ and w_f of the new
    generator.
    """
    if divergence.power > 1:
        return divergence.f(x) + c * expm1(x.clamp(max=80))  # beyond, f has overflowed already
    small = x.clamp(max=20)
    of_small_u = divergence.f(small) + c * expm1(small)

    large = x.clamp(20, math.log(torch.finfo(x.dtype).max))  # up to the largest u
    at_its_limit = x.clamp(20, 80)  # where w_f(u)/u has one
    f_over_u = (divergence.f_prime(large) + c) - exp(-at_its_limit) * (divergence.w_f(at_its_limit) + c)
    root_of_u = exp(x.clamp(min=20) / 2)  # u itself may overflow where f does not
    of_large_u = root_of_u * f_over_u * root_of_u
    return torch.where(x > 20, of_large_u, of_small_u)


def clipped(divergence: Divergence, bound: float) -> Divergence:
    """Return the same functions of log u clipped to ± bound nats: advantages that are bounded, and biased.

    Raise ValueError for a bound that is not positive.
    """
    if not bound > 0:
        raise ValueError(f"the bound of log u must be positive, not {bound}")

    def clip(x: Tensor) -> Tensor:
        return x.clamp(-bound, bound)

    def f(x: Tensor) -> Tensor:
        return divergence.f(clip(x))

    def f_prime(x: Tensor) -> Tensor:
        return divergence.f_prime(clip(x))

    def w_f(x: Tensor) -> Tensor:
        return divergence.w_f(clip(x))

    return _Clipped(f"{divergence.name}, clipped", f, f_prime, w_f)


class _Clipped(Divergence):
    """A divergence of a clipped log u. Nothing overflows; and f(u)/u is not f′ − w_f/u, as f′ is not the slope of f."""

    def weighted_f(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return p f(u) of every token."""
        return exp(log_p) * self.f(log_ratio(log_p, log_q))

    def weighted_w_f(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return p w_f(u) of every token."""
        return exp(log_p) * self.w_f(log_ratio(log_p, log_q))


# --------------------------------------------------------------------- products that are right where a factor overflows
#
# Divergence.weighted_f and weighted_w_f multiply by p while u is small, and by q where u is large. If f grows faster
# than u (a power α > 1), or as a power of 1/u towards u = 0 (α < 0), even these factors overflow before the product
# does. So the function is computed at the last u at which it fits into a float, `at`. From there on it is a power of u,
# and the exponent of that power is added to the logarithm of the weight.


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log u = log q − log p; 0 where both are −∞, a token that neither model can say."""
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    return torch.where(neither, 0.0, log_q - log_p)


def _threshold(power: float) -> float:
    """Return the log u from which on p f(u) is computed from q: far below overflow, far above cancellation."""
    return min(20.0, 40 / max(1.0, power))


def _p_times(function: Callable[[Tensor], Tensor], power: float, log_p: Tensor, log_u: Tensor) -> Tensor:
    """Return p · f(u) or p · w_f(u), where u is not large."""
    if power >= 0:
        return exp(log_p) * function(log_u)
    at = log_u.clamp(min=40 / power)
    beyond = power * (log_u - at)
    return exp(log_p + beyond) * function(at)


def _q_times_f_over_u(divergence: Divergence, log_q: Tensor, log_u: Tensor) -> Tensor:
    """Return q · f(u)/u = q · [f′(u) − w_f(u)/u], where u is large."""
    q_times_f_prime = _q_times_f_prime(divergence, log_q, log_u)
    difference = q_times_f_prime - _q_times_w_over_u(divergence, log_q, log_u)
    return torch.where(q_times_f_prime == math.inf, math.inf, difference)  # ∞ − ∞ would be NaN


def _q_times_f_prime(divergence: Divergence, log_q: Tensor, log_u: Tensor) -> Tensor:
    """Return q · f′(u), where u is large: f′ grows like u^(α−1)."""
    if divergence.power <= 1:
        return exp(log_q) * divergence.f_prime(log_u)
    at = log_u.clamp(max=40 / (divergence.power - 1))
    beyond = (divergence.power - 1) * (log_u - at)
    return exp(log_q + beyond) * divergence.f_prime(at)


def _q_times_w_over_u(divergence: Divergence, log_q: Tensor, log_u: Tensor) -> Tensor:
    """Return q · w_f(u)/u, where u is large. With α ≤ 1 the quotient has reached its limit at u = e^80."""
    at = log_u.clamp(max=80 / max(1.0, divergence.power))
    beyond = max(0.0, divergence.power - 1) * (log_u - at)
    return exp(log_q + beyond) * (exp(-at) * divergence.w_f(at))
