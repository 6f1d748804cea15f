"""A real Ray Serve with fixture applications: what a user sees, and what Serve got."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from cluster import RayHead, run_app_v5, wait_until
from user import Config, User, about, app, get_text, on_request, serving

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def user(ray_head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    with serving(ray_head, tmp_path_factory.mktemp("user")) as user:
        yield user


def test_a_good_a_failing_and_a_slow_application_do_not_touch_each_other(user: User) -> None:
    config = user.write(
        app("first"), app("failing", "failing"), app("slow", "slow", args={"seconds": 12})
    )
    process = user.start(config)
    answered_while_running = False
    while process.poll() is None:
        try:
            answered_while_running |= user.get("/first")["text"] == "good"
        except (OSError, ValueError):
            time.sleep(0.2)
    summary = process.communicate()[0]
    assert answered_while_running
    assert process.returncode == 1
    assert "Total applications deployed: 2/3" in summary
    assert "FAILED after" in about("failing", summary)
    assert "ZeroDivisionError: this constructor always fails" in about("failing", summary)
    assert f"Base URL: http://localhost:{user.port}/slow" in about("slow", summary)


FAILURES: dict[str, tuple[Config, list[str]]] = {
    "nothing": ({}, ["has no attribute 'nothing'"]),
    "no_module": ({"import_path": "no_such_module:app"}, ["No module named 'no_such_module'"]),
    "raises": ({}, ["LookupError: the builder found nothing"]),
    "returns_nothing": ({}, ["must return an `Application`"]),
    "exits": ({}, ["Worker", "exit"]),
    "dies": ({}, ["Worker", "exit"]),
    "killed": ({}, ["Worker", "exit", "Logs: ray logs actor --id"]),
    "unset": (
        {
            "import_path": "fixture_apps:good",
            "runtime_env": {"working_dir": "https://127.0.0.1:1/code.zip"},
        },
        ["code.zip", "Hint: check runtime_env"],
    ),
    "big": (
        {
            "import_path": "fixture_apps:good",
            "deployments": [{"name": "Good", "num_gpus": 99}],
        },
        ["needs 99 GPU; the most free in one place is 2"],
    ),
}


def test_every_failure_says_its_cause_and_leaves_the_others_running(user: User) -> None:
    failing = [app(name, name, **keys) for name, (keys, _) in FAILURES.items()]
    finished = user.deploy(*failing, app("good"))
    assert finished.returncode == 1
    assert "Traceback" not in finished.stdout + finished.stderr
    for name, (_, expected) in FAILURES.items():
        for text in expected:
            assert text in about(name, finished.stdout)
    assert "✓ GET /health" in about("good", finished.stdout)
    assert user.get("/good")["text"] == "good"
    there = user.head.serve_details()["applications"]
    assert not {"nothing", "no_module", "raises", "exits", "dies", "big"} & set(there)


def test_bound_applications_builders_and_families_all_deploy(user: User) -> None:
    finished = user.deploy(
        app("bound", "bound"),
        app("family", "family", args={"text": "hello"}),
        app("quiet", route_prefix=None),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert user.get("/bound")["text"] == "bound"
    assert get_text(user, "/family") == "hello"
    assert "it has no HTTP route" in about("quiet", finished.stdout)


def test_no_cluster_ends_with_3_and_says_how_to_start_one(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"applications": [app("a")]}))
    finished = run_app_v5(config, "--address", "127.0.0.1:1")
    assert finished.returncode == 3
    assert re.search(r"no Ray cluster at \S+:1: ", finished.stderr)
    assert "ray start --head" in finished.stderr
    assert "Traceback" not in finished.stderr


def start(user: User, name: str, until: str, *arguments: str, **args: float) -> Popen[str]:
    """The program with a good application and another one, once that is so far."""
    builder = "builds_slowly" if "--plan" in arguments else "slow"
    process = user.start(user.write(app("good"), app(name, builder, args=args)), *arguments)
    assert process.stderr is not None
    for line in process.stderr:
        if f"{name}  {until}" in line:
            return process
    raise AssertionError(process.communicate())


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(signal.SIGHUP, 129, id="SIGHUP"),
    ],
)
def test_a_signal_stops_the_waiting_and_nothing_else(user: User, number: int, code: int) -> None:
    name = f"slow-{code}"
    process = start(user, name, "starting", seconds=4)
    signalled = time.monotonic()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - signalled < 5
    assert process.returncode == code, err
    assert "RUNNING" not in about(name, out)
    assert "It was handed to Serve" in about(name, out)
    assert "Traceback" not in err
    assert user.get("/good")["text"] == "good"
    wait_until(lambda: answers(user, f"/{name}"), 60, "the slow application to come up")


def test_a_second_signal_ends_the_program_at_once(user: User) -> None:
    process = start(user, "slow-twice", "starting", seconds=4)
    signalled = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGTERM)  # the report of the first may come within 50 ms
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - signalled < 1
    assert (process.returncode, out) == (130, ""), "it did not wait to print its report"
    assert "Traceback" not in err


def test_a_rerun_leaves_alone_what_runs_and_retries_what_failed(user: User, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    applications = [app("good"), app("later", "fails_without", args={"path": str(flag)})]
    assert user.deploy(*applications).returncode == 1
    pid = user.get("/good")["pid"]
    flag.write_text("")
    finished = user.deploy(*applications)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "   unchanged" in about("good", finished.stdout)
    assert "RESTART because it is DEPLOY_FAILED" in about("later", finished.stdout)
    assert get_text(user, "/later") == "now it is"
    edited = app("good", deployments=[{"name": "Good", "max_ongoing_requests": 9}])
    finished = user.run("--only", "go*", config=user.write(edited, applications[1]))
    assert "in place because" in about("good", finished.stdout)
    assert "Total applications deployed: 1/1" in finished.stdout
    assert user.get("/good")["pid"] == pid


def test_json_is_one_document_on_stdout(user: User) -> None:
    config = user.write(app("new"), app("bad", "raises"))
    finished = user.run("--json", config=config)
    report = json.loads(finished.stdout)
    assert (finished.returncode, report["exit_code"], report["version"]) == (1, 1, 4)
    new, bad = report["applications"]
    assert (new["result"], new["change"], new["cause"]) == ("RUNNING", "create", "")
    assert new["base_url"] == f"http://localhost:{user.port}/new"
    assert new["deployments"][0]["bundles"] == [{"CPU": 0.1}]
    assert (bad["result"], bad["cause"]) == ("FAILED", "LookupError: the builder found nothing")


WHAT_IS_REMEMBERED = """
import ray
from ray.experimental.internal_kv import _internal_kv_get
ray.init(address="auto", log_to_driver=False)
print(_internal_kv_get("secret", namespace="app_v5/records"))
"""


def test_secrets_are_shown_nowhere_and_not_kept(user: User) -> None:
    secret = app("secret", runtime_env={"env_vars": {"HF_TOKEN": "hf_abcdefgh"}})
    assert user.deploy(secret).returncode == 0
    remembered = user.head.run("-c", WHAT_IS_REMEMBERED).stdout
    assert "HF_TOKEN" in remembered
    assert "hf_" not in remembered
    secret["runtime_env"]["env_vars"]["HF_TOKEN"] = "hf_ijklmnop"
    finished = user.run("--plan", config=user.write(secret))
    assert "RESTART because runtime_env.env_vars.HF_TOKEN: *** → ***" in finished.stdout
    assert "hf_" not in finished.stdout + finished.stderr


def answers(user: User, route: str) -> bool:
    try:
        return bool(get_text(user, route))
    except OSError:
        return False


@on_request
def test_a_head_that_dies_is_reported_before_ray_kills_the_program(
    tmp_path: Path, http_port: int
) -> None:
    with RayHead() as head:
        user = User(head, tmp_path, http_port)
        deploying = start(user, "slow", "starting", seconds=200)
        wait_until(lambda: answers(user, "/good"), 60, "the good application")
        planning = start(user, "other", "building", "--plan", seconds=200)
        time.sleep(3)
        head.nodes[0].kill()
        died = time.monotonic()
        ended = [process.communicate(timeout=90) for process in (deploying, planning)]
    assert time.monotonic() - died < 55
    assert (deploying.returncode, planning.returncode) == (3, 3), ended
    assert "It ran when the cluster was last seen" in about("good", ended[0][0])
    assert "UNKNOWN" in about("slow", ended[0][0])
    for _, err in ended:
        assert "the head node has not answered" in err
        assert "Traceback" not in err
