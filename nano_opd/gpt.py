"""A decoder-only transformer: GPT-2 without biases, and with layer norms that learn nothing, one of them on the
embedding, others on queries and keys (over all heads at once).

Teacher and student are two sizes of it. With a static key-value cache, written in place, each new token costs one
position instead of the whole prefix; its logits equal those of the full forward.

The normalised queries and keys are not for show: after 400 supervised updates on 3-digit addition a 3×96 model is right
more than 0.99 of the time with them, and 0.39 to 0.87 without (three seeds). Nor are learned positions: long addition
looks its digits up by absolute place.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
    """Sizes of a GPT. GPT-2 small is GPTConfig(50257, 1024, 12, 12, 768).

    reference_slot  whether the prompts that it reads open with a slot for a reference (arithmetic.py), as those of a
                    model that is its own teacher. The layers do not depend on it; whoever makes prompts for the model
                    looks here
    """

    vocab_size: int
    block_size: int
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    reference_slot: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")


def norm(x: Tensor) -> Tensor:
    """Return (x − mean) / std over the last axis (Ba et al. 2016): one kernel everywhere, no learned gain or bias."""
    return F.layer_norm(x, x.shape[-1:])


def initial_std(name: str, n_embd: int) -> float:
    """Return the standard deviation of the weights `name` at the start.

    What a block adds to its input is 0 there, so each block starts as the identity.
    """
    if name.endswith("out.weight"):
        return 0.0
    if name.startswith("blocks"):
        return 2 * n_embd**-0.5
    return n_embd**-0.5  # the embeddings of tokens and positions


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √D + mask) v, (B, H, T, D), causal.

    q     (B, H, T, D)
    k, v  (B, H, S, D)
    mask  (T, S), 0 or −∞

    Three ways, by speed: flash attention for many queries, which never builds the (T, S) scores, and on a GPU for more
    than one; two products for few, the first by baddbmm; for one query under torch.compile, products that become a loop
    over the keys.
    """
    B, H, T, D = q.shape
    if q.is_cuda and T > 1:
        with sdpa_kernel(ATTENTION):
            return flash_attention(q, k, v)
    if T > 64:
        return flash_attention(q, k, v)
    q = q.flatten(0, 1)  # (B·H, T, D)
    k = k.flatten(0, 1)
    v = v.flatten(0, 1)
    if T == 1 and torch.compiler.is_compiling():  # baddbmm would not become a loop
        scores = q * D**-0.5 @ k.transpose(1, 2) + mask
    else:
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D**-0.5)
    return (scores.softmax(-1) @ v).view(B, H, T, D)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what `attend` does for a whole sequence, T = S, where the mask is known to be causal."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.attention_out = nn.Linear(C, C, bias=False)
        self.mlp_in = nn.Linear(C, 4 * C, bias=False)
        self.mlp_out = nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor] | None, at: slice | Tensor) -> Tensor:
        """Return the block's output (B, T, C).

        x      (B, T, C), which stands at the positions `at`
        mask   (T, S), 0 where a token may look at a key, else −∞
        cache  this layer's keys and values: those of x are written to it, and the first S of it are looked at
        """
        B, T, C = x.shape
        qk, v = self.qkv(norm(x)).split([2 * C, C], dim=-1)
        q, k = norm(qk.view(B, T, 2, C)).unbind(2)  # each (B, T, C)
        q = self.split_heads(q)
        k = self.split_heads(k)
        v = self.split_heads(v)
        if cache is not None:
            S = mask.shape[1]
            keys, values = cache
            keys[:, :, at] = k
            values[:, :, at] = v
            k = keys[:, :, :S]
            v = values[:, :, :S]
        y = attend(q, k, v, mask)
        x = x + self.attention_out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.gelu(self.mlp_in(norm(x))))

    def split_heads(self, x: Tensor) -> Tensor:
        """Return x (B, T, C) as (B, H, T, D)."""
        B, T, _ = x.shape
        return x.view(B, T, self.n_head, -1).transpose(1, 2)


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
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=initial_std(name, config.n_embd))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def new_cache(self, batch_size: int, length: int) -> Cache:
        """Return an empty static cache of `length` positions. Raises ValueError when they do not fit in block_size."""
        config = self.config
        if length > config.block_size:
            raise ValueError(f"{length} tokens do not fit in block_size {config.block_size}")
        weight = self.embedding.weight
        dtype = self.precision
        if self.precision == torch.float32:
            dtype = weight.dtype
        shape = (batch_size, config.n_head, length, config.n_embd // config.n_head)
        cache = []
        for _ in self.blocks:
            keys = weight.new_zeros(shape, dtype=dtype)
            values = weight.new_zeros(shape, dtype=dtype)
            cache.append((keys, values))
        return cache

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        at: slice | Tensor | None = None,
        logits_from: int = 0,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of positions `logits_from` … T−1, (B, T − logits_from, V), or the log-probs of `targets`.

        cache    where keys and values go: those of a whole prompt, or of one token that stands `at` a position
        at       slice(n, n + 1) or (1,) int64, for which torch.compile makes one graph for all n; the token sees what
                 was cached before it
        targets  (B, T − logits_from): the log-probs of these tokens are returned in the place of logits, float32

        Raises ValueError unless the tokens are int64 (B, T), when they do not fit in block_size, at a position for
        several tokens or no cache, for logits_from outside 0 … T, or targets of another shape.
        """
        self._require_arguments(tokens, cache, at, logits_from, targets)
        x = self.hidden_states(tokens, cache, at, logits_from)
        # One method for both: DistributedDataParallel adds up gradients, and torch.compile compiles, only where a model
        # is called, which is its forward. A method that one calls by name would go past both.
        if targets is None:
            return self.logits(x)
        return self.log_probs(x, targets)

    def hidden_states(self, tokens: Tensor, cache: Cache | None, at: slice | Tensor | None, logits_from: int) -> Tensor:
        """Return what the logits are made of, (B, T − logits_from, C), normalised, in the dtype of the weights."""
        if at is None:
            S = tokens.shape[1]
            at = slice(S)
        else:
            S = cache[0][0].shape[2]  # all keys that the cache has room for: the mask hides those still to come
        with self.autocast(enabled=True):
            x = norm(self.embedding(tokens) + self.position.weight[at])  # (B, T, C)
            mask = self.mask[at, :S].to(x.dtype)
            for layer, block in enumerate(self.blocks):
                kept = None if cache is None else cache[layer]
                x = block(x, mask, kept, at)
            x = norm(x[:, logits_from:])
        return x.to(self.embedding.weight.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (B, T, V) of hidden states x (B, T, C)."""
        with self.autocast(enabled=False):  # a logit of 20 in bfloat16 is off by 0.06 nats
            return F.linear(x, self.embedding.weight)

    def log_probs(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probs (B, T) of the targets (B, T) after hidden states x (B, T, C), float32.

        Where B·T·V is large, the logits are made and dropped a few positions at a time.
        """
        with self.autocast(enabled=False):
            logp = logprobs_from(x.flatten(0, 1), self.embedding.weight, targets.flatten())
        return logp.view(targets.shape)

    def autocast(self, enabled: bool) -> AbstractContextManager:
        """Return a context in which products are made in `precision` or, if not enabled, in the dtype of the weights.

        For float32 it does nothing, so that an autocast of the caller's remains.
        """
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision, enabled=enabled)

    def _require_arguments(
        self,
        tokens: Tensor,
        cache: Cache | None,
        at: slice | Tensor | None,
        logits_from: int,
        targets: Tensor | None,
    ) -> None:
        """Raise the errors of `forward`."""
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


def adamw(model: GPT, lr: float) -> torch.optim.AdamW:
    """Return the optimizer of every phase (Loshchilov & Hutter 2019), as one fused kernel where PyTorch has one."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=model.device.type != "mps",
    )
