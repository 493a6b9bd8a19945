"""Names for nodes, as a cluster file can hold them: labels, else host names, each once."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ODD = re.compile(r"[^A-Za-z0-9._-]+")


def node_names(wanted: Sequence[tuple[str | None, str]]) -> list[str]:
    """For each (label or None, host name) a name that nobody else has; labels come first to theirs."""
    names: list[str] = [""] * len(wanted)
    taken: set[str] = set()
    order = sorted(range(len(wanted)), key=lambda i: wanted[i][0] is None)
    for i in order:
        label, host = wanted[i]
        base = _ODD.sub("-", label or host).strip("-._") or "node"
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name)
        names[i] = name
    return names


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts n2 before n10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
