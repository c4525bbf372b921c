"""A cache of keys and values that looks after its own memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastattn import _memory, _ops
from fastattn._kv_cache import attention_with_kv_cache

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What a growing cache without pages begins with, in keys.
_FIRST_LENGTH = 64


class KVCache:
    """Keys and values of a batch of sequences, for :func:`fastattn.attention_with_kv_cache`: storage, lengths, pages.

    Without ``page_size`` each sequence has one stretch of memory, as long as the longest sequence needs; with it,
    sequences take pages from a pool as they grow, and give them back. Either way:

    - :meth:`attend` appends and attends in one call, for all sequences or for some of them.
    - Memory grows by doubling, up to ``max_length`` keys to a sequence and ``num_pages`` pages in all.
    - :meth:`fork` and :meth:`reorder` (beam search) share memory between sequences with a common beginning; what is
      shared is copied when, and only when, one of them appends to it. With pages that is at most one page.
    - :meth:`truncate` takes tokens back: those that speculative decoding rejects, or the padding of a prompt.
    - :meth:`add` and :meth:`free` let sequences come and go (continuous batching).

    A call that is refused, or fails, leaves all sequences as they were.

    ``quantize="int8"`` stores each key and value in 8 bits, with a scale for each row and head: D + 4 bytes in place
    of 2 D in 16 bits. On standard normal keys and values o is then off by 0.9% of its root mean square, the largest
    error being 4.3% (bfloat16: 0.4% and 2.3%). Where a few numbers of a key are far larger than the others, those lose
    precision: with two of 128 ten times as large, 4.9% and 79% (bfloat16: 0.7% and 16%). docs/kv-cache.md has more.

    Args:
        batch_size: The number of sequences to begin with, all of them empty. Their numbers are 0 to batch_size - 1.
        kv_heads: Hkv, the number of key and value heads.
        head_dim: D, of q and k.
        v_head_dim: Dv, D by default.
        max_length: The number of keys that no sequence may exceed. Without pages all of it is allocated at once. None:
            no limit.
        page_size: The number of keys in a page, any number; None: no pages. 16 wastes the least memory, 64
            is read faster (docs/kv-cache.md).
        num_pages: The pages of the pool, which are then allocated at once and never exceeded. None: as many as needed.
        dtype: Of q, k, v and o; float32, bfloat16, float16 or float64. torch's default dtype by default.
        quantize: "int8" or None.
        device: Where the cache lies, the CPU by default.

    Raises:
        ValueError: A size is out of range.
        TypeError: An argument has the wrong type.

    Example:
        >>> import torch, fastattn
        >>> cache = fastattn.KVCache(2, kv_heads=2, head_dim=16, page_size=16)
        >>> def step(new, **options):
        ...     q, k, v = torch.randn(2, 8, new, 16), torch.randn(2, 2, new, 16), torch.randn(2, 2, new, 16)
        ...     return cache.attend(q, k, v, causal=True, **options)
        >>> o = step(20)  # two prompts
        >>> cache.truncate([20, 13])  # the second was padded
        >>> for _ in range(3):
        ...     o = step(1)
        >>> o.shape, cache.lengths, cache.used_pages
        (torch.Size([2, 8, 1, 16]), [23, 16], 3)
        >>> cache.reorder([1, 1])  # both beams go on from the second one
        >>> cache.lengths, cache.used_pages
        ([16, 16], 1)
    """

    def __init__(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        max_length: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        dtype: torch.dtype | None = None,
        quantize: Literal["int8"] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self._check_arguments(batch_size, kv_heads, head_dim, v_head_dim, max_length, page_size, num_pages)
        if dtype not in DTYPES:
            raise TypeError(
                f"fastattn: dtype is {dtype}; it must be torch.float32, torch.bfloat16, torch.float16 or torch.float64:"
                " for int8 pass quantize='int8' beside it."
            )
        if quantize not in (None, "int8"):
            raise ValueError(f"fastattn: quantize is {quantize!r}; it must be 'int8' or None.")
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.max_length, self.dtype, self.quantize = max_length, dtype, quantize
        self.device = torch.device("cpu" if device is None else device)
        self.is_paged = page_size is not None
        self._max_pages = num_pages
        # Without pages, "a page" is the whole memory of a sequence, and page_size its length.
        self._page_size = page_size if page_size is not None else (_FIRST_LENGTH if max_length is None else max_length)
        self._storage = _Storage(self, 0, self._page_size)
        self._references: list[int] = []  # for each page, the sequences that use it
        self._free: list[int] = []  # a heap: the lowest pages are taken first
        self._tables: dict[int, list[int]] = {}  # the pages of each sequence
        self._lengths: dict[int, int] = {}
        self._changes = 0  # of tables
        self._last_table: tuple[int, list[int], Tensor | None] = (-1, [], None)  # _changes, sequences, block_table
        self.add(batch_size)
        if num_pages is not None:
            self._grow_pool(num_pages)
        elif max_length is not None and page_size is None:
            self._grow_pool(batch_size)

    # --- What it holds ------------------------------------------------------------------------------------------------

    @property
    def sequences(self) -> list[int]:
        """The numbers of the sequences, in order; what q, k and v of :meth:`attend` are in."""
        return sorted(self._tables)

    @property
    def lengths(self) -> list[int]:
        """The number of keys of each sequence, in the order of their numbers."""
        return [self._lengths[s] for s in self.sequences]

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self._tables)

    def length(self, sequence: int) -> int:
        """The number of keys of one sequence."""
        return self._lengths[self._known(sequence)]

    def keys(self, sequence: int) -> Tensor:
        """(Hkv, length, D), in ``dtype``: the keys of a sequence. A copy, or, out of one piece of memory, a view."""
        return self._read(sequence, self._storage.k, self._storage.k_scale)

    def values(self, sequence: int) -> Tensor:
        """(Hkv, length, Dv), in ``dtype``: the values of a sequence. A copy, or, out of one piece of memory, a view."""
        return self._read(sequence, self._storage.v, self._storage.v_scale)

    @property
    def page_size(self) -> int | None:
        """The number of keys in a page; None without pages."""
        return self._page_size if self.is_paged else None

    @property
    def pages(self) -> int:
        """The number of pages that are allocated; without pages, of sequences."""
        return len(self._references)

    @property
    def used_pages(self) -> int:
        """The number of those that some sequence uses."""
        return len(self._references) - len(self._free)

    @property
    def nbytes(self) -> int:
        """The bytes that are allocated, scales included."""
        return sum(x.nbytes for x in self._storage.tensors())

    @property
    def k_cache(self) -> Tensor:
        """(pages, Hkv, page_size, D), in ``dtype`` or int8: the memory itself. Another tensor once it has grown."""
        return self._storage.k

    @property
    def v_cache(self) -> Tensor:
        """(pages, Hkv, page_size, Dv): the memory itself. Another tensor once it has grown."""
        return self._storage.v

    @property
    def k_scale(self) -> Tensor | None:
        """(pages, Hkv, page_size), float32, of an int8 cache; else None."""
        return self._storage.k_scale

    @property
    def v_scale(self) -> Tensor | None:
        """(pages, Hkv, page_size), float32, of an int8 cache; else None."""
        return self._storage.v_scale

    def block_table(self, sequences: Sequence[int] | None = None) -> Tensor:
        """(B, most pages of any), int32, on ``device``: the pages of the sequences, -1 beyond each one's own."""
        return self._table(self._selected(sequences), self._tables)

    def cache_lengths(self, sequences: Sequence[int] | None = None) -> Tensor:
        """(B,), int32, on ``device``: the lengths of the sequences."""
        return self._int32([self._lengths[s] for s in self._selected(sequences)])

    def __repr__(self) -> str:
        kind = f"{self.pages} pages of {self._page_size}" if self.is_paged else f"up to {self._page_size} keys"
        stored = f"{self.dtype}" if self.quantize is None else f"{self.quantize} ({self.dtype})"
        return (
            f"KVCache({len(self)} sequences, kv_heads={self.kv_heads}, head_dim={self.head_dim},"
            f" v_head_dim={self.v_head_dim}, {kind}, {stored}, {self.device}, {self.nbytes} bytes)"
        )

    # --- Attention ----------------------------------------------------------------------------------------------------

    def attend(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        sequences: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Appends k and v to the sequences, and attends over all of their keys.

        Args:
            q: (B, Hq, Lq, D), B the number of sequences.
            k: (B, Hkv, Lnew, D), appended to every one of them. None: nothing is.
            v: (B, Hkv, Lnew, Dv).
            sequences: Their numbers, in the order of q, k and v; each once. None: all of them, in order.
            **options: Those of :func:`fastattn.attention_with_kv_cache`: causal, window, scale, softcap, alibi_slopes,
                sinks, rotary_cos, rotary_sin, rotary_interleaved, return_lse.

        Returns:
            o, (B, Hq, Lq, Dv); with ``return_lse=True`` the pair (o, lse).

        Raises:
            ValueError: As there; or a sequence would exceed max_length, the pool has no page left, or there is no such
                sequence.
            TypeError: As there.
        """
        if torch.compiler.is_dynamo_compiling():
            _keep_out_of_traces()
            return self._attend_outside(q, k, v, sequences, options)
        return self._attend(q, k, v, sequences, options)

    def _attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, sequences: Sequence[int] | None, options: dict[str, Any]
    ) -> Any:
        for name in ("cache_lengths", "block_table", "k_scale", "v_scale"):
            if name in options:
                raise TypeError(f"fastattn: {name} is given; the cache has its own: leave it out.")
        chosen = self._selected(sequences)
        rows = _size_of(q, 0, len(chosen))
        if rows != len(chosen):
            raise ValueError(
                f"fastattn: q has batch size {rows} but {len(chosen)} sequences are to attend; there must be one"
                " row of q for each: pass sequences=, or add() what is missing."
            )
        new = _size_of(k, 2, 0)
        plan = self._plan(chosen, new)
        try:
            result = self._call(q, k, v, plan, options)
        except BaseException:
            self._give_back(plan.taken)
            raise
        self._commit(plan)
        return result

    def append(
        self,
        k: Any,
        v: Any,
        *,
        sequences: Sequence[int] | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = False,
    ) -> None:
        """Appends k and v without attending; the arguments are those of :meth:`attend`."""
        if not isinstance(k, Tensor) or k.dim() != 4:
            what = f"shape {tuple(k.shape)}" if isinstance(k, Tensor) else f"type {type(k).__name__}"
            raise TypeError(f"fastattn: k has {what}; it must be a (B, Hkv, Lnew, D) tensor.")
        q = k.new_empty((k.shape[0], self.kv_heads, 0, self.head_dim))
        self.attend(
            q,
            k,
            v,
            sequences=sequences,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
        )

    # --- Sequences that come, go and share ----------------------------------------------------------------------------

    def add(self, count: int = 1) -> list[int]:
        """Begins empty sequences and returns their numbers, the lowest that are free."""
        _check_count("count", count)
        numbers: list[int] = []
        number = 0
        while len(numbers) < count:
            if number not in self._tables:
                numbers.append(number)
            number += 1
        for number in numbers:
            self._tables[number], self._lengths[number] = [], 0
        return numbers

    def free(self, sequence: int) -> None:
        """Ends a sequence: gives back the pages that no other uses, and its number."""
        self._release(self._tables.pop(self._known(sequence)))
        del self._lengths[sequence]

    def reset(self) -> None:
        """Makes every sequence empty; the memory stays allocated."""
        self.truncate(0)

    def truncate(self, lengths: int | Sequence[int] | Tensor, *, sequences: Sequence[int] | None = None) -> None:
        """Shortens the sequences to these lengths: one number for all of them, or one for each.

        What speculative decoding rejects is taken back so; or, where prompts were padded to one length, the padding. A
        sequence may not grow: that would uncover what nobody has written.
        """
        chosen = self._selected(sequences)
        wanted = _ints("lengths", lengths)
        if isinstance(lengths, int) or (isinstance(lengths, Tensor) and lengths.dim() == 0):
            # One number for all: those that are shorter stay as they are.
            wanted = [min(wanted[0], self._lengths[s]) if wanted[0] >= 0 else wanted[0] for s in chosen]
        if len(wanted) != len(chosen):
            raise ValueError(
                f"fastattn: lengths has {len(wanted)} numbers but there are {len(chosen)} sequences; pass one for each,"
                " or a single one for all."
            )
        for s, n in zip(chosen, wanted, strict=True):
            if n < 0 or n > self._lengths[s]:
                raise ValueError(
                    f"fastattn: lengths has {n} for sequence {s}, which has {self._lengths[s]} keys; truncate only"
                    f" shortens: pass a number in [0, {self._lengths[s]}]."
                )
        for s, n in zip(chosen, wanted, strict=True):
            kept = _pages_of(n, self._page_size)
            table = self._tables[s]
            self._release(table[kept:])
            self._tables[s], self._lengths[s] = table[:kept], n

    def fork(self, sequence: int, *, length: int | None = None) -> int:
        """Begins a sequence that goes on from the first ``length`` keys (all, by default) of another one.

        They share memory until one of them appends to it: pages that are full are shared for good, the last one is
        copied then; without pages it is all of the sequence.

        Returns:
            The number of the new sequence.
        """
        here = self._lengths[self._known(sequence)]
        if length is not None:
            _check_count("length", length)
        if length is not None and length > here:
            raise ValueError(
                f"fastattn: length is {length} but sequence {sequence} has {here} keys; a fork shares keys that exist:"
                f" pass a length in [0, {here}]."
            )
        n = here if length is None else length
        shared = self._tables[sequence][: _pages_of(n, self._page_size)]
        (number,) = self.add()
        self._acquire(shared)
        self._tables[number], self._lengths[number] = list(shared), n
        return number

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Sequence n goes on from what sequence ``index[n]`` is now; there are len(index) of them afterwards.

        Beam search keeps the best beams so: a beam that is named twice is forked, one that is not named is freed. No
        key is copied before a sequence appends to memory that it shares.
        """
        wanted = [self._known(s) for s in _ints("index", index)]
        tables = [list(self._tables[s]) for s in wanted]
        lengths = [self._lengths[s] for s in wanted]
        for table in tables:
            self._acquire(table)
        for table in self._tables.values():
            self._release(table)
        self._tables, self._lengths = dict(enumerate(tables)), dict(enumerate(lengths))

    _attend_outside: Any = None

    # --- Behind them --------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_arguments(
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int | None,
        max_length: int | None,
        page_size: int | None,
        num_pages: int | None,
    ) -> None:
        _check_count("batch_size", batch_size)
        for name, size in (
            ("kv_heads", kv_heads),
            ("head_dim", head_dim),
            ("v_head_dim", v_head_dim),
            ("max_length", max_length),
            ("page_size", page_size),
            ("num_pages", num_pages),
        ):
            if size is not None:
                _check_count(name, size, least=1)
        if num_pages is not None and page_size is None:
            raise ValueError(
                f"fastattn: num_pages is {num_pages} but page_size is not given; a cache without pages has none: pass"
                " page_size too."
            )

    def _known(self, sequence: Any) -> int:
        if isinstance(sequence, bool) or not isinstance(sequence, int):
            raise TypeError(f"fastattn: sequence is a {type(sequence).__name__}; it must be the number of a sequence.")
        if sequence not in self._tables:
            raise ValueError(
                f"fastattn: sequence is {sequence}, which the cache does not have; it has {_listed(self.sequences)}:"
                " add() begins a new one."
            )
        return sequence

    def _selected(self, sequences: Sequence[int] | None) -> list[int]:
        if sequences is None:
            return self.sequences
        chosen = [self._known(s) for s in sequences]
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"fastattn: sequences is {_listed(chosen)}; each may be named once: fork() makes a copy.")
        return chosen

    def _int32(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def _table(self, chosen: list[int], tables: dict[int, list[int]]) -> Tensor:
        width = max((len(tables[s]) for s in chosen), default=0)
        rows = [tables[s] + [-1] * (width - len(tables[s])) for s in chosen]
        return self._int32(rows).view(len(chosen), width)  # type: ignore[arg-type]

    def _acquire(self, pages: Iterable[int]) -> None:
        self._changes += 1
        for page in pages:
            self._references[page] += 1

    def _release(self, pages: Iterable[int]) -> None:
        self._changes += 1
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                heapq.heappush(self._free, page)

    def _grow_pool(self, pages: int) -> None:
        self._storage = self._storage.grown(self, pages, self._page_size)
        for page in range(len(self._references), pages):
            heapq.heappush(self._free, page)
            self._references.append(0)

    def _make_room(self, chosen: list[int], new: int) -> None:
        """Refuses lengths beyond max_length, and lengthens sequences' memory where they have no pages."""
        longest = 0
        for s in chosen:
            longest = max(longest, self._lengths[s] + new)
            if self.max_length is not None and self._lengths[s] + new > self.max_length:
                raise ValueError(
                    f"fastattn: k has length {new} and sequence {s} has {self._lengths[s]} keys, but max_length is"
                    f" {self.max_length}; what is appended must fit: truncate() or free() the sequence, or make a cache"
                    " with a larger max_length."
                )
        if not self.is_paged and longest > self._page_size:
            length = self._page_size
            while length < longest:
                length *= 2
            self._storage = self._storage.grown(self, self.pages, length)
            self._page_size = length

    def _plan(self, chosen: list[int], new: int) -> _Plan:
        """Pages for `new` more keys of each sequence: taken from the pool, and copied to where they were shared."""
        self._make_room(chosen, new)
        tables = {s: self._tables[s] for s in chosen}
        taken: list[int] = []
        left: list[int] = []
        copies: list[tuple[int, int, int]] = []  # from, to, rows
        if new > 0:
            size = self._page_size
            wanted: list[tuple[int, int, int]] = []  # sequence, index in its table, rows to keep of the page there
            # Of the sequences that share a page, the last one to leave it may stay.
            references: dict[int, int] = {}
            for s in chosen:
                n, table = self._lengths[s], tables[s]
                if n % size:
                    page = table[n // size]
                    users = references.get(page, self._references[page])
                    if users > 1:
                        references[page] = users - 1
                        wanted.append((s, n // size, n % size))
                wanted.extend((s, index, 0) for index in range(_pages_of(n, size), _pages_of(n + new, size)))
            taken = self._take(len(wanted))
            for (s, index, rows), page in zip(wanted, taken, strict=True):
                if tables[s] is self._tables[s]:
                    tables[s] = list(tables[s])
                if rows:
                    left.append(tables[s][index])
                    copies.append((tables[s][index], page, rows))
                    tables[s][index] = page
                else:
                    tables[s].append(page)
            try:
                for source, target, rows in copies:
                    self._storage.copy_page(source, target, rows)
            except BaseException:
                self._give_back(taken)
                raise
        return _Plan(chosen, new, tables, taken, left)

    def _take(self, count: int) -> list[int]:
        missing = count - len(self._free)
        if missing > 0:
            if self._max_pages is not None:
                raise ValueError(
                    f"fastattn: k needs {count} more pages but {len(self._free)} of num_pages = {self._max_pages} are"
                    " free; free() or truncate() sequences, or make a cache with more pages."
                )
            # Without pages one holds a whole sequence, too much to have in stock.
            self._grow_pool(self.pages + (max(missing, self.pages) if self.is_paged else missing))
        return [heapq.heappop(self._free) for _ in range(count)]

    def _give_back(self, pages: list[int]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)

    def _commit(self, plan: _Plan) -> None:
        if plan.taken:
            for page in plan.taken:
                self._references[page] = 1
            self._release(plan.left)
            self._tables.update(plan.tables)
        for s in plan.sequences:
            self._lengths[s] += plan.new
        if plan.block_table is not None:
            self._last_table = (self._changes, plan.sequences, plan.block_table)

    def _call(self, q: Tensor, k: Tensor | None, v: Tensor | None, plan: _Plan, options: dict[str, Any]) -> Any:
        storage, chosen = self._storage, plan.sequences
        cache: dict[str, Any] = {"k_scale": storage.k_scale, "v_scale": storage.v_scale}
        k_cache, v_cache = storage.k, storage.v
        if not self.is_paged and all(plan.tables[s] == [n] for n, s in enumerate(chosen)):
            # One sequence after the other, as they lie in memory: no table needed.
            if len(chosen) != self.pages:
                rows = slice(len(chosen))
                k_cache, v_cache = k_cache[rows], v_cache[rows]
                cache = {name: None if x is None else x[rows] for name, x in cache.items()}
        else:
            changes, sequences, table = self._last_table
            if plan.taken or changes != self._changes or sequences != chosen:
                table = self._table(chosen, plan.tables)
            plan.block_table = cache["block_table"] = table
        lengths = self._int32([self._lengths[s] for s in chosen])
        attend: Any = attention_with_kv_cache
        return attend(q, k_cache, v_cache, k=k, v=v, cache_lengths=lengths, **cache, **options)

    def _read(self, sequence: int, rows: Tensor, scales: Tensor | None) -> Tensor:
        n, table = self._lengths[self._known(sequence)], self._tables[sequence]
        if len(table) == 1:
            found = rows[table[0], :, :n]
            scale = None if scales is None else scales[table[0], :, :n]
        else:
            pages = torch.tensor(table, dtype=torch.int64, device=self.device)
            found = rows.index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, :n]
            scale = None if scales is None else scales.index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, :n]
        if scale is None:
            return found
        accumulator = _ops.accumulator_dtype(self.dtype)
        return (found.to(accumulator) * scale.to(accumulator).unsqueeze(-1)).to(self.dtype)


def _keep_out_of_traces() -> None:
    """Makes KVCache._attend_outside: a cache knows more of its sequences after each call, and a trace goes stale."""
    if KVCache._attend_outside is None:
        KVCache._attend_outside = torch.compiler.disable(
            KVCache._attend,
            reason="fastattn: KVCache keeps its books in Python, outside of the graph; for a step in one graph call"
            " fastattn.attention_with_kv_cache with k_cache, v_cache, cache_lengths and block_table of your own.",
        )


# It runs while the trace is made, for torch.compiler.disable imports the compiler, which takes a second.
_keep_out_of_traces._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Plan:
    """What one call will have changed once it has succeeded."""

    def __init__(
        self, sequences: list[int], new: int, tables: dict[int, list[int]], taken: list[int], left: list[int]
    ) -> None:
        self.sequences, self.new = sequences, new
        self.tables = tables  # of these sequences, with the new pages
        self.taken = taken  # pages that nobody else uses yet
        self.left = left  # pages that one of the sequences no longer shares
        self.block_table: Tensor | None = None  # these tables as a tensor, where the call needs it


class _Storage:
    """The memory: pages of keys and values, and of an int8 cache the scales."""

    def __init__(self, cache: KVCache, pages: int, page_size: int) -> None:
        stored = cache.dtype if cache.quantize is None else torch.int8
        shape = (pages, cache.kv_heads, page_size)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        # Ordinary tensors: those made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._pairs: Tensor | None = None
            if cache.is_paged and cache.head_dim == cache.v_head_dim:
                # A head's keys and values of a page lie next to each other: memory delivers long pieces faster.
                self._pairs = _memory.empty((*shape[:2], 2, page_size, cache.head_dim), stored, cache.device)
                self.k, self.v = self._pairs[:, :, 0], self._pairs[:, :, 1]
            else:
                self.k = _memory.empty((*shape, cache.head_dim), stored, cache.device)
                self.v = _memory.empty((*shape, cache.v_head_dim), stored, cache.device)
            if cache.quantize is not None:
                self.k_scale = _memory.empty(shape, torch.float32, cache.device)
                self.v_scale = _memory.empty(shape, torch.float32, cache.device)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: where keys and values are in one piece of memory, it alone; each would take it along."""
        state = dict(self.__dict__)
        if self._pairs is not None:
            del state["k"], state["v"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._pairs is not None:
            self.k, self.v = self._pairs[:, :, 0], self._pairs[:, :, 1]

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    def grown(self, cache: KVCache, pages: int, page_size: int) -> _Storage:
        larger = _Storage(cache, pages, page_size)
        for old, new in zip(self.tensors(), larger.tensors(), strict=True):
            new[: old.shape[0], :, : old.shape[2]].copy_(old)
        return larger

    def copy_page(self, source: int, target: int, rows: int) -> None:
        for x in self.tensors():
            x[target, :, :rows].copy_(x[source, :, :rows])


def _size_of(x: Any, dim: int, otherwise: int) -> int:
    """A size of a tensor of four dimensions; what is none, the operator refuses."""
    return x.shape[dim] if isinstance(x, Tensor) and x.dim() == 4 else otherwise


def _pages_of(keys: int, page_size: int) -> int:
    return -(-keys // page_size)


def _listed(numbers: list[int]) -> str:
    """The numbers as text, in short."""
    shown = ", ".join(map(str, numbers[:8]))
    return f"[{shown}{', ...' if len(numbers) > 8 else ''}]"


def _check_count(name: str, value: Any, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"fastattn: {name} is a {type(value).__name__}; it must be an int.")
    if value < least:
        raise ValueError(f"fastattn: {name} is {value}; it must be at least {least}.")


def _ints(name: str, numbers: Any) -> list[int]:
    """One int, or several, or a tensor of them, as a list; a tensor on a GPU is waited for."""
    if isinstance(numbers, Tensor):
        if numbers.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8) or numbers.dim() > 1:
            raise TypeError(
                f"fastattn: {name} is a {numbers.dtype} tensor of shape {tuple(numbers.shape)}; it must be one int, or"
                " one for each sequence."
            )
        found: Any = numbers.tolist()
    else:
        found = numbers
    listed = [found] if isinstance(found, int) else list(found) if isinstance(found, list | tuple | range) else None
    if listed is None or not all(isinstance(n, int) and not isinstance(n, bool) for n in listed):
        raise TypeError(f"fastattn: {name} is {numbers!r}; it must be one int, or one for each sequence.")
    return listed
