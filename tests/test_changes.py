"""The section Changes: what an edit needs, and what it means for those who send requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

import app_v5 as app
from made import deployment, details, replica
from test_resources import Config, application, llm, read

DEMAND = app.Demand("a", "D", ({"CPU": 1.0},))
KEY, VERSION = b"key", "1"


def edited(**change: Any) -> app.ApplicationSpec:
    """One application with one LLM, after an edit of the LLM's deployment or of the LLM."""
    options = {"num_gpus": 0.45, **change.pop("deployment", {})}
    return read(application(llm(options, **change)))[0]


def running(
    spec: app.ApplicationSpec, *counts: int, seen: str | None = None, **keys: Any
) -> app.Running:
    """What runs after `spec` was deployed: deployments D0, D1 ... with so many replicas each;
    `seen` is the version that Serve has, if another."""
    deployments = [
        deployment(f"D{index}", *(replica(f"{index}{n}") for n in range(count)))
        for index, count in enumerate(counts)
    ]
    state = details(spec.name, keys.pop("status", "RUNNING"), *deployments, **keys)
    record = app.Record(VERSION, decide(spec, None).kept, (DEMAND,))
    return state, seen or VERSION, None if seen else record


def decide(spec: app.ApplicationSpec, before: app.Running | None, **options: Any) -> app.Action:
    secrets = options.pop("secrets", frozenset())
    return app.decide(spec, before, app.Options("c.yaml", **options), secrets, KEY)


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
    action = decide(edited(**change), running(edited(), 1))
    assert action.change == ("RESTART" if restarts else "in place")
    assert (action.version != VERSION) is restarts


def test_a_new_one_is_created_and_an_equal_one_is_left_alone() -> None:
    assert decide(edited(), None).change == "create"
    action = decide(edited(), running(edited(), 1))
    assert (action.change, action.reasons) == ("unchanged", ())


def test_an_edit_of_an_engine_argument_says_what_it_was() -> None:
    before = running(edited(engine_kwargs={"max_model_len": 2048}), 1)
    action = decide(edited(engine_kwargs={"max_model_len": 4096}), before)
    assert action.change == "RESTART"
    assert action.reasons == ("args.llm_configs[0].engine_kwargs.max_model_len: 2048 → 4096",)


def test_an_edit_of_a_replica_count_is_applied_in_place_for_an_llm_too() -> None:
    before = running(edited(deployment={"autoscaling_config": {"max_replicas": 3}}), 1)
    action = decide(edited(deployment={"autoscaling_config": {"max_replicas": 4}}), before)
    assert action.change == "in place"
    assert action.version == VERSION
    option = "args.llm_configs[0].deployment_config.autoscaling_config.max_replicas"
    assert action.reasons == (f"{option}: 3 → 4",)


def overriding(*entries: Config) -> app.ApplicationSpec:
    config = {"name": "a", "import_path": "m:a", "deployments": list(entries)}
    return app.ApplicationSpec(0, "a", "/", config)


ONE = {"name": "D0", "max_ongoing_requests": 3}
OTHER = {"name": "D1", "ray_actor_options": {"num_cpus": 1}}


@pytest.mark.parametrize(
    ("before", "after", "restarting"),
    [
        pytest.param(
            [OTHER],
            [{**OTHER, "ray_actor_options": {"num_cpus": 2}}],
            {"D1"},
            id="its resources",
        ),
        pytest.param([ONE], [ONE, OTHER], {"D1"}, id="an entry comes with resources"),
        pytest.param([ONE, OTHER], [ONE], {"D1"}, id="an entry goes with resources"),
        pytest.param([ONE, OTHER], [OTHER, ONE], None, id="another order is nothing"),
    ],
)
def test_an_edit_of_one_deployments_resources_restarts_that_one_alone(
    before: list[Config], after: list[Config], restarting: set[str] | None
) -> None:
    action = decide(overriding(*after), running(overriding(*before), 1, 2))
    if restarting is None:
        assert action.change == "unchanged"
    else:
        assert action.change == "RESTART"
        assert action.restarting == frozenset(restarting)
        assert app.gap(action).startswith("rolling")


@pytest.mark.parametrize(
    "option",
    [
        pytest.param({"placement_group_strategy": "SPREAD"}, id="strategy"),
        pytest.param({"max_replicas_per_node": 1}, id="replicas per node"),
    ],
)
def test_what_serve_does_not_compare_itself_gets_another_version(option: Config) -> None:
    action = decide(overriding({**ONE, **option}), running(overriding(ONE), 1, 2))
    assert (action.change, action.restarting) == ("RESTART", frozenset({"D0", "D1"}))
    assert action.version != VERSION


def test_an_entry_of_light_options_comes_and_goes_in_place() -> None:
    action = decide(overriding(OTHER, ONE), running(overriding(OTHER), 1, 2))
    assert action.change == "in place"
    assert action.reasons == ("deployments.D0.max_ongoing_requests: (not given) → 3",)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        pytest.param({"status": "DEPLOY_FAILED"}, "it is DEPLOY_FAILED", id="failed"),
        pytest.param({"status": "UNHEALTHY"}, "it is UNHEALTHY", id="unhealthy"),
        pytest.param(
            {"seen": "other"},
            "it was deployed by other means: nothing to compare with",
            id="redeployed by other means",
        ),
    ],
)
def test_what_restarts_without_an_edit(keys: Config, reason: str) -> None:
    action = decide(edited(), running(edited(), 1, **keys))
    assert (action.change, action.reasons) == ("RESTART", (reason,))


def test_what_serve_deploy_brought_comes_back_and_that_is_said() -> None:
    before = running(edited(), 1, source="declarative")
    action = decide(edited(), before)
    assert action.change == "RESTART"
    [reason] = action.reasons
    assert reason.startswith(
        "`serve deploy` brought it, and Serve's controller does again when it restarts"
    )
    assert app.deletion(edited(), before, "--delete").reasons == ("--delete", reason)
    assert app.deletion(edited(), running(edited(), 1), "--delete").reasons == ("--delete",)


def test_what_restarts_unchanged_gets_another_version() -> None:
    for before, options in (
        (running(edited(), 1, status="DEPLOY_FAILED"), {}),
        (running(edited(), 1), {"force": True}),
    ):
        action = decide(edited(), before, **options)
        assert action.change == "RESTART"
        assert action.version != VERSION


def test_the_file_of_before_has_its_version_again() -> None:
    """So Serve keeps what is left of its replicas when an edit has failed."""
    good, bad = edited(), edited(engine_kwargs={"max_model_len": -1})
    version = decide(good, None).version
    assert decide(edited(deployment={"max_ongoing_requests": 7}), None).version == version
    broken = decide(bad, running(good, 1, seen=version)).version
    failed = running(bad, 1, seen=broken, status="DEPLOY_FAILED")
    assert decide(good, failed).version == version
    assert decide(bad, failed).version not in (broken, version)


def test_keys_of_all_kinds_have_a_version() -> None:
    config = {"import_path": "m:a", "args": {1: "a", "b": {None: 2}}}
    spec = app.ApplicationSpec(0, "a", "/a", config)
    assert decide(spec, None).version == decide(spec, None).version


def test_what_still_deploys_is_taken_over_as_it_is() -> None:
    action = decide(edited(), running(edited(), 1, status="DEPLOYING"))
    assert (action.change, action.version) == ("in place", VERSION)
    assert action.reasons == ("it is DEPLOYING",)


@pytest.mark.parametrize(
    ("before", "after", "reasons"),
    [
        pytest.param({}, {"x": None}, ("args.x: (not given) → null",), id="null is given"),
        pytest.param({1: "a"}, {1: "a"}, (), id="a number as a key"),
        pytest.param({}, {"x": {"y": 1}}, ("args.x.y: (not given) → 1",), id="a mapping comes"),
        pytest.param({"x": [1]}, {"x": []}, ("args.x: [1] → []",), id="a shorter list"),
    ],
)
def test_an_edit_of_a_builders_arguments(
    before: Config, after: Config, reasons: tuple[str, ...]
) -> None:
    old, new = (
        app.ApplicationSpec(0, "a", "/", {"name": "a", "import_path": "m:a", "args": args})
        for args in (before, after)
    )
    kept = json.loads(json.dumps(decide(old, None).kept))
    record = app.Record(VERSION, kept, (DEMAND,))
    action = decide(new, (details("a"), VERSION, record))
    assert action.change == ("RESTART" if reasons else "unchanged")
    assert action.reasons == reasons


def test_no_secret_is_kept_and_an_edit_of_one_is_seen() -> None:
    def with_token(token: str) -> app.ApplicationSpec:
        return edited(runtime_env={"env_vars": {"HF_TOKEN": token}})

    secrets = frozenset({"hf_12345", "hf_67890"})
    old = decide(with_token("hf_12345"), None, secrets=secrets)
    assert "hf_12345" not in str(old.kept)
    record = app.Record(old.version, old.kept, (DEMAND,))
    before = (details("a"), old.version, record)
    again = decide(with_token("hf_12345"), before, secrets=secrets)
    assert again.change == "unchanged"
    new = decide(with_token("hf_67890"), before, secrets=secrets)
    assert new.change == "RESTART"
    assert new.reasons == ("args.llm_configs[0].runtime_env.env_vars.HF_TOKEN: *** → ***",)
    assert app.fingerprint("weak", KEY) != app.fingerprint("weak", b"other")


def test_a_text_that_becomes_or_was_a_secret_is_no_edit() -> None:
    """As where a part of a path comes from a variable now, in this application or another."""
    hidden, shown = frozenset({"/models"}), frozenset[str]()
    spec = edited(runtime_env={"env_vars": {"HF_HOME": "/models/hub"}})
    for earlier, now in ((shown, hidden), (hidden, shown)):
        kept = decide(spec, None, secrets=earlier).kept
        record = app.Record(VERSION, kept, (DEMAND,))
        before = (details("a"), VERSION, record)
        assert decide(spec, before, secrets=now).change == "unchanged"


@pytest.mark.parametrize(
    ("replicas", "options", "words"),
    [
        pytest.param((1,), {}, "with a gap: Serve stops the one replica of D0 first", id="one"),
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
    assert action.change == "RESTART"
    assert app.gap(action).startswith(words)
    assert bool(app.gap(action)) is bool(words)


@pytest.mark.parametrize(
    ("least", "first", "most", "now", "needed"),
    [
        pytest.param(1, 1, 3, 2, 2, id="grown"),
        pytest.param(1, 1, 3, 5, 3, id="above what may be"),
        pytest.param(2, 2, 3, 0, 2, id="below what must be"),
        pytest.param(1, 2, 5, 4, 2, id="with which Serve begins anew"),
    ],
)
def test_what_autoscaling_made_of_it_stays(
    least: int, first: int, most: int, now: int, needed: int
) -> None:
    action = decide(edited(engine_kwargs={"seed": 1}), running(edited(), now))
    action.demands = (app.Demand("a", "D0", ({"GPU": 0.45},), "PACK", least, most, first),)
    assert [demand.initial_replicas for demand in app.demands_at_once(action)] == [needed]


@pytest.mark.parametrize("target", [1, 11])
def test_without_downtime_room_for_one_more_is_needed(target: int) -> None:
    """When that one runs Serve stops an old one, and starts the next."""
    spec = edited(engine_kwargs={"seed": 1})
    action = decide(spec, running(edited(), target), no_downtime=True)
    action.demands = (app.Demand("a", "D0", ({"GPU": 0.45},), "PACK", target, target, target),)
    assert [demand.initial_replicas for demand in app.demands_at_once(action)] == [1]


@pytest.mark.parametrize(
    ("before", "after", "restarts"),
    [
        ({}, {"owner": "me"}, False),  # Ray ignores it
        ({}, {"args": {"llm_configs": [{"deployment_config": {"num_replicas": 2}}]}}, True),
        (
            {"args": {"llm_configs": [{"x": 1}]}},
            {"args": {"llm_configs": [{"x": 1, "deployment_config": {"num_replicas": 2}}]}},
            False,
        ),
        ({}, {"args": {"ingress_deployment_config": {"num_replicas": 2}}}, False),
        ({}, {"args": {"ingress_deployment_config": {"name": "x"}}}, True),
        # A builder's of the user's own.
        ({}, {"args": {"deployment_config": {"num_replicas": 2}}}, True),
    ],
)
def test_only_what_serve_would_restart_for_does(
    before: Config, after: Config, restarts: bool
) -> None:
    old, new = (
        app.ApplicationSpec(0, "a", "/", {"name": "a", "import_path": "m:a", **config})
        for config in (before, after)
    )
    action = decide(new, running(old, 1))
    assert action.change == ("RESTART" if restarts else "in place")
    assert (action.version != VERSION) is restarts
    [back] = decide(old, running(new, 1)).reasons
    assert back.endswith("→ (not given)")


def test_a_deployment_whose_name_has_a_secret_in_it_is_still_the_one_that_restarts() -> None:
    actions = [
        app.decide(
            overriding({"name": "M-main", "ray_actor_options": {"num_cpus": cpus}}),
            None,
            app.Options("c"),
            frozenset({"main"}),
            b"key",
        )
        for cpus in (1, 2)
    ]
    assert [list(action.kept["deployments"]) for action in actions] == [["M-main"]] * 2


def test_a_route_that_another_application_has_is_named_with_its_key() -> None:
    spec = app.ApplicationSpec(3, "new", "/keep", {})
    keep = details("keep")
    [finding] = app.taken_routes([spec], {"keep": keep})
    assert finding.path == ("applications", 3, "route_prefix")
    assert finding.message == "/keep is the route of keep, which is running"
    own = app.ApplicationSpec(0, "keep", "/keep", {})
    assert not list(app.taken_routes([own], {"keep": keep}))


def test_a_swap_of_routes_says_how() -> None:
    specs = [app.ApplicationSpec(0, "a", "/b", {}), app.ApplicationSpec(1, "b", "/a", {})]
    found = app.taken_routes(specs, {"a": details("a"), "b": details("b")})
    hint = "choose another route, delete {}, or first give it another one"
    assert [problem.hint for problem in found] == [hint.format(name) for name in "ba"]
