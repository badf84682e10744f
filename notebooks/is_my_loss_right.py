"""Is my on-policy distillation loss right? Copy this one file into your project and ask. It needs PyTorch only.

How to use it:

    from is_my_loss_right import check

    def my_loss(student_logp, teacher_logp, tokens, mask):  # (B, R, V), (B, R, V), (B, R) int64, (B, R) bool → scalar
        ...
    print(check(my_loss))

student_logp and teacher_logp are log-probs over the whole vocabulary at each position of the response, tokens are what
the student sampled, and mask is True up to and including the end-of-sequence token (EOS). Behind the EOS, tokens hold
the EOS again, as with pad_token = eos_token. If your loss takes something else, wrap it in one of the adapters at the
end of this file (`from_logits`, `from_sampled`, `from_labels`, `from_shifting_labels`, `from_token_mean`). If it has an
importance ratio, give it a keyword `old_logp=None`: the (B, R) log-probs of the tokens under the policy that sampled.

How it works: a student and a teacher with 5 tokens and at most 3 positions have only 85 responses. This file lists all
of them with their probabilities, so the average of your loss's gradient is a finite sum: no sampling error. It compares
that average with the gradients of the divergences. The student has one row of free logits at each prefix.

What each printed line means:

    verdict         the answer in one sentence
    change          what to do about it
    batch           whether your loss treats each response alone, or couples the responses of a batch (whitening, a
                    token mean). A coupled loss gets one batch of 4096 responses, in which each response is as frequent
                    as it is probable. This is the limit of a very large batch. "In batches of two" is exact too.
    divergence ...  for each divergence: the cosine between your average gradient and its gradient; the relative error
                    as it is ("bias"); the error after the best positive factor ("at best scale"), and that factor.
                    "each prefix" is the divergence at each prefix, where the prefixes are held fixed. "whole return" is
                    the expected sum over a response, through which the prefixes move too. "whole response" is one
                    divergence between the distributions of whole responses. The last two appear if they are near.
    positions       whether the EOS token and the padding behind it have a gradient
    at the teacher  what a student that equals the teacher does: it stays, it is pulled back, or it is pushed away
    pay             what your loss pays a token, as a function of u = teacher's / student's probability (one position)
    gradient        whether the average update can be the gradient of anything: asymmetry of its Jacobian in the logits
                    of one prefix, and the work around closed loops. Both are 0 for a gradient.
    older samples   the same average if an older policy sampled; with old_logp, and as if every ratio were 1
    noise           the variance of one response's gradient over the squared average gradient; beside it that of OPD+
                    for the nearest divergence, which pays each token the detached w_f(u) = −f(u) + u f′(u)

`python is_my_loss_right.py` runs it on three losses.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

VOCABULARY = 5
HORIZON = 3
EOS = VOCABULARY - 1
# At each prefix the student's probabilities are these sixteenths in some order, so a batch of 16³ = 4096 responses can
# hold each response exactly in proportion to its probability. The older policy has the sixteenths of the second line.
SIXTEENTHS = torch.tensor([1, 2, 3, 4, 6])
OLDER_SIXTEENTHS = torch.tensor([2, 1, 4, 3, 6])
SEEDS = (0, 1, 2)  # one small world each: what holds in one world by chance does not hold in three
EXACT = 1e-5  # relative error below which two gradients are the same; float32 stays below it
LATTICE = 4000  # copies of one-token responses in the batch of a coupled loss, a multiple of 16

# ------------------------------------------------------------------------------------------------------ the divergences


@dataclass(frozen=True)
class Divergence:
    """D_f(teacher ‖ student) = E_student[f(u)], u = teacher's / student's probability, as functions of x = log u."""

    name: str
    f: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # u f′(u)

    def w_f(self, x: Tensor) -> Tensor:
        """Return what OPD+ pays a token, −f(u) + u f′(u)."""
        return self.slope(x) - self.f(x)


def generalised_jsd(beta: float) -> Divergence:
    """Return β KL(teacher‖m) + (1−β) KL(student‖m) with m = β teacher + (1−β) student."""

    def log_m(x: Tensor) -> Tensor:
        return torch.log(beta * x.exp() + 1 - beta)

    def f(x: Tensor) -> Tensor:
        return beta * x.exp() * (x - log_m(x)) - (1 - beta) * log_m(x)

    def slope(x: Tensor) -> Tensor:
        return beta * x.exp() * (x - log_m(x))

    name = "Jensen–Shannon" if beta == 0.5 else f"JSD, β = {beta:g}"
    return Divergence(name, f=f, slope=slope)


DIVERGENCES = [
    Divergence("reverse KL", f=lambda x: -x, slope=lambda x: -torch.ones_like(x)),
    Divergence("forward KL", f=lambda x: x.exp() * x, slope=lambda x: x.exp() * (x + 1)),
    generalised_jsd(0.5),
    generalised_jsd(0.1),
    generalised_jsd(0.9),
    Divergence("Pearson χ²", f=lambda x: x.expm1() ** 2, slope=lambda x: 2 * x.exp() * x.expm1()),
    Divergence("Neyman χ²", f=lambda x: x.expm1() ** 2 / x.exp(), slope=lambda x: x.exp() - (-x).exp()),
    Divergence("squared Hellinger", f=lambda x: (x / 2).expm1() ** 2, slope=lambda x: x.exp() - (x / 2).exp()),
    Divergence("total variation", f=lambda x: x.expm1().abs() / 2, slope=lambda x: x.exp() * x.sign() / 2),
]
# Other functions of u that people take for reverse KL. They only help to say which mistake was made.
ESTIMATORS = [
    Divergence("k2", f=lambda x: x**2 / 2, slope=lambda x: x),
    Divergence("k3", f=lambda x: x.expm1() - x, slope=lambda x: x.expm1()),
]
W_F = {
    "reverse KL": "log u",
    "forward KL": "u",
    "Jensen–Shannon": "0.5 * log((1 + u) / 2)",
    "Pearson χ²": "u**2 - 1",
    "Neyman χ²": "2 - 2 / u",
    "squared Hellinger": "sqrt(u) - 1",
    "total variation": "0.5 * sign(u - 1)",
}

# ------------------------------------------------------------------------------------------------------ the small world


@dataclass(frozen=True)
class World:
    """A student, an older policy and a teacher as log-probs at each prefix, and every response that there is."""

    student: Tensor  # (prefixes, V)
    older: Tensor  # (prefixes, V)
    teacher: Tensor  # (prefixes, V)
    tokens: Tensor  # (S, R)
    mask: Tensor  # (S, R)
    rows: Tensor  # (S, R), the number of the prefix before each token

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1, keepdim=True)


def enumerate_responses(horizon: int) -> tuple[Tensor, Tensor]:
    """Return all responses, tokens (S, R), and their mask (S, R), True up to and including the first EOS."""
    responses = []
    for response in itertools.product(range(VOCABULARY), repeat=horizon):
        if EOS in response:
            first = response.index(EOS)
            if set(response[first:]) != {EOS}:
                continue  # it differs from another response only behind the EOS
        responses.append(response)
    tokens = torch.tensor(responses)
    ended_before = (tokens == EOS).cumsum(1) - (tokens == EOS).long() > 0
    return tokens, ~ended_before


def number_prefixes(tokens: Tensor) -> Tensor:
    """Return the number (S, R) of the prefix before each token: 0 is the empty one, s·V + 1 + v is s followed by v."""
    rows = [torch.zeros_like(tokens[:, 0])]
    for n in range(tokens.shape[1] - 1):
        rows.append(rows[-1] * VOCABULARY + 1 + tokens[:, n])
    return torch.stack(rows, 1)


def make_world(seed: int, horizon: int = HORIZON) -> World:
    """Return a random world. Teacher and student are about one nat apart at each token."""
    generator = torch.Generator().manual_seed(seed)
    number_of_prefixes = sum(VOCABULARY**n for n in range(horizon))
    orders = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in range(number_of_prefixes)])
    student = (SIXTEENTHS[orders].double() / 16).log()
    older = (OLDER_SIXTEENTHS[orders].double() / 16).log()
    noise = torch.randn(number_of_prefixes, VOCABULARY, dtype=torch.float64, generator=generator)
    teacher = (student + noise).log_softmax(-1)
    tokens, mask = enumerate_responses(horizon)
    return World(student, older, teacher, tokens, mask, number_prefixes(tokens))


def at_tokens(logp: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probs (B, R) of the tokens."""
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def response_probabilities(world: World, policy: Tensor) -> Tensor:
    """Return the probability (S,) of each response under a policy's log-probs (prefixes, V)."""
    logp = at_tokens(policy[world.rows], world.tokens)
    return torch.where(world.mask, logp, 0.0).sum(1).exp()


def add_to_prefixes(world: World, values: Tensor) -> Tensor:
    """Sum values (S, R) or (S, R, V) over all places with the same prefix: (prefixes,) or (prefixes, V)."""
    total = values.new_zeros(len(world.student), *values.shape[2:])
    return total.index_add(0, world.rows.flatten(), values.flatten(0, 1))


def prefix_visits(world: World, probability: Tensor) -> Tensor:
    """Return how often (prefixes,) a response drawn with these probabilities reaches each prefix before its end."""
    return add_to_prefixes(world, probability.unsqueeze(1) * world.mask)


# ------------------------------------------------------------------------------------ the expected gradient of the loss


@dataclass(frozen=True)
class Feed:
    """A change of what the loss is given. If it makes a wrong loss right, the loss contains its inverse."""

    teacher_shift: int = 0
    token_shift: int = 0
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0


PLAIN = Feed()


def accepts_old_logp(loss: Callable) -> bool:
    """Return whether the loss has a keyword old_logp."""
    return "old_logp" in inspect.signature(loss).parameters


def gradient_in_logits(
    loss: Callable, student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor, old: Tensor, feed: Feed = PLAIN
) -> Tensor:
    """Return the gradient of the loss in the student's logits, (B, R, V), from the log-probs of three policies."""
    logits = student.detach().clone().requires_grad_()
    student_logp = (logits * feed.student_temperature).log_softmax(-1)
    teacher_logp = (teacher * feed.teacher_temperature).log_softmax(-1).roll(feed.teacher_shift, dims=1)
    fed_tokens = tokens.roll(feed.token_shift, dims=1)
    options = {}
    if accepts_old_logp(loss):
        options["old_logp"] = at_tokens(old, fed_tokens).detach()
    value = loss(student_logp, teacher_logp, fed_tokens, mask.clone(), **options)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError("the loss must return one number, a tensor with one element")
    if not value.requires_grad:
        return torch.zeros_like(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits, allow_unused=True)
    return torch.zeros_like(logits) if gradient is None else gradient


def batch_gradient(
    loss: Callable, world: World, batch: Tensor, old: Tensor | None = None, feed: Feed = PLAIN
) -> Tensor:
    """Return the gradient (B, R, V) of the loss of a batch of responses, given by their numbers (B,)."""
    rows = world.rows[batch]
    old = world.student if old is None else old
    return gradient_in_logits(
        loss, world.student[rows], world.teacher[rows], world.tokens[batch], world.mask[batch], old[rows], feed
    )


def same(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    """Return whether two tensors agree relative to the larger one, or are both rounding errors."""
    return bool((a - b).norm() <= tolerance * max(a.norm(), b.norm(), 1e-6))


def has_low_precision(loss: Callable, world: World) -> bool:
    """Return whether the loss computes in 16 bits: its gradient then moves in steps, and not as the student moves."""
    everything = torch.arange(len(world.tokens))
    student = world.student[world.rows]
    teacher = world.teacher[world.rows]
    noise = torch.randn(world.student.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = batch_gradient(loss, world, everything)
    slopes = []
    for size in (1e-3, 1e-5):
        moved = student + size * noise[world.rows]
        after = gradient_in_logits(loss, moved, teacher, world.tokens, world.mask, student)
        slopes.append(float((after - before).norm()) / size)
    return abs(slopes[0] - slopes[1]) > 0.05 * max(slopes) and max(slopes) > 1e-6


def how_it_batches(loss: Callable, world: World) -> str:
    """Return "mean" or "sum" if each response counts alone, and "coupled" if the others change its gradient.

    Raises ValueError if the gradient is not finite, if two equal calls differ (the loss draws random numbers), or if
    the order of the responses matters.
    """
    everything = torch.arange(len(world.tokens))
    together = batch_gradient(loss, world, everything)
    if not together.isfinite().all():
        raise ValueError("the gradient is NaN or infinite on ordinary inputs: look for exp or log of a masked position")
    if not same(together, batch_gradient(loss, world, everything)):
        raise ValueError("two calls with the same batch differ: give the loss a fixed random generator, or none")
    try:
        alone = torch.cat([batch_gradient(loss, world, one.unsqueeze(0)) for one in everything])
    except Exception:
        alone = torch.full_like(together, math.nan)  # it cannot take one response, so it needs the others
    tolerance = 0.02 if has_low_precision(loss, world) else 1e-6
    if same(together * len(everything), alone, tolerance):
        return "mean"
    if same(together, alone, tolerance):
        return "sum"
    shuffled = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    if not same(batch_gradient(loss, world, shuffled), together[shuffled]):
        raise ValueError("the order of the responses in a batch matters: hand over the loss of one group, not of many")
    return "coupled"


def response_gradients(
    loss: Callable, world: World, how: str, old: Tensor | None = None, sampler: Tensor | None = None, feed: Feed = PLAIN
) -> Tensor:
    """Return what each response adds to the average gradient if it is sampled, (S, R, V).

    sampler  the policy that samples, (prefixes, V); it matters to a coupled loss only. Without it, the student.
    """
    everything = torch.arange(len(world.tokens))
    if how == "mean":
        return len(everything) * batch_gradient(loss, world, everything, old, feed)
    if how == "sum":
        return batch_gradient(loss, world, everything, old, feed)
    probability = response_probabilities(world, world.student if sampler is None else sampler)
    copies = (probability * 16 ** world.tokens.shape[1]).round().long()
    batch = everything.repeat_interleave(copies)
    gradient = batch_gradient(loss, world, batch, old, feed)
    total = torch.zeros(len(everything), *gradient.shape[1:], dtype=gradient.dtype).index_add(0, batch, gradient)
    return total / probability[:, None, None]


def expected_gradient(world: World, gradients: Tensor, sampler: Tensor | None = None) -> Tensor:
    """Return the average gradient (prefixes, V) if the sampler, or else the student, draws the responses."""
    probability = response_probabilities(world, world.student if sampler is None else sampler)
    return add_to_prefixes(world, probability[:, None, None] * gradients)


def gradient_of_pairs(loss: Callable, world: World) -> Tensor:
    """Return the average gradient (prefixes, V) over all batches of two independent responses."""
    probability = response_probabilities(world, world.student)
    total = torch.zeros_like(world.student)
    for pair in itertools.product(range(len(world.tokens)), repeat=2):
        batch = torch.tensor(pair)
        gradient = batch_gradient(loss, world, batch)
        weight = probability[batch].prod()
        total.index_add_(0, world.rows[batch].flatten(), weight * gradient.flatten(0, 1))
    return total


# ------------------------------------------------------------------------------------- the gradients that it might be


def sampled_log_u(world: World) -> Tensor:
    """Return log u of each token, (S, R), and 0 behind the EOS."""
    log_u = at_tokens((world.teacher - world.student)[world.rows], world.tokens)
    return torch.where(world.mask, log_u, 0.0)


def advantage_gradients(world: World, advantages: Tensor) -> Tensor:
    """Return the gradient of −Σ A log p for each response, (S, R, V), from the advantages (S, R)."""
    chosen = torch.nn.functional.one_hot(world.tokens, VOCABULARY).double()
    score = chosen - world.student[world.rows].exp()  # the gradient of log p in the logits
    return -(advantages * world.mask).unsqueeze(-1) * score


def divergence_gradients(world: World, divergence: Divergence) -> dict[str, Tensor]:
    """Return the exact gradient (prefixes, V) of each objective that the divergence may mean, by autograd through sums.

    "one prefix" has no weights: each row is the gradient of the divergence at that prefix alone.
    """
    logits = world.student.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    per_prefix = (policy.exp() * divergence.f(world.teacher - policy)).sum(-1)
    (one_prefix,) = torch.autograd.grad(per_prefix.sum(), logits, retain_graph=True)

    log_u = at_tokens((world.teacher - policy)[world.rows], world.tokens)
    log_u = torch.where(world.mask, log_u, 0.0)
    probability = response_probabilities(world, policy)
    whole_return = (probability * (divergence.f(log_u) * world.mask).sum(1)).sum()
    (of_return,) = torch.autograd.grad(whole_return, logits, retain_graph=True)
    whole_response = (probability * divergence.f(log_u.sum(1))).sum()
    (of_response,) = torch.autograd.grad(whole_response, logits)

    visits = prefix_visits(world, probability.detach())
    return {
        "one prefix": one_prefix,
        "each prefix": visits.unsqueeze(1) * one_prefix,
        "whole return": of_return,
        "whole response": of_response,
    }


def opd_plus_advantages(world: World, divergence: Divergence, kind: str) -> Tensor:
    """Return the OPD+ advantage (S, R) that is unbiased for the objective `kind`."""
    log_u = sampled_log_u(world)
    if kind == "whole response":
        return divergence.w_f(log_u.sum(1, keepdim=True)).expand_as(log_u)
    if kind == "whole return":
        return sum_of_later(-divergence.f(log_u) * world.mask) + divergence.slope(log_u)
    return divergence.w_f(log_u)


def sum_of_later(values: Tensor) -> Tensor:
    """Return the sum of each value (S, R) and of all that follow it."""
    return values.flip(1).cumsum(1).flip(1)


# --------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Fit:
    """How near the average gradient is to the gradient of one objective, in the worst of the worlds."""

    name: str
    kind: str
    cosine: float
    bias: float  # relative error as it is
    distance: float  # relative error after the best positive factor
    scales: list[float]  # the best factor in each world, negative if the loss goes uphill

    @property
    def opposite(self) -> bool:
        return max(self.scales) < 0 and self.cosine < -1 + EXACT

    @property
    def scale(self) -> float:
        return sum(self.scales) / len(self.scales)

    @property
    def one_scale(self) -> bool:
        return max(self.scales) - min(self.scales) <= 1e-4 * abs(self.scale)


def compare(name: str, kind: str, expected: list[Tensor], targets: list[Tensor]) -> Fit:
    """Return the Fit of average gradients to the gradients of an objective, one (prefixes, V) of each per world."""
    cosines = []
    biases = []
    distances = []
    scales = []
    for mine, target in zip(expected, targets):
        length = mine.norm().clamp(min=1e-300)
        scale = (mine * target).sum() / target.square().sum()
        cosines.append(float((mine * target).sum() / (length * target.norm())))
        biases.append(float((mine - target).norm() / target.norm()))
        distances.append(float((mine - scale.clamp(min=0) * target).norm() / length))
        scales.append(float(scale))
    uphill_everywhere = max(scales) < 0
    cosine = max(cosines) if uphill_everywhere else min(cosines)
    return Fit(name, kind, cosine, max(biases), max(distances), scales)


def fit_prefixes(expected: list[Tensor], directions: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Fit one factor ≥ 0 at each prefix. Return the relative error in the worst world, and the factors (prefixes,)."""
    errors = []
    factors = []
    for mine, direction in zip(expected, directions):
        size = direction.square().sum(1).clamp(min=1e-300)
        factor = ((mine * direction).sum(1) / size).clamp(min=0)
        rest = mine - factor.unsqueeze(1) * direction
        errors.append(float(rest.norm() / mine.norm().clamp(min=1e-300)))
        factors.append(factor)
    return max(errors), factors


def fit_sum(expected: list[Tensor], parts: list[list[Tensor]]) -> tuple[float, list[float]]:
    """Fit a sum of parts, with one factor for each part in all worlds. Return the relative error and the factors."""
    mine = torch.cat([gradient.flatten() for gradient in expected])
    columns = [torch.cat([gradient.flatten() for gradient in part]) for part in parts]
    matrix = torch.stack(columns, 1)
    factors = torch.linalg.lstsq(matrix, mine.unsqueeze(1)).solution.squeeze(1)
    error = (matrix @ factors - mine).norm() / mine.norm().clamp(min=1e-300)
    return float(error), factors.tolist()


# ---------------------------------------------------------------------------------------------- one position at a time


def one_prefix_updates(loss: Callable, how: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the average update (K, V), −gradient in the logits, of K students with one-token responses.

    student, teacher  (K, V) probabilities. For a coupled loss the student's are multiples of 1 / LATTICE.
    """
    K = len(student)
    if how == "coupled":
        updates = []
        for p, q in zip(student, teacher):
            copies = (p * LATTICE).round().long()
            tokens = torch.arange(VOCABULARY).repeat_interleave(copies).unsqueeze(1)
            logp = p.log().expand(len(tokens), 1, VOCABULARY)
            logq = q.log().expand(len(tokens), 1, VOCABULARY)
            gradient = gradient_in_logits(loss, logp, logq, tokens, torch.ones_like(tokens, dtype=torch.bool), logp)
            updates.append(-gradient.sum((0, 1)))
        return torch.stack(updates)
    tokens = torch.arange(VOCABULARY).repeat(K).unsqueeze(1)
    logp = student.log().repeat_interleave(VOCABULARY, 0).unsqueeze(1)
    logq = teacher.log().repeat_interleave(VOCABULARY, 0).unsqueeze(1)
    gradient = gradient_in_logits(loss, logp, logq, tokens, torch.ones_like(tokens, dtype=torch.bool), logp)
    if how == "mean":
        gradient = gradient * len(tokens)
    return -(student.unsqueeze(-1) * gradient.reshape(K, VOCABULARY, VOCABULARY)).sum(1)


def random_distributions(count: int, seed: int) -> Tensor:
    """Return random probabilities (count, V), multiples of 1 / LATTICE, none below 1/16."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.stack([SIXTEENTHS[torch.randperm(VOCABULARY, generator=generator)] for _ in range(count)]).double() / 16
    )


def update_jacobian(loss: Callable, how: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Jacobian (V−1, V−1) of the average update as a form in the first V − 1 probabilities, by differences.

    The update F does the work F·dz = Σ (F_i/p_i − F_V/p_V) dp_i. It is a gradient if and only if this is symmetric.
    """
    step = 2 / LATTICE
    moves = torch.zeros(VOCABULARY - 1, VOCABULARY, dtype=torch.float64)
    for i in range(VOCABULARY - 1):
        moves[i, i] = step
        moves[i, -1] = -step
    students = torch.cat([student + moves, student - moves])
    updates = one_prefix_updates(loss, how, students, teacher.expand_as(students))
    per_probability = updates / students
    form = per_probability[:, :-1] - per_probability[:, -1:]
    return (form[: VOCABULARY - 1] - form[VOCABULARY - 1 :]).T / (2 * step)


def jacobian_asymmetry(loss: Callable, how: str) -> float:
    """Return the asymmetry of the update's Jacobian at one prefix, ‖J − Jᵀ‖ / 2‖J‖, in the worst of six cases."""
    worst = 0.0
    teachers = 0.7 * random_distributions(6, seed=11) + 0.06  # no u is exactly 1, where |u − 1| has no slope
    for student, teacher in zip(random_distributions(6, seed=10), teachers):
        J = update_jacobian(loss, how, student, teacher)
        pay = one_prefix_updates(loss, how, student.unsqueeze(0), teacher.unsqueeze(0)) / student
        size = max(float(J.norm()), float(pay.norm()), 1e-9)  # J is 0 where the pay does not depend on the student
        worst = max(worst, float((J - J.T).norm()) / (2 * size))
    return worst


def loop_work(loss: Callable, how: str) -> float:
    """Return |work| around a closed loop of students over the work of its pieces, in the worst of eight triangles.

    It also finds jumps, which a Jacobian does not see. Not for coupled losses, where it returns NaN.
    """
    if how == "coupled":
        return math.nan
    generator = torch.Generator().manual_seed(12)
    along = (torch.arange(400, dtype=torch.float64).unsqueeze(1) + 0.5) / 400
    worst = 0.0
    for _ in range(8):
        corners = 1.5 * torch.randn(3, VOCABULARY, dtype=torch.float64, generator=generator)
        teacher = torch.randn(VOCABULARY, dtype=torch.float64, generator=generator).softmax(-1)
        work = []
        for start, end in zip(corners, corners.roll(-1, 0)):
            students = (start + along * (end - start)).softmax(-1)
            updates = one_prefix_updates(loss, how, students, teacher.expand_as(students))
            work.append((updates * (end - start)).sum(-1))
        work = torch.cat(work)
        worst = max(worst, float(work.sum().abs() / work.abs().sum().clamp(min=1e-12)))
    return worst


@dataclass(frozen=True)
class Pay:
    """What the loss pays a token with probability ratio u, beyond a token with u ≈ 1 at the same prefix."""

    log_u: Tensor  # (N,)
    curve: Tensor  # (N,)
    of_u_alone: bool  # whether the curve is the same where the token is rarer and the other tokens are others

    def falls(self) -> list[tuple[float, float]]:
        """Return the ranges of u in which the pay falls."""
        falling = self.curve.diff() < -1e-4 * (self.curve.max() - self.curve.min())
        ranges = []
        for n in falling.nonzero().flatten().tolist():
            low, high = float(self.log_u[n].exp()), float(self.log_u[n + 1].exp())
            if ranges and abs(ranges[-1][1] - low) < 1e-9 * low:
                ranges[-1] = (ranges[-1][0], high)
            else:
                ranges.append((low, high))
        return ranges


def measure_pay(loss: Callable, how: str) -> Pay:
    """Return what the loss pays a token as a function of u, measured in one-token responses."""
    log_u = torch.linspace(-4, 4, 82, dtype=torch.float64)
    near_one = 1.02  # u of the token that it is compared with: not 1, where |u − 1| has no slope
    curves = []
    for mass, rest in ((0.25, (0.5, 0.3, 0.2)), (0.15, (0.2, 0.2, 0.6))):
        students = []
        teachers = []
        for x in log_u.tolist():
            p = round(mass * min(1.0, math.exp(-x)) * LATTICE) / LATTICE
            q = p * math.exp(x)
            students.append([p, mass] + [(1 - mass - p) * share for share in rest])
            of_other = near_one * mass
            teachers.append([q, of_other] + [(1 - of_other - q) * share for share in reversed(rest)])
        student = torch.tensor(students, dtype=torch.float64)
        if how == "coupled":
            student = (student * LATTICE).round() / LATTICE
        updates = one_prefix_updates(loss, how, student, torch.tensor(teachers, dtype=torch.float64))
        per_probability = updates / student
        curves.append(per_probability[:, 0] - per_probability[:, 1])
    size = (curves[0].max() - curves[0].min()).clamp(min=1e-12)
    alike = bool((curves[0] - curves[1]).abs().max() <= 1e-4 * size)
    return Pay(log_u, curves[0], alike)


@dataclass(frozen=True)
class AtTeacher:
    """What happens to a student that equals the teacher, at one prefix."""

    drift: float  # length of its average update, relative to that of other students
    pulled: int  # directions in which a neighbour is pulled back
    blind: int  # directions in which it is left where it is
    pushed: int  # directions in which it is pushed away

    def __str__(self) -> str:
        if self.drift > 1e-4:
            return f"it is driven away: its average update is {self.drift:.2g} times that of other students"
        words = []
        if self.pulled:
            words.append(f"pulled back in {self.pulled}")
        if self.blind:
            words.append(f"left where it is in {self.blind}")
        if self.pushed:
            words.append(f"pushed away in {self.pushed}")
        return f"it stays; a neighbour is {', '.join(words)} of {VOCABULARY - 1} directions"


def look_at_teacher(loss: Callable, how: str) -> AtTeacher:
    """Return what the loss does to a student that equals the teacher, and to its neighbours."""
    teacher = SIXTEENTHS.double() / 16
    others = random_distributions(6, seed=13)
    typical = one_prefix_updates(loss, how, others, teacher.expand_as(others)).norm(dim=1).max()
    drift = one_prefix_updates(loss, how, teacher.unsqueeze(0), teacher.unsqueeze(0)).norm() / typical
    J = update_jacobian(loss, how, teacher, teacher)
    metric = torch.diag(1 / teacher[:-1]) + 1 / teacher[-1]  # in it every divergence pulls equally in all directions
    rates = torch.linalg.eigvals(torch.linalg.solve(metric, J)).real
    small = 0.01 * max(float(rates.abs().max()), float(typical))
    return AtTeacher(
        drift=float(drift),
        pulled=int((rates < -small).sum()),
        blind=int((rates.abs() <= small).sum()),
        pushed=int((rates > small).sum()),
    )


def if_possible(measure: Callable, loss: Callable, how: str):
    """Return what `measure` finds, or None if the loss fails or is not finite for responses of one token."""
    try:
        found = measure(loss, how)
    except Exception:
        return None
    if isinstance(found, float) and math.isnan(found):
        return None
    return found


# ----------------------------------------------------------------------------------------------------- the explanation


@dataclass(frozen=True)
class Measured:
    """The worlds, and what the loss did in each of them."""

    worlds: list[World]
    gradients: list[Tensor]  # (S, R, V) of each response
    targets: dict[str, list[dict[str, Tensor]]]  # divergence_gradients of each divergence in each world

    def expected(self) -> list[Tensor]:
        """Return the average gradients at the prefixes that a response can reach, not behind its EOS."""
        pairs = zip(self.worlds, self.gradients)
        return [expected_gradient(world, gradients * world.mask.unsqueeze(-1)) for world, gradients in pairs]

    def times_length(self) -> "Measured":
        """Return the same with each response's gradient multiplied by its length."""
        pairs = zip(self.worlds, self.gradients)
        gradients = [gradients * world.lengths.unsqueeze(-1) for world, gradients in pairs]
        return replace(self, gradients=gradients)

    def target(self, divergence: Divergence, kind: str) -> list[Tensor]:
        return [of_world[kind] for of_world in self.targets[divergence.name]]


@dataclass(frozen=True)
class Finding:
    """An explanation of the average gradient that fits exactly, or the verdict that there is none."""

    status: str  # see STATUS
    sentence: str
    change: str
    divergence: str = ""
    kind: str = "each prefix"
    causes: list[str] = field(default_factory=list)  # what was found, in one or two words each


RIGHT = "RIGHT"
FACTOR = "RIGHT UP TO A FACTOR"
REWEIGHTED = "RIGHT AT EACH PREFIX, REWEIGHTED"
OTHER = "ANOTHER OBJECTIVE"
WRONG = "WRONG"
NOTHING = "TEACHES NOTHING"
ROUNDED = "RIGHT UP TO ROUNDING"


def pay_instead(name: str) -> str:
    """Return the advice to use OPD+ for a divergence."""
    if name in W_F:
        return f"pay each token the detached {W_F[name]}, u = teacher / student: loss = −(pay * logp).sum() / B"
    return "pay each token the detached w_f(u) = −f(u) + u f′(u), or differentiate the full sum over the vocabulary"


def all_fits(measured: Measured) -> list[Fit]:
    """Return the Fit to each objective of each divergence, the nearest first."""
    expected = measured.expected()
    fits = []
    for divergence in DIVERGENCES:
        for kind in ("each prefix", "whole return", "whole response"):
            fits.append(compare(divergence.name, kind, expected, measured.target(divergence, kind)))
    return sorted(fits, key=lambda fit: fit.distance)


def describe_objective(fit: Fit) -> str:
    """Return "reverse KL at each prefix" and the like."""
    words = {
        "each prefix": "at each prefix",
        "whole return": "summed over a response (γ = 1)",
        "whole response": "between whole responses",
    }
    return f"{fit.name} {words[fit.kind]}"


def explain_nothing(measured: Measured) -> Finding | None:
    """Return a Finding if the average gradient is zero."""
    ratios = []
    for world, gradients, expected in zip(measured.worlds, measured.gradients, measured.expected()):
        probability = response_probabilities(world, world.student)
        live = gradients * world.mask.unsqueeze(-1)
        second = (probability * live.flatten(1).square().sum(1)).sum()
        if second < 1e-24:
            sentence = "The loss has no gradient in the student at all."
            return Finding(NOTHING, sentence, "Check for a detach or no_grad too many.", causes=["no gradient"])
        ratios.append(float(expected.norm() / second.sqrt()))
    if max(ratios) > 1e-7:
        return None
    sentence = "The average gradient is exactly zero: what a single batch shows is noise alone."
    change = "Do not differentiate the sampled log-ratio itself: pay it, detached, times the log-prob of the token."
    return Finding(NOTHING, sentence, change, causes=["zero on average"])


def explain_exact(measured: Measured) -> Finding | None:
    """Return a Finding if the average gradient is that of one objective, up to a factor."""
    best = all_fits(measured)
    for fit in best:
        if fit.opposite:
            sentence = f"It climbs {describe_objective(fit)}: exactly the gradient, with the wrong sign."
            return Finding(WRONG, sentence, "Change the sign of the loss.", fit.name, fit.kind, ["wrong sign"])
    fit = best[0]
    if fit.distance > EXACT:
        return None
    objective = describe_objective(fit)
    if fit.bias <= EXACT:
        return Finding(RIGHT, f"On average it is exactly the gradient of {objective}.", "Nothing.", fit.name, fit.kind)
    if fit.one_scale:
        sentence = f"On average it is exactly {fit.scale:.4g} times the gradient of {objective}."
        change = "Nothing but the learning rate, if you mind the factor."
        return Finding(FACTOR, sentence, change, fit.name, fit.kind, ["factor"])
    lengths = [float((response_probabilities(w, w.student) * w.lengths.squeeze(1)).sum()) for w in measured.worlds]
    per_token = [scale * length for scale, length in zip(fit.scales, lengths)]
    if max(per_token) - min(per_token) <= 1e-4 * abs(per_token[0]):
        sentence = (
            f"In a large batch it has exactly the direction of {objective}. The divisor is the number of tokens in the "
            "batch, so the factor is 1 / mean length."
        )
        change = "Divide by the number of responses B: in small batches a token mean is biased."
        return Finding(FACTOR, sentence, change, fit.name, fit.kind, ["token mean"])
    low, high = min(fit.scales), max(fit.scales)
    sentence = (
        f"It has exactly the direction of {objective}; the factor depends on the batch ({low:.3g} to {high:.3g})."
    )
    change = "Nothing for the direction. The factor acts as a learning rate: divide by B alone to keep it constant."
    return Finding(FACTOR, sentence, change, fit.name, fit.kind, ["factor of the batch"])


def prefix_depths(world: World) -> Tensor:
    """Return the position (prefixes,) at which each prefix stands."""
    depth = torch.zeros(len(world.student), dtype=torch.long)
    depth[world.rows.flatten()] = torch.arange(world.rows.shape[1]).repeat(len(world.rows))
    return depth


def explain_weights(measured: Measured, factors: list[Tensor]) -> tuple[str, str, str]:
    """Return what reweights the prefixes, as (one or two words, a sentence, a change), from factors (prefixes,)."""
    by_length = []
    by_position = []
    by_eos = []
    for world, factor in zip(measured.worlds, factors):
        probability = response_probabilities(world, world.student)
        visits = prefix_visits(world, probability)
        reached = visits > 0
        weight = (factor / visits)[reached]
        inverse = (prefix_visits(world, probability / world.lengths.squeeze(1)) / visits)[reached]
        goes_on = 1 - world.student[reached, EOS].exp()
        position = prefix_depths(world)[reached]
        means = torch.stack([weight[position == n].mean() for n in range(HORIZON)])
        by_length.append(spread(weight / inverse))
        by_eos.append(spread(weight / goes_on))
        by_position.append(float((weight - means[position]).norm() / weight.norm()))
    if max(by_length) < EXACT:
        change = "Divide the sum over all tokens by the number of responses B, a constant, or accept the weights."
        return "length", "each response is divided by its own length, so prefixes of long responses count less", change
    if max(by_eos) < EXACT:
        change = "Let the mask include the first EOS."
        return "EOS", "positions at which the EOS was sampled are left out", change
    if max(by_position) < EXACT:
        shares = ", ".join(f"{float(mean / means.max()):.3g}" for mean in means)
        return "position", f"the positions have the weights {shares}", "Give each position the same weight."
    return (
        "weights",
        "the prefixes have weights of their own",
        "Nothing, if you chose these weights.",
    )


def spread(values: Tensor) -> float:
    """Return how far values are from being one constant, relative to their mean."""
    return float((values - values.mean()).norm() / values.norm().clamp(min=1e-300))


def explain_prefixes(measured: Measured) -> Finding | None:
    """Return a Finding if the gradient at each prefix is right up to a factor of its own."""
    expected = measured.expected()
    for divergence in DIVERGENCES:
        error, factors = fit_prefixes(expected, measured.target(divergence, "one prefix"))
        if error < EXACT:
            cause, why, change = explain_weights(measured, factors)
            sentence = f"At each prefix it is exactly the gradient of {divergence.name}, but {why}."
            return Finding(REWEIGHTED, sentence, change, divergence.name, causes=[cause])
    return None


def entropy_gradients(world: World) -> Tensor:
    """Return the gradient (prefixes, V) of the student's entropy at each prefix, as often as it is visited."""
    logits = world.student.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    entropy = -(policy.exp() * policy).sum()
    (gradient,) = torch.autograd.grad(entropy, logits)
    return prefix_visits(world, response_probabilities(world, world.student)).unsqueeze(1) * gradient


def explain_pairs(measured: Measured, both_positive: bool) -> Finding | None:
    """Return a Finding if the gradient is a sum of two divergences, or of one and the student's entropy."""
    parts = {divergence.name: measured.target(divergence, "each prefix") for divergence in DIVERGENCES}
    parts["the student's entropy"] = [entropy_gradients(world) for world in measured.worlds]
    for one, other in itertools.combinations(parts, 2):
        error, (a, b) = fit_sum(measured.expected(), [parts[one], parts[other]])
        if error > EXACT:
            continue
        entropy = other == "the student's entropy"
        good = a > 0 and (b > 0 or entropy)
        if good != both_positive:
            continue
        if entropy:
            return explain_entropy(one, a, b)
        if b > a:
            a, one, b, other = b, other, a, one
        sign = "+" if b > 0 else "−"
        formula = f"{a:.3g} {one} {sign} {abs(b):.3g} {other}"
        if good:
            sentence = f"It is exactly the gradient of {formula} at each prefix."
            return Finding(OTHER, sentence, "Nothing, if you want this sum.", one, causes=["sum"])
        sentence = f"It descends exactly {formula} at each prefix: it increases {other} on purpose."
        return Finding(WRONG, sentence, f"For {one}: {pay_instead(one)}.", one, causes=["difference"])
    return None


def explain_entropy(name: str, a: float, b: float) -> Finding:
    """Return the Finding on a loss that is a times a divergence plus b times the student's entropy."""
    sign = "+" if b > 0 else "−"
    sentence = (
        f"It is exactly the gradient of {a:.3g} {name} {sign} {abs(b):.3g} the student's entropy at each prefix, "
        "so the student does not end at the teacher."
    )
    if b < 0:
        return Finding(OTHER, sentence, "Nothing, if you want the entropy bonus.", name, causes=["entropy"])
    change = f"The entropy is pushed down, as if log p were missing from the pay. For {name}: {pay_instead(name)}."
    return Finding(WRONG, sentence, change, name, causes=["entropy"])


def mistaken_advantages(world: World, divergence: Divergence) -> dict[str, Tensor]:
    """Return the advantages (S, R) that well-known mistakes amount to, by the words that name them."""
    log_u = sampled_log_u(world)
    f = divergence.f(log_u) * world.mask
    slope = divergence.slope(log_u) * world.mask
    logp = at_tokens(world.student[world.rows], world.tokens)
    total = log_u.sum(1, keepdim=True)
    return {
        "stop-gradient": -f,
        "f attached": -f + slope * logp,
        "f as a loss": slope,
        "stop-gradient return": sum_of_later(-f),
        "w_f summed": sum_of_later(slope - f),
        "stop-gradient, whole response": -divergence.f(total).expand_as(log_u),
    }


MISTAKES = {
    "stop-gradient": "pays −f(u) of {name} with the gradient stopped (OPD), which drops the term u f′(u)",
    "f attached": "multiplies log p by an f(u) of {name} (or a reward −f(u)) that is not detached: a forgotten detach",
    "f as a loss": "differentiates f(u) of {name} at the sampled token, which drops that the student samples",
    "stop-gradient return": "pays the later −f(u) of {name} with the gradient stopped, without the own token's u f′(u)",
    "w_f summed": "sums w_f of {name} over the later tokens; only −f may be summed, the correction is the own token's",
    "stop-gradient, whole response": "pays −f of the whole response's ratio, {name}, with the gradient stopped",
}


def explain_mistakes(measured: Measured) -> Finding | None:
    """Return a Finding if the average gradient is exactly that of a well-known mistake."""
    expected = measured.expected()
    for mistake, words in MISTAKES.items():
        for divergence in DIVERGENCES + ESTIMATORS:
            expectations = []
            for world in measured.worlds:
                advantages = mistaken_advantages(world, divergence)[mistake]
                expectations.append(expected_gradient(world, advantage_gradients(world, advantages)))
            if max(gradient.norm() for gradient in expectations) < 1e-9:
                continue
            error = compare(divergence.name, "", expected, expectations).distance
            if not mistake.endswith(("return", "summed", "response")):
                error = min(error, fit_prefixes(expected, expectations)[0])
            if error < EXACT:
                meant = "reverse KL" if divergence in ESTIMATORS else divergence.name
                change = f"For {meant}: {pay_instead(meant)}."
                if mistake in ("stop-gradient return", "w_f summed"):
                    change = "Pay each token the sum of the later −f(u), plus its own u f′(u), all detached."
                if mistake == "f attached":
                    change = f"Detach, and add f: f.detach() * logp + f. Or {pay_instead(meant)}."
                return Finding(WRONG, f"It {words.format(name=divergence.name)}.", change, meant, causes=[mistake])
    return None


def explain_discount(measured: Measured) -> Finding | None:
    """Return a Finding if the pay is OPD+'s with a discount 0 < γ < 1."""
    for divergence in DIVERGENCES:
        parts = [[], [], []]
        for world in measured.worlds:
            log_u = sampled_log_u(world)
            reward = -divergence.f(log_u) * world.mask
            later = [torch.nn.functional.pad(reward[:, n:], (0, n)) for n in (1, 2)]
            for part, advantages in zip(parts, [divergence.w_f(log_u), *later]):
                part.append(expected_gradient(world, advantage_gradients(world, advantages)))
        error, (own, next_one, third) = fit_sum(measured.expected(), parts)
        if error < EXACT and own > 0 and abs(next_one) > 1e-4 * own:
            gamma = next_one / own
            sentence = f"It is OPD+ for {divergence.name} with a discount γ = {gamma:.3g}: between two objectives."
            if abs(third / own - gamma**2) > 1e-3:
                sentence = f"It is OPD+ for {divergence.name} with later pay weighted {gamma:.3g}, {third / own:.3g}."
            change = (
                "γ = 0 is exact for each prefix, γ = 1 for the sum over a response. Between, it is exact for neither."
            )
            return Finding(OTHER, sentence, change, divergence.name, causes=["discount"])
    return None


def explain_lengths(measured: Measured) -> Finding | None:
    """Return a Finding if the loss is explained once each response is multiplied by its own length."""
    repaired = measured.times_length()
    nothing = explain_nothing(repaired)
    if nothing:
        sentence = "Times each response's length its average gradient is zero: all it does is to change the length."
        return Finding(NOTHING, sentence, nothing.change, causes=["length", "zero on average"])
    found = explain_exact(repaired)
    if found and found.status in (RIGHT, FACTOR):
        sentence = (
            f"Each response is divided by its own length; without that it is exactly {found.divergence}. The sampled "
            "EOS decides the divisor, so constants in the pay no longer cancel and the direction is biased."
        )
        change = "Divide the sum over all tokens by the number of responses B, or by any constant."
        return Finding(WRONG, sentence, change, found.divergence, found.kind, ["length"])
    found = explain_mistakes(repaired)
    if found:
        sentence = f"{found.sentence[:-1]}; and each response is divided by its own length."
        return replace(found, sentence=sentence, causes=[*found.causes, "length"])
    return None


def explain_eos(measured: Measured) -> Finding | None:
    """Return a Finding if the loss is OPD+ whose EOS tokens are not paid."""
    for divergence in DIVERGENCES:
        parts = [[], []]
        for world in measured.worlds:
            goes_on = (world.tokens != EOS).double()
            for part, pay in zip(parts, [divergence.w_f(sampled_log_u(world)), torch.ones_like(goes_on)]):
                part.append(expected_gradient(world, advantage_gradients(world, pay * goes_on)))
        error, factors = fit_sum(measured.expected(), parts)
        if error < EXACT and factors[0] > 0:
            sentence = f"It is {divergence.name} without the EOS: the student never learns when to stop."
            return Finding(WRONG, sentence, "Let the mask include the first EOS.", divergence.name, causes=["EOS"])
    return None


def refeed(measured: Measured, loss: Callable, how: str, feed: Feed) -> Measured:
    """Return what the loss does when it is fed something else."""
    gradients = [response_gradients(loss, world, how, feed=feed) for world in measured.worlds]
    return replace(measured, gradients=gradients)


def explain_right(measured: Measured) -> Finding | None:
    """Return a Finding if the direction is exactly right at each prefix."""
    for explain in (explain_exact, explain_prefixes, explain_lengths):
        found = explain(measured)
        if found and (found.status in (RIGHT, FACTOR, REWEIGHTED) or found.causes == ["length"]):
            return found
    return None


def explain_shift(measured: Measured, loss: Callable, how: str) -> Finding | None:
    """Return a Finding if the loss is right once the teacher or the tokens are shifted by one position."""
    for side in ("teacher", "tokens"):
        for shift in (-1, 1):
            feed = Feed(teacher_shift=shift) if side == "teacher" else Feed(token_shift=shift)
            found = explain_right(refeed(measured, loss, how, feed))
            if found:
                late = "behind" if shift < 0 else "ahead"
                article = "The teacher's log-probs are" if side == "teacher" else "The tokens are"
                sentence = f"{article} one position {late}; aligned, it is {found.divergence}."
                change = "logits[:, n] predict tokens[:, n + 1]: shift student, teacher and tokens alike."
                return Finding(WRONG, sentence, change, found.divergence, found.kind, [f"{side} shifted"])
    return None


def feed_at(side: str, temperature: float) -> Feed:
    """Return the Feed that undoes a division of the logits by this temperature."""
    return Feed(
        student_temperature=temperature if side != "teacher" else 1.0,
        teacher_temperature=temperature if side != "student" else 1.0,
    )


def explain_temperature(measured: Measured, loss: Callable, how: str) -> Finding | None:
    """Return a Finding if the loss is right once the logits of one side, or of both, are multiplied by a number."""
    first = replace(measured, worlds=measured.worlds[:1], gradients=measured.gradients[:1])

    def error_of(divergence: Divergence, side: str, temperature: float) -> float:
        expected = refeed(first, loss, how, feed_at(side, temperature)).expected()
        return fit_prefixes(expected, measured.target(divergence, "one prefix")[:1])[0]

    steps_of_two = 4
    grid = [2 ** (n / steps_of_two) for n in range(-10, 11) if n != 0]
    for side in ("teacher", "student", "both"):
        errors = []
        for temperature in grid:
            expected = refeed(first, loss, how, feed_at(side, temperature)).expected()
            for divergence in DIVERGENCES:
                error = fit_prefixes(expected, measured.target(divergence, "one prefix")[:1])[0]
                errors.append((error, temperature, divergence.name))
        for error, temperature, name in sorted(errors)[:2]:
            if error > 0.2:
                continue  # the right temperature would be nearer than this to one of the grid
            divergence = next(d for d in DIVERGENCES if d.name == name)
            low = math.log(temperature) - math.log(2) / steps_of_two
            high = math.log(temperature) + math.log(2) / steps_of_two
            for _ in range(40):
                left = low + (high - low) * 0.382
                right = low + (high - low) * 0.618
                if error_of(divergence, side, math.exp(left)) < error_of(divergence, side, math.exp(right)):
                    high = right
                else:
                    low = left
            temperature = math.exp((low + high) / 2)
            found = explain_right(refeed(measured, loss, how, feed_at(side, temperature)))
            if found and abs(temperature - 1) > 1e-3:
                who = "both sides' logits are" if side == "both" else f"the {side}'s logits are"
                sentence = f"It is {found.divergence}, but {who} divided by a temperature of {temperature:.3g}."
                change = "Sample and score at temperature 1, on both sides."
                if side == "both":
                    change += (
                        " With both divided the teacher is still where it ends; but samples come at temperature 1."
                    )
                status = OTHER if side == "both" else WRONG
                return Finding(status, sentence, change, found.divergence, found.kind, [f"{side} temperature"])
    return None


def explain_pay(pay: Pay | None, nearest: Fit, is_gradient: bool, at_teacher: AtTeacher | None) -> Finding:
    """Return a Finding from the shape of what the loss pays, if nothing else explains the average gradient."""
    near = f"the nearest is {describe_objective(nearest)} (cosine {nearest.cosine:.3f}, off by {nearest.distance:.2g})"
    advice = f"For {nearest.name}: {pay_instead(nearest.name)}."
    ends_there = at_teacher is not None and at_teacher.drift < 1e-4 and at_teacher.pulled == VOCABULARY - 1
    if pay is not None and not pay.of_u_alone and is_gradient and ends_there:
        sentence = f"At one prefix it descends a function of its own, which has a minimum at the teacher; {near}."
        change = "Nothing, if you chose this function. " + advice
        return Finding(OTHER, sentence, change, nearest.name, nearest.kind, ["own"])
    if pay is None or not pay.of_u_alone:
        sentence = f"It is the gradient of no divergence in the list; {near}."
        if at_teacher is not None and at_teacher.drift > 1e-4:
            sentence += " A student that equals the teacher is driven away."
        elif at_teacher is not None and at_teacher.blind:
            sentence += f" Near the teacher it does not see {at_teacher.blind} of {VOCABULARY - 1} directions."
        return Finding(WRONG, sentence, advice, nearest.name, nearest.kind, ["unknown"])
    falls = pay.falls()
    if falls:
        ranges = " and ".join(f"{low:.2g} to {high:.2g}" for low, high in falls)
        sentence = (
            f"It pays a token by u alone, but less where u grows from {ranges}: it descends no divergence; {near}."
        )
        return Finding(WRONG, sentence, advice, nearest.name, nearest.kind, ["falling pay"])
    sentence = (
        f"In one position it descends a divergence of its own: its pay depends on u alone and never falls; {near}."
    )
    return Finding(OTHER, sentence, "Nothing, if you chose this pay. " + advice, nearest.name, nearest.kind, ["own"])


def explain_rounding(nearest: Fit) -> Finding:
    """Return the Finding on a loss that computes in 16 bits."""
    sentence = f"It is {describe_objective(nearest)} up to {nearest.distance:.1%}, which 16-bit numbers inside explain."
    change = "Compute log-probs and their differences in float32."
    return Finding(ROUNDED, sentence, change, nearest.name, nearest.kind, ["low precision"])


def explain(measured: Measured, loss: Callable, how: str, eos_trained: bool) -> Finding | None:
    """Return the first explanation that fits exactly, the simplest first, or None."""
    found = (
        explain_nothing(measured)
        or explain_exact(measured)
        or explain_prefixes(measured)
        or explain_pairs(measured, both_positive=True)
        or explain_lengths(measured)
        or explain_mistakes(measured)
        or explain_pairs(measured, both_positive=False)
        or explain_discount(measured)
    )
    if not found and not eos_trained:
        found = explain_eos(measured)
    if not found:
        found = explain_shift(measured, loss, how) or explain_temperature(measured, loss, how)
    return found


# -------------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Report:
    """All that was measured. `print` shows it in lines; the docstring of this file says what each means."""

    finding: Finding
    fits: list[Fit]  # the nearest first
    how: str
    pairs: Fit | None  # in batches of two, for a coupled loss, if it is always finite
    tail_share: float  # of the gradient's length that lies behind the EOS
    eos_trained: bool
    at_teacher: AtTeacher | None
    pay: Pay | None
    asymmetry: float | None
    work: float | None
    older: dict[str, str]  # what older samples do, by how they are used
    noise: float
    noise_of_opd_plus: float

    @property
    def status(self) -> str:
        return self.finding.status

    @property
    def divergence(self) -> str:
        return self.finding.divergence

    @property
    def causes(self) -> list[str]:
        return self.finding.causes

    def fit(self, name: str, kind: str = "each prefix") -> Fit:
        """Return the Fit to one objective."""
        return next(fit for fit in self.fits if (fit.name, fit.kind) == (name, kind))

    def __str__(self) -> str:
        return "\n".join(report_lines(self))


def report_lines(report: Report) -> list[str]:
    """Return the lines of a printed report."""
    lines = [
        f"verdict         {report.status}: {report.finding.sentence}",
        f"change          {report.finding.change}",
        f"batch           {batch_line(report)}",
        f"{'divergence':42}{'cosine':>8}{'bias':>10}{'at best scale':>15}{'scale':>10}",
    ]
    for fit in report.fits:
        if fit.kind == "each prefix" or fit.distance < 0.1:
            label = f"  {fit.name}, {fit.kind}"
            lines.append(f"{label:42}{fit.cosine:8.3f}{fit.bias:10.2g}{fit.distance:15.2g}{fit.scale:10.3g}")
    lines += [
        f"positions       {positions_line(report)}",
        f"at the teacher  {report.at_teacher or NOT_MEASURED}",
        f"pay             {pay_line(report.pay)}",
        f"gradient        {gradient_line(report)}",
    ]
    for use, words in report.older.items():
        lines.append(f"older samples   {use}: {words}")
    lines.append(
        f"noise           {report.noise:.3g}; OPD+ for {report.divergence or 'reverse KL'} has "
        f"{report.noise_of_opd_plus:.3g}"
    )
    return lines


NOT_MEASURED = "not measured: the loss fails or is not finite for responses of one token"


def batch_line(report: Report) -> str:
    if report.how == "mean":
        return "each response counts alone, and the loss is a mean over the batch"
    if report.how == "sum":
        return "each response counts alone, and the loss is a sum over the batch: the step grows with the batch"
    line = "the responses are coupled; measured in the limit of a very large batch"
    if report.pairs:
        return line + f". In batches of two: cosine {report.pairs.cosine:.3f}, off by {report.pairs.distance:.2g}"
    return line + ". In batches of two its gradient is sometimes not finite"


def positions_line(report: Report) -> str:
    eos = "the EOS is trained" if report.eos_trained else "the sampled EOS has NO gradient"
    tail = "the padding is not"
    if report.tail_share > 0:
        tail = f"the padding behind it has {report.tail_share:.0%} of the gradient's length"
    return f"{eos}, {tail}"


def pay_line(pay: Pay | None) -> str:
    if pay is None:
        return NOT_MEASURED
    if not pay.of_u_alone:
        return "depends on more than u"
    falls = pay.falls()
    if not falls:
        return "depends on u alone and never falls, as for every divergence"
    ranges = " and ".join(f"{low:.2g} to {high:.2g}" for low, high in falls)
    return f"depends on u alone and falls where u grows from {ranges}"


def can_be_a_gradient(asymmetry: float | None, work: float | None) -> bool:
    """Return whether the average update at one prefix can be the gradient of a function, as far as it was measured."""
    return asymmetry is not None and asymmetry < 1e-3 and (work is None or work < 0.01)


def gradient_line(report: Report) -> str:
    if report.asymmetry is None:
        return NOT_MEASURED
    line = f"asymmetry {report.asymmetry:.1g}"
    if report.work is not None:
        line += f", work around a loop {report.work:.1g}"
    anything = can_be_a_gradient(report.asymmetry, report.work)
    if anything:
        return f"at one prefix it is one ({line})"
    if report.status == FACTOR:
        return f"the direction is one, but its factor changes with the student ({line})"
    return f"it is the gradient of NOTHING ({line})"


def older_samples(loss: Callable, how: str, measured: Measured, use_ratio: bool) -> str:
    """Return in words what the average gradient is if the older policy samples, beside that on fresh samples."""
    expected = []
    for world in measured.worlds:
        old = world.older if use_ratio else None
        gradients = response_gradients(loss, world, how, old=old, sampler=world.older)
        expected.append(expected_gradient(world, gradients * world.mask.unsqueeze(-1), sampler=world.older))
    fresh = measured.expected()
    largest = max(gradient.norm() for gradient in measured.gradients)
    if max(gradient.norm() for gradient in fresh) < 1e-7 * largest:
        return zero_on_fresh_samples(expected, measured, float(largest))
    fit = compare("fresh", "", expected, fresh)
    if fit.distance < EXACT and fit.one_scale:
        return "sound: the same average gradient as on fresh samples"
    error, _ = fit_prefixes(expected, fresh)
    if error < EXACT:
        return "sound: the same direction at each prefix; the prefixes are those of the older policy"
    errors = [(fit_prefixes(expected, measured.target(d, "one prefix"))[0], d.name) for d in DIVERGENCES]
    error, name = min(errors)
    away = f"cosine {fit.cosine:.3f} with the average gradient on fresh samples"
    near = f"exactly {name} at each prefix" if error < EXACT else f"nearest {name}, off by {error:.2g}"
    return f"BIASED: {away}; {near}"


def zero_on_fresh_samples(expected: list[Tensor], measured: Measured, largest: float) -> str:
    """Return in words what older samples do to a loss whose average gradient on fresh samples is zero."""
    if max(gradient.norm() for gradient in expected) < 1e-7 * largest:
        return "the average gradient is zero, as on fresh samples"
    errors = [(fit_prefixes(expected, measured.target(d, "one prefix"))[0], d.name) for d in DIVERGENCES]
    error, name = min(errors)
    near = f"exactly {name} at each prefix" if error < EXACT else f"nearest {name}, off by {error:.2g}"
    return f"BIASED: the average gradient is zero on fresh samples, and not here; {near}"


def relative_variance(world: World, gradients: Tensor) -> float:
    """Return the variance of one response's gradient (S, R, V) over the squared length of its average."""
    probability = response_probabilities(world, world.student)
    mean = expected_gradient(world, gradients).square().sum()
    second = (probability * gradients.flatten(1).square().sum(1)).sum()
    if mean <= 1e-14 * second:
        return math.inf
    return float(second / mean - 1)


def share_behind_eos(measured: Measured) -> float:
    """Return the share of the gradients' length that lies behind the EOS."""
    behind = 0.0
    total = 0.0
    for world, gradients in zip(measured.worlds, measured.gradients):
        size = gradients.norm(dim=-1)
        behind += float(size[~world.mask].sum())
        total += float(size.sum())
    return behind / max(total, 1e-300)


def trains_eos(measured: Measured) -> bool:
    """Return whether any sampled EOS has a gradient, or nothing has."""
    at_eos = 0.0
    total = 0.0
    for world, gradients in zip(measured.worlds, measured.gradients):
        size = gradients.norm(dim=-1) * world.mask
        at_eos += float(size[world.tokens == EOS].sum())
        total += float(size.sum())
    return at_eos > 1e-9 * total or total == 0


def measure_all(loss: Callable, worlds: list[World], how: str) -> Measured:
    """Return the loss's gradients in all worlds, and the gradients of the divergences."""
    gradients = [response_gradients(loss, world, how) for world in worlds]
    targets = {d.name: [divergence_gradients(world, d) for world in worlds] for d in DIVERGENCES}
    return Measured(worlds, gradients, targets)


def verdict(finding: Finding, tail_share: float, eos_trained: bool, meant: str | None) -> Finding:
    """Return the finding with what the positions and the user's intention add to it."""
    if tail_share > 0:
        sentence = f"The padding behind the EOS is trained too. At the real tokens: {finding.sentence}"
        change = "Multiply by the mask."
        if finding.status not in (RIGHT, FACTOR):
            change += f" And: {finding.change}"
        finding = replace(finding, status=WRONG, sentence=sentence, change=change, causes=[*finding.causes, "padding"])
    if not eos_trained and "EOS" not in finding.causes:
        sentence = f"{finding.sentence} The sampled EOS has no gradient."
        change = f"Let the mask include the first EOS. {finding.change}"
        finding = replace(finding, sentence=sentence, change=change, causes=[*finding.causes, "EOS"])
    if meant and finding.divergence != meant and finding.status in (RIGHT, FACTOR, REWEIGHTED):
        sentence = f"You meant {meant}. {finding.sentence}"
        change = f"For {meant}: {pay_instead(meant)}."
        finding = replace(
            finding, status=WRONG, sentence=sentence, change=change, causes=[*finding.causes, "not meant"]
        )
    return finding


def check(loss: Callable, meant: str | None = None) -> Report:
    """Return the Report on a loss.

    loss   (student_logp, teacher_logp, tokens, mask) → scalar, as this file's docstring says; it may take old_logp
    meant  the name of the divergence that you want, as in DIVERGENCES; then an exact gradient of another one is wrong

    Raises ValueError if the loss returns no scalar, is random, is not finite, or depends on the order of the responses.
    """
    names = [divergence.name for divergence in DIVERGENCES]
    if meant is not None and meant not in names:
        raise ValueError(f"unknown divergence {meant!r}; choose from {', '.join(names)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: more threads only cost time
    try:
        return measure_and_explain(loss, meant)
    finally:
        torch.set_num_threads(threads)


def measure_and_explain(loss: Callable, meant: str | None) -> Report:
    """Return the Report on a loss; see `check`."""
    worlds = [make_world(seed) for seed in SEEDS]
    how = how_it_batches(loss, worlds[0])
    measured = measure_all(loss, worlds, how)
    tail_share = share_behind_eos(measured)
    eos_trained = trains_eos(measured)
    pay = if_possible(measure_pay, loss, how)
    at_teacher = if_possible(look_at_teacher, loss, how)
    asymmetry = if_possible(jacobian_asymmetry, loss, how)
    work = if_possible(loop_work, loss, how)
    fits = all_fits(measured)
    nearest_fit = next(fit for fit in fits if fit.kind == "each prefix")
    if nearest_fit.distance > EXACT and nearest_fit.distance < 0.03 and has_low_precision(loss, worlds[0]):
        finding = explain_rounding(nearest_fit)
    else:
        finding = explain(measured, loss, how, eos_trained)
    if not finding:
        finding = explain_pay(pay, nearest_fit, can_be_a_gradient(asymmetry, work), at_teacher)

    kind = finding.kind
    nearest = next(d for d in DIVERGENCES if d.name == (finding.divergence or "reverse KL"))
    opd_plus = advantage_gradients(worlds[0], opd_plus_advantages(worlds[0], nearest, kind))
    pairs = None
    if how == "coupled":
        small = make_world(SEEDS[0], horizon=2)
        target = divergence_gradients(small, nearest)[kind]
        of_pairs = gradient_of_pairs(loss, small)
        if of_pairs.isfinite().all():
            pairs = compare(nearest.name, kind, [of_pairs], [target])
    older = {"without a ratio": older_samples(loss, how, measured, use_ratio=False)}
    if accepts_old_logp(loss):
        older["with your ratio"] = older_samples(loss, how, measured, use_ratio=True)
    return Report(
        finding=verdict(finding, tail_share, eos_trained, meant),
        fits=fits,
        how=how,
        pairs=pairs,
        tail_share=tail_share,
        eos_trained=eos_trained,
        at_teacher=at_teacher,
        pay=pay,
        asymmetry=asymmetry,
        work=work,
        older=older,
        noise=relative_variance(worlds[0], measured.gradients[0]),
        noise_of_opd_plus=relative_variance(worlds[0], opd_plus),
    )


# ------------------------------------------------------------------------------------------------------- the adapters


def from_logits(loss: Callable) -> Callable:
    """Adapt loss(student_logits, teacher_logits, tokens, mask)."""

    def adapted(student_logp, teacher_logp, tokens, mask):
        return loss(student_logp, teacher_logp, tokens, mask)  # log-probs are logits: softmax returns them unchanged

    return adapted


def from_sampled(loss: Callable) -> Callable:
    """Adapt loss(logp, teacher_logp, mask), which takes the log-probs (B, R) of the sampled tokens only."""

    def adapted(student_logp, teacher_logp, tokens, mask):
        return loss(at_tokens(student_logp, tokens), at_tokens(teacher_logp, tokens), mask)

    return adapted


def from_labels(loss: Callable) -> Callable:
    """Adapt loss(student_logits, teacher_logits, labels) with labels (B, R) that are −100 where nothing counts."""

    def adapted(student_logp, teacher_logp, tokens, mask):
        labels = tokens.masked_fill(~mask, -100)
        return loss(student_logp, teacher_logp, labels)

    return adapted


def from_shifting_labels(loss: Callable) -> Callable:
    """Adapt the same for a loss that compares logits[:, :-1] with labels[:, 1:] by itself."""

    def adapted(student_logp, teacher_logp, tokens, mask):
        labels = torch.nn.functional.pad(tokens.masked_fill(~mask, -100), (1, 0), value=-100)
        one_more = (0, 0, 0, 1)  # a last position, which predicts nothing
        return loss(*(torch.nn.functional.pad(logp, one_more) for logp in (student_logp, teacher_logp)), labels)

    return adapted


def from_token_mean(loss: Callable) -> Callable:
    """Adapt a loss that is a mean over all tokens of the batch: undo its divisor, to see what else there is."""

    def adapted(student_logp, teacher_logp, tokens, mask):
        return loss(student_logp, teacher_logp, tokens, mask) * mask.sum() / len(mask)

    return adapted


# --------------------------------------------------------------------------------------------------- the demonstration


def opd_jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """OPD: pay −f(u) of the Jensen–Shannon divergence with the gradient stopped."""
    logp = at_tokens(student_logp, tokens)
    x = (at_tokens(teacher_logp, tokens) - logp).detach()
    u = x.exp()
    f = 0.5 * (u * x - (1 + u) * torch.log((1 + u) / 2))
    return -(-f * logp * mask).sum() / len(tokens)


def opd_plus_jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """OPD+: pay w_f(u) = ½ log((1 + u) / 2)."""
    logp = at_tokens(student_logp, tokens)
    u = (at_tokens(teacher_logp, tokens) - logp).detach().exp()
    pay = 0.5 * torch.log((1 + u) / 2)
    return -(pay * logp * mask).sum() / len(tokens)


def k3_as_a_loss(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """The k3 estimator of reverse KL, differentiated as it stands, as a mean over all tokens."""
    x = at_tokens(teacher_logp, tokens) - at_tokens(student_logp, tokens)
    k3 = x.exp() - 1 - x
    return (k3 * mask).sum() / mask.sum()


def main() -> None:
    """Run the demonstration."""
    for loss in (opd_jensen_shannon, opd_plus_jensen_shannon, k3_as_a_loss):
        print(f"=== {loss.__name__}: {loss.__doc__}")
        print(check(loss))
        print()


if __name__ == "__main__":
    main()
