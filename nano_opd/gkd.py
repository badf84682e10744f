"""GKD: the divergence over the whole vocabulary at every sampled prefix; what remains to be sampled is the prefix.

    loss = (1/B) Σ_b Σ_n Σ_v p_θ(v|s_n) f( q(v|s_n) / p_θ(v|s_n) )  =  (1/B) Σ_b Σ_n D_f(q ‖ p_θ)(s_n)

Source: GKD, arXiv 2306.13649, §3. What differs from the paper: any f-divergence, student samples only, and the
constant divisor B in the place of each response's own length.

Its gradient Σ_v ∇p_v (f − u f′)(u_v) is the mean of OPD+'s at γ = 0 over the action y_n, so it carries no action
variance. With `stop_gradient` it is the mean of OPD's instead: that estimator's bias, without its noise.

Where a token is far likelier to the teacher than to the student, u overflows while p f(u) is small. There the sum takes
the same number from the teacher's side (Divergence.weighted_f).
"""

from torch import Tensor

from nano_opd.checks import require_batch, require_divergence, require_no_nan, require_same_shape
from nano_opd.divergences import Divergence
from nano_opd.policy_gradient import a_few_at_a_time, log_probs_within


def loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, divergence: Divergence, stop_gradient: bool = False
) -> Tensor:
    """Return the mean over the B responses of the summed per-prefix divergence, a scalar.

    student_logits  (B, R, V), differentiable
    teacher_logits  (B, R, V)
    mask            (B, R) bool
    stop_gradient   treat f(u) as a constant, as OPD does

    Logits in float16 or bfloat16 are computed with in float32.

    Raise ValueError when the shapes do not agree, the mask is not bool, or the result is NaN.
    """
    require_divergence(divergence)
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    require_batch(mask, student_logits=student_logits[..., 0], teacher_logits=teacher_logits[..., 0])

    def divergence_at_each_prefix(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
        student_logp = log_probs_within(student_logits, mask)
        teacher_logp = log_probs_within(teacher_logits, mask)  # the same behind the mask, where f(1) = 0
        p_times_f = divergence.weighted_f(student_logp, teacher_logp)  # (B, R, V)
        if stop_gradient:
            # f is a constant here, and p is not: the value is p f, and its gradient f ∇p = p f ∇log p.
            constant_p_times_f = p_times_f.detach()  # drops p ∇f(u) = −u f′(u) ∇p: all that OPD and OPD+ differ in
            finite = student_logp.clamp(min=-1e30)  # −∞ − (−∞) is NaN
            p_over_constant_p = (finite - finite.detach()).exp()  # drops nothing: it is 1, and its gradient is ∇log p
            p_times_f = constant_p_times_f * p_over_constant_p
        return p_times_f.sum(-1)  # (B, R)

    teacher_logits = teacher_logits.detach()  # drops nothing: the teacher is not trained
    divergences = a_few_at_a_time(divergence_at_each_prefix, student_logits, teacher_logits, mask)
    mean = divergences.sum() / len(mask)
    require_no_nan("divergence", mean)
    return mean
