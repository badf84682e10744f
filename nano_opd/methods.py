"""The methods: what each makes of a batch of scored responses, and the table of all of them.

train.py samples and scores. A method then says what the advantage A_n of each token is (opd.py, opdplus.py, grpo.py,
rlsd.py) and turns it into a loss (policy_gradient.py, gkd.py). What else it needs, a teacher or rewards, stands beside
its function in the table.

A new method is one function here and one entry in METHODS. The options that it reads are the arguments of the function
after the first; system/config.py has their types and meanings. `--help` and all checks follow from the table.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from nano_opd import divergences, gkd, grpo, opd, opdplus, policy_gradient, rlsd, topk
from nano_opd.arithmetic import reasoning_span

VARIANCES = ("sampled", "baseline", "topk", "full")
LOSS_TYPES = ("grpo", "dr_grpo")
Measured = dict[str, Tensor | policy_gradient.Fraction]
Loss = tuple[Tensor, Measured]  # the scalar to differentiate, and what was measured on the way


@dataclass(frozen=True)
class Scored:
    """B responses of up to R tokens, scored; log-probs in nats. What a method does not need is None."""

    tokens: Tensor  # (B, R) int64, the responses
    mask: Tensor  # (B, R) bool, True up to and including the EOS
    student_logp: Tensor  # (B, R) log p_θ(y_n|s_n), differentiable
    old_logp: Tensor  # (B, R) the same before the first update on this batch: p_old, which sampled it; a constant
    teacher_logp: Tensor | None = None  # (B, R) log q(y_n|s_n); a self-teacher's prefix holds a reference besides
    student_logits: Tensor | None = None  # (B, R, V), differentiable, where whole distributions are compared
    teacher_logits: Tensor | None = None  # (B, R, V), likewise
    rewards: Tensor | None = None  # (B,) of the verifier; the responses to one prompt stand together
    step: int = 0  # number of the update, for schedules


def sft_loss(s: Scored) -> Loss:
    """Imitation of worked solutions: A = 1 for every token of a response that the student did not sample itself."""
    return policy_gradient.loss(s.student_logp, torch.ones_like(s.student_logp), s.mask), {}


def null_loss(s: Scored, normalize) -> Loss:
    """The control of 2608.31046: no teacher, equal blame for every token. Divided by B, the mean gradient is 0."""
    return policy_gradient.loss(s.student_logp, -torch.ones_like(s.student_logp), s.mask, normalize), {}


def gkd_loss(s: Scored, divergence) -> Loss:
    """The divergence over the whole vocabulary at each prefix. OPSD is the same with a self-teacher (opsd.py)."""
    return gkd.loss(s.student_logits, s.teacher_logits, s.mask, divergences.get(divergence)), {}


def distillation_loss(
    estimator: ModuleType, s: Scored, divergence, gamma, variance, top_k, log_u_clip, normalize
) -> Loss:
    """OPD or OPD+, which differ only in the estimator, the file that says what A_n is: opd.py or opdplus.py."""
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; choose from {', '.join(VARIANCES)}")
    f, measured = divergences.get(divergence), {}
    if variance == "full":  # the mean of the estimator over the sampled token, in closed form
        return gkd.loss(s.student_logits, s.teacher_logits, s.mask, f, stop_gradient=estimator is opd), {}
    log_u = s.teacher_logp - s.student_logp
    if log_u_clip > 0:
        measured["clip_fraction"] = policy_gradient.fraction(log_u.abs() > log_u_clip, s.mask)
        f = divergences.clipped(f, log_u_clip)  # for the baseline too, or it would undo the clip
    if variance == "topk":
        A = f.w_f if estimator is opdplus else f.reward
        logits = s.student_logits, s.teacher_logits
        return topk.loss(*logits, s.tokens, s.mask, A, top_k, normalize), measured
    baseline = None
    if variance == "baseline":
        baseline = estimator.exact_baseline(s.student_logits, s.teacher_logits, f, s.mask)
    A = estimator.advantage(log_u, s.mask, f, gamma, baseline)
    return policy_gradient.loss(s.student_logp, A, s.mask, normalize), measured


def grpo_loss(s: Scored, group_size, loss_type, clip_low, clip_high, normalize) -> Loss:
    """One advantage for all tokens of a response: how much better its answer is than the group's."""
    A = _group_advantage(s, group_size, loss_type)  # (B,)
    return _surrogate(s, A, group_size, clip_low, clip_high, normalize)


def grpo_opsd_loss(s: Scored, divergence, group_size, loss_type, clip_low, clip_high) -> Loss:
    """The sum of GRPO's loss and OPSD's."""
    loss, measured = grpo_loss(s, group_size, loss_type, clip_low, clip_high, "batch")
    return gkd_loss(s, divergence)[0] + loss, measured


def rlsd_loss(
    s, group_size, loss_type, lam, lam_decay, eps_w, negative_only, reasoning_only, clip_low, clip_high, normalize
) -> Loss:
    """GRPO's advantage, and so its direction; the self-teacher decides how much of it each token gets."""
    A = _group_advantage(s, group_size, loss_type)  # (B,)
    evidence = A, s.teacher_logp, s.student_logp, s.mask
    lam, span = rlsd.lam_at(s.step, lam, lam_decay), reasoning_span(s.tokens) if reasoning_only else None
    A = rlsd.advantage(*evidence, lam, eps_w, negative_only, span)  # (B, R)
    loss, measured = _surrogate(s, A, group_size, clip_low, clip_high, normalize)
    return loss, measured | {"weight_clip_fraction": rlsd.clip_fraction(*evidence, eps_w)}


def _group_advantage(s: Scored, group_size: int, loss_type: str) -> Tensor:
    """GRPO's or Dr. GRPO's A of each response, (B,). Raises ValueError for another loss_type."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}; choose from {', '.join(LOSS_TYPES)}")
    return grpo.advantage(s.rewards, group_size, normalize_std=loss_type == "grpo")


def _surrogate(s: Scored, A: Tensor, group_size, clip_low, clip_high, normalize) -> Loss:
    """The clipped policy gradient that every method with a reward ends in."""
    ratio = s.student_logp, s.old_logp
    measured = {
        "reward": s.rewards.mean(),
        "zero_groups": grpo.zero_fraction(s.rewards, group_size),
        "clip_fraction": grpo.clip_fraction(*ratio, s.mask, clip_low, clip_high),
    }
    return grpo.clipped_surrogate(*ratio, A, s.mask, clip_low, clip_high, normalize), measured


@dataclass(frozen=True)
class Method:
    """What a method computes and what it needs."""

    loss: Callable[..., Loss]  # of what was scored, and the options that it reads
    teacher: str | None = None  # "larger", another model; "self", the same weights with a reference in the prompt
    rewards: bool = False  # whether a verifier judges the responses, G of them to each prompt
    samples: bool = True  # False: the responses are worked solutions
    whole_vocabulary: bool = False  # whether logits are compared; OPD and OPD+ do so unless --variance is sampled
    recipe: dict = field(default_factory=dict)  # defaults of its own, by the names of options

    @property
    def reference_slot(self) -> bool:
        """Whether prompts have a slot for a reference: GRPO's too, so that it starts where RLSD does."""
        return self.teacher == "self" or self.rewards

    @property
    def options(self) -> list[str]:
        """The options that `loss` reads: its arguments after the first."""
        return list(inspect.signature(self.loss).parameters)[1:]


# With a reward, or a teacher that is the student itself, training starts where about half of the answers are right, and
# takes steps a twelfth as long: at the rate of the dense methods the student unlearns all that it knew.
CAREFUL = {"batch_size": 64, "student_steps": 210, "lr": 4e-4}
METHODS = {
    "sft": Method(sft_loss, samples=False),
    "null": Method(null_loss),
    "gkd": Method(gkd_loss, teacher="larger", whole_vocabulary=True),
    "opd": Method(partial(distillation_loss, opd), teacher="larger"),
    "opdplus": Method(partial(distillation_loss, opdplus), teacher="larger"),
    "grpo": Method(grpo_loss, rewards=True, recipe=CAREFUL),
    "opsd": Method(gkd_loss, teacher="self", whole_vocabulary=True, recipe=CAREFUL),
    "grpo+opsd": Method(grpo_opsd_loss, teacher="self", rewards=True, whole_vocabulary=True, recipe=CAREFUL),
    "rlsd": Method(rlsd_loss, teacher="self", rewards=True, recipe=CAREFUL),
}
