"""Configurations of mmsegmentation read as data: Python source that is parsed, whose values are taken, and of which nothing is run."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crfm_core import ConfigError

#: Names whose values are taken from a configuration file: the network and how its images are prepared.
TAKEN = ("model", "data_preprocessor", "img_norm_cfg", "test_pipeline")

#: Operations that are computed, on numbers alone. (A power could take for ever.)
ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
}  # fmt: skip

#: Results beyond this are refused.
LARGEST_NUMBER = 1e100

#: How many files may inherit from one another.
MAX_DEPTH = 20

WRITE_VALUES = "write the values themselves, configurations are read and never run"


def parse_config(text: str) -> dict[str, Any]:
    """The values that the source of a configuration binds to names, without running it.

    It may hold assignments of literals, lists, tuples, ``dict(...)`` and names bound before, which is all that mmengine writes, and
    numbers computed from numbers. It inherits nothing.
    Raises ValueError, saying where, for anything else.
    """
    return {name: _readable(value) for name, value in _parse(text).items()}


def read_config(path: Path | str) -> dict[str, Any]:
    """The values of :data:`TAKEN` in a configuration file of mmsegmentation, with all that it inherits, without running it.

    ``_base_`` names one file or several, relative to the one that names them, or below mmsegmentation's own configurations
    (``mmseg::_base_/models/...``). They are merged by mmengine's rules: dicts are merged key by key unless they hold
    ``_delete_=True``, anything else takes the place of what is inherited, and two bases may not bind the same name.
    ``_base_.name.key`` and ``{{_base_.name.key}}`` stand for inherited values. What else the file computes is passed over.

    Raises ConfigError when a file is missing, is no Python, or computes what one of the names needs.
    """
    try:
        return {name: _readable(value) for name, value in _read(Path(path), ()).items() if name in TAKEN}
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; {WRITE_VALUES}") from None


def _read(path: Path, inheriting: tuple[Path, ...]) -> dict[str, Any]:
    if path in inheriting or len(inheriting) > MAX_DEPTH:
        raise ConfigError(f"{path}: inherits from itself ({' -> '.join(map(str, (*inheriting, path)))}); take one of these _base_ out")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        by = f", which {inheriting[-1]} inherits from" if inheriting else ""
        raise ConfigError(f"{path}: {reason}{by}; give a configuration file of mmsegmentation") from None

    def inherit(bases: Any) -> dict[str, Any]:
        inherited: dict[str, Any] = {}
        for name in bases if isinstance(bases, list | tuple) else [bases]:
            if not isinstance(name, str):
                raise ValueError(f"inherits from {name!r}, which is no path")
            base = _read(_base_path(name, path), (*inheriting, path))
            if twice := sorted(inherited.keys() & base.keys()):
                raise ValueError(f"inherits {twice[0]} from two files; two bases may not bind the same name")
            inherited |= base
        return inherited

    try:
        return _parse(text, inherit)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; {WRITE_VALUES}") from None


def _base_path(name: str, path: Path) -> Path:
    """The file that ``_base_`` names in the file ``path``."""
    package, separator, below = name.rpartition("::")
    if not separator:
        return (path.parent / name).resolve()
    if package != "mmseg":
        raise ValueError(f"inherits from {name!r}; of packages only mmseg:: is known")
    package_spec = importlib.util.find_spec("mmseg")
    assert package_spec and package_spec.submodule_search_locations, "mmsegmentation is a requirement"
    return Path(package_spec.submodule_search_locations[0]) / ".mim" / "configs" / below


def _parse(text: str, inherit: Callable[[Any], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Names and values, or for what is computed the ValueError that it is to need it.

    Raises ValueError for statements that could change a value otherwise.
    ``inherit`` reads what ``_base_`` names; without it the text may neither inherit nor import.
    """
    try:
        statements = ast.parse(text).body
        bases = [one for one in statements if isinstance(one, ast.Assign) and _target(one) == "_base_"]
        if bases and not inherit:
            raise _no_value(bases[0])
        base = inherit(_value(bases[0].value, {})) if inherit and bases else {}
        names: dict[str, Any] = {"inf": math.inf, "nan": math.nan} | ({"_base_": base} if inherit else {})
        own: dict[str, Any] = {}
        for statement in statements:
            match statement:
                case ast.Assign() if name := _target(statement):
                    if name != "_base_":
                        own[name] = names[name] = _attempt(statement.value, names)
                case ast.Expr(value=ast.Constant()):
                    pass  # a docstring
                case ast.Import(names=imported) | ast.ImportFrom(names=imported) if inherit and all(one.name != "*" for one in imported):
                    for one in imported:
                        name = one.asname or one.name.split(".")[0]
                        own[name] = names[name] = _no_value(statement)
                case _:
                    raise _no_value(statement)
        return _merge(own, base)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot be parsed ({type(error).__name__})") from None


def _target(statement: ast.Assign) -> str:
    """The name that a statement binds, "" if it binds anything else."""
    return statement.targets[0].id if len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name) else ""


def _attempt(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression, or the error for it."""
    try:
        return _value(node, names)
    except ValueError as error:
        return error


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(number := _value(operand, names), int | float):
            return -number
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in ARITHMETIC:
            numbers = [_value(left, names), _value(right, names)]
            if all(type(number) in (int, float) for number in numbers):
                with contextlib.suppress(ArithmeticError):
                    if abs(number := ARITHMETIC[type(sign)](*numbers)) < LARGEST_NUMBER:
                        return number
        case ast.Call(func=ast.Name(id="sum"), args=[ast.List() | ast.Name() as argument], keywords=[]):
            if isinstance(items := _value(argument, names), list) and all(type(item) in (int, float) for item in items):
                return sum(items)
        case ast.Name(id=name) if name in names:
            return _readable(names[name])
        case ast.Attribute(value=owner, attr=key) if _is_inherited(owner):
            if isinstance(found := _value(owner, names), dict) and key in found:
                return _readable(found[key])
        case ast.Set(elts=[ast.Set(elts=[inner])]) if _is_inherited(inner):
            return _value(inner, names)
        case ast.List(elts=items):
            return [_value(item, names) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, names) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = [(_value(key, names), _value(value, names)) for key, value in zip(keys, values, strict=True) if key]
            if all(isinstance(key, str | int | float) for key, _ in pairs):
                return dict(pairs)
        # mmengine writes dict({...}) where a key is no identifier
        case ast.Call(func=ast.Name(id="dict"), args=[] | [ast.Dict()] as arguments, keywords=keywords) if all(one.arg for one in keywords):
            return {**(_value(arguments[0], names) if arguments else {}), **{one.arg: _value(one.value, names) for one in keywords}}
    raise _no_value(node)


def _is_inherited(node: ast.expr) -> bool:
    """Whether an expression is ``_base_`` or a key of it."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "_base_"


def _readable(value: Any) -> Any:
    if isinstance(value, ValueError):
        raise value
    return value


def _no_value(node: ast.expr | ast.stmt) -> ValueError:
    return ValueError(f"holds more than values (line {node.lineno}: {ast.unparse(node)[:80]})")


def _merge(child: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A configuration merged into the one that it inherits from. Raises ValueError when a dict is to be merged into something else."""
    result = dict(base)
    for key, value in child.items():
        if isinstance(value, dict) and key in base:
            own = {name: item for name, item in value.items() if name != "_delete_"}
            replaces = value.get("_delete_", False)
            if not replaces and not isinstance(_readable(base[key]), dict):
                raise ValueError(f"has a dict as {key}, which is none in its _base_; add _delete_=True to put it in its place")
            value = own if replaces else _merge(own, base[key])
        result[key] = value
    return result
