"""What the modules' constructors refuse."""

from __future__ import annotations


def check_sizes(**sizes: int | None) -> None:
    """Refuses sizes that are not at least 1; None passes."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"fastattn: {name} is {size}; it must be at least 1.")


def check_dropout(dropout: float) -> None:
    """Refuses what is no probability."""
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"fastattn: dropout is {dropout}; it is a probability and must lie in [0, 1].")


def check_heads(name: str, features: int, num_heads: int) -> None:
    """Refuses features that the heads cannot share."""
    if features % num_heads:
        raise ValueError(
            f"fastattn: {name} is {features} and num_heads {num_heads}; each head takes an equal part: {name} must be a"
            " multiple of num_heads."
        )
