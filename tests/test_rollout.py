"""On-policy sampling: the record, its mask, its log-probs, and that the samples follow the model."""

import math

import pytest
import torch
from conftest import new_model

from nano_opd.checks import NumericalFault
from nano_opd.policy_gradient import logprobs_of
from nano_opd.rollout import Rollout, choose, response_logits, response_logprobs, sample, score
from nano_opd.tokenizer import EOS, PAD, VOCAB_SIZE

P, R = 4, 12


@pytest.fixture
def model():
    """A random model that ends a response every few tokens."""
    return new_model(P + R)


@pytest.fixture
def prompts():
    return torch.randint(10, (200, P), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def rollout(model, prompts):
    return sample(model, prompts, R, torch.Generator().manual_seed(1))


def test_the_record(rollout, prompts):
    assert rollout.tokens.shape == (200, P + R) and rollout.tokens.dtype == torch.int64 and rollout.prompt_length == P
    assert rollout.mask.shape == rollout.logp.shape == (200, R)
    assert rollout.mask.dtype == torch.bool and rollout.logp.dtype == torch.float32
    assert torch.equal(rollout.tokens[:, :P], prompts)
    lengths = rollout.mask.sum(1)
    assert lengths.min() < 3 and rollout.truncated.any() and not rollout.truncated.all()  # the fixture covers all cases


def test_the_mask_includes_the_first_eos_and_nothing_after(rollout):
    for tokens, mask, truncated in zip(rollout.responses.tolist(), rollout.mask.tolist(), rollout.truncated.tolist()):
        end = tokens.index(EOS) + 1 if EOS in tokens else R
        assert mask == [True] * end + [False] * (R - end)
        assert tokens[end:] == [PAD] * (R - end)
        assert truncated == (EOS not in tokens)


def test_sampling_time_logprobs_equal_the_full_forward(model, rollout):
    logp = response_logprobs(model, rollout.tokens, P)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(rollout.logp[rollout.mask], logp[rollout.mask], rtol=0, atol=1e-5)
    assert (rollout.logp[~rollout.mask] == 0).all()


def test_response_logits_predict_the_response(model, rollout):
    logits = response_logits(model, rollout.tokens, P)
    assert logits.shape == (200, R, VOCAB_SIZE)
    torch.testing.assert_close(logits[:, 3], model(rollout.tokens[:, : P + 3])[:, -1])


def test_what_stands_after_the_eos_changes_nothing(model, rollout):
    noise = torch.randint_like(rollout.responses, 10)
    other = rollout.tokens.clone()
    other[:, P:] = torch.where(rollout.mask, rollout.responses, noise)
    first, second = response_logprobs(model, rollout.tokens, P), response_logprobs(model, other, P)
    torch.testing.assert_close(first[rollout.mask], second[rollout.mask])


def test_samples_follow_the_model(model):
    """χ² of 20,000 first tokens against the model's distribution: 99.9 % quantile by Wilson–Hilferty."""
    rollout = sample(model, torch.full((20000, P), 5), 1, torch.Generator().manual_seed(2))
    p = model(torch.full((1, P), 5))[0, -1].softmax(-1)
    expected = 20000 * p
    counts = rollout.responses[:, 0].bincount(minlength=VOCAB_SIZE)
    chi2, df = ((counts - expected) ** 2 / expected).sum().item(), VOCAB_SIZE - 1
    assert chi2 < df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3


def test_the_same_generator_seed_gives_the_same_rollout(model, prompts, rollout):
    again = sample(model, prompts, R, torch.Generator().manual_seed(1))
    other = sample(model, prompts, R, torch.Generator().manual_seed(2))
    assert torch.equal(again.tokens, rollout.tokens) and torch.equal(again.logp, rollout.logp)
    assert not torch.equal(other.tokens, rollout.tokens)


def test_greedy_takes_the_likeliest_token(model, prompts):
    rollout = sample(model, prompts, R, greedy=True)
    best = response_logits(model, rollout.tokens, P).argmax(-1)
    assert torch.equal(best[rollout.mask], rollout.responses[rollout.mask])
    want = response_logprobs(model, rollout.tokens, P)  # under the model, not 0 = ln 1
    torch.testing.assert_close(rollout.logp[rollout.mask], want[rollout.mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("off_policy", [{"temperature": 0.7}, {"top_k": 5}])
def test_off_policy_sampling_cannot_be_asked_for(model, prompts, off_policy):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        sample(model, prompts, R, **off_policy)


def test_a_token_of_probability_zero_is_never_drawn():
    """At both ends of a uniform number in [0, 1), and where the probabilities add up to less or more than 1."""
    p = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    for scale in (1 - 1e-6, 1.0, 1 + 1e-6):
        for uniform, token in [(0.0, 3), (0.69, 3), (0.71, 1), (1 - 2**-24, 1)]:
            drawn = choose((scale * p).log()[None], torch.tensor([[uniform]]), greedy=False)
            assert drawn.tolist() == [[token]]


def test_a_token_of_probability_zero_is_not_drawn_by_another_order_of_addition(monkeypatch):
    """A parallel scan may add up one token's prefix in another order than the next one's, and so rise between them."""
    p, rises = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0]), torch.tensor([[0.0, 0.25, 0.375, 0.875, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: rises)
    for uniform, token in [(0.05, 3), (0.3, 3), (0.7, 3), (0.8, 1)]:
        assert choose(p.log()[None], torch.tensor([[uniform]]), greedy=False).tolist() == [[token]]


def test_the_two_ways_to_score_are_one(model, rollout):
    logp, nothing = score(model, rollout.tokens, P)
    again, logits = score(model, rollout.tokens, P, whole_vocabulary=True)
    assert nothing is None and logits.dtype == logp.dtype == torch.float32
    torch.testing.assert_close(logits, response_logits(model, rollout.tokens, P))
    torch.testing.assert_close(again, logprobs_of(rollout.responses, logits))
    torch.testing.assert_close(logp, again)
    assert logp.requires_grad and again.requires_grad


def test_sampling_stops_when_every_response_has_ended(model, prompts):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    rollout = sample(model, prompts[:3], R, torch.Generator().manual_seed(4))
    assert len(calls) == 1 + rollout.mask.sum(1).max() < 1 + R  # one of the prompt, one for each token


def test_sizes_below_one_are_refused(model, prompts):
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        sample(model, prompts, 0)


def test_weights_that_have_overflowed_are_named(model, prompts):
    with torch.no_grad():
        model.blocks[0].mlp_out.weight[0, 0] = torch.nan
    with pytest.raises(NumericalFault, match="log-prob of a sampled token is not finite in .* likely the weights"):
        sample(model, prompts, R, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("P", [1, 2])
def test_a_prompt_of_one_or_two_tokens_is_continued(model, P):
    rollout = sample(model, torch.arange(5, 5 + P).expand(50, P), R, torch.Generator().manual_seed(0))
    want = response_logprobs(model, rollout.tokens, P)
    torch.testing.assert_close(rollout.logp[rollout.mask], want[rollout.mask], rtol=0, atol=1e-5)


def test_rollout_is_frozen(rollout):
    assert isinstance(rollout, Rollout)
    with pytest.raises(AttributeError):
        rollout.mask = None
