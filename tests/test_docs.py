"""Commands quoted in the documents exist: subcommands and flags, make targets, config files and settings."""

from __future__ import annotations

import argparse
import ast
import doctest
import html
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml

import mlc_ray
from mlc_ray import api, errors
from mlc_ray._registry import names, resolve
from mlc_ray.cli import build_parser
from mlc_ray.config import ConfigError, Section, TapSection, parse_config
from mlc_ray.config.component import ComponentSettings
from mlc_ray.errors import MlcRayError
from tests.documented import (
    LEAST,
    LOADERS,
    OTHERS,
    WITHOUT_SETTINGS,
    accepting,
    check_command,
    schemas,
)

REPOSITORY = Path(__file__).resolve().parent.parent
REPOSITORY_DOCUMENTS = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "cluster/README.md", "benchmarks/README.md", *REPOSITORY_DOCUMENTS)
GENERATED = {
    REPOSITORY / "docs" / "reference" / f"{page}.md" for page in ("commands", "settings", "errors")
}  # pages that the site makes from the code
OURS = re.compile(r"\b(mlc-ray|python -m mlc_ray)(?=\s+\S)")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[str]:
    """Command lines of the bash and console blocks of a Markdown text, continuation lines joined."""
    for language, block in FENCE.findall(text):
        if language not in {"bash", "sh", "shell", "console"}:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if language == "console" and not line.startswith("$ "):
                continue  # what the command printed
            yield from (part.strip() for part in re.split(r"&&|;|\|", line.removeprefix("$ ")))


def quoted(document: str) -> list[str]:
    path = REPOSITORY / document
    return list(commands(path.read_text(encoding="utf-8"))) if path.is_file() else []


def ours() -> list[list[str]]:
    """Arguments of every quoted `mlc-ray ...` and `python -m mlc_ray ...`, also at the end of a `ray job submit`."""
    found = []
    for document in DOCUMENTS:
        for line in quoted(document):
            if match := OURS.search(line):
                found.append(shlex.split(line[match.end() :], comments=True))
    return found


@pytest.mark.parametrize("arguments", ours(), ids=" ".join)
def test_quoted_commands_have_settings_that_their_command_takes(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    try:
        parsed = build_parser().parse_args(arguments)
    except SystemExit as stop:
        assert stop.code == 0, capsys.readouterr().err  # --help and --version stop, too
        return
    check_command(parsed, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "train --config recipe:qwen2.5-7b --set mlc.weigth=1",
        "train --resume runs/mine --set cluster.wokers=4",
        "score m --benchmark sample:test --set max_new_token=8",
        "score --resume runs/scores/mine --set limit=1",
        "search --config configs/search/demo.yaml --set set=[mlc.weigth=1]",
        "search --config my-search.yaml --set trails=3",
        "study --config configs/study/small.yaml --set methods.mine=[mlc.weigth=1]",
        "scale --config configs/study/scaling-small.yaml --set sizes.gemma-3-270m.set=[mlc.weigth=1]",
        "translate --config recipe:translate/default --set check.chrf=1",
        "plan --for search --config configs/search/demo.yaml --set smapler=grid",
        "plan --simulate recipe:simulation/72b --set gpu=8",
        "utility m --tasks mmlu --set num_fewshots=5",
        "judge --calibrate l.jsonl --set min_label=3",
        "judge runs/scores/mine --set limit=3",
        "probe m --bundles sample:train --set layer=3",
        "compare a b --fail-if 'harmful.saef drops'",
    ],
)
def test_a_mistake_in_a_quoted_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(MlcRayError):
        check_command(build_parser().parse_args(shlex.split(line)), tmp_path)


def test_every_command_says_how_its_settings_are_loaded() -> None:
    assert set(subcommands()) == LOADERS.keys() | WITHOUT_SETTINGS
    assert schemas().keys() == LEAST.keys()
    for command, schema in schemas().items():
        parse_config(schema, LEAST[command])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_quoted_make_targets_exist(document: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    for line in quoted(document):
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            asked = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert set(asked) <= targets, line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_files_exist(document: str) -> None:
    path = REPOSITORY / document
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text):
        assert (path.parent / target).exists() or (path.parent / target).resolve() in GENERATED, target


def test_the_job_of_the_cluster_examples_is_a_real_command(tmp_path: Path) -> None:
    files = {file.name: yaml.safe_load(file.read_text()) for file in (REPOSITORY / "cluster").glob("*.yaml")}
    entrypoints = {
        name: content["spec"]["entrypoint"]
        for name, content in files.items()
        if "kind" in content and content["kind"] == "RayJob"
    }
    assert entrypoints.keys() == {"rayjob.yaml"}
    match = OURS.search(entrypoints["rayjob.yaml"])
    assert match is not None
    check_command(build_parser().parse_args(shlex.split(entrypoints["rayjob.yaml"][match.end() :])), tmp_path)


def test_every_make_target_is_phony() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    phony = re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert targets == set(phony[1].split())


def blocks(languages: set[str]) -> list[tuple[str, str, str]]:
    """(document, language, text) of every quoted block in one of the languages; a snippet of a file is that file."""
    found = []
    for document in DOCUMENTS:
        for language, text in FENCE.findall((REPOSITORY / document).read_text(encoding="utf-8")):
            if language in languages:
                if snippet := re.fullmatch(r'\s*--8<-- "([^"]+)"\s*', text):
                    text = (REPOSITORY / snippet[1]).read_text(encoding="utf-8")
                found.append((document, language, text))
    return found


def test_every_block_says_what_it_is() -> None:
    for document in DOCUMENTS:
        for language, text in FENCE.findall((REPOSITORY / document).read_text(encoding="utf-8")):
            assert language, f"{document}: a block without a language:\n{text[:200]}"


@pytest.mark.parametrize(("document", "language", "text"), blocks({"json", "jsonl", "yaml", "python"}))
def test_quoted_data_settings_and_code_parse(
    document: str, language: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    if language == "python":
        if text.lstrip().startswith(">>>"):  # a session: the statements alone
            text = "".join(example.source for example in doctest.DocTestParser().get_examples(text))
        tree = ast.parse(text)
        for node in ast.walk(tree):  # what is imported from this package is there
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "mlc_ray":
                module = importlib.import_module(node.module)
                missing = [
                    name.name for name in node.names if not hasattr(module, name.name) and not submodule(node, name)
                ]
                assert not missing, f"{document}: {node.module} has no {missing}"
    elif language == "yaml":
        if not OTHERS & yaml.safe_load(text).keys():
            assert accepting(text, tmp_path)
    else:
        for line in [text] if language == "json" and text.count("\n") > 1 else text.splitlines():
            json.loads(line)


@pytest.mark.parametrize(
    "text",
    ["mlc: {weigth: 1}", "judge: {name: panel, judge: []}", "layer: 3", "name: x\nspace: {mlc.lair: {choice: [1]}}"],
)
def test_a_mistake_in_quoted_settings_is_found(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(ConfigError):
        accepting(text, tmp_path)


def submodule(node: ast.ImportFrom, name: ast.alias) -> bool:
    return importlib.util.find_spec(f"{node.module}.{name.name}") is not None


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation site, built as `make docs` builds it: a warning fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def test_the_site_has_every_command_with_its_options(site: Path) -> None:
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for command, parser in subcommands().items():
        _, found, section = page.partition(f'id="mlc-ray-{command}"')
        assert found, command
        text = html.unescape(section.partition("<h2")[0])
        options = [option for action in parser._actions for option in action.option_strings]
        assert not [option for option in options if option not in text], command


def test_the_site_has_every_setting_of_every_command(site: Path) -> None:
    page = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    for command, schema in schemas().items():
        (section,) = re.findall(rf"<p><code>mlc-ray {command} [^<]*</code>\..*?(?=<h2|\Z)", page, re.DOTALL)
        there = set(re.findall(r"<code>([\w.-]+)</code>", section))
        missing = set(dotted(schema)) - there
        assert not missing, f"mlc-ray {command}: {sorted(missing)}"


def dotted(schema: type[Section], before: str = "") -> Iterator[str]:
    """Every setting by its dotted name: those of a list's items behind `N`, of a mapping's values behind `NAME`."""
    for name, field in schema.model_fields.items():
        here = f"{before}{name}"
        yield here
        base, many = section_of(field.annotation)
        component = next((mark for mark in field.metadata if isinstance(mark, ComponentSettings)), None)
        if component is None and base is not None:
            yield from dotted(base, f"{here}.{many}")
        elif component is not None and base is not None and ".N." not in here:  # there they are those shown above
            of_the_package = [
                each for each in names(component.kind) if "mlc_ray" in resolve(component.kind, each).__module__
            ]
            for choice in of_the_package:  # other tests register some of their own
                own = resolve(component.kind, choice).Settings
                if component.by_key and not issubclass(own, TapSection):
                    yield from dotted(own, f"{here}.{choice}.")
                elif not component.by_key and issubclass(own, base):
                    yield from dotted(own, f"{here}.")


def section_of(annotation: Any) -> tuple[type[Section] | None, str]:
    """The section in an annotation, and how its fields are named behind: `N.` in a list, `NAME.` in a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, ""
    for argument in get_args(annotation):
        found, many = section_of(argument)
        if found is not None:
            origin = get_origin(annotation)
            return found, "N." if origin is list else "NAME." if origin in (dict, Mapping) else many
    return None, ""


def test_the_site_has_every_error(site: Path) -> None:
    page = html.unescape((site / "reference" / "errors.html").read_text(encoding="utf-8"))
    rows = dict(re.findall(r"<td><code>(\w+)</code></td>\s*<td>(.*?)</td>", page, re.DOTALL))
    assert rows.keys() == set(dir(errors)) and {"ConfigError", "MlcRayError", "TooManyUnparsedError"} <= rows.keys()
    assert all(text.strip() for text in rows.values())
    for name in rows:
        assert issubclass(getattr(errors, name), MlcRayError), name


def public_names() -> Iterator[tuple[str, str]]:
    """(module, name) of what the package exports, of its functions and what they return, of what examples import."""
    for name in mlc_ray.__all__:
        if name not in ("__version__", "errors"):
            yield getattr(mlc_ray, name).__module__, name
    imports = [node for node in ast.walk(ast.parse(inspect.getsource(api))) if isinstance(node, ast.ImportFrom)]
    places = {each.name: str(node.module) for node in imports for each in node.names}
    for name, function in vars(api).items():
        if inspect.isfunction(function) and function.__module__ == api.__name__ and not name.startswith("_"):
            yield api.__name__, name
            yield from ((places[word], word) for word in re.findall(r"\w+", function.__annotations__["return"]))
    for example in sorted((REPOSITORY / "examples").glob("*.py")):
        for node in ast.walk(ast.parse(example.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mlc_ray."):
                yield from ((str(node.module), each.name) for each in node.names)


@pytest.mark.parametrize(("module", "name"), sorted(set(public_names())))
def test_the_site_has_every_public_name(site: Path, module: str, name: str) -> None:
    page = (site / "reference" / "api.html").read_text(encoding="utf-8")
    assert re.search(rf'id="{re.escape(module)}(\.\w+)*\.{name}"', page)  # a package may export what a module has


def test_the_api_page_says_what_is_raised_and_given(site: Path) -> None:
    page = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in ("mlc_ray.losses.mlc.mlc_loss", "mlc_ray.losses.contrast.contrast_losses", "mlc_ray.api.train"):
        section = re.split(r"<h\d id=", page.partition(f'<h4 id="{name}"')[2] or page.partition(f'<h3 id="{name}"')[2])[
            0
        ]
        assert "Raises:" in section and "Parameters:" in section, name


def test_the_site_shows_every_example(site: Path) -> None:
    """Whole: the last line of code of each stands on a page."""
    text = html.unescape(
        re.sub(r"<[^>]+>", "", "".join((site / f"{page}.html").read_text() for page in ("extending", "method")))
    )
    for example in sorted((REPOSITORY / "examples").glob("*.py")):
        if example.name not in {"__init__.py", "mlc_with_trl.py"}:  # the latter is named there, not shown
            *_, last = [line for line in example.read_text(encoding="utf-8").splitlines() if line.strip()]
            assert last in text, f"{example.name}: {last}"


def test_the_site_fetches_nothing(site: Path) -> None:
    """It can be read offline: no page loads a script, a style or a font from elsewhere."""
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not [url for url in loaded if "canonical" not in url], page.name


def test_blocks_are_found_and_mistakes_would_be() -> None:
    text = (
        "```bash\nexport A=1 && mlc-ray \\\n  train --confg x  # no\n```\n```console\n$ make test\nmlc-ray: done\n```\n"
    )
    found = list(commands(text))
    assert found == ["export A=1", "mlc-ray    train --confg x  # no", "make test"]
    with pytest.raises(SystemExit):
        build_parser().parse_args(shlex.split("train --confg x"))
