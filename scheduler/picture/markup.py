"""HTML and SVG built from calls: text and attributes are always escaped, so no name can become markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_VOID = frozenset({"meta", "br", "hr", "path", "rect", "circle", "line", "use"})
_SELF_CLOSED = frozenset({"path", "rect", "circle", "line", "use"})  # SVG's


class Html(str):
    """Text that is markup already. Everything else is escaped where it is put in."""

    __slots__ = ()


Child = str | float | None | Iterable["Child"]


def el(tag: str, *children: Child, **attributes: str | float | None) -> Html:
    """``<tag ...>children</tag>``. ``class_`` is class, ``stroke_width`` is stroke-width; None leaves one out."""
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is not None:
            parts.append(f' {name.rstrip("_").replace("_", "-")}="{escape(_text(value), quote=True)}"')
    if tag in _VOID and not children:
        parts.append("/>" if tag in _SELF_CLOSED else ">")
        return Html("".join(parts))
    parts.append(">")
    parts.extend(_flat(children))
    parts.append(f"</{tag}>")
    return Html("".join(parts))


def joined(*children: Child) -> Html:
    return Html("".join(_flat(children)))


def _flat(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            yield child
        elif isinstance(child, str):
            yield escape(child, quote=False)
        elif isinstance(child, int | float):
            yield _text(child)
        else:
            yield from _flat(child)


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
