"""Which lines run between a bundle file and a score, in order: the table in CONTRIBUTING.md.

    python benchmarks/narrow_path.py MODEL_FOLDER [--functions]

It trains one step on eight bundles (JSONL, DPO + MLC, one worker) and scores the result with the refusal phrases, with
every function of the package recorded in every process when it is first called. A function counts with its whole text.
Left out is what lies beneath the path or beside it: settings, command line, storage and folders, cluster, console,
checkpoints, the cached reference, checks at the start, the watch for collapse, counts of FLOPs. `--functions` adds a
list of the functions, longest first.
"""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tempfile
import tokenize
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mlc_ray"
PATH = {
    "data": "formats/records formats/containers formats/base formats/mlc bundles contents sources tables rejects "
    "prepare tokens shortcuts tracing artifacts store order plan stream batches trees ragged",
    "losses": "base dpo mlc logprobs objective",
    "plan": "cutting",
    "train": "run entry worker model experts forward attention openings engines/base engines/deepspeed planning loop "
    "meter collectives",
    "generate": "stage engine blocks replica pool",
    "judges": "base phrase_lists refusal degenerate",
    "stats": "rates bundles summaries intervals lowest",
    "score": "request prompts plan stages kept chain passes results run",
}

# Runs at the start of every Python process below: each function of the package writes down its first call. A profile
# function would miss those that Ray calls from threads of its own.
RECORDER = """
import ast, importlib.machinery, os, sys
package, out = os.environ["NARROW_PATH_PACKAGE"], os.environ["NARROW_PATH_OUT"]
seen = set()
def called(file, line):
    if (file, line) not in seen:
        seen.add((file, line))
        with open(os.path.join(out, str(os.getpid())), "a") as record:
            record.write(f"{file}\\t{line}\\n")
class Recorded(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        return self.source_to_code(self.get_data(self.path), self.path)
    def source_to_code(self, data, path, *, _optimize=-1):
        tree = ast.parse(data)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                call = ast.parse(f"__import__('sitecustomize').called({path!r}, {first})").body[0]
                said = ast.get_docstring(node) is not None
                for inside in ast.walk(call):
                    ast.copy_location(inside, node.body[0])
                node.body.insert(int(said), call)
        return compile(tree, path, "exec", dont_inherit=True)
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "mlc_ray":
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
                spec.loader = Recorded(spec.loader.name, spec.loader.path)
            return spec
sys.meta_path.insert(0, Finder)
"""
RUN = """
import sys
from mlc_ray import api
model, folder = sys.argv[1:]
cluster = {"address": "local", "cpus_per_worker": 0.5}
run = api.train({
    "name": "run", "output_dir": folder, "model": {"path": model}, "train": {"max_steps": 1}, "cluster": cluster,
    "data": {"train": [{"path": f"{folder}/train.jsonl"}], "languages": ["en", "es"]},
})
api.score({
    "name": "score", "output_dir": folder, "model": str(run.run_folder), "address": "local", "max_new_tokens": 8,
    "benchmarks": [{"path": f"{folder}/test.jsonl"}], "languages": ["en", "es"], "tell_languages": False,
    "engine": {"max_model_len": 512},
})
"""


def main(model: str, functions: bool) -> None:
    """Run, and print the table, and each function that ran if asked for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = PACKAGE / "data" / "sample"
        for split in ("train", "test"):
            lines = (sample / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            chosen = [line for kind in ("harmful", "benign") for line in [t for t in lines if f'"{kind}"' in t][:4]]
            (folder / f"{split}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
        (folder / "site").mkdir()
        (folder / "out").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(RECORDER, encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(PACKAGE.parent)]),
            "NARROW_PATH_OUT": str(folder / "out"),
            "NARROW_PATH_PACKAGE": str(PACKAGE),
        }
        (folder / "run.py").write_text(f"if __name__ == '__main__':\n{_indented(RUN)}", encoding="utf-8")
        subprocess.run([sys.executable, str(folder / "run.py"), model, name], check=True, env=environment)
        called: dict[Path, set[int]] = defaultdict(set)
        for file in (folder / "out").iterdir():
            for line in file.read_text(encoding="utf-8").splitlines():
                path, _, first = line.partition("\t")
                called[Path(path)].add(int(first))
    print("| module | source lines that run | with docstrings, comments and blank lines | lines of the file |")
    print("|---|---|---|---|")
    counts: list[tuple[int, int, int]] = []
    ran: list[tuple[int, str]] = []
    for package, modules in PATH.items():
        for module in modules.split():
            file = PACKAGE / package / f"{module}.py"
            text = file.read_text(encoding="utf-8")
            found = functions_that_run(text, called[file])
            ran += [(source, f"{package}/{module}.py: {name}") for name, source, _ in found]
            source, total = (sum(sizes) for sizes in ([s for _, s, _ in found], [t for _, _, t in found]))
            counts.append((source, total, len(text.splitlines())))
            print(f"| `{package}/{module}.py` | {' | '.join(map(str, counts[-1]))} |")
    print(f"| **all** | {' | '.join(f'**{sum(column)}**' for column in zip(*counts, strict=True))} |")
    if functions:
        print("", *(f"{source:4d} {name}" for source, name in sorted(ran, reverse=True)), sep="\n")


def functions_that_run(text: str, called: set[int]) -> list[tuple[str, int, int]]:
    """Outermost functions and methods that were called: name, lines of source, and all from its first to its last.

    Source lines are those that hold code: no docstring, comment or blank line. A decorated function begins at its
    decorator; one that is nested in another counts with it.
    """
    code = _lines_with_code(text)
    found: list[tuple[str, int, int]] = []
    stack: list[ast.AST] = [ast.parse(text)]
    while stack:
        for node in ast.iter_child_nodes(stack.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if {node.lineno, first} & called:
                    lines = range(first, (node.end_lineno or first) + 1)
                    found.append((node.name, len(code.intersection(lines)), len(lines)))
            else:
                stack.append(node)
    return found


def _lines_with_code(text: str) -> set[int]:
    """Numbers of the lines that hold more than a comment and are not of a docstring."""
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in text.strip().splitlines())


if __name__ == "__main__":
    main(sys.argv[1], "--functions" in sys.argv)
