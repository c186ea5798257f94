"""What model cards say of each component beside its settings: where it is from, and what of it is ours."""

import pytest

from mlc_ray._registry import names, resolve
from mlc_ray.losses.objective import Objective
from tests.train.tiny import tiny_config

THE_AUTHORS = {"dpo", "ipo", "orpo", "simpo", "sft", "mlc"}
"""Those of which nothing is ours, as they are by default."""


SHIPPED = [
    (kind, name)
    for kind in ("loss", "term")
    for name in names(kind)
    if resolve(kind, name).__module__.startswith("mlc_ray.")
]


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_each_component_says_what_of_it_is_ours(kind, name):
    component = resolve(kind, name)
    note = component(component.Settings(**{"loss" if kind == "loss" else "name": name})).note
    assert note == "" if name in THE_AUTHORS else "ours" in note


def test_a_model_card_says_that_a_schedule_of_mlc_is_ours():
    (_, line) = Objective(tiny_config(mlc={"start": 0.5, "ramp": 0.1})).describe()
    assert "ours: the late start, the ramp" in line
    (_, line) = Objective(tiny_config()).describe()
    assert "ours" not in line


def test_a_model_card_says_what_settings_add():
    config = tiny_config(
        objective={"loss": "kto"},
        terms={"contrast": {"other_kind": 4}, "decision": {}},
        openings={"english_everywhere": False, "further": {"en": ["No."]}},
    )
    lines = "\n".join(Objective(config).describe())
    assert "answers in pairs" in lines and "the other kind counts 4 times" in lines
    assert "those listed, 1 further ones, English ones in English alone" in lines
