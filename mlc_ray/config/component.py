"""Settings of a component as a field of a section: which class validates them is decided by the component's name.

    class TrainConfig(Section):
        objective: Annotated[LossSettings, ComponentSettings("loss", by="loss", default="dpo")] = ...

A value is a mapping such as `{loss: simpo, margin: 1.0}`. Its field `by` is resolved to a component, and the mapping is
validated by that component's nested `Settings`; a field of another component is an unknown field there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mlc_ray._registry import ComponentKind, UnknownComponentError, names, resolve

COMPONENT_FAULTS = "component_faults"
"""Type of the error that carries a component's own faults (`errors`) and its `schema`; `parse_config` unfolds it."""


class ComponentSettings:
    """Marks a field (by `Annotated`) as the settings of a component of `kind`, named by their field `by`."""

    def __init__(self, kind: ComponentKind, *, by: str = "name", default: str | None = None) -> None:
        self.kind, self.by, self.default = kind, by, default

    def parse(self, value: Any) -> Any:
        """The validated settings: an instance of the component's `Settings`."""
        from mlc_ray.config.base import Section

        if isinstance(value, Section):
            return value
        if isinstance(value, str):
            value = {self.by: value}
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a section with {self.by}, or a name alone")
        name = value.get(self.by, self.default)
        if not isinstance(name, str):
            raise PydanticCustomError("component_name", f"{self.by}={name!r}: give the name of a {self.kind}")
        try:
            component = resolve(self.kind, name)
        except UnknownComponentError as error:
            raise PydanticCustomError("component_name", "{text}", {"text": f"{self.by}={name!r}: {error}"}) from None
        try:
            return component.Settings.model_validate({self.by: name, **value})
        except ValidationError as error:
            context = {"errors": error.errors(), "schema": component.Settings}
            raise PydanticCustomError(COMPONENT_FAULTS, "{errors}", context) from None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Plain validation by `parse`; dumped as what it is (its own class's fields)."""
        return core_schema.no_info_plain_validator_function(
            self.parse, serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """One of the shipped components' schemas, each with its name as the constant of `by`."""
        options = []
        for name in names(self.kind):
            option = resolve(self.kind, name).Settings.model_json_schema()
            option.get("properties", {}).setdefault(self.by, {})["const"] = name
            options.append(option)
        return {"oneOf": options}


def _dump(value: Any, info: Any) -> Any:
    return value.model_dump(mode=info.mode, exclude_unset=info.exclude_unset)
