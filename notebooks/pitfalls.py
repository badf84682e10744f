"""Notebook 02: worlds small enough to enumerate, what measures a loss in them, and the wrong versions themselves.

An estimator is here a function of a world that gives the exact mean and variance of a loss's gradient (exact.moments),
and a goal is a function of a world that gives the gradient that was meant.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lab import field
from torch import Tensor

from nano_opd import divergences, exact, gkd, grpo, opd, opdplus, policy_gradient, rlsd
from nano_opd.divergences import Divergence
from nano_opd.exact.enumeration import Moments, World
from nano_opd.policy_gradient import logprobs_of as at

Estimator = Callable[[World], Moments]
Goal = Callable[[World], Tensor]

COSINE, BIAS, VARIANCE = range(3)
jsd, reverse_kl, forward_kl = map(divergences.get, ("jsd", "reverse_kl", "forward_kl"))


def make_world(seed: int, V: int = 4, R: int = 3, distance: float = 1.0) -> World:
    """Responses of 1 to R tokens out of V, the last of which is EOS; a teacher, and a student `distance` nats away."""
    policy, q = exact.random_tabular(V, R, seed, scale=1.5)
    p = q + distance * exact.random_tabular(V, R, seed + 1)[1]
    return World.of((policy, p), (policy, q), V, R, V - 1)


def measure(world: World, estimator: Estimator, goal: Goal) -> list[float]:
    """Cosine of the mean with the gradient (NaN below 1 % of its length), relative bias, variance / ‖gradient‖²."""
    m, g = estimator(world), goal(world)
    cosine = (m.mean * g).sum() / m.mean.norm() / g.norm() if m.mean.norm() > 0.01 * g.norm() else math.nan
    return [float(x) for x in (cosine, (m.mean - g).norm() / g.norm(), m.variance / g.square().sum())]


class Museum:
    """The mistakes measured so far, by name: (worlds, 3) numbers each. The first world is that of the text."""

    def __init__(self, distance: float, others: int):
        seeds = range(100, 100 + 2 * others, 2)
        worlds = lambda V, R, far, first: [first, *(make_world(seed, V, R, far) for seed in seeds)]
        self.worlds = worlds(4, 3, distance, make_world(12, 5, 4, distance))
        self.near = worlds(4, 3, distance / 10, make_world(12, 5, 4, distance / 10))
        self.small = worlds(3, 2, distance, make_world(12, 3, 2, distance))  # for what couples two responses
        self.rows: dict[str, Tensor] = {}

    def look(self, name: str, estimator: Estimator, goal: Goal, worlds: list[World] | None = None) -> Tensor:
        """Measure in every world, (worlds, 3), and print a line about the first unless the name is empty."""
        x = torch.tensor([measure(w, estimator, goal) for w in worlds or self.worlds], dtype=torch.float64)
        if name:
            cosine, bias, variance = x[0].tolist()
            way = f"{'uphill' if cosine < 0 else 'downhill':8s} cosine {cosine:6.3f}"
            way = f"{'nowhere':22s}" if math.isnan(cosine) else way
            up = f"uphill in {(x[1:, COSINE] < 0).sum():2d} of {len(x) - 1} others"
            print(f"{name:36s} {way}  bias {bias:7.2g}  variance {variance:7.2g}  {up}")
        return x

    def hang(self, name: str, estimator: Estimator, goal: Goal, worlds=None, quiet: bool = False) -> Tensor:
        """`look`, and keep it for the figure."""
        self.rows[name] = self.look("" if quiet else name, estimator, goal, worlds)
        return self.rows[name]

    def unbiased(self, estimator: Estimator, goal: Goal) -> bool:
        """Whether it has no bias in any world."""
        return bool((self.look("", estimator, goal)[:, BIAS] < 1e-9).all())

    def biased(self, *measured: Tensor) -> bool:
        """Whether what was looked at has a bias in every world."""
        return all(bool((x[:, BIAS] > 1e-3).all()) for x in measured)


# ------------------------------------------------------------------------------------------------------ the vocabulary


def of(loss: exact.Estimator) -> Estimator:
    """A loss (tokens, mask, student logits, teacher logits) → scalar."""
    return lambda world: exact.moments(world, loss)


def paid(advantage, normalize: str = "batch") -> Estimator:
    """The score-function estimator with this advantage(log u, mask, student logits, teacher logits)."""
    return of(exact.sampled(advantage, normalize))


def plus(divergence: Divergence, gamma: float = 0.0):
    """OPD+'s advantage."""
    return lambda log_u, mask, *_: opdplus.advantage(log_u, mask, divergence, gamma)


def minus_f(divergence: Divergence):
    """OPD's advantage."""
    return lambda log_u, mask, *_: opd.advantage(log_u, mask, divergence)


def goal(divergence: Divergence, kind: str = "prefix") -> Goal:
    """The exact gradient of an objective."""
    return lambda world: exact.gradient(world, divergence, kind)


def full(divergence: Divergence) -> Estimator:
    """The divergence over the whole vocabulary, differentiated."""
    return of(lambda tokens, mask, p, q: gkd.loss(p, q, mask, divergence))


def same_length(estimator: Estimator, goal: Goal) -> Estimator:
    """Its mean brought to the gradient's length, where only the direction is to be compared."""

    def scaled(world: World) -> Moments:
        m, g = estimator(world), goal(world)
        scale = g.norm() / m.mean.norm()
        return Moments(scale * m.mean, scale**2 * m.variance)

    return scaled


# ------------------------------------------------------------------------------------------------ what is detached: 1


def own_f(detach: bool, add_f: bool, d: Divergence = jsd) -> exact.Estimator:
    """sg(f) ln p, f ln p or sg(f) ln p + f of every sampled token."""

    def loss(tokens, mask, p, q):
        logp = at(tokens, p)
        f = d.f(at(tokens, q) - logp)
        product = (f.detach() if detach else f) * logp  # drops ∇f
        return policy_gradient.reduce(product + (f if add_f else 0.0), mask)

    return loss


# --------------------------------------------------------------------------------------------- older samples: 2 and 9


def _older(world: World) -> Tensor:
    """The parameters that sampled, half a nat away from those of now."""
    noise = torch.randn(world.theta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return world.theta + 0.5 * noise


def _log_rho(world: World, tokens: Tensor, mask: Tensor, logp: Tensor) -> Tensor:
    return torch.where(mask, logp - at(tokens, world.student(_older(world), tokens)), 0.0)


def as_loss(k, weight: str | None = None) -> Estimator:
    """k(log u) differentiated through the sampled token. weight: None, on-policy; on older samples "1", "sg ρ" or "ρ",
    the ratio of the token itself, detached or not, times the detached ratios of the tokens before."""

    def estimator(world: World) -> Moments:
        def loss(tokens, mask, p, q):
            logp, W = at(tokens, p), 1.0
            if weight in ("sg ρ", "ρ"):
                x = _log_rho(world, tokens, mask, logp)
                before = (x.cumsum(1) - x).detach()  # drops how the prefixes move
                W = ((x.detach() if weight == "sg ρ" else x) + before).exp()
            return policy_gradient.reduce(W * k(at(tokens, q) - logp), mask)

        return exact.moments(world, loss, probability=world.probability(_older(world)) if weight else None)

    return estimator


def weighted(advantage, product, cap: float = math.inf) -> Estimator:
    """An advantage on older samples, with importance weights: `product` makes their logarithm from log ρ (B, R)."""

    def estimator(world: World) -> Moments:
        def loss(tokens, mask, p, q):
            logp = at(tokens, p)
            weight = product(_log_rho(world, tokens, mask, logp)).detach().exp().clamp(max=cap)  # a weight: no gradient
            return policy_gradient.loss(logp, weight * advantage(at(tokens, q) - logp, mask), mask)

        return exact.moments(world, loss, probability=world.probability(_older(world)))

    return estimator


# ------------------------------------------------------------------------------ sums over part of the vocabulary: 4, 5


def per_prefix(value, world: World) -> tuple[float, float]:
    """Mean of value(student logits, teacher logits) (S, R) over the prefixes that the student visits, and the share of
    them where it is below 0."""
    x, share = value(world.student(world.theta, world.tokens), world.teacher_logits), world.probability()[:, None]
    share = share * world.mask / (share * world.mask).sum()
    return (share * x).sum().item(), share[x < 0].sum().item()


def true_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) at each prefix."""
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)


def clipped_terms(p: Tensor, q: Tensor, bound: float = 0.05) -> Tensor:
    """Σ_v min(p ln(p/q), bound) at each prefix."""
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    return (logp.exp() * (logp - logq)).clamp(max=bound).sum(-1)


def jsd_in(dtype: torch.dtype):
    """½ KL(p‖m) + ½ KL(q‖m) at each prefix, m = (p + q)/2, as it is usually written."""

    def value(p: Tensor, q: Tensor) -> Tensor:
        logp, logq = (x.to(dtype).log_softmax(-1) for x in (p, q))
        logm = ((logp.exp() + logq.exp()) / 2).log()
        return ((logp.exp() * (logp - logm) + logq.exp() * (logq - logm)) / 2).sum(-1).double()

    return value


def top_k(whose: str, tail: str = "", k: int = 2):
    """Σ p ln(p/q) at each prefix over the k likeliest tokens of "student" or "teacher".

    tail  "": the others are left out; "bucket": they are one more token; "−p + q" is added to each term
    """

    def value(p: Tensor, q: Tensor) -> Tensor:
        top = (p if whose == "student" else q).topk(k).indices
        logp, logq = (x.log_softmax(-1).gather(-1, top) for x in (p, q))
        if tail == "bucket":
            logp, logq = (torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True))], -1) for x in (logp, logq))
        terms = logp.exp() * (logp - logq) + (logq.exp() - logp.exp() if tail == "−p + q" else 0.0)
        return terms.sum(-1)

    return value


# --------------------------------------------------------------------------------------- who samples, who scores: 9, 10


def top_p(logits: Tensor, keep: float = 0.8) -> Tensor:
    """−∞ for the tokens that nucleus sampling leaves out."""
    prob, order = logits.softmax(-1).sort(-1, descending=True)
    out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, prob.cumsum(-1) - prob >= keep)
    return logits.masked_fill(out, -torch.inf)


def sampler(world: World, change) -> World:
    """The world whose student samples from changed logits."""
    logits = change(world.student(world.theta, world.tokens))
    return replace(world, student=lambda theta, tokens: logits)


def ratio_and_kept_mass(world: World, change) -> tuple[Tensor, Tensor, Tensor]:
    """For each token (N,) that can be sampled from truncated logits: the full softmax over the sampler's probability,
    the mass that the truncation keeps at its prefix, and the token's share of all that is sampled."""
    other, logits = sampler(world, change), world.student(world.theta, world.tokens)
    share = other.probability()[:, None] * world.mask
    drawn = share > 0
    ratio = (at(world.tokens, logits) - at(world.tokens, change(logits))).exp()
    kept = torch.where(change(logits) > -torch.inf, logits.softmax(-1), 0.0).sum(-1)
    return ratio[drawn], kept[drawn], share[drawn] / share.sum()


def drawn_from(change, advantage) -> Estimator:
    """Sampled from changed logits, scored with the full softmax."""
    return lambda world: exact.moments(
        world, exact.sampled(advantage), probability=sampler(world, change).probability()
    )


def taught_by(change, advantage) -> Estimator:
    """The teacher's logits are changed on the way."""
    return lambda world: paid(advantage)(replace(world, teacher_logits=change(world.teacher_logits)))


def other_eos(q: Tensor) -> Tensor:
    """A teacher that ends with token 0."""
    last = q.shape[-1] - 1
    return q[..., [last, *range(1, last), 0]]


TEACHERS = {
    "shifted by one": lambda q: q.roll(1, dims=1),
    "at temperature 2": lambda q: q / 2,
    "with another tokenizer": lambda q: q.roll(1, dims=-1),
    "with noise (dropout)": lambda q: q + torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).double(),
    "with another EOS": other_eos,
    "uniform (all zeros)": torch.zeros_like,
}


# ------------------------------------------------------------------------------------------------------ the one table


class Pitfall(NamedTuple):
    """A row: what one sees or types, the mistake, its mend, the thread, and what the table measures."""

    sees: str
    name: str
    mend: str
    thread: str
    estimator: Estimator
    goal: Goal
    small: bool = False  # whether it couples two responses


def _bfloat16_sampler(tokens, mask, p, q):
    cached = at(tokens, p).detach().bfloat16().double()  # drops nothing: log u is a constant in the advantage
    return policy_gradient.loss(at(tokens, p), opdplus.advantage(at(tokens, q) - cached, mask, jsd), mask)


def _exp_first(log_u, mask, *_):
    log_u = log_u + 800.0 * ~mask  # behind the EOS it may be anything
    return (forward_kl.w_f(log_u) * mask).detach()  # drops nothing: an advantage is a constant


def _no_eos(tokens, mask, p, q):
    return exact.sampled(plus(jsd))(tokens, mask & (tokens != p.shape[-1] - 1), p, q)


def group(weigh, right) -> Estimator:
    """GRPO's first update with groups of two: weigh(A, teacher's logp, student's logp, mask) → A; right(sum) → bool."""

    def loss(tokens, mask, p, q):
        A, logp = grpo.advantage(right(tokens.sum(1)).double(), 2, normalize_std=False), at(tokens, p)
        return grpo.clipped_surrogate(logp, logp.detach(), weigh(A, at(tokens, q), logp, mask), mask, 0.2, 0.28)

    return lambda world: exact.moments(world, loss, batch_size=2)


def kl_div(first: str) -> exact.Estimator:
    """F.kl_div with the "student" or the "teacher" as its first argument, the input."""

    def loss(tokens, mask, p, q):
        a, b = (p, q) if first == "student" else (q, p)
        return policy_gradient.reduce(F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").sum(-1), mask)

    return loss


def rewarded(world: World) -> Tensor:
    """The mean of GRPO where a right answer has an even sum."""
    return group(lambda A, *_: A, lambda s: s % 2 == 0)(world).mean


def evidence(eps_w: float) -> Estimator:
    """RLSD at λ = 1, at the length of GRPO's mean."""
    weigh = lambda A, *rest: rlsd.advantage(A, *rest, lam=1.0, eps_w=eps_w)
    return same_length(group(weigh, lambda s: s % 2 == 0), rewarded)


hellinger = divergences.get("hellinger")
REST = [
    Pitfall(
        "KL rises from the first step",
        "wrong sign",
        "teacher_logp − student_logp is the advantage",
        "a control, the end of the scale",
        paid(lambda log_u, mask, *_: -opd.advantage(log_u, mask, reverse_kl)),
        goal(reverse_kl),
    ),
    Pitfall(
        "F.kl_div argument order: forward or reverse KL?",
        "F.kl_div(student, teacher) for reverse KL",
        "F.kl_div(a, b) is KL(b‖a)",
        "huggingface/trl#4935, modelscope/twinkle#112, idanshen/Self-Distillation#5",
        of(kl_div("student")),
        goal(reverse_kl),
    ),
    Pitfall(
        "any f-divergence as a reward collapses",
        "OPD, squared Hellinger",
        "OPD+, or reverse KL",
        "derived here",
        paid(minus_f(hellinger)),
        goal(hellinger),
    ),
    Pitfall(
        "beta near 0 or 1: loss and grad_norm tiny",
        "JSD(β = 0.999) for reverse KL",
        "divide by 1 − β (at the other end by β), or take the KL itself",
        "modelscope/ms-swift#10078, verl-project/verl-recipe#151",
        full(field.jsd(0.999)),
        goal(reverse_kl),
    ),
    Pitfall(
        "log ratio clamped, small gradients",
        "log u clipped at ±0.2",
        "a bound that rarely acts; log how often",
        "opendilab/LightRFT#43 (±20), verl-project/verl#2928",
        paid(lambda log_u, mask, *_: opdplus.advantage(log_u.clamp(-0.2, 0.2), mask, jsd)),
        goal(jsd),
    ),
    Pitfall(
        "KV cache or bfloat16 changes the log-probs",
        "the sampler's bfloat16 log-probs",
        "score again with the trainer",
        "huggingface/transformers#25420, THUDM/slime#714",
        of(_bfloat16_sampler),
        goal(jsd),
    ),
    Pitfall(
        "loss is NaN with padding",
        "exp before the mask",
        "torch.where(mask, log_u, 0), then exp",
        "huggingface/trl#5594",
        paid(_exp_first),
        goal(forward_kl),
    ),
    Pitfall(
        "model never stops; pad_token = eos_token",
        "PAD = EOS, EOS masked",
        "mask by position, first EOS included",
        "huggingface/trl#6357",
        of(_no_eos),
        goal(jsd),
    ),
    Pitfall(
        "RLSD follows the teacher's style",
        "RLSD without its clip",
        "ε_w = 0.2",
        "derived here, for [RLSD](https://arxiv.org/abs/2604.03128)",
        evidence(1e9),
        rewarded,
        small=True,
    ),
    Pitfall(
        "reward_std = 0, loss = 0, grad_norm = 0",
        "GRPO, all rewards of a group equal",
        "log their share (`zero_groups`)",
        "huggingface/trl#3857, huggingface/trl#3502, radixark/miles#1034",
        group(lambda A, *_: A, lambda s: s < 0),
        rewarded,
        small=True,
    ),
]
