"""`--plan` on a real cluster: what it shows, its exit code, and that it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from cluster import RayHead, get_json, run_app_v5
from user import Config, about, app

pytestmark = [pytest.mark.serve, pytest.mark.timeout(400)]


def llm(name: str, gpus: float, least: int = 1, most: int = 1, **keys: Any) -> Config:
    scaling = {"min_replicas": least, "max_replicas": most}
    return {
        "model_loading_config": {"model_id": name},
        "deployment_config": {"num_cpus": 1, "num_gpus": gpus, "autoscaling_config": scaling},
        **keys,
    }


def llm_app(name: str, *llms: Config) -> Config:
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": list(llms)},
    }


def named_actors(head: RayHead) -> set[str]:
    """The living actors with a name; an earlier LLM leaves `llm_serve_telemetry` for good."""
    actors = get_json(f"{head.dashboard_url}/api/v0/actors?detail=true&limit=10000")
    rows = actors["data"]["result"]["result"]
    return {actor["name"] for actor in rows if actor["name"] and actor["state"] != "DEAD"}


def plan(head: RayHead, path: Path, *applications: Config, **top: Any) -> CompletedProcess[str]:
    config = path / "config.yaml"
    config.write_text(json.dumps({"applications": applications, **top}))
    before = named_actors(head)
    finished = run_app_v5(config, "--plan", head=head)
    assert named_actors(head) == before, "a plan must not start Serve"
    assert "Traceback" not in finished.stderr
    return finished


def test_a_plan_shows_what_goes_where(ray_head: RayHead, tmp_path: Path) -> None:
    finished = plan(
        ray_head,
        tmp_path,
        llm_app("falcon3", llm("f3", 0.45, 1, 3)),
        llm_app("h1", llm("fh1", 0.45, 1, 5)),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    out = finished.stdout
    assert "LLMServer:f3: 1.0 CPUs, 0.45 GPUs per replica, replicas 1 → 3 (autoscaling)" in out
    assert "OpenAiIngress (ingress): 1.0 CPUs per replica, replicas 1" in out
    assert (
        "GPU 0 █████████▓▓▓▓▓▓▓▓▓·· falcon3/LLMServer:f3 0.45 + h1/LLMServer:fh1 0.45 · 0.10 free"
        in out
    )
    assert "CPU: 4 of 16 used by this plan, 12 free" in out
    assert "falcon3/LLMServer:f3: room for 3 of 3 replicas" in out
    assert "h1/LLMServer:fh1: room for 3 of 5 replicas" in out
    assert "create" in out
    assert "f3 shares its GPU and measures at its start what is free there" in out


def test_what_does_not_fit_and_what_is_not_built_leaves_the_rest_planned(
    ray_head: RayHead, tmp_path: Path
) -> None:
    greedy: Config = {"engine_kwargs": {"gpu_memory_utilization": 0.6}}
    three: Config = {"engine_kwargs": {"tensor_parallel_size": 3}, "placement_group_config": None}
    finished = plan(
        ray_head,
        tmp_path,
        llm_app("first", llm("a", 1.0, 2, 2)),
        llm_app("second", llm("b", 0.45, **greedy)),
        llm_app("big", llm("c", 3, **three)),
        app("broken", "raises"),
        app("fine"),
    )
    assert finished.returncode == 1
    out = finished.stdout
    assert "second/LLMServer:b: predicted: does not fit now; needs 0.45 GPU; " in out
    assert "; the most free in one place is 0 (node " in out
    assert ", GPU 0, held by first/LLMServer:a 1)" in out
    assert "big/LLMServer:c: predicted: can never fit; needs " in out
    assert "Cause: LookupError: the builder found nothing" in out
    assert "Good (ingress): 0.1 CPUs per replica, replicas 1" in out
    assert "0.6 of the card's memory is more than the 0.45 GPU" in finished.stderr


NIXL = {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}
AS_IN_RAYS_DOCUMENTATION: tuple[tuple[str, Config, list[str]], ...] = (
    (
        "overrides and num_replicas auto",
        app(
            "family",
            "family",
            runtime_env={"env_vars": {"A": "1"}},
            deployments=[
                {
                    "name": "Child",
                    "num_replicas": "auto",
                    "ray_actor_options": {
                        "num_cpus": 0.2,
                        "label_selector": {"card": "H100"},
                        "fallback_strategy": [{"label_selector": {"card": "!H100"}}],
                    },
                },
                {
                    "name": "Parent",
                    "autoscaling_config": {
                        "min_replicas": 1,
                        "initial_replicas": 2,
                        "max_replicas": 3,
                    },
                },
            ],
        ),
        [
            "Child: 0.2 CPUs per replica, replicas 1 → 100 (autoscaling)",
            "Parent (ingress): 0.1 CPUs per replica, replicas 1 → 3 (autoscaling, 2 at first)",
        ],
    ),
    (
        "LoRA",
        llm_app(
            "lora",
            llm(
                "base",
                0.25,
                lora_config={
                    "dynamic_lora_loading_path": "s3://bucket/loras",
                    "max_num_adapters_per_replica": 4,
                },
                engine_kwargs={"enable_lora": True, "max_loras": 4, "max_lora_rank": 32},
            ),
        ),
        ["LLMServer:base: 1.0 CPUs, 0.25 GPUs"],
    ),
    (
        "prefill and decode",
        {
            "name": "pd",
            "route_prefix": "/pd",
            "import_path": "ray.serve.llm:build_pd_openai_app",
            "args": {
                "prefill_config": llm("m", 0.25, engine_kwargs=NIXL),
                "decode_config": llm("m", 0.25, engine_kwargs=NIXL),
            },
        },
        ["1.0 CPUs, 0.25 GPUs per replica"],
    ),
    (
        "data parallel",
        {
            "name": "dp",
            "route_prefix": "/dp",
            "import_path": "ray.serve.llm:build_dp_openai_app",
            "args": {
                "llm_config": {
                    "model_loading_config": {"model_id": "m"},
                    "engine_kwargs": {"data_parallel_size": 2},
                    "deployment_config": {"num_gpus": 0.25, "num_replicas": 1},
                }
            },
        },
        ["1.0 CPUs, 0.25 GPUs per replica, replicas 2"],
    ),
    (
        "two models in one application",
        llm_app("two", llm("m1", 0.2), llm("m2", 0.2)),
        ["LLMServer:m1: 1.0 CPUs, 0.2 GPUs", "LLMServer:m2: 1.0 CPUs, 0.2 GPUs"],
    ),
)


def test_configs_as_in_rays_documentation(ray_head: RayHead, tmp_path: Path) -> None:
    top = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "grpc_options": {"port": 9000, "grpc_servicer_functions": []},
        "logging_config": {"log_level": "INFO", "encoding": "JSON"},
    }
    applications = [application for _, application, _ in AS_IN_RAYS_DOCUMENTATION]
    finished = plan(ray_head, tmp_path, *applications, **top)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for title, application, shown in AS_IN_RAYS_DOCUMENTATION:
        for text in shown:
            assert text in about(application["name"], finished.stdout), title
