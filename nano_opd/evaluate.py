"""Held-out evaluation: accuracy with its interval, pass@k, exact per-token KL and entropy on sampled prefixes."""

import math

import torch
from torch import Tensor

from nano_opd import arithmetic
from nano_opd.gpt import GPT
from nano_opd.rollout import Rollout, prompt_tensor, response_logits, sample
from nano_opd.tokenizer import decode, encode_batch


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); unlike ±z·SE it stays inside [0, 1] and is not empty at 0 or 1."""
    p, z2 = successes / trials, z * z / trials
    center = (p + z2 / 2) / (1 + z2)
    half = z / (1 + z2) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials))
    return center - half, center + half


def pass_at_k(correct: Tensor, k: int) -> float:
    """Mean over problems of 1 − C(n−c, k)/C(n, k): unbiased from n ≥ k samples, c of them right (arXiv 2107.03374).

    correct (problems, n) bool. Raises ValueError unless 1 ≤ k ≤ n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ the number of samples per problem, not k={k} of {n}")
    wrong = (n - correct.sum(1)).tolist()
    return 1 - sum(math.comb(w, k) for w in wrong) / (math.comb(n, k) * len(wrong))


def prompts_of(problems: list[arithmetic.Problem], device: torch.device | str = "cpu") -> Tensor:
    """The problems' prompts as tokens, (B, P) int64."""
    return prompt_tensor(encode_batch(map(arithmetic.prompt, problems)), device)


def response_texts(rollout: Rollout) -> list[str]:
    """Each response up to its EOS."""
    return [decode(row) for row in rollout.responses.tolist()]


def rewards(problems: list[arithmetic.Problem], rollout: Rollout) -> Tensor:
    """(B,) float32, 1 for a verified answer that ended in EOS, else 0."""
    right = [arithmetic.verify(p, text) for p, text in zip(problems, response_texts(rollout), strict=True)]
    return (torch.tensor(right, device=rollout.tokens.device) & ~rollout.truncated).float()


@torch.no_grad()
def evaluate(
    student: GPT, teacher: GPT, problems: list[arithmetic.Problem], max_new_tokens: int, generator: torch.Generator
) -> dict[str, float]:
    """The student at temperature 1 and greedily on `problems`; KL and entropy are means per sampled token, in nats.

    kl = E_s KL( p_θ(·|s) ‖ q(·|s) ) over the whole vocabulary at the prefixes s that the student sampled.
    """
    prompts = prompts_of(problems, student.device)
    greedy = sample(student, prompts, max_new_tokens, temperature=0.0, evaluation=True)
    rollout = sample(student, prompts, max_new_tokens, generator)
    student_logp = response_logits(student, rollout.tokens, rollout.prompt_length).float().log_softmax(-1)
    teacher_logp = response_logits(teacher, rollout.tokens, rollout.prompt_length).float().log_softmax(-1)
    p, mask = student_logp.exp(), rollout.mask
    return {
        "accuracy": rewards(problems, rollout).mean().item(),
        "greedy_accuracy": rewards(problems, greedy).mean().item(),
        "kl": (p * (student_logp - teacher_logp)).sum(-1)[mask].mean().item(),
        "entropy": -(p * student_logp).sum(-1)[mask].mean().item(),
        "response_length": mask.sum(1).float().mean().item(),
        "truncated": rollout.truncated.float().mean().item(),
    }


@torch.no_grad()
def sampled_correct(
    model: GPT, problems: list[arithmetic.Problem], samples: int, max_new_tokens: int, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Answer each problem `samples` times: which answers are right, (problems, samples) bool, and each first text."""
    prompts = prompts_of(problems, model.device)
    rollouts = [sample(model, prompts, max_new_tokens, generator) for _ in range(samples)]
    correct = torch.stack([rewards(problems, rollout) > 0 for rollout in rollouts], dim=1)
    return correct, response_texts(rollouts[0])
