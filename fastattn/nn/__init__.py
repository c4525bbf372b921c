"""Attention as torch.nn modules, over the fused kernels."""

from fastattn.nn.multihead import MultiheadAttention

__all__ = ["MultiheadAttention"]
