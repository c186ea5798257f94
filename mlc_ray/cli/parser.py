"""The arguments of the command line, which import nothing."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_ray import __version__

if TYPE_CHECKING:
    from mlc_ray.storage import Place

SCHEMAS = ("train", "score", "search", "study", "scale", "utility", "translate", "simulation")
"""The kinds of config files."""

_SETTINGS = """\
Settings come from the YAML file, then from each --set in order, e.g.
  --set mlc.layer=20 --set data.train.0.path=my.jsonl --set data.languages=[en,ur]
`mlc-ray config --schema` lists all of them.
"""
_BENCHMARKS = """\
A benchmark is a file, folder, hub name (NAME[@CONFIG][:SPLIT][#REVISION]), or sample:test / :select / :train /
:large (the shipped bundles), with optional marks:
  --benchmark PATH                      format and kind are found in the data
  --benchmark PATH,kind=benign          kind of every prompt, for formats that do not record it
  --benchmark PATH,only=harmful         the prompts of one kind alone
  --benchmark multi.csv,format=multijail,kind=harmful
docs/benchmarks.md lists the formats: your own table, and the published benchmarks with their licences.
A score has a harmful and a benign side: give prompts of both kinds, or the answer "how much more does the model refuse
what is harmful?" cannot be given.
"""

_JUDGES = """\
A judge is a name (docs/judges.md lists them, and so does the message about one that does not exist), or one of your
own as package.module:Class.
  mlc-ray judge runs/scores/x --judge qwen3guard --judge-model Qwen/Qwen3Guard-Gen-0.6B
  mlc-ray judge --calibrate s-nlp/multilingual_refusals:german --judge refusal
"""
_REPORT = """\
The first score is what the others are compared with. A run folder brings its scores and its training curves:
  mlc-ray report runs/mine                         before and after, with the curves of the training between them
  mlc-ray report runs/scores/base runs/scores/mine --out base-mine.html
"""


_COMPARE = """\
Both scores must be measured alike: same prompts, judge, conversation, length and type. Exit status: 0 if no rule fails,
1 if one does, 2 for a mistake in the command, 3 if the scores cannot be compared or too much of them has no verdict.
  mlc-ray compare runs/scores/base runs/scores/mine
  mlc-ray compare runs/scores/base runs/scores/mine --fail-if 'harmful.refused drops > 2 possible' \\
      --fail-if 'benign.complied < 80' --fail-if 'worst.harmful.refused drops'
docs/gate.md has every quantity, and what certain, estimate and possible mean.
"""

_SHOW = """\
Reads files alone, and may be asked while something goes on:
  mlc-ray show runs/mine
  mlc-ray show runs                                a line for each folder in it
"""
_UTILITY = """\
Needs the package lm-eval (this package with [utility]). The results go into utility.json of the score folder, or of a
new one under runs/utility. Settings: --config FILE and --set, e.g.
  --set num_fewshot=5 --set chat_template=true --set engine.max_model_len=8192 --set include_path=my_tasks
  --set backend=hf                                 plain transformers, without vLLM
"""

_SEARCH = """\
Every trial is a run of `mlc-ray train` that differs in the fields under `space`, scored at its checkpoints:
  mlc-ray search --config configs/search/demo.yaml
  mlc-ray search --resume runs/search-demo
"""
_STUDY = """\
Every method on every model with every seed, each a run and a score, in one table with both sides, intervals and tests:
  mlc-ray study --config configs/study/paper.yaml --budget --gpus 8 --gpu h100      hours, memory, disk, dollars
  mlc-ray study --config configs/study/small.yaml
  mlc-ray study --resume runs/study-small
"""
_SCALE = """\
Of each size the layer (as a fraction of the depth) and lambda are searched, with seeds, and confirmed; then what moves
with size, with intervals and a trend that says when it cannot tell:
  mlc-ray scale --config configs/study/scaling-small.yaml --budget      what it takes; nothing is trained
  mlc-ray scale --config configs/study/scaling-small.yaml
  mlc-ray scale --resume runs/scaling-small
"""
_PROBE = """\
For every layer: how collinear the languages of a bundle are, how far bundles are apart, and how well harmful and benign
are told apart in each language. `search` can try layers in the order of the ranking (its section `probe`). And for
every language: how well the model's own odds of opening with a refusal tell harmful prompts from benign ones.
  mlc-ray probe HuggingFaceTB/SmolLM2-135M-Instruct --bundles sample:train
"""


_OPENINGS = """\
Of refusals that begin as no listed opening does, the shortest beginnings up to what is negated that several share and
no other response has. docs/recipe.md says what openings are for, and where responses come from.
  mlc-ray openings runs/translations/mine runs/scores/base --out openings.yaml
"""


_TRANSLATE = """\
Prompts in further languages by a chat model or an endpoint, checked; twins of the other kind; a model's own answers:
  mlc-ray translate --bundles english.jsonl --languages zh,es,fr --translator Qwen/Qwen2.5-7B-Instruct --out runs/mine
  mlc-ray translate --config recipe:translate/default --plan   what it would ask and cost; nothing is asked
  mlc-ray translate --resume runs/mine
docs/translate.md has the checks, and what the files hold.
"""


_PLAN = """\
Nothing is started or downloaded; docs/plan.md has the formulas.
  mlc-ray plan --config recipe:qwen2.5-7b --gpus 8 --gpu h100
  mlc-ray plan --config recipe:qwen2.5-7b --shape 72b --gpus 64 --set engine.stage=3 --json
  mlc-ray plan --config recipe:quickstart --calibrate
  mlc-ray plan --simulate recipe:simulation/72b --set gpus=10000 --set preemptions_per_node_day=0.1
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; it imports nothing, so `--help` costs nothing."""
    parser = argparse.ArgumentParser(
        prog="mlc-ray", description="Multilingual-consistency safety alignment on Ray: train, export, score."
    )
    parser.add_argument("--version", action="version", version=f"mlc-ray {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, text: str, more: str = "") -> Any:
        sub = subparsers.add_parser(
            name, help=text, description=text, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(command=f"{name}_command")
        return sub

    train = add("train", "Align a model, or go on with a run that stopped.", _SETTINGS)
    _add_settings(train)
    _add_resume(train, "run")

    score = add("score", "Generate answers, judge them, count refusals.", f"{_BENCHMARKS}\n{_SETTINGS}")
    score.add_argument("model", metavar="MODEL", nargs="?", help="run, checkpoint or exported folder, or a hub name")
    score.add_argument(
        "--benchmark", metavar="WHAT", action="append", default=[], help="prompts to score on; repeatable"
    )
    _add_judge(score)
    score.add_argument("--limit", metavar="N", type=int, help="at most N bundles per benchmark and kind")
    score.add_argument("--languages", metavar="CODES", help="score only these, e.g. en,ur,sw (default: all)")
    score.add_argument("--out", metavar="FOLDER", type=_place, help="score folder to write (default: a new one)")
    _add_settings(score)
    _add_resume(score, "score")

    judge = add("judge", "Judge the responses of a score again, or count how often a judge errs.", _JUDGES)
    judge.add_argument("scored", metavar="SCORE", type=_place, nargs="?", help="folder that `mlc-ray score` wrote")
    judge.add_argument(
        "--calibrate", metavar="LABELLED", action="append", default=[],
        help="instead of SCORE: labelled responses to count the judge's errors on; repeatable",
    )  # fmt: skip
    judge.add_argument("--min-labels", metavar="N", type=int, help="fewer labels of either class: not measured (30)")
    judge.add_argument(
        "--out", metavar="PATH", type=_place,
        help="score folder to write (default: SCORE-JUDGE); with --calibrate, the file (calibration-JUDGE.json)",
    )  # fmt: skip
    _add_judge(judge)
    _add_settings(judge)

    search = add("search", "Search fields of a run, above all its layer.", _SEARCH)
    _add_settings(search)
    _add_resume(search, "search")

    study = add("study", "Compare methods over models and seeds.", _STUDY)
    _add_budget(study)
    _add_settings(study)
    _add_resume(study, "study")

    scale = add("scale", "Search layer and lambda over sizes of models, and say what moves with size.", _SCALE)
    _add_budget(scale)
    _add_settings(scale)
    _add_resume(scale, "study")

    probe = add("probe", "Look at every layer of a model, forward only.", _PROBE)
    probe.add_argument("model", metavar="MODEL", help="Hugging Face folder or hub name")
    probe.add_argument(
        "--bundles", metavar="WHAT", action="append", required=True, help="bundles of both kinds; repeatable"
    )
    probe.add_argument(
        "--chat", metavar="YAML", help="system prompt, template arguments and date, e.g. '{system: You are kind.}'"
    )
    probe.add_argument(
        "--openings", metavar="YAML",
        help="openings of refusals beside the listed ones: a file of `mlc-ray openings`, or '{further: {en: [No.]}}'",
    )  # fmt: skip
    probe.add_argument("--languages", metavar="CODES", help="look at only these, e.g. en,ur,sw (default: all)")
    probe.add_argument("--limit", metavar="N", type=int, help="at most N bundles of each kind (default: 64)")
    probe.add_argument(
        "--criterion", choices=["headroom", "silhouette", "separation", "transfer"], default="headroom",
        help="what ranks the layers (default: headroom); all are shown",
    )  # fmt: skip
    probe.add_argument("--out", metavar="FOLDER", type=_place, help="folder to write (default: runs/probes/MODEL)")
    probe.add_argument(
        "--set", metavar="FIELD=VALUE", dest="overrides", action="append", default=[],
        help="a setting that a run has under model: dtype, attention, kernels, trust_remote_code; repeatable",
    )  # fmt: skip
    probe.add_argument("--address", metavar="ADDRESS", default="auto", help="Ray address (default: auto)")

    openings = add("openings", "Find how a model's own refusals open, from responses that were judged.", _OPENINGS)
    openings.add_argument(
        "responses", metavar="RESPONSES", nargs="+",
        help="folder of a score, or of a translation with own answers; or labelled responses",
    )  # fmt: skip
    openings.add_argument(
        "--out", metavar="FILE.yaml", type=_path, default=Path("openings.yaml"), help="file to write (openings.yaml)"
    )
    openings.add_argument("--most", metavar="N", type=int, default=8, help="at most N a language (default: 8)")

    translate = add("translate", "Make multilingual bundles from English ones, and check them.", _TRANSLATE)
    translate.add_argument(
        "--bundles", metavar="WHAT", action="append", default=[], help="bundles with English prompts; repeatable"
    )
    translate.add_argument("--languages", metavar="CODES", help="languages to translate into, e.g. zh,es,fr")
    translate.add_argument("--translator", metavar="MODEL", help="chat model that translates: folder or hub name")
    translate.add_argument("--limit", metavar="N", type=int, help="at most N bundles of each kind")
    translate.add_argument("--out", metavar="FOLDER", type=_place, help="folder to write")
    translate.add_argument("--plan", action="store_true", help="say what would be asked and what it costs, and stop")
    _add_settings(translate)
    _add_resume(translate, "translation")

    export = add("export", "Write a run's model as a plain Hugging Face folder.")
    export.add_argument("run", metavar="RUN", type=_place, help="run folder")
    export.add_argument("out", metavar="OUT", type=_place, help="folder to write; must not exist")
    export.add_argument("--merge-lora", action="store_true", help="fold low-rank adapters into the weights")
    export.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="import the components of your own that the run names and, with --merge-lora, run Python code that comes "
        "with the base model; the run cannot ask for either itself",
    )
    export.add_argument("--checkpoint", metavar="NAME", help="checkpoint of the run (default: the last complete one)")

    report = add("report", "Write one HTML file that shows runs and scores, and compares them.", _REPORT)
    report.add_argument(
        "runs", metavar="RUN", nargs="+", type=_place,
        help="run, score or search folder, or a folder of those, with probes of the same models; or one study",
    )  # fmt: skip
    report.add_argument("--out", metavar="FILE.html", type=_path, default=Path("report.html"), help="file to write")
    report.add_argument(
        "--paper", metavar="FOLDER", type=_path, help="also write Markdown tables and PNG figures there"
    )
    report.add_argument(
        "--samples", metavar="N", type=int, default=0,
        help="show N responses per model where an attack succeeded; they may be dangerous (default: 0, only counted)",
    )  # fmt: skip
    report.add_argument(
        "--redact", action="store_true", help="with --samples: show how each of these responses begins, and no more"
    )
    report.add_argument(
        "--public", action="store_true", help="leave out settings, and of paths and URLs all but the last part"
    )

    compare = add("compare", "Compare two scores prompt by prompt, and fail if a rule says so.", _COMPARE)
    compare.add_argument("before", metavar="A", type=_place, help="score folder to compare with")
    compare.add_argument("after", metavar="B", type=_place, help="score folder that is judged")
    compare.add_argument(
        "--fail-if", metavar="RULE", action="append", default=[],
        help="[BENCHMARK:] QUANTITY < N, > N, drops [> N] or rises [> N], then certain (default), estimate or "
        "possible; repeatable",
    )  # fmt: skip
    compare.add_argument(
        "--one-sided", metavar="CODES",
        help="languages, with commas, in which rules may judge harmful or benign prompts alone; else status 3",
    )  # fmt: skip
    compare.add_argument("--json", metavar="FILE", type=_place, help="also write everything there as JSON")

    show = add("show", "Say what a folder is, how far it got, what came out, and what to do next.", _SHOW)
    show.add_argument(
        "folder", metavar="FOLDER", type=_place,
        help="run, score, search, study, probe or translation, or a folder of those",
    )  # fmt: skip

    utility = add(
        "utility",
        "Measure knowledge (MMLU, ...) with lm-evaluation-harness on vLLM.",
        _UTILITY,
    )
    utility.add_argument("model", metavar="MODEL", nargs="?", help="run, checkpoint or exported folder, or a hub name")
    utility.add_argument("--tasks", metavar="NAMES", help="tasks or groups of the harness, e.g. mmlu,mmmlu_sw_ke")
    utility.add_argument("--scores", metavar="FOLDER", help="score folder of the same model, to put utility.json into")
    utility.add_argument("--limit", metavar="N", type=int, help="at most N questions per task, for a first look")
    _add_settings(utility)

    plan = add("plan", "Say what a run, a score or a search needs: memory, time, GPU hours.", _PLAN)
    _add_settings(plan)
    plan.add_argument(
        "--for", dest="kind", choices=("train", "score", "search"), help="kind of the file (default: train)"
    )
    _add_cluster(plan)
    plan.add_argument(
        "--shape",
        metavar="MODEL",
        type=_named,
        help="instead of the settings' model: 72b, a config.json, a folder or a hub name",
    )
    plan.add_argument(
        "--simulate", metavar="FILE", type=_config_file,
        help="simulate a whole run (failures, preemptions, checkpoints, storage), whose settings the YAML file has",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument(
        "--calibrate", action="store_true", help="measure this machine with the settings' model, and keep it"
    )

    config = add("config", "Print the resolved settings, or the JSON schema.", _SETTINGS)
    _add_settings(config)
    config.add_argument(
        "--schema", nargs="?", const="train", choices=SCHEMAS, help="print the JSON schema (default: train)"
    )
    config.add_argument("--for", dest="schema_of", choices=SCHEMAS, default="train", help="kind of the file")

    doctor = add("doctor", "Say what this machine and a cluster have, and how to get what is missing.")
    doctor.add_argument(
        "--address",
        metavar="ADDRESS",
        default="auto",
        help="Ray address of a cluster whose nodes to look at; auto: the one that a run joins, if there is one; local: "
        "this machine alone (default: auto)",
    )
    doctor.add_argument("--output-dir", metavar="FOLDER", default="runs", help="where runs go (default: runs)")

    quickstart = add("quickstart", "Score, align, export and score SmolLM2-135M on the sample.")
    quickstart.add_argument("--only-model", action="store_true", help="only prepare the model, and print its folder")
    _add_settings(quickstart)
    return parser


def _path(text: str) -> Path:
    """A path given on the command line; a URL is refused before pathlib makes the folder `s3:` of it."""
    from mlc_ray.config.paths import real_path

    try:
        return Path(real_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _config_file(text: str) -> Path:
    """A path, or `recipe:NAME`."""
    from mlc_ray.config.paths import config_path

    try:
        return Path(config_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _place(text: str) -> Place:
    """A path, or a URL of a storage that is registered."""
    from mlc_ray.config.paths import stored_path
    from mlc_ray.storage import Place

    try:
        return Place(stored_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _named(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a model, or leave the option out")
    return text


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", action="store_true", help="say what it takes at most, and stop")
    parser.add_argument("--json", action="store_true", help="with --budget: print it as JSON")
    _add_cluster(parser)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    """A cluster that is only thought of."""
    parser.add_argument(
        "--gpus", metavar="N", type=_positive_int, help="GPUs of a cluster (default: the cluster that is there)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="what they are: h100 (the default), h200, a100, ...")
    parser.add_argument("--gpus-per-node", metavar="N", type=_positive_int, help="GPUs of a node (default: 8)")
    parser.add_argument(
        "--node-memory", metavar="GIB", type=_positive, help="memory of a node, in GiB (default: not checked)"
    )


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", metavar="NAME", help="judge of the answers (default: refusal)")
    parser.add_argument("--judge-model", metavar="MODEL", help="weights of a guard-model judge: folder or hub name")


def _add_resume(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        type=_place,
        help=f"{what} folder to go on with, by its own settings; "
        + {
            "run": "--set changes where and how it runs, not what it computes",
            "search": "--set changes trials, max_hours and scoring.max_unparsed alone",
        }.get(what, "takes no others")
        + f" (a command with --set resume=auto starts a {what}, or resumes it if it exists already)",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", type=_config_file, help="YAML file with the settings, or recipe:NAME"
    )
    parser.add_argument(
        "--set", metavar="FIELD=VALUE", dest="overrides", action="append", default=[], help="change one; repeatable"
    )
