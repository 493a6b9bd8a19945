"""Full KV pages found again by what they hold: a chained hash of the tokens up to the end of the page."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from hexgen.batching.pages import PagePool
from hexgen.errors import EngineError

DIGEST_BYTES = 32  # a collision would hand one user another's context: not a place to save bytes


class PageDigests:
    """The digests of one sequence's full pages, computed once each, when first asked for.

    The digest of a page covers its tokens and, through its parent's digest, all tokens before it: keys and values
    depend on the whole prefix. ``variant`` names the weights that computed them (b"": the base model).
    """

    __slots__ = ("_digests", "_page_size", "_tokens", "_variant")

    def __init__(self, tokens: array[int], page_size: int, variant: bytes = b"") -> None:
        self._tokens = tokens  # the sequence's own, growing; full pages of it never change
        self._page_size = page_size
        self._variant = variant
        self._digests: list[bytes] = []

    def __getitem__(self, page_index: int) -> bytes:
        digests = self._digests
        while len(digests) <= page_index:
            start = len(digests) * self._page_size
            parent = digests[-1] if digests else blake2b(self._variant, digest_size=DIGEST_BYTES).digest()
            content = self._tokens[start : start + self._page_size]
            if len(content) < self._page_size:
                raise EngineError(f"page {len(digests)} of a sequence is not full and has no digest yet")
            digests.append(blake2b(parent + content.tobytes(), digest_size=DIGEST_BYTES).digest())
        return digests[page_index]


class PrefixCache:
    """Which page holds which digest. Pages are shared, never copied; the pool counts the references."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._page_of)

    def match(self, digests: PageDigests, tokens: int) -> list[int]:
        """The pages of the longest cached prefix of a sequence of ``tokens`` tokens, first page first.

        At least the last token stays uncovered, because its hidden state must be computed. The pages are not yet
        referenced: ``PagePool.share`` them before anything else is allocated.
        """
        pages: list[int] = []
        for index in range((tokens - 1) // self._pool.page_size):
            page = self._page_of.get(digests[index])
            if page is None:
                break
            pages.append(page)
        return pages

    def register(self, page: int, digest: bytes) -> None:
        """``page`` is filled with the content of ``digest`` by a step already formed.

        Two sequences may have filled a page each with equal content at the same time: the first stays.
        """
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest
            self._pool.keep(page)

    def _forget(self, page: int) -> None:
        del self._page_of[self._digest_of.pop(page)]
