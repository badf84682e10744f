"""GRPO, group-relative policy optimisation: what is A_i when all that is known is whether the answer is right?

There are G responses i to one prompt, with rewards r_i ∈ {0, 1}. Every token of response i gets

    A_i  =  (r_i − mean_group r) / (std_group r + ε)        dr_grpo:  A_i = r_i − mean_group r

Over several epochs on one batch, a clipped ratio keeps p_θ near the policy p_old that sampled it:

    ρ_n  =  p_θ(y_n|s_n) / p_old(y_n|s_n)
    loss =  −(1/B) Σ_i Σ_n min( ρ_n A_i, clip(ρ_n, 1 − clip_low, 1 + clip_high) A_i )

On the first epoch ρ = 1 and the gradient is that of policy_gradient.loss.

Sources: GRPO, arXiv 2402.03300, §4.1; Dr. GRPO, 2503.20783; separate clips as in the RLSD configuration, 2604.03128.

What differs from the papers: there is no KL term, and the divisor is the constant B. GRPO divides each response's sum
by that response's own length, which favours long wrong answers (normalize="sequence_mean" does so here). Dr. GRPO drops
that and the std; here the two differ by the std alone.
"""

import math

import torch
from torch import Tensor

from nano_opd.checks import require_batch, require_constant, require_same_shape
from nano_opd.policy_gradient import Fraction, fraction, reduce

EPSILON = 1e-6


def advantage(rewards: Tensor, group_size: int, normalize_std: bool = True) -> Tensor:
    """Return A_i of each response, (B,), detached; exactly 0 in a group whose rewards are all equal.

    rewards        (B,), the G responses to one prompt standing together
    group_size     G; the std is the population's, over these G
    normalize_std  False is Dr. GRPO

    Raise ValueError unless G ≥ 2 divides B, and the rewards are floating-point, (B,) and finite.
    """
    groups = _groups(rewards, group_size)  # (B/G, G)
    advantages = groups - groups.mean(1, keepdim=True)
    if normalize_std:
        advantages = advantages / (groups.std(1, correction=0, keepdim=True) + EPSILON)
    # G equal rewards need not have exactly their own value as mean in floating point
    advantages = torch.where(_all_equal(groups), 0.0, advantages)
    return advantages.flatten()


def zero_fraction(rewards: Tensor, group_size: int) -> Tensor:
    """Return the fraction of groups that teach nothing because their rewards are all equal, a scalar.

    Errors as `advantage`.
    """
    groups = _groups(rewards, group_size)
    return _all_equal(groups).float().mean()


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    normalize: str = "batch",
) -> Tensor:
    """Return the loss above, a scalar: minus the pessimistic surrogate of PPO, summed over tokens and divided by B.

    logp       (B, R) log p_θ(y_n|s_n) in nats, differentiable
    old_logp   (B, R) the same under the policy that sampled the batch
    advantage  (B,) A of each response, or (B, R) of each token; detached
    mask       (B, R) bool
    clip_low   a token with A < 0 has no gradient once ρ < 1 − clip_low
    clip_high  a token with A > 0 has no gradient once ρ > 1 + clip_high
    normalize  as in policy_gradient.loss

    Raise ValueError if the advantage carries a gradient, for shapes that do not match, a mask that is not bool, or a
    clip that leaves 1 out.
    """
    require_constant(advantage)
    log_ratio = _log_ratio(logp, old_logp, mask)
    _require_clip(clip_low, clip_high)
    if advantage.dim() > 1:
        require_same_shape(advantage=advantage, logp=logp)
    else:
        require_same_shape(advantage=advantage, logp=logp[:, 0])
        advantage = advantage.unsqueeze(1)  # (B, 1): one for all tokens of a response
    # With A ≥ 0 a ratio above the clip is never the smaller term. So it is bounded before exp, which could overflow:
    # behind the minimum its gradient would be 0 · ∞ = NaN. The bound is e times the clip, so that the clip still binds.
    bounded = log_ratio.clamp(max=math.log1p(clip_high) + 1)
    ratio = torch.where(advantage < 0, log_ratio, bounded).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped_ratio * advantage)
    return reduce(-surrogate, mask, normalize)


def clip_fraction(logp: Tensor, old_logp: Tensor, mask: Tensor, clip_low: float, clip_high: float) -> Fraction:
    """Return the fraction of the sampled tokens whose ratio lies outside the clip.

    Arguments and errors as `clipped_surrogate`.
    """
    ratio = _log_ratio(logp, old_logp, mask).exp()
    _require_clip(clip_low, clip_high)
    outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    return fraction(outside, among=mask)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    """Return the rewards in groups, (B/G, G), detached. Raise ValueError where they are none."""
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating-point (B,), not {rewards.dtype} {tuple(rewards.shape)}")
    if group_size < 2 or len(rewards) % group_size or not len(rewards):
        raise ValueError(f"{len(rewards)} rewards are not groups of group_size {group_size} ≥ 2")
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is not finite: the verifier is broken")
    return rewards.detach().view(-1, group_size)  # drops nothing: a verifier has no gradient


def _all_equal(groups: Tensor) -> Tensor:
    """Return whether all rewards of a group are equal, (B/G, 1)."""
    return (groups == groups[:, :1]).all(1, keepdim=True)


def _require_clip(clip_low: float, clip_high: float) -> None:
    """Raise ValueError for a clip that leaves 1 out, the ratio at which every batch starts."""
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(
            f"the clip must keep 1 inside: 0 ≤ clip_low ≤ 1 and clip_high ≥ 0, not {clip_low}, {clip_high}"
        )


def _log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Return log ρ of each token, (B, R), 0 where mask is False. Raise ValueError for shapes that do not match."""
    require_batch(mask, logp=logp, old_logp=old_logp)
    old_logp = old_logp.detach()  # drops nothing: p_old is the policy of the past
    return torch.where(mask, logp - old_logp, 0.0)
