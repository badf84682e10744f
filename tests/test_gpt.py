"""The model: causality, the cache, sizes, and what lower precision, compilation and chunked log-probs may change."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nano_opd import gpt, policy_gradient
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.system import device


def new_model(block_size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=block_size, n_layer=3, n_head=2, n_embd=24))
    for block in model.blocks:  # the zero initialisation of the outputs would make every block the identity
        torch.nn.init.normal_(block.attention_out.weight, std=0.3)
        torch.nn.init.normal_(block.mlp_out.weight, std=0.3)
    return model


@pytest.fixture
def model():
    return new_model(20).double()


@pytest.fixture
def tokens():
    return torch.randint(11, (5, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("at", [lambda t: slice(t, t + 1), lambda t: torch.tensor([t])])
@pytest.mark.parametrize("prompt_length", [1, 7, 19])
def test_cached_logits_equal_the_full_forward(model, tokens, prompt_length, at):
    full = model(tokens)
    cache = model.new_cache(5, 20)
    torch.testing.assert_close(model(tokens[:, :prompt_length], cache), full[:, :prompt_length])
    for t in range(prompt_length, 20):
        torch.testing.assert_close(model(tokens[:, t : t + 1], cache, at(t))[:, 0], full[:, t])


@pytest.mark.parametrize("length", [20, 80])  # products of the scores; flash attention
def test_a_token_sees_the_past_and_only_the_past(length):
    model, tokens = new_model(length).double(), torch.randint(11, (5, length))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:9] == 0).all() and (difference[9:] > 1e-6).all()


def test_the_two_ways_of_attention_are_one_function():
    model, tokens = new_model(80).double(), torch.randint(11, (5, 80))
    cache = model.new_cache(5, 80)
    model(tokens[:, :60], cache)
    decoded = [model(tokens[:, t : t + 1], cache, slice(t, t + 1))[:, 0] for t in range(60, 80)]
    torch.testing.assert_close(torch.stack(decoded, 1), model(tokens)[:, 60:])


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
        model(tokens[:, :2], model.new_cache(5, 20), slice(3, 4))
    with pytest.raises(ValueError, match="one token and the cache"):
        model(tokens[:, :1], at=slice(3, 4))
    with pytest.raises(ValueError, match="21 tokens do not fit in block_size 20"):
        model.new_cache(5, 21)
    with pytest.raises(ValueError, match="multiple of n_head"):
        GPTConfig(11, 20, n_head=4, n_embd=22)
    with pytest.raises(ValueError, match="n_layer must be at least 1, not 0"):
        GPTConfig(11, 20, n_layer=0)


def test_gpt2_small_constructs_and_runs():
    model = GPT(GPTConfig(50257, 1024, n_layer=12, n_head=12, n_embd=768))
    assert abs(sum(p.numel() for p in model.parameters()) / 123.5e6 - 1) < 0.01
    with torch.no_grad():
        assert model(torch.randint(50257, (1, 16)), logits_from=15).shape == (1, 1, 50257)


class Largest(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.numel = max(self.numel, out.numel())
        return out


def test_logprobs_of_a_large_vocabulary_are_taken_a_few_rows_at_a_time(monkeypatch):
    """The same log-probs and gradients, and no (B, T, V) tensor on the way, forward or backward."""
    torch.manual_seed(0)
    B, T, V = 4, 12, 5000
    model = GPT(GPTConfig(V, T, n_layer=1, n_head=2, n_embd=8))
    tokens, targets = torch.randint(V, (B, T)), torch.randint(V, (B, T))

    def scored():
        model.zero_grad()
        with Largest() as largest:
            logp = model(tokens, targets=targets)
            logp.sum().backward()
        return logp.detach(), model.embedding.weight.grad.clone(), largest.numel

    whole_logp, whole_grad, whole = scored()
    monkeypatch.setattr(policy_gradient, "LOGITS_AT_ONCE", 10 * V)
    logp, grad, at_once = scored()
    assert whole == B * T * V and at_once == 10 * V
    torch.testing.assert_close(logp, whole_logp)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logp, policy_gradient.logprobs_of(targets, model(tokens)).detach())


def test_bfloat16_multiplies_coarsely_and_keeps_float32_logprobs(tokens):
    model, exact = new_model(20), new_model(20)
    model.precision = torch.bfloat16
    logp, want = (m(tokens[:, :-1], targets=tokens[:, 1:]) for m in (model, exact))
    assert logp.dtype == torch.float32 and model.new_cache(1, 20)[0][0].dtype == torch.bfloat16
    error = (logp - want).abs().max()
    assert 1e-6 < error < 0.1
    logp.sum().backward()
    assert model.embedding.weight.grad.dtype == torch.float32


def test_the_compiled_model_is_the_model(tokens, compiler):
    model = GPT(GPTConfig(vocab_size=11, block_size=20, n_layer=1, n_head=2, n_embd=8))
    assert device.compiled("auto", model) is model and device.compiled("off", model) is model  # on a CPU
    compiled = device.compiled("on", copy.deepcopy(model))
    want, got = (m(tokens[:, :-1], logits_from=3, targets=tokens[:, 4:]) for m in (model, compiled))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for logp in (want, got):
        logp.sum().backward()
    for name, weight in model.named_parameters():
        grad = dict(compiled.named_parameters())[f"_orig_mod.{name}"].grad
        torch.testing.assert_close(grad, weight.grad, rtol=1e-3, atol=1e-5)


def test_attention_on_a_gpu_takes_flash_then_efficient_then_plain_and_never_cudnn(monkeypatch):
    """cuDNN has NaN gradients in bfloat16 on recent cards. The GPU is simulated: the choice is made on a CPU."""
    allowed = {}

    def recorded(q, k, v, is_causal):
        allowed["flash"] = torch.backends.cuda.flash_sdp_enabled()
        allowed["efficient"] = torch.backends.cuda.mem_efficient_sdp_enabled()
        allowed["plain"] = torch.backends.cuda.math_sdp_enabled()
        allowed["cudnn"] = torch.backends.cuda.cudnn_sdp_enabled()
        return q

    monkeypatch.setattr(gpt.F, "scaled_dot_product_attention", recorded)
    on_a_gpu = SimpleNamespace(shape=(1, 2, 5, 8), is_cuda=True)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    gpt.attend(on_a_gpu, None, None, None)
    assert allowed == {"flash": True, "efficient": True, "plain": True, "cudnn": False}
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
