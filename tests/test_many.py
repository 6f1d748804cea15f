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
        ray_head.shut_down_serve()
