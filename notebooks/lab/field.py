"""The field: advantages for on-policy distillation, most of them published or shipped, and what each descends.

A row is an advantage A(log p, log q) of every token of one prefix, (…, V) each, and the function of the student that
its expected update descends, or None; `tests/lab/test_field.py` proves it. "Read" stands beside papers and code that
were read for this project. Where it does not, the formula is as others describe it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, exp, expm1, log1p, logaddexp

from nano_opd import divergences
from nano_opd.divergences import Divergence
from nano_opd.exact.law import generator, of_u

Pair = Callable[[Tensor, Tensor], Tensor]
ALPHA, BETA, LAMBDA, TAU, K = 0.2, 0.3, 1.25, 0.1, 2  # of the rows below; any other would do


@dataclass(frozen=True)
class Row:
    name: str
    formula: str  # A, with x = ln u and u = q/p at the token
    source: str
    exactly: str
    advantage: Pair
    descends: Pair | None  # (…, V), (…, V) → (…)


def mean(f: Callable[[Tensor], Tensor]) -> Pair:
    """E_p[f(u)], with f a function of log u."""
    return lambda p, q: (exp(p) * f(q - p)).sum(-1)


def D(name: str) -> Pair:
    return mean(divergences.get(name).f)


def opd(name: str, called: str, exactly: str) -> Row:
    d = divergences.get(name)
    return Row(f"OPD, {called}", "−f(u)", OPD, exactly, of_u(d.reward), mean(generator(d.reward).f))


def mix(a: float) -> Callable[[Tensor], Tensor]:
    """ln(a u + 1 − a), of log u."""
    return lambda x: logaddexp(x + math.log(a), torch.full_like(x, math.log1p(-a)))


def jsd(b: float) -> Divergence:
    """β KL(q‖m) + (1−β) KL(p‖m), m = β q + (1−β) p: f = β u ln(u/m̂) − (1−β) ln m̂ with m̂ = β u + 1 − β."""
    m = mix(b)
    return Divergence(
        f"JSD(β={b})",
        f=lambda x: b * exp(x) * (x - m(x)) - (1 - b) * m(x),
        f_prime=lambda x: b * (x - m(x)),
        w_f=lambda x: (1 - b) * m(x),
    )


def skl(a: float) -> Divergence:
    """KL(q ‖ α q + (1−α) p): f = u ln(u/m̂) with m̂ = α u + 1 − α, w_f = (1−α) u/m̂."""
    m = mix(a)
    return Divergence(
        f"SKL(α={a})",
        f=lambda x: exp(x) * (x - m(x)),
        f_prime=lambda x: x - m(x) + 1 - a * exp(x - m(x)),
        w_f=lambda x: (1 - a) * exp(x - m(x)),
    )


def srkl(a: float) -> Divergence:
    """KL(p ‖ (1−α) q + α p): f = −ln m̂ with m̂ = (1−α) u + α, w_f = ln m̂ − (1−α) u/m̂; f never rises."""
    m = mix(1 - a)
    return Divergence(
        f"SRKL(α={a})",
        f=lambda x: -m(x),
        f_prime=lambda x: -(1 - a) * exp(-m(x)),
        w_f=lambda x: m(x) - (1 - a) * exp(x - m(x)),
    )


def reference(q: Tensor) -> Tensor:
    """ln of a reference model half way from the teacher to uniform."""
    return ((exp(q) + 1 / q.shape[-1]) / 2).log()


def target(q: Tensor) -> Tensor:
    """ln of p ∝ ref (q/ref)^λ."""
    ref = reference(q)
    return (ref + LAMBDA * (q - ref)).log_softmax(-1)


def top(x: Tensor) -> Tensor:
    """Which tokens are among the K of the largest x, (…, V) bool."""
    return x >= x.topk(K).values[..., -1:]


def zscore(p: Tensor, q: Tensor) -> Tensor:
    centred = (q - p) - (exp(p) * (q - p)).sum(-1, keepdim=True)
    return centred / ((exp(p) * centred**2).sum(-1, keepdim=True).sqrt() + 1e-6)


def gate(q: Tensor) -> Tensor:
    """1 where the teacher's entropy is above 0.8 nats, (…, 1)."""
    return (-(exp(q) * q).sum(-1, keepdim=True) > 0.8).double()


def within(x: Tensor, kept: Tensor) -> Tensor:
    """x less ln of its mass in the kept tokens."""
    return x - x.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)


def renormalised(p: Tensor, q: Tensor) -> Tensor:
    """KL of both, each renormalised on the teacher's top k."""
    P, Q = within(p, top(q)), within(q, top(q))
    return torch.where(top(q), exp(P) * (P - Q), 0.0).sum(-1)


def of_renormalised(p: Tensor, q: Tensor) -> Tensor:
    P, Q = within(p, top(q)), within(q, top(q))
    return torch.where(top(q), (renormalised(p, q).unsqueeze(-1) - (P - Q)) * exp(P - p), 0.0)


def bucket(x: Tensor, kept: Tensor) -> Tensor:
    """x in the kept tokens, and ln of the mass of all others in the others."""
    return torch.where(kept, x, x.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True))


def with_tail(kept: Callable[[Tensor, Tensor], Tensor]) -> Pair:
    return lambda p, q: bucket(q, kept(p, q)) - bucket(p, kept(p, q))


def logit(x: Tensor) -> Tensor:
    return x - log1p(-exp(x))


def sampled_or_rest(p: Tensor, q: Tensor) -> Tensor:
    """Σ_v ∫₀^p_v t (logit t − logit q_v) dt."""
    P = exp(p)
    return (P**2 / 2 * (p - logit(q)) - (P**2 - 1) / 2 * log1p(-P) + P / 2).sum(-1)


OPD = "Lu & Thinking Machines Lab 2025 for reverse KL, general f: OPD+ 2606.01039 (read)"
TRL = "TRL, experimental/iw_opd/iw_opd_trainer.py (code read)"
POWER = "PowerOPD 2606.17199, eq. 4 and code (read)"
K3 = "Schulman 2020, Approximating KL Divergence (not read again)"
squares = lambda p, q: (exp(q) * (q - p) ** 2).sum(-1) / 2
quadratic = generator(lambda x: -(x**2) / 2)

ROWS = [
    opd("reverse_kl", "reverse KL", "Reverse KL: the only usual generator that never rises."),
    opd("forward_kl", "forward KL", "−½ E_q[ln² u], which has no lower bound."),
    opd("jsd", "Jensen–Shannon", "E_p[h] with h″ = −f′/u, which has no lower bound."),
    opd("jsd_falling", "Jensen–Shannon, falling", "A divergence, with h″ = −f′/u > 0."),
    Row(
        "OPD+, every f",
        "−f + u f′",
        "OPD+ 2606.01039 (read)",
        "D_f. Here Jensen–Shannon; all others in test_judge.py.",
        of_u(divergences.get("jsd").w_f),
        D("jsd"),
    ),
    Row(
        "GKD, JSD(β)",
        "(1−β) ln(βu + 1 − β)",
        "GKD 2306.13649; TRL, experimental/gkd/gkd_trainer.py (code read)",
        "JSD(β). It is β KL(q‖p) near β = 0 and (1−β) KL(p‖q) near 1: it vanishes. At 0 and 1 TRL jumps to the KLs.",
        of_u(jsd(BETA).w_f),
        mean(jsd(BETA).f),
    ),
    Row(
        "DistiLLM, skewed forward KL",
        "(1−α) u / (αu + 1 − α)",
        "DistiLLM 2402.03898, distillm/losses.py (code read)",
        "KL(q ‖ αq + (1−α)p). A is below (1−α)/α.",
        of_u(skl(ALPHA).w_f),
        mean(skl(ALPHA).f),
    ),
    Row(
        "DistiLLM, skewed reverse KL",
        "ln m − (1−α) u/m, m = (1−α) u + α",
        "DistiLLM 2402.03898, distillm/losses.py (code read)",
        "KL(p ‖ (1−α)q + αp).",
        of_u(srkl(ALPHA).w_f),
        mean(srkl(ALPHA).f),
    ),
    Row(
        "TOP-D, the token's own reward",
        "ln(αu + 1 − α)",
        "TOP-D 2607.04751, as in a prime-rl branch, algo/topd.py (code read), and NeMo-RL (docs read)",
        "JSD(α) / (1−α). It is OPD under the skewed reverse KL(p ‖ αq + (1−α)p), whose f never rises.",
        of_u(mix(ALPHA)),
        lambda p, q: mean(jsd(ALPHA).f)(p, q) / (1 - ALPHA),
    ),
    Row(
        "TV-OPD, before its shared factor",
        "sign x",
        "TV-OPD 2609.08341, as described in summaries (not read)",
        "Twice the total variation: 2 × OPD+. The factor c_k is the same for all tokens of a step.",
        of_u(torch.sign),
        lambda p, q: 2 * D("tv")(p, q),
    ),
    Row(
        "PowerOPD",
        "q^α − p^α",
        POWER,
        "A Bregman divergence, Σ [p^(α+1) − (α+1) q^α p + α q^(α+1)] / (α+1), and no f-divergence. α = 1: ½ Σ (p−q)².",
        lambda p, q: exp(2 * q) - exp(2 * p),
        lambda p, q: (exp(3 * p) - 3 * exp(2 * q + p) + 2 * exp(3 * q)).sum(-1) / 3,
    ),
    Row(
        "clipped log-ratio",
        "clip(x, ±c)",
        POWER + ", its baseline",
        "A divergence of its own: h″ = 1/u² while |x| < c, 0 beyond. Biased for reverse KL, right at the teacher.",
        of_u(lambda x: x.clamp(-1, 1)),
        mean(lambda x: torch.where(x < -1, 2 - exp(x + 1), torch.where(x > 1, -exp(x - 1), -x))),
    ),
    Row(
        "squashed log-ratio",
        "tanh(x/τ)",
        POWER + ", its baseline",
        "A divergence of its own: h″ = 1 / (τ u² cosh²(x/τ)).",
        of_u(torch.tanh),
        mean(generator(torch.tanh).f),
    ),
    Row(
        "z-scored log-ratio",
        "(x − E[x]) / std(x)",
        POWER + ", its baseline, here over one prefix",
        "Nothing: no gradient.",
        zscore,
        None,
    ),
    Row(
        "G-OPD, ExOPD for λ > 1",
        "λ ln(q/ref) − ln(p/ref)",
        "G-OPD 2602.12125, verl/workers/actor/dp_actor.py (code read)",
        "KL(p ‖ t) with t ∝ ref (q/ref)^λ: t is the fixed point, not the teacher.",
        lambda p, q: LAMBDA * (q - reference(q)) - (p - reference(q)),
        lambda p, q: (exp(p) * (p - target(q))).sum(-1),
    ),
    Row(
        "entropy-gated forward KL",
        "x + 1[H(q) > 0.8] u",
        "2603.07079, as described in summaries (not read)",
        "KL(p‖q) + 1[H(q) > 0.8] KL(q‖p): the gate is the teacher's, so it stays a gradient.",
        lambda p, q: q - p + gate(q) * exp(q - p),
        lambda p, q: D("reverse_kl")(p, q) + gate(q)[..., 0] * D("forward_kl")(p, q),
    ),
    Row(
        "the same, its forward KL on the teacher's top k",
        "x + 1[v ∈ top k of q] u",
        "2603.07079, as described in an audit of its code (not read)",
        "KL(p‖q) − Σ_top q ln p: a gradient, but the teacher is no fixed point.",
        lambda p, q: q - p + top(q) * exp(q - p),
        lambda p, q: D("reverse_kl")(p, q) - (top(q) * exp(q) * p).sum(-1),
    ),
    Row("k1 as a loss", "−1", K3, "Nothing: the expected update is 0.", lambda p, q: -torch.ones_like(p), None),
    Row("k2 as a loss", "x", K3, "Reverse KL.", of_u(lambda x: x), D("reverse_kl")),
    Row("k3 as a loss", "u − 1", K3, "Forward KL.", of_u(expm1), D("forward_kl")),
    Row(
        "k2 as a reward",
        "−x²/2",
        K3,
        "E_p[h] with h″ = −ln u / u²: 0 at the teacher, and down from there for u > 1.",
        of_u(lambda x: -(x**2) / 2),
        mean(quadratic.f),
    ),
    Row(
        "k3 as a reward",
        "x + 1 − u",
        K3,
        "Reverse KL − forward KL.",
        of_u(lambda x: x - expm1(x)),
        lambda p, q: D("reverse_kl")(p, q) - D("forward_kl")(p, q),
    ),
    Row(
        "k1 or k3 as a loss times p/b, both differentiated",
        "x − 1 or x",
        K3,
        "Reverse KL, whatever b the token is drawn from.",
        of_u(lambda x: x),
        D("reverse_kl"),
    ),
    Row(
        "k1 as a reward on the teacher's samples, unweighted",
        "u x",
        "derived here",
        "½ E_q[ln² u]: no f-divergence, since h bends down for u < 1/e, but its only zero is the teacher.",
        of_u(lambda x: x * exp(x)),
        squares,
    ),
    Row(
        "top k of the student, the rest dropped",
        "1[v ∈ top k of p] (x − 1)",
        "a full-vocabulary loss cut off; notebook 02",
        "Nothing: it jumps where two tokens change places in the top k.",
        lambda p, q: top(p) * (q - p - 1),
        None,
    ),
    Row(
        "top k of the teacher, the rest dropped",
        "1[v ∈ top k of q] (x − 1)",
        "a full-vocabulary loss cut off; notebook 02",
        "Σ_top p ln(p/q): at its minimum the top k has 1/e of the teacher's mass there.",
        lambda p, q: top(q) * (q - p - 1),
        lambda p, q: (top(q) * exp(p) * (p - q)).sum(-1),
    ),
    Row(
        "top k of the teacher, both renormalised",
        "1[v ∈ top k of q] (KL_top − ln(p_top/q_top)) / p(top)",
        "derived here; TRL takes the teacher's top k for forward KL",
        "KL of the renormalised: the mass outside the top k never changes it.",
        of_renormalised,
        renormalised,
    ),
    Row(
        "top k of the teacher and a bucket for its tail",
        "x in the top k, ln(q(tail)/p(tail)) outside",
        "derived here; TRL takes the teacher's top k for forward KL",
        "KL over k + 1 outcomes, at most reverse KL: how the tail is shared among its tokens is left alone. Of "
        "three tokens the bucket holds one and hides nothing; over five tokens none of 20 students arrives.",
        with_tail(lambda p, q: top(q)),
        lambda p, q: (exp(p) * (bucket(p, top(q)) - bucket(q, top(q)))).sum(-1),
    ),
    Row(
        "top k of the student and a bucket for its tail",
        "x in the top k, ln(q(tail)/p(tail)) outside",
        TRL + ", beta=1",
        "Nothing: it jumps where two tokens change places. Of three tokens the bucket holds one and hides nothing; "
        "over five tokens none of 20 students arrives.",
        with_tail(lambda p, q: top(p)),
        None,
    ),
    Row(
        "top k and a sampled tail",
        "x − 1 in expectation",
        "derived here",
        "Reverse KL: the sum over the top k, and the sampled token's x − 1 where it lies outside.",
        of_u(lambda x: x - 1),
        D("reverse_kl"),
    ),
    Row(
        "KL of {the sampled token, all others}",
        "p (logit q − logit p)",
        TRL + ", loss_top_k=1, “sampled”",
        "Σ_v ∫ p (logit p − logit q) dp: inside the simplex its gradient is 0 only at the teacher.",
        lambda p, q: exp(p) * (logit(q) - logit(p)),
        sampled_or_rest,
    ),
    Row(
        "one constant for all tokens",
        "c",
        "the control of 2608.31046",
        "Nothing. Divided by its own length, though, it is c ∇E[1/L]: c < 0 makes responses longer.",
        lambda p, q: -torch.ones_like(p) / 2,
        None,
    ),
    Row(
        "a constant for tokens less likely than τ",
        "−½ 1[p < τ]",
        "2608.31046, README of its code (read): there the least likely fifth of a batch",
        "½ Σ min(p, τ): no teacher in it; it empties the rare tokens.",
        lambda p, q: -(exp(p) < TAU).double() / 2,
        lambda p, q: exp(p).clamp(max=TAU).sum(-1) / 2,
    ),
    Row(
        "IW-OPD, last token",
        "x (1 + γ |x| / (c + |x|))",
        "IW-OPD 2606.22600, dp_actor.py of its code, and the same in TRL (codes read)",
        "With c = Σ|x| before the token, a divergence of its own. The first token has weight 1 + γ. Between: unknown.",
        of_u(lambda x: x * (1 + 0.5 * x.abs() / (1 + x.abs()))),
        mean(generator(lambda x: x * (1 + 0.5 * x.abs() / (1 + x.abs()))).f),
    ),
    Row(
        "MiniLLM, single step",
        "x − 1, over the whole vocabulary",
        "MiniLLM 2306.08543, minillm/losses.py (code read)",
        "Reverse KL at each prefix. Its long part, a return over the length left, is no gradient on whole responses.",
        of_u(lambda x: x - 1),
        D("reverse_kl"),
    ),
]
