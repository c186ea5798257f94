"""What all settings share: strict immutable sections, reading YAML with overrides, and errors that say what to fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from mlc_ray.config.component import COMPONENT_FAULTS
from mlc_ray.errors import MlcRayError
from mlc_ray.secrets import HIDDEN, credential_in, hide, is_secret_name, secret_fields

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
"""A number above 0."""
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
LANGUAGE_TAG = re.compile(r"[a-z]{2,3}(-[A-Z][a-z]{3})?(-([A-Z]{2}|[0-9]{3}))?")
"""A BCP 47 tag of language, script and region, with its cases: `en`, `zh-Hant`, `pt-BR`."""


def _language_tag(text: str) -> str:
    if LANGUAGE_TAG.fullmatch(text):
        return text
    primary, *more = text.replace("_", "-").split("-")
    near = "-".join([primary.lower(), *(part.title() if len(part) == 4 else part.upper() for part in more)])
    hint = f"; did you mean {near!r}?" if LANGUAGE_TAG.fullmatch(near) else ""
    raise ValueError(f"it is no language tag; write it like 'en', 'zh-Hant', 'pt-BR'{hint}")


LanguageTag = Annotated[
    str,
    AfterValidator(_language_tag),
    WithJsonSchema({"type": "string", "pattern": rf"^({LANGUAGE_TAG.pattern})$"}),  # of which pydantic says no more
]
Resume = Literal["never", "auto"]
RESUME = (
    "If the folder exists already: `never` refuses it; `auto` goes on with what is there, and refuses a setting that "
    "must not differ, by name."
)
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


RECIPE = "recipe:"
"""What a shipped config file is named by: `recipe:qwen2.5-7b` is `configs/qwen2.5-7b.yaml`, from anywhere."""


class ConfigError(MlcRayError, ValueError):
    """A setting is unknown, ill-typed or unsupported; the message quotes it and names the fix."""


class Section(BaseModel):
    """Base of all sections: immutable, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    command: ClassVar[str | None] = None
    """Of all settings of a command: how it is called, `train` of `mlc-ray train`."""

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read true as 1, which is never meant: YAML reads `on`, `yes` and `off` as truth values too."""
        if isinstance(value, bool) and bool not in _plain_types(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"{str(value).lower()} is a truth value, which this field does not take")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _no_key_among_further_settings(cls, value: Any, info: ValidationInfo) -> Any:
        """Settings of other libraries, which are passed on as they are: what a credential is called is refused."""
        if isinstance(value, dict) and (found := next(secret_fields(value), None)) is not None:
            raise ValueError(
                f"{info.field_name}.{found} would be kept with the settings, and is called as a credential is (its "
                "value is not shown); give it by the environment"
            )
        return value


ConfigT = TypeVar("ConfigT", bound="Section")


def refuse_credentials(field: str, uri: str, fix: str) -> None:
    """Refuse a `uri` that carries a credential: settings are written into folders, manifests and trackers.

    Raises:
        ValueError: It carries one; the message leaves it out.
    """
    if (found := credential_in(uri)) is not None:
        raise ValueError(f"{field}={hide(uri)!r} carries {found}, which run folders would keep; {fix}")


def _plain_types(annotation: Any) -> set[Any]:
    """The types that an annotation is made of: through unions, lists, tuples and `Annotated`."""
    arguments = get_args(annotation)
    return {annotation} if not arguments else set().union(*(_plain_types(argument) for argument in arguments))


def load_config(
    schema: type[ConfigT],
    path: str | Path | None,
    overrides: Iterable[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Read a YAML file (if any), apply ``section.field=value`` overrides, and validate.

    `defaults` are values at the top that the file may leave out.

    Values of overrides are parsed as YAML, so ``--set mlc.layer=20`` is an integer and ``--set data.languages=[en,ur]``
    a list.

    Raises:
        ConfigError: Settings are invalid; the message lists every fault at once.
    """
    raw = {**(defaults or {}), **(read_config_file(path, schema) if path is not None else {})}
    for override in overrides:
        apply_override(raw, override)
    return parse_config(schema, raw)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; it refuses a key that a mapping has twice, and reads 1e-6 as a number, as JSON does.

    By YAML 1.1, which PyYAML follows, it is text, since a number with an exponent needs a point.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node.

        Raises:
            yaml.YAMLError: A key occurs twice; the error has the place of the second one.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper; it puts a text in quotes that `_Loader` alone would read as a number, such as 201759e0."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_config_file(path: str | Path, schema: type[Section] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, not validated; `recipe:NAME` is a shipped one.

    Raises:
        ConfigError: The file is missing, unreadable or no mapping, no recipe has that name, or it has the settings of
            another command than those of `schema`.
    """
    file = recipe_file(str(path)) if str(path).startswith(RECIPE) else Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist (looked for {str(file.absolute())!r})") from None
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {str(path)!r} is not valid YAML: {error}") from None
    raw = parse_yaml(text, str(path))
    if schema is not None and (others := _commands_of(raw, schema)):
        raise ConfigError(
            f"config file {str(path)!r} has settings of `mlc-ray {' or '.join(others)}`; those of `mlc-ray "
            f"{schema.command}` are {', '.join(sorted(schema.model_fields))}"
        )
    return raw


def _commands_of(raw: Mapping[str, Any], schema: type[Section]) -> list[str]:
    """The commands whose settings have every field at the top of `raw`, where those of `schema` lack one."""
    if schema.command is None or not raw or raw.keys() <= schema.model_fields.keys():
        return []
    waiting, found = [Section], set[str]()
    while waiting:
        each = waiting.pop()
        waiting += each.__subclasses__()
        if each.command is not None and raw.keys() <= each.model_fields.keys():
            found.add(each.command)
    return sorted(found)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in the text of a YAML file, not validated.

    Args:
        text: what the file holds.
        where: its path or URL, for messages.

    Raises:
        ConfigError: It is not YAML, or no mapping.
    """
    try:
        loaded = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {where!r} is not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {where!r} holds {type(loaded).__name__}, expected sections such as `model:`")
    return loaded


def dump_yaml(value: Mapping[str, Any]) -> str:
    """A mapping as YAML, in its order, of which `parse_yaml` reads the same."""
    text: str = yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def recipe_file(name: str) -> Path:
    """The file of a shipped recipe, `recipe:NAME` with the name of a file of `configs/` without its ending.

    Raises:
        ConfigError: There is no such recipe; the message lists those there are.
    """
    folder = Path(__file__).parents[1] / "recipes"
    recipes = {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}
    short = name.removeprefix(RECIPE)
    if short not in recipes:
        near = difflib.get_close_matches(short, recipes, n=1, cutoff=0.5)
        hint = f"; did you mean {RECIPE}{near[0]}?" if near else ""
        raise ConfigError(f"{name!r}: no recipe is called {short!r}{hint} (there are {', '.join(recipes)})")
    return recipes[short]


def parse_config(schema: type[ConfigT], raw: Mapping[str, Any]) -> ConfigT:
    """Validate a nested mapping.

    Raises:
        ConfigError: It is invalid; the message quotes every offending field and value.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = _explanations(schema, error.errors(), ())
        raise ConfigError("\n".join(["invalid configuration:", *(f"  - {line}" for line in lines)])) from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``section.field=value`` in a nested dict, in place.

    Raises:
        ConfigError: `override` is not written so.
    """
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form section.field=value")
    is_secret = is_secret_name(keys[-1])  # no field is called so, and what follows says that
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        said = " (it is not shown)" if is_secret else f": {getattr(error, 'problem', None) or error}"
        override = f"{dotted}={HIDDEN}" if is_secret else override
        raise ConfigError(f"override {override!r}: the value is not valid YAML{said}") from None
    node: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(
                    f"override {override!r}: {'.'.join(keys[:depth])} is a list of {len(node)}, "
                    f"{key!r} is not an index of it"
                )
            if last:
                node[int(key)] = value
                return
            node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
                return
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(keys[:depth])} is {node!r}, not a section")


def by_dotted_name(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    if not isinstance(value, Mapping):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= by_dotted_name(inner, f"{name}.{key}" if name else str(key))
    return flat


def config_schema(schema: type[Section]) -> dict[str, Any]:
    """The JSON schema, for editors and for people."""
    return schema.model_json_schema()


# How pydantic names the members of a union in the place of a fault.
_UNION_MEMBER = re.compile(r"bool|int|float|str|none|constrained-\w+|(literal|list|tuple|dict)\[.*\]|[A-Z]\w+Section")


def _one_per_value(items: Iterable[Any]) -> list[dict[str, Any]]:
    """Pydantic's faults, those of a union's members as one: of the field, with what each member would have taken."""
    found: dict[Any, dict[str, Any]] = {}
    for index, item in enumerate(items):
        location = item["loc"]
        if len(location) > 1 and _UNION_MEMBER.fullmatch(str(location[-1])):
            key = (location[:-1], id(item["input"]))
            message = item["msg"].removeprefix("Value error, ")
            if key in found:
                found[key]["msg"] += f", or {message[0].lower()}{message[1:]}"
            else:
                found[key] = {**item, "loc": location[:-1], "msg": message}
        else:
            found[index] = dict(item)
    return list(found.values())


def _explanations(schema: type[Section], items: Iterable[Any], place: tuple[str | int, ...]) -> list[str]:
    """A line per fault of `schema`, which stands at `place` in the whole; those of a component by its own schema."""
    lines: list[str] = []
    for item in _one_per_value(items):
        if item["type"] == COMPONENT_FAULTS:
            inside = item["ctx"]
            lines += _explanations(inside["schema"], inside["errors"], (*place, *item["loc"]))
        else:
            lines.append(_explain(schema, item, place))
    return lines


def _explain(schema: type[Section], item: Any, place: tuple[str | int, ...]) -> str:
    *before, last = item["loc"] or ("",)
    names_key = last == "[key]"  # pydantic's word for a fault of the key itself, which stands before it
    path = ".".join(str(part) for part in (*place, *(before if names_key else item["loc"])))
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        names = _field_names(schema, item["loc"][:-1])
        name = str(item["loc"][-1])
        near = [f"{section}.{name}" for section in _sections_with(schema, name)]
        near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        shown = HIDDEN if is_secret_name(name) else _shown(value)
        return f"{path}={shown}: no such field{hint} (valid here: {', '.join(names)})"
    if item["type"] == "model_type":
        names = _field_names(schema, item["loc"])
        written = f"; write {{path: {hide(value)}}}" if isinstance(value, str) and "path" in names else ""
        return f"{path}={_shown(value)}: expected a section, with fields of {', '.join(names)}{written}"
    if item["type"] == "missing":
        return f"{path}: required, but not given"
    message = item["msg"].removeprefix("Value error, ") + _how_to_write(schema, item)
    return (
        f"{path}={_shown(value)}: {message}"
        if path and not isinstance(value, dict) and not names_key
        else f"{path}: {message}"
        if path
        else message
    )


def _shown(value: Any) -> str:
    """A value as a message quotes it: without the fields that are called as credentials are."""

    def without(inner: Any) -> Any:
        if isinstance(inner, Mapping):
            return {key: HIDDEN if is_secret_name(str(key)) else without(each) for key, each in inner.items()}
        return [without(each) for each in inner] if isinstance(inner, list) else inner

    return hide(repr(without(value)))


def _how_to_write(schema: type[Section], item: Any) -> str:
    """What YAML made of a value that was meant otherwise, where that is the likely fault."""
    fault, value = item["type"], item.get("input")
    if isinstance(value, bool) and fault != "bool_type":
        return "; YAML reads no, off, yes and on as truth values: put such a word in quotes"
    if fault != "list_type" or not isinstance(value, str | int | float):
        return ""
    *before, name = item["loc"]
    field = _section_at(schema, before).model_fields.get(str(name))
    if field is not None and _section_of(field.annotation) is not None:
        return "; a list of sources is written [{path: one}, {path: two}]"
    return "; a list is written [one, two]" if isinstance(value, str) else f"; a list is written [{value}]"


def _sections_with(schema: type[Section], name: str) -> list[str]:
    """The sections at the top of a schema that have a field of this name."""
    nested = {top: _section_of(field.annotation) for top, field in schema.model_fields.items()}
    return [top for top, section in nested.items() if section is not None and name in section.model_fields]


def _field_names(schema: type[Section], location: Iterable[str | int]) -> list[str]:
    return sorted(_section_at(schema, location).model_fields)


def _section_at(schema: type[Section], location: Iterable[str | int]) -> type[Section]:
    current: type[Section] = schema
    for part in location:
        if isinstance(part, int) or part not in current.model_fields:
            continue
        nested = _section_of(current.model_fields[part].annotation)
        if nested is not None:
            current = nested
    return current


def _section_of(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _section_of(argument)) is not None:
            return found
    return None
