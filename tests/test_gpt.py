"""The model: causality, the cache, sizes."""

import pytest
import torch

from nano_opd.gpt import GPT, GPTConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=20, n_layer=3, n_head=2, n_embd=24))
    for block in model.blocks:  # the zero initialisation of the outputs would make every block the identity
        torch.nn.init.normal_(block.attention_out.weight, std=0.3)
        torch.nn.init.normal_(block.mlp_out.weight, std=0.3)
    return model.double()


@pytest.fixture
def tokens():
    return torch.randint(11, (5, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prompt_length", [1, 7, 19])
def test_cached_logits_equal_the_full_forward(model, tokens, prompt_length):
    full = model(tokens)
    cache = model.new_cache(5, 20)
    torch.testing.assert_close(model(tokens[:, :prompt_length], cache), full[:, :prompt_length])
    for t in range(prompt_length, 20):
        torch.testing.assert_close(model(tokens[:, t : t + 1], cache, start=t)[:, 0], full[:, t])


def test_a_token_sees_the_past_and_only_the_past(model, tokens):
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:9] == 0).all() and (difference[9:] > 1e-6).all()


def test_positions_matter(model):
    tokens = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]])
    logits = model(tokens)
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-3


def test_logits_from_skips_the_prompt(model, tokens):
    torch.testing.assert_close(model(tokens, logits_from=6), model(tokens)[:, 6:])


def test_the_output_matrix_is_the_embedding(model):
    names = dict(model.named_parameters())
    assert names["embedding.weight"].shape == (11, 24) and not any("head" in n for n in names)


def test_sizes_that_do_not_fit_are_refused(model, tokens):
    with pytest.raises(ValueError, match="21 tokens do not fit in block_size 20"):
        model(tokens.repeat(1, 2)[:, :21])
    with pytest.raises(ValueError, match="one token and the cache"):
        model(tokens[:, :2], model.new_cache(5, 20), start=3)
    with pytest.raises(ValueError, match="multiple of n_head"):
        GPTConfig(11, 20, n_head=4, n_embd=22)
    with pytest.raises(ValueError, match="n_layer must be at least 1, not 0"):
        GPTConfig(11, 20, n_layer=0)


def test_gpt2_small_constructs_and_runs():
    model = GPT(GPTConfig(50257, 1024, n_layer=12, n_head=12, n_embd=768))
    assert abs(sum(p.numel() for p in model.parameters()) / 123.5e6 - 1) < 0.01
    with torch.no_grad():
        assert model(torch.randint(50257, (1, 16)), logits_from=15).shape == (1, 1, 50257)
