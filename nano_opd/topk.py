"""The top k and a sampled tail: what one can do about the noise of a sampled token where the vocabulary is large.

A teacher of 50,000 words is read through a server that returns the log-probs of its k likeliest tokens, and of the
sampled one. Over the k the mean is taken, and only what lies outside is left to the sample:

    loss = −(1/B) Σ_b Σ_n [ Σ_{v ∈ top k} p_v A(u_v) log p_v  +  1[y_n ∉ top k] A(u_{y_n}) log p_{y_n} ]

with p_v A constant. The expected gradient is E_{v∼p}[A(u_v) ∇log p_v] for every k: that of the sampled token at k = 0,
and of the whole vocabulary at k = V. To leave the tail out, as many trainers do, is another objective (notebook 05).

With g = A ∇log p, summing over the k changes the variance by −E[|g|², y in top k] + |E g|² − |E[g, y outside]|². So it
falls if and only if E[|g|², y in top k] + |E[g, y outside]|² > |E g|². A variance larger than |E g|² is neither needed
nor enough for that.

Derived here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nano_opd.policy_gradient import a_few_at_a_time, log_probs_within, reduce
from nano_opd.system.checks import require_batch, require_no_nan, require_same_shape


def loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    advantage: Callable[[Tensor], Tensor],
    k: int,
    normalize: str = "batch",
) -> Tensor:
    """The loss above, a scalar.

    student_logits, teacher_logits  (B, R, V), the first differentiable
    tokens     (B, R) int64, the sampled y_n
    mask       (B, R) bool
    advantage  A of log u in nats, element by element
    k          how many of the teacher's likeliest tokens; all of them from V on
    normalize  as in policy_gradient.loss

    Raises ValueError for k < 0, shapes that do not match, a mask that is not bool, or a result that is NaN: a p below
    e^−103 is 0 in float32, and its u = ∞.
    """
    if k < 0:
        raise ValueError(f"k must not be negative, but it is {k}")
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    require_batch(mask, student_logits=student_logits[..., 0], teacher_logits=teacher_logits[..., 0])
    require_same_shape(tokens=tokens, mask=mask)

    def terms(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        student_logp, teacher_logp = log_probs_within(student_logits, mask), log_probs_within(teacher_logits, mask)
        p = student_logp.detach().exp()  # drops A log p ∇p: only A ∇log p, in the mean under p, is wanted
        A = advantage(teacher_logp - student_logp.detach())  # drops p log p ∇A: an advantage is a constant
        top = torch.zeros_like(p).scatter(-1, teacher_logp.topk(min(k, p.shape[-1])).indices, 1.0)
        sampled = torch.zeros_like(p).scatter(-1, tokens.unsqueeze(-1), 1.0)
        weight = torch.where(top == 1, p, sampled)  # of each token in the sum over the vocabulary
        counts = (top == 1) | (sampled == 1)
        A = torch.where(counts, A, 0.0)  # before the product: 0 · ∞ behind a `where` is NaN in the gradient
        return -(weight * A * torch.where(counts, student_logp, 0.0)).sum(-1)

    given = student_logits, teacher_logits.detach(), tokens, mask  # drops nothing: the teacher is not trained
    total = reduce(a_few_at_a_time(terms, *given), mask, normalize)
    require_no_nan("loss", total)
    return total
