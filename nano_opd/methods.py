"""The methods: what each makes of a batch of scored responses, and the table of all of them.

train.py samples and scores. A method then says what the advantage A_n of each token is (opd.py, opdplus.py, grpo.py,
rlsd.py) and turns it into a loss (policy_gradient.py, gkd.py). What else it needs, a teacher or rewards, stands beside
its function in the table.

A new method is one function here and one entry in METHODS. The entry names the options that the function reads.
system/config.py has the types and meanings of all options, and a new option is one field there. `--help` and all checks
follow from the two tables. What a method measures goes into a column of metrics.csv: a scalar, or a Fraction, which is
a mean over tokens that several processes can add up. A new column is one line of COLUMNS in system/runs.py.

The tests ask for three more lines: a row in the glossary of nano_opd/README.md for a column, and in
tests/test_methods.py the method's options (KNOBS) and its advantage by hand (`by_hand`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nano_opd import divergences, gkd, grpo, opd, opdplus, policy_gradient, rlsd, topk
from nano_opd.arithmetic import reasoning_span
from nano_opd.divergences import Divergence

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


# ---------------------------------------------------------------------------------------------------- without a teacher


def sft_loss(s: Scored) -> Loss:
    """Return the loss of imitation: A = 1 for every token of a worked solution, which the student did not sample."""
    A = torch.ones_like(s.student_logp)
    return policy_gradient.loss(s.student_logp, A, s.mask), {}


def null_loss(s: Scored, normalize: str) -> Loss:
    """Return the loss of the control of 2608.31046: no teacher, and A = −1 for every token.

    With the divisor B the expected gradient is 0.
    """
    A = -torch.ones_like(s.student_logp)
    return policy_gradient.loss(s.student_logp, A, s.mask, normalize), {}


# ------------------------------------------------------------------------------------------------------- with a teacher


def opd_loss(
    s: Scored, divergence: str, gamma: float, variance: str, top_k: int, log_u_clip: float, normalize: str
) -> Loss:
    """Return the loss of OPD, which pays a token −f(u) and ignores that u depends on the student.

    Its twin is `opdplus_loss`. Raises ValueError for another variance.
    """
    _require_known("variance", variance, VARIANCES)
    f = divergences.get(divergence)

    if variance == "full":  # the mean over the whole vocabulary, which needs no sampled token
        return gkd.loss(s.student_logits, s.teacher_logits, s.mask, f, stop_gradient=True), {}

    f, measured = _with_clipped_log_u(s, f, log_u_clip)
    if variance == "topk":  # the mean over the teacher's top k, and the sampled token if it is none of them
        loss = topk.loss(
            student_logits=s.student_logits,
            teacher_logits=s.teacher_logits,
            tokens=s.tokens,
            mask=s.mask,
            advantage=f.reward,
            k=top_k,
            normalize=normalize,
        )
        return loss, measured

    baseline = None  # the sampled token alone
    if variance == "baseline":  # the sampled token, minus the exact mean over the vocabulary
        baseline = opd.exact_baseline(s.student_logits, s.teacher_logits, f, s.mask)
    log_u = s.teacher_logp - s.student_logp
    A = opd.advantage(log_u, s.mask, f, gamma, baseline)
    return policy_gradient.loss(s.student_logp, A, s.mask, normalize), measured


def opdplus_loss(
    s: Scored, divergence: str, gamma: float, variance: str, top_k: int, log_u_clip: float, normalize: str
) -> Loss:
    """Return the loss of OPD+, which pays a token w_f(u) = −f(u) + u f′(u): the gradient through u is in it.

    Its twin is `opd_loss`. Raises ValueError for another variance.
    """
    _require_known("variance", variance, VARIANCES)
    f = divergences.get(divergence)

    if variance == "full":  # the mean over the whole vocabulary, which needs no sampled token
        return gkd.loss(s.student_logits, s.teacher_logits, s.mask, f, stop_gradient=False), {}

    f, measured = _with_clipped_log_u(s, f, log_u_clip)
    if variance == "topk":  # the mean over the teacher's top k, and the sampled token if it is none of them
        loss = topk.loss(
            student_logits=s.student_logits,
            teacher_logits=s.teacher_logits,
            tokens=s.tokens,
            mask=s.mask,
            advantage=f.w_f,
            k=top_k,
            normalize=normalize,
        )
        return loss, measured

    baseline = None  # the sampled token alone
    if variance == "baseline":  # the sampled token, minus the exact mean over the vocabulary
        baseline = opdplus.exact_baseline(s.student_logits, s.teacher_logits, f, s.mask)
    log_u = s.teacher_logp - s.student_logp
    A = opdplus.advantage(log_u, s.mask, f, gamma, baseline)
    return policy_gradient.loss(s.student_logp, A, s.mask, normalize), measured


def gkd_loss(s: Scored, divergence: str) -> Loss:
    """Return the divergence over the whole vocabulary at each prefix.

    OPSD has the same loss, with a self-teacher (opsd.py).
    """
    f = divergences.get(divergence)
    return gkd.loss(s.student_logits, s.teacher_logits, s.mask, f), {}


# -------------------------------------------------------------------------------------------------------- with a reward


def grpo_loss(s: Scored, group_size: int, loss_type: str, clip_low: float, clip_high: float, normalize: str) -> Loss:
    """Return the loss of GRPO: one A for all tokens of a response, how much better it is than its group.

    Raises ValueError for another loss_type.
    """
    A = _group_advantage(s, group_size, loss_type)  # (B,)
    return _clipped_policy_gradient(s, A, group_size, clip_low, clip_high, normalize)


def grpo_opsd_loss(
    s: Scored, divergence: str, group_size: int, loss_type: str, clip_low: float, clip_high: float
) -> Loss:
    """Return the sum of GRPO's loss and OPSD's."""
    grpo_part, measured = grpo_loss(s, group_size, loss_type, clip_low, clip_high, normalize="batch")
    opsd_part, _ = gkd_loss(s, divergence)
    return opsd_part + grpo_part, measured


def rlsd_loss(
    s: Scored,
    group_size: int,
    loss_type: str,
    lam: float,
    lam_decay: int,
    eps_w: float,
    negative_only: bool,
    reasoning_only: bool,
    clip_low: float,
    clip_high: float,
    normalize: str,
) -> Loss:
    """Return the loss of RLSD: GRPO's A gives the direction, and the self-teacher how much of it each token gets.

    Raises ValueError for another loss_type.
    """
    A = _group_advantage(s, group_size, loss_type)  # (B,)
    lam_now = rlsd.lam_at(s.step, lam, lam_decay)
    span = None
    if reasoning_only:
        span = reasoning_span(s.tokens)
    A_of_token = rlsd.advantage(
        A, s.teacher_logp, s.student_logp, s.mask, lam=lam_now, eps_w=eps_w, negative_only=negative_only, span=span
    )  # (B, R)
    loss, measured = _clipped_policy_gradient(s, A_of_token, group_size, clip_low, clip_high, normalize)
    measured["weight_clip_fraction"] = rlsd.clip_fraction(A, s.teacher_logp, s.student_logp, s.mask, eps_w)
    return loss, measured


# ------------------------------------------------------------------------------------------------------ what they share


def _require_known(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError, listing what is known, for a value that is none of it."""
    if value not in known:
        raise ValueError(f"unknown {option} {value!r}; choose from {', '.join(known)}")


def _with_clipped_log_u(s: Scored, f: Divergence, log_u_clip: float) -> tuple[Divergence, Measured]:
    """Return f with log u clipped to ± log_u_clip nats, and the fraction of tokens that were clipped; 0 clips nothing.

    A baseline is made from the clipped f too, or it would undo the clip.
    """
    measured = {}
    if log_u_clip > 0:
        log_u = s.teacher_logp - s.student_logp
        measured["clip_fraction"] = policy_gradient.fraction(log_u.abs() > log_u_clip, s.mask)
        f = divergences.clipped(f, log_u_clip)
    return f, measured


def _group_advantage(s: Scored, group_size: int, loss_type: str) -> Tensor:
    """Return GRPO's or Dr. GRPO's A of each response, (B,)."""
    _require_known("loss_type", loss_type, LOSS_TYPES)
    return grpo.advantage(s.rewards, group_size, normalize_std=loss_type == "grpo")


def _clipped_policy_gradient(
    s: Scored, A: Tensor, group_size: int, clip_low: float, clip_high: float, normalize: str
) -> Loss:
    """Return the loss that every method with a reward ends in. A is (B,), or (B, R) with one number per token."""
    measured = {
        "reward": s.rewards.mean(),
        "zero_groups": grpo.zero_fraction(s.rewards, group_size),
        "clip_fraction": grpo.clip_fraction(s.student_logp, s.old_logp, s.mask, clip_low, clip_high),
    }
    loss = grpo.clipped_surrogate(s.student_logp, s.old_logp, A, s.mask, clip_low, clip_high, normalize)
    return loss, measured


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Method:
    """What a method computes and what it needs."""

    loss: Callable[..., Loss]  # of what was scored, and the options below
    options: tuple[str, ...] = ()  # the options that `loss` reads: the names of its arguments after the first
    teacher: str | None = None  # "larger", another model; "self", the same weights with a reference in the prompt
    rewards: bool = False  # whether a verifier judges the responses, G of them to each prompt
    samples: bool = True  # False: the responses are worked solutions
    whole_vocabulary: bool = False  # whether logits are compared; OPD and OPD+ do so unless --variance is sampled
    recipe: dict = field(default_factory=dict)  # defaults of its own, by the names of options

    @property
    def reference_slot(self) -> bool:
        """Whether prompts have a slot for a reference: GRPO's too, so that it starts where RLSD does."""
        return self.teacher == "self" or self.rewards

    def compares_distributions(self, variance: str) -> bool:
        """Return whether the loss needs the logits of the whole vocabulary, under this --variance."""
        return self.whole_vocabulary or variance != "sampled"


# With a reward, or a teacher that is the student itself, training starts where about half of the answers are right, and
# takes steps a twelfth as long: at the rate of the dense methods the student unlearns all that it knew.
CAREFUL = {"batch_size": 64, "student_steps": 210, "lr": 4e-4}

METHODS = {
    "sft": Method(sft_loss, samples=False),
    "null": Method(null_loss, options=("normalize",)),
    "gkd": Method(gkd_loss, options=("divergence",), teacher="larger", whole_vocabulary=True),
    "opd": Method(
        opd_loss,
        options=("divergence", "gamma", "variance", "top_k", "log_u_clip", "normalize"),
        teacher="larger",
    ),
    "opdplus": Method(
        opdplus_loss,
        options=("divergence", "gamma", "variance", "top_k", "log_u_clip", "normalize"),
        teacher="larger",
    ),
    "grpo": Method(
        grpo_loss,
        options=("group_size", "loss_type", "clip_low", "clip_high", "normalize"),
        rewards=True,
        recipe=CAREFUL,
    ),
    "opsd": Method(gkd_loss, options=("divergence",), teacher="self", whole_vocabulary=True, recipe=CAREFUL),
    "grpo+opsd": Method(
        grpo_opsd_loss,
        options=("divergence", "group_size", "loss_type", "clip_low", "clip_high"),
        teacher="self",
        rewards=True,
        whole_vocabulary=True,
        recipe=CAREFUL,
    ),
    "rlsd": Method(
        rlsd_loss,
        options=(
            "group_size",
            "loss_type",
            "lam",
            "lam_decay",
            "eps_w",
            "negative_only",
            "reasoning_only",
            "clip_low",
            "clip_high",
            "normalize",
        ),
        teacher="self",
        rewards=True,
        recipe=CAREFUL,
    ),
}
