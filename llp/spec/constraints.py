"""Constraints between hyperparameters: one safe expression like `learning_rate < batch_size/64`.

The grammar is a small part of Python's: parameter names, numbers, quoted text, `+ - * / **`,
comparisons (also chained), `and` / `or` / `not`, and `log10`, `log2`, `min`, `max`. The expression
is parsed once and turned into closures; nothing is ever given to `eval`. All arithmetic is in
floating point, so `9 ** 9 ** 9` overflows instead of filling the memory.

A constraint applies where all parameters it names are active. Where its arithmetic has no value
(division by zero, logarithm of a negative number, overflow) it does not hold.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from llp.errors import LlpError
from llp.records import HyperparameterValue

Values = Mapping[str, HyperparameterValue]
_Evaluate = Callable[[Values], Any]

MAX_LENGTH = 300
"""Characters of one expression."""

_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
_ORDER: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, tuple[Callable[..., float], int | None]] = {
    "log10": (math.log10, 1),
    "log2": (math.log2, 1),
    "min": (min, None),
    "max": (max, None),
}
_ALLOWED = "+ - * / **, comparisons, and / or / not, log10, log2, min and max"


class ConstraintError(LlpError):
    """The expression is not one, or compares what cannot be compared."""

    exit_code = 2


@dataclass(frozen=True)
class Constraint:
    """A parsed expression.

    Attributes:
        expression: The text it was parsed from.
        names: The parameters it reads, in order of appearance.
    """

    expression: str
    names: tuple[str, ...]
    _evaluate: _Evaluate = field(repr=False, compare=False)

    def holds(self, values: Values) -> bool:
        """Whether `values` satisfy it; True when a parameter it names is inactive (absent).

        Raises:
            ConstraintError: Text or true/false is used as a number.
        """
        if any(name not in values for name in self.names):
            return True
        try:
            return bool(self._evaluate(values))
        except (ArithmeticError, ValueError):
            return False


@lru_cache(maxsize=256)
def parse(expression: str) -> Constraint:
    """The constraint that `expression` writes.

    >>> parse("1e-4 <= learning_rate * batch_size <= 64").names
    ('learning_rate', 'batch_size')

    Raises:
        ConstraintError: Not an expression of the grammar above, or not a condition.
    """
    if len(expression) > MAX_LENGTH:
        raise ConstraintError(f"is {len(expression)} characters long; {MAX_LENGTH} are allowed")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ConstraintError(f"cannot be read: {getattr(error, 'msg', error)}") from None
    names: dict[str, None] = {}
    try:
        kind, evaluate = _compiled(tree.body, names)
    except RecursionError:
        raise ConstraintError("is nested too deeply") from None
    if kind not in {"condition", "name"}:
        raise ConstraintError("is a value and not a condition; compare it with something")
    return Constraint(expression, tuple(names), evaluate)


def satisfied(constraints: Iterable[str], values: Values) -> bool:
    """Whether `values` satisfy all `constraints`.

    >>> satisfied(["momentum < 0.95 or learning_rate < 0.1"], {"momentum": 0.9, "learning_rate": 1})
    True

    Raises:
        ConstraintError: A constraint cannot be parsed, or uses text as a number.
    """
    return all(parse(constraint).holds(values) for constraint in constraints)


def same(left: HyperparameterValue, right: HyperparameterValue) -> bool:
    """Whether two values are equal, true/false being different from 1/0."""
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _compiled(node: ast.expr, names: dict[str, None]) -> tuple[str, _Evaluate]:
    """The kind of `node` (number, text, condition, name: known when evaluated) and its value."""
    match node:
        case ast.Constant(value=bool(flag)):
            return "condition", lambda values: flag
        case ast.Constant(value=int(number) | float(number)):
            return "number", lambda values, number=float(number): number
        case ast.Constant(value=str(text)):
            return "text", lambda values: text
        case ast.Name(id="true" | "false" as word):
            return "condition", lambda values: word == "true"
        case ast.Name(id=name):
            names.setdefault(name)
            return "name", lambda values: values[name]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _condition(operand, names)
            return "condition", lambda values: not inner(values)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            inner = _number(operand, names)
            factor = -1.0 if isinstance(sign, ast.USub) else 1.0
            return "number", lambda values: factor * inner(values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            apply, first, second = (
                _ARITHMETIC[type(op)],
                _number(left, names),
                _number(right, names),
            )
            return "number", lambda values: apply(first(values), second(values))
        case ast.BoolOp(op=op, values=operands):
            parts = [_condition(operand, names) for operand in operands]
            combine = all if isinstance(op, ast.And) else any
            return "condition", lambda values: combine(part(values) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = [left, *comparators]
            links = [
                _comparison(*link, names) for link in zip(sides, ops, comparators, strict=False)
            ]
            return "condition", lambda values: all(link(values) for link in links)
        case ast.Call(func=ast.Name(id=called), args=arguments, keywords=[]) if (
            called in _FUNCTIONS
        ):
            function, count = _FUNCTIONS[called]
            if len(arguments) != count and (count is not None or len(arguments) < 2):
                wanted = "1 argument" if count else "2 or more arguments"
                raise ConstraintError(f"{called} takes {wanted}, not {len(arguments)}")
            given = [_number(argument, names) for argument in arguments]
            return "number", lambda values: function(*(part(values) for part in given))
    raise ConstraintError(
        f"'{ast.unparse(node)[:40]}' is not allowed; use names, numbers, {_ALLOWED}"
    )


def _comparison(
    left: ast.expr, op: ast.cmpop, right: ast.expr, names: dict[str, None]
) -> _Evaluate:
    if type(op) in _ORDER:
        compare, first, second = _ORDER[type(op)], _number(left, names), _number(right, names)
        return lambda values: compare(first(values), second(values))
    if not isinstance(op, ast.Eq | ast.NotEq):
        raise ConstraintError(f"use names, numbers, {_ALLOWED}")
    one, other = _compiled(left, names)[1], _compiled(right, names)[1]
    wanted = isinstance(op, ast.Eq)
    return lambda values: same(one(values), other(values)) == wanted


def _condition(node: ast.expr, names: dict[str, None]) -> _Evaluate:
    kind, evaluate = _compiled(node, names)
    if kind not in {"condition", "name"}:
        raise ConstraintError(f"'{ast.unparse(node)[:40]}' is not a condition")
    return evaluate


def _number(node: ast.expr, names: dict[str, None]) -> _Evaluate:
    kind, evaluate = _compiled(node, names)
    if kind == "number":
        return evaluate
    source = ast.unparse(node)[:40]
    if kind != "name":
        raise ConstraintError(f"{source} is not a number; only == and != compare text")

    def number(values: Values) -> float:
        value = evaluate(values)
        if isinstance(value, bool | str):
            raise ConstraintError(f"{source} is {value!r} and not a number")
        return float(value)

    return number
