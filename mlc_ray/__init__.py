"""Multilingual-consistency (MLC) safety alignment on Ray: from prompts in many languages to a scored model.

The data flows one way, and this is the order in which to read the rooms:

    data/        a file of *bundles* (one prompt in many languages, an answer pair in one of them) is read and
                 validated (`readers`, `bundles`), tokenised with the model's own template (`tokens`), put in an order
                 that a seed decides (`order`), and packed into batches (`batches`); `ray_data` wires it to Ray Data
    losses/      pure tensor functions: the alignment losses (`preference`), the consistency term (`mlc`), how far it
                 has collapsed (`collapse`) and terms against that (`anti_collapse`), and the objective that adds them
                 up (`objective`)
    train/       one optimizer step after another: the policy (`model`) and its packed `attention`, DeepSpeed
                 (`engine`), the frozen reference (`reference`), the loop (`loop`), what it watches (`collapse`), what
                 workers tell each other (`workers`), what is saved and exported (`checkpoint`); `ray_train` starts the
                 workers and `ray_reference` fills the reference's cache
    score/       responses by vLLM (`generate`, from `weights` it can prove), verdicts (`judges` is the interface;
                 `refusal`, `guards`, `endpoint`, `likelihood` are judges, `registry` finds them; `translate` and
                 `degenerate` stand beside), counts (`metrics`, `intervals`, `paired`), what is kept (`results`) and
                 shown (`report`); `stages` run in Ray Data's workers, `ray_phases` runs them, `ray_score` is the whole
    search/      which fields vary (`space`), what a trial is worth (`objective`), what every layer knows beforehand
                 (`probe`, `ray_probe`), engines that stay (`ray_warm`), a trial (`ray_trial`), how Ray Tune runs
                 them (`ray_tune`), what was found (`results`); `ray_search` is the whole
    report/      folders of runs and scores (`collect`), what to say of them (`view`, `summaries`), one HTML file
                 (`page`), Markdown and PNG for papers (`paper`)
    cli.py       the command line, and commands.py what each command does; quickstart.py is the whole road on one
                 small model

Beneath them lie `config` (every setting), `types` (what travels between rooms), `artifacts` (what is on disk, and
whether to trust it), `ray_cluster` (joining one) and `errors`. An import points down this list, never up; train and
score meet only through a checkpoint folder. Importing `mlc_ray` itself loads nothing heavy.
"""

__version__ = "0.1.0"
