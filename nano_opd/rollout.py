"""On-policy sampling: the student answers, one token after the other, and both models score every token it chose.

Sampling is at temperature 1 from the whole vocabulary, because the estimators are expectations under exactly that
distribution. Tokens that are drawn at another temperature, or from a top-k, and then scored with the full softmax are
off-policy, so `sample` has neither option.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nano_opd.checks import require_finite, require_tokens
from nano_opd.gpt import GPT
from nano_opd.policy_gradient import logprobs_of
from nano_opd.tokenizer import EOS, PAD


@dataclass(frozen=True)
class Rollout:
    """Prompts with their sampled responses."""

    tokens: Tensor  # (B, P+R) int64: prompt, response with its first EOS, PAD
    prompt_length: int  # P, the same for every row
    mask: Tensor  # (B, R) bool: True up to and including the EOS; a response cut at the cap has none
    logp: Tensor  # (B, R) float32: log-prob in nats of each token when it was sampled, 0 where mask is False

    @property
    def responses(self) -> Tensor:
        """Return the response tokens, a view (B, R)."""
        return self.tokens[:, self.prompt_length :]

    @property
    def truncated(self) -> Tensor:
        """Return which responses reached the cap without an EOS, (B,) bool."""
        return self.mask.all(1) & (self.responses[:, -1] != EOS)


@torch.no_grad()
def sample(
    model: GPT, prompts: Tensor, max_new_tokens: int, generator: torch.Generator | None = None, greedy: bool = False
) -> Rollout:
    """Continue prompts (B, P) by up to R = max_new_tokens tokens each; stop early when every response has ended.

    greedy  take the likeliest token, for evaluation; it is not on-policy

    Raises ValueError for prompts that are not int64 (B, P), sizes below 1 or more tokens than block_size, and
    NumericalFault for log-probs that are not finite.
    system/fast_rollout.py draws the same tokens faster.
    """
    B, P = require_sizes(prompts, max_new_tokens)
    R = max_new_tokens
    device = prompts.device
    uniform = torch.rand(R, B, 1, generator=generator, device=device)  # one number for each token to come
    tokens = torch.cat([prompts, prompts.new_full((B, R), PAD)], dim=1)
    mask = torch.zeros(B, R, dtype=torch.bool, device=device)
    logp = torch.zeros(B, R, device=device)
    unfinished = torch.ones(B, 1, dtype=torch.bool, device=device)
    cache = model.new_cache(B, P + R)
    if P > 1:
        model(prompts[:, :-1], cache)  # keys and values of all but the prompt's last token
    for n in range(R):
        at = slice(P + n - 1, P + n)  # the token before the new one
        log_probs = model(tokens[:, at], cache, at)[:, 0].float().log_softmax(-1)  # (B, V)
        token = choose(log_probs, uniform[n], greedy)  # (B, 1)
        mask[:, n : n + 1] = unfinished
        tokens[:, P + n : P + n + 1] = torch.where(unfinished, token, PAD)
        logp[:, n : n + 1] = torch.where(unfinished, log_probs.gather(1, token), 0.0)
        unfinished = unfinished & (token != EOS)
        if not unfinished.any():
            break
    require_finite("log-prob of a sampled token", logp, "the weights of the model have overflowed")
    return Rollout(tokens, P, mask, logp)


def require_sizes(prompts: Tensor, max_new_tokens: int) -> tuple[int, int]:
    """Return (B, P) of the prompts.

    Raises ValueError unless they are int64 (B, P), or when there is nothing to continue.
    """
    require_tokens(prompts=prompts)
    B, P = prompts.shape
    if min(B, P, max_new_tokens) < 1:
        raise ValueError(f"sizes must be ≥ 1: {B=}, {P=}, {max_new_tokens=}")
    return B, P


def choose(log_probs: Tensor, uniform: Tensor, greedy: bool) -> Tensor:
    """Return one token per row, (B, 1): the first whose cumulative probability reaches 1 − `uniform`.

    log_probs  (B, V)
    uniform    (B, 1), in [0, 1), so that 1 − uniform > 0 and no token of probability 0 is the first
    greedy     take the likeliest token
    """
    if greedy:
        return log_probs.argmax(-1, keepdim=True)
    cdf = log_probs.exp().cumsum(-1)  # (B, V)
    threshold = (1 - uniform) * cdf[:, -1:]
    token = torch.searchsorted(cdf, threshold)
    token = token.clamp_(max=log_probs.shape[-1] - 1)  # NaN has no place in the order; `sample` reports it
    # Where a device adds up in another order, cdf can rise in its last digit at a token of probability 0.
    possible = log_probs.gather(-1, token).exp() > 0
    return torch.where(possible, token, log_probs.argmax(-1, keepdim=True))


def response_logits(model: GPT, tokens: Tensor, prompt_length: int) -> Tensor:
    """Return the logits (B, R, V) from which each response token was drawn; tokens (B, P+R), P = prompt_length.

    Position n of the response is predicted at P+n−1.
    """
    return model(tokens[:, :-1], logits_from=prompt_length - 1)


def response_logprobs(model: GPT, tokens: Tensor, prompt_length: int) -> Tensor:
    """Return the log-probs (B, R) float32, in nats, of the response tokens from one full forward; differentiable.

    tokens (B, P+R). Positions after the EOS hold the log-prob of PAD and mean nothing: mask them.
    """
    return model(tokens[:, :-1], logits_from=prompt_length - 1, targets=tokens[:, prompt_length:])


def score(
    model: GPT, tokens: Tensor, prompt_length: int, whole_vocabulary: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probs (B, R) of the response tokens and, with whole_vocabulary, the logits (B, R, V) behind them.

    Both are float32. Without the logits nothing as large as (B, R, V) needs to be kept.
    """
    if not whole_vocabulary:
        return response_logprobs(model, tokens, prompt_length), None
    logits = response_logits(model, tokens, prompt_length).float()
    return logprobs_of(tokens[:, prompt_length:], logits), logits
