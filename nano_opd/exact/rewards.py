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

import torch
from torch import Tensor
from torch.func import grad, jacrev

from nano_opd import grpo
from nano_opd.exact.enumeration import Moments, World, at


def values(world: World, reward: Tensor) -> tuple[Tensor, Tensor]:
    """Return V(s_1) … V(s_R), R(y) along every response, (S, R+1), and Q(s_n, ·) over the vocabulary, (S, R, V).

    A_n of the sampled tokens is V.diff(). After the EOS V stays R(y), and Q means nothing.
    Raises ValueError unless the reward is float64, (S,).
    """
    _require_reward(world, reward)
    probability = world.probability()
    responses, horizon = world.tokens.shape
    vocab_size = world.teacher_logits.shape[-1]
    V = [reward]  # from the end of the responses to their start
    Q = []
    for n in reversed(range(horizon)):
        prefix = _number_of_prefix(world.tokens, n)
        visits = probability.new_zeros(responses).index_add(0, prefix, probability)  # P(s) of each prefix
        earned = probability.new_zeros(responses).index_add(0, prefix, probability * reward)
        table = probability.new_zeros(responses, vocab_size)  # Q(s, v) of prefix s and token v
        table = table.index_put((prefix, world.tokens[:, n]), V[-1])
        Q.append(table[prefix])
        V.append((earned / visits)[prefix])
    return torch.stack(V[::-1], 1), torch.stack(Q[::-1], 1)


def _number_of_prefix(tokens: Tensor, n: int) -> Tensor:
    """Return a number, (S,), that is equal for two responses exactly if their first n tokens are equal."""
    the_same = torch.zeros_like(tokens[:, :1])  # so that a prefix of no token has a column too
    _, number = torch.cat([the_same, tokens[:, :n]], 1).unique(dim=0, return_inverse=True)
    return number


def gradient(world: World, reward: Tensor) -> Tensor:
    """Return ∇E[R] at world.theta, of its shape: uphill. Raises ValueError as `values`."""
    _require_reward(world, reward)

    def expected_reward(theta: Tensor) -> Tensor:
        return (world.probability(theta) * reward).sum()

    return grad(expected_reward)(world.theta)


def _require_reward(world: World, reward: Tensor) -> None:
    """Raise ValueError unless there is one reward, float64, for each response."""
    if reward.shape != world.tokens[:, 0].shape or reward.dtype != torch.float64:
        raise ValueError(f"the reward must be float64 ({len(world.tokens)},), not {reward.dtype} {tuple(reward.shape)}")


def conditioned(world: World, reward: Tensor) -> World:
    """Return the same student, with itself conditioned on R = 1 as the teacher: q(v|s) = p_θ(v|s) Q(s, v)/V(s).

    reward  in [0, 1], the probability of being right. Where V(s) = 0 there is nothing to condition on, and q = p_θ.

    Raises ValueError for another reward.
    """
    if not ((reward >= 0) & (reward <= 1)).all():
        raise ValueError("a reward to be conditioned on is a probability, from 0 to 1")
    along_responses, Q = values(world, reward)
    V = along_responses[:, :-1].unsqueeze(-1)  # (S, R, 1), of the prefix before each token
    alive = world.mask.unsqueeze(-1) & (V > 0)
    ratio = torch.where(alive, Q / torch.where(alive, V, 1.0), 1.0)  # q/p_θ
    student_logp, _ = world.logps()
    return replace(world, teacher_logits=student_logp + ratio.log())


def group_moments(
    world: World,
    reward: Tensor,
    advantage: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    group_size: int,
    normalize_std: bool = True,
) -> Moments:
    """Return the exact mean and variance of the loss's gradient over all groups of G responses.

    They are those of exact.moments, without its V^RG groups.

    reward     0 or 1. The A of a response then depends on its group by the number k of right ones alone, and given k
               the responses are independent: k draws from the right ones and G − k from the wrong ones.
    advantage  of (A (S,), log P_T (S, R), log P_S (S, R), mask) → Â_n (S, R), as rlsd.advantage; A is GRPO's

    Raises ValueError for another reward, or one that is always or never earned.
    """
    _require_reward(world, reward)
    if not ((reward == 0) | (reward == 1)).all() or reward.min() == reward.max():
        raise ValueError("the reward must be 0 for some responses and 1 for the others")

    def logp_of_tokens(theta: Tensor) -> Tensor:
        student_logp, _ = world.logps(theta)
        return at(world.tokens, student_logp)

    score = jacrev(logp_of_tokens)(world.theta).flatten(2)  # ∇log p_θ(y_n|s_n), (S, R, parameters)
    over_student, over_teacher = world.logps()  # over the vocabulary
    student_logp = at(world.tokens, over_student)  # (S, R)
    teacher_logp = at(world.tokens, over_teacher)

    G = group_size
    right = reward == 1
    probability = world.probability()
    rate = probability[right].sum()  # P(R = 1)
    given_right = torch.where(right, probability / rate, 0.0)
    given_wrong = torch.where(right, 0.0, probability / (1 - rate))

    mean = 0.0
    second_moment = 0.0
    for k in range(G + 1):
        rewards = torch.tensor([1.0] * k + [0.0] * (G - k), dtype=probability.dtype)
        in_the_group = grpo.advantage(rewards, G, normalize_std)  # of its right responses, then of its wrong ones
        of_response = torch.where(right, in_the_group[0], in_the_group[-1])
        A = advantage(of_response, teacher_logp, student_logp, world.mask)
        g = -(torch.where(world.mask, A, 0.0).unsqueeze(-1) * score).sum(1)  # of one response, (S, parameters)
        a = given_right @ g  # E[g | right]
        b = given_wrong @ g  # E[g | wrong]

        # E‖Σ g‖² over the G responses: each with itself, then each with each other
        squares = k * (given_right @ g.square().sum(1)) + (G - k) * (given_wrong @ g.square().sum(1))
        pairs = k * (k - 1) * a @ a + (G - k) * (G - k - 1) * b @ b + 2 * k * (G - k) * a @ b
        chance = math.comb(G, k) * rate**k * (1 - rate) ** (G - k)
        mean = mean + chance * (k * a + (G - k) * b) / G
        second_moment = second_moment + chance * (squares + pairs) / G**2
    return Moments(mean.view_as(world.theta), variance=second_moment - mean @ mean)
