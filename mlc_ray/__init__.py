"""Multilingual-consistency (MLC) safety alignment on Ray: from prompts in many languages to a scored model.

The data flows one way, and this is the order in which to read the rooms:

    data/        a file of *bundles* (one prompt in many languages, an answer pair in one of them) is read and
                 validated (`formats`, `bundles`), tokenised with the model's own template (`tokens`), put in an order
                 that a seed decides (`order`), and packed into batches (`batches`); `prepare` wires it to Ray Data
    losses/      pure tensor functions: the alignment losses, the consistency term (`mlc`) and further terms, and the
                 objective that adds them up (`objective`)
    train/       one optimizer step after another: the policy (`model`) and its packed `attention`, the `engines`, the
                 frozen reference (`reference`), the loop (`loop`), what it watches (`watch`), what is saved and
                 exported (`checkpoint`); `run` starts the workers
    generate/    responses by vLLM (`engine`) from weights it can prove (`swap`), and translation
    judges/      what a response is: refusal phrases, guard models, endpoints, likelihood
    stats/       rates, intervals and paired tests; pure
    score/       prompts -> responses -> verdicts -> scores
    search/      which fields vary (`space`), what a trial is worth (`objectives`), a trial, and how Ray Tune runs them
    report/      what folders of runs and scores say, as one HTML file, as tables and figures
    cli.py       the command line; quickstart.py is the whole way on one small model

Beneath them lie `runs` (the layout of folders), `storage` (what is on disk, and whether to trust it), `cluster`,
`progress`, `types`, `config` and `errors`. `[tool.importlinter]` in pyproject.toml lists which may import which; train
and score meet only through a run's folder. Importing `mlc_ray` itself loads nothing heavy.
"""

__version__ = "0.1.0"
