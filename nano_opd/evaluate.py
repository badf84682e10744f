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


def pass_at_k(correct: Tensor, k: int) -> float:
    """Mean over problems of 1 − C(n−c, k)/C(n, k): unbiased from n ≥ k samples, c of them right (arXiv 2107.03374).

    correct (problems, n) bool. Raises ValueError unless 1 ≤ k ≤ n, and for no problem.
    """
    if correct.dtype != torch.bool or correct.ndim != 2 or not len(correct):
        raise ValueError(f"correct must be bool (problems, n), not {correct.dtype} {tuple(correct.shape)}")
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ the number of samples per problem, not k={k} of {n}")
    wrong = (n - correct.sum(1)).tolist()
    return 1 - sum(math.comb(w, k) for w in wrong) / (math.comb(n, k) * len(wrong))


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); unlike ±z·SE it is never a point, and never leaves [0, 1]."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"an interval needs 0 ≤ successes ≤ trials ≥ 1, not {successes} of {trials}")
    p, z2 = successes / trials, z * z / trials
    center = (p + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials))
    return max(0.0, center - half), min(1.0, center + half)


@torch.no_grad()
def evaluate(
    student: GPT,
    teacher: GPT,
    problems: list[arithmetic.Problem],
    max_new_tokens: int,
    generator: torch.Generator,
    reference_slot: bool = False,
    sample: Callable[..., Rollout] = sample,
) -> dict[str, float]:
    """The student at temperature 1 and greedily on `problems`; KL and entropy are means per sampled token, in nats.

    kl = E_s KL( p_θ(·|s) ‖ q(·|s) ) over the whole vocabulary at the prefixes s that the student sampled.

    With a `reference_slot` the student reads a blank slot and the teacher a reference, kl is the mean over all
    references, and two columns follow: leak_rate, the fraction of sampled answers that cite what they were not shown,
    and information_gap, I(Y; R | X, Y_<n) per sampled token by enumerating the references (nats).
    """
    prompts = prompts_of(problems, student.device, slots_of(problems, "blank") if reference_slot else None)
    greedy = sample(student, prompts, max_new_tokens, greedy=True)
    rollout = sample(student, prompts, max_new_tokens, generator)
    mask, measured = rollout.mask, {"kl": [], "entropy": []}
    slots = [slots_of(problems, style) for style in arithmetic.REFERENCES] if reference_slot else []
    log_probs = lambda model, view: response_logits(model, *view).float().log_softmax(-1)
    each = rows_at_once(mask.shape[1], student.config.vocab_size)
    for first in range(0, len(mask), each):
        rows = slice(first, first + each)
        view = rollout.tokens[rows], rollout.prompt_length
        told = [prompts_of(problems[rows], student.device, slot[rows]) for slot in slots]
        views = [opsd.privileged_view(*view, prompts) for prompts in told] or [view]
        student_logp = log_probs(student, view)  # (B, R, V)
        teacher_logp = torch.stack([log_probs(teacher, view) for view in views])  # (K, B, R, V) for K references
        p = student_logp.exp()
        possible = p > 0  # a token that the student never says adds 0, and 0 · ∞ would be NaN
        kl = torch.where(possible, p * (student_logp - teacher_logp.mean(0)), 0.0).sum(-1)
        entropy = -torch.where(possible, p * student_logp, 0.0).sum(-1)
        measured["kl"].append(kl[mask[rows]])
        measured["entropy"].append(entropy[mask[rows]])
        if reference_slot:
            measured.setdefault("information_gap", []).append(opsd.information_gap(teacher_logp)[mask[rows]])
    leaks = {}
    if reference_slot:
        cited = [arithmetic.cites(text) for text in response_texts(rollout)]
        leaks["leak_rate"] = sum(cited) / len(cited)
    return leaks | {
        "accuracy": rewards(problems, rollout).mean().item(),
        "greedy_accuracy": rewards(problems, greedy).mean().item(),
        **{name: torch.cat(of_tokens).mean().item() for name, of_tokens in measured.items()},
        "response_length": mask.sum(1).float().mean().item(),
        "truncated": rollout.truncated.float().mean().item(),
    }
