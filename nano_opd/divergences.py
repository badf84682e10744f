"""f-divergences D_f(q‖p) = E_p[f(u)] of a teacher q from a student p, written in x = log u = log q − log p (nats).

A divergence is its generator f, convex with f(1) = 0. On-policy distillation can make two rewards of it:

    stop_gradient   −f(u)                   all that OPD keeps of the gradient
    unbiased        w_f(u) = −f(u) + u f′(u)    OPD+'s corrected advantage

Source: arXiv 2606.01039, Table 1 (reverse KL, forward KL and JSD). The other rows follow from the same w_f.

Why log space: u − 1 is expm1(x), so |x| ≤ 30 neither overflows nor cancels in float32, and the whole α-family is the
Box–Cox transform φ_a = (u^a − 1)/a of the likelihood ratio:  f′ = φ_{α−1},  w_f = φ_α,  f = u f′ − w_f.
Up to a factor and a multiple of u − 1, α = 0 is reverse KL, ½ Hellinger, 1 forward KL, 2 Pearson χ², −1 Neyman χ².

At a token the teacher forbids, x = −∞, every function returns its limit at u → 0 (finite or infinite, never NaN).
Functions map tensors of any shape elementwise and are differentiable; nothing here detaches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, exp, expm1, log1p

from nano_opd.checks import did_you_mean


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


def _jsd_f(x: Tensor) -> Tensor:
    """(1+u)/2 · [h tanh h − ln cosh h] with h = x/2: the table's f, without its cancellation near u = 1."""
    h = x.clamp(-80, 80) / 2  # the bracket has reached its limit ln 2 long before
    ln_cosh = log1p(2 * torch.sinh(h / 2) ** 2)
    return (1 + exp(x)) / 2 * (h * torch.tanh(h) - ln_cosh)


def _box_cox(x: Tensor, a: float) -> Tensor:
    """φ_a = (u^a − 1)/a, which is x at a = 0 (for |a| < 1e-12 the two agree to 2e-11 at |x| ≤ 30)."""
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


def _alpha(name: str, alpha: float) -> Divergence:
    return Divergence(
        name,
        f=lambda x: _alpha_f(x, alpha),
        f_prime=lambda x: _box_cox(x, alpha - 1),
        unbiased=lambda x: _box_cox(x, alpha),
    )


# A new divergence is three functions of x = log u in this table: f, f′ and w_f = −f + u f′.
DIVERGENCES = {
    d.name: d
    for d in [
        Divergence("reverse_kl", f=lambda x: -x, f_prime=lambda x: -exp(-x), unbiased=lambda x: x - 1),
        Divergence("forward_kl", f=lambda x: exp(x) * x.clamp(min=-1e4), f_prime=lambda x: x + 1, unbiased=exp),
        Divergence(
            "jsd",
            f=_jsd_f,
            f_prime=lambda x: -log1p(expm1(-x) / 2) / 2,
            unbiased=lambda x: log1p(expm1(x) / 2) / 2,
        ),
        Divergence(
            "pearson_chi2",
            f=lambda x: expm1(x) ** 2,
            f_prime=lambda x: 2 * expm1(x),
            unbiased=lambda x: expm1(2 * x),
        ),
        Divergence(
            "neyman_chi2",
            f=lambda x: 4 * torch.sinh(x / 2) ** 2,
            f_prime=lambda x: -expm1(-2 * x),
            unbiased=lambda x: -2 * expm1(-x),
        ),
        Divergence(
            "hellinger",
            f=lambda x: expm1(x / 2) ** 2,
            f_prime=lambda x: -expm1(-x / 2),
            unbiased=lambda x: expm1(x / 2),
        ),
        Divergence(
            "tv",
            f=lambda x: expm1(x).abs() / 2,
            f_prime=lambda x: x.sign() / 2,
            unbiased=lambda x: x.sign() / 2,
        ),
        # u − 1 − ln u. The same divergence as reverse_kl and so, up to a constant, the same w_f; but another −f,
        # which is why a stop-gradient turns the "k1" and "k3" estimators of one KL into two different gradients.
        _alpha("k3", 0.0),
    ]
}


def get(name: str) -> Divergence:
    """The divergence called `name`; "alpha=<float>" is any member of the α-family.

    Raises ValueError, listing the known names, when there is no such divergence.
    """
    if name in DIVERGENCES:
        return DIVERGENCES[name]
    if name.startswith("alpha="):
        try:
            alpha = float(name.removeprefix("alpha="))
        except ValueError:
            alpha = math.nan
        if not abs(alpha) <= 10:
            raise ValueError(f"divergence {name!r}: alpha must be a number from -10 to 10, as in alpha=0.5")
        return _alpha(name, alpha)
    hint = did_you_mean(name, DIVERGENCES)
    raise ValueError(f"unknown divergence {name!r}{hint}; choose from {', '.join(DIVERGENCES)}, alpha=<float>")
