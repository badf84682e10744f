"""Supervised fine-tuning on worked solutions: the warm start of teacher and student, and a method of its own.

    loss = −(1/B) Σ_b Σ_n log p_θ(y*_n | x, y*_<n)          y* the worked solution with its EOS

It is policy_gradient.loss with the solution in the place of the sample and A = 1. A model that is to be its own teacher
learns two kinds of prompt at once: some with a blank reference slot, and some with a reference in it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nano_opd import arithmetic, policy_gradient
from nano_opd.gpt import GPT, adamw
from nano_opd.rollout import Rollout, response_logprobs
from nano_opd.tokenizer import EOS, PAD, encode


def solution_tokens(
    problems: list[arithmetic.Problem], device: torch.device | str = "cpu", styles: list[str] | None = None
) -> Tensor:
    """Prompt, worked solution and EOS, (B, P+S) int64, with PAD after a solution that is shorter than the longest.

    styles  the reference in each prompt's slot (arithmetic.reference), which the solution follows; None: no slot

    Raises ValueError for problems of several sizes, or styles that are not as many.
    """
    texts = [
        arithmetic.prompt(p, style and arithmetic.reference(p, style)) + arithmetic.solution(p, style)
        for p, style in zip(problems, styles or [None] * len(problems), strict=True)
    ]
    if len({(p.digits, style is None) for p, style in zip(problems, styles or [None] * len(problems))}) > 1:
        raise ValueError("problems of one batch must all have the same digits, and all a slot or none")
    longest = max(map(len, texts), default=0)
    rows = [encode(text) + [EOS] + [PAD] * (longest - len(text)) for text in texts]
    return torch.tensor(rows, device=device)


def worked_solutions(problems: list[arithmetic.Problem], device: torch.device | str = "cpu") -> Rollout:
    """The problems' solutions in the place of sampled responses; logp is 0, since no one sampled them.

    Raises ValueError for no problem, and for problems of several sizes.
    """
    if not problems:
        raise ValueError("there is no problem to solve: give at least one")
    tokens = solution_tokens(problems, device)
    prompt_length = arithmetic.prompt_length(problems[0].digits)
    mask = tokens[:, prompt_length:] != PAD
    return Rollout(tokens, prompt_length, mask, torch.zeros(mask.shape, device=device))


def train(
    model: GPT, problems: list[arithmetic.Problem], batch_size: int, lr: float, styles: list[str] | None = None
) -> Iterator[None]:
    """One pass over the problems' worked solutions, in place; yields after each update.

    The learning rate decays linearly to 0. `styles` as in `solution_tokens`.
    """
    tokens = solution_tokens(problems, model.device, styles)  # all in advance: the loop does nothing but train
    prompt_length = arithmetic.prompt_length(problems[0].digits, slot=styles is not None) if problems else 0
    optimizer = adamw(model, lr)
    for first in range(0, len(problems), batch_size):
        optimizer.param_groups[0]["lr"] = lr * (1 - first / len(problems))
        batch = tokens[first : first + batch_size]
        logp = response_logprobs(model, batch, prompt_length)
        loss = policy_gradient.loss(logp, torch.ones_like(logp), batch[:, prompt_length:] != PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield
