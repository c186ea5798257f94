"""What watches for collapse over steps: the window of states, the warnings, and a tiny run with and without a term."""

import json
import math

import pytest
import torch

from mlc_ray.config import CollapseSection
from mlc_ray.data.batches import collate
from mlc_ray.losses.measures import between_bundle_cosine, effective_rank, separability
from mlc_ray.runs import METRICS_FILE, read_metrics
from mlc_ray.train import collectives, loop
from mlc_ray.train.console import RunDisplay
from mlc_ray.train.model import ModelOutput
from mlc_ray.train.tracking import Tracker
from mlc_ray.train.watch import StateWindow, TappedStep, Watch
from mlc_ray.types import ResponseLogProbs
from tests.train.tiny import LANGUAGES, on_workers, random_rows, run_engine, tiny_config


def batch_of(rows, weights=None):
    weights = weights or [1.0] * len(rows)
    return collate(rows, languages=LANGUAGES, weights=weights, needs_rejected=True, reference=None, tap=True)


def states_of(rows, offset=0.0):
    """A state for each bundle that its number and kind decide; every third bundle lacks a language."""
    number = torch.tensor([float(row.bundle_id.split("-")[1]) for row in rows]).view(-1, 1, 1)
    kind = torch.tensor([float(row.kind == "harmful") for row in rows]).view(-1, 1, 1)
    states = torch.sin(number * torch.arange(1, 7) + torch.arange(3).view(1, 3, 1)) + offset
    states = states + 3 * kind
    present = torch.tensor([[name in row.languages for name in LANGUAGES] for row in rows])
    return states * present.unsqueeze(-1), present


def output_of(rows, offset=0.0):
    """What a forward of these bundles would give: their states, and representations that differ from them."""
    states, present = states_of(rows, offset)
    scored = ResponseLogProbs(torch.zeros(len(rows)), torch.ones(len(rows)))
    return ModelOutput(scored, scored, tapped=states, representations=torch.cos(states), present=present)


def step_of(window, parts, sample=0, weights=None, seed="0"):
    """Measures of a step whose micro-batches are `parts` on this worker."""
    step = TappedStep(sample, window)
    for part in parts:
        step.add(batch_of(part, weights), output_of(part))
    return step.measure(seed)


# ------------------------------------------------------------------------------------------------------ the window


def test_the_window_keeps_the_last_different_bundles_and_no_padding():
    rows, window = random_rows(60), StateWindow(36)
    for start in range(0, 60, 4):
        metrics = step_of(window, [rows[start : start + 4]], weights=[1.0, 1.0, 1.0, 0.0])
    kept = [row for index, row in enumerate(rows) if index % 4 != 3][-36:]
    states, present = states_of(kept)
    harmful = torch.tensor([row.kind == "harmful" for row in kept])
    assert len(window.names) == 36
    assert metrics["collapse/separability"] == pytest.approx(float(separability(states, present, harmful)))
    assert metrics["collapse/separability"] > 0.9


def test_a_bundle_seen_again_replaces_its_older_states():
    rows, window = random_rows(18), StateWindow(64)
    names = list(range(18))
    harmful = [row.kind == "harmful" for row in rows]
    states, present = states_of(rows)
    window.add(names, harmful, states + 50, present)
    window.add(names[:9], harmful[:9], states[:9], present[:9])
    window.add(names[9:], harmful[9:], states[9:], present[9:])
    assert window.names == names and window.harmful == harmful
    assert torch.equal(window.states, states) and torch.equal(window.present, present)


def test_of_a_step_larger_than_the_window_no_other_states_are_kept():
    rows, window = random_rows(60), StateWindow(16)
    step_of(window, [rows[:30]])
    first = set(window.names)
    step_of(window, [rows[30:]])
    assert len(window.names) == len(window.states) == 16
    assert not first & set(window.names)


def test_an_empty_window_and_one_kind_give_no_number():
    window = StateWindow(64)
    assert math.isnan(window.separability())
    harmful = [row for row in random_rows(40) if row.kind == "harmful"]
    assert step_of(window, [harmful]) == {}
    assert math.isnan(window.separability())


# -------------------------------------------------------------------------------------------- bundles of one step


def plain_measures(rows):
    representations, present = output_of(rows).representations, output_of(rows).present
    rank, share = effective_rank(representations, present)
    cosine = between_bundle_cosine(representations, present)
    return dict(
        zip(("between_bundle_cosine", "effective_rank", "effective_rank_share"), (cosine, rank, share), strict=True)
    )


def test_bundles_of_all_micro_batches_are_compared_without_padding():
    rows = random_rows(12)
    metrics = step_of(StateWindow(0), [rows[:3], rows[3:6]], sample=512, weights=[1.0, 1.0, 0.0])
    expected = plain_measures([rows[0], rows[1], rows[3], rows[4]])
    assert metrics == {f"collapse/{name}": pytest.approx(float(value)) for name, value in expected.items()}


def test_the_sample_follows_the_seed_and_0_compares_nothing():
    rows = random_rows(40)

    def cosine(seed, sample):
        return step_of(StateWindow(0), [rows[:25], rows[25:]], sample, seed=seed)["collapse/between_bundle_cosine"]

    some = [cosine("1 7", 8), cosine("1 7", 8), cosine("1 8", 8), cosine("2 7", 8)]
    assert some[0] == some[1] and len(set(some)) == 3
    assert (
        cosine("1 7", 40)
        == pytest.approx(cosine("1 8", 512))
        == pytest.approx(float(plain_measures(rows)["between_bundle_cosine"]))
    )
    assert step_of(StateWindow(0), [rows], sample=0) == {}
    with pytest.raises(ValueError, match=r"collapse\.sample=1 compares nothing"):
        CollapseSection(sample=1)


def fill(rank, parts):
    """What this worker of two has after three steps of two micro-batches; the second worker has fewer bundles."""
    window, sent = StateWindow(20), []
    gather = collectives.gather
    collectives.gather = lambda tensor: sent.append(tensor.numel()) or gather(tensor)
    metrics = [step_of(window, step[rank], sample=6, seed=str(number)) for number, step in enumerate(parts)]
    return window.names, window.states, metrics, sent


def test_every_worker_has_what_one_worker_would_have(tmp_path):
    rows = random_rows(36)
    parts = [[[rows[i : i + 5], rows[i + 5 : i + 9]], [rows[i + 9 : i + 12]]] for i in (0, 12, 24)]
    first, second = on_workers(2, fill, tmp_path, parts)
    alone = StateWindow(20)
    expected = [
        step_of(alone, [part for own in step for part in own], sample=6, seed=str(number))
        for number, step in enumerate(parts)
    ]
    for names, states, metrics, _ in (first, second):
        assert names == alone.names and torch.equal(states, alone.states)
        assert [list(row) for row in metrics] == [list(row) for row in expected]
        for row, want in zip(metrics, expected, strict=True):
            assert row == pytest.approx(want)
    assert "collapse/separability" in expected[-1] and "collapse/separability" not in expected[0]


def test_only_what_stays_is_sent(tmp_path):
    rows = random_rows(36)
    (_, _, _, sent), _ = on_workers(2, fill, tmp_path, [[[rows[:30]], [rows[30:]]]])
    # A number of rows and four facts of each bundle; at most 6 bundles' grids, and 20 bundles' states, with masks.
    assert sent[:2] == [1, 30 * 4]
    assert len(sent) == 6 and max(sent[2:4]) <= 6 * 18 and max(sent[4:]) <= 20 * 18


# -------------------------------------------------------------------------------------------------------- warnings


def rows_of(spread, share=None, auc=None):
    for step, value in enumerate(spread):
        row = {"step": step + 1, "loss/total": 1.0, "collapse/between_bundle_cosine": 1 - value}
        if share is not None:
            row["collapse/effective_rank_share"] = share[step]
        if auc is not None:
            row["collapse/separability"] = auc[step]
        yield row


def test_one_warning_where_a_measure_crosses_and_another_only_after_it_recovered():
    watch = Watch(CollapseSection(min_spread=0.5))
    spread = [0.10] * 5 + [0.06] * 5 + [0.04] * 9 + [0.08] * 9 + [0.01] * 9
    found = {row["step"]: warnings for row in rows_of(spread) if (warnings := watch.see(row))}
    assert list(found) == [13, 31]  # the median of five follows three steps later
    assert found[13] == [
        "collapse: spread (1 - between-bundle cosine) fell to 0.04, below 0.5 of the 0.1 it was at the start "
        "(collapse.min_spread): bundles of different meanings become one"
    ]


def test_one_outlier_and_steps_without_numbers_raise_no_alarm():
    watch = Watch(CollapseSection())
    spread = [0.1] * 8 + [0.001] * 2 + [0.1] * 8
    for row in rows_of(spread):
        assert watch.see({"step": 0, "collapse/between_bundle_cosine": None}) == []
        assert watch.see({"step": 0, "collapse/between_bundle_cosine": math.nan, "loss/total": 1.0}) == []
        assert watch.see(row) == []


def test_each_measure_has_its_bound_and_0_switches_it_off():
    rows = list(rows_of([0.1] * 5 + [0.01] * 9, share=[0.5] * 5 + [0.1] * 9, auc=[0.9] * 7 + [0.6] * 7))
    watch, silent = (
        Watch(CollapseSection()),
        Watch(CollapseSection(min_spread=0, min_effective_rank=0, min_separability=0)),
    )
    texts = [text for row in rows for text in watch.see(row)]
    assert [part for text in texts for part in ("min_spread", "min_effective", "min_separability") if part in text] == [
        "min_spread",
        "min_effective",
        "min_separability",
    ]
    assert not any(silent.see(row) for row in rows)
    assert "fell to 0.6, below collapse.min_separability=0.75; 0.5 is chance" in texts[-1]


def test_a_chosen_answer_that_becomes_less_likely_is_warned_of_once():
    watch = Watch(CollapseSection(), max_chosen_drop=1.0)
    changes = [None, 0.0, -0.9, -1.1, -3.0, -0.5, -1.2, math.nan]
    rows = [{"step": step, "validation/log_prob/chosen_change": change} for step, change in enumerate(changes)]
    found = {row["step"]: warnings for row in rows if (warnings := watch.see(row))}
    assert list(found) == [3, 6]
    assert "lost 1.1 nats each since the start, more than data.validation.max_chosen_drop=1" in found[3][0]
    silent = Watch(CollapseSection())
    assert not any(silent.see(row) for row in rows)


def test_kinds_that_were_never_told_apart_raise_no_alarm():
    watch = Watch(CollapseSection())
    assert not any(watch.see(row) for row in rows_of([0.1] * 30, auc=[0.4] * 10 + [0.7] * 20))


def test_warnings_are_in_the_run_are_shown_once_and_survive_a_resume(tmp_path, caplog):
    config = tiny_config(logging={"tensorboard": False})
    rows = list(rows_of([0.1] * 6 + [0.02] * 6))
    first = Tracker(config, tmp_path, start_step=0)
    for row in rows[:9]:
        first.log(row["step"], {k: v for k, v in row.items() if k != "step"})
    first.close()
    again = Tracker(config, tmp_path, start_step=7)  # goes back to before the crossing
    for row in rows[7:]:
        again.log(row["step"], {k: v for k, v in row.items() if k != "step"})
    again.close()
    warned = [row["step"] for row in read_metrics(tmp_path) if "warnings" in row]
    assert warned == [9]
    content = (tmp_path / METRICS_FILE).read_text()
    (tmp_path / METRICS_FILE).unlink()
    with caplog.at_level("INFO", "mlc_ray"), RunDisplay(tmp_path, 12, every=6, parts=["loss/alignment"]):
        (tmp_path / METRICS_FILE).write_text(content)
    warnings = [record for record in caplog.records if "collapse: spread" in record.getMessage()]
    assert [record.levelname for record in warnings] == ["WARNING"]
    assert warnings[0].getMessage().startswith("step 9: ")


# --------------------------------------------------------------------------------------------------- a tiny real run


def collapse_runs(rank):
    """A consistency term strong enough to collapse a tiny model within 40 rounds of eight bundles."""
    histories, sizes, made = {}, [], loop.StateWindow
    loop.StateWindow = lambda size: sizes.append(size) or made(size)
    for name, terms in {"published": {}, "contrast": {"contrast": {"weight": 10.0, "temperature": 0.3}}}.items():
        config = tiny_config(
            mlc={"layer": 2, "every": 1, "extractor_dim": 16, "weight": 10.0},
            terms=terms,
            objective={"loss": "sft"},
            optimizer={"warmup_ratio": 0.0, "schedule": "constant"},
            train={"epochs": 40, "batch_bundles": 8, "tokens_per_forward": 300},
            collapse={"window": 24},
        )
        histories[name] = run_engine(config, random_rows(24), 40)[1]
    run_engine(config, [row for row in random_rows(24) if row.kind == "harmful"], 1)
    histories["sizes of windows"] = sizes
    return histories


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    return on_workers(1, collapse_runs, tmp_path_factory.mktemp("collapse"))[0]


def last(history, name):
    return sum(row[name] for row in history[-5:]) / 5


def test_data_of_one_kind_keeps_no_states(histories):
    assert histories["sizes of windows"] == [24, 24, 0]


def test_contrast_keeps_up_the_rank_that_the_published_loss_gives_away(histories):
    published, contrast = histories["published"], histories["contrast"]
    for name in ("collapse/effective_rank", "collapse/between_bundle_cosine", "loss/mlc"):
        assert published[0][name] == pytest.approx(contrast[0][name])
    for history in (published, contrast):
        assert last(history, "loss/mlc") < 0.15 * history[0]["loss/mlc"]  # both make languages consistent
    assert (
        last(published, "collapse/between_bundle_cosine") > 0.9 > 0.5 > last(contrast, "collapse/between_bundle_cosine")
    )
    assert last(published, "collapse/effective_rank_share") < 0.6 * published[0]["collapse/effective_rank_share"]
    assert last(contrast, "collapse/effective_rank_share") > 0.85 * contrast[0]["collapse/effective_rank_share"]


def test_the_run_that_collapses_is_warned_of_and_the_other_is_not(histories):
    warned = {}
    for name in ("published", "contrast"):
        watch = Watch(CollapseSection(min_separability=0))  # kinds of random tokens are not told apart to begin with
        warned[name] = [text for row in histories[name] for text in watch.see(row)]
    assert any("min_spread" in text for text in warned["published"])
    assert any("min_effective_rank" in text for text in warned["published"])
    assert not warned["contrast"]


def test_separability_is_logged_once_the_window_has_both_kinds(histories):
    rows = histories["published"]
    assert ["collapse/separability" in row for row in rows[:4]] == [False, False, True, True]
    assert all(0 <= row["collapse/separability"] <= 1 for row in rows[2:])
    assert json.loads(json.dumps(rows[-1])) == rows[-1]
