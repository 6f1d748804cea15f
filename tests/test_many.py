"""Many LLM-shaped applications at once: Ray's own LLM builder, and no replica to be paid for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import RayHead, run_app_v5

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]

FROM_ZERO = {"min_replicas": 0, "initial_replicas": 0, "max_replicas": 2}


def application(number: int) -> dict[str, Any]:
    return {
        "name": f"llm-{number}",
        "route_prefix": f"/llm-{number}",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {
            "llm_configs": [
                {
                    "model_loading_config": {"model_id": f"model-{number}"},
                    "deployment_config": {
                        "num_cpus": 1,
                        "num_gpus": 0.05,
                        "autoscaling_config": FROM_ZERO,
                    },
                }
            ],
            "ingress_deployment_config": {"autoscaling_config": FROM_ZERO},
        },
    }


def test_twelve_are_built_and_deployed_at_once_time_and_again(
    ray_head: RayHead, tmp_path: Path, http_port: int
) -> None:
    config = tmp_path / "config.yaml"
    document = {
        "http_options": {"host": "127.0.0.1", "port": http_port},
        "applications": [application(number) for number in range(12)],
    }
    config.write_text(json.dumps(document))
    for attempt in range(4):
        finished = run_app_v5(config, "--max-workers", "12", head=ray_head)
        assert finished.returncode == 0, (attempt, finished.stdout, finished.stderr)
        assert "Total applications deployed: 12/12" in finished.stdout
        assert finished.stdout.count("Resources per replica: 1.0 CPUs, 0.05 GPUs\n") == 12
        assert finished.stdout.count("its ingress has scaled to zero (--wake asks it)") == 12
        ray_head.shut_down_serve()


def test_a_model_that_has_scaled_to_zero_is_listed_and_not_woken_up(
    ray_head: RayHead, tmp_path: Path, http_port: int
) -> None:
    asleep = application(0)
    # Ray's builder would let the ingress scale to zero, too, when all its models do.
    asleep["args"]["ingress_deployment_config"] = {"num_replicas": 1}
    config = tmp_path / "config.yaml"
    options = {"host": "127.0.0.1", "port": http_port}
    config.write_text(json.dumps({"http_options": options, "applications": [asleep]}))
    finished = run_app_v5(config, head=ray_head)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "✓ GET /v1/models: answered in" in finished.stdout
    assert "model-0 is scaled to zero: not woken up (--wake asks it)" in finished.stdout
    deployments = ray_head.serve_details()["applications"]["llm-0"]["deployments"]
    assert [d["replicas"] for name, d in deployments.items() if name != "OpenAiIngress"] == [[]]
    ray_head.shut_down_serve()
