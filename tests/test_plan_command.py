"""`--plan` on a real cluster: what it shows, its exit code, and that it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from cluster import RayHead, get_json, run_app_v5

pytestmark = [pytest.mark.serve, pytest.mark.timeout(400)]

Config = dict[str, Any]
FIXTURE = {"import_path": "fixture_apps:good"}


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with RayHead(num_cpus=8, num_gpus=2) as head:
        yield head


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


def plan(head: RayHead, path: Path, *applications: Config, **top: Any) -> CompletedProcess[str]:
    config = path / "config.yaml"
    config.write_text(json.dumps({"applications": applications, **top}))
    finished = run_app_v5(config, "--plan", head=head)
    actors = get_json(f"{head.dashboard_url}/api/v0/actors?detail=true&limit=1000")
    started = [actor["name"] for actor in actors["data"]["result"]["result"] if actor["name"]]
    assert started == [], "a plan must not start Serve"
    assert "Traceback" not in finished.stderr
    return finished


def test_a_plan_shows_what_goes_where(head: RayHead, tmp_path: Path) -> None:
    finished = plan(
        head,
        tmp_path,
        llm_app("falcon3", llm("f3", 0.45, 1, 3)),
        llm_app("h1", llm("fh1", 0.45, 1, 5)),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    out = finished.stdout
    assert "LLMServer:f3: 1.0 CPUs, 0.45 GPUs per replica, replicas 1 → 3 (autoscaling)" in out
    assert "OpenAiIngress (ingress): 1.0 CPUs per replica, replicas 1" in out
    assert "GPU 0: falcon3/LLMServer:f3 0.45 + h1/LLMServer:fh1 0.45 · 0.10 free" in out
    assert "CPU: 4 of 8 used by this plan, 4 free" in out
    assert "falcon3/LLMServer:f3: room for 3 of 3 replicas" in out
    assert "h1/LLMServer:fh1: room for 3 of 5 replicas" in out
    assert "create" in out


def test_what_can_never_fit_and_what_does_not_fit_now(head: RayHead, tmp_path: Path) -> None:
    finished = plan(
        head,
        tmp_path,
        llm_app("first", llm("a", 1.0, 2, 2)),
        llm_app("second", llm("b", 0.45)),
        llm_app(
            "big",
            llm("c", 3, engine_kwargs={"tensor_parallel_size": 3}, placement_group_config=None),
        ),
    )
    assert finished.returncode == 1
    assert (
        "second/LLMServer:b: predicted: does not fit now; needs 0.45 GPU; "
        "the largest free share is 0 " in finished.stdout
    )
    assert "big/LLMServer:c: predicted: can never fit" in finished.stdout
    assert "add a node" in finished.stdout


def test_memory_that_adds_up_to_more_than_a_card_is_warned_about(
    head: RayHead, tmp_path: Path
) -> None:
    greedy: Config = {"engine_kwargs": {"gpu_memory_utilization": 0.6}}
    finished = plan(
        head,
        tmp_path,
        llm_app("a", llm("a", 0.45, **greedy)),
        llm_app("b", llm("b", 0.45, **greedy)),
    )
    assert "GPU 0: gpu_memory_utilization adds up to 1.2;" in finished.stdout
    assert finished.stderr.count("warning: ") == 2


def test_a_broken_builder_is_named_and_the_rest_is_planned(head: RayHead, tmp_path: Path) -> None:
    broken = {"name": "broken", "route_prefix": "/x", "import_path": "fixture_apps:raises"}
    finished = plan(head, tmp_path, broken, {"name": "fine", **FIXTURE})
    assert finished.returncode == 1
    assert "Cause: LookupError: the builder found nothing" in finished.stdout
    assert "Good (ingress): 0.1 CPUs per replica, replicas 1" in finished.stdout


LORA = llm(
    "base",
    0.5,
    lora_config={
        "dynamic_lora_loading_path": "s3://bucket/loras",
        "max_num_adapters_per_replica": 4,
    },
    engine_kwargs={"enable_lora": True, "max_loras": 4, "max_lora_rank": 32},
)
NIXL = {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}


@pytest.mark.parametrize(
    ("applications", "shown"),
    [
        pytest.param(
            [
                {
                    "name": "family",
                    "import_path": "fixture_apps:family",
                    "runtime_env": {"env_vars": {"A": "1"}},
                    "deployments": [
                        {
                            "name": "Child",
                            "num_replicas": "auto",
                            "ray_actor_options": {"num_cpus": 0.2},
                        },
                        {"name": "Parent", "num_replicas": 2, "max_ongoing_requests": 10},
                    ],
                }
            ],
            ["Child: 0.2 CPUs per replica, replicas 1 → 100 (autoscaling)", "replicas 2"],
            id="overrides and num_replicas auto",
        ),
        pytest.param([llm_app("lora", LORA)], ["LLMServer:base: 1.0 CPUs, 0.5 GPUs"], id="LoRA"),
        pytest.param(
            [
                {
                    "name": "pd",
                    "import_path": "ray.serve.llm:build_pd_openai_app",
                    "args": {
                        "prefill_config": llm("m", 0.5, engine_kwargs=NIXL),
                        "decode_config": llm("m", 0.5, engine_kwargs=NIXL),
                    },
                }
            ],
            ["1.0 CPUs, 0.5 GPUs per replica"],
            id="prefill and decode",
        ),
        pytest.param(
            [
                {
                    "name": "dp",
                    "import_path": "ray.serve.llm:build_dp_openai_app",
                    "args": {
                        "llm_config": {
                            "model_loading_config": {"model_id": "m"},
                            "engine_kwargs": {"data_parallel_size": 2},
                            "deployment_config": {"num_gpus": 1, "num_replicas": 1},
                        }
                    },
                }
            ],
            ["1.0 CPUs, 1.0 GPUs per replica, replicas 2"],
            id="data parallel",
        ),
        pytest.param(
            [llm_app("two", llm("m1", 0.3), llm("m2", 0.3))],
            ["LLMServer:m1: 1.0 CPUs, 0.3 GPUs", "LLMServer:m2: 1.0 CPUs, 0.3 GPUs"],
            id="two models in one application",
        ),
    ],
)
def test_configs_as_in_rays_documentation(
    head: RayHead, tmp_path: Path, applications: list[Config], shown: list[str]
) -> None:
    top = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "grpc_options": {"port": 9000, "grpc_servicer_functions": []},
        "logging_config": {"log_level": "INFO", "encoding": "JSON"},
    }
    finished = plan(head, tmp_path, *applications, **top)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for text in shown:
        assert text in finished.stdout
