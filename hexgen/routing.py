"""Which route takes a request: the plan's weights, corrected by what each route can hold right now.

Plain data in, a route's number out: no sockets, no clock, so that the simulator routes as the coordinator does.
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
    speed: float = 1.0  # a factor on the weight: measured against predicted (`hexgen.route_speeds`)
    credit: float = 0.0  # requests that it should have had by its share, less those that it had
    turned_away: Need | None = None  # the last request that went elsewhere for want of room

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
        if self.outstanding + need.sequences > self.max_sequences:
            return False
        return self.starting_pages + self.pages(need) <= self.free_pages

    @property
    def full(self) -> bool:
        """Whether it works as hard as it can: its head has a queue, or it has no room for what it turned away."""
        if self.waiting:
            return True
        return self.turned_away is not None and self.up and not self.has_room(self.turned_away)

    @property
    def effective_weight(self) -> float:
        """The weight at the measured speed, scaled by the share of pages free and by the queue before the head."""
        free = max(0, self.free_pages - self.starting_pages) / max(1, self.total_pages)
        # A floor keeps a nearly full route in the rotation, so that its share recovers smoothly.
        return self.weight * self.speed * max(free, 0.01) / (1 + self.waiting)


class Router:
    """Shares realised request by request, without bursts.

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): of the routes whose credit is
    at least 1/(2k-2), with k routes to choose from, the one takes the request that would soonest be a whole
    request behind. With constant shares each of k >= 2 routes has then had, after any n requests, within
    1 - 1/(2k-2) of its share of n, and no rule does better. Taking turns by the largest credit alone (smooth
    weighted round robin as in nginx, interleaved weighted round robin as in Helix) has no such bound for more
    than two.
    """

    def __init__(self, routes: Iterable[RouteState]) -> None:
        self.routes = {state.route: state for state in routes}

    def choose(self, need: Need, blocked: Collection[int] = ()) -> int | None:
        """The route for a request, or None where none has room. ``blocked`` routes are kept for others."""
        open_routes: list[RouteState] = []
        for state in self.routes.values():
            if state.has_room(need):
                if state.route not in blocked:
                    open_routes.append(state)
            elif state.takes(need):
                state.turned_away = need
        if not open_routes:
            return None
        if len(open_routes) == 1:  # all the share is its own: its credit stays
            return open_routes[0].route
        shares = _shares(open_routes)
        for state, share in zip(open_routes, shares, strict=True):
            state.credit += share
        least = 1 / (2 * len(open_routes) - 2)
        ripe = [i for i, state in enumerate(open_routes) if state.credit >= least - 1e-9]
        # Routes that were full a while ago may hold all the credit: then nobody here is ripe, and all may bid.
        chosen = min(
            ripe or range(len(open_routes)),
            key=lambda i: ((1 - least - open_routes[i].credit) / shares[i], open_routes[i].route),
        )
        open_routes[chosen].credit -= 1
        return open_routes[chosen].route

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


def _shares(routes: list[RouteState]) -> list[float]:
    weights = [state.effective_weight for state in routes]
    largest = max(weights)  # divided by first, so that no sum overflows
    scaled = [max(weight / largest, 1e-9) for weight in weights]
    total = sum(scaled)
    return [weight / total for weight in scaled]
