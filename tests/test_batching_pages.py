"""The page pool and the prefix cache by themselves."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen.batching.pages import PagePool
from hexgen.batching.prefix_cache import PageDigests, PrefixCache
from hexgen.errors import EngineError


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=60))
def test_every_page_is_in_one_place(pages: int, actions: list[tuple[int, int]]) -> None:
    pool = PagePool(pages, 4)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    held: list[list[int]] = []
    for action, number in actions:
        if action == 0 and number <= pool.available:
            held.append(pool.allocate(number))
        elif action == 1 and held:
            pool.release(held.pop(number % len(held)))
        elif action == 2 and held:
            shared = list(held[number % len(held)])
            pool.share(shared)
            held.append(shared)
        elif action == 3 and held:
            for page in held[number % len(held)]:
                pool.keep(page)
        pool.check()
        assert pool.available == pages - len({page for part in held for page in part})
    for part in held:
        pool.release(part)
    pool.check()
    assert pool.available == pages
    assert sorted(pool.allocate(pages)) == list(range(pages))
    assert pool.kept == 0


def test_free_pages_go_first_then_the_least_recently_released_from_the_end_of_its_prefix() -> None:
    pool = PagePool(7, 4)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    older, newer = pool.allocate(3), pool.allocate(3)
    for page in older + newer:
        pool.keep(page)
    pool.release(older)
    pool.release(newer)
    pool.allocate(1)
    assert evicted == []
    pool.allocate(4)
    assert evicted == [*reversed(older), newer[-1]]


def test_sharing_a_kept_page_saves_it_from_eviction() -> None:
    pool = PagePool(2, 4)
    pages = pool.allocate(2)
    for page in pages:
        pool.keep(page)
    pool.release(pages)
    assert pool.unreferenced(pages) == 2
    pool.share(pages[:1])
    assert pool.available == 1
    assert pool.allocate(1) == pages[1:]


def test_misuse_is_an_engine_error() -> None:
    pool = PagePool(3, 4)
    pages = pool.allocate(2)
    with pytest.raises(EngineError, match="available"):
        pool.allocate(2)
    pool.release(pages)
    with pytest.raises(EngineError, match="more often"):
        pool.release(pages)
    with pytest.raises(EngineError, match="shared"):
        pool.share(pages)


def test_check_finds_a_lost_page_and_a_page_in_two_places() -> None:
    pool = PagePool(3, 4)
    pool._free.pop()
    with pytest.raises(EngineError, match="add up"):
        pool.check()
    pool._free.append(pool._free[0])
    with pytest.raises(EngineError, match="add up"):
        pool.check()


def test_only_full_pages_match_and_never_the_last_token() -> None:
    pool = PagePool(8, 4)
    cache = PrefixCache(pool)
    tokens = array("i", range(12))
    digests = PageDigests(tokens, 4)
    pages = pool.allocate(3)
    for index, page in enumerate(pages):
        cache.register(page, digests[index])
    assert cache.match(PageDigests(tokens, 4), 12) == pages[:2]
    assert cache.match(PageDigests(array("i", range(13)), 4), 13) == pages
    assert cache.match(PageDigests(array("i", range(8)), 4), 8) == pages[:1]
    assert cache.match(PageDigests(array("i", [0, 1, 2, 3, 9, 5, 6, 7, 8]), 4), 9) == pages[:1]
    assert cache.match(PageDigests(array("i", [4, 5, 6, 7, 8]), 4), 5) == [], "a page's prefix is part of it"
    assert cache.match(PageDigests(tokens, 4, b"tuned"), 12) == []


def test_of_two_pages_with_equal_content_the_first_stays() -> None:
    pool = PagePool(4, 4)
    cache = PrefixCache(pool)
    digests = PageDigests(array("i", range(5)), 4)
    first, second = pool.allocate(2)
    cache.register(first, digests[0])
    cache.register(second, digests[0])
    assert cache.match(digests, 5) == [first]
    pool.release([second])
    assert pool.kept == 0
    pool.release([first])
    assert (pool.kept, len(cache)) == (1, 1)
    pool.allocate(4)
    assert (pool.kept, len(cache)) == (0, 0)
    assert cache.match(digests, 5) == []


def test_digests_grow_with_the_sequence() -> None:
    tokens = array("i", range(4))
    digests = PageDigests(tokens, 4)
    first = digests[0]
    tokens.extend(range(4, 8))
    assert digests[0] == first
    assert digests[1] == PageDigests(array("i", range(8)), 4)[1]
