"""Exact credit: what each token of a response is worth, and what a reward's estimators do with it, by enumeration.

A reward R(y) is given to whole responses. The value of a prefix s is what the student earns on average from there on:

    V(s)    =  E[R | s]                 Q(s, v)  =  V(s with v after it)
    A(s, v) =  Q(s, v) − V(s)           E_v A = 0, and along a response Σ_n A_n = R(y) − V(prompt)
    ∇E[R]   =  E Σ_n A_n ∇log p_θ(y_n|s_n)

Let R be 0 or 1, and let the teacher be the student conditioned on being right. Then by Bayes

    q(v|s)  =  p_θ(v|s) Q(s, v) / V(s)       and       q/p_θ = 1 + A_n/V(s_n)

so RLSD's evidence weight in a right response is one plus the token's advantage in units of the value, and in a wrong
one its inverse. The one is GRPO's credit, which a token gets even if it changes nothing. Along a response q/p_θ
multiplies to R(y)/V(prompt).

Sources: Sutton et al. 2000 for V, Q and A; that the ratio is a Bayesian update, OPPO, arXiv 2605.21851; the moments are
derived here. Rewards are tensors (S,) over world.tokens, in float64.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jacrev

from nano_opd import grpo
from nano_opd.exact.enumeration import Moments, World, at


def values(world: World, reward: Tensor) -> tuple[Tensor, Tensor]:
    """V(s_1) … V(s_R), R(y) along every response, (S, R+1), and Q(s_n, ·) over the vocabulary, (S, R, V).

    A_n of the sampled tokens is V.diff(). After the EOS V stays R(y), and Q means nothing.
    Raises ValueError unless the reward is float64, (S,).
    """
    _require_reward(world, reward)
    weight = world.probability()
    V, Q = [reward], []
    for n in reversed(range(world.tokens.shape[1])):
        ahead = torch.cat([torch.zeros_like(world.tokens[:, :1]), world.tokens[:, :n]], 1)
        _, prefix = ahead.unique(dim=0, return_inverse=True)  # (S,) which prefix s_n is
        visits = weight.new_zeros(len(ahead)).index_add(0, prefix, weight)
        earned = weight.new_zeros(len(ahead)).index_add(0, prefix, weight * reward)
        after = weight.new_zeros(len(ahead), world.teacher_logits.shape[-1])
        Q.append(after.index_put((prefix, world.tokens[:, n]), V[-1])[prefix])
        V.append((earned / visits)[prefix])
    return torch.stack(V[::-1], 1), torch.stack(Q[::-1], 1)


def gradient(world: World, reward: Tensor) -> Tensor:
    """∇E[R] at world.theta, of its shape: uphill. Raises ValueError as `values`."""
    _require_reward(world, reward)
    return grad(lambda theta: (world.probability(theta) * reward).sum())(world.theta)


def _require_reward(world: World, reward: Tensor) -> None:
    """Raises ValueError unless there is one reward, float64, for each response."""
    if reward.shape != world.tokens[:, 0].shape or reward.dtype != torch.float64:
        raise ValueError(f"the reward must be float64 ({len(world.tokens)},), not {reward.dtype} {tuple(reward.shape)}")


def conditioned(world: World, reward: Tensor) -> World:
    """The same student, with itself conditioned on R = 1 as the teacher: q(v|s) = p_θ(v|s) Q(s, v)/V(s).

    reward  in [0, 1], the probability of being right. Where V(s) = 0 there is nothing to condition on, and q = p_θ.

    Raises ValueError for another reward.
    """
    if not ((reward >= 0) & (reward <= 1)).all():
        raise ValueError("a reward to be conditioned on is a probability, from 0 to 1")
    V, Q = values(world, reward)
    V = V[:, :-1].unsqueeze(-1)  # (S, R, 1)
    alive = world.mask.unsqueeze(-1) & (V > 0)
    ratio = torch.where(alive, Q / torch.where(alive, V, 1.0), 1.0)
    return replace(world, teacher_logits=world.logps()[0] + ratio.log())


def group_moments(
    world: World,
    reward: Tensor,
    advantage: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    group_size: int,
    normalize_std: bool = True,
) -> Moments:
    """Exact mean and variance of the loss's gradient over all groups of G responses: exact.moments, without its V^RG.

    reward     0 or 1. The A of a response then depends on its group by the number k of right ones alone, and given k
               the responses are independent: k draws from the right ones and G − k from the wrong ones.
    advantage  of (A (S,), log P_T (S, R), log P_S (S, R), mask) → Â_n (S, R), as rlsd.advantage; A is GRPO's

    Raises ValueError for another reward, or one that is always or never earned.
    """
    _require_reward(world, reward)
    if not ((reward == 0) | (reward == 1)).all() or reward.min() == reward.max():
        raise ValueError("the reward must be 0 for some responses and 1 for the others")
    chosen = partial(at, world.tokens)  # (S, R)
    score = jacrev(lambda theta: chosen(world.logps(theta)[0]))(world.theta).flatten(2)  # (S, R, parameters)
    student_logp, teacher_logp = map(chosen, world.logps())
    right, G = reward == 1, group_size
    p, rate = world.probability(), world.probability()[right].sum()
    of_right, of_wrong = torch.where(right, p / rate, 0.0), torch.where(right, 0.0, p / (1 - rate))
    mean, second = 0.0, 0.0
    for k in range(G + 1):
        among = grpo.advantage(torch.tensor([1.0] * k + [0.0] * (G - k), dtype=p.dtype), G, normalize_std)
        A = advantage(torch.where(right, among[0], among[-1]), teacher_logp, student_logp, world.mask)
        g = -(torch.where(world.mask, A, 0.0).unsqueeze(-1) * score).sum(1)  # (S, parameters), of one response
        chance = math.comb(G, k) * rate**k * (1 - rate) ** (G - k)
        a, b = of_right @ g, of_wrong @ g
        squares = k * (of_right @ g.square().sum(1)) + (G - k) * (of_wrong @ g.square().sum(1))
        pairs = k * (k - 1) * a @ a + (G - k) * (G - k - 1) * b @ b + 2 * k * (G - k) * a @ b
        mean = mean + chance * (k * a + (G - k) * b) / G
        second = second + chance * (squares + pairs) / G**2
    return Moments(mean.view_as(world.theta), second - mean @ mean)
