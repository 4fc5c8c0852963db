"""How the command line shows optional values: without Python's None and ()."""

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
