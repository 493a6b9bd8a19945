"""A cluster file with comments above its entries."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from hexgen.yamlfile import parse_yaml, write_yaml

WIDTH = 110


def annotated(cluster: Mapping[str, Any], head: str, comments: Mapping[tuple[str, object], Sequence[str]]) -> str:
    """The YAML text of ``cluster`` (as `cluster_to_dict` gives it), which reads back as the same values.

    ``comments``: lines by ``("devices", type)``, ``("nodes", node)``, ``("links", (a, b))`` and ``("links",
    "default")``.
    """
    parts = ["".join(f"# {line}".rstrip() + "\n" for line in head.splitlines())]
    for key, value in cluster.items():
        if key == "devices":
            entries = [
                (_piece({name: entry}, 2), comments.get(("devices", name), ())) for name, entry in value.items()
            ]
            parts.append("devices:\n" + _block(entries, 2))
        elif key == "nodes":
            parts.append(
                "nodes:\n"
                + _block([(_item(node, 2), comments.get(("nodes", node["name"]), ())) for node in value], 2)
            )
        elif key == "links":
            parts.append("links:\n" + _links(value, comments))
        else:
            parts.append(_piece({key: value}, 0))
    text = "".join(parts)
    if parse_yaml(text, "the annotated file") != parse_yaml(write_yaml(cluster), "the file"):
        return write_yaml(cluster, head)  # never a file that says something else for the sake of its comments
    return text


def _links(links: Mapping[str, Any], comments: Mapping[tuple[str, object], Sequence[str]]) -> str:
    parts = []
    for key, value in links.items():
        if key == "nodes":
            entries = [(_item(entry, 4), comments.get(("links", tuple(entry["between"])), ())) for entry in value]
            parts.append("  nodes:\n" + _block(entries, 4))
        else:
            parts.append(_block([(_piece({key: value}, 2), comments.get(("links", key), ()))], 2))
    return "".join(parts)


def _block(entries: Sequence[tuple[str, Sequence[str]]], indent: int) -> str:
    return "".join(_comment(lines, indent) + text for text, lines in entries)


def _comment(lines: Sequence[str], indent: int) -> str:
    margin = " " * indent + "# "
    out = []
    for line in lines:
        inner = " " * (len(line) - len(line.lstrip()))
        out += textwrap.wrap(
            line.strip(), WIDTH, initial_indent=margin + inner, subsequent_indent=margin + inner + "  "
        )
    return "".join(f"{line}\n" for line in out)


def _piece(value: Mapping[str, Any], indent: int) -> str:
    return textwrap.indent(write_yaml(value), " " * indent)


def _item(value: Any, indent: int) -> str:
    """One entry of a list, ``- {...}``."""
    text = write_yaml({"_": [value]})
    return textwrap.indent(text.partition("\n")[2], " " * indent)
