"""Random stores of offloaded pages that kernel and fault tests share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import DEVICE, ON_GPU

from vllm_sparse.kernels.reference.e4m3 import kept, to_e4m3
from vllm_sparse.offload.pool import view_from_device
from vllm_sparse.pages.hot_set import HotSet, Lookups
from vllm_sparse.pages.page_table import PageTable
from vllm_sparse.pages.write_plan import WritePlan


@dataclass
class Store:
    """One layer of a store: host pages with contents, poison elsewhere."""

    host: torch.Tensor
    hot: torch.Tensor
    summaries: torch.Tensor
    plan: WritePlan
    hot_set: HotSet
    lookups: Lookups
    page_size: int
    layer: int = 1
    exponents: torch.Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.host.shape[1]

    def contents(self, head_pages: torch.Tensor) -> torch.Tensor:
        """K and V of places in a page table: in the hot store, or, below 0, on the host."""
        head_pages, hot = head_pages.long(), self.hot[:, :, : self.page_size].flatten(0, 1)
        host = self.on_host((~head_pages).clamp(min=0))
        return torch.where((head_pages >= 0)[:, None, None], hot[head_pages.clamp(min=0)], host)

    def on_host(self, head_pages: torch.Tensor) -> torch.Tensor:
        """K and V of head pages as the host holds them, in the dtype of the hot store."""
        by_head_page = None if self.exponents is None else self.exponents.flatten(0, 1)
        return kept(self.host.flatten(0, 1), by_head_page, head_pages.long(), self.hot.dtype)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as the engine keeps host pages: pinned and seen from the GPU, or as it is on a CPU."""
    return view_from_device(tensor.pin_memory()) if ON_GPU else tensor


def make_store(
    num_blocks: int,
    kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 16,
    sets: int = 3,
    staged: int = 12,
    max_tokens: int = 256,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    summary_slots: int = 1,
    fp8: bool = False,
    room: int = 0,
) -> Store:
    """``room``: slots after the summaries of a page, as beside states."""
    generator = torch.Generator().manual_seed(seed)
    host = torch.randn(num_blocks, kv_heads, page_size, 2 * head_dim, generator=generator).to(dtype)
    exponents = None
    if fp8:  # head pages of very different sizes
        host *= 2.0 ** torch.randint(-12, 12, (num_blocks, kv_heads, 1, 1), generator=generator)
        host, exponents = to_e4m3(host)
        exponents = exponents.to(DEVICE)
    pages = staged - (-16 * sets // kv_heads)
    hot = torch.full((pages, kv_heads, page_size + summary_slots, 2 * head_dim), float("nan"), dtype=dtype)
    summaries = torch.full((num_blocks, kv_heads, summary_slots + room, 2 * head_dim), float("nan"), dtype=dtype)
    lookups = Lookups.empty(4096, DEVICE)
    lookups.misses.fill_(-7)
    return Store(
        host=on_host(host), hot=hot.to(DEVICE), summaries=summaries.to(DEVICE)[:, :, :summary_slots],
        plan=WritePlan.empty(max_tokens, staged, 3, DEVICE),
        hot_set=HotSet.empty(num_blocks * kv_heads, 16 * sets, staged * kv_heads, DEVICE),
        lookups=lookups, page_size=page_size, exponents=exponents,
    )  # fmt: skip


def chosen_pages(store: Store, rows: list[list[int]], width: int, last_tokens: int = 5) -> PageTable:
    """A table of ``rows`` [request][blocks], the same for all heads; rows end in a page of ``last_tokens``."""
    table = PageTable.empty(len(rows), store.kv_heads, width, DEVICE)
    table.head_pages.fill_(2**30)
    for request, blocks in enumerate(rows):
        for head in range(store.kv_heads):
            row = request * store.kv_heads + head
            head_pages = torch.tensor(blocks, dtype=torch.int32, device=DEVICE) * store.kv_heads + head
            table.head_pages[row, : len(blocks)] = head_pages
            table.lengths[row] = max(0, (len(blocks) - 1) * store.page_size + last_tokens) if blocks else 0
    return table


def assert_consistent(store: Store) -> None:
    """Every head page in the map lies in a slot of its own, with the host's contents."""
    hot_set = store.hot_set
    held = torch.nonzero(hot_set.slot_of >= 0).squeeze(1)
    slots = hot_set.slot_of[held].long()
    assert len(set(slots.tolist())) == len(slots), "two head pages in one slot"
    assert torch.equal(hot_set.slot_head_page[slots].long(), held)
    found = store.contents(hot_set.first_head_page + slots)
    assert torch.equal(found, store.on_host(held))


def copy_of(store: Store) -> Store:
    """The same store in memory of its own, for a reference to work on."""

    def clone(value):
        if isinstance(value, torch.Tensor):
            return value.clone()
        if isinstance(value, WritePlan | HotSet | Lookups):
            return type(value)(**{name: clone(field) for name, field in vars(value).items()})
        return value

    return Store(**{name: clone(value) for name, value in vars(store).items()})


def tail_slots(blocks: list[int], rows: list[int], page_size: int) -> torch.Tensor:
    """A decode step's slot mapping: one token per request; block -1: padding."""
    slots = [block * page_size + row if block >= 0 else -1 for block, row in zip(blocks, rows, strict=True)]
    return torch.tensor(slots, dtype=torch.int64, device=DEVICE)
