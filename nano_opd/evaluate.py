"""Held-out evaluation: accuracy, pass@k, exact per-token KL and entropy on sampled prefixes.

A model that is its own teacher is also asked what it leaked, and a wrong response where its blame went.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nano_opd import arithmetic, opsd
from nano_opd.gpt import GPT
from nano_opd.rollout import Rollout, prompt_tensor, response_logits, sample
from nano_opd.tokenizer import decode, encode, encode_batch


def pass_at_k(correct: Tensor, k: int) -> float:
    """Mean over problems of 1 − C(n−c, k)/C(n, k): unbiased from n ≥ k samples, c of them right (arXiv 2107.03374).

    correct (problems, n) bool. Raises ValueError unless 1 ≤ k ≤ n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ the number of samples per problem, not k={k} of {n}")
    wrong = (n - correct.sum(1)).tolist()
    return 1 - sum(math.comb(w, k) for w in wrong) / (math.comb(n, k) * len(wrong))


def prompts_of(
    problems: list[arithmetic.Problem], device: torch.device | str = "cpu", slots: Sequence[str] | None = None
) -> Tensor:
    """The problems' prompts as tokens, (B, P) int64; with `slots`, what stands in each one's reference slot."""
    slots = slots or [None] * len(problems)
    return prompt_tensor(encode_batch(map(arithmetic.prompt, problems, slots)), device)


def slots_of(problems: list[arithmetic.Problem], style: str) -> list[str]:
    """Every problem's reference of one style; "blank" is what the student reads."""
    return [arithmetic.reference(p, style) for p in problems]


def response_texts(rollout: Rollout) -> list[str]:
    """Each response up to its EOS."""
    return [decode(row) for row in rollout.responses.tolist()]


def rewards(problems: list[arithmetic.Problem], rollout: Rollout) -> Tensor:
    """(B,) float32, 1 for a verified answer that ended in EOS, else 0."""
    right = [arithmetic.verify(p, text) for p, text in zip(problems, response_texts(rollout), strict=True)]
    return (torch.tensor(right, device=rollout.tokens.device) & ~rollout.truncated).float()


def reasoning_span(rollout: Rollout) -> Tensor:
    """(B, R) bool: the tokens before the answer's mark."""
    return (rollout.responses == encode("#")[0]).cumsum(1) == 0


@torch.no_grad()
def evaluate(
    student: GPT,
    teacher: GPT,
    problems: list[arithmetic.Problem],
    max_new_tokens: int,
    generator: torch.Generator,
    privileged: bool = False,
) -> dict[str, float]:
    """The student at temperature 1 and greedily on `problems`; KL and entropy are means per sampled token, in nats.

    kl = E_s KL( p_θ(·|s) ‖ q(·|s) ) over the whole vocabulary at the prefixes s that the student sampled.

    With `privileged` the student reads a blank slot and the teacher a reference, kl is the mean over all references,
    and two columns follow: leak_rate, the fraction of sampled answers that cite what they were not shown, and
    information_gap, I(Y; R | X, Y_<n) per sampled token by enumerating the references (nats).
    """
    prompts = prompts_of(problems, student.device, slots_of(problems, "blank") if privileged else None)
    greedy = sample(student, prompts, max_new_tokens, temperature=0.0, evaluation=True)
    rollout = sample(student, prompts, max_new_tokens, generator)
    student_logp = response_logits(student, rollout.tokens, rollout.prompt_length).float().log_softmax(-1)
    views, leaks = [(rollout.tokens, rollout.prompt_length)], {}
    if privileged:
        slots = [slots_of(problems, style) for style in arithmetic.REFERENCES]
        views = [opsd.privileged_view(*views[0], prompts_of(problems, student.device, slot)) for slot in slots]
    teacher_logp = torch.stack([response_logits(teacher, *view).float().log_softmax(-1) for view in views])
    p, mask = student_logp.exp(), rollout.mask
    if privileged:
        cited = [arithmetic.cites(text) for text in response_texts(rollout)]
        leaks["leak_rate"] = sum(cited) / len(cited)
        leaks["information_gap"] = opsd.information_gap(teacher_logp)[mask].mean().item()
    return leaks | {
        "accuracy": rewards(problems, rollout).mean().item(),
        "greedy_accuracy": rewards(problems, greedy).mean().item(),
        "kl": (p * (student_logp - teacher_logp.mean(0))).sum(-1)[mask].mean().item(),
        "entropy": -(p * student_logp).sum(-1)[mask].mean().item(),
        "response_length": mask.sum(1).float().mean().item(),
        "truncated": rollout.truncated.float().mean().item(),
    }


@torch.no_grad()
def sampled_correct(
    model: GPT,
    problems: list[arithmetic.Problem],
    samples: int,
    max_new_tokens: int,
    generator: torch.Generator,
    slots: Sequence[str] | None = None,
) -> tuple[Tensor, list[str]]:
    """Answer each problem `samples` times: which answers are right, (problems, samples) bool, and each first text."""
    prompts = prompts_of(problems, model.device, slots)
    rollouts = [sample(model, prompts, max_new_tokens, generator) for _ in range(samples)]
    correct = torch.stack([rewards(problems, rollout) > 0 for rollout in rollouts], dim=1)
    return correct, response_texts(rollouts[0])


def token_credit(advantage: Tensor, mask: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a response's credit or blame |Â| falls on one token, such as the first wrong one.

    advantage  (B, R) Â_n
    mask       (B, R) bool
    token      (B,) int64, a position where mask is True

    Returns two tensors (B,): |Â| there divided by the mean |Â| of the response's other tokens, and the probability that
    it ranks first, ties broken at random. An advantage that is equal everywhere gives 1 and 1/length.
    Raises ValueError for a token outside the mask, or a response of one token.
    """
    here, length = token.unsqueeze(1), mask.sum(1)
    if not mask.gather(1, here).all() or (length < 2).any():
        raise ValueError("token must lie inside a response of at least two tokens")
    size = advantage.abs().masked_fill(~mask, 0.0)
    own = size.gather(1, here).squeeze(1)
    ratio = own / ((size.sum(1) - own) / (length - 1))
    top = (size == size.amax(1, keepdim=True)) & mask
    return ratio, top.gather(1, here).squeeze(1) / top.sum(1)
