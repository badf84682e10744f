"""f-divergences D_f(q‖p) = E_p[f(u)] of a teacher q from a student p, where u = q/p at one token.

A divergence is given by its generator f, convex with f(1) = 0. On-policy distillation makes two rewards of it:

    stop_gradient   −f(u)                       all that OPD keeps of the gradient
    unbiased        w_f(u) = −f(u) + u f′(u)    OPD+'s corrected advantage

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

The code computes them from x = log u = log q − log p, in nats, because u itself overflows and u − 1 cancels. With expm1
|x| ≤ 30 is safe in float32 (in the α-family, |αx| and |(α−1)x| ≤ 80). That family has f′ = φ_{α−1} and w_f = φ_α with
the Box–Cox transform φ_a = (u^a − 1)/a, which is ln u at a = 0. Up to a factor and a multiple of u − 1, α = 0 is
reverse KL, ½ Hellinger, 1 forward KL, 2 Pearson and −1 Neyman.

At a token that the teacher forbids, x = −∞, every function returns its limit at u → 0 (finite or infinite, never NaN).
Functions map tensors of any shape elementwise and are differentiable; nothing here detaches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, exp, expm1, log1p
from torch.nn.functional import softplus

from nano_opd.system.checks import did_you_mean


@dataclass(frozen=True)
class Divergence:
    """The generator f, its slope f′ and its unbiased advantage w_f = −f + u f′, each a function of log u."""

    name: str
    f: Callable[[Tensor], Tensor]
    f_prime: Callable[[Tensor], Tensor]
    unbiased: Callable[[Tensor], Tensor]

    def stop_gradient(self, log_u: Tensor) -> Tensor:
        """−f(u): the reward of OPD, which forgets that u depends on the student."""
        return -self.f(log_u)


# A new divergence is one entry: its name, and f, f′ and w_f as functions of x = log u.
DIVERGENCES = {
    d.name: d
    for d in [
        Divergence("reverse_kl", lambda x: -x, lambda x: -exp(-x), lambda x: x - 1),
        Divergence("forward_kl", lambda x: exp(x) * x.clamp(min=-1e4), lambda x: x + 1, exp),
        Divergence("jsd", lambda x: _jsd_f(x), lambda x: -log1p(expm1(-x) / 2) / 2, lambda x: log1p(expm1(x) / 2) / 2),
        Divergence("pearson_chi2", lambda x: expm1(x) ** 2, lambda x: 2 * expm1(x), lambda x: expm1(2 * x)),
        Divergence(
            "neyman_chi2", lambda x: 4 * torch.sinh(x / 2) ** 2, lambda x: -expm1(-2 * x), lambda x: -2 * expm1(-x)
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
            unbiased=lambda x: softplus(x) / 2 - math.log(2),
        ),
    ]
}


def shift(d: Divergence, c: float) -> Divergence:
    """The same divergence in the generator f + c(u−1), which OPD does not take for the same."""
    return Divergence(
        f"{d.name},c={c:g}",
        f=lambda x: d.f(x) + c * expm1(x),
        f_prime=lambda x: d.f_prime(x) + c,
        unbiased=lambda x: d.unbiased(x) + c,
    )


def clipped(d: Divergence, bound: float) -> Divergence:
    """The same functions of log u clipped to ± bound nats: advantages that are bounded, and biased."""
    if not bound > 0:
        raise ValueError(f"the bound of log u must be positive, not {bound}")
    clip = lambda function: lambda x: function(x.clamp(-bound, bound))
    return Divergence(f"{d.name}, clipped", clip(d.f), clip(d.f_prime), clip(d.unbiased))


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
        return Divergence(name, f, f_prime, unbiased=lambda x: _box_cox(x, alpha))
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


def _box_cox(x: Tensor, a: float) -> Tensor:
    """φ_a = (u^a − 1)/a, which is x at a = 0 (for |a| < 1e-12 the two agree to a relative 2e-11 at |x| ≤ 30)."""
    return x if abs(a) < 1e-12 else expm1(a * x) / a


def _alpha_f(x: Tensor, alpha: float) -> Tensor:
    """f = u φ_{α−1} − φ_α = (φ_α − φ_1)/(α−1), that is (u^α − αu − (1−α)) / (α(α−1)) and its limits at α = 0 and α = 1.

    The first form is for α near 1, the second for u near 0. Near u = 1 the terms of both cancel; there f is its power
    series Σ_{k≥2} (1 + α + … + α^{k−2}) x^k/k!.
    """
    w, u_minus_1 = _box_cox(x, alpha), expm1(x)
    if abs(alpha - 1) > 0.5:
        f = (w - u_minus_1) / (alpha - 1)
    else:
        f = exp(x) * _box_cox(x.clamp(min=-100), alpha - 1) - w  # below, the product is 0 to any precision
    f = f.where((w < math.inf) & (u_minus_1 < math.inf) | x.isnan(), math.inf)  # both terms overflow with f
    near_one = x.clamp(-0.1, 0.1)
    series = sum(sum(alpha**j for j in range(k - 1)) / math.factorial(k) * near_one**k for k in range(2, 9))
    return torch.where(x.abs() * max(1, abs(alpha)) < 0.1, series, f)
