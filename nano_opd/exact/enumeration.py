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
    """Return every response: tokens (S, R) int64 and mask (S, R) bool, True up to and including the first EOS.

    eos  the token that ends a response (0 stands after it); None: all V^R responses have the full length

    Raises ValueError for an empty vocabulary or horizon, an EOS outside the vocabulary, or more than a million V^R.
    """
    if vocab_size < 1 or horizon < 1 or vocab_size**horizon > MAX_RESPONSES:
        raise ValueError(f"cannot enumerate {vocab_size}^{horizon} responses: at least 1, at most {MAX_RESPONSES}")
    if eos is not None and not 0 <= eos < vocab_size:
        raise ValueError(f"eos {eos} is not in the vocabulary 0 … {vocab_size - 1}")
    tokens = _every_sequence(vocab_size, horizon)
    if eos is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    ends = (tokens == eos).long()
    ends_before = ends.cumsum(1) - ends
    mask = ends_before == 0
    after_the_end = tokens.where(~mask, 0)
    listed_once = (after_the_end == 0).all(1)  # of the sequences that differ after the EOS alone, the one with zeros
    return tokens[listed_once], mask[listed_once]


def _every_sequence(number: int, length: int) -> Tensor:
    """Return every sequence of so many numbers from 0 to number − 1, (number^length, length); the last runs fastest."""
    columns = [torch.arange(number)] * length
    return torch.cartesian_prod(*columns).reshape(-1, length)


def tabular(table: Tensor, tokens: Tensor) -> Tensor:
    """Return the logits (B, R, V) of a policy that has one row of logits for each prefix.

    table   (1 + V + … + V^{R−1}, V)
    tokens  (B, R)

    Prefixes are numbered like a heap: the root is 0, and the children of s are sV + 1 … sV + V.
    """
    vocab_size = table.shape[1]
    row = torch.zeros_like(tokens[:, 0])  # the empty prefix
    rows = [row]
    for n in range(tokens.shape[1] - 1):
        row = row * vocab_size + tokens[:, n] + 1
        rows.append(row)
    return table[torch.stack(rows, 1)]


def random_tabular(vocab_size: int, horizon: int, seed: int, scale: float = 1.0) -> tuple[Policy, Tensor]:
    """Return `tabular` and a float64 table for it: normal logits with standard deviation `scale` (nats)."""
    prefixes = sum(vocab_size**n for n in range(horizon))
    generator = torch.Generator().manual_seed(seed)
    table = scale * torch.randn(prefixes, vocab_size, dtype=torch.float64, generator=generator)
    return tabular, table


@dataclass(frozen=True)
class World:
    """Student, teacher, and every response there is."""

    student: Policy  # p_θ
    theta: Tensor  # its parameters θ, float64, any shape
    teacher_logits: Tensor  # (S, R, V) of the teacher q
    tokens: Tensor  # (S, R), with mask as enumerate_responses returns them
    mask: Tensor

    @classmethod
    def of(
        cls,
        student: tuple[Policy, Tensor],
        teacher: tuple[Policy, Tensor],
        vocab_size: int,
        horizon: int,
        eos: int | None = None,
    ) -> "World":
        """Return the world of two (policy, θ) and all responses of this size. Raises as enumerate_responses."""
        tokens, mask = enumerate_responses(vocab_size, horizon, eos)
        policy, theta = student
        policy_of_teacher, theta_of_teacher = teacher
        return cls(
            student=policy,
            theta=theta,
            teacher_logits=policy_of_teacher(theta_of_teacher, tokens),
            tokens=tokens,
            mask=mask,
        )

    def logps(self, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return log-probs in nats over the vocabulary at every prefix, (S, R, V): the student's at θ, the teacher's.

        theta  None: world.theta
        """
        if theta is None:
            theta = self.theta
        student_logits = self.student(theta, self.tokens)
        return student_logits.log_softmax(-1), self.teacher_logits.log_softmax(-1)

    def probability(self, theta: Tensor | None = None) -> Tensor:
        """Return p_θ(y) of every response, (S,); it sums to 1."""
        student_logp, _ = self.logps(theta)
        sampled_logp = at(self.tokens, student_logp)  # (S, R)
        return torch.where(self.mask, sampled_logp, 0.0).sum(1).exp()


def at(tokens: Tensor, x: Tensor) -> Tensor:
    """Return x (…, R, V) at the tokens (…, R)."""
    return x.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def objective(world: World, divergence: Divergence, kind: str, theta: Tensor | None = None) -> Tensor:
    """Return the objective of this kind (see the file's head) at θ, a differentiable scalar.

    For "prefix" the prefixes stay distributed as the student of world.theta visits them, whatever θ is.
    Raises ValueError unless kind is one of prefix, return, sequence.
    """
    student_logp, teacher_logp = world.logps(theta)
    log_u = torch.where(world.mask, at(world.tokens, teacher_logp - student_logp), 0.0)  # (S, R); f(1) = 0
    if kind == "prefix":
        at_each_prefix = (student_logp.exp() * divergence.f(teacher_logp - student_logp)).sum(-1)  # D_f, (S, R)
        along_a_response = torch.where(world.mask, at_each_prefix, 0.0).sum(1)
        frozen = world.probability().detach()  # drops D_f ∇P(s); Σ_y p(y) over the responses through s is P(s)
        return (frozen * along_a_response).sum()
    if kind == "return":
        return (world.probability(theta) * divergence.f(log_u).sum(1)).sum()
    if kind == "sequence":
        return (world.probability(theta) * divergence.f(log_u.sum(1))).sum()
    raise ValueError(f"unknown objective {kind!r}; choose from {', '.join(OBJECTIVES)}")


def gradient(world: World, divergence: Divergence, kind: str) -> Tensor:
    """Return ∇_θ of `objective` at world.theta, of its shape. Raises ValueError for an unknown kind."""

    def objective_at(theta: Tensor) -> Tensor:
        return objective(world, divergence, kind, theta)

    return grad(objective_at)(world.theta)


def sampled(advantage: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], normalize: str = "batch") -> Estimator:
    """Return the score-function estimator of an advantage.

    advantage  of (log_u, mask, student_logits, teacher_logits) → (B, R) or (B, 1)
    normalize  as in policy_gradient.loss, which raises its ValueErrors
    """

    def estimator(tokens: Tensor, mask: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student_logp = logprobs_of(tokens, student_logits)  # (B, R)
        teacher_logp = logprobs_of(tokens, teacher_logits)
        A = advantage(teacher_logp - student_logp, mask, student_logits, teacher_logits)
        return policy_gradient.loss(student_logp, A, mask, normalize)

    return estimator


def estimates(world: World, estimator: Estimator, index: Tensor) -> Tensor:
    """Return the gradient estimate of each batch of responses: index (M, B) into world.tokens → (M, *theta.shape).

    The chain rule in two halves: the estimator's gradient in the logits, then the policy's in θ. For B = 1 all M
    responses pass the estimator in one call, since its loss is a mean over them. Raises ValueError where the means over
    the two halves of the call do not add up: an estimator that couples the responses needs B > 1.
    """
    M, B = index.shape
    tokens = world.tokens[index]  # (M, B, R)
    mask = world.mask[index]
    teacher_logits = world.teacher_logits[index]  # (M, B, R, V)
    student_logits = world.student(world.theta, tokens.flatten(0, 1)).unflatten(0, (M, B)).requires_grad_()
    if B > 1:
        total = sum(estimator(tokens[m], mask[m], student_logits[m], teacher_logits[m]) for m in range(M))
    else:
        total = _total_of_single_responses(
            estimator,
            tokens=tokens.squeeze(1),
            mask=mask.squeeze(1),
            student_logits=student_logits.squeeze(1),
            teacher_logits=teacher_logits.squeeze(1),
        )
    (in_logits,) = torch.autograd.grad(total, student_logits)

    def in_theta(tokens: Tensor, in_logits: Tensor) -> Tensor:
        def weighted_logits(theta: Tensor) -> Tensor:
            return (in_logits * world.student(theta, tokens)).sum()

        return grad(weighted_logits)(world.theta)

    return vmap(in_theta)(tokens, in_logits)


def _total_of_single_responses(
    estimator: Estimator, tokens: Tensor, mask: Tensor, student_logits: Tensor, teacher_logits: Tensor
) -> Tensor:
    """Return the sum of the losses of M responses, (M, R) and (M, R, V), from one call of the estimator on all of them.

    Raises ValueError if the losses of every other response, and those of the rest, do not add up to it.
    """

    def total_of(rows: slice) -> Tensor:
        mean = estimator(tokens[rows], mask[rows], student_logits[rows], teacher_logits[rows])
        return len(tokens[rows]) * mean

    total = total_of(slice(None))
    in_two_calls = total_of(slice(0, None, 2))
    if len(tokens) > 1:
        in_two_calls = in_two_calls + total_of(slice(1, None, 2))
    if not torch.allclose(total, in_two_calls, rtol=1e-6):
        raise ValueError("the estimator couples the responses of a batch: its batch_size must be above 1")
    return total


@dataclass(frozen=True)
class Moments:
    """Mean and scatter of an estimator ĝ over all batches."""

    mean: Tensor  # E[ĝ], of θ's shape
    variance: Tensor  # trace of the covariance of ĝ

    def bias_squared(self, target: Tensor) -> Tensor:
        """Return ‖E[ĝ] − g‖², a scalar."""
        return (self.mean - target).square().sum()


def moments(world: World, estimator: Estimator, batch_size: int = 1, probability: Tensor | None = None) -> Moments:
    """Return the exact mean and variance of an estimator over all batches of `batch_size` independent responses.

    batch_size   1 unless the estimator couples the responses of a batch; all S^batch_size batches are enumerated
    probability  (S,) what the responses are drawn from; None: the student, that is, on-policy

    Raises ValueError for more than a million batches.
    """
    responses = len(world.tokens)
    if responses**batch_size > MAX_RESPONSES:
        raise ValueError(f"cannot enumerate {responses}^{batch_size} batches: at most {MAX_RESPONSES}")
    if probability is None:
        probability = world.probability()
    if probability.shape != world.tokens[:, 0].shape or abs(probability.sum() - 1) > 1e-6:
        raise ValueError(f"probability must be (S,) = {(responses,)} and sum to 1")
    mean = torch.zeros_like(world.theta)
    second_moment = 0.0  # E‖ĝ‖²
    for index in _every_sequence(responses, batch_size).split(256):
        weight = probability[index].prod(1)  # of each batch
        estimate = estimates(world, estimator, index)
        mean = mean + torch.tensordot(weight, estimate, 1)
        second_moment = second_moment + weight @ estimate.flatten(1).square().sum(1)
    return Moments(mean, variance=second_moment - mean.square().sum())
