"""What every function refuses: shapes that do not match, and numbers that are not finite."""

import torch
from torch import Tensor


class NumericalFault(ArithmeticError):
    """A number that is not finite, named where it arose."""


def require_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError naming the shapes when they differ: broadcasting would turn the mistake into a number."""
    if len({tuple(t.shape) for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes must be equal: {shapes}")


def require_mask(mask: Tensor) -> None:
    """Raises ValueError unless mask is boolean: a float mask would index and select something else."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, not {mask.dtype}")


def require_finite(name: str, values: Tensor, likely: str) -> None:
    """Raises NumericalFault with the likely cause when any value is not finite. Waits for the device."""
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        detail = str(values.item()) if values.numel() == 1 else f"not finite in {bad} of {values.numel()} places"
        raise NumericalFault(f"the {name} is {detail}; likely {likely}")
