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

from nano_opd.checks import require_batch, require_no_nan, require_same_shape
from nano_opd.policy_gradient import a_few_at_a_time, log_probs_within, reduce


def loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    advantage: Callable[[Tensor], Tensor],
    k: int,
    normalize: str = "batch",
) -> Tensor:
    """Return the loss above, a scalar.

    student_logits, teacher_logits  (B, R, V), the first differentiable
    tokens     (B, R) int64, the sampled y_n
    mask       (B, R) bool
    advantage  A of log u in nats, element by element
    k          how many of the teacher's likeliest tokens; all of them from V on
    normalize  as in policy_gradient.loss

    Logits in float16 or bfloat16 are computed with in float32. What stands in tokens behind the mask does not matter.

    Raise ValueError for k < 0, shapes that do not match, tokens outside the vocabulary, a mask that is not bool, or a
    result that is NaN.
    """
    if k < 0:
        raise ValueError(f"k must not be negative, but it is {k}")
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    require_batch(mask, student_logits=student_logits[..., 0], teacher_logits=teacher_logits[..., 0])
    require_same_shape(tokens=tokens, mask=mask)
    vocabulary = student_logits.shape[-1]
    sampled = tokens[mask]
    if ((sampled < 0) | (sampled >= vocabulary)).any():
        raise ValueError(f"a token within the mask is not in the vocabulary of {vocabulary}")

    def loss_of_each_token(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        student_logp = log_probs_within(student_logits, mask)  # (B, R, V)
        teacher_logp = log_probs_within(teacher_logits, mask)

        # the mean over the teacher's top k
        top = teacher_logp.topk(min(k, vocabulary)).indices  # (B, R, k)
        top_logp = student_logp.gather(-1, top)
        top_logq = teacher_logp.gather(-1, top)
        p_times_A = weighted(advantage, top_logp, top_logq)
        top_logp = torch.where(p_times_A == 0, 0.0, top_logp)  # 0 · ∞ would be NaN
        of_top = (p_times_A * top_logp).sum(-1)  # (B, R)

        # and the sampled token, unless it is one of them
        tokens = tokens.unsqueeze(-1)
        outside = mask & (top != tokens).all(-1)
        sampled_logp = torch.where(outside, student_logp.gather(-1, tokens).squeeze(-1), 0.0)
        sampled_logq = torch.where(outside, teacher_logp.gather(-1, tokens).squeeze(-1), 0.0)
        A = advantage(sampled_logq - sampled_logp.detach())  # drops log p ∇A: an advantage is a constant
        of_sampled = torch.where(outside, A * sampled_logp, 0.0)
        return -(of_top + of_sampled)

    teacher_logits = teacher_logits.detach()  # drops nothing: the teacher is not trained
    tokens = torch.where(mask, tokens, 0)  # some trainers have −100 behind the mask
    terms = a_few_at_a_time(loss_of_each_token, student_logits, teacher_logits, tokens, mask)
    total = reduce(terms, mask, normalize)
    require_no_nan("loss", total)
    return total


def weighted(advantage: Callable[[Tensor], Tensor], log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p A(u) of each token, detached: computed in float64, in which u overflows from log u = 710 on only."""
    dtype = log_p.dtype
    if log_p.device.type != "mps":  # which has no float64
        log_p = log_p.double()
        log_q = log_q.double()
    log_p = log_p.detach()  # drops A log p ∇p and p log p ∇A: only p A ∇log p is wanted
    p_times_A = log_p.exp() * advantage(log_q - log_p)
    return p_times_A.to(dtype)
