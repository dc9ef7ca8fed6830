"""The small language of ``index.where("Rows == 512 and Modality in ('CT', 'MR')")``.

Python's own grammar, a handful of its nodes, evaluated by Arrow on whole columns. Nothing is called
and nothing is looked up but columns.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ahi_ml.errors import ConfigError

__all__ = ["columns_of", "evaluate", "member", "unknown_column"]

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: pc.add_checked,
    ast.Sub: pc.subtract_checked,
    ast.Mult: pc.multiply_checked,
    ast.Div: lambda left, right: pc.divide(pc.cast(left, pa.float64()), right),  # Arrow's own truncates integers
}


def _parse(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ConfigError(f"cannot read the expression {expression!r}: {error}") from error


def unknown_column(name: str, known: Collection[str]) -> ConfigError:
    """The error for a column that is not there, with close matches. I/O: none."""
    close = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"the columns are {', '.join(sorted(known))}"
    return ConfigError(f"no column {name!r}: {hint}")


def columns_of(expression: str) -> set[str]:
    """The column names an expression uses. I/O: none.

    Raises
    ------
    ConfigError
        It cannot be parsed.
    """
    return {node.id for node in ast.walk(_parse(expression)) if isinstance(node, ast.Name)}


def member(column: Any, choices: Sequence[Any]) -> Any:
    """Where a column has one of some values; null is one only when it is among them. I/O: none.

    Raises
    ------
    pyarrow.ArrowException, OverflowError, UnicodeError
        Values that do not compare with the column's.
    """
    values = pa.array(choices)
    if pa.types.is_null(values.type):
        values = pa.nulls(len(values), column.type)
    elif pa.types.is_string(values.type) != pa.types.is_string(column.type):  # Arrow would read text as numbers
        raise pa.ArrowTypeError(f"values of type {values.type} for a column of type {column.type}")
    return pc.is_in(column, values)


def evaluate(expression: str, columns: dict[str, Any]) -> Any:
    """Evaluate an expression to a boolean column. Null compares false.

    I/O: none.

    Parameters
    ----------
    expression : str
        Comparisons (chained ones too), ``in``, ``and``, ``or``, ``not``, ``is None``, + - * /,
        column names and literals; ``column[0]`` for an element of a list column.
    columns : dict
        Arrow arrays by name, all of one length.

    Raises
    ------
    ConfigError
        Another construct, an unknown column, or types that do not compare.
    """
    try:
        result = _value(_parse(expression), columns)
    except (pa.ArrowException, TypeError, OverflowError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"cannot evaluate {expression!r}: {error}") from error
    if not _is_column(result) or not pa.types.is_boolean(result.type):
        raise ConfigError(f"the expression {expression!r} is not a condition")
    return pc.fill_null(result, False)


def _value(node: ast.expr, columns: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as literal):
            return literal
        case ast.Name(id=name):
            if name not in columns:
                raise unknown_column(name, columns)
            return columns[name]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return pc.invert(pc.fill_null(_column(operand, columns), False))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as literal)):
            return -literal
        case ast.BoolOp(op=joint, values=parts):
            combine = pc.and_ if isinstance(joint, ast.And) else pc.or_
            result = pc.fill_null(_column(parts[0], columns), False)
            for part in parts[1:]:
                result = combine(result, pc.fill_null(_column(part, columns), False))
            return result
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
            return _ARITHMETIC[type(sign)](_value(left, columns), _value(right, columns))
        case ast.Subscript(value=ast.Name() as name, slice=ast.Constant(value=int() as place)):
            column = _value(name, columns)
            if not pa.types.is_list(column.type):
                raise ConfigError(f"{name.id} is not a list column")
            lengths = pc.list_value_length(column)
            if place >= (pc.max(lengths).as_py() or 0):  # also keeps a huge number from taking memory
                return pa.nulls(len(column), column.type.value_type)
            long_enough = pc.greater(lengths, place)
            return pc.list_element(
                pc.if_else(pc.fill_null(long_enough, False), column, pa.scalar([None] * (place + 1), column.type)),
                place,
            )
        case ast.Compare(left=left, ops=signs, comparators=others):
            result, before = None, left
            for comparison, other in zip(signs, others, strict=True):
                outcome = _compare(before, comparison, other, columns)
                result = outcome if result is None else pc.and_(result, outcome)
                before = other
            return result
    raise ConfigError(f"expressions have no {type(node).__name__}: {ast.unparse(node)!r}")


def _is_column(value: Any) -> bool:
    return isinstance(value, pa.Array | pa.ChunkedArray)


def _column(node: ast.expr, columns: dict[str, Any]) -> Any:
    value = _value(node, columns)
    if not _is_column(value):
        raise ConfigError(f"conditions are about columns, and {ast.unparse(node)!r} is a literal")
    return value


def _compare(left: ast.expr, sign: ast.cmpop, right: ast.expr, columns: dict[str, Any]) -> Any:
    if isinstance(sign, ast.Is | ast.IsNot) and isinstance(right, ast.Constant) and right.value is None:
        column = _column(left, columns)
        return column.is_null() if isinstance(sign, ast.Is) else column.is_valid()
    if isinstance(sign, ast.In | ast.NotIn):
        value = _column(left, columns)
        if not isinstance(right, ast.Tuple | ast.List | ast.Set):
            raise ConfigError("the right side of 'in' is a list of literals")
        inside = member(value, [_value(each, columns) for each in right.elts])
        return pc.and_not(value.is_valid(), inside) if isinstance(sign, ast.NotIn) else inside
    compare = _COMPARISONS.get(type(sign))
    if compare is None:
        raise ConfigError(f"expressions have no {type(sign).__name__}")
    value, other = _value(left, columns), _value(right, columns)
    if not _is_column(value) and not _is_column(other):
        raise ConfigError("a comparison needs a column")
    return pc.fill_null(compare(value, other), False)
