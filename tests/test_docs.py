"""Commands quoted in the documents exist: subcommands and flags, make targets, config files and settings."""

from __future__ import annotations

import ast
import doctest
import html
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mlc_ray.cli import build_parser
from mlc_ray.cli.arguments import score_config, translate_config
from mlc_ray.config import ScoreConfig, TrainConfig, TranslateConfig, load_config

REPOSITORY = Path(__file__).resolve().parent.parent
REPOSITORY_DOCUMENTS = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "cluster/README.md", "benchmarks/README.md", *REPOSITORY_DOCUMENTS)
GENERATED = {"reference/commands.md", "reference/settings.md"}  # pages that the site makes from the code
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
def test_quoted_commands_parse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        parsed = build_parser().parse_args(arguments)
    except SystemExit as stop:
        assert stop.code == 0, capsys.readouterr().err  # --help and --version stop, too
        return
    config = getattr(parsed, "config", None)
    overrides = getattr(parsed, "overrides", [])
    if config is not None and config.parts[0] == "configs":
        assert (REPOSITORY / config).is_file()
        if arguments[0] in {"train", "quickstart"}:
            load_config(TrainConfig, REPOSITORY / config, overrides)
    if arguments[0] == "score":
        parsed.config = REPOSITORY / config if config is not None else None
        assert isinstance(score_config(parsed), ScoreConfig)
    if arguments[0] == "translate" and parsed.resume is None:
        assert isinstance(translate_config(parsed), TranslateConfig)


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
        assert (path.parent / target).exists() or target in GENERATED, target


@pytest.mark.parametrize("file", sorted((REPOSITORY / "cluster").glob("*.yaml")), ids=lambda p: p.name)
def test_cluster_examples_are_yaml_and_quote_real_commands(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    entrypoint = content.get("spec", {}).get("entrypoint", "")
    if match := OURS.search(entrypoint):
        parsed = build_parser().parse_args(shlex.split(entrypoint[match.end() :]))
        load_config(TrainConfig, REPOSITORY / parsed.config.relative_to("/mlc_ray"), parsed.overrides)


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
def test_quoted_data_settings_and_code_parse(document: str, language: str, text: str) -> None:
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
        assert yaml.safe_load(text) is not None
    else:
        for line in [text] if language == "json" and text.count("\n") > 1 else text.splitlines():
            json.loads(line)


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


def test_the_site_has_every_command_setting_and_error(site: Path) -> None:
    commands_page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for command in ("train", "score", "search", "probe", "translate", "export", "report"):
        assert f"mlc-ray {command}" in commands_page
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    for field in ("mlc.layer", "model.path", "optimizer.learning_rate", "engine.max_model_len", "space"):
        assert f"<code>{field}</code>" in settings, field
    api = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in ("mlc_ray.losses.mlc.mlc_loss", "mlc_ray.api.train", "Raises"):
        assert name in api, name


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
