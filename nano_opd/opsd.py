"""OPSD, on-policy self-distillation: one model, two contexts.

The student sees x. The teacher is the same model and sees (x, r), where r is a privileged reference. On the student's
own responses the student is brought nearer to the teacher over the whole vocabulary:

    loss = (1/B) Σ_b Σ_n D_f( P_T(·|x, r, y_<n) ‖ P_S(·|x, y_<n) )          = gkd.loss on the two views

Source: arXiv 2601.18734. What differs from the paper: any f-divergence; the teacher's weights are frozen, synced every
N updates, or live.

What cannot be matched (arXiv 2604.03128, §3.2, Theorem 1): the student does not see r. Under forward KL its best is the
mean over r, and this much of the loss remains (another divergence has another optimum and another remainder, which is
zero in the same cases):

    I(Y_n; R | X, Y_<n)  =  E_r KL( P_T(·|s, r) ‖ E_r′ P_T(·|s, r′) )

On the student's responses r is independent of y_<n given x, so both means are over the references of x as they are
drawn. A student at that optimum acts, some of the time, as if it had seen the reference.

The paper calls the mean gradient benign and blames how each sample's differs from it; that difference is zero where the
remainder is. So it cannot be all. If r is always the bare answer, x determines it and both are zero. But the teacher
copies an answer that the student cannot work out in one step, and here OPSD teaches it to write the mark and guess
(notebook 03).
"""

import math

import torch
from torch import Tensor

from nano_opd.checks import require_log_probs


def privileged_view(tokens: Tensor, prompt_length: int, teacher_prompts: Tensor) -> tuple[Tensor, int]:
    """Return the same responses after the teacher's prompts, (B, P′+R), and P′: what the teacher scores.

    tokens           (B, P+R) the student's prompts and responses, P = prompt_length
    teacher_prompts  (B, P′), with the reference

    Response token n stands at P+n in one view and at P′+n in the other: whoever slices by response stays aligned.
    Raise ValueError unless there are as many prompts as responses, and P lies in 1 … P+R−1.
    """
    if len(teacher_prompts) != len(tokens):
        raise ValueError(f"{len(teacher_prompts)} privileged prompts for {len(tokens)} responses")
    if not 1 <= prompt_length < tokens.shape[1]:
        raise ValueError(f"prompt_length must lie in 1 … {tokens.shape[1] - 1}, not {prompt_length}")
    responses = tokens[:, prompt_length:]
    privileged_tokens = torch.cat([teacher_prompts, responses], dim=1)
    return privileged_tokens, teacher_prompts.shape[1]


def information_gap(teacher_logp: Tensor) -> Tensor:
    """Return I(Y_n; R | X, Y_<n) at every prefix, (B, R) in nats, between 0 and ln K.

    It is exact, by enumerating the references. In the formula R is the reference; in a shape, the length of responses.

    teacher_logp  (K, B, R, V) log P_T(·|x, r_k, y_<n) for the K equally likely references of each x

    Raise ValueError for logits or anything else whose probabilities do not sum to 1.
    """
    if teacher_logp.ndim != 4:
        raise ValueError(
            f"teacher_logp must be (K, B, R, V), one of K references first, not {tuple(teacher_logp.shape)}"
        )
    require_log_probs(teacher_logp=teacher_logp)
    mixture_logp = teacher_logp.logsumexp(0) - math.log(len(teacher_logp))  # (B, R, V), the mean over the references
    p = teacher_logp.exp()
    terms = torch.where(p > 0, p * (teacher_logp - mixture_logp), 0.0)  # 0 · ∞ would be NaN
    kl_to_mixture = terms.sum(-1)  # (K, B, R)
    return kl_to_mixture.mean(0)
