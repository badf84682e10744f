"""GRPO: group advantages against statistics.pstdev, the clipped surrogate against its definition and its limits."""

import math
import statistics

import pytest
import torch

from nano_opd import grpo, policy_gradient


@pytest.fixture
def batch():
    """logp, old_logp (8, 5) and responses of length 5, 4, 3, 2, 1, 5, 5, 5."""
    logp, old_logp = -torch.rand(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 2, 1, 5, 5, 5])[:, None]
    return logp, old_logp, mask


@pytest.mark.parametrize("group_size", [2, 4, 8])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_advantages_equal_the_definition_group_by_group(group_size, normalize_std):
    R = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = grpo.advantage(R, group_size, normalize_std).tolist()
    for first in range(0, 16, group_size):
        group = R[first : first + group_size].tolist()
        scale = statistics.pstdev(group) if normalize_std else 1.0
        for i, r in enumerate(group):
            assert got[first + i] == pytest.approx((r - statistics.fmean(group)) / scale, rel=1e-4)


def test_a_group_has_mean_zero_and_unit_variance_and_knows_nothing_of_the_others():
    R = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1])
    A = grpo.advantage(R, 4)
    torch.testing.assert_close(A.view(2, 4).mean(1), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(A.view(2, 4).std(1, correction=0), torch.ones(2), rtol=1e-4, atol=0)
    assert torch.equal(grpo.advantage(R[:4], 4), A[:4])
    assert ((A > 0) == (R > 0)).all()


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_groups_of_equal_rewards_give_exact_zeros_and_are_counted(value, normalize_std):
    R = torch.tensor([value] * 7 + [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0] + [value] * 7)
    A = grpo.advantage(R, 7, normalize_std)
    assert (A[:7] == 0).all() and (A[14:] == 0).all() and (A[7:14] != 0).all()
    assert grpo.zero_fraction(R, 7) == pytest.approx(2 / 3)


@pytest.mark.parametrize("per_token", [False, True])
def test_on_the_first_epoch_the_gradient_is_the_plain_policy_gradient(per_token, batch):
    logp, _, mask = batch
    A = torch.randn(8, 5 if per_token else 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for normalize in ("batch", "token_mean", "sequence_mean"):
        x = logp.clone().requires_grad_()
        y = logp.clone().requires_grad_()
        grpo.clipped_surrogate(x, logp, A if per_token else A[:, 0], mask, 0.2, 0.28, normalize).backward()
        policy_gradient.loss(y, A, mask, normalize).backward()
        assert torch.equal(x.grad, y.grad)
        assert grpo.clip_fraction(logp, logp, mask, 0.0, 0.0).item() == 0


def test_the_surrogate_equals_its_definition_token_by_token(batch):
    logp, old_logp, mask = batch
    A = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    want = 0.0
    outside = 0
    count = 0
    for b in range(8):
        for n in range(5):
            if mask[b, n]:
                ratio = math.exp(logp[b, n] - old_logp[b, n])
                clipped = min(max(ratio, 0.8), 1.28)
                want -= min(ratio * A[b].item(), clipped * A[b].item()) / 8
                outside = outside + (ratio != clipped)
                count = count + 1
    assert grpo.clipped_surrogate(logp, old_logp, A, mask, 0.2, 0.28).item() == pytest.approx(want)
    assert 0 < outside < count
    assert grpo.clip_fraction(logp, old_logp, mask, 0.2, 0.28).item() == pytest.approx(outside / count)


@pytest.mark.parametrize("A,moved", [(1.0, [True, True, False]), (-1.0, [False, True, True])])
def test_a_token_that_has_gone_far_enough_has_no_gradient_and_one_that_went_astray_has(A, moved):
    """Ratios 0.5, 1 and 2: clipped only on the side to which the advantage pushes."""
    logp = torch.tensor([[0.5, 1.0, 2.0]]).log().requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    grpo.clipped_surrogate(logp, torch.zeros(1, 3), torch.tensor([A]), mask, 0.2, 0.28).backward()
    assert (logp.grad != 0)[0].tolist() == moved


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_stands_behind_the_mask_never_matters(sign, batch):
    logp, old_logp, mask = batch
    A = torch.full((8,), sign, dtype=torch.float64)
    dirty = torch.where(mask, logp, torch.tensor([math.inf, -math.inf, math.nan, 99.0, -99.0]))
    clean = grpo.clipped_surrogate(logp, old_logp, A, mask, 0.2, 0.28)
    x = dirty.requires_grad_()
    got = grpo.clipped_surrogate(x, old_logp, A, mask, 0.2, 0.28)
    got.backward()
    assert torch.equal(got, clean) and x.grad.isfinite().all()


def test_rewards_and_the_policy_of_the_past_carry_no_gradient(batch):
    logp, old_logp, mask = batch
    assert not grpo.advantage(torch.rand(8, requires_grad=True), 4).requires_grad
    old_logp.requires_grad_()
    grpo.clipped_surrogate(logp.requires_grad_(), old_logp, torch.ones(8), mask, 0.2, 0.28).backward()
    assert logp.grad.abs().sum() > 0 and old_logp.grad is None


def test_misuse_is_refused(batch):
    logp, old_logp, mask = batch
    for group_size in (1, 0, 3):
        with pytest.raises(ValueError, match=f"8 rewards are not groups of group_size {group_size}"):
            grpo.advantage(torch.ones(8), group_size)
    with pytest.raises(ValueError, match="carries a gradient"):
        grpo.clipped_surrogate(logp, old_logp, torch.ones(8, requires_grad=True), mask, 0.2, 0.28)
    with pytest.raises(ValueError, match="shapes must be equal"):
        grpo.clipped_surrogate(logp, old_logp[:, :4], torch.ones(8), mask, 0.2, 0.28)
