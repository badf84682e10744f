"""The judge of any advantage: `print(judge(A))` says what its expected update descends, and where it leads.

An A of u alone descends E_p[h(u)] with the h of law.py. Any other descends something if and only if its expected update
does no work around closed loops of students. Where it is smooth, and only there, a symmetric Jacobian says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, exp

from nano_opd.checks import require_finite
from nano_opd.divergences import Divergence, get
from nano_opd.exact.law import NAMED, STUDENTS, TEACHER, generator, of_u, paths, update


@dataclass(frozen=True, eq=False)
class Verdict:
    """What `judge` found in numbers; str() is it in sentences, and `wrong` the first sentence with bad news, or ""."""

    length: float  # of the longest expected update, at random prefixes
    asymmetry: float  # of its Jacobian J in the logits, ‖J − Jᵀ‖ / 2‖J‖, at the worst prefix
    work: float  # |∮ update · dz| / ∮ |update · dz| around the worst triangle of students
    generator: Divergence | None  # h; None if A depends on more than u and a term that all tokens of a prefix share
    name: str  # h as one or two of NAMED, but for a multiple of u − 1; "" if it is neither
    falls: list[tuple[float, float]]  # where A falls and h bends down: ranges of u between e⁻⁴ and e⁴
    at_teacher: float  # longest expected update of a student that is the teacher
    ends: Tensor  # where the 55 STUDENTS end, (55, 3), when the teacher is TEACHER
    against: str  # the divergence of the next three
    bias: float  # ‖update − g‖ / ‖g‖, g the OPD+ update
    cosine: float  # of update and g
    noise: tuple[float, float]  # variance of one sampled token over ‖update‖²; the same of OPD+ over ‖g‖²
    arrive = property(lambda self: int(((self.ends - TEACHER).norm(dim=1) < 0.02).sum()))  # how many of the 55
    gradient = property(lambda self: self.asymmetry < 1e-5 and self.work < 0.01)
    wrong = property(lambda self: next((text for good, text in self._sentences() if not good), ""))
    __str__ = lambda self: "\n".join(text for _, text in self._sentences() if text)

    def _sentences(self) -> list[tuple[bool, str]]:
        """(good news?, sentence), what matters most first."""
        if self.length < 1e-9:
            return [(False, f"It teaches nothing: its expected update is 0 (at most {self.length:.0e}).")]
        of, point = "a function" if self.gradient else "nothing", self.ends.mean(0)
        measured = f"asymmetry of the Jacobian {self.asymmetry:.2g}, work around a loop {self.work:.2g}"
        bends = "A falls, and h bends down, for u from " + " and ".join(f"{a:.2g} to {b:.2g}" for a, b in self.falls)
        shape = "A(u) never falls: h is convex" if self.generator else "A depends on more than u: there is no one h"
        meet = f"all meet at {point.numpy().round(3)}" if (self.ends - point).norm(dim=1).max() < 0.02 else ""
        ends = meet or f"{int((self.ends.amax(1) > 0.99).sum())} end in a corner"
        values = f"bias {self.bias:.2g}, cosine {self.cosine:.2f}, variance over squared length {self.noise[0]:.3g}"
        return [
            (self.gradient, f"The expected update is the gradient of {of} ({measured})."),
            (not self.falls, f"{bends if self.falls else shape}."),
            (True, f"It descends {self.name}." if self.name else ""),
            (self.at_teacher < 1e-6, f"A student that is the teacher moves by {self.at_teacher:.2g}."),
            (self.arrive == 55, f"Of 55 students {self.arrive} reach the teacher; {ends}."),
            (True, f"Against {self.against}: {values}; OPD+ has {self.noise[1]:.3g}."),
        ]


def judge(advantage: Callable[[Tensor, Tensor], Tensor], against: str = "reverse_kl") -> Verdict:
    """The Verdict on an advantage, from 32 random prefixes of 4 tokens and the flow of 55 students over 3.

    advantage   as for `update`, for any V; a number for all tokens will do. It may detach: J is taken by differences
    against     divergence that bias, cosine and variance refer to; ValueError as divergences.get
    """
    A, d = lambda log_p, log_q: advantage(log_p, log_q.expand_as(log_p)) + 0 * log_p, get(against)
    rng = torch.Generator().manual_seed(0)
    z, log_q = 1.5 * torch.randn(2, 32, 4, dtype=torch.float64, generator=rng)
    log_p, log_q = z.log_softmax(-1), log_q.log_softmax(-1)
    F = lambda z, log_q=log_q: update(A, z.log_softmax(-1), log_q)
    J = torch.stack([(F(z + e) - F(z - e)) / 2e-4 for e in 1e-4 * torch.eye(4, dtype=z.dtype)], -1)
    corners = 1.5 * torch.randn(32, 3, 1, 4, dtype=torch.float64, generator=rng)
    side, t = corners.roll(-1, 1) - corners, (torch.arange(1000)[:, None] + 0.5) / 1000
    work = (F(corners + t * side, log_q[:, None, None]) * side).sum(-1).flatten(1)
    require_finite("expected update", J, "A is not finite for some token of 32 ordinary prefixes")
    # Two prefixes joined in one, with ¼ and ¾ of its mass: every u stays, and so does every A(u).
    centred = lambda A: A - A.mean(-1, keepdim=True)
    joined = A(*(torch.cat([x[:16] + np.log(0.25), x[16:] + np.log(0.75)], -1) for x in (log_p, log_q)))
    apart = centred(torch.stack(A(log_p, log_q).split(16), 1))
    alone = (centred(joined.unflatten(-1, (2, 4))) - apart).abs().max() <= 1e-9 * apart.abs().max()

    def a(x: Tensor) -> Tensor:  # A of a token with log u = x, less A of one with u = 1 at the same prefix
        masses = exp(-x.clamp(min=0)) / 4, exp(x.clamp(max=0)) / 4
        of = A(*(torch.stack([v, torch.full_like(v, 0.25), 0.75 - v], -1).log() for v in masses))
        return of[..., 0] - of[..., 1]

    x = torch.linspace(-4, 4, 800, dtype=torch.float64)  # not 0, where a sign is anything
    w, name = a(x)[:, None], ""
    size = w.max() - w.min()
    turns = torch.nn.functional.pad(w[:, 0].diff() < -1e-9 * size, (1, 1)).int().diff()
    for names in [*combinations(NAMED, 1), *combinations(NAMED, 2)] if alone else []:
        basis = torch.stack([*(NAMED[n](x) for n in names), torch.ones_like(x)], -1)
        c = torch.linalg.lstsq(basis, w).solution
        if (basis @ c - w).abs().max() <= 1e-8 * size:
            name = " + ".join(f"{k:.3g} {n}" for k, n in zip(c[:, 0].tolist(), names)).replace("+ -", "− ")
            break
    plus = of_u(d.w_f)
    u, g, p = update(A, log_p, log_q), update(plus, log_p, log_q), log_p.exp()
    second = [(p * m(log_p, log_q) ** 2 * (1 - 2 * p + (p * p).sum(-1, True))).sum() for m in (A, plus)]  # E‖A ∇log p‖²
    speed = 0.6 / update(A, STUDENTS.log(), TEACHER.log()).norm(dim=-1).mean().clamp(min=1e-9)  # the way is the same
    scaled = lambda log_p, log_q: speed * A(log_p, log_q)
    ends = STUDENTS
    for steps, size in ((250, 0.3), (80, 0.02)):  # where A jumps, only small steps arrive
        ends = paths(scaled, ends.log(), TEACHER.log(), steps, size)[-1]
    return Verdict(
        length=u.norm(dim=-1).max().item(),
        asymmetry=((J - J.mT).norm(dim=(1, 2)) / (2 * J.norm(dim=(1, 2))).clamp(min=1e-6)).max().item(),
        work=(work.sum(1).abs() / work.abs().sum(1).clamp(min=1e-9)).max().item(),
        generator=generator(a) if alone else None,
        name=name,
        falls=list(zip(*(exp(x[turns == s]).tolist() for s in (1, -1)))) if alone else [],
        at_teacher=update(A, log_q, log_q).norm(dim=-1).max().item(),
        ends=ends,
        against=against,
        bias=((u - g).norm() / g.norm()).item(),
        cosine=((u * g).sum() / (u.norm() * g.norm()).clamp(min=1e-30)).item(),
        noise=tuple((m / f.square().sum() - 1).item() for m, f in zip(second, (u, g))),
    )
