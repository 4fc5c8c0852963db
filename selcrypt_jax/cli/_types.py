"""How the command line shows options that may be left out: without Python's None and ()."""

import dataclasses
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

_NOT_GIVEN = ["not", "given"]  # as tyro wants it: word by word


def plain_types() -> ConstructorRegistry:
    """Rules for types such as ``Path | None`` and ``tuple[str, ...]``.

    They are read as tyro reads them, and shown as a person would: ``PATH``, and "not given" where
    nothing is the default.
    """
    registry = ConstructorRegistry()

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
            str_from_instance=lambda value: (
                _NOT_GIVEN if value is None else inner.str_from_instance(value)
            ),
            choices=None if inner.choices is None else (*inner.choices, "None"),
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
            str_from_instance=lambda value: list(value) or _NOT_GIVEN,
        )

    return registry
