"""Settings of a component as a field of a section: which class validates them is decided by the component's name.

    class TrainConfig(Section):
        objective: Annotated[LossSettings, ComponentSettings("loss", by="loss", default="dpo")] = ...
        terms: Annotated[Mapping[str, TermSettings], ComponentSettings("term", by_key=True)] = ...

A value is a mapping such as `{loss: simpo, margin: 1.0}`. Its field `by` is resolved to a component, and the mapping is
validated by that component's nested `Settings`, a subclass of the one annotated; a field of another component is an
unknown field there. With `by_key` the value is a mapping of such values, each named by its key unless it says `by`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mlc_ray._registry import ComponentKind, UnknownComponentError, names, resolve

COMPONENT_FAULTS = "component_faults"
"""Type of the error that carries a component's own faults (`errors`) and its `schema`; `parse_config` unfolds it."""
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


class ComponentSettings:
    """Marks a field (by `Annotated`) as the settings of a component of `kind`, named by their field `by`."""

    def __init__(
        self, kind: ComponentKind, *, by: str = "name", default: str | None = None, by_key: bool = False
    ) -> None:
        self.kind, self.by, self.default, self.by_key = kind, by, default, by_key
        self.base: type[Any] | None = None  # the annotated class, known once a section has the field

    def parse(self, value: Any) -> Any:
        """The validated settings: an instance of the component's `Settings`, which must extend the annotated class."""
        return self._parse(value, self.default)

    def parse_all(self, value: Any) -> dict[str, Any]:
        """The same for each value of a mapping, named by its key where it does not say."""
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a section with a {self.kind} per name")
        found, faults = {}, []
        for key, item in value.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                text = "a key is letters, digits, - and _: it names metrics and settings"
                faults.append({"type": "key", "loc": (key,), "input": item, "msg": text})
                continue
            try:
                found[key] = self._parse(item, key)
            except PydanticCustomError as error:
                faults.append(
                    {"type": error.type, "loc": (key,), "input": item, "msg": error.message(), "ctx": error.context}
                )
            except ValueError as error:
                faults.append({"type": "value_error", "loc": (key,), "input": item, "msg": str(error)})
        if faults:
            from mlc_ray.config.base import Section

            raise PydanticCustomError(COMPONENT_FAULTS, "{errors}", {"errors": faults, "schema": Section})
        return found

    def _parse(self, value: Any, default: str | None) -> Any:
        from mlc_ray.config.base import Section

        base = self.base or Section
        if isinstance(value, str):
            value = {self.by: value}
        if isinstance(value, base):
            name = getattr(value, self.by, default)
        elif isinstance(value, Mapping):
            name = value.get(self.by, default)
        else:
            raise ValueError(f"expected a section with {self.by}, or a name alone")
        if not isinstance(name, str):
            raise PydanticCustomError("component_name", f"{self.by}={name!r}: give the name of a {self.kind}")
        try:
            component = resolve(self.kind, name)
        except UnknownComponentError as error:
            raise PydanticCustomError("component_name", "{text}", {"text": f"{self.by}={name!r}: {error}"}) from None
        settings = getattr(component, "Settings", None)
        if not (isinstance(settings, type) and issubclass(settings, base)):
            text = f"{self.by}={name!r} cannot stand here: it has no nested Settings that extends {base.__name__}"
            raise PydanticCustomError("component_name", "{text}", {"text": text})
        if isinstance(value, base):
            if type(value) is settings:
                return value
            text = f"{self.by}={name!r} has the settings {_class(settings)}, not {_class(type(value))}"
            raise PydanticCustomError("component_name", "{text}; give those, or a mapping", {"text": text})
        try:
            return settings.model_validate({self.by: name, **value})
        except ValidationError as error:
            context = {"errors": error.errors(), "schema": settings}
            raise PydanticCustomError(COMPONENT_FAULTS, "{errors}", context) from None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Plain validation by `parse` or `parse_all`; dumped as what it is (its own class's fields)."""
        classes = [item for item in (source, *get_args(source)) if isinstance(item, type)]
        self.base = next((item for item in reversed(classes) if hasattr(item, "model_fields")), None)
        return core_schema.no_info_plain_validator_function(
            self.parse_all if self.by_key else self.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(self._dump, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """One of the shipped components' schemas, each with its name as the constant of `by`."""
        options = []
        for name in names(self.kind):
            settings = resolve(self.kind, name).Settings
            if self.base is not None and not issubclass(settings, self.base):
                continue
            option = dict(handler.resolve_ref_schema(handler(settings.__pydantic_core_schema__)))
            properties = option.get("properties", {})
            option["properties"] = {**properties, self.by: {**properties.get(self.by, {}), "const": name}}
            options.append(option)
        return {"type": "object", "additionalProperties": {"anyOf": options}} if self.by_key else {"oneOf": options}

    def _dump(self, value: Any, info: Any) -> Any:
        """With the component's name even where it was not set: without it the rest could not be read back."""
        if isinstance(value, Mapping):
            return {key: self._dump(item, info) for key, item in value.items()}
        dumped = value.model_dump(mode=info.mode, exclude_unset=info.exclude_unset)
        return {self.by: getattr(value, self.by), **dumped}


def _class(settings: type[Any]) -> str:
    return f"{settings.__module__}.{settings.__qualname__}"


class ComponentName:
    """Marks a text field (by `Annotated`) as the name of a component of `kind`, or one of the words `besides`."""

    def __init__(self, kind: ComponentKind, *besides: str) -> None:
        self.kind, self.besides = kind, besides

    def check(self, name: str) -> str:
        """`name`, if there is such a component."""
        if name not in self.besides:
            try:
                resolve(self.kind, name)
            except UnknownComponentError as error:
                raise PydanticCustomError("component_name", "{text}", {"text": str(error)}) from None
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A string, then `check`."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """A string; the known names are its examples."""
        return {**handler(schema), "examples": [*self.besides, *names(self.kind)]}


def settings_by_default() -> Any:
    """An empty section: the default component's settings, once validated."""
    return {}
