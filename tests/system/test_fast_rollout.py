"""The fast sampler draws what the plain one draws, in pieces, compiled or not, and `sampler` chooses between them."""

import contextlib
import gc
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import new_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nano_opd import rollout
from nano_opd.checks import NumericalFault
from nano_opd.gpt import GPT, GPTConfig
from nano_opd.rollout import response_logits, response_logprobs
from nano_opd.system import fast_rollout
from nano_opd.system.fast_rollout import TOKENS_AT_ONCE, sampler
from nano_opd.tokenizer import EOS, PAD, VOCAB_SIZE

P, R = 4, 12
COMPILED = {"begin": fast_rollout.compiled_draft}


def new_prompts(B, P):
    return torch.randint(10, (B, P), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return new_model(P + R)


@pytest.fixture
def prompts():
    return new_prompts(200, P)


def require_same(got, want):
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.mask, want.mask)
    assert got.prompt_length == want.prompt_length and got.logp.dtype == torch.float32
    torch.testing.assert_close(got.logp, want.logp, rtol=0, atol=1e-5)
    assert (got.logp[~got.mask] == 0).all()


# P + R below, at and above 64 keys, up to which the cache is sliced; R below, at and between multiples of a piece
@pytest.mark.parametrize(
    "P,R", [(4, 12), (4, 3), (1, 9), (2, 9), (1, 1), (1, 63), (4, 60), (58, 6), (58, 10), (63, 2), (64, 5)]
)
@pytest.mark.parametrize("greedy", [False, True])
def test_the_plain_and_the_fast_sampler_give_the_same(P, R, greedy):
    model, prompts = new_model(P + R), new_prompts(40, P)
    draw = lambda sample, seed: sample(model, prompts, R, torch.Generator().manual_seed(seed), greedy)
    want = draw(rollout.sample, 1)
    require_same(draw(fast_rollout.sample, 1), want)
    assert want.mask.sum() > len(prompts) or R == 1
    if not greedy and R > 1:
        assert not torch.equal(draw(fast_rollout.sample, 2).tokens, want.tokens)


def test_both_give_the_same_where_some_responses_end_early_and_some_never(model, prompts):
    want = rollout.sample(model, prompts, R, torch.Generator().manual_seed(1))
    assert want.mask.sum(1).min() < 3 and want.truncated.any() and not want.truncated.all()
    require_same(fast_rollout.sample(model, prompts, R, torch.Generator().manual_seed(1)), want)


def test_the_record_of_the_fast_sampler(model, prompts):
    """What rollout.py promises of a record, not by comparison: the mask, what stands behind it, and the log-probs."""
    got = fast_rollout.sample(model, prompts, R, torch.Generator().manual_seed(1))
    assert torch.equal(got.tokens[:, :P], prompts)
    for tokens, mask, truncated in zip(got.responses.tolist(), got.mask.tolist(), got.truncated.tolist()):
        end = tokens.index(EOS) + 1 if EOS in tokens else R
        assert mask == [True] * end + [False] * (R - end) and tokens[end:] == [PAD] * (R - end)
        assert truncated == (EOS not in tokens)
    logp = response_logprobs(model, got.tokens, P)
    torch.testing.assert_close(got.logp[got.mask], logp[got.mask], rtol=0, atol=1e-5)
    greedy = fast_rollout.sample(model, prompts, R, greedy=True)
    best = response_logits(model, greedy.tokens, P).argmax(-1)
    assert torch.equal(best[greedy.mask], greedy.responses[greedy.mask])


@pytest.mark.parametrize("P,R,greedy", [(60, 6, False), (1, 4, True)])
def test_compiled_sampling_draws_the_same_tokens(P, R, greedy, compiler):
    """Pieces of 4 and 2 tokens, the second with more than 64 keys; and a prompt that needs no prefill."""
    model, prompts = new_model(P + R, n_layer=1, n_head=2, n_embd=8), new_prompts(40, P)
    draw = lambda sample, **how: sample(model, prompts, R, torch.Generator().manual_seed(1), greedy, **how)
    want = draw(rollout.sample)
    for _ in range(2):
        require_same(draw(fast_rollout.sample, **COMPILED), want)
    with torch.no_grad():
        model.embedding.weight.mul_(0.5)  # compiled code reads the weights of now
    require_same(draw(fast_rollout.sample, **COMPILED), draw(rollout.sample))


def test_it_stops_after_the_piece_in_which_the_last_response_ends(model, prompts):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    got = fast_rollout.sample(model, prompts[:3], R, torch.Generator().manual_seed(4))
    last = int(got.mask.sum(1).max())
    assert len(calls) == 1 + -(-last // TOKENS_AT_ONCE) * TOKENS_AT_ONCE < 1 + R


def test_a_state_that_is_used_again_remembers_nothing(model, prompts):
    """As captured graphs use theirs: other prompts and another stream on the same tensors, as on new ones."""

    def draw(prompts, seed, **options):
        return fast_rollout.sample(model, prompts, R, torch.Generator().manual_seed(seed), **options)

    prompts, others = prompts[:2], prompts[2:4]
    late = lambda r: not r.truncated.any() and r.mask.sum(1).min() > TOKENS_AT_ONCE
    first = next(seed for seed in range(999) if late(draw(prompts, seed)))  # ends that must not be taken for
    second = next(seed for seed in range(first + 1, 999) if late(draw(others, seed)))  # those of a rollout that goes on
    want = [draw(prompts, first), draw(others, second)]
    kept = fast_rollout.Draft(model, fast_rollout.Sizes(len(prompts), P, R), greedy=False)
    draw_again = lambda prompts, seed: draw(prompts, seed, begin=lambda *_: kept)
    for got, expected in zip([draw_again(prompts, first), draw_again(others, second)], want):
        for name in ("tokens", "mask", "logp"):
            assert torch.equal(getattr(got, name), getattr(expected, name))
    assert torch.equal(draw_again(prompts, first).tokens, want[0].tokens)


def test_what_the_plain_sampler_refuses_the_fast_one_refuses(model, prompts):
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        fast_rollout.sample(model, prompts, 0)
    for off_policy in ({"temperature": 0.7}, {"top_k": 5}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            fast_rollout.sample(model, prompts, R, **off_policy)
    with torch.no_grad():
        model.blocks[0].mlp_out.weight[0, 0] = torch.nan
    with pytest.raises(NumericalFault, match="log-prob of a sampled token is not finite in .* likely the weights"):
        fast_rollout.sample(model, prompts, R, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "where,compile,chosen",
    [
        ("cpu", "off", "plain"),
        ("cpu", "auto", "plain"),
        ("cpu", "on", "compiled"),
        ("cuda", "off", "plain"),
        ("cuda", "auto", "captured"),
        ("cuda", "on", "captured"),
        ("mps", "off", "plain"),
        ("mps", "on", "plain"),
    ],
)
def test_the_sampler_is_the_fastest_for_its_device(where, compile, chosen, monkeypatch):
    """And what it is given arrives: the model itself, whatever is wrapped around it."""
    calls = []
    monkeypatch.setattr(rollout, "sample", lambda *given: calls.append(("plain", given)))
    monkeypatch.setattr(fast_rollout, "sample", lambda *given, begin: calls.append((begin, given)))
    begins = {"plain": "plain", "compiled": fast_rollout.compiled_draft, "captured": fast_rollout.captured_draft}
    model = GPT(GPTConfig(VOCAB_SIZE, 8))
    sample = sampler(torch.device(where), compile)
    assert sampler.__defaults__ == ("auto", False)
    for wrapped in (model, torch.compile(model)):
        sample(wrapped, "prompts", 12, "generator", greedy=True)
    for begin, given in calls:
        assert given[0] is model and given[1:] == ("prompts", 12, "generator", True)
        assert begin == begins[chosen]
    assert len(calls) == 2
    calls.clear()
    sampler(torch.device(where), compile, seldom=True)(model, "prompts", 12)
    assert calls == [(begins["captured" if chosen == "captured" else "plain"], (model, "prompts", 12, None, False))]


def test_a_compiled_draft_is_drawn_by_compiled_functions(model, prompts, monkeypatch):
    """Both of them, and with positions for which torch.compile makes one graph for all tokens."""
    asked = []
    monkeypatch.setattr(fast_rollout, "compiled", lambda function: asked.append(function.__name__) or function)
    want = rollout.sample(model, prompts, R, torch.Generator().manual_seed(1))
    require_same(fast_rollout.sample(model, prompts, R, torch.Generator().manual_seed(1)), want)
    assert not asked
    require_same(fast_rollout.sample(model, prompts, R, torch.Generator().manual_seed(1), **COMPILED), want)
    assert set(asked) == {"prefill", "draw"}


class Recorded(TorchDispatchMode):
    """In the place of a CUDA graph: what is called while it is captured, and the same again, on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        self.calls.append((function, arguments, named or {}, out))
        return out

    def replay(self):
        for function, arguments, named, out in self.calls:
            with torch.autocast("cpu", enabled=False):  # the casts are among the calls
                again = function(*arguments, **named)
            for kept, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """torch.cuda's graphs without a GPU: a capture is a recording, and streams are nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def test_a_fault_does_not_stay_in_a_kept_cache(prompts, recorded):
    """After weights that overflow, good ones draw as if nothing had been: 0 · NaN would be NaN in every later score."""
    model = new_model(P + R)
    captured = partial(fast_rollout.sample, begin=fast_rollout.captured_draft)
    draw = lambda: captured(model, prompts, R, torch.Generator().manual_seed(1))
    want = draw()
    (draft,) = fast_rollout._drafts[model].values()
    good = model.blocks[0].mlp_out.weight[0, 0].item()
    with torch.no_grad():
        model.blocks[0].mlp_out.weight[0, 0] = torch.nan
        with pytest.raises(NumericalFault):
            draw()
        model.blocks[0].mlp_out.weight[0, 0] = good
    for tensors in zip(*draft.state.cache):  # the keys of all layers, and the values
        assert any(x.isnan().any() for x in tensors)
    require_same(draw(), want)


@pytest.mark.parametrize("P,R,precision", [(4, 12, torch.bfloat16), (1, 9, torch.float32), (58, 6, torch.bfloat16)])
def test_a_captured_rollout_is_replayed_with_other_prompts_draws_and_weights(P, R, precision, recorded):
    """The same bits as without a graph, through updates of the weights; and only a new size is captured again."""
    model, prompts = new_model(P + R), new_prompts(20, P)
    model.precision = precision
    captured = partial(fast_rollout.sample, begin=fast_rollout.captured_draft)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for n in range(3):
        for greedy in (False, True):
            streams = (torch.Generator().manual_seed(n) for _ in range(2))
            ways = fast_rollout.sample, captured
            # An outer autocast keeps copies of trained weights. None of them may stay in what is captured within it.
            with torch.autocast("cpu", precision, enabled=n == 0 and precision != torch.float32):
                want, got = (way(model, (prompts + n) % 10, R, stream, greedy) for way, stream in zip(ways, streams))
            assert torch.equal(got.tokens, want.tokens) and torch.equal(got.logp, want.logp)
        assert len(fast_rollout._drafts[model]) == 2
        optimizer.zero_grad()
        (-response_logprobs(model, want.tokens, P)[want.mask].mean()).backward()
        optimizer.step()
    for size in range(2, 9):
        captured(model, prompts[:size], R, torch.Generator().manual_seed(0))
    assert len(fast_rollout._drafts[model]) == fast_rollout.KEPT
    kept = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert kept() is None  # and its graphs have gone with it
