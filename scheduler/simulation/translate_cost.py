"""The cost model's step times as C++: a struct whose fields are what `StageProfile` reads of itself."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections import Counter
from typing import Any

from hexgen.scheduler.cost import StageProfile
from hexgen.scheduler.simulation.translate import TranslationError, Translator, constants_text

_METHODS = (StageProfile.all_reduce_s, StageProfile.layer_s, StageProfile.fixed_s, StageProfile.step_s)
_LISTS = 4  # of parts that a profile may have loops over, at most


class _CostTranslator(Translator):
    """``self.figures.step_s`` is a number that a profile has: a field. So is ``DTYPE_BYTES[self._dtype]``. Names
    of what is no number (``link = self.shape.link``) are put in where they are used.
    """

    def __init__(self) -> None:
        super().__init__(sys.modules[StageProfile.__module__])
        self.fields: dict[str, None] = {}  # Python text of the number, of ``self``
        self.parts: dict[str, dict[str, None]] = {}  # of what is looped over: numbers of each, of ``part``
        self._fixed: set[str] = set()  # names that a function sets once
        self._told: dict[str, ast.expr] = {}  # names for what is reached from ``self``
        self._loops: dict[str, str] = {}  # names of loops, and over what

    def function(self, code: Any, *, method: bool = False) -> str:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
        stored = Counter(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        self._fixed = {name for name, times in stored.items() if times == 1}
        self._told, self._loops = {}, {}
        return super().function(code, method=method)

    def assign(self, targets: list[ast.expr], value: ast.expr) -> str:
        match targets:
            case [ast.Name(id=name)] if name in self._fixed and self._reached(value) is not None:
                self._told[name] = value
                return ""
        return super().assign(targets, value)

    def loop(self, target: ast.expr, over: ast.expr, body: list[ast.stmt]) -> str:
        text = self._reached(over)
        if text is None or not isinstance(target, ast.Name):
            raise TranslationError(f"a loop over {ast.unparse(over)}")
        place = list(self.parts).index(text) if text in self.parts else len(self.parts)
        self.parts.setdefault(text, {})
        self._loops[target.id] = text
        return f"for (const Part{place}& {target.id} : parts{place}) {{\n{self._block(body, (target.id,))}}}\n"

    def expression(self, node: ast.expr) -> str:
        text = self._reached(node)
        if text is not None:
            self.fields[text] = None
            return f"field{list(self.fields).index(text)}"
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in self._loops:
                found = self.parts[self._loops[name]]
                found[attribute] = None
                return f"{name}.value{list(found).index(attribute)}"
        return super().expression(node)

    def call(self, func: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> str:
        match func:
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if not keywords:
                return f"{name}({', '.join(map(self.expression, args))})"
        return super().call(func, args, keywords)

    def _reached(self, node: ast.expr) -> str | None:
        """Python text, of ``self`` alone, where the node is an attribute of it, or looked up by one."""
        match node:
            case ast.Name(id=name) if name in self._told:
                return self._reached(self._told[name])
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                return f"self.{name}"
            case ast.Attribute(value=value, attr=name):
                inner = self._reached(value)
                return None if inner is None else f"{inner}.{name}"
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                inner = self._reached(index)
                return None if inner is None else f"{name}[{inner}]"
        return None


class CostCode:
    """``text``: structs ``Part0``, .. and ``Profile``. `numbers_of`: what a profile's fields are filled with."""

    def __init__(self) -> None:
        made = _CostTranslator()
        functions = "\n".join(made.function(one, method=True) for one in _METHODS)
        if len(made.parts) > _LISTS:
            raise TranslationError(f"{len(made.parts)} loops in the cost model")
        self._module = made._module
        self._fields, self._parts = list(made.fields), {text: list(found) for text, found in made.parts.items()}
        structs = "".join(
            f"struct Part{i} {{ double {', '.join(f'value{n}' for n in range(len(found)))}; }};\n"
            for i, found in enumerate(self._parts.values())
        )
        members = f"double {', '.join(f'field{n}' for n in range(len(self._fields)))};\n" + "".join(
            f"std::vector<Part{i}> parts{i};\n" for i in range(len(self._parts))
        )
        reads = "".join(f"field{n} = *numbers++;\n" for n in range(len(self._fields))) + "".join(
            f"parts{i}.resize(std::size_t(*numbers++));\nfor (Part{i}& part : parts{i}) {{\n"
            + "".join(f"part.value{n} = *numbers++;\n" for n in range(len(found)))
            + "}\n"
            for i, found in enumerate(self._parts.values())
        )
        self.text = (
            f"{constants_text(made.constants)}\n{structs}\nstruct Profile {{\n{members}\n"
            f"explicit Profile(const double* numbers) {{\n{reads}}}\n\n{functions}}};\n"
        )

    def numbers_of(self, profile: StageProfile) -> list[float]:
        """In the order in which a ``Profile`` reads them."""
        found = [float(self._value(text, profile)) for text in self._fields]
        for text, names in self._parts.items():
            parts = self._value(text, profile)
            found.append(float(len(parts)))
            found += [float(getattr(part, name)) for part in parts for name in names]
        return found

    def _value(self, text: str, profile: StageProfile) -> Any:
        """``self.a.b`` of this profile, or ``TABLE[self.a.b]`` with a table of the cost model's module."""
        table, bracket, inner = text.partition("[")
        value: Any = profile
        for name in (inner.rstrip("]") if bracket else text).split(".")[1:]:
            value = getattr(value, name)
        return getattr(self._module, table)[value] if bracket else value
