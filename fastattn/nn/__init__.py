"""Attention as torch.nn modules, over the fused kernels.

==================  ===================================================================================================
MultiheadAttention  scaled dot-product attention in H learned subspaces: torch.nn.MultiheadAttention, fused
AdditiveAttention   v . tanh(W q + U k), for decoders with a recurrent state (Bahdanau, Cho and Bengio, 2015)
LuongAttention      dot, general or concat scores (Luong, Pham and Manning, 2015)
HardAttention       one key for each query, drawn or the most probable (Xu et al., 2015)
==================  ===================================================================================================

The masks of MultiheadAttention are PyTorch's, True = *ignore* this key. Those of the other three are this library's and
those of torch.nn.functional.scaled_dot_product_attention: True = *keep* it.
"""

from fastattn.nn.additive import AdditiveAttention
from fastattn.nn.hard import HardAttention
from fastattn.nn.luong import LuongAttention
from fastattn.nn.multihead import MultiheadAttention
from fastattn.nn.projected import ProjectedKeys

__all__ = ["AdditiveAttention", "HardAttention", "LuongAttention", "MultiheadAttention", "ProjectedKeys"]
