"""The law of the stop-gradient: what an advantage descends, and where it leads.

Any advantage A(u) of one token is the w_h of some generator h:

    w_h = −h + u h′ = A    ⟺    h(u)  =  u ∫₁ᵘ A(t)/t² dt    ⟹    h″(u)  =  A′(u)/u

So at γ = 0 the expected update descends E_p[h(u)] at each prefix, whatever A was meant to be. This is a divergence, at
its lowest where the student is the teacher and nowhere else, if A never falls and is not constant on both sides of
u = 1: A = sign(ln u) max(|ln u| − ½, 0) never falls, and rests at students that are not the teacher. OPD under f is the
case A = −f: it descends the D_h with h″(u) = −f′(u)/u.

Sources: that the gradient of every f-divergence is E_p[A(u) ∇log p] for some A, Go et al., arXiv 2302.08215, Theorem 1;
that each rising A belongs to one divergence, Fawkes & Hartford, arXiv 2605.15417. What it makes of the stop-gradient is
derived here.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, exp

from nano_opd.checks import require_log_probs
from nano_opd.divergences import DIVERGENCES, Divergence

TEACHER = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def _students() -> Tensor:
    """Return the students with three tokens whose probabilities are multiples of 1/12 and none is 0, (55, 3)."""
    twelfths = []
    for first in range(1, 12):
        for second in range(1, 12 - first):
            twelfths.append([first, second, 12 - first - second])
    return torch.tensor(twelfths, dtype=torch.float64) / 12


def _w_of_skewed_jsd(beta: float) -> Callable[[Tensor], Tensor]:
    """Return w as a function of log u, for β KL(q ‖ m) + (1 − β) KL(p ‖ m) with the mixture m = βq + (1 − β)p."""

    def w(log_u: Tensor) -> Tensor:
        return (1 - beta) * torch.log1p(beta * torch.expm1(log_u))

    return w


def _named() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return w as a function of log u, for each divergence by whose name the judge may call a generator."""
    named = {}
    for name, divergence in DIVERGENCES.items():
        if name not in ("k3", "jsd_falling"):  # they have another's w, up to a constant
            named[name] = divergence.w_f
    for beta in (0.1, 0.2, 0.3, 0.7, 0.8, 0.9):
        named[f"JSD(β={beta})"] = _w_of_skewed_jsd(beta)
    return named


STUDENTS = _students()
NAMED = _named()


def generator(advantage: Callable[[Tensor], Tensor], name: str = "h") -> Divergence:
    """Return the generator h, with h(1) = h′(1) = 0, whose w_h is the advantage up to the constant A(1).

    advantage  A as a function of log u, elementwise and without a jump but at u = 1, as divergence.reward

    The integral is a Gauss–Legendre sum of 64 terms, good to 1e-9 in float64 for |log u| ≤ 8 and a smooth A.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)  # on −1 … 1

    def w_h(log_u: Tensor) -> Tensor:
        """Return A(u) − A(1)."""
        return advantage(log_u) - advantage(torch.zeros_like(log_u))

    def h(log_u: Tensor) -> Tensor:
        """Return u ∫₀¹ w_h(u^s) u^−s log u ds, which is u ∫₁ᵘ w_h(t)/t² dt with t = u^s."""
        s = torch.as_tensor((nodes + 1) / 2, dtype=log_u.dtype, device=log_u.device)
        ds = torch.as_tensor(weights / 2, dtype=log_u.dtype, device=log_u.device)
        log_t = log_u.unsqueeze(-1) * s
        integral = (ds * w_h(log_t) * exp(-log_t)).sum(-1)
        return exp(log_u) * log_u * integral

    def h_prime(log_u: Tensor) -> Tensor:
        """Return h′ = (h + w_h)/u."""
        return exp(-log_u) * (h(log_u) + w_h(log_u))

    return Divergence(name, f=h, f_prime=h_prime, w_f=w_h)


def of_u(advantage: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return an advantage of log_p and log_q, as `update` takes it, from one of log u alone, as divergence.w_f."""

    def of_log_probs(log_p: Tensor, log_q: Tensor) -> Tensor:
        return advantage(log_q - log_p)

    return of_log_probs


def update(advantage: Callable[[Tensor, Tensor], Tensor], log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return E_{v∼p}[A_v ∇log p_v] in the logits, p_v (A_v − E_p[A]): the expected update at one prefix, exactly.

    advantage   A of every token, from log_p and log_q of its whole vocabulary, (…, V) each
    """
    p = log_p.exp()
    A = advantage(log_p, log_q)
    return p * (A - (p * A).sum(-1, keepdim=True))


def paths(
    advantage: Callable[[Tensor, Tensor], Tensor], starts: Tensor, log_q: Tensor, steps: int = 800, size: float = 0.2
) -> Tensor:
    """Let students follow the expected update; return their probabilities on the way, (steps+1, S, V).

    starts  the logits of the students, (S, V)

    A step is the update, but no longer than `size` in the logits: far from the teacher the way is the same, in more
    steps. A student that has put 0.999 on one token stays there.

    Raises ValueError unless log_q, (V,) or (S, V), holds log-probs.
    """
    require_log_probs(log_q=log_q)
    logits = starts
    visited = [starts.softmax(-1)]
    for _ in range(steps):
        step = update(advantage, logits.log_softmax(-1), log_q)
        step = step * (size / step.norm(dim=-1, keepdim=True)).clamp(max=1)
        on_the_way = visited[-1].amax(-1, keepdim=True) < 0.999
        logits = torch.where(on_the_way, logits + step, logits)
        visited.append(logits.softmax(-1))
    return torch.stack(visited)
