"""OPD+, on-policy distillation with the corrected advantage: what is A_n?

The student p_θ samples y, and the teacher q scores each sampled token: u_n = q(y_n|s_n) / p_θ(y_n|s_n). OPD+ keeps the
gradient of E_p[f(u)] whole, the part through u_n included:

    A_n  =  w_f(u_n)  +  Σ_{m>n} γ^{m−n} (−f(u_m))         w_f(u) = −f(u) + u f′(u)

Source: "OPD+: Rethinking the Advantage Design for On-Policy Distillation", arXiv 2606.01039, §3 and Table 1.

What Σ_n A_n ∇log p is unbiased for: γ = 0, minus the gradient of the divergence D_f(q ‖ p_θ) at each prefix with the
distribution of prefixes held fixed; γ = 1, −∇J of J = E_y Σ_n f(u_n). In between it is unbiased for neither. The
correction u f′(u) belongs to the token's own advantage alone: summing w_f into the return is wrong.
"""

import torch
from torch import Tensor

from nano_opd.checks import (
    require_batch,
    require_divergence,
    require_finite_advantage,
    require_log_ratio,
    require_same_shape,
)
from nano_opd.divergences import Divergence
from nano_opd.policy_gradient import future_return, mean_over_vocabulary


def advantage(
    log_u: Tensor, mask: Tensor, divergence: Divergence, gamma: float = 0.0, baseline: Tensor | None = None
) -> Tensor:
    """Return A_n of each sampled token, (B, R), detached, 0 where mask is False.

    log_u     (B, R) teacher_logp − student_logp at the sampled tokens, nats
    mask      (B, R) bool
    gamma     discount γ ∈ [0, 1] of the rewards still to come
    baseline  (B, R) or None: any function of the prefix s_n, subtracted

    Raise ValueError for γ outside [0, 1], shapes or dtypes that do not match, log u that is NaN or +∞, or an advantage
    that is infinite, as reverse KL's is where the teacher forbids a sampled token.
    """
    require_divergence(divergence)
    require_batch(mask, log_u=log_u)
    log_u = torch.where(mask, log_u, 0.0).detach()  # drops ∇u: w_f adds u f′(u) ∇log p back
    require_log_ratio(log_u)
    reward = divergence.reward(log_u)  # f(1) = 0: nothing after the EOS
    own = divergence.w_f(log_u)  # the same reward, and its gradient through u_n
    A = own + future_return(reward, gamma)
    if baseline is not None:
        require_same_shape(log_u=log_u, baseline=baseline)
        A = A - baseline.detach()  # drops log p ∇b; and b moves no mean: E[b(s_n) ∇log p] = 0
    A = torch.where(mask, A, 0.0)
    require_finite_advantage(A, divergence)
    return A


def exact_baseline(
    student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence, mask: Tensor | None = None
) -> Tensor:
    """Return E_{v∼p}[w_f(u_v)] at each prefix, (B, R), detached.

    Subtracting it leaves the expectation alone. It need not lower the variance: that depends on f, p and q.
    Errors as policy_gradient.mean_over_vocabulary.
    """
    require_divergence(divergence)
    return mean_over_vocabulary(student_logits, teacher_logits, divergence.weighted_w_f, mask)
