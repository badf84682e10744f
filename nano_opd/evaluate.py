"""Held-out evaluation: accuracy with its interval, pass@k, exact per-token KL and entropy on sampled prefixes.

Of a model that is its own teacher, also how often it cites a reference that it was not shown, and the information gap.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nano_opd import arithmetic, opsd
from nano_opd.arithmetic import prompts_of, response_texts, rewards, slots_of
from nano_opd.gpt import GPT
from nano_opd.policy_gradient import rows_at_once
from nano_opd.rollout import Rollout, response_logits, sample


@torch.no_grad()
def evaluate(
    student: GPT,
    teacher: GPT,
    problems: list[arithmetic.Problem],
    max_new_tokens: int,
    generator: torch.Generator,
    sample: Callable[..., Rollout] = sample,
) -> dict[str, float]:
    """Return what is measured of the student, which answers `problems` at temperature 1 and greedily.

    accuracy, greedy_accuracy   the fraction of right answers
    kl                          E_s KL( p_θ(·|s) ‖ q(·|s) ) over the whole vocabulary at the prefixes s that the student
                                sampled, a mean per sampled token (nats)
    entropy                     E_s H(p_θ(·|s)), the same (nats)
    response_length, truncated  tokens of a sampled response, and the fraction that reached the cap without an EOS

    Where the models read a reference slot (GPTConfig.reference_slot), the student reads a blank one and the teacher a
    reference. Then kl is the mean over all references, and there are two more columns:

    leak_rate                   the fraction of sampled answers that cite what they were not shown
    information_gap             I(Y; R | X, Y_<n) per sampled token, by enumerating the references (nats)

    sample  answers prompts: rollout.sample, or a faster way to do the same

    Raises ValueError when one of the two models reads a reference slot and the other does not.
    """
    reference_slot = student.config.reference_slot
    if teacher.config.reference_slot != reference_slot:
        raise ValueError("student and teacher must both read prompts with a reference slot, or both without one")

    blanks = slots_of(problems, "blank") if reference_slot else None
    prompts = prompts_of(problems, student.device, blanks)
    greedy = sample(student, prompts, max_new_tokens, greedy=True)
    rollout = sample(student, prompts, max_new_tokens, generator)

    columns = {}
    if reference_slot:
        columns["leak_rate"] = leak_rate(rollout)
    columns["accuracy"] = rewards(problems, rollout).mean().item()
    columns["greedy_accuracy"] = rewards(problems, greedy).mean().item()
    for name, of_each_token in measure_tokens(student, teacher, problems, rollout).items():
        columns[name] = of_each_token.mean().item()
    columns["response_length"] = rollout.mask.sum(1).float().mean().item()
    columns["truncated"] = rollout.truncated.float().mean().item()
    return columns


def leak_rate(rollout: Rollout) -> float:
    """Return the fraction of responses that claim to have copied their answer."""
    cited = [arithmetic.cites(text) for text in response_texts(rollout)]
    return sum(cited) / len(cited)


def measure_tokens(
    student: GPT, teacher: GPT, problems: list[arithmetic.Problem], rollout: Rollout
) -> dict[str, Tensor]:
    """Return `measure_prefixes` at the sampled tokens alone, (N,) each.

    A few responses at a time, since what it computes on the way is V times as large.
    """
    at_once = rows_at_once(rollout.mask.shape[1], student.config.vocab_size)
    parts = []
    for first in range(0, len(problems), at_once):
        rows = slice(first, first + at_once)
        measured = measure_prefixes(
            student,
            teacher,
            problems=problems[rows],
            tokens=rollout.tokens[rows],
            prompt_length=rollout.prompt_length,
        )
        mask = rollout.mask[rows]
        parts.append({name: at_prefixes[mask] for name, at_prefixes in measured.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def measure_prefixes(
    student: GPT, teacher: GPT, problems: list[arithmetic.Problem], tokens: Tensor, prompt_length: int
) -> dict[str, Tensor]:
    """Return kl, entropy and, with a reference slot, information_gap before each response token, (B, R) each, in nats.

    tokens (B, P+R), P = prompt_length.
    """
    student_logp = next_token_logp(student, tokens, prompt_length)  # (B, R, V)
    teacher_logp = teacher_logp_of_references(teacher, problems, tokens, prompt_length)  # (K, B, R, V)
    measured = {
        "kl": mean_kl(student_logp, teacher_logp),
        "entropy": entropy(student_logp),
    }
    if teacher.config.reference_slot:
        measured["information_gap"] = opsd.information_gap(teacher_logp)
    return measured


def next_token_logp(model: GPT, tokens: Tensor, prompt_length: int) -> Tensor:
    """Return the log-probs of the whole vocabulary before each response token, (B, R, V) float32; tokens (B, P+R)."""
    return response_logits(model, tokens, prompt_length).float().log_softmax(-1)


def teacher_logp_of_references(
    teacher: GPT, problems: list[arithmetic.Problem], tokens: Tensor, prompt_length: int
) -> Tensor:
    """Return `next_token_logp` of the teacher after each of the K references that it may read, (K, B, R, V).

    Without a reference slot it reads the prompts of the student, and K = 1.
    """
    if not teacher.config.reference_slot:
        return next_token_logp(teacher, tokens, prompt_length).unsqueeze(0)
    of_references = []
    for style in arithmetic.REFERENCES:
        teacher_prompts = prompts_of(problems, tokens.device, slots_of(problems, style))
        told, told_length = opsd.privileged_view(tokens, prompt_length, teacher_prompts)
        of_references.append(next_token_logp(teacher, told, told_length))
    return torch.stack(of_references)


def mean_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Return the mean over k of KL( p_θ ‖ q_k ), (B, R), from log p_θ (B, R, V) and log q_k (K, B, R, V)."""
    p = student_logp.exp()
    terms = p * (student_logp - teacher_logp.mean(0))
    return torch.where(p > 0, terms, 0.0).sum(-1)  # a token that the student never says adds 0, and 0 · ∞ would be NaN


def entropy(student_logp: Tensor) -> Tensor:
    """Return H(p_θ), (B, R), from log p_θ (B, R, V)."""
    p = student_logp.exp()
    return -torch.where(p > 0, p * student_logp, 0.0).sum(-1)


def pass_at_k(correct: Tensor, k: int) -> float:
    """Return the mean over problems of 1 − C(n−c, k)/C(n, k): unbiased from n ≥ k samples, c of them right.

    correct (problems, n) bool. Raises ValueError unless 1 ≤ k ≤ n, and for no problem. Source: arXiv 2107.03374.
    """
    if correct.dtype != torch.bool or correct.ndim != 2 or not len(correct):
        raise ValueError(f"correct must be bool (problems, n), not {correct.dtype} {tuple(correct.shape)}")
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ the number of samples per problem, not k={k} of {n}")
    wrong = (n - correct.sum(1)).tolist()
    return 1 - sum(math.comb(w, k) for w in wrong) / (math.comb(n, k) * len(wrong))


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927); unlike ±z·SE it is never a point, nor leaves [0, 1]."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"an interval needs 0 ≤ successes ≤ trials ≥ 1, not {successes} of {trials}")
    share = successes / trials
    z2 = z * z / trials
    center = (share + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials))
    return max(0.0, center - half), min(1.0, center + half)
