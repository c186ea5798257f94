from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.config import ConfigError, EndpointSection, ScoreConfig, parse_config
from mlc_ray.generate.client import EQUAL_REFUSALS, FAULTS, ChatEndpoint
from mlc_ray.generate.purse import EndpointUsage
from mlc_ray.generate.replies import ERROR, NOT_ASKED, EndpointError, Reply, ReplyCache
from mlc_ray.storage import Place

from .chat_server import INPUT_TOKENS, OUTPUT_TOKENS, ChatServer, Step, echo, serving

KEY = "sk-very-secret-0123456789"
PRICES = {"usd_per_million_input_tokens": 1000.0, "usd_per_million_output_tokens": 2000.0}
PATIENCE = 1.5  # seconds to wait for what never comes: ample for a request to arrive on a busy machine
COST = (INPUT_TOKENS * 1000 + OUTPUT_TOKENS * 2000) / 1e6  # of one reply of the server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


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


def test_another_model_limit_field_or_address_is_another_key(tmp_path: Path) -> None:
    with serving(echo) as server:
        settings = settings_for(server)
        others = (
            {"model": "n"},
            {"max_reply_tokens": 11},
            {"token_limit": "max_completion_tokens"},
            {"request": {"seed": 7}},
        )
        for changed in ({}, *others):
            ChatEndpoint(settings.model_copy(update=changed), tmp_path).ask(talk("a"))
        assert len(server.bodies) == 5
        ChatEndpoint(settings.model_copy(update={"concurrency": 1, "retries": 0}), tmp_path).ask(talk("a"))
        assert len(server.bodies) == 5
    with serving(echo) as other:
        ChatEndpoint(settings_for(other), tmp_path).ask(talk("a"))
        assert len(other.bodies) == 1


def test_the_configured_cache_folder_wins(tmp_path: Path) -> None:
    with serving(echo) as server:
        ChatEndpoint(settings_for(server, cache_dir=str(tmp_path / "mine")), tmp_path / "default").ask(talk("a"))
    assert list((tmp_path / "mine").glob("replies-*.sqlite"))
    assert not (tmp_path / "default").exists()


TEXTS = [f"text {number}" for number in range(6)]


def _ask_all(settings: EndpointSection, folder: Path) -> None:
    ChatEndpoint(settings, folder).ask(talk(*TEXTS))


def test_two_processes_share_a_cache_and_a_killed_one_loses_the_replies_in_flight_alone(tmp_path: Path) -> None:
    def answer(messages: list[dict[str, str]], number: int) -> Step:
        return Step(hang=True) if messages[0]["content"] in TEXTS[4:] else echo(messages, number)

    with serving(answer) as server:
        work = (settings_for(server, concurrency=2), tmp_path)
        other = multiprocessing.get_context("spawn").Process(target=_ask_all, args=work)
        other.start()
        mine = ChatEndpoint(settings_for(server), tmp_path)
        own = 0
        while other.is_alive() and sum(body["messages"][0]["content"] in TEXTS for body in server.bodies) < 6:
            mine.ask(talk(f"own {own}"))  # writes as long as the other one does
            own += 1
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        server.answer = echo
        again = ChatEndpoint(settings_for(server), tmp_path)
        replies = again.ask(talk(*TEXTS, "own 0"))
    assert [reply.cached for reply in replies] == [True] * 4 + [False] * 2 + [True]
    assert (again.usage.requests, again.usage.cached) == (2, 5)


def test_published_replies_are_read_on_another_machine(tmp_path: Path) -> None:
    published = Place(tmp_path / "score" / "replies.parquet")
    with serving(echo) as server:
        here = ChatEndpoint(settings_for(server), tmp_path / "here")
        here.cache.restore(published)  # nothing is there yet
        here.ask(talk("a", "b"))
        here.cache.publish(published)
        there = ChatEndpoint(settings_for(server), tmp_path / "there")
        there.cache.restore(published)
        assert [reply.cached for reply in there.ask(talk("b", "c"))] == [True, False]
        there.cache.publish(published)  # beside those that it did not need
        third = ChatEndpoint(settings_for(server), tmp_path / "third")
        third.cache.restore(published)
        assert all(reply.cached for reply in third.ask(talk("a", "b", "c")))
        assert len(server.bodies) == 3
    published.write_bytes(b"PAR1 no more")
    with pytest.raises(EndpointError, match=r"replies\.parquet' cannot be read.*remove the file"):
        third.cache.restore(published)


def test_a_rate_limit_is_waited_out_as_long_as_the_server_asks(tmp_path: Path) -> None:
    limited = Step(status=429, headers={"Retry-After": "1"}, raw=b'{"error": {"message": "slow down"}}')
    with serving(planned(limited, Step())) as server:
        reply, usage = ask_one(server, tmp_path)
        assert server.times[1] - server.times[0] >= 1.0
    assert reply == Reply("fine", "stop")
    assert (usage.requests, usage.retries, usage.failed) == (2, 1, 0)


def test_a_server_that_wants_a_long_silence_is_left_alone(tmp_path: Path) -> None:
    with serving(planned(Step(status=429, headers={"Retry-After": "3600"}, raw=b"come back later"))) as server:
        reply, usage = ask_one(server, tmp_path)
    assert (reply.finish, usage.requests) == (ERROR, 1)
    assert "429: come back later" in reply.fault


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
        (Step(status=204, raw=b""), "the endpoint answers 204, without a reply"),
        (Step(status=500, raw=b"<html>oops\n</html>"), "500: <html>oops </html> (tried 3 times)"),
        (Step(drop=True), "the connection was lost: RemoteProtocolError"),
        (Step(hang=True), "no reply within endpoint.timeout_seconds=1.5 (tried 2 times)"),
    ],
    ids=["204", "500", "drop", "hang"],
)
def test_a_lasting_fault_ends_with_its_reason_and_is_not_cached(tmp_path: Path, fault: Step, words: str) -> None:
    with serving(planned(fault)) as server:
        patience = {"timeout_seconds": PATIENCE, "retries": 1} if fault.hang else {}
        reply, usage = ask_one(server, tmp_path, **patience)
        assert len(server.bodies) == {204: 1, 500: 3}.get(fault.status, 2 if fault.hang else 3)
        server.answer = echo
        assert ask_one(server, tmp_path)[0] == Reply("HELLO", "stop")
    assert (reply.text, reply.finish, usage.failed) == ("", ERROR, 1)
    assert words in reply.fault


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
        with pytest.raises(
            EndpointError, match=rf"model='m', api_key_env='JUDGE_KEY': the endpoint answers {status}"
        ) as caught:
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


def test_equal_refusals_in_a_row_stop_the_run_with_the_servers_message(tmp_path: Path) -> None:
    refused = Step(status=400, raw=b'{"error": {"message": "top_p must be below 1"}}')
    with serving(planned(Step(), refused)) as server:
        endpoint = ChatEndpoint(settings_for(server, concurrency=1, request={"top_p": 2}), tmp_path)
        with pytest.raises(EndpointError, match=r"400: top_p must be below 1, to 3 .*request=\{top_p: null\}"):
            endpoint.ask(talk(*(f"text {number}" for number in range(500))))
        assert len(server.bodies) == 1 + EQUAL_REFUSALS
        assert ChatEndpoint(settings_for(server, request={"top_p": 2}), tmp_path).ask(talk("text 0"))[0].cached


def test_a_content_filter_refuses_responses_not_the_run(tmp_path: Path) -> None:
    error = {"message": "temperature of the text: filtered", "code": "content_filter"}
    with serving(planned(Step(status=400, raw=json.dumps({"error": error}).encode()))) as server:
        replies = ChatEndpoint(settings_for(server), tmp_path).ask(talk(*map(str, range(EQUAL_REFUSALS + 1))))
        assert len(server.bodies) == EQUAL_REFUSALS + 1
    assert {reply.fault for reply in replies} == {"the endpoint answers 400: temperature of the text: filtered"}


def test_faults_that_differ_stop_the_run_later(tmp_path: Path) -> None:
    def answer(messages: list[dict[str, str]], number: int) -> Step:
        return Step() if number < 9 and number % 3 == 0 else Step(status=422, raw=f"request {number} is bad".encode())

    with serving(answer) as server:
        with pytest.raises(EndpointError, match=f"is bad; {FAULTS} requests in a row got no reply"):
            ChatEndpoint(settings_for(server, concurrency=1), tmp_path).ask(talk(*map(str, range(500))))
        assert len(server.bodies) == 7 + FAULTS


@pytest.mark.parametrize(
    ("message", "fix", "fields"),
    [
        (
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported.",
            r"set endpoint\.request=\{temperature: null\}",
            {"request": {"temperature": None, "reasoning_effort": "low"}},
        ),
        (
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
            r"set endpoint\.token_limit=max_completion_tokens",
            {"token_limit": "max_completion_tokens"},
        ),
    ],
)
def test_a_model_that_refuses_a_parameter_names_the_setting_that_leaves_it_out(
    tmp_path: Path, message: str, fix: str, fields: dict[str, Any]
) -> None:
    refused = Step(status=400, raw=json.dumps({"error": {"message": message}}).encode())
    with serving(planned(refused, Step())) as server:
        with pytest.raises(EndpointError, match=fix):
            ChatEndpoint(settings_for(server), tmp_path).ask(talk("a", "b"))
        assert len(server.bodies) == 1
        ChatEndpoint(settings_for(server, **fields), tmp_path).ask(talk("a"))
        sent = server.bodies[1]
    if "request" in fields:
        assert ("temperature" in sent, sent["reasoning_effort"]) == (False, "low")
    else:
        assert ("max_tokens" in sent, sent["max_completion_tokens"]) == (False, 10)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("base_url", "http://127.0.0.1:99999/v1", "port"),
        ("request", {"max_tokens": 5}, r"'max_tokens' \(max_tokens: endpoint\.max_reply_tokens sets it\); remove it"),
        ("request", {"stream": True}, "replies are read whole"),
    ],
)
def test_settings_that_cannot_work_are_refused(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(EndpointSection, {"base_url": "http://host/v1", "model": "m", field: value})


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
    endpoint.cache.publish(Place(tmp_path / "replies.parquet"))
    stored = [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(stored) > 1
    assert KEY.encode() not in b"".join(stored)


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


def test_a_reply_with_half_a_surrogate_pair_is_kept(tmp_path: Path) -> None:
    with serving(planned(Step("a \ud800 b"))) as server:
        [reply] = ChatEndpoint(settings_for(server), tmp_path).ask(talk("a"))
        [again] = ChatEndpoint(settings_for(server), tmp_path).ask(talk("a"))
    assert (reply.text, again.text, again.cached) == ("a \ufffd\ufffd\ufffd b", reply.text, True)


def test_a_row_of_rate_limits_does_not_end_the_run(tmp_path: Path) -> None:
    limited = Step(status=429, headers={"Retry-After": "3600"}, raw=b"come back later")
    with serving(planned(Step(), limited)) as server:
        endpoint = ChatEndpoint(settings_for(server, concurrency=1), tmp_path)
        replies = endpoint.ask(talk(*map(str, range(10))))
        assert [reply.fault for reply in replies].count("") == 1
        assert len(server.bodies) == 10
        with pytest.raises(EndpointError, match=r"50 requests in a row got no reply; lower endpoint\.concurrency"):
            endpoint.ask(talk(*map(str, range(100, 160))))
