"""The random numbers of dropout and of hard attention, once more, in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor


def philox4x32(key: tuple[int, int], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 after Salmon et al. (2011), on int64 tensors that hold 32-bit words."""
    low = 0xFFFFFFFF

    def multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """High and low word of a product that does not fit int64: in halves of 16 bits."""
        x_high, x_low = x >> 16, x & 0xFFFF
        upper, lower = a * x_high, a * x_low
        middle = lower + ((upper & 0xFFFF) << 16)
        return (upper >> 16) + (middle >> 32), middle & low

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def random_words(seed: int, offset: int, B: int, H: int, Lq: int, Lk: int) -> Tensor:
    """The 32-bit word of each (b, h, i, j), int64: word j % 4 of the counter (j / 4, i, b H + h, offset), key seed."""
    bh = torch.arange(B * H).view(B, H, 1, 1).expand(B, H, Lq, Lk)
    i = torch.arange(Lq).view(1, 1, Lq, 1).expand(B, H, Lq, Lk)
    j = torch.arange(Lk).expand(B, H, Lq, Lk)
    low = 0xFFFFFFFF
    words = torch.stack(philox4x32((seed & low, seed >> 32 & low), (j // 4, i, bh, torch.tensor(offset & low))))
    return words.gather(0, (j % 4).unsqueeze(0)).squeeze(0)


def gumbel_noise(rng_state: Tensor, B: int, H: int, Lq: int, Lk: int) -> Tensor:
    """The noise that hard attention draws from (seed, offset), float64: -log(-log(u)), u = (word + 1/2) / 2^32."""
    words = random_words(int(rng_state[0]), int(rng_state[1]), B, H, Lq, Lk).double()
    # log1p where u is near 1.
    e = torch.where(words < 2**31, -torch.log((words + 0.5) / 2**32), -torch.log1p(-(2**32 - 0.5 - words) / 2**32))
    return -torch.log(e)
