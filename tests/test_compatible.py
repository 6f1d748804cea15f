"""What reaches Serve's controller equals what `serve deploy` of the same file gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import RayHead, run_app_v5, wait_until
from user import Config, app, on_request, serve_deploy

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600), on_request]

WHAT_THE_CONTROLLER_HAS = """
import json, os, ray
ray.init(address=os.environ["RAY_ADDRESS"], namespace="serve", log_to_driver=False)
controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
found = {}
for id, (info, route) in ray.get(controller.list_deployments_internal.remote()).items():
    options = info.deployment_config.model_dump(exclude={"version"})
    replica = info.replica_config
    scaling = info.deployment_config.autoscaling_config
    router = info.deployment_config.request_router_config.get_request_router_class()
    actors = [a.get_actor_class() for a in info.deployment_config.deployment_actors or []]
    options.update(
        route=route,
        ray_actor_options=replica.ray_actor_options,
        resources=replica.resource_dict,
        bundles=replica.placement_group_bundles,
        strategy=replica.placement_group_strategy,
        selector=replica.placement_group_bundle_label_selector,
        fallback=replica.placement_group_fallback_strategy,
        per_node=replica.max_replicas_per_node,
        definition=replica.deployment_def_name,
        init=[repr(replica.init_args), sorted(replica.init_kwargs)],
        ingress=[info.ingress, info.ingress_request_router],
        policy=scaling and scaling.policy.get_policy().__name__,
        router=router.__name__,
        actors=[actor.__ray_actor_class__.__name__ for actor in actors],
        external_scaler=ray.get(controller.get_external_scaler_enabled.remote(id.app_name)),
    )
    options["user_configured_option_names"] = sorted(options["user_configured_option_names"])
    if options["logging_config"]:  # on its way through a protobuf, None becomes an empty text
        options["logging_config"]["logs_dir"] = options["logging_config"]["logs_dir"] or None
    if options["autoscaling_config"]:  # and then this does not count
        del options["num_replicas"]
    found[f"{id.app_name}/{id.name}"] = options
print("FOUND " + json.dumps(found, default=repr))
"""


def good(name: str, **options: Any) -> Config:
    """An application with some options of its deployment."""
    return app(name, deployments=[{"name": "Good", **options}])


SCALING = {
    "min_replicas": 1,
    "initial_replicas": 1,
    "max_replicas": 4,
    "target_ongoing_requests": 3,
    "policy": {"policy_function": "fixture_apps:one_replica"},
}
APPLICATIONS: list[Config] = [
    app("bound", "bound"),
    app("unrouted", route_prefix=None, args={"text": "x"}, external_scaler_enabled=True),
    good("replicas", num_replicas=2, max_ongoing_requests=7, user_config=None),
    good("auto", num_replicas="auto", autoscaling_config={"max_replicas": 3}),
    good(
        "scaling",
        autoscaling_config=SCALING,
        graceful_shutdown_timeout_s=3,
        health_check_period_s=4,
        max_queued_requests=5,
    ),
    good("routed", request_router_config={"request_router_class": "fixture_apps:Router"}),
    good(
        "helped",
        deployment_actors=[{"name": "helper", "actor_class": "fixture_apps:Helper"}],
    ),
    good(
        "bundles",
        placement_group_bundles=[{"CPU": 0.1}, {"CPU": 0.2}],
        placement_group_strategy="STRICT_PACK",
    ),
    app(
        "family",
        "family",
        runtime_env={"env_vars": {"OF_THE_APP": "1", "OF_BOTH": "app"}},
        logging_config={"log_level": "DEBUG"},
        deployments=[
            {
                "name": "Child",
                "ray_actor_options": {
                    "num_cpus": 0.2,
                    "resources": {"node:__internal_head__": 0.01},
                    "memory": 1000000,
                    "runtime_env": {"env_vars": {"OF_BOTH": "child"}},
                },
            },
            {"name": "Parent", "max_replicas_per_node": 1},
        ],
    ),
]


def controller(head: RayHead) -> dict[str, Config]:
    """Every deployment's options as the controller has them, by application and name."""
    output = head.run("-c", WHAT_THE_CONTROLLER_HAS).stdout
    (line,) = (line for line in output.splitlines() if line.startswith("FOUND "))
    found: dict[str, Config] = json.loads(line.removeprefix("FOUND "))
    return found


def test_what_reaches_the_controller_equals_serve_deploy(
    serve_head: RayHead, tmp_path: Path, http_port: int
) -> None:
    config = tmp_path / "config.yaml"
    document = {
        "http_options": {"host": "127.0.0.1", "port": http_port},
        "logging_config": {"log_level": "WARNING"},
        "applications": APPLICATIONS,
    }
    config.write_text(json.dumps(document))
    finished = run_app_v5(config, head=serve_head)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    ours = controller(serve_head)
    serve_head.shut_down_serve()
    serve_deploy(serve_head, config)

    def all_there() -> bool:
        applications = serve_head.serve_details()["applications"].values()
        return len(applications) == len(APPLICATIONS) and all(
            application["deployments"] for application in applications
        )

    wait_until(all_there, 180, "`serve deploy` to be done")
    theirs = controller(serve_head)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
