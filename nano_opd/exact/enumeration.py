"""Exactness by enumeration: what an estimator's gradient is on average, and how far it scatters, without sampling.

For a small vocabulary V and horizon R every response y can be listed with its probability p_θ(y). Then

    E[ĝ]    =  Σ_y p_θ(y) ĝ(y)                                 expected gradient of an estimator ĝ
    var     =  Σ_y p_θ(y) ‖ĝ(y)‖² − ‖E[ĝ]‖²                     trace of its covariance, for one sample
    MSE     =  E‖ĝ − g‖²  =  ‖E[ĝ] − g‖² + var                  against the gradient g of an objective: bias² + variance

and the three objectives that "the divergence of the student from the teacher" may mean are finite sums:

    prefix      Σ_s sg(P(s)) D_f(q(·|s) ‖ p_θ(·|s))             prefixes s as the student visits them now, held fixed
    return      E_{y∼p_θ} Σ_n f(u_n)                            J: prefixes move with θ
    sequence    D_f(q(y) ‖ p_θ(y)) = E_{y∼p_θ} f(Π_n u_n)       one divergence between distributions of responses

Their gradients come from autograd through these sums and use nothing of the estimators but f. Source: the first
two objectives are those of arXiv 2606.01039, §3; the third and the enumeration are this project's own. Everything is
float64.

An estimator is any function (tokens (B, R), mask (B, R), student_logits (B, R, V), teacher_logits (B, R, V)) → scalar
loss of a batch of B responses; its gradient estimate is the gradient of that loss in θ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap

from nano_opd import policy_gradient
from nano_opd.divergences import Divergence
from nano_opd.policy_gradient import logprobs_of

OBJECTIVES = ("prefix", "return", "sequence")
MAX_RESPONSES = 10**6

Policy = Callable[[Tensor, Tensor], Tensor]  # (θ of any shape, tokens (B, R)) → logits (B, R, V) that drew the tokens
Estimator = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def enumerate_responses(vocab_size: int, horizon: int, eos: int | None = None) -> tuple[Tensor, Tensor]:
    """Every response: tokens (S, R) int64 and mask (S, R) bool, True up to and including the first EOS.

    eos  the token that ends a response (0 stands after it); None: all V^R responses have the full length

    Raises ValueError for an empty vocabulary or horizon, an EOS outside the vocabulary, or more than a million V^R.
    """
    if vocab_size < 1 or horizon < 1 or vocab_size**horizon > MAX_RESPONSES:
        raise ValueError(f"cannot enumerate {vocab_size}^{horizon} responses: at least 1, at most {MAX_RESPONSES}")
    if eos is not None and not 0 <= eos < vocab_size:
        raise ValueError(f"eos {eos} is not in the vocabulary 0 … {vocab_size - 1}")
    tokens = torch.cartesian_prod(*[torch.arange(vocab_size)] * horizon).reshape(-1, horizon)
    ends = (tokens == eos).long() if eos is not None else torch.zeros_like(tokens)
    mask = ends.cumsum(1) - ends == 0
    one_of_each = tokens.where(~mask, 0).eq(0).all(1)  # what stands after the EOS would count a response many times
    return tokens[one_of_each], mask[one_of_each]


def tabular(table: Tensor, tokens: Tensor) -> Tensor:
    """A policy with one row of logits per prefix: table (1 + V + … + V^{R−1}, V), tokens (B, R) → logits (B, R, V).

    Prefixes are numbered like a heap: the root is 0, and the children of s are sV + 1 … sV + V.
    """
    rows = [torch.zeros_like(tokens[:, 0])]
    for n in range(tokens.shape[1] - 1):
        rows.append(rows[-1] * table.shape[1] + tokens[:, n] + 1)
    return table[torch.stack(rows, 1)]


def random_tabular(vocab_size: int, horizon: int, seed: int, scale: float = 1.0) -> tuple[Policy, Tensor]:
    """`tabular` and a float64 table for it: normal logits with standard deviation `scale` (nats)."""
    rows = sum(vocab_size**n for n in range(horizon))
    generator = torch.Generator().manual_seed(seed)
    return tabular, scale * torch.randn(rows, vocab_size, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class World:
    """Student, teacher, and every response there is."""

    student: Policy  # p_θ
    theta: Tensor  # its parameters θ, float64, any shape
    teacher_logits: Tensor  # (S, R, V) of the teacher q
    tokens: Tensor  # (S, R), with mask as enumerate_responses returns them
    mask: Tensor

    @classmethod
    def of(cls, student: tuple[Policy, Tensor], teacher: tuple[Policy, Tensor], *sizes: int | None) -> "World":
        """From two (policy, θ) and the sizes of enumerate_responses, whose ValueErrors it raises."""
        tokens, mask = enumerate_responses(*sizes)
        return cls(*student, teacher[0](teacher[1], tokens), tokens, mask)

    def logps(self, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log-probs in nats over the vocabulary at every prefix, (S, R, V): the student's at θ and the teacher's."""
        student_logits = self.student(self.theta if theta is None else theta, self.tokens)
        return student_logits.log_softmax(-1), self.teacher_logits.log_softmax(-1)

    def probability(self, theta: Tensor | None = None) -> Tensor:
        """p_θ(y) of every response, (S,); sums to 1."""
        return torch.where(self.mask, at(self.tokens, self.logps(theta)[0]), 0.0).sum(1).exp()


def at(tokens: Tensor, x: Tensor) -> Tensor:
    """x (…, R, V) at the tokens (…, R)."""
    return x.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def objective(world: World, divergence: Divergence, kind: str, theta: Tensor | None = None) -> Tensor:
    """The objective of this kind (see the file's head) at θ, a differentiable scalar.

    For "prefix" the prefixes stay distributed as the student of world.theta visits them, whatever θ is.
    Raises ValueError unless kind is one of prefix, return, sequence.
    """
    student_logp, teacher_logp = world.logps(theta)
    log_u = torch.where(world.mask, at(world.tokens, teacher_logp - student_logp), 0.0)  # (S, R); f(1) = 0
    if kind == "prefix":
        per_prefix = (student_logp.exp() * divergence.f(teacher_logp - student_logp)).sum(-1)
        frozen = world.probability().detach()  # drops D_f ∇P(s); Σ_y p(y) over the responses through s is P(s)
        return (frozen * torch.where(world.mask, per_prefix, 0.0).sum(1)).sum()
    if kind == "return":
        return (world.probability(theta) * divergence.f(log_u).sum(1)).sum()
    if kind == "sequence":
        return (world.probability(theta) * divergence.f(log_u.sum(1))).sum()
    raise ValueError(f"unknown objective {kind!r}; choose from {', '.join(OBJECTIVES)}")


def gradient(world: World, divergence: Divergence, kind: str) -> Tensor:
    """∇_θ of `objective` at world.theta, of its shape. Raises ValueError for an unknown kind."""
    return grad(lambda theta: objective(world, divergence, kind, theta))(world.theta)


def sampled(advantage: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], normalize: str = "batch") -> Estimator:
    """The score-function estimator with this advantage(log_u, mask, student_logits, teacher_logits) → (B, R) or (B, 1).

    `normalize` is that of policy_gradient.loss, which raises its ValueErrors.
    """

    def estimator(tokens: Tensor, mask: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student_logp, teacher_logp = logprobs_of(tokens, student_logits), logprobs_of(tokens, teacher_logits)  # (B, R)
        A = advantage(teacher_logp - student_logp, mask, student_logits, teacher_logits)
        return policy_gradient.loss(student_logp, A, mask, normalize)

    return estimator


def estimates(world: World, estimator: Estimator, index: Tensor) -> Tensor:
    """The gradient estimate of each batch of responses: index (M, B) into world.tokens → (M, *theta.shape).

    The chain rule in two halves: the estimator's gradient in the logits, then the policy's in θ. For B = 1 all M
    responses pass the estimator in one call, since its loss is a mean over them. Raises ValueError where the means over
    the two halves of the call do not add up: an estimator that couples the responses needs B > 1.
    """
    M, B = index.shape
    tokens = world.tokens[index]
    logits = world.student(world.theta, tokens.flatten(0, 1)).unflatten(0, (M, B)).requires_grad_()  # (M, B, R, V)
    given = [tokens, world.mask[index], logits, world.teacher_logits[index]]
    if B > 1:
        total = sum(estimator(*(x[m] for x in given)) for m in range(M))
    else:
        total = M * estimator(*(x.squeeze(1) for x in given))
        halves = [estimator(*(x[h::2, 0] for x in given)) * len(index[h::2]) for h in range(min(M, 2))]
        if not torch.allclose(total, sum(halves), rtol=1e-6):
            raise ValueError("the estimator couples the responses of a batch: its batch_size must be above 1")
    (in_logits,) = torch.autograd.grad(total, logits)

    def in_theta(tokens: Tensor, weight: Tensor) -> Tensor:
        return grad(lambda theta: (weight * world.student(theta, tokens)).sum())(world.theta)

    return vmap(in_theta)(tokens, in_logits)


@dataclass(frozen=True)
class Moments:
    """Mean and scatter of an estimator ĝ over all batches."""

    mean: Tensor  # E[ĝ], of θ's shape
    variance: Tensor  # trace of the covariance of ĝ

    def bias_squared(self, target: Tensor) -> Tensor:
        """‖E[ĝ] − g‖², a scalar."""
        return (self.mean - target).square().sum()


def moments(world: World, estimator: Estimator, batch_size: int = 1, probability: Tensor | None = None) -> Moments:
    """Exact mean and variance of an estimator over all batches of `batch_size` independent responses.

    batch_size   1 unless the estimator couples the responses of a batch; all S^batch_size batches are enumerated
    probability  (S,) what the responses are drawn from; None: the student, that is, on-policy

    Raises ValueError for more than a million batches.
    """
    if len(world.tokens) ** batch_size > MAX_RESPONSES:
        raise ValueError(f"cannot enumerate {len(world.tokens)}^{batch_size} batches: at most {MAX_RESPONSES}")
    probability = world.probability() if probability is None else probability
    if probability.shape != world.tokens[:, 0].shape or abs(probability.sum() - 1) > 1e-6:
        raise ValueError(f"probability must be (S,) = {(len(world.tokens),)} and sum to 1")
    index = torch.cartesian_prod(*[torch.arange(len(world.tokens))] * batch_size).reshape(-1, batch_size)
    mean, second = torch.zeros_like(world.theta), 0.0
    for batch in index.split(256):
        weight = probability[batch].prod(1)
        g = estimates(world, estimator, batch)
        mean = mean + torch.tensordot(weight, g, 1)
        second = second + weight @ g.flatten(1).square().sum(1)
    return Moments(mean, second - mean.square().sum())
