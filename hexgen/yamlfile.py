"""YAML files, read safely and strictly, and checked access to what is in them.

Reading refuses duplicate keys, files above ``MAX_FILE_BYTES`` and aliases that expand beyond reason. Values are
then read through a ``Section``, which knows where each came from, so that every complaint names file and place
(``cluster.yaml: nodes[2].count``) and a mistyped key gets the name that was probably meant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from hexgen.errors import SpecError

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_NODES = 2_000_000  # YAML nodes after aliases are expanded
MAX_DEPTH = 100
_BEYOND = 1e300  # no honest figure reaches it
_T = TypeVar("_T")
_D = TypeVar("_D")


# ---- reading and writing -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands: the file, and the path inside it."""

    file: str
    path: str = ""

    def key(self, key: object) -> Place:
        return Place(self.file, f"{self.path}.{key}" if self.path else str(key))

    def index(self, i: int) -> Place:
        return Place(self.file, f"{self.path}[{i}]")

    def __str__(self) -> str:
        return f"{self.file}: {self.path}" if self.path else self.file


_FastLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it


class _Loader(_FastLoader):  # type: ignore[misc]
    """YAML's safe subset, without duplicate keys, and without 1.1's surprises (``no`` is a word, 1e9 a number)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads: quotes also what only that loader would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Numbers as YAML 1.2's core has them, in decimal. What YAML 1.1 also takes for numbers or dates (1:30 is 90 there,
# 010 is 8, 1_000 and 0x1f, 2026-01-01) is text here: what wants a number then says what stands there.
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_WRITTEN_AS_NUMBER = re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$|^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)[eE][0-9]+$")
_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag in (f"{_TAG}null", f"{_TAG}merge") or (tag == f"{_TAG}bool" and first in "tTfF")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(f"{_TAG}float", _WRITTEN_AS_NUMBER, list("-+.0123456789"))


class Inline(dict[str, Any]):
    """A mapping that is written on one line, ``{a: 1, b: 2}``."""


_Dumper.add_representer(
    Inline, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)
_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=_flat(data))
)


def plain(value: float) -> float:
    """Whole numbers without the point, as people write them."""
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else value


def _flat(data: list[Any]) -> bool:
    return not any(isinstance(item, dict | list) for item in data)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the file ``path``; ``SpecError`` where there is none."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SpecError(f"cannot be read: {reason}", where=str(path)) from error
    if len(data) > MAX_FILE_BYTES:
        raise SpecError(f"is larger than {MAX_FILE_BYTES} bytes", where=str(path))
    return parse_yaml(data, str(path))


def parse_yaml(data: bytes | str, where: str) -> dict[str, Any]:
    """The mapping in YAML text; ``where`` names it in errors."""
    try:
        _check_depth(data, where)
        loader = _Loader(data)
        try:
            node = loader.get_single_node()
            _check_size(node, where)
            value = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or "cannot be understood"
        raise SpecError(f"malformed YAML: {problem}", where=f"{where}{line}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise SpecError(f"malformed YAML: {' '.join(str(error).split())}", where=where) from error
    except RecursionError as error:
        raise SpecError("malformed YAML: nested too deeply", where=where) from error
    if not isinstance(value, dict):
        kind = "empty" if value is None else f"a {type(value).__name__}"
        raise SpecError(f"must be a mapping of keys to values, not {kind}", where=where)
    return value


def _check_depth(data: bytes | str, where: str) -> None:
    """Refuse deep nesting before a tree is built: libyaml's loader recurses, and would overflow the C stack."""
    parser = _FastLoader(data)
    depth = 0
    try:
        while parser.check_event():
            event = parser.get_event()
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:
                    raise SpecError(f"nested more than {MAX_DEPTH} deep", where=where)
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    finally:
        parser.dispose()


def _check_size(root: yaml.Node | None, where: str) -> None:
    """Refuse aliases that lead to themselves or expand to more than ``MAX_NODES``."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in open_nodes:
            raise SpecError("an alias leads back to itself", where=f"{where}, line {node.start_mark.line + 1}")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            children = (
                [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
            )
            sizes[id(node)] = 1 + sum(size(child) for child in children)
            open_nodes.discard(id(node))
            if sizes[id(node)] > MAX_NODES:
                raise SpecError(f"holds more than {MAX_NODES} values, aliases expanded", where=where)
        return sizes[id(node)]

    if root is not None:
        size(root)


def write_yaml(value: Mapping[str, Any], comment: str = "") -> str:
    """YAML text that ``parse_yaml`` reads back as ``value``, keys in their order."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    text: str = yaml.dump(
        dict(value), Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=110, allow_unicode=True
    )
    return head + text


# ---- checked access ------------------------------------------------------------------------------------------

Reader = Callable[[object, Place], _T]


class Section:
    """A mapping with a closed set of keys. Complaints are ``SpecError`` with file, place and remedy."""

    def __init__(self, value: object, place: Place, known: Collection[str]) -> None:
        if not isinstance(value, dict):
            wrong(value, place, f"a mapping with the keys {', '.join(known)}")
        for key in value:
            if key not in known:
                close = difflib.get_close_matches(str(key), list(known), n=1)
                raise SpecError(
                    f"unknown key {str(key)[:60]!r}",
                    where=str(place),
                    remedy=f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}",
                )
        self.values: dict[str, Any] = value
        self.place = place

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def require(self, key: str, read: Reader[_T]) -> _T:
        if key not in self:
            raise SpecError(f"{key!r} is missing", where=str(self.place), remedy=f"add {key}: ...")
        return read(self.values[key], self.place.key(key))

    def get(self, key: str, read: Reader[_T], default: _D) -> _T | _D:
        return read(self.values[key], self.place.key(key)) if key in self else default

    def optional(self, key: str, read: Reader[_T]) -> _T | None:
        return read(self.values[key], self.place.key(key)) if key in self else None


def wrong(value: object, place: Place, wanted: str, remedy: str | None = None) -> NoReturn:
    shown = repr(value)
    text = f"must be {wanted}, not {shown if len(shown) <= 80 else shown[:77] + '...'}"
    raise SpecError(text, where=str(place), remedy=remedy)


def text(value: object, place: Place) -> str:
    """Any text of sane length. Numbers are taken as they were written only where quoted."""
    if not isinstance(value, str) or not value or len(value) > 4096:
        wrong(value, place, "text (quote it if it looks like a number)")
    return value


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")


def name(value: object, place: Place) -> str:
    """A name of letters, digits, dots, dashes and underscores; a whole number is taken as its digits."""
    shown = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(shown, str) or not _NAME.fullmatch(shown):
        remedy = "quote it: it reads as a number" if isinstance(value, float) else None
        wrong(value, place, "a name of letters, digits, '.', '-' and '_'", remedy)
    return shown


def integer(least: int, most: int = 2**63 - 1) -> Reader[int]:
    def read(value: object, place: Place) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            wrong(value, place, f"a whole number between {least} and {most}")
        return value

    return read


def number(above: float = 0.0, *, allow_equal: bool = False) -> Reader[float]:
    """A finite number above ``above`` (or equal to it)."""

    def read(value: object, place: Place) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            wrong(value, place, "a number")
        if not abs(value) < _BEYOND:  # neither is what is not a number
            wrong(value, place, f"a number below {_BEYOND:g}")
        if value < above or (value == above and not allow_equal):
            wrong(value, place, f"a number {'of at least' if allow_equal else 'above'} {above:g}")
        return float(value)

    return read


def flag(value: object, place: Place) -> bool:
    if not isinstance(value, bool):
        wrong(value, place, "true or false")
    return value


def quantity(parse: Callable[[object, str], _T], least: float = 0.0, *, zero: bool = False) -> Reader[_T]:
    """A number with a unit, by one of ``hexgen.units``' parsers; zero only where it means something."""

    def read(value: object, place: Place) -> _T:
        parsed = parse(value, str(place))
        if isinstance(parsed, int | float) and (parsed < least or (parsed == 0 and not zero)):
            wrong(value, place, "more than nothing")
        return parsed

    return read


def list_of(read_item: Reader[_T], most: int, least: int = 0) -> Reader[tuple[_T, ...]]:
    def read(value: object, place: Place) -> tuple[_T, ...]:
        if not isinstance(value, list):
            wrong(value, place, "a list")
        if not least <= len(value) <= most:
            number = f"{least}" if least == most else f"{least} to {most}"
            raise SpecError(f"must be a list of {number} entries, and has {len(value)}", where=str(place))
        return tuple(read_item(item, place.index(i)) for i, item in enumerate(value))

    return read
