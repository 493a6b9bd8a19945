"""The keys and values that one rank keeps for one route, in pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer of a pool, seen in the two ways that attention needs it; both share the pool's memory."""

    rows: torch.Tensor  # [pages * 2 * kv_heads * page_size, head_dim]: one row a token, head and side
    blocks: torch.Tensor  # [pages * 2 * kv_heads, page_size * head_dim]: one row a page, head and side
    pool: KVPool


class KVPool:
    """Pages of keys and values of one route on one rank: ``[layers, pages, 2, kv_heads, page_size, head_dim]``.

    Side 0 is keys (after rotary embedding), side 1 values. The tokens of one page and head lie together, so that
    gathering whole (page, side, head) blocks in table order gives contiguous keys and contiguous values of a
    sequence: what CPU attention is fastest on, what a kernel reads in one transaction, and what moves when heads
    change their rank. Zeroed at the start: a page's unwritten tail is masked, but a masked NaN is still a NaN.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.pages = pages
        self.page_size = page_size
        self.layers = layers
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        self._data = torch.zeros(
            (layers, pages, 2, kv_heads, page_size, head_dim), dtype=dtype, device=self.device
        )
        self._layers = tuple(
            KVLayer(
                rows=self._data[i].view(-1, head_dim),
                blocks=self._data[i].view(pages * 2 * kv_heads, page_size * head_dim),
                pool=self,
            )
            for i in range(layers)
        )
        self._scratch = torch.empty(0, dtype=dtype, device=self.device)

    @property
    def keys(self) -> torch.Tensor:
        """``[layers, pages, kv_heads, page_size, head_dim]``"""
        return self._data[:, :, 0]

    @property
    def values(self) -> torch.Tensor:
        """``[layers, pages, kv_heads, page_size, head_dim]``"""
        return self._data[:, :, 1]

    @property
    def bytes(self) -> int:
        return self._data.nbytes

    def layer(self, index: int) -> KVLayer:
        return self._layers[index]

    def scratch(self, elements: int) -> torch.Tensor:
        """A flat buffer that every call shares. Reused: fresh memory costs a page fault every 4 KiB.

        It grows by replacement: views of the smaller one from before stay valid.
        """
        if self._scratch.numel() < elements:
            self._scratch = torch.empty(elements, dtype=self.dtype, device=self.device)
        return self._scratch[:elements]
