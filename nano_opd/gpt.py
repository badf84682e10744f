"""A decoder-only transformer: GPT-2 without biases, and with layer norms that learn nothing, one of them on the
embedding, others on queries and keys (over all heads at once).

Teacher and student are two sizes of it. With a static key-value cache, written in place, each new token costs one
position instead of the whole prefix; its logits equal those of the full forward.

The normalised queries and keys are not for show: after 400 supervised updates on 3-digit addition a 3×96 model is right
more than 0.99 of the time with them, and 0.39 to 0.87 without (three seeds). Nor are learned positions: long addition
looks its digits up by absolute place.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nano_opd.checks import require_tokens
from nano_opd.policy_gradient import logprobs_from

# By speed, and without cuDNN: on recent cards its attention in bfloat16 has NaN gradients (pytorch#196678).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, both (B, H, T, D)


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. GPT-2 small is GPTConfig(50257, 1024, 12, 12, 768)."""

    vocab_size: int
    block_size: int
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")


def norm(x: Tensor) -> Tensor:
    """(x − mean) / std over the last axis (Ba et al. 2016), one kernel everywhere; no learned gain or bias."""
    return F.layer_norm(x, x.shape[-1:])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q kᵀ / √D + mask) v, (B, H, T, D): q (B, H, T, D), k and v (B, H, S, D), mask (T, S) 0 or −∞, causal.

    Three ways, by speed: flash attention for many queries, which never builds the (T, S) scores, and on a GPU for more
    than one; two products for few, the first by baddbmm; for one query under torch.compile, products that become a loop
    over the keys.
    """
    B, H, T, D = q.shape
    if T > (1 if q.is_cuda else 64):
        with sdpa_kernel(ATTENTION) if q.is_cuda else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if T == 1 and torch.compiler.is_compiling():  # baddbmm would not become a loop
        scores = q * D**-0.5 @ k.transpose(1, 2) + mask
    else:
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D**-0.5)
    return (scores.softmax(-1) @ v).view(B, H, T, D)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.attention_out = nn.Linear(C, C, bias=False)
        self.mlp_in = nn.Linear(C, 4 * C, bias=False)
        self.mlp_out = nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor] | None, at: slice | Tensor) -> Tensor:
        B, T, C = x.shape
        qk, v = self.qkv(norm(x)).split([2 * C, C], dim=-1)
        q, k = norm(qk.view(B, T, 2, C)).unbind(2)  # each (B, T, C)
        q, k, v = (h.view(B, T, self.n_head, -1).transpose(1, 2) for h in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            for kept, new in zip(cache, (k, v)):
                kept[:, :, at] = new
            k, v = (kept[:, :, : mask.shape[1]] for kept in cache)
        y = attend(q, k, v, mask)
        x = x + self.attention_out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.gelu(self.mlp_in(norm(x))))


class GPT(nn.Module):
    """tokens (B, T) int64 → next-token logits (B, T, V).

    precision  dtype of matrix products and of the cache: float32 means the dtype of the weights; bfloat16 autocasts
               every product but the last, which makes the logits
    """

    precision = torch.float32

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)  # tied: also the output matrix
        self.position = nn.Embedding(config.block_size, config.n_embd)
        past = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()
        self.register_buffer("mask", torch.zeros(past.shape).masked_fill(~past, -torch.inf), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        for name, parameter in self.named_parameters():  # each block starts as the identity
            std = 0.0 if name.endswith("out.weight") else (2 if "blocks" in name else 1) * config.n_embd**-0.5
            nn.init.normal_(parameter, std=std)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def new_cache(self, batch_size: int, length: int) -> Cache:
        """An empty static cache of `length` positions. Raises ValueError when they do not fit in block_size."""
        c = self.config
        if length > c.block_size:
            raise ValueError(f"{length} tokens do not fit in block_size {c.block_size}")
        shape = (batch_size, c.n_head, length, c.n_embd // c.n_head)
        dtype = self.embedding.weight.dtype if self.precision == torch.float32 else self.precision
        new = partial(self.embedding.weight.new_zeros, shape, dtype=dtype)
        return [(new(), new()) for _ in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        at: slice | Tensor | None = None,
        logits_from: int = 0,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits of positions `logits_from` … T−1, (B, T − logits_from, V).

        cache    where keys and values go: those of a whole prompt, or of one token that stands `at` a position
        at       slice(n, n + 1) or (1,) int64, for which torch.compile makes one graph for all n; the token sees what
                 was cached before it
        targets  (B, T − logits_from): the log-probs of these tokens are returned in the place of logits, float32

        Raises ValueError unless the tokens are int64 (B, T), when they do not fit in block_size, at a position for
        several tokens or no cache, for logits_from outside 0 … T, or targets of another shape.
        """
        require_tokens(tokens=tokens)
        B, T = tokens.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit in block_size {self.config.block_size}")
        if at is not None and (T > 1 or cache is None):
            raise ValueError(f"at a position pass one token and the cache, not {T} tokens")
        if not 0 <= logits_from <= T:
            raise ValueError(f"logits_from must lie in 0 … {T}, not {logits_from}")
        if targets is not None and targets.shape != (B, T - logits_from):
            raise ValueError(f"targets must be {(B, T - logits_from)}, not {tuple(targets.shape)}")
        at, S = (slice(T), T) if at is None else (at, cache[0][0].shape[2])  # S keys to look at
        lower = self.precision != torch.float32
        autocast = partial(torch.autocast, self.device.type, self.precision)
        with autocast() if lower else nullcontext():
            x = norm(self.embedding(tokens) + self.position.weight[at])  # (B, T, C)
            mask = self.mask[at, :S].to(x.dtype)
            for block, kept in zip(self.blocks, cache or [None] * len(self.blocks)):
                x = block(x, mask, kept, at)
            x = norm(x[:, logits_from:])
        with autocast(enabled=False) if lower else nullcontext():  # a logit of 20 in bfloat16 is off by 0.06 nats
            x, weight = x.to(self.embedding.weight.dtype), self.embedding.weight
            if targets is None:
                return F.linear(x, weight)
            return logprobs_from(x.flatten(0, 1), weight, targets.flatten()).view(targets.shape)


def adamw(model: GPT, lr: float) -> torch.optim.AdamW:
    """The optimizer of every phase (Loshchilov & Hutter 2019), as one fused kernel where PyTorch has one."""
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=model.device.type != "mps"
    )
