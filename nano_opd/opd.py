"""OPD, on-policy distillation with a stop-gradient: what is A_n?

The student p_θ samples y, and the teacher q scores each sampled token: u_n = q(y_n|s_n) / p_θ(y_n|s_n). OPD takes
−f(u_n) for a reward, as if u_n did not depend on θ:

    A_n  =  −f(u_n)  +  Σ_{m>n} γ^{m−n} (−f(u_m))          gradient estimate  Σ_n A_n ∇log p_θ(y_n|s_n)

Sources: student samples, GKD, arXiv 2306.13649; the reward, Lu & Thinking Machines Lab, "On-Policy Distillation",
2025; the stop-gradient for general f, arXiv 2606.01039, §2.

What this drops: −∇E_p[f(u)] is the mean of −f(u) ∇log p plus the mean of u f′(u) ∇log p. For reverse KL, f = −ln u,
u f′ = −1 and the second mean is E[−∇log p] = 0. For other f it is a bias.

What it descends: at γ = 0, on average, exactly the D_h of another generator h,

    −f  =  w_h     where     h(u)  =  u ∫ −f(u)/u² du,     h″(u)  =  −f′(u)/u

D_h is a divergence, with its minimum at the teacher, if and only if f never rises: −ln u and jsd_falling. Every other
entry of divergences.py rises for u > 1, and there h bends down. Where f′(∞) > 0, as for all of these, D_h has no lower
bound: a token that the teacher likes brings p h(u) = q h(u)/u → −∞ as p → 0. This is the collapse.

That each f-divergence has its advantage is due to Go et al., arXiv 2302.08215; that each rising advantage has its
divergence, to Fawkes & Hartford, arXiv 2605.15417. What it says of the stop-gradient is derived here (exact/law.py).
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
    log_u = torch.where(mask, log_u, 0.0).detach()  # drops ∇u: the term u f′(u) ∇log p is lost
    require_log_ratio(log_u)
    reward = divergence.reward(log_u)  # f(1) = 0: nothing after the EOS
    own = reward  # u_n taken for a constant
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
    """Return E_{v∼p}[−f(u_v)] = −D_f(q‖p) at each prefix, (B, R), detached.

    Subtracting it leaves the expectation alone. It need not lower the variance: that depends on f, p and q.
    Errors as policy_gradient.mean_over_vocabulary.
    """
    require_divergence(divergence)
    return -mean_over_vocabulary(student_logits, teacher_logits, divergence.weighted_f, mask)
