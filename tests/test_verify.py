"""Section 9: what is promised against what is reserved, what is asked, and what engines say."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import app_v5 as app
from cluster import TESTS
from test_changes import edited
from test_resources import Config, llm

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


@pytest.mark.parametrize(
    ("config", "promised"),
    [
        pytest.param(llm({"num_cpus": 1, "num_gpus": 0.45}), {"CPU": 1, "GPU": 0.45}, id="share"),
        pytest.param(
            llm({"num_gpus": 0.9}, engine_kwargs={"tensor_parallel_size": 2}),
            {"GPU": 0.9},
            id="two workers",
        ),
        pytest.param(llm({"num_cpus": 2, "num_gpus": 0}), {"CPU": 2, "GPU": 0}, id="CPU engine"),
        pytest.param(llm({}), {}, id="nothing said"),
        pytest.param(
            llm({"ray_actor_options": {"num_cpus": 1, "memory": 2e9, "resources": {"x": 1}}}),
            {"CPU": 1, "memory": 2e9, "x": 1},
            id="Ray's own form",
        ),
    ],
)
def test_what_a_config_promises_is_what_it_says(config: Config, promised: Config) -> None:
    fitted, _ = app.normalise_application({"name": "a", "args": {"llm_configs": [config]}}, ())
    [(_, model)] = app.llm_configs(fitted)
    assert app.promised_resources(model) == promised


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
    found, mute = app.smoke_test(SPEC, (), "http://h:8000", Server(answers))
    assert mute == ()
    return found


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
    answers, mute = app.smoke_test(SPEC, (), "http://h:8000", server)
    assert (len(answers), mute) == (1, ("m",))
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
    app.smoke_test(SPEC, ["m"], "http://h:8000", server)
    assert server.asked == ["/a/v1/models"]


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


def test_somebody_elses_server_is_not_taken_for_serve() -> None:
    pauses: list[int] = []
    server = Server({"/-/routes": response(200, {"/other": "b"})})
    with pytest.raises(app.ApplicationError, match="does not have /a as the route of a"):
        app.wait_for_route(SPEC, "http://h:8000", server, lambda: pauses.append(1))
    assert len(pauses) == app.ROUTE_ATTEMPTS - 1


def test_a_proxy_that_restarts_is_waited_for() -> None:
    answers: list[Exception | app.Response] = [
        app.ApplicationError("connection refused"),
        response(200, {"/a": "a"}),
    ]

    def fetch(url: str, body: Config | None) -> app.Response:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    app.wait_for_route(SPEC, "http://h:8000", fetch, lambda: None)
    assert answers == []


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
    found = app.RayCluster().fetch(dripping + path, None, timeout_s=1)
    assert (found.status, found.ended) == (status, ended)
    assert found.text.startswith("begun")
    assert found.first_s <= found.total_s


LOG = """
INFO [gpu_model_runner.py:5472] Model loading took 1.5 GiB memory and 3.210000 seconds
(EngineCore pid=7) INFO [default_loader.py:397] Loading weights took 0.44 seconds
INFO [gpu_worker.py:626] Available KV cache memory: 30.25 GiB
INFO [kv_cache_utils.py:2033] GPU KV cache size: 1,234,560 tokens, Maximum concurrency for 2,048 \
tokens per request: 602.81x
INFO [core.py:369] init engine (profile, create kv cache, warmup model) took 5.25 s
"""


def test_an_engine_tells_its_figures() -> None:
    assert app.engine_figures(LOG) == {
        "kv_cache_tokens": 1_234_560,
        "max_concurrency": 602.81,
        "kv_cache_gib": 30.25,
        "weights_gib": 1.5,
        "weights_s": 0.44,
        "start_s": 5.25,
    }
    assert app.engine_figures("nothing of the kind") == {}


def test_a_real_engines_log_has_its_figures() -> None:
    figures = app.engine_figures((RECORDED / "start.log.txt").read_text())
    assert (figures["kv_cache_tokens"], figures["max_concurrency"]) == (2_097_152, 16384.0)
    assert (figures["weights_s"], figures["start_s"]) == (0.01, 0.59)


def engine(model: str, kv_cache_gib: float | None, node: str = "n") -> app.EngineFigures:
    return app.EngineFigures(model, "r", node, 0.45, kv_cache_gib=kv_cache_gib, weights_gib=1.0)


def test_a_cache_far_below_its_neighbours_is_warned_about() -> None:
    [warning] = app.small_caches([engine("a", 30.0), engine("b", 12.0), engine("c", 29.0)])
    assert warning.startswith("b: its engine got 13.0 GiB for weights and KV cache, where")
    assert app.small_caches([engine("a", 30.0), engine("b", 12.0, "another node")]) == []
    assert app.small_caches([engine("a", 30.0), engine("b", None)]) == []


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
    config, _ = app.normalise_application(edited().config, ())
    models = tuple(app.describe_model(model) for _, model in app.llm_configs(config))
    sharing = app.ApplicationSpec(0, "a", "/", config, models)
    assert app.shares_gpu(sharing)
    assert app.was_disturbed(sharing, words) is disturbed
    assert not app.was_disturbed(app.ApplicationSpec(0, "a", "/", {}), words)


def test_a_fixed_cache_or_a_whole_gpu_measures_nothing_that_others_hold() -> None:
    for given in (
        llm({"num_gpus": 0.45}, engine_kwargs={"kv_cache_memory_bytes": 10**9}),
        llm({"num_gpus": 1}),
        llm({"num_gpus": 0}),
    ):
        config, _ = app.normalise_application({"args": {"llm_configs": [given]}}, ())
        [(_, model)] = app.llm_configs(config)
        assert not app.describe_model(model).measures_memory
