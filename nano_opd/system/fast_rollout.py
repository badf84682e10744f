"""The sampler of rollout.py made fast: the same tokens in fewer launches.

    CPU         rollout.sample itself, or, with --compile on, several tokens as one graph of torch.compile
    CUDA GPU    several tokens as one captured CUDA graph, replayed; with --compile off, rollout.sample itself

`sampler` chooses. Both fast ways draw TOKENS_AT_ONCE tokens in one piece, and look for the end of all responses only
between two pieces. What a response says after its EOS is dropped.
"""

from collections.abc import Callable
from functools import lru_cache
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
    """Return a function like rollout.sample, the fastest for this device and --compile.

    It samples from a replica or a compiled model as from the model inside.

    seldom  for evaluation, which does not earn a compilation back
    """
    if device.type == "cuda" and compile != "off":
        return sample_captured
    if device.type == "cpu" and compile == "on" and not seldom:
        return sample_compiled
    return sample_plain


def sample_plain(
    model: GPT, prompts: Tensor, max_new_tokens: int, generator: torch.Generator | None = None, greedy: bool = False
) -> Rollout:
    """Return what rollout.sample does."""
    return rollout.sample(unwrap(model), prompts, max_new_tokens, generator, greedy)


def sample_compiled(
    model: GPT, prompts: Tensor, max_new_tokens: int, generator: torch.Generator | None = None, greedy: bool = False
) -> Rollout:
    """Return the same, with each piece drawn by one graph of torch.compile."""
    return sample(unwrap(model), prompts, max_new_tokens, generator, greedy, begin=compiled_draft)


def sample_captured(
    model: GPT, prompts: Tensor, max_new_tokens: int, generator: torch.Generator | None = None, greedy: bool = False
) -> Rollout:
    """Return the same, with each piece drawn by one replay of a captured CUDA graph."""
    return sample(unwrap(model), prompts, max_new_tokens, generator, greedy, begin=captured_draft)


# ---------------------------------------------------------------------------------------------- a draft, piece by piece


class Sizes(NamedTuple):
    """How much is sampled."""

    B: int  # prompts
    P: int  # tokens of each prompt
    R: int  # tokens of each response, at most


class State(NamedTuple):
    """What a rollout is written to while it grows."""

    tokens: Tensor  # (B, P+R)
    logp: Tensor  # (B, R)
    uniform: Tensor  # (R, B, 1), drawn in advance
    cache: Cache


class Draft:
    """Responses while they are sampled: `state` holds them, and `extend` draws the next piece of each."""

    def __init__(self, model: GPT, sizes: Sizes, greedy: bool, compiled: bool = False):
        self.model = model
        self.sizes = sizes
        self.greedy = greedy
        self.compiled = compiled
        B, P, R = sizes
        self.state = State(
            tokens=torch.zeros(B, P + R, dtype=torch.int64, device=model.device),
            logp=torch.zeros(B, R, device=model.device),
            uniform=torch.zeros(R, B, 1, device=model.device),
            cache=model.new_cache(B, P + R),
        )

    def extend(self, first: int) -> None:
        """Draw tokens first … first + TOKENS_AT_ONCE − 1 of every response, in place."""
        _, P, R = self.sizes
        state = self.state
        last = min(first + TOKENS_AT_ONCE, R)
        start = P + first
        end = P + last
        before = range(start - 1, end - 1)  # where the token stands that each new one follows
        if self.compiled:
            read = compiled(prefill)
            write = compiled(draw)
            at = list(torch.tensor(before).split(1))
        else:
            read = prefill
            write = draw
            at = [slice(n, n + 1) for n in before]
        if first == 0 and P > 1:  # all of the prompt but its last token, which the first draw reads
            read(self.model, state.tokens[:, : P - 1], state.cache)
        keys = -(-end // 64) * 64  # a multiple of 64, so that few graphs are compiled; smaller products are slower too
        cache = [(k[:, :, :keys], v[:, :, :keys]) for k, v in state.cache]
        token = state.tokens[:, start - 1 : start]
        tokens, logp = write(self.model, token, cache, at, state.uniform[first:last], self.greedy)
        state.tokens[:, start:end] = tokens
        state.logp[:, first:last] = logp


def compiled_draft(model: GPT, sizes: Sizes, greedy: bool) -> Draft:
    """Return a draft whose pieces are drawn by compiled functions."""
    return Draft(model, sizes, greedy, compiled=True)


def prefill(model: GPT, prompts: Tensor, cache: Cache) -> None:
    """Write keys and values of the prompts to the cache, and make no logits."""
    model(prompts, cache, logits_from=prompts.shape[1])


def draw(
    model: GPT, token: Tensor, cache: Cache, at: list[slice | Tensor], uniform: Tensor, greedy: bool
) -> tuple[Tensor, Tensor]:
    """Return the next n tokens and their log-probs, each (B, n).

    token    (B, 1), the one before the first of them
    at       n positions: that of `token`, and those of the new ones but the last
    uniform  (n, B, 1)
    """
    tokens = []
    logps = []
    for position, uniform_of_one in zip(at, uniform):
        logp = model(token, cache, position)[:, 0].float().log_softmax(-1)  # (B, V)
        token = choose(logp, uniform_of_one, greedy)  # (B, 1)
        tokens.append(token)
        logps.append(logp.gather(1, token))
    return torch.cat(tokens, 1), torch.cat(logps, 1)


@lru_cache
def compiled(function: Callable) -> Callable:
    """Return the function compiled.

    It then has one C++ loop in the place of the operators between two products, and no Python within TOKENS_AT_ONCE
    tokens.
    """
    options = {
        "cpp_wrapper": True,
        "realize_opcount_threshold": 8,  # what takes more operations is not computed again for each key
    }
    return any_order()(torch.compile(function, options=options))


# ---------------------------------------------------------------------------------------- the same draft as CUDA graphs

KEPT = 4  # drafts of a model: training and evaluation, and the same of one change; the oldest goes
_drafts: WeakKeyDictionary = WeakKeyDictionary()  # model → {what was captured: CapturedDraft}


def captured_draft(model: GPT, sizes: Sizes, greedy: bool) -> "CapturedDraft":
    """Return the CUDA graphs of a draft, captured once for each model and sizes, with an empty cache."""
    of_model = _drafts.setdefault(model, {})
    key = (sizes, greedy, model.precision, model.embedding.weight.data_ptr())
    if key not in of_model:
        if len(of_model) == KEPT:
            oldest = next(iter(of_model))
            del of_model[oldest]
        of_model[key] = CapturedDraft(model, sizes, greedy)
    draft = of_model[key]
    for keys, values in draft.state.cache:  # what a fault left there would be in every later score: NaN · 0 is NaN
        keys.zero_()
        values.zero_()
    return draft


class CapturedDraft:
    """A draft whose pieces are CUDA graphs, one of each, that are replayed on the same tensors in every rollout.

    One launch then stands for some 50 kernels for each of TOKENS_AT_ONCE tokens, with no Python between them. A graph
    reads the weights where they are, so it follows every update. The uniforms are drawn outside of it.
    """

    def __init__(self, model: GPT, sizes: Sizes, greedy: bool):
        draft = Draft(model, sizes, greedy)
        self.state = draft.state  # not the draft, which would keep the model, and so its entry in _drafts, forever
        self.graphs = {}
        pieces = range(0, sizes.R, TOKENS_AT_ONCE)
        pool = torch.cuda.graph_pool_handle()  # one for all: they run one after the other, and leave nothing in it
        warm_up(draft, pieces)
        for first in pieces:
            self.graphs[first] = capture(draft, first, pool)

    def extend(self, first: int) -> None:
        """Draw tokens first … first + TOKENS_AT_ONCE − 1 of every response, in place."""
        self.graphs[first].replay()


def warm_up(draft: Draft, pieces: range) -> None:
    """Draw all pieces without a graph: libraries set themselves up on a first run, which cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for first in pieces:
            draft.extend(first)
    torch.cuda.current_stream().wait_stream(stream)


def capture(draft: Draft, first: int, pool) -> torch.cuda.CUDAGraph:
    """Return the CUDA graph of one piece, which has its memory from the pool."""
    graph = torch.cuda.CUDAGraph()
    # The outer autocast keeps its copies of trained weights from one token of a graph to the next. A copy made before
    # the graph would be read, stale, by every replay.
    torch.clear_autocast_cache()
    precision = draft.model.precision
    lower = torch.autocast(draft.model.device.type, precision, enabled=precision != torch.float32)
    with lower, torch.cuda.graph(graph, pool=pool):
        draft.extend(first)
    return graph


# ------------------------------------------------------------------------------------------ from a draft to the rollout


@torch.no_grad()
def sample(
    model: GPT,
    prompts: Tensor,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    greedy: bool = False,
    begin: Callable[[GPT, Sizes, bool], Draft | CapturedDraft] = Draft,
) -> Rollout:
    """Return what rollout.sample does, drawn in pieces of TOKENS_AT_ONCE tokens.

    begin  makes the draft, from the model, the sizes and `greedy`: Draft, compiled_draft or captured_draft
    """
    B, P = require_sizes(prompts, max_new_tokens)
    R = max_new_tokens
    draft = begin(model, Sizes(B, P, R), greedy)
    state = draft.state
    responses = state.tokens[:, P:]  # a view: (B, R)
    state.tokens[:, :P] = prompts
    responses.fill_(PAD)
    state.uniform.uniform_(generator=generator)
    for first in range(0, R, TOKENS_AT_ONCE):
        draft.extend(first)
        if (responses == EOS).any(1).all():  # the host waits for the device here, not at each token
            break
    ends = (responses == EOS).long()
    mask = ends.cumsum(1) - ends == 0  # no EOS before it
    tokens = torch.cat([prompts, torch.where(mask, responses, PAD)], dim=1)
    logp = torch.where(mask, state.logp, 0.0)
    require_finite("log-prob of a sampled token", logp, "the weights of the model have overflowed")
    return Rollout(tokens, P, mask, logp)
