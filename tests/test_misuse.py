"""Functions called from a notebook with something slightly wrong: each raises, or is right."""

import pytest
import torch
from conftest import new_model

from nano_opd import divergences, gkd, grpo, opsd, policy_gradient, rlsd
from nano_opd.rollout import response_logits, response_logprobs, score
from nano_opd.system.checks import NumericalFault

MASK = torch.tensor([[True, True, True], [True, True, False], [True, True, True], [True, True, False]])
LOGP = -torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) - 0.1
A = torch.tensor([1.0, -1.0, 2.0, -0.5])


def test_targets_and_positions_that_no_logits_belong_to():
    model, tokens = new_model(12), torch.arange(24).view(2, 12) % 17
    for targets in (tokens[:, 1:], tokens.T, tokens[:1]):
        with pytest.raises(ValueError, match="targets must be .2, 12., not"):
            model(tokens, targets=targets)
    for call in (response_logits, response_logprobs, score):
        for prompt_length in (0, -3, 13):
            with pytest.raises(ValueError, match="logits_from must lie in 0 … 11"):
                call(model, tokens, prompt_length)
        call(model, tokens, 1)


LOSSES = {
    "policy gradient": lambda x, mask: policy_gradient.loss(x, torch.where(x.isnan(), x.detach(), 1.0), mask),
    "surrogate": lambda x, mask: grpo.clipped_surrogate(
        x, x.detach(), torch.where(x.isnan(), x.detach(), 1.0), mask, 0.2, 0.2
    ),
    **{
        f"gkd, {name}": lambda x, mask, name=name: gkd.loss(
            x.unsqueeze(-1) * torch.tensor([1.0, -0.5]),
            2 - x.unsqueeze(-1) * torch.tensor([0.3, 1]),
            mask,
            divergences.get(name),
        )
        for name in divergences.DIVERGENCES
    },
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_stands_behind_the_mask_is_in_no_gradient(loss, value):
    plain, spoilt = (torch.where(MASK, LOGP, behind).requires_grad_() for behind in (0.0, value))
    want, got = LOSSES[loss](plain, MASK), LOSSES[loss](spoilt, MASK)
    want.backward()
    got.backward()
    assert torch.equal(want, got) and plain.grad[MASK].abs().min() > 0
    assert torch.equal(torch.where(MASK, plain.grad, 0), torch.where(MASK, spoilt.grad, 0))
    if "gkd" not in loss:  # x itself has a slope of 0 · ∞ on the way to the logits
        assert torch.equal(spoilt.grad, plain.grad)


def test_an_information_gap_is_of_log_probs():
    logits = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert 0 <= opsd.information_gap(logits.log_softmax(-1)).min()
    assert opsd.information_gap(torch.tensor([0.0, -torch.inf]).expand(2, 1, 1, 2)).item() == 0
    for wrong in (logits, logits.softmax(-1), logits * torch.nan):
        with pytest.raises(ValueError, match="must be log-probs"):
            opsd.information_gap(wrong)


def test_rlsd_takes_a_constant_and_log_probs_that_are_there():
    with pytest.raises(ValueError, match="carries a gradient"):
        rlsd.advantage(A.clone().requires_grad_(), LOGP, LOGP, MASK, 0.5, 0.2)
    for broken in (torch.nan, -torch.inf):  # a token that the student says it cannot have sampled
        with pytest.raises(NumericalFault, match="log u"):
            rlsd.advantage(A, LOGP, torch.full_like(LOGP, broken), MASK, 0.5, 0.2)
    assert rlsd.advantage(A, torch.full_like(LOGP, -torch.inf), LOGP, MASK, 0.5, 0.2)[0, 0] == 0.9


def test_nothing_is_no_batch():
    none = torch.zeros(0, 3)
    for call in (
        lambda: policy_gradient.loss(none, none, none.bool()),
        lambda: grpo.clipped_surrogate(none, none, none[:, 0], none.bool(), 0.2, 0.2),
        lambda: gkd.loss(none[..., None], none[..., None], none.bool(), divergences.get("jsd")),
        lambda: rlsd.advantage(none[:, 0], none, none, none.bool(), 0.5, 0.2),
        lambda: grpo.advantage(none[:, 0], 2),
        lambda: grpo.zero_fraction(none[:, 0], 2),
    ):
        with pytest.raises(ValueError, match="not torch.bool .0, 3.|0 rewards"):
            call()
