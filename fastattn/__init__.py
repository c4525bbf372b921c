"""Fused attention kernels for PyTorch: exact, vectorised, forward and backward, with every mask."""

__version__ = "0.1.0"

from fastattn._attention import attention

__all__ = ["attention"]
