"""OPSD, on-policy self-distillation: one model, two contexts.

The student sees x. The teacher is the same model and sees (x, r), r a privileged reference. On the student's own
responses the two are brought together over the whole vocabulary, the teacher's side detached:

    loss = (1/B) Σ_b Σ_n D_f( P_T(·|x, r, y_<n) ‖ P_S(·|x, y_<n) )          = gkd.loss on the two views

Source: arXiv 2601.18734. What differs from the paper: any f-divergence; the teacher's weights are frozen, synced every
N updates, or live.

Why it leaks (arXiv 2604.03128): the student cannot see r. Under forward KL its best is the mean over r, and this much
remains (another f has another best and another rest, which is zero when this is):

    I(Y_n; R | X, Y_<n)  =  E_r KL( P_T(·|s, r) ‖ E_r′ P_T(·|s, r′) )

On the student's responses r is independent of y_<n given x, so both means are over the references of x as they are
drawn. What the student learns there is the mixture: to act, some of the time, as if it had seen the reference.
"""

import math

import torch
from torch import Tensor

from nano_opd import gkd
from nano_opd.divergences import Divergence


def privileged_view(tokens: Tensor, prompt_length: int, privileged_prompts: Tensor) -> tuple[Tensor, int]:
    """The same responses behind other prompts, (B, P′+R), and P′: what the teacher scores.

    tokens              (B, P+R) the student's prompts and responses, P = prompt_length
    privileged_prompts  (B, P′)

    Response token n stands at P+n in one view and at P′+n in the other: whoever slices by response stays aligned.
    Raises ValueError unless there are as many prompts as responses.
    """
    if len(privileged_prompts) != len(tokens):
        raise ValueError(f"{len(privileged_prompts)} privileged prompts for {len(tokens)} responses")
    return torch.cat([privileged_prompts, tokens[:, prompt_length:]], dim=1), privileged_prompts.shape[1]


def loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, divergence: Divergence) -> Tensor:
    """Mean over the B responses of the summed divergence of the views, a scalar; arguments as gkd.loss.

    student_logits (B, R, V) without r, differentiable; teacher_logits (B, R, V) with r
    """
    return gkd.loss(student_logits, teacher_logits, mask, divergence)  # which detaches the teacher


def information_gap(teacher_logp: Tensor) -> Tensor:
    """I(Y_n; R | X, Y_<n) at every prefix, (B, R) in nats, between 0 and ln K: exact, by enumerating the references.

    teacher_logp  (K, B, R, V) log P_T(·|x, r_k, y_<n) for the K equally likely references of each x
    """
    mixture = teacher_logp.logsumexp(0) - math.log(len(teacher_logp))  # (B, R, V)
    p = teacher_logp.exp()
    return torch.where(p > 0, p * (teacher_logp - mixture), 0.0).sum(-1).mean(0)
