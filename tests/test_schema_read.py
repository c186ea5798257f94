"""No setting without a reader: every leaf field of the schemas is read somewhere in the package.

The scan follows types, not names: from parameters annotated with a section (`settings: ModelSection`), from
`load_config(TrainConfig, ...)` and functions that return a section, through attribute chains (`config.mlc.layer`),
local aliases (`mlc = config.mlc`), `self.` attributes, and loops over lists of sections.
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

import mlc_ray.config
from mlc_ray.config import ScoreConfig, SearchConfig, Section, TrainConfig, UtilityConfig

PACKAGE = Path(mlc_ray.config.__file__).parent.parent
SECTIONS: dict[str, type[Section]] = {
    name: item
    for name, item in vars(mlc_ray.config).items()
    if inspect.isclass(item) and issubclass(item, Section) and item is not Section
}

ROOTS = (TrainConfig, ScoreConfig, SearchConfig, UtilityConfig)
Leaf = tuple[str, str]  # section class, field
Known = tuple[type[Section], bool]  # section class, and whether it is a list of them


def shape_of(annotation: Any) -> Known | None:
    """What a field's annotation holds: a section, a list of sections, or (None) a plain value."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return annotation, False
    origin = typing.get_origin(annotation)
    for argument in typing.get_args(annotation):
        if (found := shape_of(argument)) is not None:
            return found[0], found[1] or origin is list
    assert origin in (None, list, tuple, typing.Literal, typing.Union, typing.Annotated, types.UnionType), annotation
    return None


def owner(section: type[Section], field: str) -> str:
    """The section that declares a field: a section may extend another, and code may read either."""
    return next(base.__name__ for base in section.__mro__ if field in vars(base).get("__annotations__", {}))


def leaves(*roots: type[Section]) -> set[Leaf]:
    found: set[Leaf] = set()
    for root in roots:
        for name, field in root.model_fields.items():
            nested = shape_of(field.annotation)
            found |= {(owner(root, name), name)} if nested is None else leaves(nested[0])
    return found


class Reader(ast.NodeVisitor):
    """Collects (section class, field) of every attribute read in one module."""

    def __init__(self, returns: Mapping[str, Known]) -> None:
        self.returns = returns
        self.known: dict[str, Known | None] = {}
        self.reads: set[Leaf] = set()

    # what an expression is

    def type_of(self, node: ast.expr | None) -> Known | None:
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self.known.get(f"self.{node.attr}")
            base = self.type_of(node.value)
            field = base[0].model_fields.get(node.attr) if base and not base[1] else None
            return shape_of(field.annotation) if field else None
        if isinstance(node, ast.Subscript):
            base = self.type_of(node.value)
            return (base[0], False) if base and base[1] else None
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in {"load_config", "parse_config"} and node.args and isinstance(node.args[0], ast.Name):
                section = SECTIONS.get(node.args[0].id)
                return (section, False) if section else None
            return self.type_of(node.args[0]) if name in {"enumerate", "list"} and node.args else self.returns.get(name)
        return None

    # where names come from

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for name, value in zip(target.elts, node.value.elts, strict=False):
                    self.bind(name, self.type_of(value))
            else:
                self.bind(target, self.type_of(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        self.bind(node.target, annotated(node.annotation))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self.bind(node.target, self.type_of(node.value))

    def visit_For(self, node: ast.For) -> None:
        self.loop(node)
        self.generic_visit(node)

    def loop(self, node: ast.For | ast.comprehension) -> None:
        several = self.type_of(node.iter)
        element = (several[0], False) if several and several[1] else None
        numbered = isinstance(node.iter, ast.Call) and getattr(node.iter.func, "id", "") == "enumerate"
        target = node.target.elts[1] if numbered and isinstance(node.target, ast.Tuple) else node.target
        self.bind(target, element)

    def comprehension(self, node: Any) -> None:
        for generator in node.generators:
            self.loop(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension

    def bind(self, target: ast.expr, what: Known | None) -> None:
        if isinstance(target, ast.Name):
            self.known[target.id] = what
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self.known[f"self.{target.attr}"] = what

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        outside = dict(self.known)
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            self.known[argument.arg] = annotated(argument.annotation)
        self.generic_visit(node)
        attributes = {name: what for name, what in self.known.items() if name.startswith("self.")}
        self.known = {**outside, **attributes}

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outside = dict(self.known)
        for item in node.body:  # dataclass fields
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                self.known[f"self.{item.target.id}"] = annotated(item.annotation)
        self.generic_visit(node)
        self.known = outside

    # what is read

    def visit_Attribute(self, node: ast.Attribute) -> None:
        base = self.type_of(node.value)
        if base and not base[1] and isinstance(node.ctx, ast.Load):
            declared = owner(base[0], node.attr) if node.attr in base[0].model_fields else base[0].__name__
            self.reads.add((declared, node.attr))
        self.generic_visit(node)


def annotated(node: ast.expr | None) -> Known | None:
    """`ModelSection`, `ModelSection | None`, `"ModelSection"`, `list[SourceSection]`, `Sequence[SourceSection]`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.Name):
        section = SECTIONS.get(node.id)
        return (section, False) if section else None
    if isinstance(node, ast.BinOp):
        return annotated(node.left) or annotated(node.right)
    if isinstance(node, ast.Subscript):
        inner = annotated(node.slice)
        return (inner[0], True) if inner else None
    return None


def reads(sources: Iterable[str]) -> set[Leaf]:
    trees = [ast.parse(source) for source in sources]
    returns = {
        node.name: known
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (known := annotated(node.returns)) is not None
    }
    found: set[Leaf] = set()
    for tree in trees:
        reader = Reader(returns)
        reader.visit(tree)
        found |= reader.reads
    return found


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return [p.read_text(encoding="utf-8") for p in sorted(PACKAGE.rglob("*.py")) if p.parent.name != "config"]


def test_every_field_is_read_somewhere(sources: list[str]) -> None:
    unread = sorted(leaves(*ROOTS) - reads(sources))
    assert not unread, f"no code reads these settings: {', '.join('.'.join(leaf) for leaf in unread)}"


def test_the_schemas_are_walked_to_the_leaves() -> None:
    found = leaves(*ROOTS)
    assert {
        ("LoraSection", "rank"),
        ("SourceSection", "kind"),
        ("EngineSection", "dtype"),
        ("TrainConfig", "seed"),
    } <= found
    assert ("TrainConfig", "mlc") not in found
    assert {section for section, _ in found} == set(SECTIONS)


def test_the_detector_reports_a_field_that_nothing_reads(sources: list[str]) -> None:
    blinded = [source.replace(".temperature", ".made_up_name") for source in sources]
    assert ("MlcSection", "temperature") in reads(sources)
    assert ("MlcSection", "temperature") not in reads(blinded)
    assert ("MlcSection", "made_up_name") in reads(blinded)


def test_the_detector_follows_types_not_names() -> None:
    code = """
def made() -> ScoreConfig: ...
def f(config: TrainConfig, settings: "ModelSection | None", *, other):
    mlc = config.mlc
    print(mlc.layer, settings.path, other.mlc.every, other.weight)
    def inner(): return config.zero.stage
    for number, source in enumerate(config.data.train): source.path
    mlc = other
    mlc.scaling
    config.model.dtype = 1
def g(sources: list[SourceSection]):
    return [s.kind for s in sources], sources[0].format, made().judge
class C:
    engine: EngineSection
    def __init__(self, objective: ObjectiveSection):
        self.objective = objective
    def h(self): return self.objective.beta, self.engine.dtype
run = load_config(TrainConfig, None)
print(run.seed)
"""
    assert reads([code]) == {
        ("TrainConfig", "mlc"), ("MlcSection", "layer"), ("ModelSection", "path"), ("TrainConfig", "zero"),
        ("ZeroSection", "stage"), ("TrainConfig", "data"), ("DataSection", "train"), ("SourceSection", "path"),
        ("TrainConfig", "model"), ("SourceSection", "kind"), ("SourceSection", "format"), ("ScoringSection", "judge"),
        ("ObjectiveSection", "beta"), ("EngineSection", "dtype"), ("TrainConfig", "seed"),
    }  # fmt: skip
