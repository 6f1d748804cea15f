"""Running the program again on a real Serve, with requests flowing all the time."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster import RayHead, wait_until
from traffic import Traffic
from user import Config, User, about, app, get_text, on_request, serve_deploy, serving

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def user(ray_head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    with serving(ray_head, tmp_path_factory.mktemp("user")) as user:
        yield user


def versioned(name: str, version: str = "one", seconds: float = 0, **options: Any) -> Config:
    """An application that tells its version; `options` are its deployment's."""
    return app(
        name,
        "versioned",
        args={"version": version, "seconds": seconds},
        deployments=[{"name": "Versioned", "user_config": {"text": ""}, **options}],
    )


def pid_of(user: User, route: str) -> str:
    return get_text(user, route).split()[-1]


def there(user: User) -> set[str]:
    """The names of the applications that Serve has."""
    return set(user.head.serve_details()["applications"])


def replicas(user: User, name: str) -> list[Any]:
    details = user.head.serve_details()["applications"][name]["deployments"]["Versioned"]
    return list(details["replicas"])


def test_an_unchanged_file_is_free_and_light_edits_lose_no_request(user: User) -> None:
    applications = [versioned("a"), versioned("b", num_replicas=2)]
    assert user.deploy(*applications).returncode == 0
    before = pid_of(user, "/a")
    with Traffic(user.base_url, "/a", "/b") as traffic:
        finished = user.deploy(*applications)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for name in "ab":
        assert "   unchanged" in about(name, finished.stdout)
        assert traffic[f"/{name}"].failures == []
    assert len(traffic["/a"].texts) == 1
    assert len(traffic["/b"].texts) == 2
    edited = versioned(
        "a",
        num_replicas=2,
        max_ongoing_requests=9,
        user_config={"text": "x"},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=10,
    )
    with Traffic(user.base_url, "/a", "/b") as traffic:
        finished = user.deploy(edited, applications[1])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "in place because deployments.Versioned.user_config.text" in about("a", finished.stdout)
    assert "unchanged" in about("b", finished.stdout)
    assert [traffic[route].failures for route in ("/a", "/b")] == [[], []]
    assert len(traffic["/b"].texts) == 2
    # Serve reconfigures the old replica only once the new one is up: requests during the run may
    # have missed it since.
    wait_until(
        lambda: get_text(user, "/a").split() == ["one", "x", before], 10, "the old replica's answer"
    )


def test_a_restart_of_two_replicas_rolls_and_touches_nobody_else(user: User) -> None:
    assert user.deploy(versioned("a", num_replicas=2), versioned("b")).returncode == 0
    edited = user.write(versioned("a", "two", num_replicas=2), versioned("b"))
    plan = user.run("--plan", config=edited).stdout
    assert 'RESTART because args.version: "one" → "two"' in about("a", plan)
    assert "rolling: Serve stops a fifth of the replicas at a time" in about("a", plan)
    assert "unchanged" in about("b", plan)
    with Traffic(user.base_url, "/a", "/b") as traffic:
        finished = user.run(config=edited)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [traffic[route].failures for route in ("/a", "/b")] == [[], []]
    assert len(traffic["/b"].texts) == 1
    assert {text.split()[0] for text in traffic["/a"].texts} == {"one", "two"}
    assert get_text(user, "/a").startswith("two")


def test_one_replica_restarts_without_a_gap_where_there_is_room(user: User) -> None:
    assert user.deploy(versioned("a"), versioned("b")).returncode == 0
    edited = user.write(versioned("a", "two", 3), versioned("b"))
    plan = user.run("--plan", config=edited).stdout
    assert "with a gap: Serve stops the one replica of Versioned" in about("a", plan)
    assert "no gap" in about("a", user.run("--plan", "--no-downtime", config=edited).stdout)
    with Traffic(user.base_url, "/a", "/b") as traffic:
        finished = user.run("--no-downtime", config=edited)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [traffic[route].failures for route in ("/a", "/b")] == [[], []]
    assert traffic["/a"].longest_silence_s < 3
    assert len(traffic["/b"].texts) == 1
    assert get_text(user, "/a").startswith("two")


@on_request
def test_no_downtime_without_room_waits_and_the_old_replica_serves(user: User) -> None:
    assert user.deploy(versioned("a", num_cpus=10)).returncode == 0
    edited = user.write(versioned("a", "two", num_cpus=10))
    before = get_text(user, "/a")
    plan = user.run("--plan", "--no-downtime", config=edited)
    assert plan.returncode == 1
    assert "a/Versioned: predicted: does not fit now; needs 10 CPU" in plan.stdout
    finished = user.run("--no-downtime", "--timeout", "8", config=edited)
    assert finished.returncode == 4
    summary = about("a", finished.stdout)
    assert "needs 10 CPU" in summary
    assert "Still serving from before the edit: 1 of 1 replicas" in summary
    assert get_text(user, "/a") == before
    assert user.run(config=edited).returncode == 0
    assert get_text(user, "/a").startswith("two")


def test_a_failed_edit_says_what_still_serves_and_the_file_before_brings_it_back(
    user: User,
) -> None:
    good = [versioned("a", num_replicas=2), versioned("b")]
    broken = [versioned("a", "broken", num_replicas=2), versioned("b")]
    assert user.deploy(*good).returncode == 0
    with Traffic(user.base_url, "/a", "/b") as traffic:
        failed = user.deploy(*broken)
    assert failed.returncode == 1
    summary = about("a", failed.stdout)
    assert "ZeroDivisionError: this version never comes up" in summary
    assert "Still serving from before the edit: 1 of 2 replicas" in summary
    assert [traffic[route].failures for route in ("/a", "/b")] == [[], []]
    still = pid_of(user, "/a")
    with Traffic(user.base_url, "/a", "/b") as traffic:
        back = user.deploy(*good)
        assert back.returncode == 0, back.stdout + back.stderr
        wait_until(lambda: pid_of(user, "/a") != still, 20, "the second replica")
        wait_until(lambda: pid_of(user, "/a") == still, 20, "the replica that never stopped")
    assert [traffic[route].failures for route in ("/a", "/b")] == [[], []]
    assert len(traffic["/b"].texts) == 1


def test_what_the_file_does_not_name_stays_unless_it_is_pruned(user: User) -> None:
    assert user.deploy(versioned("a"), versioned("b"), versioned("c")).returncode == 0
    config = user.write(versioned("a"))
    assert "not in file" in about("b", user.run("--plan", config=config).stdout)
    kept = user.run(config=config)
    assert "Not in the file, left alone: b (RUNNING), c (RUNNING)" in kept.stdout
    planned = json.loads(user.run("--plan", "--prune", "--json", config=config).stdout)
    assert {row["name"]: row["change"] for row in planned["applications"]} == {
        "a": "unchanged",
        "b": "delete",
        "c": "delete",
    }
    with Traffic(user.base_url, "/a", "/c") as traffic:
        only = user.run("--prune", "--only", "b", config=config)
    assert (only.returncode, traffic["/a"].failures, traffic["/c"].failures) == (0, [], [])
    # Its route is free for another at once.
    renamed = user.write(versioned("a"), {**versioned("d"), "route_prefix": "/c"})
    pruned = user.run("--prune", config=renamed)
    assert pruned.returncode == 0, pruned.stdout + pruned.stderr
    assert "Deleted: c" in pruned.stderr
    assert there(user) == {"a", "d"}
    assert get_text(user, "/c").startswith("one")
    # A route that is not given up is refused before anything is sent.
    taken = user.run(config=user.write(versioned("b"), {**versioned("e"), "route_prefix": "/c"}))
    assert taken.returncode == 2
    assert "applications[1].route_prefix: /c is the route of d, which is running" in taken.stderr
    assert there(user) == {"a", "d"}


def used_cpus(user: User) -> float:
    """By `ray status`, which is a few seconds old."""
    used = re.search(r"([\d.]+)/16.0 CPU", user.head.ray_status())
    assert used
    return float(used[1])


def test_delete_removes_what_the_file_names_and_frees_it(user: User) -> None:
    both = user.write(versioned("a", num_cpus=10), versioned("b"))
    assert user.run(config=both).returncode == 0
    with Traffic(user.base_url, "/b") as traffic:
        finished = user.run("--delete", "--only", "a", config=both)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "a: deleted; what it held is free" in finished.stdout
        wait_until(lambda: used_cpus(user) < 10, 20, "the CPUs to be free")
        # All of it fits again.
        assert user.run(config=both).returncode == 0
    assert traffic["/b"].failures == []
    assert user.run("--delete", config=both).returncode == 0
    gone = user.run("--delete", config=both)
    assert "a: it was not there" in gone.stdout
    assert not there(user) & {"a", "b"}


def test_two_runs_on_one_file_and_two_on_two(user: User) -> None:
    slow = user.write(versioned("shared", "one", 20), name="slow.yaml")
    first = user.start(slow)
    wait_until(lambda: "shared" in there(user), 60, "the first run")
    second = user.run("--json", config=slow)
    other = user.run(config=user.write(versioned("a"), name="other.yaml"))
    assert first.poll() is None, "the others did not wait for the first"
    [row] = json.loads(second.stdout)["applications"]
    assert (second.returncode, row["result"]) == (1, "FAILED")
    assert f"another run of this program works on it: process {first.pid}" in row["cause"]
    assert "wait until it has ended" in row["hint"]
    assert other.returncode == 0, other.stdout + other.stderr
    first.communicate(timeout=60)
    assert first.returncode == 0
    again = user.run(config=slow)
    assert "unchanged" in about("shared", again.stdout)
    assert len(replicas(user, "shared")) == 1


@on_request
def test_many_runs_at_once_leave_one_generation_of_replicas(user: User) -> None:
    config = user.write(versioned("many"))
    runs = [user.start(config) for _ in range(3)]
    outputs = ["".join(run.communicate(timeout=120)) for run in runs]
    assert 0 in [run.returncode for run in runs], outputs
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0 or "another run of this program works on it" in output, output
    assert len(replicas(user, "many")) == 1
    assert "unchanged" in about("many", user.run(config=config).stdout)


@on_request
def test_a_run_that_was_killed_holds_nothing_up(user: User) -> None:
    config = user.write(versioned("killed", "one", 5))
    process = user.start(config)
    wait_until(lambda: "killed" in there(user), 60, "the first run")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    finished = user.run(config=config)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(replicas(user, "killed")) == 1


@on_request
def test_a_controller_that_dies_with_a_call_in_flight_is_no_failure(user: User) -> None:
    assert user.deploy(versioned("a")).returncode == 0
    before = get_text(user, "/a")
    slow = app("late", "builds_slowly", args={"seconds": 3})
    process = user.start(user.write(versioned("a"), slow))
    assert process.stderr is not None
    while "late  building" not in process.stderr.readline():
        pass
    controller = next(
        process
        for node in user.head.nodes
        for process in node.processes()
        if process.cmdline()[:1] == ["ray::ServeController"]
    )
    controller.suspend()
    time.sleep(7)
    controller.kill()
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, out + err
    assert "✓ GET /health" in about("late", out)
    assert "unchanged" in about("a", out)
    # What is remembered survives the controller, too.
    assert "unchanged" in about("a", user.deploy(versioned("a")).stdout)
    assert get_text(user, "/a") == before


def test_force_restarts_what_is_unchanged(user: User) -> None:
    assert user.deploy(versioned("a")).returncode == 0
    before = pid_of(user, "/a")
    finished = user.run("--force", config=user.write(versioned("a")))
    assert "RESTART because --force" in about("a", finished.stdout)
    assert pid_of(user, "/a") != before


def says(user: User, route: str, start: str) -> bool:
    try:
        return get_text(user, route).startswith(start)
    except OSError:
        return False


@on_request
def test_what_serve_deploy_brought_is_recognised_and_taken_over(user: User) -> None:
    config = user.write(versioned("x"), versioned("y"))
    serve_deploy(user.head, config)
    wait_until(lambda: says(user, "/x", "one") and says(user, "/y", "one"), 60, "serve deploy")
    taken = user.write({**versioned("z"), "route_prefix": "/x"}, name="taken.yaml")
    assert "/x is the route of x, which is running" in user.run(config=taken).stderr
    before = get_text(user, "/y")
    finished = user.run("--only", "x", config=config)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "RESTART because `serve deploy` brought it" in about("x", finished.stdout)
    edited = user.write(versioned("x", "two"), versioned("y"))
    changed = user.run("--only", "x", config=edited)
    assert 'RESTART because args.version: "one" → "two"' in about("x", changed.stdout)
    assert get_text(user, "/x").startswith("two")
    assert get_text(user, "/y") == before
    # What the reason says beforehand: Serve's controller remembers the declarative config.
    assert "Serve's controller does again when it restarts" in about("x", finished.stdout)
    user.head.run("-c", KILL_CONTROLLER)
    wait_until(lambda: says(user, "/x", "one"), 60, "serve deploy's version")


KILL_CONTROLLER = """
import ray
ray.init(address="auto", namespace="serve", log_to_driver=False)
ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR"), no_restart=False)
"""
