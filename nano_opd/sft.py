"""Supervised fine-tuning on worked solutions: the warm start of teacher and student, and a method of its own.

    loss = −(1/B) Σ_b Σ_n log p_θ(y*_n | x, y*_<n)          y* the worked solution with its EOS

It is policy_gradient.loss with the solution in the place of the sample and A = 1. A model that is to be its own teacher
learns two kinds of prompt at once: some with a blank reference slot, and some with a reference in it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nano_opd import arithmetic, policy_gradient
from nano_opd.gpt import GPT, adamw
from nano_opd.rollout import Rollout, response_logprobs
from nano_opd.tokenizer import EOS, PAD, decode, encode

# What stands in the slot of a prompt during a warm start: one prompt in two is blank, as the student reads it.
VIEWS = ["blank", "blank", *arithmetic.REFERENCES]


def warm_start(
    model: GPT,
    problems: list[arithmetic.Problem],
    generator: np.random.Generator | None = None,
    batch_size: int = 64,
    lr: float = 1e-2,
    after_update: Callable[[], None] | None = None,
) -> None:
    """Train a model on worked solutions, in place: one pass over the problems.

    problems      in the order in which they are learned
    generator     draws what stands in the slot of each prompt, one of VIEWS; None: the prompts have no slot
    batch_size    solutions in an update
    lr            learning rate of the first update, from which it falls linearly to 0
    after_update  is called after each update, for a progress bar, say

    Raises ValueError for problems of several sizes.
    """
    if not problems:
        return
    styles = None
    if generator is not None:
        styles = generator.choice(VIEWS, len(problems)).tolist()
    tokens = solution_tokens(problems, model.device, styles)  # all in advance: the loop does nothing but train
    prompt_length = arithmetic.prompt_length(problems[0].digits, slot=styles is not None)
    optimizer = adamw(model, lr)

    for first in range(0, len(problems), batch_size):
        batch = tokens[first : first + batch_size]
        mask = batch[:, prompt_length:] != PAD
        logp = response_logprobs(model, batch, prompt_length)
        loss = policy_gradient.loss(logp, torch.ones_like(logp), mask)

        optimizer.param_groups[0]["lr"] = lr * (1 - first / len(problems))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if after_update is not None:
            after_update()


def solve(
    model: GPT, prompts: Tensor, max_new_tokens: int, generator: torch.Generator | None = None, greedy: bool = False
) -> Rollout:
    """Answer prompts with their worked solutions: a sampler, as rollout.sample, that asks no model.

    prompts  (B, P) int64, without a reference slot

    Raises ValueError for a prompt that is no problem. The other arguments are not used.
    """
    problems = [arithmetic.read_prompt(decode(row)) for row in prompts.tolist()]
    return worked_solutions(problems, prompts.device)


def worked_solutions(problems: list[arithmetic.Problem], device: torch.device | str = "cpu") -> Rollout:
    """Return the problems' solutions in the place of sampled responses; logp is 0, since no one sampled them.

    Raises ValueError for no problem, and for problems of several sizes.
    """
    if not problems:
        raise ValueError("there is no problem to solve: give at least one")
    tokens = solution_tokens(problems, device)
    prompt_length = arithmetic.prompt_length(problems[0].digits)
    mask = tokens[:, prompt_length:] != PAD
    return Rollout(tokens, prompt_length, mask, logp=torch.zeros(mask.shape, device=device))


def solution_tokens(
    problems: list[arithmetic.Problem], device: torch.device | str = "cpu", styles: list[str] | None = None
) -> Tensor:
    """Return prompt, worked solution and EOS, (B, P+S) int64, with PAD after a solution shorter than the longest.

    styles  the reference in each prompt's slot (arithmetic.reference), which the solution follows; None: no slot

    Raises ValueError for problems of several sizes, or styles that are not as many.
    """
    if styles is None:
        texts = [arithmetic.prompt(problem) + arithmetic.solution(problem) for problem in problems]
    else:
        texts = []
        for problem, style in zip(problems, styles, strict=True):
            prompt = arithmetic.prompt(problem, arithmetic.reference(problem, style))
            texts.append(prompt + arithmetic.solution(problem, style))
    if len({problem.digits for problem in problems}) > 1:
        raise ValueError("problems of one batch must all have the same digits")
    longest = max(map(len, texts), default=0)
    rows = [encode(text) + [EOS] + [PAD] * (longest - len(text)) for text in texts]
    return torch.tensor(rows, device=device)
