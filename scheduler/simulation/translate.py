"""Python functions as C++ text: the batching policy and the cost model, so that the compiled loop runs them too.

Not a compiler for Python, but for the few words that these functions use; whatever else they come to say raises
``TranslationError``, and the simulator goes without. What is translated has one source, which is Python.
Numbers keep their meaning: `/` is of doubles, `//` and `%` round down, products and sums stand in the same order.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import ModuleType

_TYPES = {"int": "i64", "float": "double", "bool": "bool", "None": "void"}
_BY_VALUE = {"i64", "double", "bool"}
_BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
_CALLED = {ast.Div: "truediv", ast.FloorDiv: "floordiv", ast.Mod: "modulo"}
_COMPARE = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_BUILTINS = {
    "min": "least", "max": "most", "len": "len", "int": "whole", "next": "next", "iter": "iter",
    "reversed": "reversed",
}  # fmt: skip
_MATH = {"ceil": "std::ceil", "log2": "std::log2"}


class TranslationError(Exception):
    """The source says something that is not known here."""


class Translator:
    """Text of functions. Attributes become calls: ``state.remaining`` is ``state.remaining()``."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._scopes: list[set[str]] = []
        self._returns = "void"
        self._pairs = 0  # assignments of several values at a time, numbered
        self.constants: dict[str, int | float] = {}  # of the module, as far as they are used

    def function(self, code: Callable[..., object], *, method: bool = False) -> str:
        """One function or method; ``method``: it stands within a struct, and its first argument goes without."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
        if not isinstance(tree, ast.FunctionDef) or tree.returns is None:
            raise TranslationError(f"{code} is no function with a return type")
        arguments = tree.args.args[1:] if method else tree.args.args
        self._returns = self.type_of(tree.returns)
        self._scopes = [{argument.arg for argument in arguments}]
        listed = ", ".join(self.argument(argument) for argument in arguments)
        return (
            f"{self._returns} {tree.name}({listed}){' const' if method else ''} {{\n{self._block(tree.body)}}}\n"
        )

    def argument(self, argument: ast.arg) -> str:
        found = self.type_of(argument.annotation) if argument.annotation is not None else ""
        return f"{found if found in _BY_VALUE else 'auto&&'} {argument.arg}"

    def type_of(self, node: ast.expr) -> str:
        match node:
            case ast.Constant(value=None):
                return "void"
            case ast.Name(id=name):
                return _TYPES.get(name, name)
            case ast.Subscript(value=ast.Name(id="list"), slice=inner):
                return f"List<{self.type_of(inner)}>"
            case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=inners)):
                return f"std::tuple<{', '.join(map(self.type_of, inners))}>"
            case ast.BinOp(left=inner, op=ast.BitOr(), right=ast.Constant(value=None)):
                return f"std::optional<{self.type_of(inner)}>"
        raise TranslationError(f"a type: {ast.unparse(node)}")

    # ---- statements ------------------------------------------------------------------------------------------

    def _block(self, body: list[ast.stmt], names: tuple[str, ...] = ()) -> str:
        self._scopes.append(set(names))
        text = "".join(textwrap.indent(self.statement(one), "  ") for one in body)
        self._scopes.pop()
        return text

    def statement(self, node: ast.stmt) -> str:
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                return ""
            case ast.Expr(value=value):
                return f"{self.expression(value)};\n"
            case ast.Return(value=None):
                return "return;\n"
            case ast.Return(value=ast.Constant(value=None)):
                return "return std::nullopt;\n"
            case ast.Return(value=ast.IfExp(test=test, body=body, orelse=orelse)):
                return self.statement(ast.If(test, [ast.Return(body)], [ast.Return(orelse)]))
            case ast.Return(value=ast.expr() as value):
                return f"return {self._condition(value) if self._returns == 'bool' else self.expression(value)};\n"
            case ast.Break():
                return "break;\n"
            case ast.Continue():
                return "continue;\n"
            case ast.If(test=test, body=body, orelse=orelse):
                text = f"if ({self._condition(test)}) {{\n{self._block(body)}}}"
                return text + (f" else {{\n{self._block(orelse)}}}\n" if orelse else "\n")
            case ast.While(test=test, body=body, orelse=[]):
                return f"while ({self._condition(test)}) {{\n{self._block(body)}}}\n"
            case ast.For(target=target, iter=over, body=body, orelse=[]):
                return self.loop(target, over, body)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.List(elts=[])):
                self._scopes[-1].add(name)
                return f"{self.type_of(kind)} {name};\n"
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value) if type(op) in _BINARY:
                return f"{name} {_BINARY[type(op)]}= {self.expression(value)};\n"
            case ast.Assign(targets=targets, value=value):
                return self.assign(targets, value)
        raise TranslationError(f"a statement: {ast.unparse(node)}")

    def loop(self, target: ast.expr, over: ast.expr, body: list[ast.stmt]) -> str:
        names = _names(target)
        head = f"auto {names[0]}" if isinstance(target, ast.Name) else f"auto [{', '.join(names)}]"
        return f"for ({head} : {self.expression(over)}) {{\n{self._block(body, names)}}}\n"

    def assign(self, targets: list[ast.expr], value: ast.expr) -> str:
        if len(targets) == 1 and isinstance(targets[0], ast.Tuple):
            names = _names(targets[0])
            if isinstance(value, ast.Tuple):  # all are worked out before any is assigned
                self._pairs += 1
                made = [f"{name}_{self._pairs}" for name in names]
                worked = (f"auto {n} = {self.expression(v)};\n" for n, v in zip(made, value.elts, strict=True))
                return "".join(worked) + "".join(map(self._set, names, made))
            self._scopes[-1].update(names)
            return f"auto [{', '.join(names)}] = {self.expression(value)};\n"
        text = self.expression(value)
        return "".join(self._set(name, text) for target in targets for name in _names(target))

    def _set(self, name: str, text: str) -> str:
        if any(name in scope for scope in self._scopes):
            return f"{name} = {text};\n"
        self._scopes[-1].add(name)
        return f"auto {name} = {text};\n"

    # ---- expressions -----------------------------------------------------------------------------------------

    def _condition(self, node: ast.expr) -> str:
        match node:
            case ast.BoolOp(op=op, values=values):
                joint = " && " if isinstance(op, ast.And) else " || "
                return f"({joint.join(map(self._condition, values))})"
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return f"!{self._condition(operand)}"
        return f"truth({self.expression(node)})"

    def expression(self, node: ast.expr) -> str:
        match node:
            case ast.Constant(value=bool() as value):
                return "true" if value else "false"
            case ast.Constant(value=int() as value):
                return f"i64({value})"
            case ast.Constant(value=float() as value):
                return value.hex()
            case ast.Name(id=name):
                return self.name(name)
            case ast.Attribute(value=value, attr=attribute):
                return f"{self.expression(value)}.{attribute}()"
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return f"(-{self.expression(operand)})"
            case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
                raise TranslationError(f"a condition for a value: {ast.unparse(node)}")
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return f"({self.expression(left)} {_BINARY[type(op)]} {self.expression(right)})"
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _CALLED:
                return f"{_CALLED[type(op)]}({self.expression(left)}, {self.expression(right)})"
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return f"({self._condition(test)} ? {self.expression(body)} : {self.expression(orelse)})"
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._compare(left, op, right)
            case ast.Tuple(elts=parts):
                return f"std::make_tuple({', '.join(map(self.expression, parts))})"
            case ast.List(elts=parts) if parts:
                return f"joined({', '.join(map(self._part, parts))})"
            case ast.Subscript(value=value, slice=ast.Constant(value=int() as place)):
                return f"std::get<{place}>({self.expression(value)})"
            case ast.GeneratorExp(elt=element, generators=[ast.comprehension(target=target, iter=over, ifs=[])]):
                return f"each({self.expression(over)}, {self._lambda(_names(target), element)})"
            case ast.Call(func=func, args=args, keywords=keywords):
                return self.call(func, args, keywords)
        raise TranslationError(f"an expression: {ast.unparse(node)}")

    def name(self, name: str) -> str:
        if any(name in scope for scope in self._scopes):
            return name
        value = getattr(self._module, name, None)
        if isinstance(value, int | float):
            self.constants[name] = value
            return name
        raise TranslationError(f"a name: {name}")

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> str:
        if isinstance(op, ast.Is | ast.IsNot):
            if isinstance(right, ast.Constant) and right.value is None:
                text = f"is_none({self.expression(left)})"
            else:
                text = f"({self.expression(left)} == {self.expression(right)})"
            return text if isinstance(op, ast.Is) else f"!{text}"
        if type(op) not in _COMPARE:
            raise TranslationError(f"a comparison: {ast.unparse(left)} {type(op).__name__} {ast.unparse(right)}")
        return f"({self.expression(left)} {_COMPARE[type(op)]} {self.expression(right)})"

    def _part(self, node: ast.expr) -> str:
        return self.expression(node.value) if isinstance(node, ast.Starred) else f"only({self.expression(node)})"

    def _lambda(self, names: tuple[str, ...], body: ast.expr) -> str:
        if len(names) != 1:
            raise TranslationError(f"several names at a time: {names}")
        self._scopes.append(set(names))
        text = f"[&](auto&& {names[0]}) {{ return {self.expression(body)}; }}"
        self._scopes.pop()
        return text

    def call(self, func: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> str:
        match func, args, keywords:
            case ast.Name(id="sum"), [ast.GeneratorExp() as over], []:
                return f"total({self.expression(over)})"
            case ast.Name(id="sorted"), [values], [
                ast.keyword(arg="key", value=ast.Lambda(args=named, body=body))
            ]:
                key = self._lambda(tuple(a.arg for a in named.args), body)
                return f"sorted({self.expression(values)}, {key})"
            case ast.Attribute(value=ast.Name(id="math"), attr=name), [value], [] if name in _MATH:
                return f"{_MATH[name]}({self.expression(value)})"
            case ast.Name(id=name), _, [] if name in _BUILTINS or callable(getattr(self._module, name, None)):
                return f"{_BUILTINS.get(name, name)}({', '.join(map(self.expression, args))})"
            case ast.Attribute(value=value, attr=name), _, []:
                return f"{self.expression(value)}.{name}({', '.join(map(self.expression, args))})"
        raise TranslationError(f"a call: {ast.unparse(func)}")


def _names(target: ast.expr) -> tuple[str, ...]:
    match target:
        case ast.Name(id=name):
            return (name,)
        case ast.Tuple(elts=parts) if all(isinstance(part, ast.Name) for part in parts):
            return tuple(part.id for part in parts if isinstance(part, ast.Name))
    raise TranslationError(f"an assignment to {ast.unparse(target)}")


def constants_text(constants: Mapping[str, int | float]) -> str:
    """Definitions, to the last bit."""
    return "".join(
        f"constexpr double {name} = {value.hex()};\n"
        if isinstance(value, float)
        else f"constexpr i64 {name} = {value};\n"
        for name, value in constants.items()
    )


def module_text(module: ModuleType) -> str:
    """All functions of a module. Templates over their arguments: each may call those that come after it."""
    made = Translator(module)
    functions = [
        value
        for value in vars(module).values()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    text = "\n".join(made.function(one) for one in functions)
    return f"{constants_text(made.constants)}\n{text}"
