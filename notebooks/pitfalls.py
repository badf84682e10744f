"""Notebook 02: worlds small enough to enumerate, what measures a loss in them, and the wrong versions themselves.

An estimator is here a function of a world that gives the exact mean and variance of a loss's gradient (exact.moments),
and a goal is a function of a world that gives the gradient that was meant.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from lab import field
from torch import Tensor

from nano_opd import divergences, exact, gkd, grpo, opd, opdplus, policy_gradient, rlsd
from nano_opd.divergences import Divergence
from nano_opd.exact.enumeration import Moments, World
from nano_opd.policy_gradient import logprobs_of

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (tokens, mask, student logits, teacher logits) → scalar
Advantage = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (log u, mask, student logits, teacher logits) → (B, R)
Estimator = Callable[[World], Moments]
Goal = Callable[[World], Tensor]

COSINE, BIAS, VARIANCE = range(3)  # the columns of what is measured
jsd = divergences.get("jsd")
reverse_kl = divergences.get("reverse_kl")
forward_kl = divergences.get("forward_kl")
hellinger = divergences.get("hellinger")


def make_world(seed: int, V: int = 4, R: int = 3, distance: float = 1.0) -> World:
    """Responses of 1 to R tokens out of V, the last of which is EOS; a teacher, and a student `distance` nats away."""
    policy, teacher_table = exact.random_tabular(V, R, seed, scale=1.5)
    _, noise = exact.random_tabular(V, R, seed + 1)
    student_table = teacher_table + distance * noise
    return World.of((policy, student_table), (policy, teacher_table), V, R, V - 1)


def measure(world: World, estimator: Estimator, goal: Goal) -> list[float]:
    """Cosine of the mean with the gradient (NaN below 1 % of its length), relative bias, variance / ‖gradient‖²."""
    moments = estimator(world)
    gradient = goal(world)
    cosine = math.nan
    if moments.mean.norm() > 0.01 * gradient.norm():
        cosine = float((moments.mean * gradient).sum() / moments.mean.norm() / gradient.norm())
    bias = float((moments.mean - gradient).norm() / gradient.norm())
    variance = float(moments.variance / gradient.square().sum())
    return [cosine, bias, variance]


def is_biased(measured: Tensor) -> bool:
    """Whether what was measured, (worlds, 3), has a bias in every world."""
    return bool((measured[:, BIAS] > 1e-3).all())


class Museum:
    """The mistakes measured so far, by name: (worlds, 3) numbers each. The first world is that of the text."""

    def __init__(self, distance: float, others: int):
        seeds = range(100, 100 + 2 * others, 2)
        self.worlds = [make_world(12, 5, 4, distance)]
        self.worlds += [make_world(seed, 4, 3, distance) for seed in seeds]
        self.near = [make_world(12, 5, 4, distance / 10)]
        self.near += [make_world(seed, 4, 3, distance / 10) for seed in seeds]
        self.small = [make_world(12, 3, 2, distance)]  # for what couples two responses
        self.small += [make_world(seed, 3, 2, distance) for seed in seeds]
        self.rows: dict[str, Tensor] = {}

    def measure(self, estimator: Estimator, goal: Goal, worlds: list[World] | None = None) -> Tensor:
        """Measure in every world, (worlds, 3)."""
        if worlds is None:
            worlds = self.worlds
        return torch.tensor([measure(world, estimator, goal) for world in worlds], dtype=torch.float64)

    def show(self, name: str, estimator: Estimator, goal: Goal, worlds: list[World] | None = None) -> Tensor:
        """Measure in every world, (worlds, 3), and print a line about the first."""
        measured = self.measure(estimator, goal, worlds)
        cosine, bias, variance = measured[0].tolist()
        if math.isnan(cosine):
            way = f"{'nowhere':22s}"
        elif cosine < 0:
            way = f"uphill   cosine {cosine:6.3f}"
        else:
            way = f"downhill cosine {cosine:6.3f}"
        others = measured[1:]
        uphill = f"uphill in {(others[:, COSINE] < 0).sum():2d} of {len(others)} others"
        print(f"{name:36s} {way}  bias {bias:7.2g}  variance {variance:7.2g}  {uphill}")
        return measured

    def add(self, name: str, estimator: Estimator, goal: Goal, worlds: list[World] | None = None) -> Tensor:
        """Measure in every world, print a line about the first, and keep the numbers for the figure."""
        self.rows[name] = self.show(name, estimator, goal, worlds)
        return self.rows[name]

    def is_unbiased(self, estimator: Estimator, goal: Goal) -> bool:
        """Whether it has no bias in any world."""
        return bool((self.measure(estimator, goal)[:, BIAS] < 1e-9).all())


# ------------------------------------------------------------------------------------------------------ the vocabulary


def estimator_from_loss(loss: Loss) -> Estimator:
    """Return the estimator that differentiates this loss."""

    def estimator(world: World) -> Moments:
        return exact.moments(world, loss)

    return estimator


def estimator_from_advantage(advantage: Advantage, normalize: str = "batch") -> Estimator:
    """Return the score-function estimator with this advantage."""
    return estimator_from_loss(exact.sampled(advantage, normalize))


def opd_advantage(divergence: Divergence) -> Advantage:
    """Return OPD's advantage."""

    def advantage(log_u, mask, student_logits, teacher_logits):
        return opd.advantage(log_u, mask, divergence)

    return advantage


def opdplus_advantage(divergence: Divergence, gamma: float = 0.0) -> Advantage:
    """Return OPD+'s advantage."""

    def advantage(log_u, mask, student_logits, teacher_logits):
        return opdplus.advantage(log_u, mask, divergence, gamma)

    return advantage


def full_vocabulary(divergence: Divergence) -> Estimator:
    """Return the estimator that differentiates the divergence over the whole vocabulary."""

    def loss(tokens, mask, student_logits, teacher_logits):
        return gkd.loss(student_logits, teacher_logits, mask, divergence)

    return estimator_from_loss(loss)


def exact_gradient(divergence: Divergence, kind: str = "prefix") -> Goal:
    """Return the goal: the exact gradient of an objective."""

    def goal(world: World) -> Tensor:
        return exact.gradient(world, divergence, kind)

    return goal


def same_length(estimator: Estimator, goal: Goal) -> Estimator:
    """Bring its mean to the gradient's length, where only the direction is to be compared."""

    def scaled(world: World) -> Moments:
        moments = estimator(world)
        scale = goal(world).norm() / moments.mean.norm()
        return Moments(scale * moments.mean, scale**2 * moments.variance)

    return scaled


# ------------------------------------------------------------------------------------------------ what is detached: 1


def f_times_logp(detach_f: bool, add_f: bool = False, divergence: Divergence = jsd) -> Loss:
    """Return the loss sg(f) ln p, f ln p or sg(f) ln p + f of every sampled token."""

    def loss(tokens, mask, student_logits, teacher_logits):
        logp = logprobs_of(tokens, student_logits)
        f = divergence.f(logprobs_of(tokens, teacher_logits) - logp)
        if detach_f:
            terms = f.detach() * logp  # drops ∇f
        else:
            terms = f * logp
        if add_f:
            terms = terms + f
        return policy_gradient.reduce(terms, mask)

    return loss


# --------------------------------------------------------------------------------------------- older samples: 2 and 9


def older_parameters(world: World) -> Tensor:
    """The parameters that sampled, half a nat away from those of now."""
    noise = torch.randn(world.theta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return world.theta + 0.5 * noise


def moments_on_older_samples(world: World, loss: Loss) -> Moments:
    """The mean and variance of a loss's gradient when the older parameters have sampled."""
    return exact.moments(world, loss, probability=world.probability(older_parameters(world)))


def log_ratio(world: World, tokens: Tensor, mask: Tensor, logp: Tensor) -> Tensor:
    """log ρ of each token, (B, R): its log-prob now minus that under the older parameters; 0 where mask is False."""
    older_logits = world.student(older_parameters(world), tokens)
    return torch.where(mask, logp - logprobs_of(tokens, older_logits), 0.0)


KS = {"k1": lambda x: -x, "k2": lambda x: x**2 / 2, "k3": lambda x: torch.expm1(x) - x}  # of x = log u


def k_as_reward(k: Callable[[Tensor], Tensor]) -> Estimator:
    """Return the score-function estimator whose advantage is −k(log u)."""

    def advantage(log_u, mask, student_logits, teacher_logits):
        return torch.where(mask, -k(log_u), 0.0).detach()  # drops ∇k

    return estimator_from_advantage(advantage)


def k_as_loss(k: Callable[[Tensor], Tensor]) -> Estimator:
    """Return the estimator that differentiates k(log u) through the sampled token."""

    def loss(tokens, mask, student_logits, teacher_logits):
        logp = logprobs_of(tokens, student_logits)
        return policy_gradient.reduce(k(logprobs_of(tokens, teacher_logits) - logp), mask)

    return estimator_from_loss(loss)


def k_as_loss_on_older_samples(k: Callable[[Tensor], Tensor], ratio: str) -> Estimator:
    """Return the same on older samples.

    ratio  "none": k is not weighted; "detached": by the token's own ratio ρ, detached; "differentiated": by ρ, through
           which the gradient passes too. Both are multiplied by the detached ratios of the tokens before.
    """

    def estimator(world: World) -> Moments:
        def loss(tokens, mask, student_logits, teacher_logits):
            logp = logprobs_of(tokens, student_logits)
            terms = k(logprobs_of(tokens, teacher_logits) - logp)
            if ratio == "none":
                return policy_gradient.reduce(terms, mask)
            own = log_ratio(world, tokens, mask, logp)
            before = (own.cumsum(1) - own).detach()  # drops how the prefixes move
            if ratio == "detached":
                own = own.detach()  # drops k ∇ρ
            return policy_gradient.reduce((own + before).exp() * terms, mask)

        return moments_on_older_samples(world, loss)

    return estimator


def importance_weighted(
    advantage: Advantage, log_weight: Callable[[Tensor], Tensor], largest: float = math.inf
) -> Estimator:
    """Return the score-function estimator on older samples: the advantage times importance weights up to `largest`.

    log_weight  makes their logarithm from log ρ, (B, R) → (B, R)
    """

    def estimator(world: World) -> Moments:
        def loss(tokens, mask, student_logits, teacher_logits):
            logp = logprobs_of(tokens, student_logits)
            log_u = logprobs_of(tokens, teacher_logits) - logp
            weight = log_weight(log_ratio(world, tokens, mask, logp)).detach()  # a weight: no gradient
            A = advantage(log_u, mask, student_logits, teacher_logits)
            return policy_gradient.loss(logp, weight.exp().clamp(max=largest) * A, mask)

        return moments_on_older_samples(world, loss)

    return estimator


# ------------------------------------------------------------------------------ sums over part of the vocabulary: 4, 5
# Each is a number of every prefix, (S, R), made from the logits (S, R, V) of student and teacher.

OfPrefix = Callable[[Tensor, Tensor], Tensor]


def mean_and_share_below_zero(number: OfPrefix, world: World) -> tuple[float, float]:
    """The mean over the prefixes that the student visits, and the share of them where the number is below 0."""
    numbers = number(world.student(world.theta, world.tokens), world.teacher_logits)
    visits = world.probability()[:, None] * world.mask
    share = visits / visits.sum()
    return (share * numbers).sum().item(), share[numbers < 0].sum().item()


def estimator_of_prefixes(number: OfPrefix) -> Estimator:
    """Return the estimator that differentiates the number of every prefix, summed over a response."""

    def loss(tokens, mask, student_logits, teacher_logits):
        return policy_gradient.reduce(number(student_logits, teacher_logits), mask)

    return estimator_from_loss(loss)


def kl_of_prefix(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p‖q)."""
    logp = student_logits.log_softmax(-1)
    logq = teacher_logits.log_softmax(-1)
    return (student_logits.softmax(-1) * (logp - logq)).sum(-1)


def kl_with_clipped_terms(student_logits: Tensor, teacher_logits: Tensor, bound: float = 0.05) -> Tensor:
    """Σ_v min(p ln(p/q), bound)."""
    logp = student_logits.log_softmax(-1)
    logq = teacher_logits.log_softmax(-1)
    return (logp.exp() * (logp - logq)).clamp(max=bound).sum(-1)


def jsd_computed_in(dtype: torch.dtype) -> OfPrefix:
    """Return ½ KL(p‖m) + ½ KL(q‖m), m = (p + q)/2, as it is usually written."""

    def jsd_of_prefix(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        logp = student_logits.to(dtype).log_softmax(-1)
        logq = teacher_logits.to(dtype).log_softmax(-1)
        logm = ((logp.exp() + logq.exp()) / 2).log()
        return ((logp.exp() * (logp - logm) + logq.exp() * (logq - logm)) / 2).sum(-1).double()

    return jsd_of_prefix


def kl_over_top_k(whose: str, tail: str = "", k: int = 2) -> OfPrefix:
    """Return Σ p ln(p/q) over the k likeliest tokens of "student" or "teacher".

    tail  "": the others are left out; "bucket": they are one more token; "−p + q" is added to each term
    """

    def kl_of_top(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if whose == "student":
            top = student_logits.topk(k).indices
        else:
            top = teacher_logits.topk(k).indices
        logp = student_logits.log_softmax(-1).gather(-1, top)
        logq = teacher_logits.log_softmax(-1).gather(-1, top)
        if tail == "bucket":
            logp = with_bucket(logp)
            logq = with_bucket(logq)
        terms = logp.exp() * (logp - logq)
        if tail == "−p + q":
            terms = terms + (logq.exp() - logp.exp())
        return terms.sum(-1)

    return kl_of_top


def with_bucket(top_logp: Tensor) -> Tensor:
    """Append the log of the probability that the top k leave to all other tokens, (…, k) → (…, k+1)."""
    rest = torch.log1p(-top_logp.exp().sum(-1, keepdim=True))
    return torch.cat([top_logp, rest], -1)


# --------------------------------------------------------------------------------------- who samples, who scores: 9, 10

ChangeOfLogits = Callable[[Tensor], Tensor]


def keep_top_k(logits: Tensor, k: int = 2) -> Tensor:
    """−∞ for the tokens that sampling from the k likeliest leaves out."""
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(logits: Tensor, keep: float = 0.8) -> Tensor:
    """−∞ for the tokens that nucleus sampling leaves out."""
    prob, order = logits.softmax(-1).sort(-1, descending=True)
    left_out = prob.cumsum(-1) - prob >= keep
    left_out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, left_out)
    return logits.masked_fill(left_out, -torch.inf)


def sampling_world(world: World, change: ChangeOfLogits) -> World:
    """The world whose student samples from changed logits."""
    logits = change(world.student(world.theta, world.tokens))
    return replace(world, student=lambda theta, tokens: logits)


def ratio_and_kept_mass(world: World, truncate: ChangeOfLogits) -> tuple[Tensor, Tensor, Tensor]:
    """For each token (N,) that can be sampled from truncated logits: the full softmax over the sampler's probability,
    the mass that the truncation keeps at its prefix, and the token's share of all that is sampled."""
    logits = world.student(world.theta, world.tokens)
    truncated = truncate(logits)
    visits = sampling_world(world, truncate).probability()[:, None] * world.mask
    drawn = visits > 0
    ratio = (logprobs_of(world.tokens, logits) - logprobs_of(world.tokens, truncated)).exp()
    kept = torch.where(truncated > -torch.inf, logits.softmax(-1), 0.0).sum(-1)
    return ratio[drawn], kept[drawn], visits[drawn] / visits.sum()


def sampled_from(change: ChangeOfLogits, advantage: Advantage) -> Estimator:
    """Return the estimator that samples from changed logits, and scores with the full softmax."""

    def estimator(world: World) -> Moments:
        drawn_with = sampling_world(world, change).probability()
        return exact.moments(world, exact.sampled(advantage), probability=drawn_with)

    return estimator


def taught_by(change: ChangeOfLogits, advantage: Advantage) -> Estimator:
    """Return the estimator to which the teacher's logits come changed."""

    def estimator(world: World) -> Moments:
        changed = replace(world, teacher_logits=change(world.teacher_logits))
        return exact.moments(changed, exact.sampled(advantage))

    return estimator


def with_noise(teacher_logits: Tensor) -> Tensor:
    """A teacher whose dropout is on."""
    noise = torch.randn(teacher_logits.shape, generator=torch.Generator().manual_seed(0))
    return teacher_logits + noise.double()


def with_another_eos(teacher_logits: Tensor) -> Tensor:
    """A teacher that ends with token 0."""
    last = teacher_logits.shape[-1] - 1
    order = [last, *range(1, last), 0]
    return teacher_logits[..., order]


TEACHERS = {
    "shifted by one": lambda teacher_logits: teacher_logits.roll(1, dims=1),
    "at temperature 2": lambda teacher_logits: teacher_logits / 2,
    "with another tokenizer": lambda teacher_logits: teacher_logits.roll(1, dims=-1),
    "with noise (dropout)": with_noise,
    "with another EOS": with_another_eos,
    "uniform (all zeros)": torch.zeros_like,
}


# ------------------------------------------------------------------------------------------------------ the one table


@dataclass(frozen=True)
class Pitfall:
    """A row: what one sees or types, the mistake, its mend, the thread, and what the table measures."""

    sees: str
    name: str
    mend: str
    thread: str
    estimator: Estimator
    goal: Goal
    small: bool = False  # whether it couples two responses


def wrong_sign(log_u, mask, student_logits, teacher_logits):
    """Minus OPD's advantage."""
    return -opd.advantage(log_u, mask, reverse_kl)


def clipped_log_u(log_u, mask, student_logits, teacher_logits):
    """OPD+'s advantage of log u within ± 0.2 nats."""
    return opdplus.advantage(log_u.clamp(-0.2, 0.2), mask, jsd)


def exp_before_the_mask(log_u, mask, student_logits, teacher_logits):
    """An advantage that is computed behind the EOS too."""
    log_u = log_u + 800.0 * ~mask  # behind the EOS it may be anything
    return (forward_kl.w_f(log_u) * mask).detach()  # drops nothing: an advantage is a constant


def bfloat16_sampler(tokens, mask, student_logits, teacher_logits):
    """The loss of OPD+ whose log u takes the student's log-probs from a sampler in bfloat16."""
    logp = logprobs_of(tokens, student_logits)
    cached = logp.detach().bfloat16().double()  # drops nothing: log u is a constant in the advantage
    log_u = logprobs_of(tokens, teacher_logits) - cached
    return policy_gradient.loss(logp, opdplus.advantage(log_u, mask, jsd), mask)


def eos_masked(tokens, mask, student_logits, teacher_logits):
    """The loss of OPD+ on all tokens but the EOS."""
    eos = student_logits.shape[-1] - 1
    loss = exact.sampled(opdplus_advantage(jsd))
    return loss(tokens, mask & (tokens != eos), student_logits, teacher_logits)


def kl_div(first: str) -> Loss:
    """Return F.kl_div with the "student" or the "teacher" as its first argument, the input."""

    def loss(tokens, mask, student_logits, teacher_logits):
        if first == "student":
            terms = F.kl_div(student_logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="none")
        else:
            terms = F.kl_div(teacher_logits.log_softmax(-1), student_logits.softmax(-1), reduction="none")
        return policy_gradient.reduce(terms.sum(-1), mask)

    return loss


# How GRPO's advantage (B,) is shared among the tokens: (A, teacher's log-probs, student's log-probs, mask) → A of each.
TokenCredit = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def equal_credit(A: Tensor, teacher_logp: Tensor, student_logp: Tensor, mask: Tensor) -> Tensor:
    """GRPO: every token of a response has its advantage."""
    return A


def has_even_sum(tokens: Tensor) -> Tensor:
    """The verifier: (B, R) → (B,) bool."""
    return tokens.sum(1) % 2 == 0


def nothing_is_right(tokens: Tensor) -> Tensor:
    """A verifier that accepts no response, (B, R) → (B,) bool."""
    return tokens.sum(1) < 0


def grpo_estimator(
    credit: TokenCredit = equal_credit, verifier: Callable[[Tensor], Tensor] = has_even_sum
) -> Estimator:
    """Return GRPO's first update with groups of two."""

    def loss(tokens, mask, student_logits, teacher_logits):
        A = grpo.advantage(verifier(tokens).double(), group_size=2, normalize_std=False)
        logp = logprobs_of(tokens, student_logits)
        A = credit(A, logprobs_of(tokens, teacher_logits), logp, mask)
        return grpo.clipped_surrogate(logp, logp.detach(), A, mask, clip_low=0.2, clip_high=0.28)

    def estimator(world: World) -> Moments:
        return exact.moments(world, loss, batch_size=2)

    return estimator


def grpo_mean(world: World) -> Tensor:
    """The goal: the mean of GRPO where a right answer has an even sum."""
    return grpo_estimator()(world).mean


def rlsd_estimator(eps_w: float) -> Estimator:
    """Return RLSD at λ = 1, at the length of GRPO's mean."""

    def credit(A: Tensor, teacher_logp: Tensor, student_logp: Tensor, mask: Tensor) -> Tensor:
        return rlsd.advantage(A, teacher_logp, student_logp, mask, lam=1.0, eps_w=eps_w)

    return same_length(grpo_estimator(credit), grpo_mean)


OTHER_PITFALLS = [
    Pitfall(
        sees="KL rises from the first step",
        name="wrong sign",
        mend="teacher_logp − student_logp is the advantage",
        thread="a control, the end of the scale",
        estimator=estimator_from_advantage(wrong_sign),
        goal=exact_gradient(reverse_kl),
    ),
    Pitfall(
        sees="F.kl_div argument order: forward or reverse KL?",
        name="F.kl_div(student, teacher) for reverse KL",
        mend="F.kl_div(a, b) is KL(b‖a)",
        thread="huggingface/trl#4935, modelscope/twinkle#112, idanshen/Self-Distillation#5",
        estimator=estimator_from_loss(kl_div("student")),
        goal=exact_gradient(reverse_kl),
    ),
    Pitfall(
        sees="any f-divergence as a reward collapses",
        name="OPD, squared Hellinger",
        mend="OPD+, or reverse KL",
        thread="derived here",
        estimator=estimator_from_advantage(opd_advantage(hellinger)),
        goal=exact_gradient(hellinger),
    ),
    Pitfall(
        sees="beta near 0 or 1: loss and grad_norm tiny",
        name="JSD(β = 0.999) for reverse KL",
        mend="divide by 1 − β (at the other end by β), or take the KL itself",
        thread="modelscope/ms-swift#10078, verl-project/verl-recipe#151",
        estimator=full_vocabulary(field.generalised_jsd(0.999)),
        goal=exact_gradient(reverse_kl),
    ),
    Pitfall(
        sees="log ratio clamped, small gradients",
        name="log u clipped at ±0.2",
        mend="a bound that rarely acts; log how often",
        thread="opendilab/LightRFT#43 (±20), verl-project/verl#2928",
        estimator=estimator_from_advantage(clipped_log_u),
        goal=exact_gradient(jsd),
    ),
    Pitfall(
        sees="KV cache or bfloat16 changes the log-probs",
        name="the sampler's bfloat16 log-probs",
        mend="score again with the trainer",
        thread="huggingface/transformers#25420, THUDM/slime#714",
        estimator=estimator_from_loss(bfloat16_sampler),
        goal=exact_gradient(jsd),
    ),
    Pitfall(
        sees="loss is NaN with padding",
        name="exp before the mask",
        mend="torch.where(mask, log_u, 0), then exp",
        thread="huggingface/trl#5594",
        estimator=estimator_from_advantage(exp_before_the_mask),
        goal=exact_gradient(forward_kl),
    ),
    Pitfall(
        sees="model never stops; pad_token = eos_token",
        name="PAD = EOS, EOS masked",
        mend="mask by position, first EOS included",
        thread="huggingface/trl#6357",
        estimator=estimator_from_loss(eos_masked),
        goal=exact_gradient(jsd),
    ),
    Pitfall(
        sees="RLSD follows the teacher's style",
        name="RLSD without its clip",
        mend="ε_w = 0.2",
        thread="derived here, for [RLSD](https://arxiv.org/abs/2604.03128)",
        estimator=rlsd_estimator(eps_w=1e9),
        goal=grpo_mean,
        small=True,
    ),
    Pitfall(
        sees="reward_std = 0, loss = 0, grad_norm = 0",
        name="GRPO, all rewards of a group equal",
        mend="log their share (`zero_groups`)",
        thread="huggingface/trl#3857, huggingface/trl#3502, radixark/miles#1034",
        estimator=grpo_estimator(verifier=nothing_is_right),
        goal=grpo_mean,
        small=True,
    ),
]
