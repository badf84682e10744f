"""Where a wrong response first goes wrong, and how much of its blame falls there."""

import os

import torch
from torch import Tensor

from nano_opd import arithmetic
from nano_opd.system.checks import require_batch


def first_wrong_token(problem: arithmetic.Problem, response: str) -> int | None:
    """Index of the first token that departs from the worked solution, its EOS included; None where none does."""
    expected = arithmetic.solution(problem)
    return None if response == expected else len(os.path.commonprefix([expected, response]))


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
    here, length = token.unsqueeze(1), mask.sum(1)
    if not mask.gather(1, here).all() or (length < 2).any():
        raise ValueError("token must lie inside a response of at least two tokens")
    size = advantage.abs().masked_fill(~mask, 0.0)
    own = size.gather(1, here).squeeze(1)
    ratio = torch.where(size.sum(1) == 0, 1.0, own / ((size.sum(1) - own) / (length - 1)))
    top = (size == size.amax(1, keepdim=True)) & mask
    return ratio, top.gather(1, here).squeeze(1) / top.sum(1)
