"""The first wrong token of a response, and the share of blame that falls on it, by hand."""

import credit
import numpy as np
import pytest
import torch

from nano_opd import arithmetic


def test_the_first_wrong_token():
    rng = np.random.default_rng(0)
    for problem in arithmetic.sample_problems("mix", 3, 300, rng):
        text = arithmetic.solution(problem)
        assert credit.first_wrong_token(problem, text) is None
        i = int(rng.integers(len(text)))
        broken = text[:i] + ("0" if text[i] != "0" else "1") + "9" * int(rng.integers(4))
        assert credit.first_wrong_token(problem, broken) == i
        assert credit.first_wrong_token(problem, text[:i]) == i  # its EOS came too early
        assert credit.first_wrong_token(problem, text + "0") == len(text)
        assert credit.first_wrong_token(problem, arithmetic.solution(problem, "cite")) == 0


def test_token_credit_by_hand():
    advantage = torch.tensor([[-1.0, -1, -1, -1], [-1, -4, -1, 9], [0.5, 2, -2, 0.5], [0, 0, 3, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    ratio, first = credit.token_credit(advantage, mask, torch.tensor([2, 1, 1, 0]))
    torch.testing.assert_close(ratio, torch.tensor([1.0, 4.0, 2.0, 0.0]))
    torch.testing.assert_close(first, torch.tensor([0.25, 1.0, 0.5, 0.0]))
    torch.testing.assert_close(credit.token_credit(10 * advantage, mask, torch.tensor([2, 1, 1, 0])), (ratio, first))
    nothing = credit.token_credit(torch.zeros(4, 4), mask, torch.tensor([2, 1, 1, 0]))[0]
    assert torch.equal(nothing, torch.ones(4))  # equal everywhere
    with pytest.raises(ValueError, match="shapes must be equal"):
        credit.token_credit(advantage[:, :1], mask, torch.tensor([2, 1, 1, 0]))
    for token, cut in [(3, mask), (0, mask & (torch.arange(4) < 1))]:
        with pytest.raises(ValueError, match="inside a response of at least two tokens"):
            credit.token_credit(advantage, cut, torch.full((4,), token))
