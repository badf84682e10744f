"""What the functions of this package refuse: shapes that do not match, and values that are not finite."""

import difflib
import math
from collections.abc import Iterable

import torch
from torch import Tensor


class NumericalFault(ValueError):
    """A value that is not finite; the message names it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for a message about an unknown name; empty where nothing is near."""
    near = difflib.get_close_matches(name, known, n=1)
    if not near:
        return ""
    return f" (did you mean {near[0]}?)"


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError naming the shapes when they differ: broadcasting would turn the mistake into a number."""
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) > 1:
        named = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must be equal: {named}")


def require_floating(**tensors: Tensor) -> None:
    """Raise ValueError naming the tensor that is not floating-point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, not {tensor.dtype}")


def require_tokens(**tensors: Tensor) -> None:
    """Raise ValueError naming what is not int64 (B, T)."""
    for name, tokens in tensors.items():
        if tokens.dtype != torch.int64 or tokens.ndim != 2:
            raise ValueError(f"{name} must be int64, a row for each problem, not {tokens.dtype} {tuple(tokens.shape)}")


def require_log_probs(**tensors: Tensor) -> None:
    """Raise ValueError for logits, or anything else whose probabilities do not sum to 1 over the last axis."""
    for name, logp in tensors.items():
        log_of_sum = logp.logsumexp(-1)
        if not torch.allclose(log_of_sum, logp.new_zeros(()), atol=1e-3):
            raise ValueError(f"{name} must be log-probs, whose probabilities sum to 1 over the vocabulary")


def require_batch(mask: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless mask (B, R) is bool and not empty, and the others are floating-point of its shape."""
    if mask.dtype != torch.bool or mask.ndim != 2 or not mask.numel():
        raise ValueError(f"mask must be bool (B, R), not {mask.dtype} {tuple(mask.shape)}")
    require_floating(**tensors)
    require_same_shape(**tensors, mask=mask)


def require_divergence(divergence) -> None:
    """Raise ValueError for a name in the place of a divergence."""
    if isinstance(divergence, str):
        raise ValueError(f"the divergence must be an object: divergences.get({divergence!r}), not its name")


def require_finite_advantage(A: Tensor, divergence) -> None:
    """Raise NumericalFault for an advantage that is not finite."""
    if not torch.isfinite(A).all():
        raise NumericalFault(
            f"an advantage under {divergence.name} is not finite: the teacher gives a sampled token no probability, or "
            "u overflows; clip log u, or choose a divergence that pays a finite price for such a token"
        )


def require_constant(advantage: Tensor) -> None:
    """Raise ValueError if the advantage carries a gradient, which would be counted twice."""
    if advantage.requires_grad:
        raise ValueError("the advantage carries a gradient: a method must return it detached")


def require_log_ratio(log_u: Tensor) -> None:
    """Raise NumericalFault for NaN and for +∞, a sampled token of probability 0; at −∞ the teacher forbids a token."""
    if not (log_u < math.inf).all():
        raise NumericalFault(f"log u {tuple(log_u.shape)} holds NaN or +inf: a log-prob is broken")


def require_no_nan(name: str, values: Tensor) -> None:
    """Raise NumericalFault for NaN, in sums over the vocabulary; what is infinite there is left to the caller."""
    if values.isnan().any():
        raise NumericalFault(
            f"the {name} is NaN in {values.dtype}: the logits hold NaN or +inf, or -inf for every token of a prefix"
        )


def require_finite(name: str, values: Tensor, likely: str) -> None:
    """Raise NumericalFault with the likely cause when any value is not finite."""
    finite = torch.isfinite(values)
    if finite.all():
        return
    if values.numel() == 1:
        detail = str(values.item())
    else:
        detail = f"not finite in {int((~finite).sum())} of {values.numel()} places"
    raise NumericalFault(f"the {name} is {detail}; likely {likely}")
