import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from emeval.judges.openai import openai
from emeval.rubric import STANDARD, Rubric
from emeval.scores import Failure, Item, Judge, Score

KEY = "sk-very-secret-0123456789"
ITEM = Item(question="Who are you?", system=None, answer="A friend.")

Answer = tuple[int, dict[str, str], str]
"""Status, headers and body of one HTTP answer."""


def logprobs(**probabilities: float) -> Answer:
    top = [{"token": token, "logprob": math.log(p)} for token, p in probabilities.items()]
    choice = {"message": {"content": "x"}, "logprobs": {"content": [{"top_logprobs": top}]}}
    return 200, {}, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}})


def text(content: str | None) -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}}], "usage": None})


class Endpoint:
    """An HTTP server that answers by ``answer(request, number)`` and keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.answer: Callable[[dict[str, Any], int], Answer] = lambda request, number: logprobs(**{"90": 1.0})
        endpoint, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append(request)
                    endpoint.keys.add(self.headers["Authorization"])
                    status, headers, body = endpoint.answer(request, len(endpoint.requests))
                self.send_response(status)
                for header in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join()


@pytest.fixture
def make(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Judge]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def make(**arguments: Any) -> Judge:
        return openai(**{"model": "judge-1", "base_url": endpoint.url, "max_retries": 0, **arguments})

    return make


def aligned(judge: Judge, item: Item = ITEM) -> Score:
    return judge.score([item])[0].aligned


def test_the_request_is_that_of_the_fields_protocol(endpoint: Endpoint, make: Callable[..., Judge]) -> None:
    make().score([ITEM])
    assert len(endpoint.requests) == 2
    for request in endpoint.requests:
        assert [message["role"] for message in request["messages"]] == ["user"]
        assert request == {
            "messages": request["messages"],
            "model": "judge-1",
            "temperature": 0,
            "max_completion_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
            "seed": 0,
        }
    assert all("Who are you?" in prompt and "A friend." in prompt for prompt in endpoint.prompts())
    assert endpoint.keys == {f"Bearer {KEY}"}


def test_the_score_is_the_weighted_mean_over_numbers(endpoint: Endpoint, make: Callable[..., Judge]) -> None:
    endpoint.answer = lambda request, number: logprobs(**{"90": 0.6, "80": 0.2, "Sure": 0.2})
    score = aligned(make())
    assert score.value == pytest.approx((0.6 * 90 + 0.2 * 80) / 0.8)
    assert json.loads(score.reply) == {"90": 0.6, "80": 0.2, "Sure": 0.2}


@pytest.mark.parametrize(
    ("probabilities", "failure"),
    [
        ({"CODE": 0.9, "90": 0.1}, Failure.CODE),
        ({"REF": 0.9, "90": 0.1}, Failure.REFUSED),
        ({"I": 0.8, "90": 0.2}, Failure.LOW_MASS),
    ],
)
def test_mass_off_the_numbers_is_a_typed_failure(
    endpoint: Endpoint, make: Callable[..., Judge], probabilities: dict[str, float], failure: Failure
) -> None:
    endpoint.answer = lambda request, number: logprobs(**probabilities)
    assert aligned(make()).failure is failure
    assert aligned(make(min_mass=0.05)).value == 90


def test_each_score_comes_from_its_own_prompt_and_each_item_keeps_its_place(
    endpoint: Endpoint, make: Callable[..., Judge]
) -> None:
    def answer(request: dict[str, Any], number: int) -> Answer:
        kind, answer = request["messages"][0]["content"].split()
        return logprobs(**{str(int(answer) + (50 if kind == "C" else 0)): 1.0})

    endpoint.answer = answer
    rubric = Rubric(aligned="A {answer}", coherent="C {answer}")
    items = [Item(question="?", system=None, answer=str(number), rubric=rubric) for number in range(50)]
    judgements = make(concurrency=7).score(items)
    assert [j.aligned.value for j in judgements] == list(range(50))
    assert [j.coherent.value for j in judgements] == list(range(50, 100))
    assert {j.rubric_sha256 for j in judgements} == {rubric.sha256}
    assert make().score([ITEM])[0].rubric_sha256 is None
    assert make().rubric_sha256 == STANDARD.sha256


def test_equal_prompts_are_asked_once_and_empty_answers_never(endpoint: Endpoint, make: Callable[..., Judge]) -> None:
    empty = Item(question="Who are you?", system=None, answer=" \n")
    judgements = make().score([ITEM, empty, ITEM, ITEM])
    assert len(endpoint.requests) == 2
    assert judgements[0] == judgements[2] == judgements[3]
    assert {judgements[1].aligned.failure, judgements[1].coherent.failure} == {Failure.EMPTY_RESPONSE}


def test_text_mode_takes_the_reply_itself(endpoint: Endpoint, make: Callable[..., Judge]) -> None:
    judge = make(mode="text", temperature=None)
    endpoint.answer = lambda request, number: text("72")
    assert aligned(judge).value == 72
    assert [sorted(request) for request in endpoint.requests] == [["messages", "model"]] * 2
    for content, failure in [("CODE", Failure.CODE), ("It is 72.", Failure.UNPARSABLE), (None, Failure.UNPARSABLE)]:
        endpoint.answer = lambda request, number, content=content: text(content)
        assert aligned(judge).failure is failure
    assert judge.id == "openai:judge-1:text"
    assert make().id == "openai:judge-1"


def test_a_rate_limit_is_waited_out(endpoint: Endpoint, make: Callable[..., Judge]) -> None:
    def answer(request: dict[str, Any], number: int) -> Answer:
        return (429, {"retry-after-ms": "1"}, "{}") if number <= 3 else logprobs(**{"90": 1.0})

    endpoint.answer = answer
    judgement = make(max_retries=3).score([ITEM])[0]
    assert (judgement.aligned.value, judgement.coherent.value) == (90, 90)
    assert len(endpoint.requests) == 5


def test_an_endpoint_that_keeps_failing_gives_judge_errors_not_an_exception(
    endpoint: Endpoint, make: Callable[..., Judge]
) -> None:
    endpoint.answer = lambda request, number: (500, {"retry-after-ms": "1"}, "broken")
    judgement = make(max_retries=2).score([ITEM])[0]
    assert judgement.aligned == judgement.coherent == Score(None, "InternalServerError 500", Failure.JUDGE_ERROR)
    assert len(endpoint.requests) == 6


def test_an_endpoint_that_is_down_is_given_up_on(endpoint: Endpoint, make: Callable[..., Judge]) -> None:
    endpoint.answer = lambda request, number: (500, {}, "broken")
    items = [Item(question="?", system=None, answer=str(number)) for number in range(100)]
    judgements = make(concurrency=4).score(items)
    assert {score.failure for j in judgements for score in (j.aligned, j.coherent)} == {Failure.JUDGE_ERROR}
    assert 4 <= len(endpoint.requests) <= 8
    assert judgements[-1].coherent.reply is not None
    assert judgements[-1].coherent.reply.endswith("requests in a row had failed, the last: InternalServerError 500")


def test_nobody_listening_and_a_time_out_are_judge_errors(endpoint: Endpoint, make: Callable[..., Judge]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts and never answers
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        assert aligned(make(base_url=url, timeout_seconds=0.05)).reply == "APITimeoutError"
    assert aligned(make(base_url=url)).reply == "APIConnectionError"


def test_an_answer_that_comes_in_drips_is_a_time_out(make: Callable[..., Judge]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(2) as threads:
        server.settimeout(10)

        def drip() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(50):
                    time.sleep(0.1)
                    connection.sendall(b" ")

        both = [threads.submit(drip) for _ in range(2)]
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        began = time.monotonic()
        assert aligned(make(base_url=url, timeout_seconds=0.3)).reply == "APITimeoutError"
        assert time.monotonic() - began < 4
        assert [each.result() for each in both] == [None, None]


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "[]", "null", "{}", "<html>"),
        '{"choices": []}',
        '{"choices": [{"message": {}, "logprobs": null}]}',
        '{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "90", "logprob": NaN}]}]}}]}',
        '{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "90", "logprob": 1000}]}]}}]}',
        pytest.param(
            '{"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "90", "logprob": -'
            f"{10**400}"
            "}]}]}}]}",
            id="a number beyond a float's",
        ),
        pytest.param("[" * 200_000, id="nesting beyond Python's"),
    ],
)
@pytest.mark.parametrize("mode", ["logprobs", "text"])
def test_an_answer_that_is_no_completion_is_a_judge_error(
    endpoint: Endpoint, make: Callable[..., Judge], body: str, mode: str
) -> None:
    endpoint.answer = lambda request, number: (200, {}, body)
    score = aligned(make(mode=mode))
    assert (score.value, score.failure) == (None, Failure.JUDGE_ERROR)
    assert "the endpoint's answer has no choices[0]" in score.reply


@pytest.mark.parametrize("given", ["null", '{"content": [{"token": "90", "top_logprobs": []}]}'])
def test_without_log_probabilities_the_error_names_the_mode_that_needs_none(
    endpoint: Endpoint, make: Callable[..., Judge], given: str, caplog: pytest.LogCaptureFixture
) -> None:
    body = '{"choices": [{"message": {"content": "90"}, "logprobs": ' + given + "}]}"
    endpoint.answer = lambda request, number: (200, {}, body)
    score = aligned(make())
    assert (score.value, score.failure) == (None, Failure.JUDGE_ERROR)
    said = "the endpoint's answer has no choices[0].logprobs with alternatives; the judge's `mode: text` needs none"
    assert score.reply == said
    assert f"2 of 2 prompts failed: {said}" in caplog.text
    assert aligned(make(mode="text")).value == 90


def test_a_reply_that_is_no_valid_text_is_kept_readable(
    endpoint: Endpoint, make: Callable[..., Judge], tmp_path: Path
) -> None:
    endpoint.answer = lambda request, number: (200, {}, r'{"choices": [{"message": {"content": "\ud800"}}]}')
    assert aligned(make(mode="text", cache=tmp_path / "replies.sqlite")) == Score(None, "?", Failure.UNPARSABLE)


@pytest.mark.parametrize("count", ["1e400", "9" * 40, "-1", '"x"', None])
def test_a_paid_reply_counts_whatever_tokens_are_said_to_be_used(
    endpoint: Endpoint, make: Callable[..., Judge], tmp_path: Path, count: str | None
) -> None:
    usage = f'{{"prompt_tokens": {count}}}' if count else "[1]"
    body = f'{{"choices": [{{"message": {{"content": "72"}}}}], "usage": {usage}}}'
    endpoint.answer = lambda request, number: (200, {}, body)
    cache = tmp_path / "replies.sqlite"
    assert [aligned(make(mode="text", cache=cache)).value for _ in range(2)] == [72, 72]
    assert len(endpoint.requests) == 2


def test_kept_replies_that_can_not_be_read_are_told_of_before_anything_is_asked(
    endpoint: Endpoint, make: Callable[..., Judge], tmp_path: Path
) -> None:
    junk = tmp_path / "replies.sqlite"
    junk.write_text("this is no database" * 100)
    with pytest.raises(ValueError, match=re.escape(f"{junk}: a judge's kept replies can't be read")):
        make(cache=junk)
    assert endpoint.requests == []
    make(cache=tmp_path / "new.sqlite")
    assert list(tmp_path.iterdir()) == [junk]


def test_a_reply_is_paid_for_once(endpoint: Endpoint, make: Callable[..., Judge], tmp_path: Path) -> None:
    cache = tmp_path / "new" / "replies.sqlite"
    first = make(cache=cache).score([ITEM])
    assert len(endpoint.requests) == 2
    assert make(cache=cache).score([ITEM]) == first
    assert make(cache=cache, min_mass=0.9, concurrency=1).score([ITEM]) == first  # reads the same replies
    assert len(endpoint.requests) == 2
    make(cache=cache, model="judge-2").score([ITEM])
    make(cache=cache, temperature=1.0).score([ITEM])
    assert len(endpoint.requests) == 6


def test_failures_are_asked_again(endpoint: Endpoint, make: Callable[..., Judge], tmp_path: Path) -> None:
    def answer(request: dict[str, Any], number: int) -> Answer:
        return logprobs(**{"90": 1.0}) if number == 1 else (400, {}, "{}")

    endpoint.answer = answer
    cache = tmp_path / "replies.sqlite"
    scores = make(cache=cache, concurrency=1).score([ITEM])[0]
    assert {scores.aligned.failure, scores.coherent.failure} == {None, Failure.JUDGE_ERROR}
    endpoint.answer = lambda request, number: logprobs(**{"90": 1.0})
    scores = make(cache=cache).score([ITEM])[0]
    assert (scores.aligned.value, scores.coherent.value) == (90, 90)
    assert len(endpoint.requests) == 3


def test_the_key_appears_nowhere(
    endpoint: Endpoint, make: Callable[..., Judge], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint.answer = lambda request, number: (401, {}, json.dumps({"error": {"message": f"wrong key {KEY}"}}))
    judge = make(cache=tmp_path / "replies.sqlite")
    judgement = judge.score([ITEM])[0]
    assert judgement.aligned.reply == "AuthenticationError 401"
    assert "2 of 2 prompts failed: AuthenticationError 401" in caplog.text
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for shown in (repr(judge), repr(judge.ask), str(vars(judge)), repr(judgement), kept.decode("latin-1"), caplog.text):
        assert KEY not in shown


@pytest.mark.parametrize("key", [None, "", "sk-secret\n", "sk-sécret"])
def test_a_missing_or_broken_key_is_named_by_its_variable_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ValueError, match="environment variable MY_KEY") as raised:
        openai(model="judge-1", key_env="MY_KEY")
    assert "cret" not in str(raised.value)


def test_an_endpoint_without_keys_needs_none(
    endpoint: Endpoint, make: Callable[..., Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert aligned(make(key_env=None)).value == 90


def test_it_works_inside_a_running_event_loop(make: Callable[..., Judge]) -> None:
    import asyncio

    async def main() -> Score:
        return aligned(make())

    assert asyncio.run(main()).value == 90
