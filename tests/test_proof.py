"""What the program proves by itself of applications that run, on a real Serve."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import RayHead
from user import Config, User, about, app, on_request, serving

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def user(ray_head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    with serving(ray_head, tmp_path_factory.mktemp("user")) as user:
        yield user


def fake(name: str, behaviour: str = "", **args: Any) -> Config:
    """A model that is none, with a builder of its own; it asks for 0.5 CPU and 0.1 GPU."""
    llm = {
        "model_loading_config": {"model_id": name, "model_source": "/no/matter"},
        "deployment_config": {"num_cpus": 0.5, "num_gpus": 0.1},
    }
    return app(name, "fake_model", args={"llm_configs": [llm], "behaviour": behaviour, **args})


def test_what_is_promised_is_read_back_and_answers(user: User) -> None:
    finished = user.deploy(fake("model"), fake("old", "no chat"), app("good"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    model = about("model", finished.stdout)
    assert re.search(r"✓ Reserved by LLMServer:model: 0.5 CPUs, 0.1 GPUs, on \S+ GPU 0\n", model)
    assert "✓ GET /v1/models: answered in" in model
    assert "✓ POST /v1/chat/completions to model: answered in" in model
    assert "answered in" in model
    assert "✓ POST /v1/completions to old: answered in" in about("old", finished.stdout)
    assert "✓ GET /health: answered in" in about("good", finished.stdout)
    again = user.run("--json", config=user.write(fake("model")))
    [row] = json.loads(again.stdout)["applications"]
    assert row["change"] == "unchanged"
    assert row["proof"]["reservations"][0]["reserved"] == {"CPU": 0.5, "GPU": 0.1}
    assert row["proof"]["mismatches"] == []
    assert [row["proof"]["answers"][i][0] for i in (0, 1)] == [
        "GET /v1/models",
        "POST /v1/chat/completions to model",
    ]


def test_a_builder_that_reserves_something_else_is_caught(user: User) -> None:
    finished = user.deploy(fake("greedy", hoards=True), app("hoarder", "hoarder"), app("good"))
    assert finished.returncode == 1
    greedy = "✗ LLMServer:greedy: promised 0.5 CPUs, 0.1 GPUs, reserved 0.5 CPUs, 1.0 GPUs"
    assert greedy in about("greedy", finished.stdout)
    assert "✗ Hoarder: promised 0.1 CPUs, reserved 0.6 CPUs" in about("hoarder", finished.stdout)
    assert "✗" not in about("good", finished.stdout)
    assert "All deployments completed" not in finished.stdout


BAD = {
    "another-model": (fake("another-model", "other model"), "was asked, and other answered"),
    "another-list": (fake("another-list", "other list"), "lists other, not another-list"),
    "reason": (fake("reason", "500"), "500 the engine is not well"),
    "no-reason": (app("no-reason", "broken"), "500 Internal Server Error"),
}


def test_bad_answers_fail_their_applications_alone(user: User) -> None:
    config = user.write(*(application for application, _ in BAD.values()), app("good"))
    finished = user.run(config=config)
    assert finished.returncode == 1
    for name, (_, cause) in BAD.items():
        summary = about(name, finished.stdout)
        assert "FAILED" in summary
        assert cause in summary
    assert "✓ GET /health" in about("good", finished.stdout)
    assert user.run("--no-smoke-test", config=config).returncode == 0


@on_request
def test_one_that_hangs_on_its_first_request_has_failed(user: User) -> None:
    config = user.write(fake("hanging", "hangs"), app("good"))
    finished = user.run("--timeout", "15", config=config)
    assert finished.returncode == 1
    assert "no answer within 60 s" in about("hanging", finished.stdout)
    assert "✓ GET /health" in about("good", finished.stdout)


def starts(notes: Path) -> dict[str, tuple[float, float]]:
    """When each start of a model began and ended, by "MODEL-NUMBER"."""
    return {
        file.name: (float(began), float(ended))
        for file in notes.iterdir()
        for began, ended in [file.read_text().split()]
    }


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


@on_request
def test_an_engine_that_another_disturbed_is_tried_again_alone(user: User, tmp_path: Path) -> None:
    config = user.write(
        fake("one", "disturbed", notes=str(tmp_path)), fake("two", notes=str(tmp_path))
    )
    plan = user.run("--plan", config=config).stdout
    assert "one shares its GPU and measures at its start what is free there" in plan
    finished = user.run(config=config)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Second attempt, alone" in about("one", finished.stdout)
    assert "Second attempt" not in about("two", finished.stdout)
    began = starts(tmp_path)
    assert overlap(began["one-0"], began["two-0"])
    assert not overlap(began["one-1"], began["two-0"])
    assert "unchanged" in about("one", user.run(config=config).stdout)
    # As V4 did it: one after the other.
    finished = user.run("--force", "--max-workers", "1", config=config)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    began = starts(tmp_path)
    assert not overlap(began["one-2"], began["two-1"])


@on_request
def test_a_root_path_and_no_proxy_at_all_are_asked_accordingly(user: User) -> None:
    user.head.shut_down_serve()
    options = {"host": "127.0.0.1", "port": user.port, "root_path": "/behind"}
    finished = user.deploy(app("good"), http_options=options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "✓ GET /health: answered in" in about("good", finished.stdout)
    assert f"Base URL: http://localhost:{user.port}/good\n" in finished.stdout
    user.head.shut_down_serve()
    finished = user.deploy(app("good"), proxy_location="Disabled")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    good = about("good", finished.stdout)
    assert "not asked over HTTP: Serve has no HTTP proxy (proxy_location: Disabled)" in good
    assert "Base URL" not in good
    assert "when the cluster was last seen" not in good
