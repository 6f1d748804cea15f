"""Section 13: what a run decides beside another one, and what a signal leaves: without Ray."""

from __future__ import annotations

import io
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import app_v5 as app
from cluster import APP_V5, PYTHON, ROOT, run_python
from test_deploy import state

CONFIG = """
applications:
- {name: mine, route_prefix: /mine, import_path: 'm:a'}
- {name: new, route_prefix: /old, import_path: 'm:a'}
"""
HOLDER = "process 7 on 10.0.0.1"


class Cluster:
    """What a session asks before it deploys; `claimed` is what each call of `claims` knows."""

    dashboard_url = ""

    def __init__(self, *claimed: set[str]) -> None:
        self.claimed = [set(names) for names in claimed] or [set[str]()]
        self.connected_for: list[str] = []

    def __getattr__(self, name: str) -> Any:
        found: app.Config = {"check_values": [], "nodes": [], "endpoint": "", "autoscales": False}
        return lambda *arguments, **keys: found.get(name)

    def connect(self, address: str, claims: list[str]) -> None:
        self.connected_for = claims

    def claims(self) -> dict[str, str]:
        held = self.claimed.pop(0) if len(self.claimed) > 1 else self.claimed[0]
        return dict.fromkeys(held, HOLDER)

    def states(self) -> dict[str, Any]:
        states = [state("old", "RUNNING"), state("gone", "DELETING")]
        return {details.name: details for details in states}

    def running(self, found: Any) -> dict[str, app.Running]:
        return {details.name: (details, "", None) for details in found}

    def fingerprint_key(self, *, make: bool) -> bytes:
        return b"key"


def session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any, *options: str
) -> tuple[app.Session, list[app.Action], str]:
    """A session that has come to its deployment: its actions, and what it has said."""
    monkeypatch.setattr(app, "POLL_INTERVAL_S", 0.01)
    actions: list[app.Action] = []

    def deploy(given: list[app.Action], run: app.Run, show: Any) -> None:
        actions.extend(given)

    monkeypatch.setattr(app, "deploy", deploy)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    err = io.StringIO()
    made = app.Session(app.parse_options([str(config), *options]), cluster, io.StringIO(), err)
    made.work()
    return made, actions, err.getvalue()


def test_what_another_run_works_on_is_refused_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster({"mine", "old"})
    _, actions, _ = session(tmp_path, monkeypatch, cluster, "--prune")
    assert cluster.connected_for == ["mine", "new"]
    refused = {action.name: action.cause for action in actions}
    text = f"another run of this program works on it: {HOLDER}"
    assert refused == {"old": text, "mine": text, "new": ""}


def test_a_process_that_can_not_be_started_ahead_is_told_by_its_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Cluster):
        def process_of(self, application: app.ApplicationSpec) -> None:
            raise ValueError("nowhere.txt is not a valid file")

    _, actions, said = session(tmp_path, monkeypatch, Broken(), "--prune")
    assert [action.name for action in actions] == ["old", "mine", "new"]
    assert "defect" not in said


def test_a_route_is_free_once_its_owner_is_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, actions, said = session(tmp_path, monkeypatch, Cluster())
    assert (made.code, actions) == (2, [])
    assert "config.yaml:4:15: applications[1].route_prefix: /old is the route of old" in said
    made, actions, said = session(tmp_path, monkeypatch, Cluster(), "--prune")
    assert [(action.name, action.change) for action in actions] == [
        ("old", "delete"),
        ("mine", "create"),
        ("new", "create"),
    ]
    kept, actions, _ = session(tmp_path, monkeypatch, Cluster(), "--only", "mine")
    assert [action.name for action in actions] == ["mine"]
    assert [details.name for details in kept.run.others] == ["old"]
    _, actions, _ = session(tmp_path, monkeypatch, Cluster(), "--delete")
    assert [(action.name, action.change) for action in actions] == [
        ("mine", "delete"),
        ("new", "delete"),
    ]


PROGRAM = """
import os, sys, time
import app_v5 as app
from test_session import Cluster

class Hanging(Cluster):
    def build(self, application, check):
        time.sleep(600)

app.STOP_GRACE_S = 0.2
app.RayCluster = lambda worker_logs: Hanging()
os._exit(app.main(sys.argv[1:]))
"""


def test_a_plan_that_hangs_ends_with_a_signal_and_has_deployed_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [PYTHON, "-c", PROGRAM, str(config), "--plan", "--only", "mine"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr
        assert process.stdout
        while "building" not in (line := process.stderr.readline()):
            assert line, "it has ended too early"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read().splitlines()[-1] == "🛑 SIGTERM: nothing was deployed"
        assert process.stdout.read() == ""
    assert process.returncode == 143


def test_a_policy_whose_module_ends_the_process_is_a_problem_of_the_config() -> None:
    class Ending:
        @staticmethod
        def model_validate(data: object) -> None:
            raise SystemExit("not on this machine")

    [problem] = app.schema_problems(Ending, ("applications", 0), {})
    assert (problem.path, problem.message) == (("applications", 0), "not on this machine")


def test_without_what_it_needs_the_program_says_how_to_install_that() -> None:
    ended = run_python("-S", str(APP_V5), "config.yaml", env=dict(os.environ), timeout_s=60)
    line = "❌ ray, fastapi, rich, yaml: not installed; pip install -r requirements.txt\n"
    assert (ended.returncode, ended.stderr, ended.stdout) == (1, line, "")


@pytest.mark.parametrize(
    ("options", "running", "code"),
    [
        pytest.param(["--detailed-exitcode"], False, 5, id="something to create"),
        pytest.param(["--detailed-exitcode"], True, 0, id="nothing to do"),
        pytest.param([], False, 0, id="not asked for"),
    ],
)
def test_a_plan_tells_whether_a_run_would_change_something(
    options: list[str], running: bool, code: int
) -> None:
    change: app.Change = "unchanged" if running else "create"
    spec = app.ApplicationSpec(0, "a", "/a", {})
    absent = app.deletion(spec, None, "--delete")  # to delete what is not there changes nothing
    given = app.Options("config.yaml", plan=True, detailed_exitcode=bool(options))
    cluster: Any = Cluster()
    actions = [app.Action(spec, change), absent]
    run = app.Run(given, cluster, actions=actions, plan=app.predict([], []))
    assert app.exit_code(run) == code
