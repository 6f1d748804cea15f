"""Section 9: outcomes → what people read, line by line."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

import app_v5 as app

MODEL = app.ModelSpec("falcon3-1b-instruct", "tiiuae/Falcon3-1B-Instruct", "falcon3-1b-deployment")
LLM = app.Demand(
    "falcon3-app",
    "LLMServer:falcon3-1b-deployment",
    ({"CPU": 1.0, "GPU": 0.45},),
    "PACK",
    1,
    3,
    autoscaling=True,
)
INGRESS = app.Demand("falcon3-app", "OpenAiIngress", ({"CPU": 1.0},), "PACK", 1, 1, ingress=True)
SPEC = app.ApplicationSpec(0, "falcon3-app", "/falcon3-1b", {}, (MODEL,))
CREATE = app.Action(SPEC, app.Change.CREATE, "1")
RUNNING = app.Outcome(CREATE, app.Result.RUNNING, 61.0, demands=(LLM, INGRESS), submitted=True)
DEAD = app.ReplicaState("r", "STOPPED", "10.0.0.1", 7, "abc", 5.0, "/serve/replica_r.log")
STATE = app.ApplicationState(
    "falcon3-app",
    "DEPLOY_FAILED",
    deployments=(app.DeploymentState("D", "DEPLOY_FAILED", "", 1, (), (DEAD,)),),
)
FAILED = app.Outcome(
    CREATE,
    app.Result.FAILED,
    12.4,
    app.Cause("ValueError: too long", "set max_model_len to 256 or less"),
    state=STATE,
    submitted=True,
)
DASHBOARD = "http://127.0.0.1:8265"


def test_a_running_model_reads_as_v5_always_did() -> None:
    assert app.format_running(RUNNING, "http://localhost:8000") == [
        "• falcon3-app",
        "   Model: tiiuae/Falcon3-1B-Instruct",
        "   Model ID: falcon3-1b-instruct",
        "   Resources per replica: 1.0 CPUs, 0.45 GPUs",
        "   Replicas: 1 → 3 (autoscaling)",
        "   Ingress OpenAiIngress: 1.0 CPUs per replica, replicas 1",
        "   Base URL: http://localhost:8000/falcon3-1b",
        "   Endpoints:",
        "     • POST /falcon3-1b/v1/chat/completions",
        "     • POST /falcon3-1b/v1/completions",
        "     • GET  /falcon3-1b/v1/models",
    ]


def test_a_failure_says_why_what_would_help_and_where_to_look() -> None:
    assert app.format_unfinished(FAILED, DASHBOARD) == [
        "• falcon3-app: FAILED after 12 s",
        "   Cause: ValueError: too long",
        "   Hint: set max_model_len to 256 or less",
        "   Logs: ray logs actor --id abc --tail 400 --err",
        "   Logs: ray logs actor --id abc --tail 400",
        "   Logs: ray logs serve/replica_r.log",
        "   Dashboard: http://127.0.0.1:8265/#/serve/applications/falcon3-app",
    ]


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        pytest.param(
            replace(FAILED, result=app.Result.INTERRUPTED, cause=None),
            "   It was submitted and goes on deploying; this program no longer watches it",
            id="interrupted",
        ),
        pytest.param(
            replace(FAILED, result=app.Result.INTERRUPTED, cause=None, submitted=False),
            "   It was not submitted",
            id="interrupted before its turn",
        ),
        pytest.param(
            replace(FAILED, result=app.Result.STILL_DEPLOYING),
            "   The cluster goes on deploying it",
            id="time ran out",
        ),
        pytest.param(
            replace(FAILED, result=app.Result.UNKNOWN, cause=None),
            "   The cluster was lost: whether it runs, or ever will, is not known",
            id="lost",
        ),
        pytest.param(
            replace(FAILED, deleted=True),
            "   It was deleted again (--on-failure delete)",
            id="deleted",
        ),
    ],
)
def test_what_became_of_the_others(outcome: app.Outcome, line: str) -> None:
    assert line in app.format_unfinished(outcome, DASHBOARD)


def test_the_summary_as_a_whole() -> None:
    report = app.Report([RUNNING, FAILED], 1, "http://localhost:8000", DASHBOARD, 75.0)
    lines = app.format_summary(report)
    assert lines[:6] == [
        "=" * 80,
        "⚠️  Deployment Summary",
        "=" * 80,
        "Total applications deployed: 1/2 in 1 min 15 s",
        "",
        "📋 Successfully Deployed Applications:",
    ]
    assert lines[-4:] == [
        "=" * 80,
        "💡 Ray Dashboard: http://127.0.0.1:8265",
        "💡 Check deployment status and resource usage in the dashboard",
        "=" * 80,
    ]
    all_well = app.format_summary(replace(report, outcomes=[RUNNING], code=0))
    assert "✅ Deployment Summary" in all_well
    assert "🔥 All deployments completed!" in all_well


def test_several_bundles_are_told_apart() -> None:
    two = replace(LLM, bundles=({"CPU": 1.0, "GPU": 0.45}, {"GPU": 0.45}))
    assert app.format_bundles(two) == (
        "1.0 CPUs, 0.9 GPUs in all: [1.0 CPUs, 0.45 GPUs] + [0.45 GPUs], PACK"
    )


def test_reasons_of_a_change() -> None:
    reasons = ("args.x: 1 → 2", "args.y: 3 → 4")
    assert app.format_action(app.Action(SPEC, app.Change.RESTART, "1", reasons)) == [
        "   RESTART because args.x: 1 → 2",
        "      and args.y: 3 → 4",
    ]


ENGINE = app.EngineFigures("m", "r", "n", 0.45, 1_024_000, 500.0, 31.25, 1.5, 0.4, 5.25)
PROOF = app.Proof(
    reservations=(
        app.Reservation("LLMServer:m", "r", {"CPU": 1.0, "GPU": 0.45}, ("10.0.0.1",), (0,)),
        app.Reservation("LLMServer:m", "s", {"CPU": 1.0, "GPU": 0.45}, ("10.0.0.1",), (0,)),
        app.Reservation("OpenAiIngress", "t", {"CPU": 2.0}, ("10.0.0.2",)),
    ),
    mismatches=("OpenAiIngress: promised 1 CPU, reserved 2 (why)",),
    answers=(
        app.Answer("GET /v1/models", 0.01),
        app.Answer("POST /v1/chat/completions", 0.31, "m", 0.3),
    ),
    engines=(ENGINE,),
    asleep=("n",),
)


def test_the_proof_reads_as_what_one_would_have_looked_up() -> None:
    assert app.format_proof(PROOF) == [
        "✗ OpenAiIngress: promised 1 CPU, reserved 2 (why)",
        "✓ Reserved by LLMServer:m: 1.0 CPUs, 0.45 GPUs, on 10.0.0.1 GPU 0 (2 replicas)",
        "✗ Reserved by OpenAiIngress: 2.0 CPUs, on 10.0.0.2",
        "✓ GET /v1/models: answered in 0.01 s",
        "✓ POST /v1/chat/completions to m: answered in 0.31 s, first token after 0.30 s",
        "n is scaled to zero: not woken up (--wake asks it)",
        "Engine of m says: KV cache 1,024,000 tokens, 31.25 GiB, 500 requests of full length at "
        "once, weights 1.50 GiB, weights loaded in 0.4 s, engine ready 5.2 s later",
    ]
    skipped = app.Proof(skipped="--no-smoke-test")
    assert app.format_proof(skipped) == ["Not asked over HTTP: --no-smoke-test"]


def test_a_broken_promise_is_no_success() -> None:
    report = app.Report([replace(RUNNING, proof=PROOF)], 1, "http://h:8000", DASHBOARD, 75.0)
    lines = app.format_summary(report)
    assert "⚠️  Deployment Summary" in lines
    assert "🔥 All deployments completed!" not in lines
    [row] = app.report_json(report)["applications"]
    assert row["proof"]["mismatches"] == PROOF.mismatches
    assert row["proof"]["reservations"][0]["gpus"] == (0,)


def test_a_small_cache_is_warned_about_for_people_and_programs() -> None:
    small = replace(ENGINE, model_id="small", kv_cache_gib=12.0)
    proofs = [app.Proof(engines=(engine,)) for engine in (ENGINE, small)]
    outcomes = [replace(RUNNING, proof=proof) for proof in proofs]
    report = app.Report(outcomes, 0, "http://h:8000", DASHBOARD, 75.0)
    [warning] = app.report_json(report)["warnings"]
    assert warning.startswith("small: its engine got 13.5 GiB")
    assert f"⚠️  {warning}" in app.format_summary(report)


def after_an_edit(**keys: Any) -> app.Outcome:
    """A failed edit: of two old replicas one still runs."""
    replicas = tuple(app.ReplicaState(name, "RUNNING", "n", 1) for name in ("r1", "r2"))
    before = app.DeploymentState("D", "HEALTHY", "", 2, replicas)
    now = app.DeploymentState("D", "DEPLOY_FAILED", "", 2, replicas[:1])
    name = "falcon3-app"
    running = app.Running(app.ApplicationState(name, "RUNNING", deployments=(before,)))
    action = app.Action(SPEC, app.Change.RESTART, "2", before=running)
    state = app.ApplicationState(name, "DEPLOY_FAILED", deployments=(now,))
    return replace(FAILED, action=action, **{"state": state, **keys})


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        pytest.param(
            {}, "Still serving from before the edit: 1 of 2 replicas of D", id="what still serves"
        ),
        pytest.param(
            {"state": app.ApplicationState("falcon3-app", "DEPLOY_FAILED")},
            "Nothing from before the edit serves any more",
            id="nothing left",
        ),
        pytest.param({"submitted": False}, "What ran before was not touched", id="not touched"),
        pytest.param(
            {"rollback": "it was rolled back: ..."},
            "It was rolled back: ... (--on-failure rollback)",
            id="rolled back",
        ),
    ],
)
def test_a_failed_edit_says_what_is_left(keys: dict[str, Any], line: str) -> None:
    assert app.format_survivors(after_an_edit(**keys)) == [line]


def test_deletions_have_their_own_part() -> None:
    before = app.Running(app.ApplicationState("falcon3-app", "RUNNING"))
    action = app.Action(SPEC, app.Change.DELETE, before=before)
    gone = app.Outcome(action, app.Result.DELETED, 3.0, submitted=True)
    report = app.Report([gone], 0, "http://h:8000", "", 3.0)
    lines = app.format_summary(report)
    assert "Total applications deleted: 1/1 in 3 s" in lines
    assert "• falcon3-app: deleted; what it held is free" in lines
    assert "🔥 All deletions completed!" in lines
    left = replace(gone, result=app.Result.INTERRUPTED)
    assert app.format_unfinished(left, "")[1:] == [
        "   It was submitted and goes on deleting; this program no longer watches it"
    ]


def test_json_has_the_same_facts() -> None:
    report = app.Report([RUNNING, FAILED], 1, "http://localhost:8000", DASHBOARD, 75.0)
    document = app.report_json(report)
    assert (document["version"], document["exit_code"], document["seconds"]) == (1, 1, 75.0)
    running, failed = document["applications"]
    assert running["base_url"] == "http://localhost:8000/falcon3-1b"
    assert running["deployments"][0]["reserved_per_replica"] == {"CPU": 1.0, "GPU": 0.45}
    assert failed["cause"] == "ValueError: too long"
    assert failed["logs"][0] == "ray logs actor --id abc --tail 400 --err"


def terminal(*, live: bool) -> tuple[app.Terminal, io.StringIO]:
    screen = io.StringIO()
    made = app.Terminal(lambda: 10.0, live=live)
    made.console = Console(file=screen, width=100, force_terminal=live, soft_wrap=True)
    return made, screen


def test_without_a_terminal_there_is_one_line_a_change() -> None:
    plain, screen = terminal(live=False)
    waiting = app.Progress(SPEC, "starting replicas 0/1", "loading weights", started=5.0)
    for progress in (waiting, waiting, replace(waiting, words="RUNNING", detail="", ended=9.0)):
        plain.show([progress])
    lines = [line.split("  ", 1)[1] for line in screen.getvalue().splitlines()]
    assert lines == [
        "falcon3-app  starting replicas 0/1  5 s  loading weights",
        "falcon3-app  RUNNING  4 s",
    ]


def test_on_a_terminal_each_application_has_a_live_line_and_no_secret() -> None:
    live, screen = terminal(live=True)
    live.secrets = frozenset({"hf_12345"})
    live.show([app.Progress(SPEC, "FAILED", "wrong token hf_12345", started=5.0, ended=9.0)])
    live.close()
    shown = screen.getvalue()
    assert "falcon3-app" in shown
    assert "FAILED" in shown
    assert "wrong token ***" in shown
    assert "hf_12345" not in shown
