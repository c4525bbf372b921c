"""Fused attention kernels for PyTorch: exact, vectorised, forward and backward, with every mask."""

__version__ = "0.1.0"

from fastattn import _requirements as _requirements  # first: refuses a torch that is too old for the rest

# isort: split
from fastattn import _provider as _provider  # makes fastattn known to torch.nn.attention, and activates nothing
from fastattn import integrations, nn, reference
from fastattn._additive import additive_attention
from fastattn._attention import attention
from fastattn._cache import KVCache
from fastattn._hard import HardAttentionOutput, hard_attention
from fastattn._info import Info, info
from fastattn._kv_cache import attention_with_kv_cache
from fastattn._plot import plot_attention
from fastattn._replace import ServedModules, replace_modules, restore_modules, served_modules
from fastattn._sdpa import (
    SdpaCalls,
    replace_sdpa,
    replaced_sdpa,
    restore_sdpa,
    scaled_dot_product_attention,
    sdpa_calls,
)
from fastattn._summary import AttentionSummary, attention_summary
from fastattn._varlen import varlen_attention
from fastattn._weights import attention_weights, merge_attention_states

__all__ = [
    "AttentionSummary",
    "HardAttentionOutput",
    "Info",
    "KVCache",
    "SdpaCalls",
    "ServedModules",
    "additive_attention",
    "attention",
    "attention_summary",
    "attention_weights",
    "attention_with_kv_cache",
    "hard_attention",
    "info",
    "integrations",
    "merge_attention_states",
    "nn",
    "plot_attention",
    "reference",
    "replace_modules",
    "replace_sdpa",
    "replaced_sdpa",
    "restore_modules",
    "restore_sdpa",
    "scaled_dot_product_attention",
    "sdpa_calls",
    "served_modules",
    "varlen_attention",
]
