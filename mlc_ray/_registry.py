"""Components by name: losses, terms, judges, formats, search objectives, engines and storages.

A component is one class in one file, with its settings nested in it:

    @register("loss", "dpo")
    class Dpo(Alignment):
        class Settings(LossSettings): ...

Configuration refers to it by its short name (`dpo`), or, from outside this package, by where it is
(`my_package.my_module:MyLoss`); a package that is installed can also announce short names of its own as entry points of
the group `mlc_ray.KIND`. An unknown name raises `UnknownComponentError`: nothing falls back to a default.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, TypeVar, get_args

from mlc_ray.errors import MlcRayError

ComponentKind = Literal["loss", "term", "judge", "format", "objective", "engine", "storage"]

_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "loss": ("mlc_ray.losses",),
    "term": ("mlc_ray.losses",),
    "judge": ("mlc_ray.judges", "mlc_ray.judges.guards"),
    "format": ("mlc_ray.data.formats",),
    "objective": ("mlc_ray.search.objectives",),
    "engine": ("mlc_ray.train.engines",),
    "storage": ("mlc_ray.storage",),
}
"""Where the shipped components of a kind are; a component called `llama-guard` is in a module `llama_guard`."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_FOUND: dict[str, dict[str, type]] = {kind: {} for kind in get_args(ComponentKind)}

_SHIPPED_ONLY: ContextVar[str | None] = ContextVar("shipped_only", default=None)

ClassT = TypeVar("ClassT", bound=type)


class UnknownComponentError(MlcRayError, ValueError):
    """No component of a kind has the name given; the message quotes it and lists the names there are."""


def register(kind: ComponentKind, name: str) -> Callable[[ClassT], ClassT]:
    """A class decorator that makes the class known as `name` among the components of `kind`.

    Raises:
        ValueError: The kind is unknown, or another class has that name already.
    """
    if kind not in _FOUND:
        raise ValueError(f"register: no components of kind {kind!r}; kinds are {', '.join(_FOUND)}")

    def add(component: ClassT) -> ClassT:
        known = _FOUND[kind].get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            component.__module__,
            component.__qualname__,
        ):
            raise ValueError(f"register: {kind} {name!r} is {_path(known)} already")
        _FOUND[kind][name] = component
        return component

    return add


@contextmanager
def shipped_only(fix: str) -> Iterator[None]:
    """Within it no name makes `resolve` import code from outside this package, for names that somebody else wrote.

    Args:
        fix: how to allow it; the end of the message of the `UnknownComponentError` that such a name raises.
    """
    token = _SHIPPED_ONLY.set(fix)
    try:
        yield
    finally:
        _SHIPPED_ONLY.reset(token)


def resolve(kind: ComponentKind, name: str) -> type[Any]:
    """The class that `name` stands for: a short name, or `package.module:Class`.

    Errors raised while its module is imported are not caught, except that of a module that does not exist.

    Raises:
        UnknownComponentError: There is no such component; the message lists the known names.
    """
    if ":" in name:
        return _imported(kind, name)
    if (found := _shipped(kind, name)) is not None:
        return found
    for entry in importlib.metadata.entry_points(group=f"mlc_ray.{kind}"):
        if entry.name == name:
            return _imported(kind, entry.value)
    near = difflib.get_close_matches(name, names(kind), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownComponentError(
        f"no {kind} is called {name!r}{hint} (there are {', '.join(names(kind))}; one of your own is written "
        "package.module:Class)"
    )


def names(kind: ComponentKind) -> list[str]:
    """The short names of a kind, sorted: shipped ones, registered ones, and those of installed packages."""
    for package in _PACKAGES[kind]:
        _import_all(package)
    announced = {entry.name for entry in importlib.metadata.entry_points(group=f"mlc_ray.{kind}")}
    return sorted(_FOUND[kind].keys() | announced)


def _shipped(kind: ComponentKind, name: str) -> type[Any] | None:
    """By the module that bears its name, which spares importing all others; else by importing them all."""
    if name in _FOUND[kind]:
        return _FOUND[kind][name]
    module = name.replace("-", "_")
    for package in _PACKAGES[kind]:
        if module in _modules(package):
            importlib.import_module(f"{package}.{module}")
            if name in _FOUND[kind]:
                return _FOUND[kind][name]
    for package in _PACKAGES[kind]:
        _import_all(package)
    return _FOUND[kind].get(name)


def _imported(kind: ComponentKind, path: str) -> type[Any]:
    if (fix := _SHIPPED_ONLY.get()) is not None:
        raise UnknownComponentError(f"{kind} {path!r} does not come with mlc_ray, so it is not imported; {fix}")
    if not _PATH.fullmatch(path):
        raise UnknownComponentError(f"{kind} {path!r} is not of the form package.module:Class")
    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise UnknownComponentError(
            f"{kind} {path!r}: there is no module {error.name!r}; on a cluster it must be importable on every node, "
            "e.g. sent along with `ray job submit --working-dir`"
        ) from None
    component = getattr(module, class_name, None)
    if not isinstance(component, type):
        raise UnknownComponentError(f"{kind} {path!r}: module {module_name!r} has no class {class_name!r}")
    if lacking := sorted(getattr(component, "__abstractmethods__", ())):
        raise UnknownComponentError(f"{kind} {path!r} cannot be used: it does not define {', '.join(lacking)}")
    return component


@cache
def _modules(package: str) -> frozenset[str]:
    found = importlib.import_module(package)
    return frozenset(info.name for info in pkgutil.iter_modules(getattr(found, "__path__", ())))


@cache
def _import_all(package: str) -> None:
    for module in sorted(_modules(package)):
        importlib.import_module(f"{package}.{module}")


def _path(component: type) -> str:
    return f"{component.__module__}:{component.__qualname__}"
