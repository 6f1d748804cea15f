"""Section 6: what an edit needs, and what it means for those who send requests."""

from __future__ import annotations

from typing import Any

import pytest

import app_v5 as app
from test_resources import Config, application, llm

KEEP = app.Options("config.yaml")
DEMAND = app.Demand("a", "D", ({"CPU": 1.0},), "PACK", 1, 1)


def edited(**change: Any) -> app.ApplicationSpec:
    """One application with one LLM, after an edit of the LLM's deployment or of the LLM."""
    deployment = {"num_gpus": 0.45, **change.pop("deployment", {})}
    config, _ = app.normalise_application(application(llm(deployment, **change)), ())
    return app.ApplicationSpec(0, "a", "/", config, sealed=app.seal(config, ()))


@pytest.mark.parametrize(
    ("change", "restarts"),
    [
        pytest.param({"deployment": {"max_ongoing_requests": 7}}, False, id="max_ongoing_requests"),
        pytest.param(
            {"deployment": {"autoscaling_config": {"max_replicas": 9}}}, False, id="autoscaling"
        ),
        pytest.param({"deployment": {"user_config": {"a": 1}}}, False, id="user_config"),
        pytest.param({"deployment": {"health_check_period_s": 3}}, False, id="health check"),
        pytest.param({"engine_kwargs": {"max_model_len": 4096}}, True, id="engine argument"),
        pytest.param({"deployment": {"num_gpus": 0.5}}, True, id="GPU share"),
        pytest.param({"runtime_env": {"pip": ["x"]}}, True, id="runtime environment"),
    ],
)
def test_only_what_needs_new_replicas_changes_the_version(change: Config, restarts: bool) -> None:
    assert (app.version_of(edited(**change)) != app.version_of(edited())) is restarts


def running(
    spec: app.ApplicationSpec,
    *replicas: int,
    status: str = "RUNNING",
    source: str = "imperative",
    version: str | None = None,
) -> app.Running:
    """What runs after `spec` was deployed: deployments D0, D1 ... with so many replicas each."""
    deployments = tuple(
        app.DeploymentState(
            f"D{index}",
            "HEALTHY",
            "",
            count,
            tuple(app.ReplicaState(f"{index}{n}", "RUNNING", "n", 1) for n in range(count)),
        )
        for index, count in enumerate(replicas)
    )
    state = app.ApplicationState(spec.name, status, "", "/", source, deployments)
    record = app.Record(app.version_of(spec), spec.sealed, (DEMAND,))
    return app.Running(state, frozenset({version or record.version}), record)


def decide(spec: app.ApplicationSpec, before: app.Running | None, **options: Any) -> app.Action:
    return app.decide(spec, before, app.Options("c.yaml", **options), mark="m")


def test_a_new_one_is_created_and_an_equal_one_is_left_alone() -> None:
    assert decide(edited(), None).change is app.Change.CREATE
    action = decide(edited(), running(edited(), 1))
    assert (action.change, action.reasons) == (app.Change.UNCHANGED, ())


def test_an_edit_of_an_engine_argument_says_what_it_was() -> None:
    before = running(edited(engine_kwargs={"max_model_len": 2048}), 1)
    action = decide(edited(engine_kwargs={"max_model_len": 4096}), before)
    assert action.change is app.Change.RESTART
    assert action.reasons == ("args.llm_configs[0].engine_kwargs.max_model_len: 2048 → 4096",)


def test_an_edit_of_a_replica_count_is_applied_in_place_for_an_llm_too() -> None:
    before = running(edited(deployment={"autoscaling_config": {"max_replicas": 3}}), 1)
    action = decide(edited(deployment={"autoscaling_config": {"max_replicas": 4}}), before)
    assert action.change is app.Change.IN_PLACE
    assert action.version == before.record.version if before.record else False
    option = "args.llm_configs[0].deployment_config.autoscaling_config.max_replicas"
    assert action.reasons == (f"{option}: 3 → 4",)


def overriding(**options: Any) -> app.ApplicationSpec:
    config = {"name": "a", "import_path": "m:a", "deployments": [{"name": "D1", **options}]}
    return app.ApplicationSpec(0, "a", "/", config, sealed=config)


def test_an_edit_of_one_deployments_resources_restarts_that_one_alone() -> None:
    before = running(overriding(ray_actor_options={"num_cpus": 1}), 1, 2)
    action = decide(overriding(ray_actor_options={"num_cpus": 2}), before)
    assert (action.change, action.restarting) == (app.Change.RESTART, frozenset({"D1"}))
    assert [deployment.name for deployment in app.restarted(action)] == ["D1"]
    assert app.gap(action).startswith("rolling")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        pytest.param({"status": "DEPLOY_FAILED"}, "it is DEPLOY_FAILED", id="failed"),
        pytest.param({"status": "UNHEALTHY"}, "it is UNHEALTHY", id="unhealthy"),
        pytest.param(
            {"version": "other"},
            "it was deployed by other means: there is nothing to compare with",
            id="redeployed by other means",
        ),
    ],
)
def test_what_restarts_without_an_edit(keys: Config, reason: str) -> None:
    action = decide(edited(), running(edited(), 1, **keys))
    assert (action.change, action.reasons) == (app.Change.RESTART, (reason,))


def test_what_serve_deploy_brought_comes_back_and_that_is_said() -> None:
    before = running(edited(), 1, source="declarative")
    action = decide(edited(), before)
    assert action.change is app.Change.RESTART
    reason = "it was deployed by `serve deploy`: there is nothing to compare with"
    assert action.reasons == (reason, app.COMES_BACK)
    assert app.deletion(edited(), {"a": before}, {}).reasons == ("--delete", app.COMES_BACK)
    assert app.deletion(edited(), {"a": running(edited(), 1)}, {}).reasons == ("--delete",)


def test_what_restarts_with_an_equal_fingerprint_gets_another_version() -> None:
    before = running(edited(), 1, status="DEPLOY_FAILED")
    assert decide(edited(), before).version == f"{app.version_of(edited())}.m"
    assert decide(edited(), running(edited(), 1), force=True).version.endswith(".m")


def test_one_that_another_run_has_is_refused_with_its_name() -> None:
    claim = app.Claim("01", "host", 7, "2026-01-02 03:04:05")
    action = app.decide(edited(), None, KEEP, mark="m", claim=claim)
    assert action.refusal
    assert "process 7 on host, since 2026-01-02 03:04:05" in action.refusal.text
    assert not app.changes(action)
    assert app.moving([action]) == frozenset()
    same = app.decide(edited(), running(edited(), 1), KEEP, mark="m", claim=claim)
    assert (same.change, same.refusal) == (app.Change.UNCHANGED, None)


@pytest.mark.parametrize(
    ("replicas", "options", "words"),
    [
        pytest.param((1,), {}, "with a gap: Serve stops the one replica of D0 before", id="one"),
        pytest.param((2, 1), {}, "with a gap: Serve stops the one replica of D1", id="one of two"),
        pytest.param((2,), {}, "rolling: Serve stops a fifth", id="two"),
        pytest.param((0,), {}, "", id="none"),
        pytest.param((1,), {"no_downtime": True}, "no gap", id="--no-downtime"),
    ],
)
def test_a_restart_says_beforehand_who_notices(
    replicas: tuple[int, ...], options: Config, words: str
) -> None:
    action = decide(edited(engine_kwargs={"seed": 1}), running(edited(), *replicas), **options)
    assert action.change is app.Change.RESTART
    assert app.gap(action).startswith(words)
    assert bool(app.gap(action)) is bool(words)


@pytest.mark.parametrize(
    ("target", "extra"), [pytest.param(1, 1, id="1"), pytest.param(11, 3, id="a fifth, rounded up")]
)
def test_without_downtime_room_for_a_fifth_more_is_needed(target: int, extra: int) -> None:
    spec = edited(engine_kwargs={"seed": 1})
    action = decide(spec, running(edited(), target), no_downtime=True)
    demand = app.Demand("a", "D0", ({"GPU": 0.45},), "PACK", target, target)
    assert [d.min_replicas for d in app.counted(action, (demand,))] == [extra]
    assert app.moving([action]) == frozenset()


def test_a_route_that_another_application_has_is_named_with_its_key() -> None:
    spec = app.ApplicationSpec(3, "new", "/keep", {})
    keep = app.ApplicationState("keep", "RUNNING", "", "/keep", "declarative")
    [finding] = app.taken_routes([spec], {"keep": keep})
    assert finding.path == ("applications", 3, "route_prefix")
    assert finding.message == (
        "/keep is the route of keep, which is running (deployed by `serve deploy`)"
    )
    assert app.taken_routes([app.ApplicationSpec(0, "keep", "/keep", {})], {"keep": keep}) == []
