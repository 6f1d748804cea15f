"""What the program proves by itself of applications that run, on a real Serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from user import Config, User, about, app

pytestmark = pytest.mark.serve


def fake(name: str, behaviour: str = "", **args: Any) -> Config:
    """A model that is none, with a builder of its own; it asks for 0.5 CPU and 0.25 GPU."""
    llm = {
        "model_loading_config": {"model_id": name, "model_source": "/no/matter"},
        "deployment_config": {"num_cpus": 0.5, "num_gpus": 0.25},
    }
    return app(name, "fake_model", args={"llm_configs": [llm], "behaviour": behaviour, **args})


def test_what_is_promised_is_read_back_and_answers(user: User) -> None:
    finished = user.deploy(fake("model"), fake("old", "no chat"), app("good"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    model = about("model", finished.stdout)
    assert "✓ Reserved by LLMServer:model: 0.5 CPUs, 0.25 GPUs, on 192." in model.replace(
        "127.0.0.1", "192."
    )
    assert " GPU 0" in model
    assert "✓ GET /v1/models: answered in" in model
    assert "✓ POST /v1/chat/completions to model: answered in" in model
    assert "first token after" in model
    assert "✓ POST /v1/completions to old: answered in" in about("old", finished.stdout)
    assert "✓ GET /health: answered in" in about("good", finished.stdout)
    again = user.run("--json", config=user.write(fake("model")))
    [row] = json.loads(again.stdout)["applications"]
    assert row["change"] == "unchanged"
    assert row["proof"]["reservations"][0]["reserved"] == {"CPU": 0.5, "GPU": 0.25}
    assert row["proof"]["mismatches"] == []
    assert [answer["model_id"] for answer in row["proof"]["answers"]] == ["", "model"]


def test_a_builder_that_reserves_something_else_is_caught(user: User) -> None:
    finished = user.deploy(fake("model", hoards=True), app("hoarder", "hoarder"), app("good"))
    assert finished.returncode == 1
    assert (
        "✗ LLMServer:model: promised 0.25 GPU, reserved 1 "
        "(its builder asks Ray for that, not for what the config says)"
    ) in about("model", finished.stdout)
    assert "✗ Hoarder: promised 0.10 CPU, reserved 0.60 (" in about("hoarder", finished.stdout)
    assert "✗" not in about("good", finished.stdout)
    assert "All deployments completed" not in finished.stdout


@pytest.mark.parametrize(
    ("application", "cause"),
    [
        pytest.param(
            fake("bad", "other model"), "bad was asked, and other answered", id="another model"
        ),
        pytest.param(fake("bad", "other list"), "lists other, not bad", id="another list"),
        pytest.param(fake("bad", "500"), "500 the engine is not well", id="500 with a reason"),
        pytest.param(app("bad", "broken"), "500 Internal Server Error", id="500"),
    ],
)
def test_a_bad_answer_fails_the_application_alone(
    user: User, application: Config, cause: str
) -> None:
    finished = user.deploy(application, app("good"))
    assert finished.returncode == 1
    assert cause in about("bad", finished.stdout)
    assert "✓ GET /health" in about("good", finished.stdout)
    config = user.write(application, app("good"))
    assert user.run("--no-smoke-test", config=config).returncode == 0


def test_one_that_hangs_on_its_first_request_is_named_when_time_is_up(user: User) -> None:
    config = user.write(fake("bad", "hangs"), app("good"))
    finished = user.run("--timeout", "25", config=config)
    assert finished.returncode == 1
    assert "no answer within" in about("bad", finished.stdout)
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


def test_engines_that_share_a_gpu_start_one_after_the_other_where_asked(
    user: User, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    config = user.write(*(fake(name, notes=str(notes)) for name in ("one", "two")))
    plan = user.run("--plan", config=config).stdout
    assert "one shares its GPU and measures at its start what is free there" in plan
    finished = user.run("--stagger", config=config)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    began = starts(notes)
    assert not overlap(began["one-0"], began["two-0"])
    assert user.run("--force", config=config).returncode == 0
    began = starts(notes)
    assert overlap(began["one-1"], began["two-1"])


def test_an_engine_that_was_disturbed_is_tried_again_alone(user: User, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    config = user.write(fake("one", "disturbed", notes=str(notes)), fake("two", notes=str(notes)))
    finished = user.run("--on-failure", "delete", config=config)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Second attempt, alone" in about("one", finished.stdout)
    assert "Second attempt" not in about("two", finished.stdout)
    began = starts(notes)
    assert not overlap(began["one-1"], began["two-0"])
    assert "Unchanged" in about("one", user.run(config=config).stdout)


def test_a_root_path_and_no_proxy_at_all_are_asked_accordingly(user: User) -> None:
    options = {"host": "127.0.0.1", "port": user.port, "root_path": "/behind"}
    finished = user.deploy(app("good"), http_options=options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "✓ GET /health: answered in" in about("good", finished.stdout)
    assert f"Base URL: http://localhost:{user.port}/good\n" in finished.stdout
    user.head.shut_down_serve()
    finished = user.deploy(app("good"), proxy_location="Disabled")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    good = about("good", finished.stdout)
    assert "Not asked over HTTP: Serve has no HTTP proxy (proxy_location: Disabled)" in good
    assert "Base URL" not in good
    assert "when the cluster was last seen" not in good
