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

Over a whole vocabulary the mean E_p[f(u)] is a sum of p f(u). There u can overflow while p f(u) is small. So the sum
uses the perspective of f (`Divergence.weighted_f`): p f(q/p) = q f°(p/q), where the dual generator f° needs no formula
of its own,

    f°(v)  =  v f(1/v)  =  f′(u) − w_f(u)/u        at u = 1/v

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
    """The generator f, its slope f′ and its unbiased advantage w_f = −f + u f′, each a function of log u."""

    name: str
    f: Callable[[Tensor], Tensor]
    f_prime: Callable[[Tensor], Tensor]
    w_f: Callable[[Tensor], Tensor]
    power: float = 0.0  # α, if f grows like u^α with α > 1 as u → ∞, or with α < 0 as u → 0

    def reward(self, log_u: Tensor) -> Tensor:
        """−f(u): the reward of OPD, which forgets that u depends on the student."""
        return -self.f(log_u)

    @property
    def unbiased(self) -> Callable[[Tensor], Tensor]:
        """The older name of w_f."""
        return self.w_f

    @property
    def stop_gradient(self) -> Callable[[Tensor], Tensor]:
        """The older name of `reward`, which stops no gradient."""
        return self.reward

    def weighted_f(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """p f(u) of every token, right also where u = q/p overflows; its sum over the vocabulary is D_f(q‖p).

        log_p, log_q  log-probs of student and teacher in nats, of one shape. Where both are −∞ the term is 0.
        """
        log_u = log_ratio(log_p, log_q)
        far = _where_u_is_large(self.power)
        p_times_f = self._p_times(self.f, log_p, log_u.clamp(max=far))
        # Where u is large: q f°(p/q)
        large = log_u.clamp(min=far)
        q_times_f_prime = self._q_times_f_prime(log_q, large)
        q_times_dual = q_times_f_prime - self._q_times_w_over_u(log_q, large)
        q_times_dual = torch.where(q_times_f_prime == math.inf, math.inf, q_times_dual)  # ∞ − ∞
        return torch.where(log_u > far, q_times_dual, p_times_f)

    def weighted_w_f(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """p w_f(u) of every token, right also where u overflows: there it is q · w_f(u)/u.

        Arguments as `weighted_f`.
        """
        log_u = log_ratio(log_p, log_q)
        far = _where_u_is_large(self.power)
        p_times_w = self._p_times(self.w_f, log_p, log_u.clamp(max=far))
        q_times_w_over_u = self._q_times_w_over_u(log_q, log_u.clamp(min=far))
        return torch.where(log_u > far, q_times_w_over_u, p_times_w)

    # Each product below is computed from an argument at which the function itself still fits into a float. Beyond it
    # the function is a power of u, whose exponent is added to the logarithm of the weight.

    def _p_times(self, function: Callable[[Tensor], Tensor], log_p: Tensor, log_u: Tensor) -> Tensor:
        """p · f(u) or p · w_f(u), where u is not large."""
        if self.power >= 0:
            return exp(log_p) * function(log_u)
        near = log_u.clamp(min=40 / self.power)
        return exp(log_p + self.power * (log_u - near)) * function(near)

    def _q_times_f_prime(self, log_q: Tensor, log_u: Tensor) -> Tensor:
        """q · f′(u), where u is large."""
        if self.power <= 1:
            return exp(log_q) * self.f_prime(log_u)
        near = log_u.clamp(max=40 / (self.power - 1))
        return exp(log_q + (self.power - 1) * (log_u - near)) * self.f_prime(near)

    def _q_times_w_over_u(self, log_q: Tensor, log_u: Tensor) -> Tensor:
        """q · w_f(u)/u, where u is large. With α ≤ 1 the quotient has reached its limit at u = e^80."""
        near = log_u.clamp(max=80 / max(1.0, self.power))
        beyond = max(0.0, self.power - 1) * (log_u - near)
        return exp(log_q + beyond) * (exp(-near) * self.w_f(near))


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log u = log q − log p; 0 where both are −∞, a token that neither model can say."""
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    return torch.where(neither, 0.0, log_q - log_p)


def _where_u_is_large(power: float) -> float:
    """The log u from which on p f(u) is computed from q: far below overflow, far above cancellation."""
    return min(20.0, 40 / max(1.0, power))


class _Clipped(Divergence):
    """Functions of a clipped log u: they are bounded, and f′ is not the slope of f, so that there is no dual."""

    def weighted_f(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return exp(log_p) * self.f(log_ratio(log_p, log_q))

    def weighted_w_f(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return exp(log_p) * self.w_f(log_ratio(log_p, log_q))


# A new divergence is one entry: its name, and f, f′ and w_f as functions of x = log u.
DIVERGENCES = {
    d.name: d
    for d in [
        Divergence("reverse_kl", lambda x: -x, lambda x: -exp(-x), lambda x: x - 1),
        Divergence("forward_kl", lambda x: exp(x) * x.clamp(min=-1e4), lambda x: x + 1, exp),
        Divergence("jsd", lambda x: _jsd_f(x), lambda x: -_log_mean(-x) / 2, lambda x: _log_mean(x) / 2),
        Divergence("pearson_chi2", lambda x: expm1(x) ** 2, lambda x: 2 * expm1(x), lambda x: expm1(2 * x), power=2.0),
        Divergence(
            "neyman_chi2",
            f=lambda x: 4 * torch.sinh(x / 2) ** 2,
            f_prime=lambda x: -expm1(-2 * x),
            w_f=lambda x: -2 * expm1(-x),
            power=-1.0,
        ),
        Divergence("hellinger", lambda x: expm1(x / 2) ** 2, lambda x: -expm1(-x / 2), lambda x: expm1(x / 2)),
        Divergence("tv", lambda x: expm1(x).abs() / 2, lambda x: x.sign() / 2, lambda x: x.sign() / 2),
        # u − 1 − ln u. Under a stop-gradient the "k1" and "k3" estimators of one KL become two different gradients.
        Divergence("k3", lambda x: _alpha_f(x, 0.0), lambda x: -expm1(-x), lambda x: x),
        # jsd − ½ ln 2 (u−1) = ln 2 − ½ [ln(1+u) + u ln(1+1/u)]
        Divergence(
            "jsd_falling",
            f=lambda x: math.log(2) - (softplus(x) + exp(x.clamp(-1e4, 80)) * softplus(-x.clamp(-1e4, 80))) / 2,
            f_prime=lambda x: -softplus(-x) / 2,
            w_f=lambda x: softplus(x) / 2 - math.log(2),
        ),
    ]
}


def shift(d: Divergence, c: float) -> Divergence:
    """The same divergence in the generator f + c(u−1), which OPD does not take for the same."""
    return Divergence(
        f"{d.name},c={c:g}",
        f=lambda x: _shifted_f(d, c, x),
        f_prime=lambda x: d.f_prime(x) + c,
        w_f=lambda x: d.w_f(x) + c,
        power=d.power,
    )


def _shifted_f(d: Divergence, c: float, x: Tensor) -> Tensor:
    """f + c(u−1). Where u is large it is u f°(1/u) in the new generator, since f and c(u−1) could both overflow."""
    if d.power > 1:
        return d.f(x) + c * expm1(x.clamp(max=80))  # beyond, f has overflowed already
    near = x.clamp(max=20)
    of_small_u = d.f(near) + c * expm1(near)
    far = x.clamp(20, math.log(torch.finfo(x.dtype).max))  # up to the largest u
    at_its_limit = x.clamp(20, 80)  # where w_f(u)/u has one
    dual = (d.f_prime(far) + c) - exp(-at_its_limit) * (d.w_f(at_its_limit) + c)
    root_of_u = exp(x.clamp(min=20) / 2)  # u itself may overflow where f does not
    return torch.where(x > 20, root_of_u * dual * root_of_u, of_small_u)


def clipped(d: Divergence, bound: float) -> Divergence:
    """The same functions of log u clipped to ± bound nats: advantages that are bounded, and biased."""
    if not bound > 0:
        raise ValueError(f"the bound of log u must be positive, not {bound}")
    clip = lambda function: lambda x: function(x.clamp(-bound, bound))
    return _Clipped(f"{d.name}, clipped", clip(d.f), clip(d.f_prime), clip(d.w_f))


def get(name: str) -> Divergence:
    """The divergence called `name`; "alpha=<float>" is any member of the α-family, and "jsd,c=-0.25" one in f + c(u−1).

    Raises ValueError, listing the known names, when there is no such divergence.
    """
    if name in DIVERGENCES:
        return DIVERGENCES[name]
    base, comma, c = name.partition(",c=")
    if comma:
        return shift(get(base), _number(c, "c", name))
    if name.startswith("alpha="):
        alpha = _number(name.removeprefix("alpha="), "alpha", name)
        f, f_prime = lambda x: _alpha_f(x, alpha), lambda x: _box_cox(x, alpha - 1)
        return Divergence(name, f, f_prime, w_f=lambda x: _box_cox(x, alpha), power=alpha)
    hint = did_you_mean(name, DIVERGENCES)
    raise ValueError(f"unknown divergence {name!r}{hint}; choose from {', '.join(DIVERGENCES)}, alpha=<float>")


def _number(text: str, of: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= 10:
        raise ValueError(f"divergence {name!r}: {of} must be a number from -10 to 10, as in {of}=0.5")
    return number


def _jsd_f(x: Tensor) -> Tensor:
    """(1+u)/2 · [h tanh h − ln cosh h] with h = x/2: the table's f, without its cancellation near u = 1."""
    h = x.clamp(-80, 80) / 2  # the bracket has reached its limit ln 2 long before
    ln_cosh = log1p(2 * torch.sinh(h / 2) ** 2)
    return (1 + exp(x)) / 2 * (h * torch.tanh(h) - ln_cosh)


def _log_mean(x: Tensor) -> Tensor:
    """ln((1+u)/2), without cancellation near u = 1 and without overflow."""
    of_small_u = log1p(expm1(x.clamp(max=40)) / 2)
    return torch.where(x > 40, x - math.log(2), of_small_u)


def _box_cox(x: Tensor, a: float) -> Tensor:
    """φ_a = (u^a − 1)/a, which is x at a = 0 (for |a| < 1e-12 the two agree to a relative 2e-11 at |x| ≤ 30)."""
    return x if abs(a) < 1e-12 else expm1(a * x) / a


def _alpha_f(x: Tensor, alpha: float) -> Tensor:
    """f = u φ_{α−1} − φ_α = (φ_α − φ_1)/(α−1), that is (u^α − αu − (1−α)) / (α(α−1)) and its limits at α = 0 and α = 1.

    The first form is for α near 1, the second for u near 0. Near u = 1 the terms of both cancel; there f is its power
    series Σ_{k≥2} (1 + α + … + α^{k−2}) x^k/k!.
    """
    largest_term = exp(torch.maximum(alpha * x.clamp(-1e6, 1e6), x))
    overflows = largest_term == math.inf  # and f with it
    inside = torch.where(overflows, 0.0, x)  # before the terms: the gradient of ∞ − ∞ would be NaN
    w, u_minus_1 = _box_cox(inside, alpha), expm1(inside)
    if abs(alpha - 1) > 0.5:
        f = (w - u_minus_1) / (alpha - 1)
    else:
        f = exp(inside) * _box_cox(inside.clamp(min=-100), alpha - 1) - w  # below, the product is 0 to any precision
    f = torch.where(overflows, largest_term, f)
    near_one = x.clamp(-0.1, 0.1)
    series = sum(sum(alpha**j for j in range(k - 1)) / math.factorial(k) * near_one**k for k in range(2, 9))
    return torch.where(x.abs() * max(1, abs(alpha)) < 0.1, series, f)
