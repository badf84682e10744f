"""The sampler of rollout.py made fast: the same tokens in fewer launches.

    CPU         rollout.sample itself, or, with --compile on, several tokens as one graph of torch.compile
    CUDA GPU    several tokens as one captured CUDA graph, replayed; with --compile off, rollout.sample itself

`sampler` chooses. Both fast ways draw TOKENS_AT_ONCE tokens in one piece, and look for the end of all responses only
between two pieces. What a response says after its EOS is dropped.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nano_opd import rollout
from nano_opd.checks import require_finite
from nano_opd.gpt import GPT, Cache
from nano_opd.rollout import Rollout, choose, require_sizes
from nano_opd.system.device import any_order
from nano_opd.system.distributed import unwrap
from nano_opd.tokenizer import EOS, PAD

TOKENS_AT_ONCE = 4


def sampler(device: torch.device, compile: str = "auto", seldom: bool = False) -> Callable[..., Rollout]:
    """A function like rollout.sample, the fastest for this device and --compile; a replica is sampled as its model.

    seldom  for evaluation, which does not earn a compilation back
    """
    if device.type == "cuda" and compile != "off":
        way = partial(sample, new=_captured)
    elif device.type == "cpu" and compile == "on" and not seldom:
        way = partial(sample, new=partial(_eager, compiled=True))
    else:
        way = rollout.sample
    return lambda model, *arguments, **options: way(unwrap(model), *arguments, **options)


@torch.no_grad()
def sample(
    model: GPT, prompts: Tensor, max_new_tokens: int, generator=None, greedy: bool = False, new: Callable | None = None
) -> Rollout:
    """rollout.sample in pieces of TOKENS_AT_ONCE tokens; `new` makes the state and the function that extends it."""
    (B, P), R = require_sizes(prompts, max_new_tokens), max_new_tokens
    state, extend = (new or _eager)(model, (B, P, R), greedy)
    responses = state.tokens[:, P:]  # a view: (B, R)
    state.tokens[:, :P] = prompts
    responses.fill_(PAD)
    state.uniform.uniform_(generator=generator)
    for first in range(0, R, TOKENS_AT_ONCE):
        extend(first)
        if (responses == EOS).any(1).all():  # the host waits for the device here, not at each token
            break
    ends = (responses == EOS).long()
    mask = ends.cumsum(1) - ends == 0  # no EOS before it
    tokens = torch.cat([prompts, torch.where(mask, responses, PAD)], dim=1)
    logp = torch.where(mask, state.logp, 0.0)
    require_finite("log-prob of a sampled token", logp, "the weights of the model have overflowed")
    return Rollout(tokens, P, mask, logp)


class _State(NamedTuple):
    """What a rollout is written to while it grows."""

    tokens: Tensor  # (B, P+R)
    logp: Tensor  # (B, R)
    uniform: Tensor  # (R, B, 1), drawn in advance
    cache: Cache


def _extend(model: GPT, state: _State, P: int, greedy: bool, compiled: bool, first: int) -> None:
    """Draw tokens first … first + TOKENS_AT_ONCE − 1 of every response, in place."""
    through = _compiled if compiled else lambda function: function
    if first == 0 and P > 1:  # all of the prompt but its last token, which the first draw reads
        through(_prefill)(model, state.tokens[:, : P - 1], state.cache)
    last = min(first + TOKENS_AT_ONCE, state.logp.shape[1])
    start, end = P + first, P + last
    keys = -(-end // 64) * 64  # a multiple of 64, so that few graphs are compiled; smaller products are slower besides
    cache = [(k[:, :, :keys], v[:, :, :keys]) for k, v in state.cache]
    before = range(start - 1, end - 1)
    at = list(torch.tensor(before).split(1)) if compiled else [slice(n, n + 1) for n in before]
    drawn = through(_draw)(model, state.tokens[:, start - 1 : start], cache, at, state.uniform[first:last], greedy)
    state.tokens[:, start:end], state.logp[:, first:last] = drawn


def _prefill(model: GPT, prompts: Tensor, cache: Cache) -> None:
    """Keys and values of the prompts, and no logits."""
    model(prompts, cache, logits_from=prompts.shape[1])


def _draw(model: GPT, token: Tensor, cache: list, at: list, uniform: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
    """n tokens, (B, n), and their log-probs; each reads the one before it at its position, the first `token` (B, 1)."""
    tokens, logps = [], []
    for position, u in zip(at, uniform):
        logp = model(token, cache, position)[:, 0].float().log_softmax(-1)  # (B, V)
        token = choose(logp, u, greedy)  # (B, 1)
        tokens.append(token)
        logps.append(logp.gather(1, token))
    return torch.cat(tokens, 1), torch.cat(logps, 1)


@lru_cache
def _compiled(function: Callable) -> Callable:
    """One C++ loop in the place of the operators between two products, and no Python within TOKENS_AT_ONCE tokens."""
    options = {
        "cpp_wrapper": True,
        "realize_opcount_threshold": 8,  # what takes more operations is not computed again for each key
    }
    return any_order()(torch.compile(function, options=options))


def _eager(model: GPT, sizes: tuple[int, int, int], greedy: bool, compiled: bool = False) -> tuple[_State, Callable]:
    """A state with room for R tokens after prompts (B, P), sizes = (B, P, R), and `_extend` on it."""
    (B, P, R), new = sizes, partial(torch.zeros, device=model.device)
    state = _State(new(B, P + R, dtype=torch.int64), new(B, R), new(R, B, 1), model.new_cache(B, P + R))
    return state, partial(_extend, model, state, P, greedy, compiled)


_graphs: WeakKeyDictionary = WeakKeyDictionary()  # model → {what is captured: (state, CUDA graph of each `first`)}
KEPT = 4  # states of a model: training and evaluation, and the same of one change; the oldest goes


def _captured(model: GPT, sizes: tuple[int, int, int], greedy: bool) -> tuple[_State, Callable]:
    """The same with CUDA graphs of `_extend`, captured once for each model and sizes, and their replay.

    One launch then stands for some 50 kernels for each of TOKENS_AT_ONCE tokens, with no Python between them. A graph
    reads the weights where they are, so it follows every update. The uniforms are drawn outside of it.
    """
    of_model = _graphs.setdefault(model, {})
    key = (sizes, greedy, model.precision, model.embedding.weight.data_ptr())
    if key not in of_model:
        if len(of_model) == KEPT:
            del of_model[next(iter(of_model))]
        (state, extend), graphs, pieces = _eager(model, sizes, greedy), {}, range(0, sizes[2], TOKENS_AT_ONCE)
        pool = torch.cuda.graph_pool_handle()  # one for all: they run one after the other, and leave nothing in it
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up on a first run, which cannot be captured
            for first in pieces:
                extend(first)
        torch.cuda.current_stream().wait_stream(stream)
        for first in pieces:
            graphs[first] = torch.cuda.CUDAGraph()
            # The outer autocast keeps its copies of trained weights from one token of a graph to the next. A copy made
            # before the graph would be read, stale, by every replay.
            torch.clear_autocast_cache()
            lower = torch.autocast(model.device.type, model.precision, enabled=model.precision != torch.float32)
            with lower, torch.cuda.graph(graphs[first], pool=pool):
                extend(first)
        of_model[key] = state, graphs  # not `extend`, which would keep the model, and so this entry, forever
    state, graphs = of_model[key]
    for keys_and_values in state.cache:  # what a fault left there would be in every later score: NaN · 0 is NaN
        for kept in keys_and_values:
            kept.zero_()
    return state, lambda first: graphs[first].replay()
