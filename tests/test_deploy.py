"""Section 10 on a scripted cluster: what overlaps, what waits, what ends a wait."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from ray.serve.schema import ApplicationDetails

import app_v5 as app

CPU_NODE = app.Node("node", {"CPU": 4.0}, {"CPU": 4.0})
HTTP = "http://localhost:8000"


def spec(name: str, *models: app.ModelSpec) -> app.ApplicationSpec:
    config = {"name": name, "import_path": "m:a"}
    return app.ApplicationSpec(0, name, f"/{name}", config, models)


def create(name: str, *models: app.ModelSpec) -> app.Action:
    return app.Action(spec(name, *models), "create", "1")


def demand(name: str, cpus: float = 1.0) -> app.Demand:
    return app.Demand(name, "D", ({"CPU": cpus},))


def holding(name: str, replica_id: str = "r", **resources: float) -> app.Reservation:
    return app.Reservation(name, "D", replica_id, "1", "n", resources)


def state(name: str, status: str, message: str = "", *deployments: app.Config) -> Any:
    """An application as Serve tells of it."""
    return ApplicationDetails.model_validate(
        {
            "name": name,
            "route_prefix": f"/{name}",
            "docs_path": None,
            "status": status,
            "message": message,
            "last_deployed_time_s": 0,
            "source": "imperative",
            "external_scaler_enabled": False,
            "deployments": {row["name"]: row for row in deployments},
        }
    )


def deployment(
    name: str, status: str, *replicas: app.Config, message: str = "", **keys: Any
) -> app.Config:
    return {
        "name": name,
        "status": status,
        "status_trigger": "UNSPECIFIED",
        "message": message,
        "deployment_config": {"name": name},
        "target_num_replicas": max(1, len(replicas)),
        "required_resources": {"CPU": 1},
        "replicas": list(replicas),
        **keys,
    }


def replica(name: str, status: str = "RUNNING", **keys: Any) -> app.Config:
    """One on the node "n", unless it has none yet."""
    return {
        "replica_id": name,
        "state": status,
        "node_id": "n",
        "actor_id": f"actor-{name}",
        "start_time_s": 1.0,
        **keys,
    }


FAILING = deployment("D", "DEPLOY_FAILED", replica("r", "STARTING"))


class ScriptedCluster:
    """A cluster whose applications run as soon as they are submitted, unless a script says else.

    `script` gives an application's states, one a poll after its submission; the last one stays.
    Under "NAME #2" stand those after its second submission, where they are others.
    """

    def __init__(self, script: Mapping[str, Sequence[Any]] | None = None) -> None:
        self.script = script or {}
        self.lock = threading.Lock()
        self.submitted: list[str] = []
        self.deleted: list[str] = []
        self.done: list[str] = []
        self.polls: dict[str, int] = {}
        self.building = self.most_building = 0
        self.gates: dict[str, threading.Event] = {}
        self.hanging: dict[str, threading.Event] = {}  # calls of Ray that do not come back
        self.errors: dict[str, Exception] = {}
        self.demands: dict[str, tuple[app.Demand, ...]] = {}
        self.holds: list[app.Reservation] = []  # one less each time
        self.held: list[app.Reservation] = []
        self.answers: dict[str, app.Response | Exception] = {}
        self.log: str | Exception = ""
        self.is_alive = True
        self.live = [CPU_NODE]

    dashboard_url = ""

    def alive(self) -> bool:
        return self.is_alive

    def build(self, action: app.Action, check: Callable[[], None]) -> tuple[app.Demand, ...]:
        with self.lock:
            self.building += 1
            self.most_building = max(self.most_building, self.building)
        try:
            gate = self.gates.get(action.name)
            while gate and not gate.wait(0.01):
                check()
        finally:
            with self.lock:
                self.building -= 1
        if action.name in self.errors:
            raise self.errors[action.name]
        return self.demands.get(action.name, (demand(action.name),))

    def submit(self, action: app.Action) -> None:
        if action.name in self.hanging:
            self.hanging[action.name].wait(20)
        with self.lock:
            self.submitted.append(action.name)
            self.done.append(f"submit {action.name} {action.version}")

    def delete(self, name: str) -> None:
        self.deleted.append(name)
        self.done.append(f"delete {name}")

    def nodes(self, giving_way: Collection[str]) -> list[app.Node]:
        return self.live

    def states(self, timeout_s: float) -> dict[str, Any]:
        with self.lock:
            found = {}
            for name in self.submitted:
                key = f"{name} #{self.submitted.count(name)}"
                states = self.script.get(key, self.script.get(name, [state(name, "RUNNING")]))
                index = min(self.polls.get(key, 0), len(states) - 1)
                self.polls[key] = index + 1
                if states[index] is not None:
                    found[name] = states[index]
            return found

    def reservations(self) -> list[app.Reservation]:
        return [self.holds.pop()] if self.holds else self.held

    def endpoint(self) -> str:
        return HTTP

    def replica_log(self, actor_id: str, state: str = "") -> str:
        if isinstance(self.log, Exception):
            raise self.log
        return self.log

    def fetch(
        self, url: str, body: app.Config | None = None, timeout_s: float = 0.0
    ) -> app.Response:
        """Stands for `app.fetch`."""
        routes = (200, json.dumps({f"/{n}": n for n in self.submitted}), 0)
        default = routes if url.endswith("/-/routes") else (200, "{}", 0.2)
        answer = self.answers.get(url.removeprefix(HTTP), default)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr(app, "HEARTBEAT_INTERVAL_S", 0.01)
    monkeypatch.setattr(app, "STOP_GRACE_S", 0.1)
    monkeypatch.setattr(app, "PROXY_TIMEOUT_S", 0.05)


def deploy(
    cluster: ScriptedCluster,
    *actions: app.Action | str,
    workers: int = 3,
    show: Callable[[app.Run], None] = lambda run: None,
    **options: Any,
) -> app.Run:
    """Carry out actions; a name is that of a new application. `show` sees every change."""
    run = app.Run(app.Options("config.yaml", max_workers=workers, **options), cluster)
    wanted = [create(action) if isinstance(action, str) else action for action in actions]
    with patch.object(app, "fetch", cluster.fetch):
        app.deploy(wanted, run, show)
    return run


def results(run: app.Run) -> dict[str, str]:
    return {action.name: action.result for action in run.actions if action.result}


def code(run: app.Run) -> int:
    return app.exit_code(run)


def causes(run: app.Run) -> list[str]:
    return [action.cause for action in run.actions if action.cause]


# -- who deploys when ----------------------------------------------------------------------------


def test_applications_deploy_at_once_and_stay_in_the_order_of_the_file() -> None:
    cluster = ScriptedCluster()
    cluster.gates = {name: threading.Event() for name in "abc"}

    def open_gates_when_all_build(run: app.Run) -> None:
        if cluster.building == 3:
            for name in "cba":
                cluster.gates[name].set()

    run = deploy(cluster, "a", "b", "c", show=open_gates_when_all_build)
    assert cluster.most_building == 3
    assert list(results(run).items()) == [(name, "RUNNING") for name in "abc"]
    assert code(run) == 0


def test_one_worker_starts_the_next_when_the_one_before_has_settled() -> None:
    deploying = state("a", "DEPLOYING")
    cluster = ScriptedCluster({"a": [deploying, deploying, state("a", "RUNNING")]})
    seen: list[list[tuple[str, str]]] = []
    deploy(
        cluster,
        "a",
        "b",
        workers=1,
        show=lambda run: seen.append([(item.words, item.detail) for item in run.actions]),
    )
    assert cluster.most_building == 1
    assert {b for a, b in seen if a[0] != "RUNNING"} == {("queued", "behind a")}


@pytest.mark.parametrize(
    ("applications", "cores", "wanted", "expected"),
    [
        pytest.param(6, 4, 0, 4, id="as many as cores"),
        pytest.param(6, 1, 0, 2, id="at least two"),
        pytest.param(1, 8, 0, 1, id="no more than applications"),
        pytest.param(3, 8, 1, 1, id="as wanted"),
    ],
)
def test_how_many_deploy_at_once(applications: int, cores: int, wanted: int, expected: int) -> None:
    cluster = ScriptedCluster()
    cluster.live = [app.Node(f"n{i}", {"CPU": 1.0}, {"CPU": 1.0}) for i in range(cores)]
    names = "abcdef"[:applications]
    cluster.gates = {name: threading.Event() for name in names}

    def open_gates(run: app.Run) -> None:
        if cluster.building >= expected:
            for gate in cluster.gates.values():
                gate.set()

    assert code(deploy(cluster, *names, workers=wanted, show=open_gates, allow_pending=True)) == 0
    assert cluster.most_building == expected


def test_deletions_come_first_and_wait_until_nothing_is_held() -> None:
    cluster = ScriptedCluster({"old": [state("old", "RUNNING"), state("old", "DELETING"), None]})
    cluster.submitted.append("old")
    cluster.holds = [holding("other", CPU=9.0), *[holding("old", CPU=1.0)] * 20]
    old = app.deletion(spec("old"), (state("old", "RUNNING"), "", None), "--prune")
    absent = app.deletion(spec("absent"), None, "--prune")
    seen: set[str] = set()

    def note(run: app.Run) -> None:
        seen.update(action.detail for action in run.actions)

    run = deploy(cluster, create("new"), old, absent, show=note)
    assert results(run) == {"new": "RUNNING", "old": "DELETED", "absent": "DELETED"}
    *deletions, last = cluster.done
    assert (sorted(deletions), last) == (["delete absent", "delete old"], "submit new 1")
    assert not cluster.holds
    assert "it still holds 1.0 CPUs" in seen


# -- what fails alone ----------------------------------------------------------------------------


def test_one_that_fails_to_build_or_to_start_leaves_the_others_running() -> None:
    cluster = ScriptedCluster(
        {"b": [state("b", "DEPLOYING"), state("b", "DEPLOY_FAILED", "oh no")]}
    )
    cluster.errors["a"] = app.ApplicationError("ModuleNotFoundError: No module named 'x'")
    run = deploy(cluster, "a", "b", "c")
    assert results(run) == {"a": "FAILED", "b": "FAILED", "c": "RUNNING"}
    assert causes(run) == ["ModuleNotFoundError: No module named 'x'", "oh no"]
    assert code(run) == 1


def test_a_defect_met_with_one_application_is_its_failure_alone() -> None:
    cluster = ScriptedCluster()
    cluster.errors["a"] = KeyError("unforeseen")
    run = deploy(cluster, "a", "b")
    assert results(run) == {"a": "FAILED", "b": "RUNNING"}
    assert "Traceback" in run.actions[0].trace
    assert code(run) == 1


@pytest.mark.parametrize("error", [app.ApplicationError("oh no"), KeyError("unforeseen")])
def test_what_can_not_be_built_fails_the_plan_alone(error: Exception) -> None:
    cluster = ScriptedCluster()
    cluster.errors["a"] = error
    run = app.Run(app.Options("config.yaml", timeout=0.3, plan=True), cluster)
    run.actions = [create("a"), create("b"), create("hangs")]
    cluster.gates["hangs"] = threading.Event()
    app.in_workers(run.actions, run, lambda run: None)
    assert results(run) == {"a": "FAILED", "hangs": "STILL DEPLOYING"}
    assert cluster.submitted == []
    assert run.actions[1].demands == (demand("b"),)
    assert causes(run)[-1] == "time ran out while building"
    assert code(run) == 1


def test_a_plan_builds_all_at_once_however_few_cpus_there_are() -> None:
    cluster = ScriptedCluster()
    cluster.live = [app.Node("node", {"CPU": 1.0}, {"CPU": 1.0})]
    cluster.gates = {name: threading.Event() for name in "ab"}
    run = app.Run(app.Options("config.yaml", timeout=0.3, plan=True), cluster)
    run.actions = [create("a"), create("b"), create("c")]
    app.in_workers(run.actions, run, lambda run: None)
    assert results(run) == {"a": "STILL DEPLOYING", "b": "STILL DEPLOYING"}
    assert cluster.most_building == 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (app.ClusterError("the dashboard does not answer"), "ValueError: too long"),
        (RuntimeError("odd"), "RuntimeError: Engine failed. See root cause above."),
    ],
)
def test_a_log_that_can_not_be_read_is_no_failure_and_is_said(
    error: Exception, message: str
) -> None:
    cluster = ScriptedCluster({"a": [state("a", "DEPLOY_FAILED", message, FAILING)]})
    cluster.log = error
    run = deploy(cluster, "a")
    assert (results(run), causes(run)) == ({"a": "FAILED"}, [message])
    assert run.actions[0].hint == f"there is no log of it: {error}"


def test_the_log_of_what_failed_tells_more_than_serve() -> None:
    cluster = ScriptedCluster({"a": [state("a", "DEPLOY_FAILED", "see the logs", FAILING)]})
    cluster.log = "Traceback (most recent call last):\n  File ...\nValueError: torn weights\n"
    assert causes(deploy(cluster, "a")) == ["ValueError: torn weights"]


def test_what_is_being_deleted_already_is_waited_for() -> None:
    cluster = ScriptedCluster()
    cluster.holds = [holding("team/a", GPU=1.0)] * 2
    run = deploy(cluster, app.deletion(spec("team/a"), None, "--delete"))
    assert (results(run), cluster.deleted, cluster.holds) == ({"team/a": "DELETED"}, ["team/a"], [])


def test_an_application_deleted_by_somebody_else_is_not_waited_for() -> None:
    for after in (None, state("a", "DELETING")):
        run = deploy(ScriptedCluster({"a": [state("a", "DEPLOYING"), after]}), "a")
        assert results(run) == {"a": "FAILED"}
        assert causes(run) == ["the application was deleted while it was being deployed"]


def test_unhealthy_for_a_moment_is_not_a_failure_and_for_long_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blip = [state("a", "UNHEALTHY"), state("a", "RUNNING")]
    assert results(deploy(ScriptedCluster({"a": blip}), "a")) == {"a": "RUNNING"}
    monkeypatch.setattr(app, "UNHEALTHY_GRACE_S", 0.1)
    stays = deploy(ScriptedCluster({"a": [state("a", "UNHEALTHY", "check_health raised")]}), "a")
    assert (results(stays), causes(stays)) == ({"a": "FAILED"}, ["check_health raised"])


# -- what ends a wait ----------------------------------------------------------------------------


def test_time_runs_out_for_one_and_the_others_are_not_held_up() -> None:
    cluster = ScriptedCluster({"a": [state("a", "DEPLOYING", "", FAILING)]})
    run = deploy(cluster, "a", "b", timeout=0.3)
    assert results(run) == {"a": "STILL DEPLOYING", "b": "RUNNING"}
    assert code(run) == 4
    lines = app.format_summary(run)
    assert "   Cause: time ran out while starting replicas 0/1" in lines
    assert any("It was handed to Serve" in line for line in lines)


def test_a_builder_that_hangs_runs_out_of_time_and_nothing_was_submitted() -> None:
    cluster = ScriptedCluster()
    cluster.gates["a"] = threading.Event()
    run = deploy(cluster, "a", "b", timeout=0.3)
    assert results(run) == {"a": "STILL DEPLOYING", "b": "RUNNING"}
    assert causes(run) == ["time ran out while building"]
    assert (code(run), cluster.submitted) == (4, ["b"])


def test_a_stop_ends_every_wait_and_says_what_was_submitted() -> None:
    cluster = ScriptedCluster({"sent": [state("sent", "DEPLOYING")]})
    cluster.hanging["handed over"] = threading.Event()

    def stop_once_submitted(run: app.Run) -> None:
        if [action.sent for action in run.actions] == [True, True, False]:
            run.stop(130, "SIGINT")
            run.stop(3, "the cluster was lost meanwhile")

    started = time.monotonic()
    run = deploy(cluster, "sent", "handed over", "queued", workers=2, show=stop_once_submitted)
    assert time.monotonic() - started < 5
    assert set(results(run).values()) == {"INTERRUPTED"}
    assert (code(run), run.stop_reason) == (130, "SIGINT")
    said = [app.format_unfinished(action)[1] for action in run.actions]
    assert said == [
        "   It was handed to Serve, which may go on; this program no longer watches it",
        "   It was handed to Serve, which may go on; this program no longer watches it",
        "   It was not submitted",
    ]
    cluster.hanging["handed over"].set()


def test_a_head_node_that_is_gone_ends_the_run_even_where_a_call_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "CLUSTER_LOST_AFTER_S", 0.2)
    cluster = ScriptedCluster({"a": [state("a", "DEPLOYING")]})
    cluster.hanging["b"] = threading.Event()
    cluster.is_alive = False
    started = time.monotonic()
    run = deploy(cluster, "a", "b", "queued", workers=2)
    assert 0.2 < time.monotonic() - started < 5
    assert results(run) == {"a": "UNKNOWN", "b": "UNKNOWN", "queued": "INTERRUPTED"}
    assert (code(run), run.stop_reason) == (3, "the head node has not answered for 0 s")
    cluster.hanging["b"].set()


def test_a_head_node_that_answers_again_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "CLUSTER_LOST_AFTER_S", 0.5)
    cluster = ScriptedCluster({"a": [state("a", "DEPLOYING")] * 20 + [state("a", "RUNNING")]})
    answers = iter([False, False, False])
    with patch.object(cluster, "alive", lambda: next(answers, True)):
        assert results(deploy(cluster, "a")) == {"a": "RUNNING"}


def silent(times: float) -> Callable[[float], dict[str, Any]]:
    """A controller that does not answer the first polls."""
    left = [times]

    def states(timeout_s: float) -> dict[str, Any]:
        left[0] -= 1
        if left[0] >= 0:
            raise app.ClusterError("the Serve controller does not answer")
        return {"a": state("a", "RUNNING")}

    return states


def test_a_controller_is_waited_for_and_one_that_never_comes_back_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = ScriptedCluster()
    with patch.object(cluster, "states", silent(5)):
        assert results(deploy(cluster, "a")) == {"a": "RUNNING"}
    monkeypatch.setattr(app, "CONTROLLER_LOST_AFTER_S", 0.2)
    with patch.object(cluster, "states", silent(10**9)):
        run = deploy(cluster, "a")
    assert (results(run), code(run)) == ({"a": "UNKNOWN"}, 3)
    assert run.stop_reason.startswith("Serve's controller has not answered for 0 s (ClusterError(")


def test_a_cluster_that_is_lost_between_two_stages_keeps_what_the_first_has_reached() -> None:
    cluster = ScriptedCluster({"old": [None]})
    cluster.submitted.append("old")
    old = app.deletion(spec("old"), (state("old", "RUNNING"), "", None), "--prune")
    lost = app.ClusterError("the head has gone")
    with patch.object(cluster, "nodes", side_effect=[[CPU_NODE], lost]):
        run = deploy(cluster, old, create("new"))
    assert results(run) == {"old": "DELETED", "new": "INTERRUPTED"}
    assert (code(run), run.stop_reason) == (3, "the head has gone")


def test_a_watcher_with_a_defect_does_not_leave_everybody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "CONTROLLER_LOST_AFTER_S", 0.2)
    cluster = ScriptedCluster()
    with patch.object(cluster, "states", side_effect=KeyError("node_ip")):
        run = deploy(cluster, "a")
    assert (results(run), code(run)) == ({"a": "UNKNOWN"}, 3)
    assert "KeyError('node_ip')" in run.stop_reason


@pytest.mark.parametrize(
    ("found", "stop", "code"),
    [
        pytest.param([], 0, 0, id="nothing to do"),
        pytest.param(["RUNNING", "DELETED"], 0, 0, id="all is well"),
        pytest.param(["RUNNING", "STILL DEPLOYING"], 0, 4, id="time ran out"),
        pytest.param(["STILL DEPLOYING", "FAILED"], 0, 1, id="a failure before a timeout"),
        pytest.param(["FAILED", "UNKNOWN"], 0, 3, id="a lost cluster before a failure"),
        pytest.param(["FAILED", "UNKNOWN"], 143, 143, id="a signal before all"),
        pytest.param(["INTERRUPTED"], 129, 129, id="SIGHUP"),
    ],
)
def test_exit_codes_when_mixed(found: list[Any], stop: int, code: int) -> None:
    actions = [create("a") for _ in found]
    for action, word in zip(actions, found, strict=True):
        action.result = word
    run = app.Run(app.Options("c"), ScriptedCluster({}), actions=actions, stop_code=stop)
    assert app.exit_code(run) == code


# -- what fits -----------------------------------------------------------------------------------


def test_what_can_never_fit_fails_before_it_is_submitted_and_what_waits_is_deployed() -> None:
    unplaced = deployment("D", "UPDATING", replica("r", "STARTING", node_id=None))
    waits = [state("waits", "DEPLOYING", "", unplaced)] * 20
    cluster = ScriptedCluster({"waits": [*waits, state("waits", "RUNNING")]})
    cluster.demands = {
        "first": (demand("first", 3),),
        "never": (demand("never", 5),),
        "waits": (demand("waits", 2),),
    }
    seen: set[tuple[str, str]] = set()

    def note(run: app.Run) -> None:
        seen.update((action.words, action.detail) for action in run.actions)

    run = deploy(cluster, "first", "never", "waits", workers=1, show=note)
    assert results(run) == {"first": "RUNNING", "never": "FAILED", "waits": "RUNNING"}
    assert cluster.submitted == ["first", "waits"]
    assert causes(run) == [
        "never/D: predicted: can never fit; needs 5 CPU; the most free in one place is 4 "
        "(node node)"
    ]
    waiting = (
        "waits/D: predicted: does not fit now; needs 2 CPU; the most free in one place is 1 "
        "(node node, held by first/D 3)"
    )
    assert ("waiting for resources", waiting) in seen


def test_a_cluster_that_grows_gets_what_no_node_can_hold_yet() -> None:
    cluster = ScriptedCluster()
    cluster.demands = {"big": (demand("big", 5),)}
    assert results(deploy(cluster, "big", allow_pending=True)) == {"big": "RUNNING"}
    assert cluster.submitted == ["big"]


@pytest.mark.parametrize(("surge", "gives_way"), [(True, set[str]()), (False, {"a"})])
def test_what_starts_beside_the_old_replicas_needs_room_for_those_at_a_time_alone(
    surge: bool, gives_way: set[str]
) -> None:
    rows = deployment("D", "HEALTHY", *map(replica, "pqr"))
    before = state("a", "RUNNING", "", rows)
    cluster, details = ScriptedCluster(), list[str]()
    cluster.demands = {"a": (app.Demand("a", "D", ({"CPU": 1.0},), "PACK", 3, 3, 3),)}
    tight = app.Node("node", {"CPU": 4.0}, {"CPU": 1.0})
    edit = app.Action(spec("a"), "RESTART", "2", before=before, surge=surge)
    with (
        patch.object(cluster, "nodes", return_value=[tight]) as nodes,
        patch.object(cluster, "submit", lambda action: details.append(action.detail)),
    ):
        deploy(cluster, edit, timeout=0.1)
    nodes.assert_called_once_with(gives_way)
    assert ["does not fit now" in text for text in details] == [not surge]


def test_a_builders_name_that_ray_can_not_bear_is_not_submitted() -> None:
    cluster = ScriptedCluster()
    cluster.demands = {"a": (app.Demand("a", "Modèle", ({"CPU": 1.0},)),)}
    run = deploy(cluster, "a")
    assert (results(run), cluster.submitted) == ({"a": "FAILED"}, [])
    assert "'a/Modèle' is not a name for Ray" in causes(run)[0]


def test_an_engines_phase_is_read_in_its_log() -> None:
    cluster = ScriptedCluster({"a": [state("a", "DEPLOYING", "", FAILING)] * 20})
    cluster.log = "INFO [gpu_model_runner.py:1] Starting to load model /m..."
    seen: set[tuple[str, str]] = set()

    def note(run: app.Run) -> None:
        seen.update((action.words, action.detail) for action in run.actions)

    deploy(cluster, "a", timeout=0.5, show=note)
    assert ("starting replicas 0/1", "loading weights") in seen


STARTING = replica("r", "STARTING")


@pytest.mark.parametrize(
    ("row", "waits_for", "expected"),
    [
        pytest.param(
            deployment("D", "UPDATING", replica("q"), STARTING),
            "",
            ("starting replicas 1/2", "loading weights"),
            id="an engine's phase",
        ),
        pytest.param(
            deployment("D", "UPDATING", {**STARTING, "node_id": None}),
            "needs 0.45 GPU; held by x",
            ("waiting for resources", "needs 0.45 GPU; held by x"),
            id="what the plan says that it waits for",
        ),
        pytest.param(
            deployment("D", "UPDATING", STARTING),
            "needs 0.45 GPU; held by x",
            ("starting replicas 0/1", "loading weights"),
            id="placed after all",
        ),
        pytest.param(
            deployment(
                "D",
                "UPDATING",
                STARTING,
                message="A replica failed to start with exception. Retrying. Error:\n"
                "Traceback (most recent call last):\nZeroDivisionError: no",
            ),
            "",
            ("starting replicas 0/1", "a replica failed: ZeroDivisionError: no"),
            id="the cause from the first attempt on",
        ),
        pytest.param(
            deployment(
                "D",
                "UPDATING",
                {**STARTING, "node_id": None},
                message="Deployment 'D' in application 'a' has 1 replicas that have taken more "
                "than 30s to be scheduled. This may be due to waiting for the cluster to "
                'auto-scale. Resources required for each replica: {"CPU": 10.0}, total resources '
                'available: {"CPU": 6.0}. Use `ray status` for more details.',
            ),
            "",
            (
                "waiting for resources",
                "1 replicas that have taken more than 30s to be scheduled. This may be due to "
                "waiting for the cluster to auto-scale. Resources required for each replica: "
                '{"CPU": 10.0}, total resources available: {"CPU": 6.0}',
            ),
            id="what the plan did not foresee",
        ),
    ],
)
def test_what_a_deploying_application_does_in_words(
    row: app.Config, waits_for: str, expected: tuple[str, str]
) -> None:
    details = state("a", "DEPLOYING", "", row)
    assert app.describe_state(details, waits_for, "loading weights") == expected


# -- engines that disturb each other -------------------------------------------------------------


SHARING = app.ModelSpec("m", "/m", "m", measures_memory=True)
DISTURBED = "AssertionError: Error in memory profiling. Initial free memory 1 GiB"


def test_an_engine_that_was_disturbed_is_tried_again_alone() -> None:
    failed, running = state("a", "DEPLOY_FAILED", DISTURBED), state("a", "RUNNING")
    cluster = ScriptedCluster({"a": [failed], "a #2": [running]})
    slow = [*[state("b", "DEPLOYING")] * 20, state("b", "RUNNING")]
    cluster.script = {**cluster.script, "b": slow}
    run = deploy(cluster, create("a", SHARING), create("b", SHARING), no_smoke_test=True)
    assert results(run) == {"a": "RUNNING", "b": "RUNNING"}
    assert cluster.done[-1] == "submit a 1.2"
    assert (sorted(cluster.submitted), cluster.deleted) == (["a", "a", "b"], [])
    lines = app.format_summary(run)
    assert "   Second attempt, alone: other engines on its GPU disturbed the first" in lines
    assert code(run) == 0


RUNS_ALREADY = app.Action(spec("b", SHARING), "unchanged", "1", before=state("b", "RUNNING"))


@pytest.mark.parametrize(
    ("others", "message", "submissions"),
    [
        pytest.param([create("b", SHARING)], DISTURBED, 2, id="once more"),
        pytest.param([], DISTURBED, 1, id="alone it was disturbed by somebody else"),
        pytest.param([create("b")], DISTURBED, 1, id="no other engine started"),
        pytest.param([RUNS_ALREADY], DISTURBED, 1, id="the other one started long ago"),
        pytest.param([create("b", SHARING)], "ValueError: too long", 1, id="another failure"),
    ],
)
def test_it_is_tried_again_once_and_only_when_another_engine_started_with_it(
    others: list[app.Action], message: str, submissions: int
) -> None:
    cluster = ScriptedCluster({"a": [state("a", "DEPLOY_FAILED", message)]})
    run = deploy(cluster, create("a", SHARING), *others, no_smoke_test=True)
    assert results(run)["a"] == "FAILED"
    assert cluster.submitted.count("a") == submissions


def test_a_stop_in_a_second_attempt_leaves_the_other_failures_as_they_are() -> None:
    script = {name: [state(name, "DEPLOY_FAILED", DISTURBED)] for name in "ab"}
    cluster = ScriptedCluster({**script, "a #2": [state("a", "DEPLOYING")]})

    def stop(run: app.Run) -> None:
        if run.actions[0].attempt == 2 and run.actions[0].sent and run.actions[0].details:
            run.stop(130, "SIGINT")

    run = deploy(cluster, create("a", SHARING), create("b", SHARING), show=stop)
    assert results(run) == {"a": "INTERRUPTED", "b": "FAILED"}
    assert causes(run)[-1].startswith("AssertionError: Error in memory profiling")


SUGGESTS = """\
Desired GPU memory utilization is (0.405, 32.4 GiB). Replace gpu_memory_utilization config with \
`--kv-cache-memory=29370000000` (27.35 GiB) to fit into requested memory, or \
`--kv-cache-memory=79000000000` (73.5 GiB) to fully utilize gpu memory.
"""


def test_the_cache_size_that_an_engine_suggests_is_named() -> None:
    rows = [deployment(f"LLMServer:{name}", "HEALTHY", replica("r")) for name in ("m", "other")]
    cluster = ScriptedCluster({"a": [state("a", "RUNNING", "", *rows)]})
    cluster.log = SUGGESTS
    run = deploy(cluster, create("a", SHARING), no_smoke_test=True)
    [action] = run.actions
    assert action.proof
    text = "engine_kwargs.kv_cache_memory_bytes: 29370000000 keeps what it has"
    assert action.proof.notes == (text, "not asked over HTTP: --no-smoke-test")
    cluster.log = app.ClusterError("no dashboard")
    assert app.suggestions(action, run) == ()
    cluster.log = SUGGESTS
    assert app.suggestions(replace(action, change="unchanged"), run) == ()


def test_a_second_attempt_may_run_out_of_time() -> None:
    failed, stuck = state("a", "DEPLOY_FAILED", DISTURBED), state("a", "DEPLOYING")
    cluster = ScriptedCluster({"a": [failed], "a #2": [stuck]})
    run = deploy(
        cluster, create("a", SHARING), create("b", SHARING), no_smoke_test=True, timeout=0.3
    )
    assert results(run) == {"a": "STILL DEPLOYING", "b": "RUNNING"}


# -- the proof -----------------------------------------------------------------------------------


def test_a_broken_promise_makes_the_exit_code_1_and_leaves_it_running() -> None:
    running = deployment("D", "HEALTHY", replica("r"))
    cluster = ScriptedCluster({"a": [state("a", "RUNNING", "", running)]})
    # What runs no longer, or is another's, was not promised.
    cluster.held = [holding("a", CPU=2.0), holding("a", "gone", CPU=9.0), holding("b", "x", CPU=9)]
    run = deploy(cluster, "a", "b")
    assert results(run) == {"a": "RUNNING", "b": "RUNNING"}
    assert run.actions[0].proof
    assert run.actions[0].proof.mismatches[0] == "D: promised 1.0 CPUs, reserved 2.0 CPUs"
    assert (code(run), cluster.deleted) == (1, [])


def test_a_bad_answer_is_a_failure() -> None:
    cluster = ScriptedCluster()
    cluster.answers = {"/a/health": (500, "oh no", 0)}
    run = deploy(cluster, "a", "b")
    assert results(run) == {"a": "FAILED", "b": "RUNNING"}
    assert causes(run) == ["GET http://localhost:8000/a/health: 500 oh no"]


@pytest.mark.parametrize("path", ["/-/routes", "/a/health"])
def test_what_could_not_be_reached_has_not_failed(path: str) -> None:
    cluster = ScriptedCluster()
    cluster.answers = {path: app.ClusterError("connection refused")}
    run = deploy(cluster, "a")
    assert (results(run), code(run), cluster.deleted) == ({"a": "RUNNING"}, 1, [])
    assert run.actions[0].proof
    assert run.actions[0].proof.unverified == "connection refused"


def test_what_came_up_just_in_time_is_asked_all_the_same() -> None:
    """Its replicas came up a moment before its time was over, and it answers in a second."""
    cluster = ScriptedCluster()

    def fetch(url: str, body: app.Config | None = None, timeout_s: float = 0.0) -> app.Response:
        time.sleep(0.2)
        return ScriptedCluster.fetch(cluster, url, body, timeout_s)

    with patch.object(cluster, "fetch", fetch):
        run = deploy(cluster, "a", timeout=0.3)
    assert (results(run), code(run)) == ({"a": "RUNNING"}, 0)


def test_what_runs_and_is_slow_to_answer_runs_when_a_stop_comes() -> None:
    cluster, answered = ScriptedCluster(), threading.Event()

    def fetch(url: str, body: app.Config | None = None, timeout_s: float = 0.0) -> app.Response:
        if url.endswith("/a/health"):
            run.stop(130, "SIGINT")
            answered.wait(60)
        return ScriptedCluster.fetch(cluster, url, body, timeout_s)

    run = app.Run(app.Options("config.yaml", max_workers=1), cluster)
    with patch.object(app, "fetch", fetch):
        app.deploy([create("a"), create("queued")], run, lambda run: None)
    assert (results(run), code(run)) == ({"a": "RUNNING", "queued": "INTERRUPTED"}, 130)
    assert run.actions[0].proof
    assert run.actions[0].proof.unverified == "SIGINT"
    answered.set()


def test_whose_port_it_is_is_asked_once() -> None:
    """Of a hundred applications each question counts."""
    cluster = ScriptedCluster()
    with patch.object(cluster, "fetch", wraps=cluster.fetch) as fetch:
        run = deploy(cluster, "a", "b", "c", workers=1)
    assert results(run) == dict.fromkeys("abc", "RUNNING")
    asked = [call for call in fetch.mock_calls if call.args[0].endswith("/-/routes")]
    assert len(asked) == app.ROUTE_QUESTIONS + 2


def test_what_runs_unchanged_is_asked_all_the_same() -> None:
    details, kept = state("a", "RUNNING"), app.Record("1", {}, (demand("a"),))
    cluster = ScriptedCluster()
    cluster.submitted.append("a")
    cluster.answers = {"/a/health": (500, "oh no", 0)}
    run = deploy(cluster, app.Action(spec("a"), "unchanged", "1", before=details, record=kept))
    assert (results(run), cluster.done) == ({"a": "FAILED"}, [])


@pytest.mark.parametrize(
    ("application", "demands", "options", "reason"),
    [
        pytest.param(spec("a"), (), {"no_smoke_test": True}, "--no-smoke-test", id="as asked"),
        pytest.param(
            app.ApplicationSpec(0, "a", None, {}), (), {}, "it has no HTTP route", id="no route"
        ),
        pytest.param(
            spec("a"),
            (app.Demand("a", "Asleep", ({"CPU": 1.0},), min_replicas=0, ingress=True),),
            {},
            "its ingress has scaled to zero",
            id="asleep",
        ),
    ],
)
def test_what_is_not_asked_is_said(
    application: app.ApplicationSpec,
    demands: tuple[app.Demand, ...],
    options: dict[str, Any],
    reason: str,
) -> None:
    asleep = deployment("Asleep", "HEALTHY", target_num_replicas=0)
    cluster = ScriptedCluster({"a": [state("a", "RUNNING", "", asleep)]})
    cluster.demands = {"a": demands}
    run = deploy(cluster, app.Action(application, "create", "1"), **options)
    assert run.actions[0].proof
    assert run.actions[0].proof.notes == (f"not asked over HTTP: {reason}",)
    assert code(run) == 0
