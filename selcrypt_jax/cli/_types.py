"""How the command line reads and shows values: without Python's None, () and int()."""

import dataclasses
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


def plain_types() -> ConstructorRegistry:
    """Rules for types such as ``Path | None`` and ``tuple[str, ...]``.

    They are parsed as tyro does, and shown as ``PATH`` and ``STR [STR ...]``. A default of None or
    () is shown as nothing.
    """
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type not in _NUMBERS:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=info.type.__name__.upper(),
            instance_from_str=lambda words: _number(info.type, words[0]),
            is_instance=lambda value: isinstance(value, (int, info.type)),
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kinds = get_args(info.type)
        if get_origin(info.type) not in (Union, UnionType) or len(kinds) != 2:
            return None
        if NoneType not in kinds:
            return None
        kind = kinds[0] if kinds[1] is NoneType else kinds[1]
        inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
        if not isinstance(inner, PrimitiveConstructorSpec):
            return None
        return dataclasses.replace(
            inner,
            instance_from_str=lambda words: (
                None if words == ["None"] else inner.instance_from_str(words)
            ),
            is_instance=lambda value: value is None or inner.is_instance(value),
            str_from_instance=lambda value: [] if value is None else inner.str_from_instance(value),
            choices=None if inner.choices is None else (*inner.choices, "None"),
        )

    @registry.primitive_rule
    def number_or_shares(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type != int | tuple[float, ...] | None:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="INT|SHARE [SHARE ...]",
            instance_from_str=_number_or_shares,
            is_instance=lambda value: value is None or isinstance(value, int | tuple),
            str_from_instance=lambda value: [] if value is None else [str(value)],
        )

    @registry.primitive_rule
    def several(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type != tuple[str, ...] or info.markers:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="STR [STR ...]",
            instance_from_str=tuple,
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=list,
        )

    return registry


_NUMBERS = {int: "a whole number", float: "a number"}


def _number(kind: Any, word: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"expected {_NUMBERS[kind]}, got {word!r}") from None


def _number_or_shares(words: list[str]) -> int | tuple[float, ...]:
    if len(words) == 1 and words[0].lstrip("+-").isdecimal():
        return int(words[0])
    return tuple(_number(float, word) for word in words)
