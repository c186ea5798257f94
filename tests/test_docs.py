"""Commands quoted in the documents exist: subcommands and flags, make targets, config files and settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mlc_ray.cli import build_parser
from mlc_ray.cli.commands import score_config
from mlc_ray.config import ScoreConfig, TrainConfig, load_config

REPOSITORY = Path(__file__).resolve().parent.parent
REPOSITORY_DOCUMENTS = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "cluster/README.md", "benchmarks/README.md", *REPOSITORY_DOCUMENTS)
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
        assert (path.parent / target).exists(), target


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


def test_blocks_are_found_and_mistakes_would_be() -> None:
    text = (
        "```bash\nexport A=1 && mlc-ray \\\n  train --confg x  # no\n```\n```console\n$ make test\nmlc-ray: done\n```\n"
    )
    found = list(commands(text))
    assert found == ["export A=1", "mlc-ray    train --confg x  # no", "make test"]
    with pytest.raises(SystemExit):
        build_parser().parse_args(shlex.split("train --confg x"))
