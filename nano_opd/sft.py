"""Supervised fine-tuning on worked solutions: the warm start of teacher and student, and the off-policy arm.

    loss = −(1/B) Σ_b Σ_n log p_θ(y*_n | x, y*_<n)          y* the worked solution with its EOS

It is policy_gradient.loss with the solution in the place of the sample and A = 1.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nano_opd import arithmetic, policy_gradient
from nano_opd.gpt import GPT
from nano_opd.rollout import response_logprobs
from nano_opd.tokenizer import EOS, encode_batch


def solution_tokens(problems: list[arithmetic.Problem], device: torch.device | str = "cpu") -> Tensor:
    """Prompt, worked solution and EOS, (B, P+S) int64; all the same length, so nothing is padded."""
    texts = encode_batch(arithmetic.prompt(p) + arithmetic.solution(p) for p in problems)
    return torch.tensor([text + [EOS] for text in texts], device=device)


def loss(model: GPT, tokens: Tensor, prompt_length: int) -> Tensor:
    """Summed cross-entropy of a solution in nats, averaged over the batch; tokens (B, P+S)."""
    logp = response_logprobs(model, tokens, prompt_length)
    return policy_gradient.loss(logp, torch.ones_like(logp), torch.ones_like(logp, dtype=torch.bool))


def adamw(model: GPT, lr: float) -> torch.optim.AdamW:
    """The optimizer of every phase (Loshchilov & Hutter 2019), as one fused kernel where PyTorch has one."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=model.device.type != "mps"
    )


def train(model: GPT, problems: list[arithmetic.Problem], batch_size: int, lr: float) -> Iterator[None]:
    """One pass over the problems' worked solutions, in place; yields after each update.

    The learning rate decays linearly to 0.
    """
    tokens = solution_tokens(problems, model.device)  # all in advance: the loop does nothing but train
    optimizer = adamw(model, lr)
    for first in range(0, len(problems), batch_size):
        optimizer.param_groups[0]["lr"] = lr * (1 - first / len(problems))
        optimizer.zero_grad()
        loss(model, tokens[first : first + batch_size], arithmetic.prompt_length(problems[0].digits)).backward()
        optimizer.step()
        yield
