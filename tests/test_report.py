"""Section 11: what was reached → what people and programs read, line by line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

import app_v5 as app
from cluster import PYTHON, ROOT
from test_deploy import deployment, replica, state

HTTP, DASHBOARD = "http://localhost:8000", "http://localhost:8265"


def falcon(name: str, model: str, source: str, most: int) -> app.Action:
    """One of the two applications of the layout that V5's users know."""
    route, label = f"/{model.removesuffix('-instruct')}", f"{model}-deployment"
    share = {"CPU": 1.0, "GPU": 0.45}
    return app.Action(
        app.ApplicationSpec(0, name, route, {}, (app.ModelSpec(model, source, label, share),)),
        "create",
        "1",
        result="RUNNING",
        words="RUNNING",
        started=0.0,
        ended=61.0,
        sent=True,
        demands=(
            app.Demand(name, f"LLMServer:{label}", (share,), max_replicas=most),
            app.Demand(name, "OpenAiIngress", ({"CPU": 1.0},), ingress=True),
        ),
    )


FALCON3 = ("falcon3-1b-instruct-app", "falcon3-1b-instruct", "tiiuae/Falcon3-1B-Instruct", 3)
FALCON_H1 = (
    "falcon-h1-0.5b-instruct-app",
    "falcon-h1-0.5b-instruct",
    "tiiuae/falcon-h1-0.5b-instruct",
    5,
)
LAYOUT = f"""\
{"=" * 80}
✅ Deployment Summary
{"=" * 80}
Total applications deployed: 2/2 in 1 min 15 s

📋 Successfully Deployed Applications:
{"-" * 80}

• falcon3-1b-instruct-app
   Model: tiiuae/Falcon3-1B-Instruct
   Model ID: falcon3-1b-instruct
   Resources per replica: 1.0 CPUs, 0.45 GPUs
   Replicas: 1 → 3 (autoscaling)
   OpenAiIngress (ingress): 1.0 CPUs per replica, replicas 1
   Base URL: http://localhost:8000/falcon3-1b
   Endpoints:
     • POST /falcon3-1b/v1/chat/completions
     • POST /falcon3-1b/v1/completions
     • GET  /falcon3-1b/v1/models

• falcon-h1-0.5b-instruct-app
   Model: tiiuae/falcon-h1-0.5b-instruct
   Model ID: falcon-h1-0.5b-instruct
   Resources per replica: 1.0 CPUs, 0.45 GPUs
   Replicas: 1 → 5 (autoscaling)
   OpenAiIngress (ingress): 1.0 CPUs per replica, replicas 1
   Base URL: http://localhost:8000/falcon-h1-0.5b
   Endpoints:
     • POST /falcon-h1-0.5b/v1/chat/completions
     • POST /falcon-h1-0.5b/v1/completions
     • GET  /falcon-h1-0.5b/v1/models

{"=" * 80}
🔥 All deployments completed!
💡 Ray Dashboard: http://localhost:8265
💡 Check deployment status and resource usage in the dashboard
{"=" * 80}"""
"""The layout of V5's own summary, with what there is to say besides: the time it took, and what the
ingress of each application holds."""


def running() -> app.Action:
    return falcon(*FALCON3)


def failed(**keys: Any) -> app.Action:
    """The same application, which did not come up."""
    dead = replica("r", "STOPPED", actor_id="abc")
    rows = deployment("D", "DEPLOY_FAILED", recent_dead_replicas=[dead])
    given = {
        "result": "FAILED",
        "ended": 12.4,
        "cause": "ValueError: too long",
        "hint": "set max_model_len to 256 or less",
        "details": state(FALCON3[0], "DEPLOY_FAILED", "", rows),
        **keys,
    }
    return replace(running(), **given)


def report(*actions: app.Action, options: app.Options | None = None, **keys: Any) -> app.Run:
    """A run that has ended, 75 s after it began, so that nothing is asked of a cluster."""
    cluster: Any = SimpleNamespace(endpoint=lambda: HTTP, dashboard_url=DASHBOARD)
    options = options or app.Options("c")
    return app.Run(options, cluster, lambda: 75.0, started=0.0, actions=[*actions], **keys)


# -- the summary ---------------------------------------------------------------------------------


def test_the_summary_has_the_layout_that_v5_always_had() -> None:
    both = report(running(), falcon(*FALCON_H1))
    assert "\n".join(app.format_summary(both)) == LAYOUT


def test_a_failure_says_why_what_would_help_and_where_to_look() -> None:
    lines = app.format_summary(report(running(), failed()))
    assert lines[1] == "⚠️  Deployment Summary"
    assert lines[3] == "Total applications deployed: 1/2 in 1 min 15 s"
    assert "🔥 All deployments completed!" not in lines
    start = lines.index("❌ Not Running:")
    assert lines[start + 1 : -5] == [
        "-" * 80,
        "",
        "• falcon3-1b-instruct-app: FAILED after 12 s",
        "   Cause: ValueError: too long",
        "   Hint: set max_model_len to 256 or less",
        "   Logs: ray logs actor --id abc --tail 400 --err",
        "   Logs: ray logs actor --id abc --tail 400",
    ]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        pytest.param(
            {"result": "INTERRUPTED"},
            "It was handed to Serve, which may go on; this program no longer watches it",
            id="interrupted",
        ),
        pytest.param(
            {"result": "INTERRUPTED", "sent": False},
            "It was not submitted",
            id="interrupted before its turn",
        ),
        pytest.param(
            {"result": "STILL DEPLOYING"},
            "It was handed to Serve, which may go on; this program no longer watches it",
            id="time ran out",
        ),
        pytest.param(
            {"result": "UNKNOWN"},
            "It was handed to Serve, which may go on; this program no longer watches it",
            id="lost",
        ),
    ],
)
def test_what_became_of_the_others(keys: dict[str, Any], line: str) -> None:
    assert f"   {line}" in app.format_unfinished(failed(**keys))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        pytest.param({}, "Still serving from before the edit: 1 of 2 replicas", id="some"),
        pytest.param(
            {"details": state("a", "DEPLOY_FAILED")},
            "Still serving from before the edit: 0 of 2 replicas",
            id="none",
        ),
        pytest.param(
            {"sent": False, "details": None},
            "Still serving from before the edit: 2 of 2 replicas",
            id="all, as it was not touched",
        ),
    ],
)
def test_a_failed_edit_says_what_is_left(keys: dict[str, Any], line: str) -> None:
    old = state("a", "RUNNING", "", deployment("D", "HEALTHY", replica("r1"), replica("r2")))
    now = deployment("D", "DEPLOY_FAILED", replica("r1"), replica("new", "STARTING"))
    given = {"details": state("a", "DEPLOY_FAILED", "", now), "before": old, **keys}
    assert f"   {line}" in app.format_unfinished(failed(**given))


def test_nothing_is_claimed_of_what_served_before_where_nobody_has_looked() -> None:
    before = state("a", "RUNNING", "", deployment("D", "HEALTHY", replica("r1")))
    lost: dict[str, Any] = {"details": before, "result": "UNKNOWN"}
    for keys in (lost, {"details": None, "sent": True}):
        lines = app.format_unfinished(failed(before=before, **keys))
        assert not [line for line in lines if "before" in line]


def test_deletions_have_their_own_part() -> None:
    before = state(FALCON3[0], "RUNNING")
    gone = replace(failed(), change="delete", result="DELETED", before=before)
    absent = replace(gone, before=None)
    lines = app.format_summary(report(gone, absent))
    assert "Total applications deleted: 2/2 in 1 min 15 s" in lines
    assert "• falcon3-1b-instruct-app: deleted; what it held is free" in lines
    assert "• falcon3-1b-instruct-app: it was not there" in lines
    assert "🔥 All deletions completed!" in lines
    assert not any("deployed" in line for line in lines)


def test_what_else_runs_and_a_lost_cluster_are_said() -> None:
    others = [state("old", "RUNNING"), state("older", "UNHEALTHY")]
    lines = app.format_summary(report(running(), others=others))
    said = "Not in the file, left alone: old (RUNNING), older (UNHEALTHY); --prune deletes them"
    assert f"💡 {said}" in lines
    lost = app.format_summary(report(running(), stop_code=3, others=others))
    assert "   It ran when the cluster was last seen" in lost
    assert not any(said in line or "Base URL" in line for line in lost)
    [row] = app.report_json(report(running(), stop_code=3))["applications"]
    assert row["base_url"] == ""


def test_other_applications_say_where_they_answer_and_what_they_hold() -> None:
    demand = app.Demand("a", "D", ({"CPU": 1.0, "GPU": 0.45}, {"GPU": 0.45}))
    demand = replace(demand, min_replicas=2, max_replicas=2)
    plain = replace(running(), demands=(demand,), application=app.ApplicationSpec(0, "a", "/", {}))
    assert app.format_running(plain, report()) == [
        "• a",
        "   D: 1.0 CPUs, 0.9 GPUs in all: [1.0 CPUs, 0.45 GPUs] + [0.45 GPUs], PACK per replica, "
        "replicas 2",
        "   Base URL: http://localhost:8000/",
    ]
    mute = replace(plain, application=app.ApplicationSpec(0, "a", None, {}))
    assert not any("URL" in line for line in app.format_running(mute, report()))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {"change": "RESTART", "reasons": ("args.x: 1 → 2", "args.y: 3 → 4")},
            ["   RESTART because args.x: 1 → 2", "      and args.y: 3 → 4"],
            id="a restart",
        ),
        pytest.param(
            {"change": "unchanged"},
            ["   unchanged"],
            id="nothing",
        ),
        pytest.param(
            {"attempt": 2},
            ["   Second attempt, alone: other engines on its GPU disturbed the first"],
            id="a second attempt",
        ),
    ],
)
def test_what_was_done_with_it_stands_below_its_name(
    changes: dict[str, Any], expected: list[str]
) -> None:
    lines = app.format_running(replace(running(), **changes), report())
    assert lines[1 : 1 + len(expected)] == expected


PROOF = app.Proof(
    reservations=(
        app.Reservation("m", "LLMServer:m", "r", "1", "10.0.0.1", {"CPU": 1.0, "GPU": 0.45}, (0,)),
        app.Reservation("m", "LLMServer:m", "s", "1", "10.0.0.1", {"CPU": 1.0, "GPU": 0.45}, (0,)),
        app.Reservation("m", "OpenAiIngress", "t", "2", "10.0.0.2", {"CPU": 2.0}),
    ),
    mismatches=("OpenAiIngress: promised 1.0 CPUs, reserved 2.0 CPUs",),
    answers=(("GET /v1/models", 0.01), ("POST /v1/chat/completions to m", 0.31)),
    notes=("m is scaled to zero: not woken up",),
    unverified="connection refused",
)


def test_the_proof_reads_as_what_one_would_have_looked_up() -> None:
    assert app.format_proof(PROOF) == [
        "   ✗ OpenAiIngress: promised 1.0 CPUs, reserved 2.0 CPUs",
        "   ✓ Reserved by LLMServer:m: 1.0 CPUs, 0.45 GPUs, on 10.0.0.1 GPU 0 (2 replicas)",
        "   ✗ Reserved by OpenAiIngress: 2.0 CPUs, on 10.0.0.2",
        "   ✓ GET /v1/models: answered in 0.01 s",
        "   ✓ POST /v1/chat/completions to m: answered in 0.31 s",
        "   m is scaled to zero: not woken up",
        "   ✗ Not verified: connection refused",
    ]


# -- the plan, and JSON --------------------------------------------------------------------------


def planned() -> tuple[app.Run, app.Plan]:
    """Two that would be created, of which one does not fit, and one that runs by other means."""
    share = app.ModelSpec("m", "/m", "m", {"GPU": 0.45}, measures_memory=True, notes=("so it is",))
    one, two = (replace(falcon(*row), result=None, sent=False) for row in (FALCON3, FALCON_H1))
    two.application = replace(two.application, models=(share,))
    node = app.Node("n", {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 0.5})
    plan = app.predict([one.demands[0], two.demands[0]], [node])
    return report(one, two, others=[state("old", "RUNNING")], plan=plan), plan


def test_a_plan_says_what_would_go_where() -> None:
    lines = app.format_plan(*planned())
    assert lines[:8] == [
        "=" * 80,
        "📋 Plan (nothing was changed)",
        "=" * 80,
        "",
        "• falcon3-1b-instruct-app  /falcon3-1b",
        "   create",
        "   LLMServer:falcon3-1b-instruct-deployment: 1.0 CPUs, 0.45 GPUs per replica, "
        "replicas 1 → 3 (autoscaling)",
        "   OpenAiIngress (ingress): 1.0 CPUs per replica, replicas 1",
    ]
    assert "   Note: so it is" in lines
    assert any(
        line.startswith("   ⚠️  m shares its GPU and measures at its start") for line in lines
    )
    assert "   not in file: it is RUNNING and left alone (--prune deletes it)" in lines
    one, two = (f"{row[0]}/LLMServer:{row[1]}-deployment" for row in (FALCON3, FALCON_H1))
    assert lines[-6:] == [
        "predicted packing at the start (Ray decides in the end):",
        f"node n · GPU 0 █████████▓▓▓▓▓▓▓▓▓▓· {one} 0.45 + already running 0.50 · 0.05 free",
        "node n · CPU: 1 of 8 used by this plan, 7 free",
        f"{one}: room for 1 of 3 replicas",
        f"{two}: predicted: does not fit now; needs 0.45 GPU; the most free in one place is 0.05 "
        f"(node n, GPU 0, held by {one} 0.45)",
        "=" * 80,
    ]


def test_json_has_the_same_facts() -> None:
    done = replace(running(), proof=PROOF)
    document = app.report_json(report(done, failed()))
    heads = ("version", "exit_code", "seconds", "dashboard", "packing", "misfits", "not_in_file")
    assert [document[key] for key in heads] == [4, 1, 75.0, DASHBOARD, [], [], []]
    good, bad = document["applications"]
    assert (good["name"], good["change"], good["result"]) == (FALCON3[0], "create", "RUNNING")
    assert good["base_url"] == "http://localhost:8000/falcon3-1b"
    assert good["models"][0]["promised"] == {"CPU": 1.0, "GPU": 0.45}
    assert good["deployments"][0]["bundles"] == [{"CPU": 1.0, "GPU": 0.45}]
    assert good["proof"]["mismatches"] == list(PROOF.mismatches)
    assert good["proof"]["reservations"][0]["gpus"] == [0]
    assert good["proof"]["unverified"] == "connection refused"
    assert (bad["result"], bad["seconds"], bad["sent"]) == ("FAILED", 12.4, True)
    assert (bad["cause"], bad["hint"]) == (
        "ValueError: too long",
        "set max_model_len to 256 or less",
    )
    assert bad["logs"][0] == "ray logs actor --id abc --tail 400 --err"
    assert bad["sent"]


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_readmes_jq_makes_a_gateways_list_of_what_runs() -> None:
    document = json.dumps(app.report_json(report(running(), failed())))
    [program] = re.findall(r"jq '(\{model_list.*?)'", (ROOT / "README.md").read_text(), re.DOTALL)
    made = subprocess.run(
        ["jq", program], input=document, capture_output=True, text=True, check=True
    )
    url = "http://localhost:8000/falcon3-1b/v1"
    params = {"model": f"openai/{FALCON3[1]}", "api_base": url, "api_key": "none"}
    row = {"model_name": FALCON3[1], "litellm_params": params}
    assert json.loads(made.stdout) == {"model_list": [row]}


def test_json_of_a_plan_has_its_packing_and_what_does_not_fit() -> None:
    run, plan = planned()
    document = app.report_json(run)
    assert document["packing"] == app.format_prediction(plan)
    assert [text.partition(":")[0] for text in document["misfits"]] == [
        "falcon-h1-0.5b-instruct-app/LLMServer"
    ]
    assert document["not_in_file"] == [{"name": "old", "status": "RUNNING"}]
    assert [row["sent"] for row in document["applications"]] == [False, False]


# -- while it runs -------------------------------------------------------------------------------


def terminal(*, live: bool = False) -> tuple[app.Terminal, io.StringIO, io.StringIO]:
    """A terminal of 80 columns, or none; its stderr and its stdout."""
    screen, out = io.StringIO(), io.StringIO()
    made = app.Terminal(out, screen)
    how: dict[str, Any] = {"file": made, "force_terminal": live, "width": 80, "height": 30}
    made.console = Console(**how, highlight=False, markup=False, emoji=False, soft_wrap=True)
    made.live = Live(console=made.console, auto_refresh=False)
    return made, screen, out


def queued(row: tuple[str, str, str, int]) -> app.Action:
    return replace(falcon(*row), result=None, words="queued", started=None, ended=None)


def course(shown: app.Terminal) -> None:
    """Two applications from their turn to their end: one waits for the other, and then fails."""
    one, two = queued(FALCON3), queued(FALCON_H1)
    run = replace(report(one, two), clock=lambda: 10.0)
    shown.show(run)
    one.started, one.words = 5.0, "building"
    shown.show(run)
    shown.show(run)
    one.words, one.detail = "starting replicas 0/1", "loading weights"
    shown.show(run)
    one.words, one.detail, one.result, one.ended = "RUNNING", "", "RUNNING", 9.0
    two.words, two.detail, two.started = "building", "", 9.0
    shown.show(run)
    shown.console.print("⚠️  said in between: " + "a long line, " * 9)
    two.words, two.result, two.cause = "FAILED", "FAILED", "ValueError: no"
    two.detail, two.ended = "ValueError: no " * 9, 10.0
    shown.show(run)
    shown.live.stop()


BLOCKS = """
🚀 Deploying: falcon3-1b-instruct-app
   📦 Model ID: falcon3-1b-instruct
   🌐 Route: /falcon3-1b
   📊 Mapped resources to ray_actor_options: {'num_cpus': 1.0, 'num_gpus': 0.45}
   ✅ Deployed successfully: falcon3-1b-instruct-app

🚀 Deploying: falcon-h1-0.5b-instruct-app
   📦 Model ID: falcon-h1-0.5b-instruct
   🌐 Route: /falcon-h1-0.5b
   📊 Mapped resources to ray_actor_options: {'num_cpus': 1.0, 'num_gpus': 0.45}
""".splitlines()
"""What each application always said when its turn came, and at its end."""


def test_without_a_terminal_there_are_the_blocks_and_one_line_a_change() -> None:
    plain, screen, _ = terminal()
    course(plain)
    lines = screen.getvalue().splitlines()
    stamped = [line for line in lines if re.match(r"\d\d:\d\d:\d\d  ", line)]
    assert [line for line in lines if line not in stamped] == [
        *BLOCKS,
        "⚠️  said in between: " + "a long line, " * 9,
        "   ❌ Failed: falcon-h1-0.5b-instruct-app (ValueError: no)",
    ]
    assert [line.partition("  ")[2] for line in stamped] == [
        "falcon3-1b-instruct-app  building  5 s",
        "falcon3-1b-instruct-app  starting replicas 0/1  5 s  loading weights",
        "falcon-h1-0.5b-instruct-app  building  1 s",
    ]


def what_is_on(screen: str, width: int) -> list[str]:
    """What a terminal shows after all this: it obeys the few orders that rich gives."""
    rows, row, column = [""], 0, 0
    for order, text in re.findall(r"\x1b\[([\d;?]*[A-Za-z])|([^\x1b])", screen):
        if order.endswith("A"):
            row = max(0, row - int(order[:-1] or 1))
        elif order == "2K":
            rows[row] = ""
        elif text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            rows += [""] * (row == len(rows))
        elif text:
            if column == width:
                row, column = row + 1, 0
                rows += [""] * (row == len(rows))
            rows[row] = rows[row].ljust(column)[:column] + text + rows[row][column + 1 :]
            column += 1
        else:
            assert order.endswith(("m", "h", "l")), order
    return rows


def test_on_a_terminal_the_blocks_stand_whole_above_the_live_lines() -> None:
    live, screen, _ = terminal(live=True)
    course(live)
    rows = what_is_on(screen.getvalue(), width=80)
    whole = "".join(row if len(row) == 80 else f"{row}\n" for row in rows)
    shown = [line.rstrip() for line in whole.splitlines()]
    said = [line for line in BLOCKS if line]
    assert [line for line in shown if line in said] == said
    assert shown.count("   ❌ Failed: falcon-h1-0.5b-instruct-app (ValueError: no)") == 1
    assert ("⚠️  said in between: " + "a long line, " * 9).rstrip() in shown
    last = [row for row in rows if row.strip()][-2:]
    assert last[0].split()[:2] == ["✅", "falcon3-1b-instruct-app"]
    assert last[1].split()[:2] == ["❌", "falcon-h1-0.5b-instruct-app"]
    assert all(len(row) <= 80 for row in rows)
    assert not any("building" in row or "queued" in row for row in rows)


@pytest.mark.parametrize(
    ("change", "result", "line"),
    [
        pytest.param("RESTART", "RUNNING", "   ✅ Deployed successfully: a", id="restarted"),
        pytest.param("unchanged", "RUNNING", "   ✅ Running, unchanged: a", id="unchanged"),
        pytest.param("delete", "DELETED", "   ✅ Deleted: a", id="deleted"),
        pytest.param("create", "STILL DEPLOYING", "   ⚠️  Still deploying: a (why)", id="late"),
        pytest.param("create", "INTERRUPTED", "   ⚠️  Interrupted: a (why)", id="interrupted"),
        pytest.param("create", "FAILED", "   ❌ Failed: a (why)", id="failed"),
    ],
)
def test_the_line_at_the_end(change: Any, result: Any, line: str) -> None:
    action = app.Action(app.ApplicationSpec(0, "a", "/a", {}), change)
    action.result, action.words = result, result
    action.cause = "" if "✅" in line else "why"
    assert app.format_end(action) == line


def test_no_secret_is_written_anywhere() -> None:
    secret = 'hf_secret"word'
    hidden = frozenset({secret})
    action = failed(cause=f"wrong token {secret}", trace=f"Traceback: {secret}")
    action.words, action.detail, action.started = "FAILED", f"wrong token {secret}", 5.0
    action.reasons = (f"HF_TOKEN: {secret} → http://me:pw@h/?key=12345",)
    plan = app.predict(action.demands, [])
    for live, as_json, seen in ((False, False, None), (True, True, None), (False, False, plan)):
        made, screen, out = terminal(live=live)
        made.secrets = hidden
        made.show(report(action))
        made.console.print(f"said {secret}")
        options = app.Options("c", json=as_json, logs=True)
        made.report(report(action, plan=seen, options=options))
        text = screen.getvalue() + out.getvalue()
        assert not re.search("hf_secret|word|me:pw|12345", text)
        assert text.count("***") > 3


def test_no_secret_that_a_worker_logs_is_shown_below_the_live_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, screen, _ = terminal(live=True)
    made.secrets = frozenset({"hf_secret"})
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, made)
    made.show(report(replace(running(), result=None, words="building", ended=None)))
    print("(worker) the token is hf_secret")
    made.live.stop()
    assert "(worker) the token is ***" in screen.getvalue()
    assert "hf_secret" not in screen.getvalue()


# -- whoever reads it is gone --------------------------------------------------------------------

PROGRAM = """
import os, sys
import app_v5 as app

class Cluster:  # nothing runs there
    dashboard_url = ""
    def __getattr__(self, name):
        found = {"check_values": [], "claims": {}, "states": {}, "running": {}, "nodes": [],
                 "endpoint": "", "alive": True, "autoscales": False, "connect": None,
                 "reservations": [], "delete": None}[name]
        return lambda *arguments, **keys: found

app.RayCluster = lambda worker_logs: Cluster()
os._exit(app.main(sys.argv[1:]))
"""


def run_to(out: int, err: int, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the whole program, but for Ray, with these for stdout and stderr."""
    config = tmp_path / "config.yaml"
    config.write_text("applications: [{name: a, route_prefix: /a, import_path: 'm:a'}]")
    return subprocess.run(
        [PYTHON, "-c", PROGRAM, str(config), "--delete"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=out,
        stderr=err,
        text=True,
        timeout=60,
        check=False,
    )


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.serve
def test_a_report_that_can_not_be_written_is_no_traceback(tmp_path: Path) -> None:
    whole = run_to(subprocess.PIPE, subprocess.PIPE, tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "• a: it was not there" in whole.stdout
    for made, messages in (
        (full_disk, ["❌ the report can't be written: No space left on device"]),
        (closed_pipe, []),
    ):
        out = made()
        finished = run_to(out, subprocess.PIPE, tmp_path)
        os.close(out)
        assert finished.returncode == 1
        more = finished.stderr.splitlines()[len(whole.stderr.splitlines()) :]
        assert more == messages


@pytest.mark.serve
def test_progress_that_nobody_reads_ends_the_run_with_1(tmp_path: Path) -> None:
    for made in (full_disk, closed_pipe):
        err = made()
        finished = run_to(subprocess.PIPE, err, tmp_path)
        os.close(err)
        assert (finished.returncode, finished.stdout) == (1, "")
