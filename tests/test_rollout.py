"""On-policy sampling: the record, its mask, its log-probs, and that the samples follow the model."""

import math

import pytest
import torch

from nano_opd import rollout as rollout_file
from nano_opd.checks import NumericalFault
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.rollout import Rollout, prompt_tensor, response_logits, response_logprobs, sample
from nano_opd.tokenizer import EOS, PAD, VOCAB_SIZE

P, R = 4, 12


@pytest.fixture
def model():
    """A random model that ends a response every few tokens."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(VOCAB_SIZE, P + R))
    for block in model.blocks:  # what comes out of a block starts at zero: attention and mlp would be nothing
        torch.nn.init.normal_(block.attention_out.weight, std=0.2)
        torch.nn.init.normal_(block.mlp_out.weight, std=0.2)
    with torch.no_grad():
        model.embedding.weight[EOS] *= 2.0
    return model


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
    rollout = sample(model, prompts, R, temperature=0.0, evaluation=True)
    best = response_logits(model, rollout.tokens, P).argmax(-1)
    assert torch.equal(best[rollout.mask], rollout.responses[rollout.mask])


def test_top_k_draws_only_from_the_top(model, prompts):
    rollout = sample(model, prompts, R, torch.Generator().manual_seed(0), top_k=3, evaluation=True)
    top = response_logits(model, rollout.tokens, P).topk(3).indices
    inside = (top == rollout.responses.unsqueeze(-1)).any(-1)
    assert inside[rollout.mask].all()


@pytest.mark.parametrize("off_policy", [{"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 5}])
def test_off_policy_sampling_is_refused_for_training(model, prompts, off_policy):
    with pytest.raises(ValueError, match="not on-policy"):
        sample(model, prompts, R, **off_policy)


def test_ragged_or_missing_prompts_are_refused():
    with pytest.raises(ValueError, match=r"same length ≥ 1, not \[2, 3\]"):
        prompt_tensor([[1, 2], [1, 2, 3]])
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="same length ≥ 1"):
            prompt_tensor(nothing)
    assert prompt_tensor([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]


def test_sizes_below_one_are_refused(model, prompts):
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        sample(model, prompts, 0)


def test_weights_that_have_overflowed_are_named(model, prompts):
    with torch.no_grad():
        model.blocks[0].mlp_out.weight[0, 0] = torch.nan
    with pytest.raises(NumericalFault, match="log-prob of a sampled token is not finite in .* likely the weights"):
        sample(model, prompts, R, torch.Generator().manual_seed(0))


def test_a_prompt_of_one_token_is_continued(model):
    rollout = sample(model, torch.full((50, 1), 5), R, torch.Generator().manual_seed(0))
    want = response_logprobs(model, rollout.tokens, 1)
    torch.testing.assert_close(rollout.logp[rollout.mask], want[rollout.mask], rtol=0, atol=1e-5)


def test_compiled_sampling_draws_the_same_tokens(compiler):
    P, R = 58, 10  # pieces of 4, 4 and 2 tokens, the last two with more than 64 keys
    model = GPT(GPTConfig(VOCAB_SIZE, P + R, n_layer=1, n_head=2, n_embd=8))
    for out in (model.blocks[0].attention_out, model.blocks[0].mlp_out):
        torch.nn.init.normal_(out.weight)
    prompts = torch.randint(10, (40, P), generator=torch.Generator().manual_seed(0))
    draw = lambda **how: sample(model, prompts, R, torch.Generator().manual_seed(1), **how)
    want = draw()
    for got in (draw(compiled=True), draw(compiled=True)):
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.mask, want.mask)
        torch.testing.assert_close(got.logp, want.logp, rtol=0, atol=1e-5)
    with torch.no_grad():
        model.embedding.weight.mul_(0.5)  # compiled code reads the weights of now
    torch.testing.assert_close(draw(compiled=True).logp, draw().logp, rtol=0, atol=1e-5)


def test_rollout_is_frozen(rollout):
    assert isinstance(rollout, Rollout)
    with pytest.raises(AttributeError):
        rollout.mask = None


def test_a_state_that_is_used_again_remembers_nothing(model, prompts, monkeypatch):
    """As captured graphs use theirs: other prompts and another stream on the same tensors, as on new ones."""
    draw = lambda prompts, seed: sample(model, prompts, R, torch.Generator().manual_seed(seed))
    prompts, others = prompts[:2], prompts[2:4]
    late = lambda r: not r.truncated.any() and r.mask.sum(1).min() > rollout_file.TOKENS_AT_ONCE
    first = next(seed for seed in range(999) if late(draw(prompts, seed)))  # ends that must not be taken for
    second = next(seed for seed in range(first + 1, 999) if late(draw(others, seed)))  # those of a rollout that goes on
    want = [draw(prompts, first), draw(others, second)]
    kept = rollout_file._State.of(model, len(prompts), P, R)
    monkeypatch.setattr(rollout_file._State, "of", lambda *sizes: kept)
    for got, expected in zip([draw(prompts, first), draw(others, second)], want):
        for name in ("tokens", "mask", "logp"):
            assert torch.equal(getattr(got, name), getattr(expected, name))
    assert torch.equal(draw(prompts, first).tokens, want[0].tokens)
