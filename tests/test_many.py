"""Many LLM-shaped applications at once: Ray's own LLM builder, and no replica to be paid for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import RayHead, run_app_v5
from user import about, on_request

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


@on_request
def test_many_are_built_and_deployed_at_once_time_and_again(
    serve_head: RayHead, tmp_path: Path, http_port: int
) -> None:
    asleep = application(12)
    # Ray's builder would let the ingress scale to zero, too, when all its models do.
    asleep["args"]["ingress_deployment_config"] = {"num_replicas": 1}
    config = tmp_path / "config.yaml"
    document = {
        "http_options": {"host": "127.0.0.1", "port": http_port},
        "applications": [*map(application, range(12)), asleep],
    }
    config.write_text(json.dumps(document))
    for arguments in ([], ["--force"]):
        finished = run_app_v5(config, *arguments, head=serve_head)
        assert finished.returncode == 0, (finished.stdout, finished.stderr)
        assert "Total applications deployed: 13/13" in finished.stdout
        assert finished.stdout.count("Resources per replica: 1.0 CPUs, 0.05 GPUs\n") == 13
        assert finished.stdout.count("its ingress has scaled to zero\n") == 12
        # A model that has scaled to zero is listed, and not woken up.
        last = about("llm-12", finished.stdout)
        assert "✓ GET /v1/models: answered in" in last
        assert "model-12 is scaled to zero: not woken up" in last
        deployments = serve_head.serve_details()["applications"]["llm-12"]["deployments"]
        assert [d["replicas"] for name, d in deployments.items() if name != "OpenAiIngress"] == [[]]
