"""The coordinator's front door on a virtual clock: one queue, and the engine's own choice of a route."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from hexgen.routing import Need, Router, RouteState
from hexgen.scheduler.simulation.layout import RoutePath


class Seen(Protocol):
    """What the door sees of a route."""

    @property
    def free_pages(self) -> int: ...

    @property
    def waiting(self) -> int: ...


class FrontDoor:
    """Requests wait here, first come, first served, until a route has room; never past one that waits for the
    same route. What the coordinator knows of a route by its reports every 0.1 s, this reads when it chooses.
    """

    def __init__(
        self,
        paths: Sequence[RoutePath],
        batchers: Sequence[Seen],
        most_waiting: int | None,
    ) -> None:
        self.router = Router(
            RouteState(
                route=number,
                weight=path.weight,
                max_context=path.limits.context,
                total_pages=path.limits.pages,
                page_size=path.limits.page_size,
                max_sequences=path.limits.max_sequences,
                free_pages=path.limits.pages,
            )
            for number, path in enumerate(paths)
        )
        self._states = [self.router.routes[number] for number in range(len(paths))]
        self._batchers = batchers
        self._most_waiting = most_waiting
        self._all = self.router.up
        self._longest = self.router.max_context
        self._stuck = False  # the queue's first found every route full, and none has got room since
        self._needs: dict[int, Need] = {}  # by prompt tokens: there are few, and they are asked for often
        self.queue: deque[tuple[int, Need]] = deque()

    def refuses(self, prompt_tokens: int) -> bool:
        """Whether no route could ever take such a prompt, or too many are waiting."""
        if self._most_waiting is not None and len(self.queue) >= self._most_waiting:
            return True
        return prompt_tokens >= self._longest

    def place(self, request: int, prompt_tokens: int) -> None:
        self.queue.append((request, self._need(prompt_tokens)))

    def next(self) -> tuple[int, int] | None:
        """The next request that leaves the queue, and its route; None where nobody waiting has room."""
        if not self.queue or self._stuck:
            return None
        for state, batcher in zip(self._states, self._batchers, strict=True):
            state.free_pages = batcher.free_pages
            state.waiting = batcher.waiting
        blocked: set[int] = set()
        for place, (request, need) in enumerate(self.queue):
            route = self.router.choose(need, blocked)
            if route is not None:
                del self.queue[place]
                state = self._states[route]
                state.starting_pages += state.pages(need)
                state.outstanding += 1
                return request, route
            blocked |= self.router.able(need)
            if blocked >= self._all:
                self._stuck = place == 0
                return None
        return None

    def started(self, route: int, prompt_tokens: int) -> None:
        """A sequence's first token came: its prompt's pages are in the route's own count by now."""
        self._stuck = False
        state = self._states[route]
        state.starting_pages -= state.pages(self._need(prompt_tokens))

    def _need(self, prompt_tokens: int) -> Need:
        found = self._needs.get(prompt_tokens)
        if found is None:
            found = self._needs[prompt_tokens] = Need(prompt_tokens)
        return found

    def ended(self, route: int) -> None:
        self._stuck = False
        self._states[route].outstanding -= 1
