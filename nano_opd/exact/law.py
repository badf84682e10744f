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

STUDENTS = torch.tensor([[a, b, 12 - a - b] for a in range(1, 12) for b in range(1, 12 - a)], dtype=torch.float64) / 12
TEACHER = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
NAMED = {name: d.w_f for name, d in DIVERGENCES.items() if name not in ("k3", "jsd_falling")}  # w of log u
NAMED |= {
    f"JSD(β={b})": lambda x, b=b: (1 - b) * torch.log1p(b * torch.expm1(x)) for b in (0.1, 0.2, 0.3, 0.7, 0.8, 0.9)
}


def generator(advantage: Callable[[Tensor], Tensor], name: str = "h") -> Divergence:
    """The generator h, with h(1) = h′(1) = 0, whose w_h is the advantage up to the constant A(1).

    advantage  A as a function of log u, elementwise and without a jump but at u = 1, as divergence.reward

    The integral is a Gauss–Legendre sum of 64 terms, good to 1e-9 in float64 for |log u| ≤ 8 and a smooth A.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)

    def h(x: Tensor) -> Tensor:  # with t = u^s: u ∫₀¹ (A(s log u) − A(0)) u^−s log u ds
        s, w = (torch.as_tensor(a, dtype=x.dtype, device=x.device) for a in ((nodes + 1) / 2, weights / 2))
        sx = x.unsqueeze(-1) * s
        return exp(x) * x * (w * (advantage(sx) - advantage(torch.zeros_like(sx))) * exp(-sx)).sum(-1)

    rest = lambda x: advantage(x) - advantage(torch.zeros_like(x))
    return Divergence(name, f=h, f_prime=lambda x: exp(-x) * (h(x) + rest(x)), w_f=rest)


def of_u(advantage: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """An advantage of log u alone, as divergence.w_f, as one of log_p and log_q, as `update` takes it."""
    return lambda log_p, log_q: advantage(log_q - log_p)


def update(advantage: Callable[[Tensor, Tensor], Tensor], log_p: Tensor, log_q: Tensor) -> Tensor:
    """E_{v∼p}[A_v ∇log p_v] in the logits, p_v (A_v − E_p[A]): the expected update at one prefix, exactly.

    advantage   A of every token, from log_p and log_q of its whole vocabulary, (…, V) each
    """
    p = log_p.exp()
    A = advantage(log_p, log_q)
    return p * (A - (p * A).sum(-1, keepdim=True))


def paths(
    advantage: Callable[[Tensor, Tensor], Tensor], starts: Tensor, log_q: Tensor, steps: int = 800, size: float = 0.2
) -> Tensor:
    """Students (S, V), as logits, that follow the expected update: their probabilities on the way, (steps+1, S, V).

    A step is the update, but no longer than `size` in the logits: far from the teacher the way is the same, in more
    steps. A student that has put 0.999 on one token stays there.

    Raises ValueError unless log_q, (V,) or (S, V), holds log-probs.
    """
    require_log_probs(log_q=log_q)
    z, visited = starts, [starts.softmax(-1)]
    for _ in range(steps):
        step = update(advantage, z.log_softmax(-1), log_q)
        step = step * (size / step.norm(dim=-1, keepdim=True)).clamp(max=1)
        z = torch.where(visited[-1].amax(-1, keepdim=True) < 0.999, z + step, z)
        visited.append(z.softmax(-1))
    return torch.stack(visited)
