"""A real Ray Serve with fixture applications: what a user sees, and what Serve got."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from cluster import APP_V5, RayHead, run_app_v5, run_python, wait_until
from user import User, about, app, get_text

pytestmark = pytest.mark.serve


def test_a_good_a_failing_and_a_slow_application_do_not_touch_each_other(user: User) -> None:
    config = user.write(
        app("good"), app("failing", "failing"), app("slow", "slow", args={"seconds": 25})
    )
    process = user.start(config)
    answered_while_running = False
    while process.poll() is None:
        try:
            answered_while_running |= user.get("/good")["text"] == "good"
        except (OSError, ValueError):
            time.sleep(0.2)
    summary = process.communicate()[0]
    assert answered_while_running
    assert process.returncode == 1
    assert "Total applications deployed: 2/3" in summary
    assert "FAILED after" in about("failing", summary)
    assert "ZeroDivisionError: this constructor always fails" in about("failing", summary)
    assert f"Base URL: http://localhost:{user.port}/slow" in about("slow", summary)


@pytest.mark.parametrize(
    ("builder", "cause"),
    [
        pytest.param("nothing", "has no attribute 'nothing'", id="missing attribute"),
        pytest.param("raises", "LookupError: the builder found nothing", id="builder raises"),
        pytest.param("returns_nothing", "must return an `Application`", id="builder returns None"),
        pytest.param("exits", "died", id="builder calls sys.exit"),
        pytest.param("dies", "died", id="builder kills its process"),
    ],
)
def test_a_builder_that_fails_leaves_the_others_running(
    user: User, builder: str, cause: str
) -> None:
    finished = user.deploy(app("bad", builder), app("good"))
    assert finished.returncode == 1
    assert cause in about("bad", finished.stdout)
    assert "Traceback" not in finished.stdout + finished.stderr
    assert user.get("/good")["text"] == "good"


def test_a_replica_that_dies_and_a_runtime_env_that_fails_say_so(user: User) -> None:
    unreachable = {"working_dir": "https://127.0.0.1:1/code.zip"}
    finished = user.deploy(
        app("killed", "killed"), app("unset", runtime_env=unreachable), app("good")
    )
    assert finished.returncode == 1
    killed, unset = about("killed", finished.stdout), about("unset", finished.stdout)
    assert "died" in killed
    assert "Logs: ray logs actor --id" in killed
    assert "code.zip" in unset
    assert "Hint: check runtime_env" in unset
    assert user.get("/good")["text"] == "good"


def test_a_missing_module_names_itself(user: User) -> None:
    finished = user.deploy({"name": "bad", "import_path": "no_such_module:app"}, app("good"))
    assert finished.returncode == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in about("bad", finished.stdout)


def test_time_runs_out_for_the_one_that_hangs(user: User) -> None:
    config = user.write(
        app("hangs", "hangs"), app("slow", "slow", args={"seconds": 60}), app("good")
    )
    finished = user.run("--timeout", "15", config=config)
    assert finished.returncode == 4
    for name in ("hangs", "slow"):
        assert "STILL DEPLOYING" in about(name, finished.stdout)
    assert user.get("/good")["text"] == "good"


def test_bound_applications_builders_and_families_all_deploy(user: User) -> None:
    finished = user.deploy(
        app("bound", "bound"),
        app("family", "family", args={"text": "hello"}),
        app("quiet", route_prefix=None),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert user.get("/bound")["text"] == "bound"
    assert get_text(user, "/family") == "hello"
    assert "No HTTP route" in about("quiet", finished.stdout)


def test_what_no_node_can_ever_hold_fails_at_once_and_alone(user: User) -> None:
    big = app("big", deployments=[{"name": "Good", "num_gpus": 99}])
    finished = user.deploy(big, app("good"))
    assert finished.returncode == 1
    assert "no node has 99 GPU: the largest has 2" in about("big", finished.stdout)
    assert "big" not in user.head.serve_details()["applications"]
    assert user.get("/good")["text"] == "good"


def test_no_cluster_ends_with_3_and_says_how_to_start_one(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"applications": [app("a")]}))
    finished = run_app_v5(config, "--address", "127.0.0.1:1")
    assert finished.returncode == 3
    assert re.search(r"no Ray cluster at \S+:1: ", finished.stderr)
    assert "ray start --head" in finished.stderr
    assert "Traceback" not in finished.stderr


def interrupt(user: User, config: Path, number: int, count: int = 1) -> tuple[int, str, str, float]:
    """Send a signal once the slow application starts; return how the program ended, and when."""
    process = user.start(config)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "slow  starting" in line:
            break
    time.sleep(1)
    signalled = time.monotonic()
    for _ in range(count):
        os.killpg(process.pid, number)
        time.sleep(0.2)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, said + err, time.monotonic() - signalled


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
    ],
)
def test_a_signal_stops_the_waiting_and_nothing_else(user: User, number: int, code: int) -> None:
    config = user.write(app("good"), app("slow", "slow", args={"seconds": 15}))
    returncode, out, err, seconds = interrupt(user, config, number)
    assert returncode == code, err
    assert seconds < 5
    assert "RUNNING" not in about("slow", out)
    assert "It was submitted and goes on deploying" in about("slow", out)
    assert "Traceback" not in err
    assert user.get("/good")["text"] == "good"
    wait_until(lambda: get_text(user, "/slow") == "slow", 60, "the slow application to come up")


def test_a_second_signal_ends_the_program_at_once(user: User) -> None:
    config = user.write(app("slow", "slow", args={"seconds": 20}))
    returncode, _, err, seconds = interrupt(user, config, signal.SIGINT, count=2)
    assert returncode == 130
    assert seconds < 3
    assert "Traceback" not in err


def test_a_rerun_leaves_alone_what_runs_and_retries_what_failed(user: User, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    applications = [app("good"), app("later", "fails_without", args={"path": str(flag)})]
    assert user.deploy(*applications).returncode == 1
    pid = user.get("/good")["pid"]
    flag.write_text("")
    finished = user.deploy(*applications)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Unchanged: it runs already" in about("good", finished.stdout)
    assert "RESTART because it is DEPLOY_FAILED" in about("later", finished.stdout)
    assert get_text(user, "/later") == "now it is"
    edited = app("good", deployments=[{"name": "Good", "max_ongoing_requests": 9}])
    finished = user.run("--only", "go*", config=user.write(edited, applications[1]))
    assert "in place because" in about("good", finished.stdout)
    assert "Total applications deployed: 1/1" in finished.stdout
    assert user.get("/good")["pid"] == pid


def test_json_is_one_document_on_stdout(user: User) -> None:
    config = user.write(app("good"), app("bad", "raises"))
    finished = user.run("--json", config=config)
    report = json.loads(finished.stdout)
    assert (finished.returncode, report["exit_code"], report["version"]) == (1, 1, 1)
    good, bad = report["applications"]
    assert (good["result"], good["change"], good["cause"]) == ("RUNNING", "create", None)
    assert good["base_url"] == f"http://localhost:{user.port}/good"
    assert good["deployments"][0]["reserved_per_replica"] == {"CPU": 0.1}
    assert (bad["result"], bad["cause"]) == ("FAILED", "LookupError: the builder found nothing")


def test_secrets_are_shown_nowhere(user: User) -> None:
    secret = app("good", runtime_env={"env_vars": {"HF_TOKEN": "hf_abcdefgh"}})
    assert user.deploy(secret).returncode == 0
    secret["runtime_env"]["env_vars"]["HF_TOKEN"] = "hf_ijklmnop"
    finished = user.run("--plan", config=user.write(secret))
    assert "RESTART because runtime_env.env_vars.HF_TOKEN: *** → ***" in finished.stdout
    assert "hf_" not in finished.stdout + finished.stderr


def answers(user: User, route: str) -> bool:
    try:
        return bool(get_text(user, route))
    except OSError:
        return False


def test_a_head_that_dies_is_reported_before_ray_kills_the_program(
    tmp_path: Path, http_port: int
) -> None:
    with RayHead() as head:
        user = User(head, tmp_path, http_port)
        config = user.write(app("good"), app("slow", "slow", args={"seconds": 200}))
        process = user.start(config)
        wait_until(lambda: answers(user, "/good"), 60, "the good application")
        time.sleep(3)
        head.nodes[0].kill()
        died = time.monotonic()
        out, err = process.communicate(timeout=90)
    assert time.monotonic() - died < 55
    assert process.returncode == 3
    assert "It ran when the cluster was last seen" in about("good", out)
    assert "UNKNOWN" in about("slow", out)
    assert "the head node has not answered" in err
    assert "Traceback" not in err


def test_a_head_that_dies_ends_a_plan(tmp_path: Path, http_port: int) -> None:
    with RayHead() as head:
        user = User(head, tmp_path, http_port)
        process = user.start(
            user.write(app("slow", "builds_slowly", args={"seconds": 200})), "--plan"
        )
        assert process.stderr is not None
        while "slow  building" not in process.stderr.readline():
            pass
        time.sleep(3)
        head.nodes[0].kill()
        died = time.monotonic()
        _, err = process.communicate(timeout=90)
    assert time.monotonic() - died < 55
    assert process.returncode == 3
    assert "the head node has not answered" in err
    assert "Traceback" not in err


def test_a_head_that_wants_a_token_is_served_and_told_from_none(
    tmp_path: Path, http_port: int
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with RayHead(env=env) as head:
        user = User(head, tmp_path, http_port)
        finished = user.deploy(app("good"), app("failing", "failing"))
        assert finished.returncode == 1
        assert "✓ GET /health" in about("good", finished.stdout)
        assert "ZeroDivisionError" in about("failing", finished.stdout)
        without = {**head.env, "RAY_AUTH_MODE": "disabled"}
        refused = run_python(str(APP_V5), str(tmp_path / "config.yaml"), env=without, timeout_s=90)
        assert refused.returncode == 3
        assert "if it is a Ray head that wants a token, set RAY_AUTH_MODE=token" in refused.stderr
