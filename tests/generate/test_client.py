from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.config import ConfigError, EndpointSection, ScoreConfig, parse_config
from mlc_ray.generate import client as chat
from mlc_ray.generate.client import ChatEndpoint, EndpointUsage
from mlc_ray.generate.replies import ERROR, NOT_ASKED, EndpointError, Reply, ReplyCache

from .chat_server import INPUT_TOKENS, OUTPUT_TOKENS, ChatServer, Step, echo, serving

KEY = "sk-very-secret-0123456789"
PRICES = {"usd_per_million_input_tokens": 1000.0, "usd_per_million_output_tokens": 2000.0}
PATIENCE = 1.5  # seconds to wait for what never comes: ample for a request to arrive on a busy machine
COST = (INPUT_TOKENS * 1000 + OUTPUT_TOKENS * 2000) / 1e6  # of one reply of the server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.001)


def settings_for(server: ChatServer, **fields: Any) -> EndpointSection:
    return EndpointSection(
        **{"base_url": server.base_url, "model": "m", "retries": 2, "max_reply_tokens": 10, **fields}
    )


def talk(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def planned(*steps: Step) -> Callable[[list[dict[str, str]], int], Step]:
    """The steps in order, and the last one for ever."""
    return lambda messages, number: steps[min(number, len(steps) - 1)]


def ask_one(server: ChatServer, folder: Path, **fields: Any) -> tuple[Reply, EndpointUsage]:
    endpoint = ChatEndpoint(settings_for(server, **fields), folder)
    [reply] = endpoint.ask(talk("hello"))
    return reply, endpoint.usage


def test_order_is_kept_and_concurrency_is_reached_but_never_exceeded(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(10)]
    with serving(echo, parties=3) as server:  # one request alone, then nine, three at a time
        endpoint = ChatEndpoint(settings_for(server, concurrency=3), tmp_path)
        replies = endpoint.ask(talk(*texts))
        assert [reply.text for reply in replies] == [text.upper() for text in texts]
        assert server.peak == 3
        assert len(server.bodies) == 10
    assert endpoint.usage == EndpointUsage(requests=10, input_tokens=200, output_tokens=50)


def test_what_is_sent(tmp_path: Path) -> None:
    with serving(echo) as server:
        ChatEndpoint(settings_for(server, model="org/judge"), tmp_path).ask(talk("héllo"))
        [body], [headers] = server.bodies, server.headers
        ChatEndpoint(settings_for(server, token_limit="max_completion_tokens"), tmp_path).ask(talk("x"))
        assert (server.bodies[1]["max_completion_tokens"], "max_tokens" in server.bodies[1]) == (10, False)
    assert body == {
        "model": "org/judge", "messages": [{"role": "user", "content": "héllo"}], "temperature": 0, "max_tokens": 10
    }  # fmt: skip
    assert "Authorization" not in headers


def test_a_second_session_reads_the_cache_and_costs_nothing(tmp_path: Path) -> None:
    with serving(echo) as server:
        first = ChatEndpoint(settings_for(server, **PRICES), tmp_path)
        asked = first.ask(talk("a", "b", "a"))
        second = ChatEndpoint(settings_for(server, **PRICES), tmp_path)
        again = second.ask(talk("b", "a", "c"))
        assert len(server.bodies) == 3
    assert [(reply.text, reply.cached) for reply in asked] == [("A", False), ("B", False), ("A", True)]
    assert [(reply.text, reply.cached) for reply in again] == [("B", True), ("A", True), ("C", False)]
    assert (first.usage.requests, first.usage.cached) == (2, 1)
    assert (second.usage.requests, second.usage.cached) == (1, 2)
    assert second.usage.cost_usd == pytest.approx(COST)


def test_another_model_message_limit_or_address_is_another_key(tmp_path: Path) -> None:
    with serving(echo) as server:
        settings = settings_for(server)
        for changed in ({}, {"model": "other"}, {"max_reply_tokens": 11}, {"token_limit": "max_completion_tokens"}):
            ChatEndpoint(settings.model_copy(update=changed), tmp_path).ask(talk("a"))
        assert len(server.bodies) == 4
        ChatEndpoint(settings.model_copy(update={"concurrency": 1, "retries": 0}), tmp_path).ask(talk("a"))
        assert len(server.bodies) == 4
    with serving(echo) as other:
        ChatEndpoint(settings_for(other), tmp_path).ask(talk("a"))
        assert len(other.bodies) == 1


def test_the_configured_cache_folder_wins(tmp_path: Path) -> None:
    with serving(echo) as server:
        ChatEndpoint(settings_for(server, cache_dir=str(tmp_path / "mine")), tmp_path / "default").ask(talk("a"))
    assert list((tmp_path / "mine").rglob("*.json"))
    assert not (tmp_path / "default").exists()


def test_a_damaged_cache_file_is_asked_again_and_mended(tmp_path: Path) -> None:
    with serving(echo) as server:
        ChatEndpoint(settings_for(server), tmp_path).ask(talk("a"))
        [file] = tmp_path.rglob("*.json")
        whole = file.read_text(encoding="utf-8")
        for damaged in (whole[:-20], "[]", '{"text": 1, "finish": "stop", "fault": ""}', ""):
            file.write_text(damaged, encoding="utf-8")
            assert ChatEndpoint(settings_for(server), tmp_path).ask(talk("a"))[0] == Reply("A", "stop")
            assert file.read_text(encoding="utf-8") == whole
        assert len(server.bodies) == 5


def _ask_in_a_process(settings: EndpointSection, folder: Path, texts: list[str]) -> None:
    replies = ChatEndpoint(settings, folder).ask(talk(*texts))
    assert [reply.text for reply in replies] == [text.upper() for text in texts]


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(20)]
    context = multiprocessing.get_context("spawn")
    with serving(echo) as server:
        work = (settings_for(server), tmp_path, texts)
        processes = [context.Process(target=_ask_in_a_process, args=work) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        third = ChatEndpoint(settings_for(server), tmp_path)
        third.ask(talk(*texts))
    assert (third.usage.cached, third.usage.requests) == (20, 0)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 20  # no temporary file is left


def test_a_rate_limit_is_waited_out_as_long_as_the_server_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[int, float]] = []
    monkeypatch.setattr(chat, "_wait", lambda attempt, retry_after: waits.append((attempt, retry_after)) or 0.0)
    limited = Step(status=429, headers={"Retry-After": "7"}, raw=b'{"error": {"message": "slow down"}}')
    with serving(planned(limited, limited, Step())) as server:
        reply, usage = ask_one(server, tmp_path)
    assert reply == Reply("fine", "stop")
    assert waits == [(0, 7.0), (1, 7.0)]
    assert (usage.requests, usage.retries, usage.failed) == (3, 2, 0)


def test_a_server_that_wants_a_long_silence_is_left_alone(tmp_path: Path) -> None:
    with serving(planned(Step(status=429, headers={"Retry-After": "3600"}, raw=b"come back later"))) as server:
        reply, usage = ask_one(server, tmp_path)
    assert (reply.finish, usage.requests) == (ERROR, 1)
    assert "429: come back later" in reply.fault
    assert "3600 s" in reply.fault


def test_waits_grow_and_never_undercut_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "FIRST_WAIT", 1.0)
    for attempt, most in ((0, 1.0), (1, 2.0), (4, 16.0), (9, chat.LONGEST_WAIT)):
        assert all(most / 2 <= chat._wait(attempt, 0.0) <= most for _ in range(50))
    assert all(30.0 <= chat._wait(0, 30.0) <= 30.5 for _ in range(50))
    assert len({chat._wait(0, 0.0) for _ in range(50)}) > 1


def test_retry_after_is_seconds_or_a_date() -> None:
    assert [chat._retry_after(header) for header in (None, "2", " 1.5 ", "soon", "-3")] == [0.0, 2.0, 1.5, 0.0, 0.0]
    later = datetime.now(UTC) + timedelta(seconds=100)
    assert 90 < chat._retry_after(format_datetime(later, usegmt=True)) <= 100
    assert chat._retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0.0


@pytest.mark.parametrize(
    "fault",
    [Step(status=500), Step(status=503), Step(status=408), Step(status=409), Step(drop=True), Step(hang=True)],
    ids=["500", "503", "408", "409", "drop", "hang"],
)
def test_a_passing_fault_is_tried_again(tmp_path: Path, fault: Step) -> None:
    with serving(planned(fault, Step())) as server:
        reply, usage = ask_one(server, tmp_path, timeout_seconds=PATIENCE if fault.hang else 60.0, **PRICES)
    assert reply == Reply("fine", "stop")
    assert (usage.requests, usage.retries, usage.failed) == (2, 1, 0)
    assert usage.cost_usd == pytest.approx(COST)
    assert (usage.unconfirmed_usd > 0) == (fault.drop or fault.hang)  # those may have been billed


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Step(status=500, raw=b"<html>oops\n</html>"), "500: <html>oops </html> (tried 3 times)"),
        (Step(drop=True), "the connection was lost: ServerDisconnectedError"),
        (Step(hang=True), "no reply within endpoint.timeout_seconds=1.5 (tried 2 times)"),
    ],
    ids=["500", "drop", "hang"],
)
def test_a_lasting_fault_ends_with_its_reason_and_is_not_cached(tmp_path: Path, fault: Step, words: str) -> None:
    with serving(planned(fault)) as server:
        patience = {"timeout_seconds": PATIENCE, "retries": 1} if fault.hang else {}
        reply, usage = ask_one(server, tmp_path, **patience)
        assert len(server.bodies) == (2 if fault.hang else 3)
    assert (reply.text, reply.finish, usage.failed) == ("", ERROR, 1)
    assert words in reply.fault
    assert not list(tmp_path.rglob("*.json"))


def test_a_refused_request_is_not_tried_again_and_spoils_no_other(tmp_path: Path) -> None:
    def answer(messages: list[dict[str, str]], number: int) -> Step:
        if messages[0]["content"] == "long":
            return Step(status=400, raw=b'{"error": {"message": "maximum context length is 9 tokens"}}')
        return echo(messages, number)

    with serving(answer) as server:
        endpoint = ChatEndpoint(settings_for(server), tmp_path)
        replies = endpoint.ask(talk("a", "long", "b"))
    assert [reply.text for reply in replies] == ["A", "", "B"]
    assert replies[1].fault == "the endpoint answers 400: maximum context length is 9 tokens"
    assert (endpoint.usage.requests, endpoint.usage.retries, endpoint.usage.failed) == (3, 0, 1)


@pytest.mark.parametrize(
    ("step", "finish", "text", "words"),
    [
        (Step(raw=b"{not json"), ERROR, "", "not a chat completion: {not json"),
        (Step(raw=b'{"choices": []}'), ERROR, "", "not a chat completion"),
        (Step(raw=b'{"error": {"message": "overloaded"}}'), ERROR, "", "not a chat completion: overloaded"),
        (Step(raw=b'{"choices": [{"message": {"content": 7}}]}'), ERROR, "", "not a chat completion"),
        (Step(content=None), "stop", "", "the reply is empty"),
        (Step(content=" \n"), "stop", "", "the reply is empty"),
        (Step(content="half", finish="length"), "length", "half", "cut off at endpoint.max_reply_tokens=10"),
        (Step(content="part", finish="content_filter"), "content_filter", "part", "finish_reason='content_filter'"),
        (Step(finish=None), "unknown", "fine", "finish_reason='unknown'"),
        (Step(content=None, refusal="I would\nrather not"), "refusal", "", "refused to reply: I would rather not"),
    ],
)
def test_what_is_no_whole_reply_says_why(tmp_path: Path, step: Step, finish: str, text: str, words: str) -> None:
    with serving(planned(step)) as server:
        reply, usage = ask_one(server, tmp_path)
        assert len(server.bodies) == 1
    assert (reply.finish, reply.text) == (finish, text)
    assert words in reply.fault
    assert usage.failed == (finish == ERROR)


def test_cut_and_declined_replies_are_cached_but_hiccups_are_not(tmp_path: Path) -> None:
    steps = {
        "cut": Step("half", "length"), "declined": Step(None, refusal="no"), "empty": Step(""), "broken": Step(raw=b"{")
    }  # fmt: skip
    with serving(lambda messages, number: steps[messages[0]["content"]]) as server:
        first = ChatEndpoint(settings_for(server), tmp_path).ask(talk(*steps))
        second = ChatEndpoint(settings_for(server), tmp_path).ask(talk(*steps))
    assert [reply.cached for reply in second] == [True, True, False, False]
    assert [(r.text, r.finish, r.fault) for r in second] == [(r.text, r.finish, r.fault) for r in first]


@pytest.mark.parametrize("status", [401, 403, 404, 307])
def test_wrong_settings_raise_at_the_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    quoting = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()
    with serving(planned(Step(status=status, raw=quoting, headers={"Location": "/elsewhere"}))) as server:
        endpoint = ChatEndpoint(settings_for(server, api_key_env="JUDGE_KEY"), tmp_path)
        with pytest.raises(EndpointError, match=rf"model='m', api_key_env='JUDGE_KEY' answers {status}") as caught:
            endpoint.ask(talk("a", "b", "c", "d"))
        assert len(server.bodies) == 1
        assert server.base_url in str(caught.value)
    assert KEY not in str(caught.value)


def test_an_endpoint_that_is_not_there_raises_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="cannot be reached"):
            ChatEndpoint(EndpointSection(base_url=url, model="m"), tmp_path).ask(talk("a"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/v1", "http://:80/v1", f"http://{'a' * 70}.example/v1"])
def test_an_impossible_address_raises(tmp_path: Path, url: str) -> None:
    with pytest.raises(EndpointError, match=r"has no valid address|cannot be reached"):
        ChatEndpoint(EndpointSection(base_url=url, model="m"), tmp_path).ask(talk("a"))


def test_a_later_401_is_the_replys_own(tmp_path: Path) -> None:
    with serving(planned(Step(), Step(status=401, raw=b"revoked"))) as server:
        replies = ChatEndpoint(settings_for(server), tmp_path).ask(talk("a", "b", "c"))
    assert [reply.finish for reply in replies] == ["stop", ERROR, ERROR]
    assert "401: revoked" in replies[2].fault


def test_the_key_is_sent_as_a_header_and_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    steps = [Step(), Step(status=400, raw=f"bad key {KEY}".encode()), Step(None, refusal=f"not with {KEY}")]
    with serving(planned(*steps)) as server:
        endpoint = ChatEndpoint(settings_for(server, api_key_env="JUDGE_KEY"), tmp_path)
        replies = endpoint.ask(talk("a")) + endpoint.ask(talk("b")) + endpoint.ask(talk("c"))
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        assert KEY not in json.dumps(server.bodies)
    assert [reply.finish for reply in replies] == ["stop", ERROR, "refusal"]
    assert KEY not in repr(replies)
    stored = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json")]
    assert len(stored) == 2
    assert KEY not in "".join(stored)


@pytest.mark.parametrize(("value", "words"), [(None, "is not set"), ("", "is not set"), ("sk abc\n", "holds spaces")])
def test_a_missing_key_is_an_error_before_any_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, words: str
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    settings = EndpointSection(base_url="http://127.0.0.1:9/v1", model="m", api_key_env="JUDGE_KEY")
    with pytest.raises(EndpointError, match=rf"api_key_env='JUDGE_KEY'.*{words}") as caught:
        ChatEndpoint(settings, tmp_path)
    assert "sk abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("api_key_env", KEY, "name of an environment variable"),
        ("base_url", f"https://me:{KEY}@host/v1", "without user or password"),
        ("base_url", f"https://host/v1?key={KEY}", "without query"),
        ("base_url", f"host/v1/{KEY}", "http:// or https://"),
    ],
)
def test_a_key_in_the_settings_is_refused_and_not_shown(field: str, value: str, words: str) -> None:
    endpoint = {"base_url": "https://host/v1", "model": "m", field: value}
    raw = {"model": "m", "benchmarks": [{"path": "x"}], "judge": {"name": "endpoint", "endpoint": endpoint}}
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(ScoreConfig, raw)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("concurrency", [1, 5])
def test_the_cost_cap_is_not_exceeded_and_nothing_is_lost(tmp_path: Path, concurrency: int) -> None:
    texts = [f"{number:02}" for number in range(24)]
    cap = 0.5
    bound = (2 + 16 + 64) * 1e-3 + 10 * 2e-3  # bytes and allowances for the template, and the longest reply
    with serving(echo) as server:
        fields = {**PRICES, "max_cost_usd": cap, "concurrency": concurrency}
        first = ChatEndpoint(settings_for(server, **fields), tmp_path)
        replies = first.ask(talk(*texts))
        asked = len(server.bodies)
        assert asked * COST <= cap < asked * COST + bound  # another one could have exceeded it
        second = ChatEndpoint(settings_for(server, **fields), tmp_path)
        rest = second.ask(talk(*texts))
        assert len(server.bodies) == 24
    answered = [reply for reply in replies if reply.finish == "stop"]
    left = [reply for reply in replies if reply.finish == NOT_ASKED]
    assert (len(answered), len(left)) == (asked, 24 - asked)
    assert all("max_cost_usd=0.5" in reply.fault and not reply.text for reply in left)
    assert (first.usage.not_asked, first.usage.cost_usd) == (24 - asked, pytest.approx(asked * COST))
    assert [reply.text for reply in rest] == texts
    assert (second.usage.cached, second.usage.not_asked) == (asked, 0)


def test_tries_that_may_have_been_billed_count_toward_the_cap(tmp_path: Path) -> None:
    with serving(planned(Step(hang=True))) as server:
        fields = {**PRICES, "max_cost_usd": 0.25, "timeout_seconds": PATIENCE, "retries": 9}
        reply, usage = ask_one(server, tmp_path, **fields)
        assert len(server.bodies) == 2
    assert reply.finish == NOT_ASKED
    assert "again after 2 tries" in reply.fault
    assert usage.unconfirmed_usd == pytest.approx(2 * ((5 + 16 + 64) * 1e-3 + 10 * 2e-3))
    assert usage.unconfirmed_usd <= 0.25


def test_a_reply_without_usage_is_charged_its_upper_bound(tmp_path: Path) -> None:
    with serving(planned(Step(usage=False))) as server:
        reply, usage = ask_one(server, tmp_path, **PRICES)
    assert (reply.text, usage.cost_usd, usage.input_tokens) == ("fine", 0.0, 0)
    assert usage.unconfirmed_usd == pytest.approx((5 + 16 + 64) * 1e-3 + 10 * 2e-3)


def test_odd_text_is_sent_and_found_again(tmp_path: Path) -> None:
    odd = ["", "\ud800", "a\x00b", "שלום\u202e", "🙂" * 1000, "\u2028</s>"]
    with serving(planned(Step())) as server:
        endpoint = ChatEndpoint(settings_for(server, **PRICES, max_cost_usd=50.0), tmp_path)
        assert [reply.text for reply in endpoint.ask(talk(*odd))] == ["fine"] * len(odd)
        assert sorted(body["messages"][0]["content"] for body in server.bodies) == sorted(odd)
        endpoint.ask(talk(*odd))
    assert endpoint.usage.cached == len(odd)
    assert endpoint.ask([]) == []


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    with serving(echo) as server, pytest.raises(EndpointError, match=r"cache of replies .*cache"):
        ChatEndpoint(settings_for(server), tmp_path / "cache")
    assert ReplyCache(tmp_path).read("0" * 16) is None
