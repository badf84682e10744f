"""GKD: the divergence over the whole vocabulary at every sampled prefix; what remains to be sampled is the prefix.

    loss = (1/B) Σ_b Σ_n Σ_v p_θ(v|s_n) f( q(v|s_n) / p_θ(v|s_n) )  =  (1/B) Σ_b Σ_n D_f(q ‖ p_θ)(s_n)

Source: GKD, arXiv 2306.13649, §3. What differs from the paper: any f-divergence, student samples only, and the
constant divisor B in the place of each response's own length.

Its gradient Σ_v ∇p_v (f − u f′)(u_v) is the mean of OPD+'s at γ = 0 over the action y_n, so it carries no action
variance. With `stop_gradient` it is the mean of OPD's instead: that estimator's bias, without its noise.

In float32 f(u) overflows from about log u = 84 on (forward KL; most others 88), though p f(u) is finite there: the loss
is then inf.
"""

from torch import Tensor

from nano_opd.divergences import Divergence
from nano_opd.policy_gradient import a_few_at_a_time, log_probs_within
from nano_opd.system.checks import require_batch, require_no_nan, require_same_shape


def loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, divergence: Divergence, stop_gradient: bool = False
) -> Tensor:
    """Mean over the B responses of the summed per-prefix divergence, a scalar.

    student_logits  (B, R, V), differentiable
    teacher_logits  (B, R, V)
    mask            (B, R) bool
    stop_gradient   treat f(u) as a constant, as OPD does

    Raises ValueError when the shapes do not agree, the mask is not bool, or the result is NaN.
    """
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    require_batch(mask, student_logits=student_logits[..., 0], teacher_logits=teacher_logits[..., 0])

    def divergences(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
        student_logp = log_probs_within(student_logits, mask)
        teacher_logp = log_probs_within(teacher_logits, mask)  # the same behind the mask, where f(1) = 0
        f = divergence.f(teacher_logp - student_logp)  # (B, R, V)
        if stop_gradient:
            f = f.detach()  # drops p ∇f(u) = −u f′(u) ∇p: the whole difference between OPD and OPD+
        return (student_logp.exp() * f).sum(-1)

    given = student_logits, teacher_logits.detach(), mask  # drops nothing: the teacher is not trained
    total = a_few_at_a_time(divergences, *given).sum() / len(mask)
    require_no_nan("divergence", total)
    return total
