"""RLSD, reinforcement learning with self-distillation: the reward's direction, the privileged self's magnitude.

The model that has seen a reference r scores the response of the model that has not:

    Δ_n = sg( log P_T(y_n|x, r, y_<n) − log P_S(y_n|x, y_<n) )        privileged information gain, nats
    w_n = exp( sign(A) Δ_n ) = (P_T / P_S)^{sign A}                   evidence weight
    Â_n = A · [ (1 − λ) + λ · clip(w_n, 1 − ε_w, 1 + ε_w) ]           A from GRPO, one per response

A right response is credited most where knowing r makes the token likelier. A wrong one is blamed most where knowing r
makes it less likely. Since w > 0, Â never changes the sign of A: the teacher says how much, never which way. What only
a reader of r would do is rewarded in right responses alone, and there at most 1 + λ ε_w times as much.

What w measures: if the teacher were the student conditioned on being right, P_T/P_S would be 1 + A_n/V(s_n), one plus
the token's true advantage in units of the value (exact/rewards.py). In a right response w_n is that, in a wrong one its
inverse. The mean of Â ∇log p is the gradient of nothing.

Source: "Self-Distilled RLVR", arXiv 2604.03128, §4.1, eqs. 13–15, with options of its public code, which computes the
line above. In the paper λ falls to 0, and eq. 16 has min[w A, clip(w) A], which does not bound the blame of a wrong
response. What differs from both: the divisor of the loss is the constant B (grpo.py).
"""

import torch
from torch import Tensor

from nano_opd.checks import require_batch, require_constant, require_log_ratio, require_same_shape
from nano_opd.policy_gradient import Fraction, fraction


def advantage(
    advantage: Tensor,
    teacher_logp: Tensor,
    student_logp: Tensor,
    mask: Tensor,
    lam: float,
    eps_w: float,
    negative_only: bool = False,
    span: Tensor | None = None,
) -> Tensor:
    """Return Â_n of each sampled token, (B, R), detached, 0 where mask is False.

    advantage      (B,) A of each response, from grpo.advantage
    teacher_logp   (B, R) log P_T(y_n|x, r, y_<n), nats
    student_logp   (B, R) log P_S(y_n|x, y_<n), nats: of the live policy or of the one that sampled
    mask           (B, R) bool
    lam            λ ∈ [0, 1]; 0 is GRPO
    eps_w          ε_w ≥ 0; 0 is GRPO
    negative_only  reweight only the responses with A < 0
    span           (B, R) bool or None: reweight only these tokens, for example the reasoning before the answer

    Raise ValueError for λ or ε_w outside its range, shapes that do not match, a mask that is not bool, an A with a
    gradient, or a log-ratio that is NaN or +∞.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], not {lam}")
    if not 0 <= eps_w < float("inf"):
        raise ValueError(f"eps_w must be finite and not negative, not {eps_w}")
    require_batch(mask, teacher_logp=teacher_logp, student_logp=student_logp)
    require_same_shape(advantage=advantage, responses=mask[:, 0])
    require_constant(advantage)
    advantage = advantage.unsqueeze(1)  # (B, 1): A, the same for all tokens of a response
    w = evidence_weight(advantage, teacher_logp, student_logp, mask)
    multiplier = (1 - lam) + lam * w.clamp(1 - eps_w, 1 + eps_w)
    if negative_only:
        multiplier = torch.where(advantage < 0, multiplier, 1.0)
    if span is not None:
        require_batch(span)
        require_same_shape(span=span, mask=mask)
        multiplier = torch.where(span, multiplier, 1.0)
    return torch.where(mask, advantage * multiplier, 0.0)


def evidence_weight(advantage: Tensor, teacher_logp: Tensor, student_logp: Tensor, mask: Tensor) -> Tensor:
    """Return w_n = (P_T/P_S)^{sign A} before the clip, (B, R), detached; 1 where mask is False or A = 0.

    advantage  (B, 1) or (B, R)
    The others as in `advantage`.

    Raise ValueError for another shape, a mask that is not bool, an A that is NaN, or a log-ratio that is NaN or +∞.
    """
    require_batch(mask, teacher_logp=teacher_logp, student_logp=student_logp)
    if advantage.ndim != 2 or advantage.isnan().any():
        raise ValueError(f"the advantage must be (B, 1) or (B, R) and hold no NaN, but it is {tuple(advantage.shape)}")
    gain = torch.where(mask, teacher_logp - student_logp, 0.0)  # Δ
    require_log_ratio(gain)
    log_w = torch.where(advantage == 0, 0.0, advantage.sign() * gain)  # not 0 · ∞, which would be NaN
    w = log_w.exp()
    return w.detach()  # drops ∇P_S, the sg of Δ: the weight is a judgement, not an objective


def clip_fraction(
    advantage: Tensor, teacher_logp: Tensor, student_logp: Tensor, mask: Tensor, eps_w: float
) -> Fraction:
    """Return the fraction of the sampled tokens whose weight the clip bounds, among responses with A ≠ 0.

    advantage  (B,)
    The others as in `advantage`.
    """
    require_same_shape(advantage=advantage, responses=mask[:, 0])
    advantage = advantage.unsqueeze(1)  # (B, 1)
    w = evidence_weight(advantage, teacher_logp, student_logp, mask)
    outside = (w < 1 - eps_w) | (w > 1 + eps_w)
    return fraction(outside, among=mask & (advantage != 0))


def lam_at(step: int, lam: float, decay: int = 0) -> float:
    """Return λ of update `step`: it falls linearly to 0 over `decay` updates, or stays where `decay` is 0.

    Raise ValueError for a negative number of updates.
    """
    if min(step, decay) < 0:
        raise ValueError(f"numbers of updates must not be negative: {step=}, {decay=}")
    if decay == 0:
        return lam
    return lam * max(0.0, 1 - step / decay)
