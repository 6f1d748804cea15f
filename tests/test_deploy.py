"""Section 8 on a scripted cluster: what overlaps, what waits, what ends a wait."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

import app_v5 as app

CPU_NODE = app.Node("node", {"CPU": 4.0}, {"CPU": 4.0})


def spec(name: str, **config: Any) -> app.ApplicationSpec:
    return app.ApplicationSpec(0, name, f"/{name}", {"name": name, "import_path": "m:a", **config})


def demand(name: str, cpus: float = 1.0) -> app.Demand:
    return app.Demand(name, "D", ({"CPU": cpus},), "PACK", 1, 1)


def state(name: str, status: str, message: str = "") -> app.ApplicationState:
    return app.ApplicationState(name, status, message)


class ScriptedCluster:
    """A cluster whose applications run as soon as they are submitted, unless a script says else.

    `script` gives an application's states, one a poll after its submission; the last one stays.
    Under "NAME #2" stand those after its second submission, where they are others.
    """

    def __init__(
        self, script: Mapping[str, Sequence[app.ApplicationState | None]] | None = None
    ) -> None:
        self.script = script or {}
        self.lock = threading.Lock()
        self.submitted: list[str] = []
        self.deleted: list[str] = []
        self.rolled_back: list[str] = []
        self.held: dict[str, tuple[app.Reservation, ...]] = {}
        self.answers: dict[str, app.Response] = {}
        self.log = ""
        self.polls: dict[str, int] = {}
        self.building = self.most_building = 0
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.is_alive = True
        self.demands: dict[str, tuple[app.Demand, ...]] = {}

    def build(
        self, application: app.ApplicationSpec, patience: app.Patience
    ) -> tuple[app.Demand, ...]:
        with self.lock:
            self.building += 1
            self.most_building = max(self.most_building, self.building)
        gate = self.gates.get(application.name)
        while gate and not gate.wait(0.01):
            patience.check()
        with self.lock:
            self.building -= 1
        if application.name in self.errors:
            raise self.errors[application.name]
        return self.demands.get(application.name, (demand(application.name),))

    def submit(
        self, action: app.Action, demands: Sequence[app.Demand], patience: app.Patience
    ) -> None:
        with self.lock:
            self.submitted.append(action.application.name)

    def states(self, timeout_s: float = 0) -> dict[str, app.ApplicationState]:
        with self.lock:
            found = {}
            for name in self.submitted:
                key = f"{name} #{self.submitted.count(name)}"
                states = self.script.get(key, self.script.get(name, [state(name, "RUNNING")]))
                index = min(self.polls.get(key, 0), len(states) - 1)
                self.polls[key] = index + 1
                now = states[index]
                if now is not None:
                    found[name] = now
            return found

    def nodes(self, moving: Collection[str] = ()) -> tuple[tuple[app.Node, ...], app.Holders]:
        return (CPU_NODE,), {}

    def failure_logs(self, state: app.ApplicationState) -> list[str]:
        return []

    def starting_log(self, state: app.ApplicationState) -> str:
        return self.log

    def delete(self, name: str) -> None:
        self.deleted.append(name)

    def roll_back(self, name: str) -> None:
        self.rolled_back.append(name)

    def held_by(self, name: str) -> str:
        return ""

    def endpoint(self) -> str:
        return "http://localhost:8000"

    def reservations(self, state: app.ApplicationState) -> tuple[app.Reservation, ...]:
        return self.held.get(state.name, ())

    def fetch(self, url: str, body: app.Config | None, timeout_s: float) -> app.Response:
        if url.endswith("/-/routes"):
            return app.Response(200, json.dumps({f"/{n}": n for n in self.submitted}), 0, 0)
        return self.answers.get(url, app.Response(200, "{}", 0.1, 0.2))

    def replica_log(self, actor_id: str) -> str:
        return self.log

    def alive(self) -> bool:
        return self.is_alive


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr(app, "HEARTBEAT_INTERVAL_S", 0.01)
    monkeypatch.setattr(app, "LOG_INTERVAL_S", 0.01)


def run(
    cluster: ScriptedCluster,
    *names: str,
    show: Callable[[list[app.Progress]], None] = lambda progress: None,
    board: app.Board | None = None,
    **options: Any,
) -> list[app.Outcome]:
    return app.deploy(
        [app.Action(spec(name), app.Change.CREATE, "1") for name in names],
        cluster,
        board or app.Board(),
        app.Options("config.yaml", **options),
        show,
    )


def results(outcomes: Sequence[app.Outcome]) -> dict[str, str]:
    return {outcome.application.name: outcome.result.value for outcome in outcomes}


def test_applications_deploy_at_once_and_outcomes_keep_the_order_of_the_file() -> None:
    cluster = ScriptedCluster()
    cluster.gates = {name: threading.Event() for name in "abc"}

    def open_gates_when_all_build(progress: list[app.Progress]) -> None:
        if cluster.building == 3:
            for gate in cluster.gates.values():
                gate.set()

    outcomes = run(cluster, "a", "b", "c", show=open_gates_when_all_build, max_workers=3)
    assert cluster.most_building == 3
    assert list(results(outcomes).items()) == [(name, "RUNNING") for name in "abc"]


def test_one_worker_starts_the_next_when_the_one_before_has_settled() -> None:
    deploying = state("a", "DEPLOYING")
    cluster = ScriptedCluster({"a": [deploying, deploying, state("a", "RUNNING")]})
    seen: list[tuple[str, ...]] = []
    run(
        cluster,
        "a",
        "b",
        max_workers=1,
        show=lambda progress: seen.append(tuple(item.words for item in progress)),
    )
    assert cluster.most_building == 1
    assert all(b == "queued" for a, b in seen if a != "RUNNING")


@pytest.mark.parametrize(
    ("applications", "cores", "wanted", "expected"),
    [
        pytest.param(10, 4, None, 4, id="as many as cores"),
        pytest.param(10, 1, None, 2, id="at least two"),
        pytest.param(1, 8, None, 1, id="no more than applications"),
        pytest.param(3, 8, 1, 1, id="as wanted"),
        pytest.param(0, 8, None, 1, id="none at all"),
    ],
)
def test_how_many_workers(applications: int, cores: int, wanted: int | None, expected: int) -> None:
    assert app.worker_count(applications, cores, wanted) == expected


def test_one_that_fails_to_build_or_to_start_leaves_the_others_running() -> None:
    cluster = ScriptedCluster(
        {"b": [state("b", "DEPLOYING"), state("b", "DEPLOY_FAILED", "oh no")]}
    )
    cluster.errors["a"] = app.ApplicationError("ModuleNotFoundError: No module named 'x'")
    outcomes = run(cluster, "a", "b", "c")
    assert results(outcomes) == {"a": "FAILED", "b": "FAILED", "c": "RUNNING"}
    causes = [outcome.cause.text for outcome in outcomes if outcome.cause]
    assert causes == ["ModuleNotFoundError: No module named 'x'", "oh no"]
    assert app.exit_code(outcomes, 0) == 1


def test_a_defect_met_with_one_application_is_its_failure_alone() -> None:
    cluster = ScriptedCluster()
    cluster.errors["a"] = KeyError("unforeseen")
    outcomes = run(cluster, "a", "b")
    assert results(outcomes) == {"a": "FAILED", "b": "RUNNING"}
    assert "Traceback" in outcomes[0].detail


def test_time_runs_out_for_one_and_the_others_are_not_held_up() -> None:
    cluster = ScriptedCluster({"a": [state("a", "DEPLOYING")]})
    outcomes = run(cluster, "a", "b", timeout_s=0.3)
    assert results(outcomes) == {"a": "STILL DEPLOYING", "b": "RUNNING"}
    assert app.exit_code(outcomes, 0) == 4


def test_a_builder_that_hangs_runs_out_of_time_too() -> None:
    cluster = ScriptedCluster()
    cluster.gates["a"] = threading.Event()
    outcomes = run(cluster, "a", "b", timeout_s=0.3)
    assert results(outcomes) == {"a": "STILL DEPLOYING", "b": "RUNNING"}
    assert not outcomes[0].submitted


def test_a_stop_ends_every_wait_and_says_what_was_submitted() -> None:
    cluster = ScriptedCluster({"a": [state("a", "DEPLOYING")]})
    board = app.Board()

    def stop_when_submitted(progress: list[app.Progress]) -> None:
        if cluster.submitted:
            board.stop(130, "SIGINT")

    started = time.monotonic()
    outcomes = run(cluster, "a", "b", max_workers=1, show=stop_when_submitted, board=board)
    assert time.monotonic() - started < 5
    assert results(outcomes) == {"a": "INTERRUPTED", "b": "INTERRUPTED"}
    assert [outcome.submitted for outcome in outcomes] == [True, False]
    assert app.exit_code(outcomes, board.stop_code) == 130


def test_a_head_node_that_is_gone_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "LOST_AFTER_S", 0.2)
    cluster = ScriptedCluster({"a": [state("a", "DEPLOYING")]})
    cluster.is_alive = False
    board = app.Board()
    outcomes = run(cluster, "a", board=board)
    assert results(outcomes) == {"a": "UNKNOWN"}
    assert app.exit_code(outcomes, board.stop_code) == 3
    assert "head node" in board.stop_reason


def test_a_controller_that_is_silent_for_a_while_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = ScriptedCluster()
    answers = iter([app.ClusterError("restarting"), app.ClusterError("restarting")])
    real = cluster.states

    def states(timeout_s: float) -> dict[str, app.ApplicationState]:
        for error in answers:
            raise error
        return real(timeout_s)

    monkeypatch.setattr(cluster, "states", states)
    assert results(run(cluster, "a")) == {"a": "RUNNING"}


def test_a_watcher_with_a_defect_does_not_leave_everybody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = ScriptedCluster()

    def states(timeout_s: float) -> dict[str, app.ApplicationState]:
        raise KeyError("node_ip")

    monkeypatch.setattr(cluster, "states", states)
    board = app.Board()
    assert results(run(cluster, "a", board=board)) == {"a": "UNKNOWN"}
    assert "KeyError: 'node_ip'" in board.stop_reason


def test_an_application_deleted_by_somebody_else_is_not_waited_for() -> None:
    cluster = ScriptedCluster({"a": [state("a", "DEPLOYING"), None]})
    (outcome,) = run(cluster, "a")
    assert outcome.result is app.Result.FAILED
    assert outcome.cause is not None
    assert "deleted" in outcome.cause.text


def test_unhealthy_for_a_moment_is_not_a_failure_and_for_long_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blip = [state("a", "UNHEALTHY"), state("a", "RUNNING")]
    assert results(run(ScriptedCluster({"a": blip}), "a")) == {"a": "RUNNING"}
    monkeypatch.setattr(app, "UNHEALTHY_GRACE_S", 0.1)
    stays = ScriptedCluster({"a": [state("a", "UNHEALTHY", "check_health raised")]})
    assert results(run(stays, "a")) == {"a": "FAILED"}


def test_what_can_never_fit_fails_before_it_is_submitted_and_what_waits_is_deployed() -> None:
    cluster = ScriptedCluster()
    cluster.demands = {
        "never": (demand("never", 5),),
        "first": (demand("first", 3),),
        "waits": (demand("waits", 2),),
    }
    outcomes = run(cluster, "first", "never", "waits", max_workers=1)
    assert results(outcomes) == {"first": "RUNNING", "never": "FAILED", "waits": "RUNNING"}
    assert cluster.submitted == ["first", "waits"]
    assert outcomes[1].cause is not None
    assert "no node has 5 CPU: the largest has 4" in outcomes[1].cause.text


def test_a_cluster_that_grows_gets_what_no_node_can_hold_yet() -> None:
    cluster = ScriptedCluster()
    cluster.demands = {"big": (demand("big", 5),)}
    assert results(run(cluster, "big", allow_pending=True)) == {"big": "RUNNING"}


@pytest.mark.parametrize(
    ("found", "stop", "code"),
    [
        pytest.param([], 0, 0, id="nothing to do"),
        pytest.param(["RUNNING"], 0, 0, id="all run"),
        pytest.param(["RUNNING", "STILL DEPLOYING"], 0, 4, id="time ran out"),
        pytest.param(["STILL DEPLOYING", "FAILED"], 0, 1, id="a failure before a timeout"),
        pytest.param(["FAILED", "UNKNOWN"], 0, 3, id="a lost cluster before a failure"),
        pytest.param(["FAILED", "UNKNOWN"], 143, 143, id="a signal before all"),
    ],
)
def test_exit_codes_when_mixed(found: list[str], stop: int, code: int) -> None:
    action = app.Action(spec("a"), app.Change.CREATE, "1")
    outcomes = [app.Outcome(action, app.Result(word), 0.0) for word in found]
    assert app.exit_code(outcomes, stop) == code


def test_what_failed_or_ran_out_of_time_is_deleted_only_when_asked_and_new() -> None:
    script = {"a": [state("a", "DEPLOY_FAILED", "oh no")], "b": [state("b", "DEPLOYING")]}
    kept = ScriptedCluster(script)
    run(kept, "a", "b", "c", timeout_s=0.3)
    assert kept.deleted == []
    cleaned = ScriptedCluster(script)
    outcomes = run(cleaned, "a", "b", "c", timeout_s=0.3, on_failure="delete")
    assert sorted(cleaned.deleted) == ["a", "b"]
    assert [outcome.deleted for outcome in outcomes] == [True, True, False]
    ran_before = ScriptedCluster(script)
    action = app.Action(spec("a"), app.Change.RESTART, "1")
    options = app.Options("config.yaml", on_failure="delete")
    app.deploy([action], ran_before, app.Board(), options, lambda progress: None)
    assert ran_before.deleted == []


def replica(node: str, status: str = "STARTING") -> app.ReplicaState:
    return app.ReplicaState("r", status, node, 1)


def deploying(message: str = "", *replicas: app.ReplicaState) -> app.ApplicationState:
    deployment = app.DeploymentState("D", "UPDATING", message, 2, replicas)
    return app.ApplicationState("a", "DEPLOYING", "", "/a", "imperative", (deployment,))


@pytest.mark.parametrize(
    ("state", "waits_for", "phase", "expected"),
    [
        pytest.param(
            deploying("", replica("n", "RUNNING"), replica("n")),
            "",
            "loading weights",
            ("starting replicas 1/2", "loading weights"),
            id="an engine's phase",
        ),
        pytest.param(
            deploying("", replica("")),
            "needs 0.45 GPU; held by x",
            "",
            ("waiting for resources", "needs 0.45 GPU; held by x"),
            id="what the plan says that it waits for",
        ),
        pytest.param(
            deploying("", replica("n")),
            "needs 0.45 GPU; held by x",
            "",
            ("starting replicas 0/2", ""),
            id="placed after all",
        ),
        pytest.param(
            deploying(
                "A replica failed to start with exception. Retrying. Error:\n"
                "Traceback (most recent call last):\nZeroDivisionError: no",
                replica("n"),
            ),
            "",
            "",
            ("starting replicas 0/2", "a replica failed: ZeroDivisionError: no"),
            id="the cause from the first attempt on",
        ),
    ],
)
def test_what_a_deploying_application_does_in_words(
    state: app.ApplicationState, waits_for: str, phase: str, expected: tuple[str, str]
) -> None:
    assert app.describe_state(state, waits_for, phase) == expected


SHARING = (app.ModelSpec("m", "/m", "m", share=0.45, measures_memory=True),)
DISTURBED = "AssertionError: Error in memory profiling. Initial free memory 1 GiB"


def sharing(name: str) -> app.Action:
    """The deployment of an application whose engine shares a GPU."""
    return app.Action(replace(spec(name), models=SHARING), app.Change.CREATE, "1")


def test_an_engine_that_was_disturbed_is_tried_again_alone() -> None:
    failed, running = state("a", "DEPLOY_FAILED", DISTURBED), state("a", "RUNNING")
    cluster = ScriptedCluster({"a": [failed], "a #2": [running]})
    outcomes = app.deploy(
        [sharing("a"), sharing("b")],
        cluster,
        app.Board(),
        app.Options("c", on_failure="delete", smoke_test=False),
        lambda progress: None,
    )
    assert results(outcomes) == {"a": "RUNNING", "b": "RUNNING"}
    assert cluster.submitted.count("a") == 2
    assert (outcomes[0].action.attempt, outcomes[0].action.version) == (2, "1.again")
    assert cluster.deleted == []


def test_it_is_tried_again_once_and_only_when_another_engine_started_with_it() -> None:
    failed = [state("a", "DEPLOY_FAILED", DISTURBED)]
    for others, submissions in (([sharing("b")], 2), ([], 1)):
        cluster = ScriptedCluster({"a": failed})
        options = app.Options("c", on_failure="delete", smoke_test=False)
        outcomes = app.deploy(
            [sharing("a"), *others], cluster, app.Board(), options, lambda progress: None
        )
        assert outcomes[0].result is app.Result.FAILED
        assert cluster.submitted.count("a") == submissions
        assert cluster.deleted == ["a"]


def test_stagger_starts_those_that_share_a_gpu_one_after_the_other() -> None:
    deploying = [state("x", "DEPLOYING")] * 3
    names = ("a", "b", "whole")
    cluster = ScriptedCluster({n: [*deploying, state(n, "RUNNING")] for n in names})
    seen: list[set[str]] = []

    def note(progress: list[app.Progress]) -> None:
        busy = ("submitting", "starting replicas 0/0")
        seen.append({p.application.name for p in progress if p.words in busy})

    whole = app.Action(spec("whole"), app.Change.CREATE, "1")
    options = app.Options("c", stagger=True, max_workers=3, smoke_test=False)
    outcomes = app.deploy([sharing("a"), sharing("b"), whole], cluster, app.Board(), options, note)
    assert set(results(outcomes).values()) == {"RUNNING"}
    assert not any({"a", "b"} <= busy for busy in seen)
    assert any("whole" in busy and busy & {"a", "b"} for busy in seen)


def test_a_broken_promise_makes_the_exit_code_1_and_leaves_it_running() -> None:
    cluster = ScriptedCluster()
    cluster.held = {"a": (app.Reservation("D", "r", {"CPU": 2.0}, ("n",)),)}
    outcomes = run(cluster, "a", "b", smoke_test=False)
    assert results(outcomes) == {"a": "RUNNING", "b": "RUNNING"}
    assert outcomes[0].proof
    assert outcomes[0].proof.mismatches[0].startswith("D: promised 1 CPU, reserved 2")
    assert app.exit_code(outcomes, 0) == 1


def test_a_bad_answer_is_undone_as_asked() -> None:
    cluster = ScriptedCluster()
    cluster.answers = {"http://localhost:8000/a/health": app.Response(500, "oh no", 0, 0)}
    outcomes = run(cluster, "a", "b", on_failure="delete")
    assert results(outcomes) == {"a": "FAILED", "b": "RUNNING"}
    assert outcomes[0].cause
    assert outcomes[0].cause.text == "GET http://localhost:8000/a/health: 500 oh no"
    assert cluster.deleted == ["a"]


def test_deletions_come_first_and_wait_until_nothing_is_held() -> None:
    cluster = ScriptedCluster({"old": [state("old", "RUNNING"), state("old", "DELETING"), None]})
    cluster.submitted.append("old")
    before = app.Running(state("old", "RUNNING"))
    deletion = app.Action(spec("old"), app.Change.DELETE, before=before)
    create = app.Action(spec("new"), app.Change.CREATE, "1")
    options = app.Options("c", smoke_test=False)
    outcomes = app.deploy([deletion, create], cluster, app.Board(), options, lambda progress: None)
    assert results(outcomes) == {"old": "DELETED", "new": "RUNNING"}
    assert cluster.deleted == ["old"]
    assert cluster.submitted == ["old", "new"]
