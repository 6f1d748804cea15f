"""What reaches Serve's controller equals what `serve deploy` of the same file gives."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster import PYTHON, RayHead, run_app_v5, wait_until

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]

Config = dict[str, Any]

WHAT_THE_CONTROLLER_HAS = """
import json, os, ray
ray.init(address=os.environ["RAY_ADDRESS"], namespace="serve", log_to_driver=False)
controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
found = {}
for id, (info, route) in ray.get(controller.list_deployments_internal.remote()).items():
    options = info.deployment_config.model_dump(exclude={"version"})
    replica = info.replica_config
    options.update(
        route=route,
        ray_actor_options=replica.ray_actor_options,
        resources=replica.resource_dict,
        bundles=replica.placement_group_bundles,
        strategy=replica.placement_group_strategy,
        selector=replica.placement_group_bundle_label_selector,
        per_node=replica.max_replicas_per_node,
        init=[repr(replica.init_args), sorted(replica.init_kwargs)],
        ingress=info.ingress,
    )
    options["user_configured_option_names"] = sorted(options["user_configured_option_names"])
    if options["logging_config"]:  # on its way through a protobuf, None becomes an empty text
        options["logging_config"]["logs_dir"] = options["logging_config"]["logs_dir"] or None
    if options["autoscaling_config"]:  # and then this does not count
        del options["num_replicas"]
    found[f"{id.app_name}/{id.name}"] = {key: repr(value) for key, value in options.items()}
print("FOUND " + json.dumps(found))
"""

APPLICATIONS: list[Config] = [
    {"name": "plain", "route_prefix": "/plain", "import_path": "fixture_apps:good"},
    {"name": "bound", "route_prefix": "/bound", "import_path": "fixture_apps:bound"},
    {
        "name": "replicas",
        "route_prefix": "/replicas",
        "import_path": "fixture_apps:good",
        "args": {"text": "x"},
        "deployments": [
            {"name": "Good", "num_replicas": 2, "max_ongoing_requests": 7, "user_config": None}
        ],
    },
    {
        "name": "auto",
        "route_prefix": "/auto",
        "import_path": "fixture_apps:good",
        "deployments": [
            {"name": "Good", "num_replicas": "auto", "autoscaling_config": {"max_replicas": 3}}
        ],
    },
    {
        "name": "scaling",
        "route_prefix": "/scaling",
        "import_path": "fixture_apps:good",
        "deployments": [
            {
                "name": "Good",
                "autoscaling_config": {
                    "min_replicas": 1,
                    "initial_replicas": 1,
                    "max_replicas": 4,
                    "target_ongoing_requests": 3,
                    "policy": {
                        "policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"
                    },
                },
                "graceful_shutdown_timeout_s": 3,
                "health_check_period_s": 4,
                "max_queued_requests": 5,
            }
        ],
    },
    {
        "name": "family",
        "route_prefix": "/family",
        "import_path": "fixture_apps:family",
        "runtime_env": {"env_vars": {"OF_THE_APP": "1", "OF_BOTH": "app"}},
        "logging_config": {"log_level": "DEBUG"},
        "deployments": [
            {
                "name": "Child",
                "ray_actor_options": {
                    "num_cpus": 0.2,
                    "resources": {"special": 0.5},
                    "memory": 1000000,
                    "runtime_env": {"env_vars": {"OF_BOTH": "child"}},
                },
            },
            {"name": "Parent", "max_replicas_per_node": 1},
        ],
    },
    {
        "name": "bundles",
        "route_prefix": "/bundles",
        "import_path": "fixture_apps:good",
        "deployments": [
            {
                "name": "Good",
                "placement_group_bundles": [{"CPU": 0.1}, {"CPU": 0.2}],
                "placement_group_strategy": "STRICT_PACK",
            }
        ],
    },
    {"name": "unrouted", "route_prefix": None, "import_path": "fixture_apps:good"},
]


def controller(head: RayHead) -> dict[str, dict[str, str]]:
    """Every deployment's options as the controller has them, by application and name."""
    output = head.run("-c", WHAT_THE_CONTROLLER_HAS).stdout
    (line,) = (line for line in output.splitlines() if line.startswith("FOUND "))
    found: dict[str, dict[str, str]] = json.loads(line.removeprefix("FOUND "))
    return found


def serve_deploy(head: RayHead, config: Path) -> None:
    """`serve deploy`, and wait until all of it runs."""
    command = [PYTHON, "-m", "ray.serve.scripts", "deploy", str(config)]
    subprocess.run(command, env=head.env, check=True, capture_output=True, timeout=120)

    def all_run() -> bool:
        applications = head.serve_details()["applications"].values()
        return len(applications) == len(APPLICATIONS) and all(
            application["status"] == "RUNNING" for application in applications
        )

    wait_until(all_run, 180, "`serve deploy` to be done")


def test_what_reaches_the_controller_equals_serve_deploy(tmp_path: Path, http_port: int) -> None:
    config = tmp_path / "config.yaml"
    document = {
        "http_options": {"host": "127.0.0.1", "port": http_port},
        "logging_config": {"log_level": "WARNING"},
        "applications": APPLICATIONS,
    }
    config.write_text(json.dumps(document))
    with RayHead(resources={"special": 2}) as head:
        finished = run_app_v5(config, head=head)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        ours = controller(head)
        head.shut_down_serve()
        serve_deploy(head, config)
        theirs = controller(head)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
