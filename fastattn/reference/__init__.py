"""What every function of fastattn computes, in plain torch operations: slow, complete and meant to be read.

=============================  =====================================================
scaled dot-product attention   :func:`attention`, :func:`scores`, :func:`weights`
packed sequences               :func:`varlen_attention`
additive attention             :func:`additive_attention`, :func:`additive_scores`
hard attention                 :func:`log_probabilities`, :func:`hard_choice`, :func:`hard_attention`
the weights, summarised        :func:`attention_summary`
what all of them share         :func:`visible`, :func:`dropped`
=============================  =====================================================

With `dtype=torch.float64` these functions are the tests' oracle. With `dtype=None` they compute in the inputs' own
dtype, as a person would write it in PyTorch: every intermediate result is rounded to it. That is the baseline which the
kernels have to match in accuracy. What has a gradient can be differentiated twice, and no mask makes one NaN. Keys and
values beyond kv_lengths are never used: NaN there goes nowhere.

Not handled here: argument checks (the public functions make them), and anything but four-dimensional q, k and v (and
the packed ones of varlen_attention).
"""

from fastattn.reference._additive import additive_attention, additive_scores
from fastattn.reference._attention import attention, dropped, scores, visible, weights
from fastattn.reference._hard import hard_attention, hard_choice, log_probabilities
from fastattn.reference._summary import attention_summary
from fastattn.reference._varlen import varlen_attention

__all__ = [
    "additive_attention",
    "additive_scores",
    "attention",
    "attention_summary",
    "dropped",
    "hard_attention",
    "hard_choice",
    "log_probabilities",
    "scores",
    "varlen_attention",
    "visible",
    "weights",
]
