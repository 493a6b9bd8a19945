"""The logical KV pages of one route: who holds which, and which may be taken."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from hexgen.errors import EngineError


class PagePool:
    """``pages`` page numbers (0 .. pages - 1) of ``page_size`` tokens each.

    A page is free, referenced (by one sequence or by several that share it), or kept: referenced by nobody, its
    content still wanted by the prefix cache. Kept pages are taken, least recently released first, when free ones
    run out; ``on_evict`` hears of each. All operations cost O(pages named), none O(pages in the pool).
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self.on_evict: Callable[[int], None] | None = None
        self._free = list(range(pages - 1, -1, -1))  # a stack: the page freed last is taken first
        self._references = [0] * pages
        self._wanted = bytearray(pages)  # 1: goes to the kept pages when its last reference goes
        self._kept: OrderedDict[int, None] = OrderedDict()  # oldest release first

    @property
    def available(self) -> int:
        """Pages that ``allocate`` could hand out now: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        return len(self._kept)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def unreferenced(self, pages: Iterable[int]) -> int:
        """How many of ``pages`` nobody holds: sharing them makes that many fewer available."""
        references = self._references
        return sum(1 for page in pages if references[page] == 0)

    def allocate(self, count: int) -> list[int]:
        """``count`` pages with one reference each. ``EngineError`` where fewer are available."""
        if count > self.available:
            raise EngineError(f"{count} KV pages were asked of a pool with {self.available} available")
        taken: list[int] = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            taken.append(page)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more reference to each of ``pages``, which are referenced or kept already."""
        for page in pages:
            if self._references[page] == 0:
                if page not in self._kept:
                    raise EngineError(f"KV page {page} is free and cannot be shared")
                del self._kept[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference fewer to each of ``pages``, in the order of their positions in the sequence.

        The last pages are let go first, so that eviction shortens a cached prefix from its end: a page whose
        predecessor is gone can never be matched again.
        """
        for page in reversed(pages):
            left = self._references[page] - 1
            if left < 0:
                raise EngineError(f"KV page {page} was released more often than it was taken")
            self._references[page] = left
            if left == 0:
                if self._wanted[page]:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """From now on ``page`` is kept instead of freed when its last reference goes."""
        if self._references[page] == 0:
            raise EngineError(f"KV page {page} is referenced by nobody and cannot be marked for keeping")
        self._wanted[page] = 1

    def check(self) -> None:
        """``EngineError`` where a page is in two places or in none. Walks the whole pool; call it when idle."""
        free = set(self._free)
        referenced = {page for page, count in enumerate(self._references) if count > 0}
        kept = set(self._kept)
        counted = len(self._free) + len(referenced) + len(kept)
        if counted != self.pages or len(free | referenced | kept) != self.pages:
            raise EngineError(
                f"{len(self._free)} free, {len(referenced)} referenced and {len(kept)} kept KV pages "
                f"do not add up to {self.pages}",
                remedy="this is a defect in the batching policy; please report it",
            )

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self._wanted[page] = 0
        if self.on_evict is not None:
            self.on_evict(page)
        return page
