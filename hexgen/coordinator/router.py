"""Which route takes a request: the plan's weights, corrected by what each route can hold right now.

Plain data in, a route's number out: no sockets, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks of a route: ``sequences`` of one prompt, which share its pages."""

    prompt_tokens: int
    sequences: int = 1


@dataclass(slots=True)
class RouteState:
    """One route as the coordinator knows it: its Welcome, its last Stats, and what was sent since."""

    route: int
    weight: float
    max_context: int  # tokens
    total_pages: int
    page_size: int  # tokens
    max_sequences: int
    up: bool = True
    free_pages: int = 0  # by its last Stats, less what has started since
    waiting: int = 0  # in the head's own queue, by its last Stats
    running: int = 0
    outstanding: int = 0  # sequences sent and not finished
    starting_pages: int = 0  # prompt pages of sequences sent that have not produced a token
    current: float = 0.0  # state of the smooth weighted round robin

    def pages(self, need: Need) -> int:
        """Pages until every sequence has produced a token: the shared prompt, and a page of its own for each."""
        return -(-need.prompt_tokens // self.page_size) + need.sequences

    def takes(self, need: Need) -> bool:
        """Whether the prompt can ever run here."""
        return self.up and need.prompt_tokens < self.max_context

    def has_room(self, need: Need) -> bool:
        """Whether the request would start at once, or the route has nothing to do and must take it anyway.

        An idle route takes anything that fits its context: its head runs one sequence after the other if it must.
        """
        if not self.takes(need):
            return False
        if self.outstanding == 0:
            return True
        return (
            self.outstanding + need.sequences <= self.max_sequences
            and self.starting_pages + self.pages(need) <= self.free_pages
        )

    @property
    def effective_weight(self) -> float:
        """The plan's weight, scaled by the share of pages that is free and by the queue before the head."""
        free = max(0, self.free_pages - self.starting_pages) / max(1, self.total_pages)
        # A floor keeps a nearly full route in the rotation, so that its share recovers smoothly.
        return self.weight * max(free, 0.01) / (1 + self.waiting)


class Router:
    """Smooth weighted round robin (as nginx does it: "Upstream: smooth weighted round-robin balancing", 2012)."""

    def __init__(self, routes: Iterable[RouteState]) -> None:
        self.routes = {state.route: state for state in routes}

    def choose(self, need: Need, blocked: Collection[int] = ()) -> int | None:
        """The route for a request, or None where none has room. ``blocked`` routes are kept for others."""
        open_routes = [s for s in self.routes.values() if s.route not in blocked and s.has_room(need)]
        if not open_routes:
            return None
        weights = {s.route: s.effective_weight for s in open_routes}
        for state in open_routes:
            state.current += weights[state.route]
        best = max(open_routes, key=lambda s: (s.current, -s.route))
        best.current -= sum(weights.values())
        return best.route

    def able(self, need: Need) -> set[int]:
        """Routes that are up and could take the request sooner or later."""
        return {s.route for s in self.routes.values() if s.takes(need)}

    @property
    def up(self) -> set[int]:
        return {s.route for s in self.routes.values() if s.up}

    @property
    def max_context(self) -> int:
        """Tokens; the longest context of any route that is up (of any at all, where none is)."""
        up = [s.max_context for s in self.routes.values() if s.up]
        return max(up or (s.max_context for s in self.routes.values()))
