"""On-policy sampling: the student answers, and every token it chose is scored.

Sampling is at temperature 1 from the whole vocabulary, because the estimators are expectations under exactly that
distribution: what is sampled with another temperature or a top-k and then scored with the full softmax is off-policy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nano_opd.checks import require_finite
from nano_opd.device import any_order
from nano_opd.gpt import GPT
from nano_opd.tokenizer import EOS, PAD

TOKENS_AT_ONCE = 4  # between two looks at whether all responses have ended


@dataclass(frozen=True)
class Rollout:
    """Prompts with their sampled responses.

    tokens         (B, P+R) int64: prompt, response with its first EOS, PAD
    prompt_length  P, the same for every row
    mask           (B, R) bool: True up to and including the EOS; a response cut at the cap has none
    logp           (B, R) float32: log-prob in nats of each sampled token when it was sampled, 0 where mask is False
    """

    tokens: Tensor
    prompt_length: int
    mask: Tensor
    logp: Tensor

    @property
    def responses(self) -> Tensor:
        """(B, R) view of the response tokens."""
        return self.tokens[:, self.prompt_length :]

    @property
    def truncated(self) -> Tensor:
        """(B,) bool: the response reached the cap without an EOS."""
        return self.mask.all(1) & (self.responses[:, -1] != EOS)


def prompt_tensor(prompts: list[list[int]], device: torch.device | str = "cpu") -> Tensor:
    """(B, P) int64. Raises ValueError for ragged prompts: a padded prompt would shift the positions of its response."""
    lengths = sorted({len(p) for p in prompts})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(f"prompts of one batch must all have the same length ≥ 1, not {lengths or 'no prompt at all'}")
    return torch.tensor(prompts, device=device)


@torch.no_grad()
def sample(
    model: GPT,
    prompts: Tensor,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    evaluation: bool = False,
    compiled: bool = False,
) -> Rollout:
    """Continue prompts (B, P) by up to max_new_tokens tokens each; stops early when every row has ended.

    With compiled=True the CPU samples through torch.compile; a GPU replays CUDA graphs either way.

    Only with evaluation=True: another temperature (0 is greedy) or a top-k. `logp` is always that of the model itself.
    Raises ValueError for such sampling in training, or for sizes below 1; NumericalFault for log-probs that are not
    finite.
    """
    if not evaluation and (temperature != 1.0 or top_k is not None):
        raise ValueError(
            f"training samples at temperature 1 without top-k, not temperature={temperature}, top_k={top_k}: anything "
            "else is not on-policy. For evaluation pass evaluation=True."
        )
    B, P = prompts.shape
    R = max_new_tokens
    if min(B, P, R) < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"sizes must be ≥ 1: {B=}, {P=}, {max_new_tokens=}, {top_k=}; and {temperature=} ≥ 0")
    new = _captured if prompts.is_cuda else partial(_eager, compiled=compiled and prompts.device.type == "cpu")
    state, extend = new(model, (B, P, R), temperature, top_k)
    responses = state.tokens[:, P:]  # a view: (B, R)
    state.tokens[:, :P] = prompts
    responses.fill_(PAD)
    state.uniform.uniform_(generator=generator)
    for first in range(0, R, TOKENS_AT_ONCE):
        extend(first)
        if (responses == EOS).any(1).all():  # the host waits for the device here, not at each token
            break
    ends = (responses == EOS).long()
    mask = ends.cumsum(1) - ends == 0  # no EOS before: rows that had ended went on, and what they said is dropped
    tokens = torch.cat([prompts, torch.where(mask, responses, PAD)], dim=1)
    logp = torch.where(mask, state.logp, 0.0)
    require_finite("log-prob of a sampled token", logp, "the weights of the model have overflowed")
    return Rollout(tokens, P, mask, logp)


def response_logits(model: GPT, tokens: Tensor, prompt_length: int) -> Tensor:
    """Logits (B, R, V) from which each response token was drawn: position n of the response is predicted at P+n−1."""
    return model(tokens[:, :-1], logits_from=prompt_length - 1)


def response_logprobs(model: GPT, tokens: Tensor, prompt_length: int) -> Tensor:
    """log-probs (B, R) float32, in nats, of the response tokens from one full forward; differentiable.

    tokens (B, P+R). Positions after the EOS hold the log-prob of PAD and mean nothing: mask them.
    """
    return model(tokens[:, :-1], logits_from=prompt_length - 1, targets=tokens[:, prompt_length:])


class _State(NamedTuple):
    """What a rollout is written to while it grows."""

    tokens: Tensor  # (B, P+R)
    logp: Tensor  # (B, R)
    uniform: Tensor  # (R, B, 1), drawn in advance
    cache: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: GPT, B: int, P: int, R: int) -> "_State":
        """Room for R tokens after prompts (B, P)."""
        new = partial(torch.zeros, device=model.device)
        return cls(new(B, P + R, dtype=torch.int64), new(B, R), new(R, B, 1), model.new_cache(B, P + R))


def _extend(model: GPT, state: _State, P: int, options: tuple, compiled: bool, first: int) -> None:
    """Draw tokens first … first + TOKENS_AT_ONCE − 1 of every response, in place."""
    through = _compiled if compiled else lambda function: function
    if first == 0 and P > 1:  # all of the prompt but its last token, which the first draw reads
        through(_prefill)(model, state.tokens[:, : P - 1], state.cache)
    last = min(first + TOKENS_AT_ONCE, state.logp.shape[1])
    start, end = P + first, P + last
    keys = -(-end // 64) * 64  # PyTorch's products of fewer are slower, and few numbers of keys are few graphs
    cache = [(k[:, :, :keys], v[:, :, :keys]) for k, v in state.cache]
    before = range(start - 1, end - 1)
    at = list(torch.tensor(before).split(1)) if compiled else [slice(n, n + 1) for n in before]
    drawn = through(_draw)(model, state.tokens[:, start - 1 : start], cache, at, state.uniform[first:last], *options)
    state.tokens[:, start:end], state.logp[:, first:last] = drawn


def _prefill(model: GPT, prompts: Tensor, cache: list[tuple[Tensor, Tensor]]) -> None:
    """Keys and values of the prompts, and no logits."""
    model(prompts, cache, logits_from=prompts.shape[1])


def _draw(
    model: GPT, token: Tensor, cache: list, at: list, uniform: Tensor, temperature: float, top_k: int | None
) -> tuple[Tensor, Tensor]:
    """n tokens, (B, n), and their log-probs; each reads the one before it at its position, the first `token` (B, 1)."""
    tokens, logps = [], []
    for position, u in zip(at, uniform):
        logp = model(token, cache, position)[:, 0].float().log_softmax(-1)  # (B, V)
        token = _choose(logp, u, temperature, top_k)  # (B, 1)
        tokens.append(token)
        logps.append(logp.gather(1, token))
    return torch.cat(tokens, 1), torch.cat(logps, 1)


def _choose(logp: Tensor, uniform: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """One token per row, (B, 1): the first whose cumulative probability reaches 1 − `uniform` (B, 1), in (0, 1]."""
    if temperature == 0:
        return logp.argmax(-1, keepdim=True)
    if temperature != 1:
        logp = (logp / temperature).log_softmax(-1)
    if top_k is not None:
        kth = logp.topk(min(top_k, logp.shape[-1])).values[:, -1:]
        logp = logp.masked_fill(logp < kth, -torch.inf)
    cdf = logp.exp().cumsum(-1)  # (B, V)
    token = torch.searchsorted(cdf, (1 - uniform) * cdf[:, -1:])  # never of probability 0, since 1 − uniform > 0
    return token.clamp_(max=logp.shape[-1] - 1)  # NaN has no place; it is reported with its step


@lru_cache
def _compiled(function: Callable) -> Callable:
    """One C++ loop, not several operators, between two matrix products, and no Python within TOKENS_AT_ONCE tokens."""
    options = {
        "cpp_wrapper": True,
        "memory_planning": True,
        "realize_opcount_threshold": 8,  # what takes more operations is not computed again for each key
    }
    return any_order()(torch.compile(function, options=options))


def _eager(
    model: GPT, sizes: tuple[int, int, int], *options, compiled: bool = False
) -> tuple[_State, Callable[[int], None]]:
    """A state for one rollout, and `_extend` on it."""
    state = _State.of(model, *sizes)
    return state, partial(_extend, model, state, sizes[1], options, compiled)


_graphs: WeakKeyDictionary = WeakKeyDictionary()  # model → {what is captured: (state, CUDA graph of each `first`)}


def _captured(model: GPT, sizes: tuple[int, int, int], *options) -> tuple[_State, Callable[[int], None]]:
    """The same with CUDA graphs of `_extend`, captured once for each model and sizes, and their replay.

    One launch then stands for some 50 kernels for each of TOKENS_AT_ONCE tokens, with no Python between them. A graph
    reads the weights where they are, so it follows every update; the uniforms are drawn outside of it.
    """
    of_model = _graphs.setdefault(model, {})
    key = (sizes, options, model.precision, model.embedding.weight.data_ptr())
    if key not in of_model:
        (state, extend), graphs, pieces = _eager(model, sizes, *options), {}, range(0, sizes[2], TOKENS_AT_ONCE)
        pool = torch.cuda.graph_pool_handle()  # one for all: they run one after the other, and leave nothing in it
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up on a first run, which cannot be captured
            for first in pieces:
                extend(first)
        torch.cuda.current_stream().wait_stream(stream)
        for first in pieces:
            graphs[first] = torch.cuda.CUDAGraph()
            # the outer autocast keeps its copies of trained weights from one token of a graph to the next; a copy
            # made before the graph would be read, stale, by every replay
            torch.clear_autocast_cache()
            lower = torch.autocast("cuda", model.precision, enabled=model.precision != torch.float32)
            with lower, torch.cuda.graph(graphs[first], pool=pool):
                extend(first)
        of_model[key] = state, graphs  # not `extend`, which would keep the model, and so this entry, forever
    state, graphs = of_model[key]
    return state, lambda first: graphs[first].replay()
