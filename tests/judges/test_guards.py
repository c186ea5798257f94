"""What guards are given: rendered by a real tokenizer with templates written here, in the shape of the guards' own."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlc_ray.config import EngineSection
from mlc_ray.generate.engine import Engine, EngineError, Generation
from mlc_ray.judges.base import JudgeError
from mlc_ray.judges.guards.base import Guard
from mlc_ray.judges.guards.llama_guard import LlamaGuard
from mlc_ray.judges.guards.qwen3guard import Qwen3Guard
from mlc_ray.judges.guards.shieldgemma import POLICIES
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.runs import ModelPathError
from mlc_ray.score.stages import Asking, JudgeStage
from mlc_ray.types import Answer

from .test_guard_formats import GUARDS

PROMPT, RESPONSE = "How do I read a secret diary? 日记", "Ask its owner. S1: {no}\nsafe"

# Role and text of each message; the reply's beginning where it is asked for.
PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[reply]{% endif %}"
)
TRIMMING = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] | trim }}{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
ONLY_USERS = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
POLICY = (
    "Question: {{ messages[0]['content'] }}\nResponse: {{ messages[1]['content'] }}\n"
    "Policy: * {{ guideline }}\nYes or No?"
)
GRANITE = PLAIN + "(risk {{ guardian_config['risk_name'] }}, criterion {{ guardian_config['criteria_id'] }})"


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> Any:
    from mlc_ray.data.tokens import load_tokenizer

    return load_tokenizer(str(smollm2))


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def rendered(tokenizer: Any, name: str, template: str | None) -> tuple[str, ...]:
    return GUARDS[name].render(with_template(tokenizer, template), PROMPT, RESPONSE)


@pytest.mark.parametrize("name", ["qwen3guard", "llama-guard"])
def test_a_template_of_its_own_gets_the_conversation(loaded: Any, name: str) -> None:
    assert rendered(loaded, name, PLAIN) == (f"[user]{PROMPT}\n[assistant]{RESPONSE}\n[reply]",)


def test_a_template_for_lists_of_parts_gets_those(loaded: Any) -> None:
    assert rendered(loaded, "llama-guard", PARTS) == (f"[user]{PROMPT}[assistant]{RESPONSE}",)


def test_shieldgemma_is_asked_about_one_policy_at_a_time(loaded: Any) -> None:
    texts = rendered(loaded, "shieldgemma", POLICY)
    assert texts == tuple(
        f"Question: {PROMPT}\nResponse: {RESPONSE}\nPolicy: * {policy}\nYes or No?" for policy in POLICIES.values()
    )
    assert GUARDS["shieldgemma"].policies == tuple(POLICIES)


def test_granite_guardian_by_configuration_or_by_a_last_message(loaded: Any) -> None:
    (older,) = rendered(loaded, "granite-guardian", GRANITE)
    assert older == f"[user]{PROMPT}\n[assistant]{RESPONSE}\n[reply](risk harm, criterion harm)"
    (newer,) = rendered(loaded, "granite-guardian", PLAIN)
    start = f"[user]{PROMPT}\n[assistant]{RESPONSE}\n[user]<guardian><no-think>"
    assert newer.startswith(start)
    assert newer.index("### Criteria: ") < newer.index("### Scoring Schema: ") < newer.index("[reply]")


def test_polyguard_and_wildguard_layouts(loaded: Any) -> None:
    transcript = f"Human user:\n{PROMPT}\n\nAI assistant:\n{RESPONSE}"
    (poly,) = rendered(loaded, "polyguard", PLAIN)
    assert poly.startswith("[system]")
    assert poly.endswith(f"<END UNSAFE CONTENT CATEGORIES>\n[user]{transcript}\n[reply]")
    assert "\nS1: Violent Crimes.\n" in poly
    assert "\nS14: Code Interpreter Abuse.\n<END" in poly
    (wild,) = rendered(loaded, "wildguard", None)  # needs no template
    assert wild.startswith("<s><|user|>\n[INST] ")
    assert wild.endswith(f"\n\n{transcript}\n\n---\n\nAnswers: [/INST]\n<|assistant|>\n")


def test_nemotron_layout(loaded: Any) -> None:
    (text,) = rendered(loaded, "nemotron-safety-guard", PLAIN)
    assert text.startswith("[user]Task: ")
    assert f"<BEGIN CONVERSATION>\n\nuser: {PROMPT}\n\nresponse: agent: {RESPONSE}\n\n<END CONVERSATION>" in text
    assert "\nS1: Violence.\n" in text
    assert "\nS23: Immoral/Unethical.\n<END UNSAFE CONTENT CATEGORIES>" in text
    assert text.endswith("Output JSON: \n[reply]")
    assert all(f'"{key}"' in text for key in ("User Safety", "Response Safety", "Safety Categories"))


@pytest.mark.parametrize("name", GUARDS)
def test_every_guard_takes_a_template_that_writes_both_messages(loaded: Any, name: str) -> None:
    GUARDS[name].check_template(with_template(loaded, TRIMMING))


@pytest.mark.parametrize("name", ["qwen3guard", "llama-guard", "shieldgemma", "granite-guardian"])
def test_a_template_that_drops_the_response_is_refused(loaded: Any, name: str) -> None:
    with pytest.raises(JudgeError, match=rf"SmolLM2.*does not write out both.*judge\.name='{name}'"):
        GUARDS[name].check_template(with_template(loaded, ONLY_USERS))


def test_a_template_that_refuses_the_messages_is_refused(loaded: Any) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
    with pytest.raises(JudgeError, match=r"does not take the messages.*'polyguard': no system role"):
        GUARDS["polyguard"].check_template(with_template(loaded, template))
    GUARDS["qwen3guard"].check_template(with_template(loaded, template))


@pytest.mark.parametrize("name", sorted(set(GUARDS) - {"wildguard"}))
def test_weights_without_a_template_are_refused(loaded: Any, name: str) -> None:
    with pytest.raises(JudgeError, match=r"judge\.model=.*no chat template"):
        GUARDS[name].check_template(with_template(loaded, None))


def test_settings_are_checked_before_an_engine_starts(smollm2: Path, tmp_path: Path) -> None:
    def check(model: Path, **engine: int) -> None:
        Qwen3Guard(Qwen3Guard.Settings(model=str(model), engine=EngineSection(**engine))).check_ready(tmp_path)

    check(smollm2)
    with pytest.raises(EngineError, match=r"max_model_len=128"):
        check(smollm2, max_model_len=128)  # the reply alone may take as much
    with pytest.raises(EngineError, match="1000000"):
        check(smollm2, max_model_len=1000000)
    with pytest.raises(ModelPathError, match="no model"):
        check(tmp_path)


# ------------------------------------------------------------------------------------------------ when an engine fails


class FailingEngine(Engine):
    """An engine that never started, and fails when it is asked."""

    def __init__(self, error: Exception):
        self.error = error

    def generate(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        raise self.error


def failing_guard(smollm2: Path, error: Exception) -> Guard:
    guard = LlamaGuard(LlamaGuard.Settings(model=str(smollm2)))
    guard.start("cpu", smollm2, shared=FailingEngine(error))
    return guard


@pytest.mark.parametrize("error", [RuntimeError("the device is out of memory"), ValueError("prompt of 0 tokens")])
def test_an_engine_that_fails_leaves_its_batch_unparsed(smollm2: Path, error: Exception) -> None:
    answers = [Answer("Why?", text, "en", "harmful") for text in ("Because.", "", "No.")]
    verdicts = failing_guard(smollm2, error).judge(answers)
    assert [(v.behaviour, v.safety) for v in verdicts] == [(None, "unparsed")] * 3
    assert [v.reason for v in verdicts] == [f"engine: {error}", "the response is empty", f"engine: {error}"]


def test_other_errors_of_an_engine_are_not_swallowed(smollm2: Path) -> None:
    with pytest.raises(EngineError, match="too long"):
        failing_guard(smollm2, EngineError("too long")).judge([Answer("Why?", "Because.", "en", "harmful")])


def test_a_guard_joined_by_the_phrases_keeps_its_own_way_to_read_a_language(smollm2: Path) -> None:
    stage = JudgeStage.__new__(JudgeStage)  # its `start` would start an engine
    guard = failing_guard(smollm2, RuntimeError("out of memory"))
    stage.asking, stage.judges = Asking(guard, None, None), [(guard, {"sv": ""}), (RefusalJudge(), {"sv": "uncovered"})]
    row = {"prompt": "Varför?", "response": "I cannot help with that.", "language": "sv", "kind": "harmful"}
    (judged,) = stage(pa.Table.from_pylist([{**row, "finish": "stop"}])).to_pylist()
    assert (judged["behaviour"], judged["via_refused"]) == ("refused", "uncovered")
    assert (judged["safety"], judged["via_safe"]) == ("unparsed", "")
