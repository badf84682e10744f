"""Where a wrong response first goes wrong, what each of its tokens is worth, and how much of the blame falls there."""

import os

import numpy as np
import torch
from torch import Tensor

from nano_opd import arithmetic, rlsd
from nano_opd.arithmetic import rewards
from nano_opd.checks import require_batch
from nano_opd.gpt import GPT
from nano_opd.rollout import Rollout, sample


def first_wrong_token(problem: arithmetic.Problem, response: str) -> int | None:
    """Index of the first token that departs from the worked solution, its EOS included; None where none does."""
    expected = arithmetic.solution(problem)
    if response == expected:
        return None
    return len(os.path.commonprefix([expected, response]))


def token_credit(advantage: Tensor, mask: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a response's credit or blame |Â| falls on one token, such as the first wrong one.

    advantage  (B, R) Â_n
    mask       (B, R) bool
    token      (B,) int64, a position where mask is True

    Returns two tensors (B,): |Â| there divided by the mean |Â| of the response's other tokens, and the probability that
    it ranks first, ties broken at random. An advantage that is equal everywhere gives 1 and 1/length.
    Raises ValueError for a token outside the mask, a response of one token, or shapes that differ.
    """
    require_batch(mask, advantage=advantage)
    index = token.unsqueeze(1)  # (B, 1)
    length = mask.sum(1)
    if not mask.gather(1, index).all() or (length < 2).any():
        raise ValueError("token must lie inside a response of at least two tokens")
    size = advantage.abs().masked_fill(~mask, 0.0)
    own = size.gather(1, index).squeeze(1)
    mean_of_others = (size.sum(1) - own) / (length - 1)
    ratio = torch.where(size.sum(1) == 0, 1.0, own / mean_of_others)
    largest = (size == size.amax(1, keepdim=True)) & mask
    ranks_first = largest.gather(1, index).squeeze(1) / largest.sum(1)
    return ratio, ranks_first


def success_rate(rewards: Tensor, group_size: int) -> Tensor:
    """How much of each response's group is right, (B,), kept half a response away from 0 and 1."""
    half_a_response = 0.5 / group_size
    rate = rewards.view(-1, group_size).mean(1).clamp(half_a_response, 1 - half_a_response)
    return rate.repeat_interleave(group_size)


KINDS = ("operand", "separator", "carry", "digit", "answer")


def kinds(digits: int, length: int) -> list[str]:
    """What stands at each position of a response in the worked solution's layout; after its end, "separator"."""
    column = ["operand", "separator", "operand", "separator", "carry", "digit", "separator"]
    layout = column * digits + ["separator"] + ["answer"] * (digits + 1)
    return (layout + ["separator"] * length)[:length]


@torch.no_grad()
def monte_carlo_values(
    model: GPT,
    problems: list[arithmetic.Problem],
    rollout: Rollout,
    samples: int,
    generator: torch.Generator,
    sure: float = 0.99,
) -> tuple[Tensor, Tensor]:
    """V(s_1) … V(s_R), R(y) along every response, (B, R+1), and standard errors: the token's advantage is V.diff().

    V is the mean reward of K = `samples` ≥ 2 continuations by the student (VinePPO, arXiv 2410.01679, at every token in
    the place of every step). Its standard error is 0 where all K agree. A prefix that several responses share is
    continued once. After a token with p(y_n|s_n) ≥ `sure` V is kept, since |A_n| ≤ 1 − p. After the EOS V is R(y).
    """
    R = rollout.mask.shape[1]
    final = rewards(problems, rollout)
    V = final.unsqueeze(1).repeat(1, R + 1)  # (B, R+1)
    error = torch.zeros_like(V)
    for n in range(R):
        if n == 0:
            moved = torch.ones_like(rollout.mask[:, 0])  # nothing is known yet
        else:
            moved = rollout.logp[:, n - 1].exp() < sure
        kept = rollout.mask[:, n] & ~moved
        V[kept, n] = V[kept, n - 1]
        error[kept, n] = error[kept, n - 1]
        rows = (rollout.mask[:, n] & moved).nonzero().squeeze(1)
        if len(rows):
            V[rows, n], error[rows, n] = _continued(model, problems, rollout, rows, n, samples, generator)
    return V, error


def _continued(
    model: GPT,
    problems: list[arithmetic.Problem],
    rollout: Rollout,
    rows: Tensor,
    n: int,
    samples: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """V before token n of these rows, (len(rows),), and standard errors, from continuations of every prefix."""
    R = rollout.mask.shape[1]
    P = rollout.prompt_length
    prefixes, prefix_of_row = rollout.tokens[rows, : P + n].unique(dim=0, return_inverse=True)
    problem_of_prefix = {}
    for row, prefix in zip(rows.tolist(), prefix_of_row.tolist()):
        problem_of_prefix[prefix] = problems[row]
    asked = []
    for prefix in range(len(prefixes)):
        asked += [problem_of_prefix[prefix]] * samples
    more = sample(model, prefixes.repeat_interleave(samples, 0), R - n, generator)
    mask_of_prefix = torch.ones(len(asked), n, dtype=torch.bool)
    whole = Rollout(more.tokens, P, torch.cat([mask_of_prefix, more.mask], 1), more.logp)
    right = rewards(asked, whole).view(-1, samples).mean(1)  # of each prefix
    error = (right * (1 - right) / (samples - 1)).sqrt()
    return right[prefix_of_row], error[prefix_of_row]


def correlation(x: Tensor, y: Tensor, cluster: Tensor, resamples: int = 2000) -> tuple[float, float, float]:
    """Pearson's r of x and y (N,) and its 95 % interval: bootstrap over clusters (N,) int64, the problems.

    Tokens of one problem are no independent samples, so whole problems are drawn. NaN where x or y does not vary.
    """
    x = x.double()
    y = y.double()
    terms = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], 1)  # (N, 6)
    sums = terms.new_zeros(int(cluster.max()) + 1, 6).index_add(0, cluster, terms)
    sums = sums[sums[:, 0] > 0]
    equally = np.full(len(sums), 1 / len(sums))
    drawn = np.random.default_rng(0).multinomial(len(sums), equally, resamples)
    drawn = np.vstack([np.ones(len(sums)), drawn])  # the first is the sample itself
    n, sum_x, sum_y, sum_xx, sum_yy, sum_xy = (drawn @ sums.numpy()).T
    with np.errstate(invalid="ignore"):
        r = (n * sum_xy - sum_x * sum_y) / np.sqrt((n * sum_xx - sum_x**2) * (n * sum_yy - sum_y**2))
    low, high = np.nanpercentile(r[1:], [2.5, 97.5])
    return float(r[0]), float(low), float(high)


# Relatives of RLSD, to be compared with it. Their formulas were read in notes on the papers that quote the equations,
# and RLCSD's in a port besides; the papers themselves were not at hand.


def reversed_on_right(
    A: Tensor, teacher_logp: Tensor, student_logp: Tensor, mask: Tensor, lam: float, eps_w: float
) -> Tensor:
    """RLRT, arXiv 2605.10781: in right responses tokens that the teacher finds less likely get more credit.

    w_n = P_S/P_T where A > 0, else 1. Arguments as rlsd.advantage.
    """
    teacher_logp = teacher_logp.clamp(min=-80)  # a forbidden token too
    exchanged = rlsd.advantage(A, student_logp, teacher_logp, mask, lam, eps_w)
    plain = torch.where(mask, A[:, None], 0.0)
    return torch.where(A[:, None] > 0, exchanged, plain)


def added_contrast(
    A: Tensor, right_logp: Tensor, wrong_logp: Tensor, mask: Tensor, lam: float = 0.5, tau: float = 1.3
) -> Tensor:
    """RLCSD, arXiv 2606.11709: Â_n = A + λ tanh(log(P_T⁺/P_T⁻)/τ), never beyond 0; without its second token path.

    right_logp, wrong_logp  (B, R) of the self-teacher that reads a right and a wrong hint

    CEPO, arXiv 2605.19436, puts the same contrast in RLSD's bracket: rlsd.advantage(A, right_logp, wrong_logp, …).
    """
    A = A[:, None]
    pushed = A + lam * torch.tanh((right_logp - wrong_logp) / tau)
    pushed = torch.where(A > 0, pushed.clamp(min=0), pushed.clamp(max=0))
    return torch.where(mask & (A != 0), pushed, 0.0)


def running_advantage(log_w: Tensor, start: Tensor) -> Tensor:
    """OPPO, arXiv 2605.21851: V_n = σ(logit V_1 + Σ_{m<n} log w_m), and A_n = V_{n+1} − V_n, (B, R).

    log_w  (B, R) evidence of each token in nats, 0 where there is none
    start  (B,) V_1 in (0, 1), the success rate of the prompt

    Exact where w is q(y_n| right)/q(y_n| wrong). Against the student in the place of the wrong, as in OPPO, it is not.
    """
    evidence = torch.cat([torch.zeros_like(log_w[:, :1]), log_w.cumsum(1)], 1)  # (B, R+1)
    return (torch.logit(start)[:, None] + evidence).sigmoid().diff()
