"""The one line that every sampled method ends in: the score-function (REINFORCE) estimator.

    loss = −(1/B) Σ_b Σ_n A_n log p_θ(y_n | s_n)        ∇loss = −(1/B) Σ_b Σ_n A_n ∇log p_θ(y_n | s_n)

Sources: Williams 1992; Sutton et al. 2000. The methods differ only in what the advantage A_n of token n is.

The convention on detach: A_n is a constant here, so every method detaches it, and every detach has a comment that names
the term of the gradient that it discards. For most that term is zero. For OPD it is the bias; OPD+ adds it back in
closed form. An advantage that still carries a gradient would count it twice, and is refused.

The divisor is the number of responses B. The number of sampled tokens, or each response's own length, would depend on
when the sampled EOS came. Then E[c ∇log p] = 0 no longer holds for a constant c, and the estimator is biased.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from nano_opd.checks import require_batch, require_constant, require_floating, require_no_nan, require_same_shape


def loss(logp: Tensor, advantage: Tensor, mask: Tensor, normalize: str = "batch") -> Tensor:
    """Return −Σ A·log p over the sampled tokens, divided by B, a scalar.

    logp       (B, R) log p_θ(y_n|s_n) in nats, differentiable
    advantage  (B, R), or (B, 1) for one number per response; detached
    mask       (B, R) bool, True up to and including the first EOS
    normalize  "batch" is unbiased; "token_mean" and "sequence_mean" are there to be compared, and are biased

    Raise ValueError if the advantage carries a gradient, for shapes that do not match, a mask that is not bool, or an
    unknown `normalize`.
    """
    require_constant(advantage)
    require_batch(mask, logp=logp)
    if advantage.shape != (len(logp), 1):
        require_same_shape(logp=logp, advantage=advantage)
    advantage = torch.where(mask, advantage, 0.0)  # 0 behind the mask, where NaN would still be in the gradient
    return reduce(-advantage * logp, mask, normalize)


def logprobs_of(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return the log-probs (…), in nats, of `tokens` (…) int64 under the logits (…, V) that predict them."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def logprobs_from(x: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """Return logprobs_of(tokens, x Wᵀ) in float32, without ever holding all N·V logits.

    x       (N, C) what the last layer reads
    weight  (V, C) W of the last layer
    tokens  (N,) int64
    """

    def logprobs(x: Tensor, tokens: Tensor) -> Tensor:
        logits = linear(x, weight).float()
        return logprobs_of(tokens, logits)

    rows = rows_at_once(positions=1, vocabulary=len(weight))
    return _in_parts(logprobs, rows, x, tokens)


def reduce(terms: Tensor, mask: Tensor, normalize: str = "batch") -> Tensor:
    """Return one number from one term per token, (B, R): their sum over B, or a biased mean. Errors as `loss`."""
    require_batch(mask, terms=terms)
    terms = torch.where(mask, terms, 0.0)  # where, not ×: 0 · ∞ after the EOS would be NaN
    if normalize == "batch":
        return terms.sum() / len(terms)
    if normalize == "token_mean":
        return terms.sum() / mask.sum().clamp(min=1)
    if normalize == "sequence_mean":
        return (terms.sum(1) / mask.sum(1).clamp(min=1)).mean()
    raise ValueError(f"unknown normalize {normalize!r}; choose from batch, token_mean, sequence_mean")


def future_return(reward: Tensor, gamma: float) -> Tensor:
    """Return γ G_{n+1} = Σ_{m>n} γ^{m−n} r_m, (B, R): what is still to come.

    It is discounted from the token itself and not from the start of the response.

    reward  (B, R), 0 where there is no token
    gamma   discount γ ∈ [0, 1]

    Raise ValueError for γ outside [0, 1], or rewards that are integers.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], not {gamma}")
    if not reward.is_floating_point():
        raise ValueError(f"reward must be floating-point, not {reward.dtype}: γ would be rounded away")
    future = torch.zeros_like(reward)
    if gamma > 0:
        last = reward.shape[1] - 1
        for n in reversed(range(last)):
            future[:, n] = gamma * (reward[:, n + 1] + future[:, n + 1])
    return future


def mean_over_vocabulary(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weighted_advantage: Callable[[Tensor, Tensor], Tensor],
    mask: Tensor | None = None,
) -> Tensor:
    """Return E_{v∼p}[A(u_v)] at each prefix, (B, R), in closed form: the exact baseline of an advantage A.

    student_logits, teacher_logits  (B, R, V)
    weighted_advantage              p A(u) of every token as a function of log p and log q, as divergence.weighted_w_f
    mask                            (B, R) bool, or None: every prefix counts; behind it the mean is A(u = 1)

    Raise ValueError when their shapes differ, they are integers, or the sum is NaN.
    """
    require_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    require_floating(student_logits=student_logits, teacher_logits=teacher_logits)
    if mask is None:
        mask = torch.ones_like(student_logits[..., 0], dtype=torch.bool)
    require_batch(mask, student_logits=student_logits[..., 0])

    def mean_of(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
        student_logp = log_probs_within(student_logits, mask)
        teacher_logp = log_probs_within(teacher_logits, mask)
        return weighted_advantage(student_logp, teacher_logp).sum(-1)

    student_logits = student_logits.detach()  # drops nothing: a baseline is a constant
    teacher_logits = teacher_logits.detach()  # drops nothing, likewise
    mean = a_few_at_a_time(mean_of, student_logits, teacher_logits, mask)
    require_no_nan("baseline", mean)
    return mean


def log_probs_within(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the log-probs of logits, both (B, R, V), in float32 or float64.

    Behind the mask they are uniform: NaN there reaches no value or gradient.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()  # a sum over the vocabulary of two or three digits would be noise
    return logits.masked_fill(~mask.unsqueeze(-1), 0.0).log_softmax(-1)


LOGITS_AT_ONCE = 2**24  # numbers: 64 MiB of float32


def rows_at_once(positions: int, vocabulary: int) -> int:
    """Return how many rows of positions × vocabulary logits to compute with at once, since every step copies them."""
    logits_of_a_row = positions * vocabulary
    return max(1, LOGITS_AT_ONCE // max(1, logits_of_a_row))


def a_few_at_a_time(sum_over_vocabulary: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """Return sum_over_vocabulary(logits, *others), (B, R); where R·V is large, computed a few responses at a time.

    logits (B, R, V), others (B, …)
    """
    _, positions, vocabulary = logits.shape
    return _in_parts(sum_over_vocabulary, rows_at_once(positions, vocabulary), logits, *others)


def _in_parts(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """Return function(*tensors), computed for so many rows of the tensors at a time.

    The backward pass computes each part once more, so that no more than one part's logits are in memory.
    """
    if rows >= len(tensors[0]):
        return function(*tensors)
    split = [tensor.split(rows) for tensor in tensors]
    results = []
    for part in zip(*split):
        results.append(checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(results)


class Fraction(NamedTuple):
    """A fraction as its two counts, so that several processes can add them up: a mean of means would be wrong."""

    part: Tensor  # scalar: how many
    whole: Tensor  # scalar: of how many

    def item(self) -> float:
        """Return the fraction; 0 of nothing is 0."""
        return (self.part / self.whole.clamp(min=1)).item()


def fraction(chosen: Tensor, among: Tensor) -> Fraction:
    """Return how many of the tokens `among` are `chosen`; both (B, R) bool."""
    return Fraction(part=(chosen & among).sum(), whole=among.sum())
