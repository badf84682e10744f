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

OfLogU = Callable[[Tensor], Tensor]  # log u → the same shape
Advantage = Callable[[Tensor, Tensor], Tensor]  # log p, log q, (…, V) each → (…, V)
Function = Callable[[Tensor, Tensor], Tensor]  # log p, log q, (…, V) each → (…)

# The constants of the rows below; any other would do.
ALPHA = 0.2
BETA = 0.3
LAMBDA = 1.25
TAU = 0.1
K = 2


@dataclass(frozen=True)
class Row:
    name: str
    formula: str  # A, with x = ln u and u = q/p at the token
    source: str
    exactly: str
    advantage: Advantage
    descends: Function | None


# ------------------------------------------------------------------------------------- functions of u, and divergences


def mean_under_student(f: OfLogU) -> Function:
    """Return E_p[f(u)], with f a function of log u."""

    def mean(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (exp(log_p) * f(log_q - log_p)).sum(-1)

    return mean


def divergence_of(name: str) -> Function:
    """Return the D_f of divergences.get(name)."""
    return mean_under_student(divergences.get(name).f)


def what_it_descends(advantage: OfLogU) -> Function:
    """Return E_p[h(u)] with the generator h that an advantage of log u descends."""
    return mean_under_student(generator(advantage).f)


def log_mixture(share: float) -> OfLogU:
    """Return ln(a u + 1 − a) as a function of log u, where a is the share."""

    def of_log_u(log_u: Tensor) -> Tensor:
        return logaddexp(log_u + math.log(share), torch.full_like(log_u, math.log1p(-share)))

    return of_log_u


def generalised_jsd(beta: float) -> Divergence:
    """β KL(q‖m) + (1−β) KL(p‖m), m = β q + (1−β) p: f = β u ln(u/m̂) − (1−β) ln m̂ with m̂ = β u + 1 − β."""
    log_m = log_mixture(beta)
    return Divergence(
        name=f"JSD(β={beta})",
        f=lambda log_u: beta * exp(log_u) * (log_u - log_m(log_u)) - (1 - beta) * log_m(log_u),
        f_prime=lambda log_u: beta * (log_u - log_m(log_u)),
        w_f=lambda log_u: (1 - beta) * log_m(log_u),
    )


def skewed_forward_kl(alpha: float) -> Divergence:
    """KL(q ‖ α q + (1−α) p): f = u ln(u/m̂) with m̂ = α u + 1 − α, w_f = (1−α) u/m̂."""
    log_m = log_mixture(alpha)
    return Divergence(
        name=f"SKL(α={alpha})",
        f=lambda log_u: exp(log_u) * (log_u - log_m(log_u)),
        f_prime=lambda log_u: log_u - log_m(log_u) + 1 - alpha * exp(log_u - log_m(log_u)),
        w_f=lambda log_u: (1 - alpha) * exp(log_u - log_m(log_u)),
    )


def skewed_reverse_kl(alpha: float) -> Divergence:
    """KL(p ‖ (1−α) q + α p): f = −ln m̂ with m̂ = (1−α) u + α, w_f = ln m̂ − (1−α) u/m̂; f never rises."""
    log_m = log_mixture(1 - alpha)
    return Divergence(
        name=f"SRKL(α={alpha})",
        f=lambda log_u: -log_m(log_u),
        f_prime=lambda log_u: -(1 - alpha) * exp(-log_m(log_u)),
        w_f=lambda log_u: log_m(log_u) - (1 - alpha) * exp(log_u - log_m(log_u)),
    )


def opd_row(divergence_name: str, called: str, exactly: str) -> Row:
    """Return the row of OPD under a divergence."""
    divergence = divergences.get(divergence_name)
    return Row(
        name=f"OPD, {called}",
        formula="−f(u)",
        source=OPD,
        exactly=exactly,
        advantage=of_u(divergence.reward),
        descends=what_it_descends(divergence.reward),
    )


# ----------------------------------------------------------------------------- functions of log u that a row only names


def k2_as_reward(log_u: Tensor) -> Tensor:
    return -(log_u**2) / 2


def generator_of_clipped_ratio(log_u: Tensor) -> Tensor:
    """−x within the clip; straight lines in u beyond it."""
    above = torch.where(log_u > 1, -exp(log_u - 1), -log_u)
    return torch.where(log_u < -1, 2 - exp(log_u + 1), above)


def iw_opd_of_last_token(log_u: Tensor) -> Tensor:
    """x (1 + γ |x| / (c + |x|)) with γ = ½ and c = 1."""
    return log_u * (1 + 0.5 * log_u.abs() / (1 + log_u.abs()))


# ------------------------------------------------------------------------------- advantages that the whole prefix makes


def z_scored(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(x − E[x]) / std(x) over the prefix."""
    log_u = log_q - log_p
    centred = log_u - (exp(log_p) * log_u).sum(-1, keepdim=True)
    return centred / ((exp(log_p) * centred**2).sum(-1, keepdim=True).sqrt() + 1e-6)


def reference(log_q: Tensor) -> Tensor:
    """ln of a reference model half way from the teacher to uniform."""
    return ((exp(log_q) + 1 / log_q.shape[-1]) / 2).log()


def target(log_q: Tensor) -> Tensor:
    """ln of p ∝ ref (q/ref)^λ."""
    log_ref = reference(log_q)
    return (log_ref + LAMBDA * (log_q - log_ref)).log_softmax(-1)


def gate(log_q: Tensor) -> Tensor:
    """1 where the teacher's entropy is above 0.8 nats, (…, 1)."""
    entropy = -(exp(log_q) * log_q).sum(-1, keepdim=True)
    return (entropy > 0.8).double()


def reverse_kl_and_gated_forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    reverse = divergence_of("reverse_kl")(log_p, log_q)
    forward = divergence_of("forward_kl")(log_p, log_q)
    return reverse + gate(log_q)[..., 0] * forward


def in_top_k(x: Tensor) -> Tensor:
    """Which tokens are among the K of the largest x, (…, V) bool."""
    return x >= x.topk(K).values[..., -1:]


def reverse_kl_and_cross_entropy_on_top_k(log_p: Tensor, log_q: Tensor) -> Tensor:
    reverse = divergence_of("reverse_kl")(log_p, log_q)
    return reverse - (in_top_k(log_q) * exp(log_q) * log_p).sum(-1)


def renormalised_on(kept: Tensor, x: Tensor) -> Tensor:
    """x less ln of its mass in the kept tokens."""
    return x - x.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)


def renormalised_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of both, each renormalised on the teacher's top k."""
    kept = in_top_k(log_q)
    within_p = renormalised_on(kept, log_p)
    within_q = renormalised_on(kept, log_q)
    return torch.where(kept, exp(within_p) * (within_p - within_q), 0.0).sum(-1)


def renormalised_top_k(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1[v ∈ top k of q] (KL_top − ln(p_top/q_top)) / p(top)."""
    kept = in_top_k(log_q)
    within_p = renormalised_on(kept, log_p)
    within_q = renormalised_on(kept, log_q)
    kl = renormalised_kl(log_p, log_q).unsqueeze(-1)
    return torch.where(kept, (kl - (within_p - within_q)) * exp(within_p - log_p), 0.0)


def bucket(kept: Tensor, x: Tensor) -> Tensor:
    """x in the kept tokens, and ln of the mass of all others in the others."""
    return torch.where(kept, x, x.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True))


def bucket_beside_top_k_of_teacher(log_p: Tensor, log_q: Tensor) -> Tensor:
    kept = in_top_k(log_q)
    return bucket(kept, log_q) - bucket(kept, log_p)


def bucket_beside_top_k_of_student(log_p: Tensor, log_q: Tensor) -> Tensor:
    kept = in_top_k(log_p)
    return bucket(kept, log_q) - bucket(kept, log_p)


def kl_with_bucket(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL over k + 1 outcomes."""
    kept = in_top_k(log_q)
    return (exp(log_p) * (bucket(kept, log_p) - bucket(kept, log_q))).sum(-1)


def logit(x: Tensor) -> Tensor:
    """The logit of a probability, from its log."""
    return x - log1p(-exp(x))


def integral_of_token_against_rest(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ_v ∫₀^p_v t (logit t − logit q_v) dt."""
    p = exp(log_p)
    return (p**2 / 2 * (log_p - logit(log_q)) - (p**2 - 1) / 2 * log1p(-p) + p / 2).sum(-1)


# ------------------------------------------------------------------------------------------------------------ the table

OPD = "Lu & Thinking Machines Lab 2025 for reverse KL, general f: OPD+ 2606.01039 (read)"
TRL = "TRL, experimental/iw_opd/iw_opd_trainer.py (code read)"
POWER = "PowerOPD 2606.17199, eq. 4 and code (read)"
K3 = "Schulman 2020, Approximating KL Divergence (not read again)"

ROWS = [
    opd_row("reverse_kl", "reverse KL", "Reverse KL: the only usual generator that never rises."),
    opd_row("forward_kl", "forward KL", "−½ E_q[ln² u], which has no lower bound."),
    opd_row("jsd", "Jensen–Shannon", "E_p[h] with h″ = −f′/u, which has no lower bound."),
    opd_row("jsd_falling", "Jensen–Shannon, falling", "A divergence, with h″ = −f′/u > 0."),
    Row(
        name="OPD+, every f",
        formula="−f + u f′",
        source="OPD+ 2606.01039 (read)",
        exactly="D_f. Here Jensen–Shannon; all others in test_judge.py.",
        advantage=of_u(divergences.get("jsd").w_f),
        descends=divergence_of("jsd"),
    ),
    Row(
        name="GKD, JSD(β)",
        formula="(1−β) ln(βu + 1 − β)",
        source="GKD 2306.13649; TRL, experimental/gkd/gkd_trainer.py (code read)",
        exactly=(
            "JSD(β). It is β KL(q‖p) near β = 0 and (1−β) KL(p‖q) near 1: it vanishes. At 0 and 1 TRL jumps to the KLs."
        ),
        advantage=of_u(generalised_jsd(BETA).w_f),
        descends=mean_under_student(generalised_jsd(BETA).f),
    ),
    Row(
        name="DistiLLM, skewed forward KL",
        formula="(1−α) u / (αu + 1 − α)",
        source="DistiLLM 2402.03898, distillm/losses.py (code read)",
        exactly="KL(q ‖ αq + (1−α)p). A is below (1−α)/α.",
        advantage=of_u(skewed_forward_kl(ALPHA).w_f),
        descends=mean_under_student(skewed_forward_kl(ALPHA).f),
    ),
    Row(
        name="DistiLLM, skewed reverse KL",
        formula="ln m − (1−α) u/m, m = (1−α) u + α",
        source="DistiLLM 2402.03898, distillm/losses.py (code read)",
        exactly="KL(p ‖ (1−α)q + αp).",
        advantage=of_u(skewed_reverse_kl(ALPHA).w_f),
        descends=mean_under_student(skewed_reverse_kl(ALPHA).f),
    ),
    Row(
        name="TOP-D, the token's own reward",
        formula="ln(αu + 1 − α)",
        source="TOP-D 2607.04751, as in a prime-rl branch, algo/topd.py (code read), and NeMo-RL (docs read)",
        exactly="JSD(α) / (1−α). It is OPD under the skewed reverse KL(p ‖ αq + (1−α)p), whose f never rises.",
        advantage=of_u(log_mixture(ALPHA)),
        descends=lambda log_p, log_q: mean_under_student(generalised_jsd(ALPHA).f)(log_p, log_q) / (1 - ALPHA),
    ),
    Row(
        name="TV-OPD, before its shared factor",
        formula="sign x",
        source="TV-OPD 2609.08341, as described in summaries (not read)",
        exactly="Twice the total variation: 2 × OPD+. The factor c_k is the same for all tokens of a step.",
        advantage=of_u(torch.sign),
        descends=lambda log_p, log_q: 2 * divergence_of("tv")(log_p, log_q),
    ),
    Row(
        name="PowerOPD",
        formula="q^α − p^α",
        source=POWER,
        exactly=(
            "A Bregman divergence, Σ [p^(α+1) − (α+1) q^α p + α q^(α+1)] / (α+1), and no f-divergence. "
            "α = 1: ½ Σ (p−q)²."
        ),
        advantage=lambda log_p, log_q: exp(2 * log_q) - exp(2 * log_p),
        descends=lambda log_p, log_q: (exp(3 * log_p) - 3 * exp(2 * log_q + log_p) + 2 * exp(3 * log_q)).sum(-1) / 3,
    ),
    Row(
        name="clipped log-ratio",
        formula="clip(x, ±c)",
        source=POWER + ", its baseline",
        exactly=(
            "A divergence of its own: h″ = 1/u² while |x| < c, 0 beyond. Biased for reverse KL, right at the teacher."
        ),
        advantage=of_u(lambda log_u: log_u.clamp(-1, 1)),
        descends=mean_under_student(generator_of_clipped_ratio),
    ),
    Row(
        name="squashed log-ratio",
        formula="tanh(x/τ)",
        source=POWER + ", its baseline",
        exactly="A divergence of its own: h″ = 1 / (τ u² cosh²(x/τ)).",
        advantage=of_u(torch.tanh),
        descends=what_it_descends(torch.tanh),
    ),
    Row(
        name="z-scored log-ratio",
        formula="(x − E[x]) / std(x)",
        source=POWER + ", its baseline, here over one prefix",
        exactly="Nothing: no gradient.",
        advantage=z_scored,
        descends=None,
    ),
    Row(
        name="G-OPD, ExOPD for λ > 1",
        formula="λ ln(q/ref) − ln(p/ref)",
        source="G-OPD 2602.12125, verl/workers/actor/dp_actor.py (code read)",
        exactly="KL(p ‖ t) with t ∝ ref (q/ref)^λ: t is the fixed point, not the teacher.",
        advantage=lambda log_p, log_q: LAMBDA * (log_q - reference(log_q)) - (log_p - reference(log_q)),
        descends=lambda log_p, log_q: (exp(log_p) * (log_p - target(log_q))).sum(-1),
    ),
    Row(
        name="entropy-gated forward KL",
        formula="x + 1[H(q) > 0.8] u",
        source="2603.07079, as described in summaries (not read)",
        exactly="KL(p‖q) + 1[H(q) > 0.8] KL(q‖p): the gate is the teacher's, so it stays a gradient.",
        advantage=lambda log_p, log_q: log_q - log_p + gate(log_q) * exp(log_q - log_p),
        descends=reverse_kl_and_gated_forward_kl,
    ),
    Row(
        name="the same, its forward KL on the teacher's top k",
        formula="x + 1[v ∈ top k of q] u",
        source="2603.07079, as described in an audit of its code (not read)",
        exactly="KL(p‖q) − Σ_top q ln p: a gradient, but the teacher is no fixed point.",
        advantage=lambda log_p, log_q: log_q - log_p + in_top_k(log_q) * exp(log_q - log_p),
        descends=reverse_kl_and_cross_entropy_on_top_k,
    ),
    Row(
        name="k1 as a loss",
        formula="−1",
        source=K3,
        exactly="Nothing: the expected update is 0.",
        advantage=lambda log_p, log_q: -torch.ones_like(log_p),
        descends=None,
    ),
    Row(
        name="k2 as a loss",
        formula="x",
        source=K3,
        exactly="Reverse KL.",
        advantage=of_u(lambda log_u: log_u),
        descends=divergence_of("reverse_kl"),
    ),
    Row(
        name="k3 as a loss",
        formula="u − 1",
        source=K3,
        exactly="Forward KL.",
        advantage=of_u(expm1),
        descends=divergence_of("forward_kl"),
    ),
    Row(
        name="k2 as a reward",
        formula="−x²/2",
        source=K3,
        exactly="E_p[h] with h″ = −ln u / u²: 0 at the teacher, and down from there for u > 1.",
        advantage=of_u(k2_as_reward),
        descends=what_it_descends(k2_as_reward),
    ),
    Row(
        name="k3 as a reward",
        formula="x + 1 − u",
        source=K3,
        exactly="Reverse KL − forward KL.",
        advantage=of_u(lambda log_u: log_u - expm1(log_u)),
        descends=lambda log_p, log_q: (
            divergence_of("reverse_kl")(log_p, log_q) - divergence_of("forward_kl")(log_p, log_q)
        ),
    ),
    Row(
        name="k1 or k3 as a loss times p/b, both differentiated",
        formula="x − 1 or x",
        source=K3,
        exactly="Reverse KL, whatever b the token is drawn from.",
        advantage=of_u(lambda log_u: log_u),
        descends=divergence_of("reverse_kl"),
    ),
    Row(
        name="k1 as a reward on the teacher's samples, unweighted",
        formula="u x",
        source="derived here",
        exactly="½ E_q[ln² u]: no f-divergence, since h bends down for u < 1/e, but its only zero is the teacher.",
        advantage=of_u(lambda log_u: log_u * exp(log_u)),
        descends=lambda log_p, log_q: (exp(log_q) * (log_q - log_p) ** 2).sum(-1) / 2,
    ),
    Row(
        name="top k of the student, the rest dropped",
        formula="1[v ∈ top k of p] (x − 1)",
        source="a full-vocabulary loss cut off; notebook 02",
        exactly="Nothing: it jumps where two tokens change places in the top k.",
        advantage=lambda log_p, log_q: in_top_k(log_p) * (log_q - log_p - 1),
        descends=None,
    ),
    Row(
        name="top k of the teacher, the rest dropped",
        formula="1[v ∈ top k of q] (x − 1)",
        source="a full-vocabulary loss cut off; notebook 02",
        exactly="Σ_top p ln(p/q): at its minimum the top k has 1/e of the teacher's mass there.",
        advantage=lambda log_p, log_q: in_top_k(log_q) * (log_q - log_p - 1),
        descends=lambda log_p, log_q: (in_top_k(log_q) * exp(log_p) * (log_p - log_q)).sum(-1),
    ),
    Row(
        name="top k of the teacher, both renormalised",
        formula="1[v ∈ top k of q] (KL_top − ln(p_top/q_top)) / p(top)",
        source="derived here; TRL takes the teacher's top k for forward KL",
        exactly="KL of the renormalised: the mass outside the top k never changes it.",
        advantage=renormalised_top_k,
        descends=renormalised_kl,
    ),
    Row(
        name="top k of the teacher and a bucket for its tail",
        formula="x in the top k, ln(q(tail)/p(tail)) outside",
        source="derived here; TRL takes the teacher's top k for forward KL",
        exactly=(
            "KL over k + 1 outcomes, at most reverse KL: how the tail is shared among its tokens is left alone. Of "
            "three tokens the bucket holds one and hides nothing; over five tokens none of 20 students arrives."
        ),
        advantage=bucket_beside_top_k_of_teacher,
        descends=kl_with_bucket,
    ),
    Row(
        name="top k of the student and a bucket for its tail",
        formula="x in the top k, ln(q(tail)/p(tail)) outside",
        source=TRL + ", beta=1",
        exactly=(
            "Nothing: it jumps where two tokens change places. Of three tokens the bucket holds one and hides nothing; "
            "over five tokens none of 20 students arrives."
        ),
        advantage=bucket_beside_top_k_of_student,
        descends=None,
    ),
    Row(
        name="top k and a sampled tail",
        formula="x − 1 in expectation",
        source="derived here",
        exactly="Reverse KL: the sum over the top k, and the sampled token's x − 1 where it lies outside.",
        advantage=of_u(lambda log_u: log_u - 1),
        descends=divergence_of("reverse_kl"),
    ),
    Row(
        name="KL of {the sampled token, all others}",
        formula="p (logit q − logit p)",
        source=TRL + ", loss_top_k=1, “sampled”",
        exactly="Σ_v ∫ p (logit p − logit q) dp: inside the simplex its gradient is 0 only at the teacher.",
        advantage=lambda log_p, log_q: exp(log_p) * (logit(log_q) - logit(log_p)),
        descends=integral_of_token_against_rest,
    ),
    Row(
        name="one constant for all tokens",
        formula="c",
        source="the control of 2608.31046",
        exactly="Nothing. Divided by its own length, though, it is c ∇E[1/L]: c < 0 makes responses longer.",
        advantage=lambda log_p, log_q: -torch.ones_like(log_p) / 2,
        descends=None,
    ),
    Row(
        name="a constant for tokens less likely than τ",
        formula="−½ 1[p < τ]",
        source="2608.31046, README of its code (read): there the least likely fifth of a batch",
        exactly="½ Σ min(p, τ): no teacher in it; it empties the rare tokens.",
        advantage=lambda log_p, log_q: -(exp(log_p) < TAU).double() / 2,
        descends=lambda log_p, log_q: exp(log_p).clamp(max=TAU).sum(-1) / 2,
    ),
    Row(
        name="IW-OPD, last token",
        formula="x (1 + γ |x| / (c + |x|))",
        source="IW-OPD 2606.22600, dp_actor.py of its code, and the same in TRL (codes read)",
        exactly=(
            "With c = Σ|x| before the token, a divergence of its own. "
            "The first token has weight 1 + γ. Between: unknown."
        ),
        advantage=of_u(iw_opd_of_last_token),
        descends=what_it_descends(iw_opd_of_last_token),
    ),
    Row(
        name="MiniLLM, single step",
        formula="x − 1, over the whole vocabulary",
        source="MiniLLM 2306.08543, minillm/losses.py (code read)",
        exactly=(
            "Reverse KL at each prefix. "
            "Its long part, a return over the length left, is no gradient on whole responses."
        ),
        advantage=of_u(lambda log_u: log_u - 1),
        descends=divergence_of("reverse_kl"),
    ),
]
