"""The one line that every sampled method ends in: the score-function (REINFORCE) estimator.

    loss = −(1/B) Σ_b Σ_n A_n log p_θ(y_n | s_n)        ∇loss = −(1/B) Σ_b Σ_n A_n ∇log p_θ(y_n | s_n)

The methods differ only in what A_n is. It is a constant here: the gradient that A_n would carry is precisely what OPD+
accounts for in closed form, so an advantage that still carries one is refused rather than silently counted twice.

The divisor is the number of responses B. Dividing by the number of sampled tokens, or each response by its own length,
makes the divisor depend on the sampled EOS: then E[c ∇log p] = 0 no longer holds and the estimator is biased.
"""

import torch
from torch import Tensor

from nano_opd.checks import require_batch, require_same_shape


def loss(logp: Tensor, advantage: Tensor, mask: Tensor, normalize: str = "batch") -> Tensor:
    """−Σ A·log p over the sampled tokens, divided by B. Williams 1992; Sutton et al. 2000.

    logp       (B, R) log p_θ(y_n|s_n) in nats, differentiable
    advantage  (B, R), or (B, 1) for one number per response; detached
    mask       (B, R) bool, True up to and including the first EOS
    normalize  "batch" is unbiased. "token_mean" and "sequence_mean" are here to be compared, and are biased.

    Raises ValueError if the advantage carries a gradient, for shapes that do not match, a mask that is not bool, or an
    unknown `normalize`.
    """
    if advantage.requires_grad:
        raise ValueError("the advantage carries a gradient: a method must return it detached")
    require_batch(mask, logp=logp)
    if advantage.shape != (len(logp), 1):
        require_same_shape(logp=logp, advantage=advantage)
    return reduce(-advantage * logp, mask, normalize)


def reduce(terms: Tensor, mask: Tensor, normalize: str = "batch") -> Tensor:
    """One number from one term per token, (B, R): their sum over B, or a biased mean. ValueError as in `loss`."""
    terms = torch.where(mask, terms, 0.0)  # where, not ×: 0 · ∞ behind the EOS would be NaN
    if normalize == "batch":
        return terms.sum() / len(terms)
    if normalize == "token_mean":
        return terms.sum() / mask.sum().clamp(min=1)
    if normalize == "sequence_mean":
        return (terms.sum(1) / mask.sum(1).clamp(min=1)).mean()
    raise ValueError(f"unknown normalize {normalize!r}; choose from batch, token_mean, sequence_mean")


def future_return(reward: Tensor, gamma: float) -> Tensor:
    """γ G_{n+1} = Σ_{m>n} γ^{m−n} r_m: what is still to come, discounted from the token itself (not from the start).

    reward (B, R), 0 where there is no token. Returns (B, R). Raises ValueError unless 0 ≤ γ ≤ 1.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], not {gamma}")
    future = torch.zeros_like(reward)
    if gamma > 0:
        for n in reversed(range(reward.shape[1] - 1)):
            future[:, n] = gamma * (reward[:, n + 1] + future[:, n + 1])
    return future
