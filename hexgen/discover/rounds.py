"""Every pair of nodes once, in as few rounds as there can be, no node twice in a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def rounds(nodes: Sequence[T]) -> list[list[tuple[T, T]]]:
    """The round-robin tournament by the circle method: n - 1 rounds for an even number of nodes, n for an odd one.

    One stays, the others move on by one place each round (Kirkman 1847; an odd one out pauses).
    """
    if len(nodes) < 2:
        return []
    circle: list[T | None] = [*nodes]
    if len(circle) % 2:
        circle.append(None)
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        opposite = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(a, b) for a, b in opposite if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found
