"""Which lines run between a bundle file and a score, in order: the table in CONTRIBUTING.md.

    python benchmarks/narrow_path.py MODEL_FOLDER

It trains one step on eight bundles (JSONL, DPO + MLC, one worker) and scores the result with the refusal phrases, with
every function of the package recorded in every process when it is first called. A function counts with its whole text.
Left out is what lies beneath the path or beside it: settings, command line, storage and folders, cluster, console,
checkpoints, the cached reference, checks at the start, the watch for collapse, counts of FLOPs.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mlc_ray"
PATH = {
    "data": "formats/records formats/containers formats/base formats/mlc bundles contents sources tables rejects "
    "prepare tracing tokens artifacts store order plan stream batches trees ragged",
    "losses": "base dpo mlc logprobs objective",
    "train": "run entry worker model attention engines/base engines/deepspeed planning loop meter collectives",
    "generate": "stage engine blocks replica pool",
    "judges": "base phrase_lists refusal degenerate",
    "stats": "rates summaries intervals",
    "score": "request prompts plan stages kept passes results run",
}

# Runs at the start of every Python process below: writes down each function of the package when it is first called.
RECORDER = """
import os, sys, threading
seen = set()
def record(frame, event, _):
    code = frame.f_code
    if event == "call" and code not in seen:
        seen.add(code)
        if code.co_filename.startswith(os.environ["NARROW_PATH_PACKAGE"]):
            with open(os.path.join(os.environ["NARROW_PATH_OUT"], str(os.getpid())), "a") as file:
                file.write(f"{code.co_filename}\\t{code.co_firstlineno}\\n")
sys.setprofile(record)
threading.setprofile(record)
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
    "benchmarks": [{"path": f"{folder}/test.jsonl"}], "languages": ["en", "es"], "engine": {"max_model_len": 512},
})
"""


def main(model: str) -> None:
    """Run, and print the table."""
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
    print("| module | lines of functions that run | of these docstrings | lines of the file |\n|---|---|---|---|")
    total = said = whole = 0
    for package, modules in PATH.items():
        for module in modules.split():
            file = PACKAGE / package / f"{module}.py"
            text = file.read_text(encoding="utf-8")
            (run, docstrings), size = lines_that_run(text, called[file]), len(text.splitlines())
            print(f"| `{package}/{module}.py` | {run} | {docstrings} | {size} |")
            total, said, whole = total + run, said + docstrings, whole + size
    print(f"| **all** | **{total}** | **{said}** | **{whole}** |")


def lines_that_run(text: str, called: set[int]) -> tuple[int, int]:
    """Lines of the outermost functions and methods that were called, and how many of them are docstrings.

    A decorated one begins at its decorator; one that is nested in another counts with it.
    """
    total = docstrings = 0
    stack: list[ast.AST] = [ast.parse(text)]
    while stack:
        for node in ast.iter_child_nodes(stack.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if {node.lineno, first} & called:
                    total += (node.end_lineno or first) - first + 1
                    docstrings += sum(_docstring_lines(inside) for inside in ast.walk(node))
            else:
                stack.append(node)
    return total, docstrings


def _docstring_lines(node: ast.AST) -> int:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in text.strip().splitlines())


if __name__ == "__main__":
    main(sys.argv[1])
