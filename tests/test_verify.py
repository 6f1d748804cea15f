"""Section 9: what is promised against what is reserved, what is asked, and what engines say."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

import app_v5 as app
from cluster import TESTS
from test_resources import Config, application, llm, read

RECORDED = TESTS / "recorded"
MODEL = app.ModelSpec("m", "/m", "m", promised={"CPU": 1.0, "GPU": 0.45})
SPEC = app.ApplicationSpec(
    0, "a", "/a", {"import_path": "ray.serve.llm:build_openai_app"}, (MODEL,)
)


def held(**resources: float) -> app.Reservation:
    return app.Reservation("LLMServer:m", "r", resources, ("10.0.0.1",), (0,))


@pytest.mark.parametrize(
    ("demand", "reservation", "expected"),
    [
        pytest.param({"CPU": 1, "GPU": 0.45}, {"CPU": 1, "GPU": 0.45}, [], id="as promised"),
        pytest.param(
            {"CPU": 1, "GPU": 1.45},
            {"CPU": 1, "GPU": 1.45},
            [
                "LLMServer:m: promised 0.45 GPU, reserved 1.45 "
                "(its builder asks Ray for that, not for what the config says)"
            ],
            id="another builder",
        ),
        pytest.param(
            {"CPU": 1, "GPU": 0.45},
            {"CPU": 1, "GPU": 0.45, "custom": 1},
            [
                "LLMServer:m: promised 0 custom, reserved 1 "
                "(a replica of it holds more or less than its deployment asks for)"
            ],
            id="something else",
        ),
        pytest.param({"CPU": 1, "GPU": 0.45}, {"CPU": 1, "GPU": 0.45000001}, [], id="float noise"),
    ],
)
def test_a_broken_promise_is_named_with_its_reason(
    demand: dict[str, float], reservation: dict[str, float], expected: list[str]
) -> None:
    demands = [app.Demand("a", "LLMServer:m", (demand,), "PACK", 1, 1)]
    assert list(app.mismatches(SPEC, demands, [held(**reservation)])) == expected


class Server:
    """Answers by path; what it does not know is 404."""

    def __init__(self, answers: Mapping[str, app.Response]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def __call__(self, url: str, body: Config | None) -> app.Response:
        path = url.removeprefix("http://h:8000")
        self.asked.append(path)
        return self.answers.get(path, response(404, {"detail": "Not Found"}))


def response(status: int, body: Config | str) -> app.Response:
    return app.Response(status, body if isinstance(body, str) else json.dumps(body), 0.25, 0.5)


LIST = response(200, {"data": [{"id": "m"}]})
STREAM = response(200, 'data: {"model": "m"}\n\ndata: [DONE]\n')


def smoke(answers: Mapping[str, app.Response]) -> tuple[app.Answer, ...]:
    found, notes = app.smoke_test(SPEC, (), "http://h:8000", Server(answers))
    assert notes == []
    return tuple(found)


def test_a_model_is_listed_and_says_one_token() -> None:
    answers = smoke({"/a/v1/models": LIST, "/a/v1/chat/completions": STREAM})
    assert answers == (
        app.Answer("GET /v1/models", 0.5),
        app.Answer("POST /v1/chat/completions", 0.5, "m", 0.25),
    )


@pytest.mark.parametrize(
    ("status", "body"),
    [
        pytest.param(400, {"error": {"message": "no chat template"}}, id="no chat template"),
        pytest.param(404, {"detail": "Not Found"}, id="no such route"),
        pytest.param(200, 'data: {"error": {"message": "no chat template"}}', id="in a stream"),
    ],
)
def test_a_model_that_does_not_chat_completes(status: int, body: Config | str) -> None:
    chat = response(status, body)
    paths = {"/a/v1/models": LIST, "/a/v1/chat/completions": chat, "/a/v1/completions": STREAM}
    assert smoke(paths)[-1].request == "POST /v1/completions"


def test_a_model_that_only_embeds_is_asked_for_that() -> None:
    cannot = response(400, {"error": {"message": "The model does not support this"}})
    embedding = response(200, {"model": "m", "data": []})
    paths = {"/a/v1/chat/completions": cannot, "/a/v1/completions": cannot}
    answers = smoke({"/a/v1/models": LIST, **paths, "/a/v1/embeddings": embedding})
    assert answers[-1] == app.Answer("POST /v1/embeddings", 0.5, "m", None)


def test_a_model_that_does_none_of_what_is_asked_is_no_failure() -> None:
    server = Server({"/a/v1/models": LIST})  # it transcribes, say
    answers, notes = app.smoke_test(SPEC, (), "http://h:8000", server)
    assert len(answers) == 1
    assert notes == ["m neither chats, completes, embeds nor scores: not asked"]
    assert server.asked == ["/a/v1/models", *(f"/a{path}" for path, _ in app.QUESTIONS)]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        pytest.param(
            response(500, {"error": {"message": "CUDA error"}}), "500 CUDA error", id="500"
        ),
        pytest.param(response(400, {"error": {"message": "bad"}}), "400 bad", id="400"),
        pytest.param(response(200, 'data: {"model": "x"}'), "m was asked, and x answered", id="x"),
        pytest.param(response(200, "<html>"), "m was asked, and nobody answered", id="no model"),
        pytest.param(response(503, ""), "503 no body", id="no body"),
        pytest.param(
            app.Response(200, STREAM.text, 1, 60, ended=False), "no end within 60 s", id="endless"
        ),
    ],
)
def test_a_bad_answer_is_told_in_the_servers_words(chat: app.Response, message: str) -> None:
    with pytest.raises(app.ApplicationError, match=message):
        smoke({"/a/v1/models": LIST, "/a/v1/chat/completions": chat})


def test_a_model_that_sleeps_is_not_woken_up() -> None:
    server = Server({"/a/v1/models": LIST})
    _, notes = app.smoke_test(SPEC, ["m"], "http://h:8000", server)
    assert server.asked == ["/a/v1/models"]
    assert notes == ["m is scaled to zero: not woken up"]


def test_an_application_without_models_has_to_answer_below_500() -> None:
    plain = app.ApplicationSpec(0, "a", "/a", {"import_path": "m:a"})
    for status, good in ((405, True), (404, True), (500, False)):
        server = Server({"/a/": response(status, "oh no")})
        if good:
            [answer], _ = app.smoke_test(plain, (), "http://h:8000", server)
            assert answer.request == "GET /"
        else:
            with pytest.raises(app.ApplicationError, match="GET http://h:8000/a/: 500 oh no"):
                app.smoke_test(plain, (), "http://h:8000", server)


class Routes:
    """Answers to /-/routes, one after the other; the last one stays."""

    def __init__(self, *answers: Exception | app.Response) -> None:
        self.answers = list(answers)
        self.waits: list[str] = []

    def __call__(self, url: str, body: Config | None) -> app.Response:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


OURS, THEIRS = response(200, {"/a": "a"}), response(200, {"/other": "b"})


def test_a_proxy_that_restarts_is_waited_for_and_that_is_said() -> None:
    ask = Routes(app.Unreachable("connection refused"), THEIRS, OURS)
    app.wait_for_route(SPEC, "http://h:8000", ask, ask.waits.append)
    assert ask.waits[0] == "connection refused"
    assert ask.waits[1].startswith("http://h:8000/-/routes says: 200")


def test_somebody_elses_server_is_not_taken_for_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "PROXY_TIMEOUT_S", 0.1)
    ask = Routes(THEIRS)
    with pytest.raises(app.Unreachable, match=r"/-/routes says: 200 .*other"):
        app.wait_for_route(SPEC, "http://h:8000", ask, lambda said: time.sleep(0.05))


def test_a_server_that_shares_the_port_is_noticed() -> None:
    ask = Routes(OURS, OURS, response(200, "<html>hello</html>"))
    with pytest.raises(app.Unreachable, match="another server answers at the same address"):
        app.wait_for_route(SPEC, "http://h:8000", ask, ask.waits.append)


class Dripping(BaseHTTPRequestHandler):
    """Answers whole, breaks off, or never comes to an end."""

    def do_GET(self) -> None:
        self.send_response(500 if self.path == "/error" else 200)
        if self.path != "/endless":
            self.send_header("Content-Length", "9" if self.path == "/broken" else "5")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b"begun")
            while self.path == "/endless":
                time.sleep(0.05)
                self.wfile.write(b".")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def dripping() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "status", "ended"),
    [
        pytest.param("/whole", 200, True, id="whole"),
        pytest.param("/error", 500, True, id="an error"),
        pytest.param("/broken", 200, False, id="broken off"),
        pytest.param("/endless", 200, False, id="endless"),
    ],
)
def test_an_answer_without_an_end_is_cut_off(
    dripping: str, path: str, status: int, ended: bool
) -> None:
    found = app.fetch(dripping + path, None, timeout_s=1)
    assert (found.status, found.ended) == (status, ended)
    assert found.text.startswith("" if path == "/broken" else "begun")
    assert found.first_s <= found.total_s


def test_nobody_there_is_no_answer_and_no_failure() -> None:
    with pytest.raises(app.Unreachable, match="Connection refused"):
        app.fetch("http://127.0.0.1:1/x", None, timeout_s=1)


class Silent(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        time.sleep(1)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_somebody_who_listens_and_says_nothing_fails() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        with pytest.raises(app.ApplicationError, match=f"no answer within 0 s from {url}"):
            app.fetch(url, {"a": 1}, timeout_s=0.2)
        server.shutdown()


LOG = """
INFO [gpu_model_runner.py:5472] Model loading took 1.5 GiB memory and 3.210000 seconds
(EngineCore pid=7) INFO [default_loader.py:397] Loading weights took 0.44 seconds
INFO [gpu_worker.py:626] Available KV cache memory: 30.25 GiB
INFO [kv_cache_utils.py:2033] GPU KV cache size: 1,234,560 tokens, Maximum concurrency for 2,048 \
tokens per request: 602.81x
INFO [core.py:369] init engine (profile, create kv cache, warmup model) took 5.25 s
"""


def test_an_engine_tells_its_figures() -> None:
    assert app.engine_figures(SPEC, "LLMServer:m", LOG) == [
        "Engine of m says: KV cache 1,234,560 tokens, 30.25 GiB, 602.81 requests of full length at "
        "once, weights 1.5 GiB, weights loaded in 0.44 s, ready 5.25 s later"
    ]
    assert app.engine_figures(SPEC, "LLMServer:m", "nothing of the kind") == []
    assert app.engine_figures(SPEC, "OpenAiIngress", LOG) == []


def test_a_real_engines_log_has_its_figures() -> None:
    (text,) = app.engine_figures(SPEC, "LLMServer:m", (RECORDED / "start.log.txt").read_text())
    assert "KV cache 2,097,152 tokens" in text
    assert "16384.00 requests of full length" in text


@pytest.mark.parametrize(
    ("words", "disturbed"),
    [
        pytest.param(
            "ValueError: No available memory for the cache blocks. Try", True, id="blocks"
        ),
        pytest.param("AssertionError: Error in memory profiling. Initial", True, id="profiling"),
        pytest.param("ValueError: max seq len (9) is larger than", False, id="another failure"),
    ],
)
def test_engines_that_disturb_each_other_are_told_from_others(words: str, disturbed: bool) -> None:
    sharing = read(application(llm({"num_gpus": 0.45})))[0]
    assert app.shares_gpu(app.Action(sharing, app.Change.CREATE))
    assert not app.shares_gpu(app.Action(sharing, app.Change.UNCHANGED))
    assert bool(app.DISTURBED.search(words)) is disturbed


@pytest.mark.parametrize(
    ("host", "proxies", "location", "expected"),
    [
        pytest.param("0.0.0.0", ["10.0.0.1"], "EveryNode", "http://localhost:8000", id="here"),
        pytest.param("0.0.0.0", ["10.0.0.9"], "HeadOnly", "http://10.0.0.9:8000", id="elsewhere"),
        pytest.param("10.0.0.1", ["10.0.0.1"], "EveryNode", "http://10.0.0.1:8000", id="one host"),
        pytest.param("0.0.0.0", [], "Disabled", "", id="no proxy"),
    ],
)
def test_the_public_address(host: str, proxies: list[str], location: str, expected: str) -> None:
    options = SimpleNamespace(host=host, port=8000, ssl_certfile=None)
    there = {str(index): SimpleNamespace(node_ip=ip) for index, ip in enumerate(proxies)}
    known = SimpleNamespace(proxy_location=location, http_options=options, proxies=there)
    assert app.public_address(known, "10.0.0.1") == expected
