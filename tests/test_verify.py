"""Section 9: what is promised against what is reserved, what is asked, and what engines say."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch

import pytest

import app_v5 as app
from cluster import free_port

HTTP = "http://h:8000"
MODEL = app.ModelSpec("m", "/m", "m", promised={"CPU": 1.0, "GPU": 0.45})
LLM = {"import_path": "ray.serve.llm:build_openai_app"}
SPEC = app.ApplicationSpec(0, "a", "/a", LLM, (MODEL,))


# -- promises ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("demand", "held", "expected"),
    [
        pytest.param({"CPU": 1, "GPU": 0.45}, {"CPU": 1, "GPU": 0.45}, [], id="as promised"),
        pytest.param(
            {"CPU": 1, "GPU": 1.45},
            {"CPU": 1, "GPU": 1.45},
            [
                "LLMServer:m: promised 1.0 CPUs, 0.45 GPUs, reserved 1.0 CPUs, 1.45 GPUs",
            ],
            id="another builder",
        ),
        pytest.param(
            {"CPU": 1, "GPU": 0.45},
            {"CPU": 1, "GPU": 0.45, "custom": 1},
            [
                "LLMServer:m: promised 1.0 CPUs, 0.45 GPUs, reserved 1.0 CPUs, 0.45 GPUs, custom 1",
            ],
            id="something else",
        ),
        pytest.param({"CPU": 1, "GPU": 0.45}, {"CPU": 1, "GPU": 0.45000001}, [], id="float noise"),
        pytest.param(
            {"CPU": 1, "GPU": 0.45, "node:10.0.0.1": 0.01},
            {"CPU": 1, "GPU": 0.45},
            [],
            id="where it is to run is nothing that it holds",
        ),
    ],
)
def test_a_broken_promise_is_named_once(
    demand: dict[str, float], held: dict[str, float], expected: list[str]
) -> None:
    demands = (app.Demand("a", "LLMServer:m", (demand,)),)
    two = [app.Reservation("a", "LLMServer:m", replica, "1", "n", held) for replica in "rs"]
    action = app.Action(SPEC, "create", demands=demands)
    assert list(app.mismatches(action, two)) == expected


def test_a_deployment_without_a_model_is_held_to_what_its_builder_asks_for() -> None:
    demands = (app.Demand("a", "Ingress", ({"CPU": 1.0}, {"CPU": 1.0})),)
    action = app.Action(SPEC, "create", demands=demands)
    for cpus, expected in ((2.0, 0), (1.0, 1)):
        held = [
            app.Reservation("a", "Ingress", "r", node, node, {"CPU": cpus / 2}) for node in "no"
        ]
        assert len(app.mismatches(action, held)) == expected


def test_of_two_models_in_one_deployment_nobody_knows_whose_it_is() -> None:
    """Prefill and decode have one model ID, and may have different shares."""
    decode = app.ModelSpec("m", "/m", "m", promised={"CPU": 1.0, "GPU": 2.0})
    spec = app.ApplicationSpec(0, "a", "/a", LLM, (MODEL, decode))
    asked, held = {"CPU": 1.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 2.45}
    demands = (app.Demand("a", "Decode:m", (asked,)),)
    action = app.Action(spec, "create", demands=demands)
    [found] = [app.Reservation("a", "Decode:m", "r", "1", "n", asked)]
    assert app.mismatches(action, [found]) == ()
    [wrong] = app.mismatches(action, [app.Reservation("a", "Decode:m", "r", "1", "n", held)])
    assert "promised 1.0 CPUs, 2.0 GPUs, reserved 1.0 CPUs, 2.45 GPUs" in wrong


# -- questions -----------------------------------------------------------------------------------


class Server:
    """Answers by path; what it does not know is 404."""

    def __init__(self, answers: Mapping[str, app.Response]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def __call__(self, url: str, body: app.Config | None = None) -> app.Response:
        path = url.removeprefix(HTTP)
        self.asked.append(path)
        assert body is None or body.get("model") == "m"
        return self.answers.get(path, response(404, {"detail": "Not Found"}))


def response(status: int, body: app.Config | str) -> app.Response:
    return status, body if isinstance(body, str) else json.dumps(body), 0.5


LIST = response(200, {"data": [{"id": "m"}]})
TOKEN = response(200, {"model": "m"})
CANNOT = response(400, {"error": {"message": "The model does not support this"}})


def smoke_test(
    server: Server, spec: app.ApplicationSpec = SPEC, asleep: Sequence[str] = ()
) -> app.Proof:
    with patch.object(app, "fetch", server):
        return app.smoke_test(spec, asleep, HTTP)


def smoke(answers: Mapping[str, app.Response]) -> Sequence[tuple[str, float]]:
    proof = smoke_test(Server(answers))
    assert proof.notes == ()
    return proof.answers


def test_a_model_is_listed_and_says_one_token() -> None:
    assert smoke({"/a/v1/models": LIST, "/a/v1/chat/completions": TOKEN}) == (
        ("GET /v1/models", 0.5),
        ("POST /v1/chat/completions to m", 0.5),
    )


@pytest.mark.parametrize(
    ("status", "body"),
    [
        pytest.param(400, {"error": {"message": "no chat template"}}, id="no chat template"),
        pytest.param(404, {"detail": "Not Found"}, id="no such route"),
        pytest.param(500, {"error": "does not support chat"}, id="as an error of the server"),
    ],
)
def test_a_model_that_does_not_chat_completes(status: int, body: app.Config | str) -> None:
    chat = response(status, body)
    paths = {"/a/v1/models": LIST, "/a/v1/chat/completions": chat, "/a/v1/completions": TOKEN}
    assert smoke(paths)[-1][0] == "POST /v1/completions to m"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/score"])
def test_a_model_that_only_embeds_or_scores_is_asked_for_that(path: str) -> None:
    answers = {f"/a{other}": CANNOT for other, _ in app.QUESTIONS}
    answers |= {"/a/v1/models": LIST, f"/a{path}": response(200, {"model": "m", "data": []})}
    assert smoke(answers)[-1] == (f"POST {path} to m", 0.5)


def test_a_model_that_does_none_of_what_is_asked_is_no_failure() -> None:
    server = Server({"/a/v1/models": LIST})  # it transcribes, say
    proof = smoke_test(server)
    assert [request for request, _ in proof.answers] == ["GET /v1/models"]
    assert proof.notes == ("m neither chats, completes, embeds nor scores: not asked",)
    assert server.asked == ["/a/v1/models", *(f"/a{path}" for path, _ in app.QUESTIONS)]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        pytest.param(
            response(500, {"error": {"message": "CUDA error"}}), "500 CUDA error", id="500"
        ),
        pytest.param(response(400, {"error": {"message": "bad"}}), "400 bad", id="400"),
        pytest.param(response(200, {"model": "x"}), "m was asked, and x answered", id="x"),
        pytest.param(response(200, "<html>"), "m was asked, and nobody answered", id="no model"),
        pytest.param(response(503, ""), "503 no body", id="no body"),
        pytest.param(response(200, TOKEN[1][:9]), "nobody answered", id="cut off"),
    ],
)
def test_a_bad_answer_is_told_in_the_servers_words(chat: app.Response, message: str) -> None:
    with pytest.raises(app.ApplicationError, match=message):
        smoke({"/a/v1/models": LIST, "/a/v1/chat/completions": chat})


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        pytest.param(
            response(200, {"data": [{"id": "x"}]}), "/v1/models lists x, not m", id="another"
        ),
        pytest.param(response(503, "no replica"), "/v1/models: 503 no replica", id="refused"),
        pytest.param(response(404, ""), "/v1/models: 404 no body", id="not there"),
    ],
)
def test_a_model_that_is_not_listed_has_failed(listed: app.Response, message: str) -> None:
    with pytest.raises(app.ApplicationError, match=message):
        smoke({"/a/v1/models": listed})


def test_a_model_that_sleeps_is_not_woken_up() -> None:
    server = Server({"/a/v1/models": LIST})
    proof = smoke_test(server, asleep=["LLMServer:m"])
    assert server.asked == ["/a/v1/models"]
    assert proof.notes == ("m is scaled to zero: not woken up",)


@pytest.mark.parametrize("models", [(), (MODEL,)])
def test_an_application_of_ones_own_has_to_answer_below_500(
    models: tuple[app.ModelSpec, ...],
) -> None:
    """Also when it takes what looks like an LLM, and serves it as it likes."""
    plain = app.ApplicationSpec(0, "a", "/a b/", {"import_path": "m:a"}, models)
    for status in (405, 404, 307):
        there = {f"/a%20b/{path}": response(status, "") for path in ("", "v1/models")}
        answers = smoke_test(Server(there), plain).answers
        assert [request for request, _ in answers] == ["GET /"]
    healthy = Server({"/a%20b/health": response(200, "")})
    assert smoke_test(healthy, plain).answers[0][0] == "GET /health"
    with pytest.raises(app.ApplicationError, match=r"GET http://h:8000/a%20b/: 500 oh no"):
        smoke_test(Server({"/a%20b/": response(500, "oh no")}), plain)


# -- whose route it is ---------------------------------------------------------------------------

MINE, OTHERS = response(200, {"/a": "a"}), response(200, {"/a": "someone else"})
REFUSED = app.ClusterError("http://h:8000/-/routes: Connection refused")


def wait_for_route(monkeypatch: pytest.MonkeyPatch, *answers: app.Response | Exception) -> Any:
    """Wait with these answers, of which the last one stays; what is shown in the pauses."""
    monkeypatch.setattr(app, "PROXY_TIMEOUT_S", 0.5)
    left, pauses, action = list(answers), list[str](), app.Action(SPEC, "create")

    def ask(url: str) -> app.Response:
        assert url == "http://h:8000/-/routes"
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(app, "fetch", ask)
    monkeypatch.setattr(app, "POLL_INTERVAL_S", 0.01)
    sleep = time.sleep

    def pause(seconds: float) -> None:
        pauses.append(action.detail)
        sleep(seconds)

    with patch.object(time, "sleep", pause):
        app.wait_for_route(action, HTTP, app.ROUTE_QUESTIONS)
    return pauses


def test_a_proxy_that_restarts_or_has_not_heard_of_the_route_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = response(200, {"/other": "b"})
    assert wait_for_route(monkeypatch, REFUSED, late, MINE) == [
        "http://h:8000/-/routes: Connection refused",
        'http://h:8000/-/routes says: 200 {"/other": "b"}',
    ]


def test_a_proxy_that_restarts_between_two_questions_is_asked_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for lost in (REFUSED, app.ApplicationError("no answer within 60 s")):
        few = [MINE] * (app.ROUTE_QUESTIONS - 1)
        assert wait_for_route(monkeypatch, *few, lost, OTHERS, MINE) == [
            str(lost),
            'http://h:8000/-/routes says: 200 {"/a": "someone else"}',
        ]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        pytest.param([REFUSED], "Connection refused", id="nobody"),
        pytest.param([OTHERS], 'says: 200 {"/a": "someone else"}', id="another Serve"),
        pytest.param([response(404, "<html>")], "says: 404 <html>", id="another server"),
        pytest.param(
            [*[MINE] * (app.ROUTE_QUESTIONS - 1), OTHERS],
            "another server answers at the same address: .* says: 200",
            id="another one that shares the port, and gets one question of all",
        ),
    ],
)
def test_somebody_elses_server_is_not_taken_for_serve(
    monkeypatch: pytest.MonkeyPatch, answers: list[app.Response | Exception], message: str
) -> None:
    with pytest.raises(app.ClusterError, match=message):
        wait_for_route(monkeypatch, *answers)


# -- over a real connection ----------------------------------------------------------------------


class Dripping(BaseHTTPRequestHandler):
    """Answers whole, breaks off, hangs, or never comes to an end."""

    def do_GET(self) -> None:
        if self.path == "/hangs":
            time.sleep(1.5)
        self.send_response({"/error": 500, "/moved": 307}.get(self.path, 200))
        if self.path == "/moved":
            self.send_header("Location", "/error")
        if self.path not in ("/endless", "/large", "/mute"):
            self.send_header("Content-Length", "9" if self.path == "/broken" else "5")
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path == "/mute":
                time.sleep(1.5)
            self.wfile.write(b"begun" + b"x" * 2 * app.MOST_BODY_BYTES * (self.path == "/large"))
            while self.path in ("/endless", "/large"):
                time.sleep(0.05)
                self.wfile.write(b".")

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(asked)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def dripping() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        pytest.param("/whole", 200, id="whole"),
        pytest.param("/error", 500, id="an error"),
        pytest.param("/moved", 307, id="another address, where nobody asks"),
        pytest.param("/broken", 200, id="broken off"),
        pytest.param("/endless", 200, id="endless"),
        pytest.param("/large", 200, id="too large"),
    ],
)
def test_an_answer_without_an_end_is_cut_off(dripping: str, path: str, status: int) -> None:
    started = time.monotonic()
    found, text, total_s = app.fetch(dripping + path, None, timeout_s=0.5)
    assert found == status
    assert text.startswith("begun")
    assert 0 < total_s <= time.monotonic() - started < 1.5


def test_a_question_is_sent_as_json(dripping: str) -> None:
    assert json.loads(app.fetch(dripping, {"model": "m"}, 5)[1]) == {"model": "m"}


def test_who_listens_and_does_not_answer_has_failed(dripping: str) -> None:
    with pytest.raises(app.ApplicationError, match="no answer within 1 s from http://127"):
        app.fetch(f"{dripping}/hangs", None, timeout_s=0.6)
    assert app.fetch(f"{dripping}/mute", None, timeout_s=0.3)[:2] == (200, "")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        pytest.param(f"http://127.0.0.1:{free_port()}/x", "Connection refused", id="refused"),
        pytest.param(
            "http://name.invalid/x", "Name or service|Temporary failure", id="no such host"
        ),
    ],
)
def test_who_can_not_be_reached_has_not_failed(url: str, reason: str) -> None:
    with pytest.raises(app.ClusterError, match=f"^{url}: .*({reason})"):
        app.fetch(url, None, timeout_s=2)


# -- engines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "disturbed"),
    [
        pytest.param("ValueError: No available memory for the cache blocks. Try", True, id="no"),
        pytest.param("AssertionError: Error in memory profiling. Initial", True, id="profiling"),
        pytest.param(
            "ValueError: Free memory on device cuda:0 (1/80 GiB) on startup is less than desired",
            True,
            id="not free",
        ),
        pytest.param("ValueError: max seq len (9) is larger than", False, id="another failure"),
    ],
)
def test_engines_that_disturb_each_other_are_told_from_others(words: str, disturbed: bool) -> None:
    assert bool(app.DISTURBED.search(words)) is disturbed
