"""The command line: what it accepts and refuses, what it imports, how it exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import mlc_ray
from mlc_ray.cli import SCHEMAS, build_parser, commands, main
from mlc_ray.cli.arguments import parse_benchmark, probe_model, score_config
from mlc_ray.config import ConfigError, ScoreConfig, TrainConfig, parse_config
from mlc_ray.errors import MlcRayError
from mlc_ray.score.results import load_scores
from mlc_ray.score.run import TooManyUnparsedError
from mlc_ray.storage import Place
from tests.report.runs import grid, write_score

HEAVY = (
    "torch", "ray", "deepspeed", "transformers", "vllm", "pandas", "pyarrow", "datasets", "matplotlib", "pydantic",
    "numpy", "yaml",
)  # fmt: skip
COMMANDS = ("train", "score", "export", "config", "quickstart")


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: Sequence[str]) -> None:
    code = f"""
import sys
from mlc_ray.cli import main
try:
    main({arguments!r})
finally:
    print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout
    assert "mlc-ray" in done.stdout


def test_drivers_import_none_of_what_makes_models() -> None:
    code = "import sys, mlc_ray.train.run, mlc_ray.search.run; print('transformers.modeling_utils' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_module_and_console_script_are_the_same_command() -> None:
    script = Path(sys.executable).parent / "mlc-ray"
    assert script.is_file()
    outputs = {
        subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        for command in ([str(script)], [sys.executable, "-m", "mlc_ray"])
    }
    assert outputs == {f"mlc-ray {mlc_ray.__version__}\n"}


HINGE = """
from mlc_ray.config import LossSettings
from mlc_ray.losses.base import Alignment


class Hinge(Alignment):
    class Settings(LossSettings):
        margin: float = 1.5

    def __call__(self, chosen, rejected):
        raise NotImplementedError
"""


def console_script(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`mlc-ray config` of a loss in `my_loss.py` of the folder it is run from."""
    script = str(Path(sys.executable).parent / "mlc-ray")
    choice = ["--config", "recipe:quickstart", "--set", "objective={loss: my_loss:Hinge}"]
    return subprocess.run(
        [script, "config", *choice],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=os.environ | environment,
    )


def test_the_console_script_finds_components_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "my_loss.py").write_text(HINGE)
    for name in ("json", "pydantic", "yaml", "mlc_ray"):  # and nothing in it shadows what is installed
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    done = console_script(tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["objective"] == {"loss": "my_loss:Hinge", "sft_weight": 0.0, "margin": 1.5}
    (tmp_path / "my_loss.py").write_text(HINGE.partition("    def __call__")[0])
    lacking = console_script(tmp_path)
    assert lacking.returncode == 2 and "'my_loss:Hinge' cannot be used: it does not define __call__" in lacking.stderr
    refused = console_script(tmp_path, PYTHONSAFEPATH="1")
    assert refused.returncode == 2 and "there is no module 'my_loss'" in refused.stderr


def test_the_current_folder_is_on_the_path_during_a_command_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert main(["config"]) == 2
    assert sys.path == before
    capsys.readouterr()


def test_the_version_is_the_one_in_pyproject(repository: Path) -> None:
    assert f'\nversion = "{mlc_ray.__version__}"\n' in (repository / "pyproject.toml").read_text()


def test_every_command_and_every_kind_of_file_is_there() -> None:
    (actions,) = (action for action in build_parser()._actions if action.dest == "==SUPPRESS==" or action.choices)
    for name, parser in actions.choices.items():
        assert callable(getattr(commands, parser.get_default("command"))), name
    assert tuple(commands.SCHEMAS) == SCHEMAS


# ---------------------------------------------------------------------------------------------------- config


def test_config_prints_what_it_resolved_and_can_be_loaded(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--config", str(repository / "configs/quickstart.yaml"), "--set", "mlc.layer=20"]) == 0
    config = parse_config(TrainConfig, yaml.safe_load(capsys.readouterr().out))
    assert config.mlc.layer == 20
    assert "betas" in config.optimizer.model_fields_set  # defaults are written out
    assert "margin" not in config.objective.model_fields_set  # but not those that DPO refuses
    assert main(["config", "--for", "score", "--config", str(repository / "configs/score/default.yaml")]) == 0
    assert parse_config(ScoreConfig, yaml.safe_load(capsys.readouterr().out)).judge.name == "refusal"


@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        (["--config", "configs/quickstart.yaml", "--set", "objective={loss: orpo}"], "reference"),
        (["--for", "search", "--config", "configs/search/demo.yaml"], "grace_scores"),
        (["--for", "utility", "--set", "model=m", "--set", "tasks=[mmlu]", "--set", "backend=hf"], "tensor_parallel"),
    ],
)
def test_config_leaves_out_defaults_that_would_be_refused(
    arguments: list[str],
    left_out: str,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repository)
    assert main(["config", *arguments]) == 0
    printed = capsys.readouterr().out
    assert left_out not in printed
    (tmp_path / "printed.yaml").write_text(printed, encoding="utf-8")
    of = arguments[:2] if arguments[0] == "--for" else []
    assert main(["config", *of, "--config", str(tmp_path / "printed.yaml")]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "title"), [([], "TrainConfig"), (["train"], "TrainConfig"), (["score"], "ScoreConfig")]
)
def test_config_prints_the_schema(arguments: list[str], title: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == title


# -------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train"], ["--config", "--resume"]),
        (["train", "--config", "none.yaml"], ["none.yaml", "does not exist"]),
        (["train", "--resume", "runs/x", "--config", "c.yaml"], ["--config", "runs/x", "keeps its own settings"]),
        (["train", "--resume", "runs/x", "--set", "seed=1"], ["'runs/x' is not a run folder"]),
        (
            ["search", "--resume", "runs/x", "--set", "seed=1"],
            ["'seed=1'", "runs/x", "trials, max_hours, scoring.max_unparsed may change"],
        ),
        (["score", "m", "--resume", "runs/x", "--limit", "3"], ["MODEL and --limit", "runs/x", "a resumed score"]),
        (["score", "--resume", "runs/x"], ["runs/x' is not a score folder"]),
        (["judge", __file__, "--judge", "phrases"], ["test_cli.py' is not a score folder"]),
        (["search"], ["--config", "--resume"]),
        (["config", "--set", "name=r", "--set", "mlc.wieght=1"], ["mlc.wieght=1", "'weight'", "model: required"]),
        (["config"], ["--schema", "--config"]),
        (["config", "--schema", "--set", "seed=1"], ["--schema"]),
        (["score", "m"], ["benchmarks: required"]),
        (["score", "m", "--benchmark", "b.csv,knd=benign"], ["knd=benign", "kind="]),
        (["score", "m", "--benchmark", "b.csv,kind=bad"], ["kind='bad'", "harmful, benign"]),
        (["score", "--benchmark", "b.csv"], ["model: required"]),
        (["score", "m", "--benchmark", "b.csv", "--limit", "0"], ["limit=0"]),
        (
            ["quickstart", "--config", "elsewhere/q.yaml"],
            ["elsewhere/q.yaml", "score/quickstart.yaml beside it", "shipped"],
        ),
    ],
)
def test_a_mistake_is_one_message_and_status_2(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mlc-ray: error: ")
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train", "--confg", "x"], ["export", "run"], ["score", "m", "--limit", "x"]]
)
def test_bad_usage_is_status_2_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: mlc-ray" in capsys.readouterr().err


# ------------------------------------------------------------------- what the commands pass on to the packages


@dataclass
class Calls:
    """Stands in for a package's module: remembers what the command line asked of it."""

    asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]]
    raises: BaseException | None = None

    def function(self, name: str, result: Any = None) -> Any:
        def called(*positional: Any, **named: Any) -> Any:
            self.asked.append((name, positional, named))
            if self.raises is not None:
                raise self.raises
            return result

        return called


@dataclass(frozen=True)
class Result:
    run_folder: Path = Path("runs/r")
    checkpoint: Path = Path("runs/r/train/checkpoint_000001")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    found = Calls([])

    def stand_in(module: str, **functions: Any) -> None:
        made = ModuleType(module)
        vars(made).update(functions)
        monkeypatch.setitem(sys.modules, module, made)

    resumed = parse_config(TrainConfig, {"name": "r", "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}})
    stand_in(
        "mlc_ray.train.run",
        train=found.function("train", Result()),
    )
    stand_in("mlc_ray.train.run_folder", load_run_config=found.function("load_run_config", resumed))
    stand_in("mlc_ray.train.export", export=found.function("export", Path("out")))
    scored = load_scores(write_score(tmp_path / "s", grid(["en", "sw"], lambda kind, code: float(kind == "harmful"))))
    score = found.function("score", scored)
    again = found.function("resume_score", scored)
    stand_in("mlc_ray.score.run", score=score, resume_score=again, TooManyUnparsedError=TooManyUnparsedError)
    return found


def test_train(calls: Calls, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(repository / "configs/quickstart.yaml"), "--set", "train.epochs=7"]) == 0
    ((name, (config,), named),) = calls.asked
    assert (name, config.train.epochs, named) == ("train", 7, {"resume": None})
    printed = capsys.readouterr().out
    assert "runs/r/train/checkpoint_000001" in printed and "mlc-ray score runs/r --benchmark" in printed
    adapters = ["--set", "model.lora={rank: 4}"]
    assert main(["train", "--config", str(repository / "configs/quickstart.yaml"), *adapters]) == 0
    assert "export runs/r OUT --merge-lora && mlc-ray score OUT --benchmark" in capsys.readouterr().out


def test_train_resume_uses_the_runs_own_settings(calls: Calls) -> None:
    assert main(["train", "--resume", "runs/r", "--set", "cluster.workers=2"]) == 0
    assert [name for name, _, _ in calls.asked] == ["load_run_config", "train"]
    assert calls.asked[0][1] == (Path("runs/r"), ["cluster.workers=2"])
    assert calls.asked[1][2] == {"resume": Path("runs/r")}


def test_score_resume(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--resume", "runs/scores/s"]) == 0
    assert calls.asked == [("resume_score", (Place("runs/scores/s"),), {})]
    assert "sw 100.0 100.0 +100.0" in " ".join(capsys.readouterr().out.split())


def test_export(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "runs/r", "out", "--merge-lora", "--checkpoint", "checkpoint_000001"]) == 0
    assert calls.asked == [
        (
            "export",
            (Path("runs/r"), Path("out")),
            {"merge_lora": True, "checkpoint": "checkpoint_000001", "trust_remote_code": False},
        )
    ]
    assert capsys.readouterr().out == "out\n"


def test_score(calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "m", "--benchmark", "sample:test", "--limit", "3", "--languages", "en, ur"]) == 0
    ((_, (config,), _),) = calls.asked
    assert (config.model, config.limit, config.languages) == ("m", 3, ["en", "ur"])
    printed = capsys.readouterr().out
    assert "sw 100.0 100.0 +100.0" in " ".join(printed.split())
    assert f"score in {tmp_path / 's'}" in printed
    assert (tmp_path / "s" / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_a_score_of_which_too_much_is_unparsed_is_shown_before_it_fails(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.raises = TooManyUnparsedError("too many are unparsed", load_scores(tmp_path / "s"))
    assert main(["score", "m", "--benchmark", "sample:test"]) == 3
    printed = capsys.readouterr()
    assert "sw 100.0 100.0 +100.0" in " ".join(printed.out.split())
    assert "too many are unparsed" in printed.err
    assert (tmp_path / "s" / "heatmap.png").is_file()


def test_score_options_win_over_set_and_file(repository: Path) -> None:
    arguments = build_parser().parse_args(
        ["score", "mine", "--config", str(repository / "configs/score/default.yaml"), "--set", "max_new_tokens=8",
         "--set", "judge.name=likelihood", "--judge", "refusal",
         "--benchmark", "a: b.csv,format=multijail,kind=harmful", "--benchmark", "b", "--out", "here/mine"]
    )  # fmt: skip
    config = score_config(arguments)
    assert (config.model, config.judge.name, config.max_new_tokens) == ("mine", "refusal", 8)
    assert (config.output_dir, config.name) == ("here", "mine")
    assert [(s.path, s.format, s.kind) for s in config.benchmarks] == [
        ("a: b.csv", "multijail", "harmful"),
        ("b", "auto", None),
    ]


def test_score_takes_everything_from_the_file_alone(repository: Path) -> None:
    arguments = build_parser().parse_args(["score", "--config", str(repository / "configs/score/default.yaml")])
    assert score_config(arguments).benchmarks[0].path == "sample:test"


@pytest.mark.parametrize("text", ["", ",kind=benign", "a,benign", "a,kind", "a,format=csv"])
def test_bad_benchmarks(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_benchmark(text)


# ---------------------------------------------------------------------------------------------- how it ends


def test_an_expected_error_of_a_package_has_no_traceback(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    class PackageError(MlcRayError):
        pass

    calls.raises = PackageError("run folder 'runs/r' exists already")
    assert main(["export", "runs/r", "out"]) == 2
    assert capsys.readouterr().err == "mlc-ray: error: run folder 'runs/r' exists already\n"


def test_an_error_that_ray_wrapped_is_unwrapped(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    class Wrapped(MlcRayError):
        cause = ConfigError("mlc.layer=99: the model has 30")

    calls.raises = Wrapped("ray::worker() Traceback ...")
    assert main(["export", "runs/r", "out"]) == 2
    assert capsys.readouterr().err == "mlc-ray: error: mlc.layer=99: the model has 30\n"


def test_an_unexpected_error_is_not_hidden_and_no_failed_gate(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.raises = RuntimeError("a bug")
    assert main(["export", "runs/r", "out"]) == 70
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith("RuntimeError: a bug\n")


def test_a_worker_that_died_is_no_error_of_the_programs_own(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    import ray.train

    failure = ray.exceptions.OutOfMemoryError("Memory usage 9B exceeded threshold of 8B (95.0% of 10B limit)")
    calls.raises = ray.train.WorkerGroupError("rank 1: ...", {1: failure})
    assert main(["export", "runs/r", "out"]) == 75
    error = capsys.readouterr().err
    assert error.startswith("mlc-ray: error: a worker was killed because its node ran out of memory")
    assert error.endswith("--resume FOLDER goes on with it\n")


def test_ctrl_c(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.raises = KeyboardInterrupt()
    assert main(["export", "runs/r", "out"]) == 130
    assert capsys.readouterr().err == "mlc-ray: interrupted\n"
    calls.raises = KeyboardInterrupt("to go on: mlc-ray train --resume runs/r")
    assert main(["export", "runs/r", "out"]) == 130
    assert capsys.readouterr().err == "mlc-ray: interrupted; to go on: mlc-ray train --resume runs/r\n"


def test_ctrl_c_as_a_signal() -> None:
    code = """
import sys, time, types
module = types.ModuleType("mlc_ray.train.export")
def export(*a, **k):
    print("ready", flush=True)
    time.sleep(60)
module.export = export
sys.modules["mlc_ray.train.export"] = module
from mlc_ray.cli import main
sys.exit(main(["export", "run", "out"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "mlc-ray: interrupted\n"


def test_a_probe_takes_settings_of_the_model_that_it_reads() -> None:
    found = probe_model("m", ["trust_remote_code=true", "dtype=float32"])
    assert (found.path, found.trust_remote_code, found.dtype) == ("m", True, "float32")
    with pytest.raises(ConfigError, match=r"lora=.*`mlc-ray probe` reads dtype, attention, kernels, trust_remote_code"):
        probe_model("m", ["lora.rank=4"])
