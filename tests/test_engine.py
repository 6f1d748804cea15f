"""The real vLLM engine on tiny models, deployed as a user deploys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import RayHead, chat, run_app_v5, wait_until
from user import on_request, serve_deploy

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ENGINE = {"max_model_len": 128, "enforce_eager": True, "dtype": "bfloat16"}


@pytest.fixture
def one_gpu_head() -> Iterator[RayHead]:
    """A cluster with one logical GPU, which vLLM takes for a real one."""
    with RayHead(num_gpus=1, logical_gpus=True) as head:
        yield head


def application(
    name: str, model: Path, deployment: dict[str, Any], **engine: Any
) -> dict[str, Any]:
    """An application with one LLM, as in multi_model_config.yaml."""
    return {
        "name": f"{name}-app",
        "route_prefix": f"/{name}",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {
            "llm_configs": [
                {
                    "model_loading_config": {"model_id": name, "model_source": str(model)},
                    "deployment_config": deployment,
                    "engine_kwargs": {**ENGINE, **engine},
                }
            ]
        },
    }


def deploy(
    head: RayHead, path: Path, port: int, *applications: dict[str, Any], timeout_s: float = 600
) -> str:
    """Deploy with app_v5.py, and return what it prints; it must end with 0."""
    config = path / "config.yaml"
    document = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications}
    config.write_text(json.dumps(document))
    finished = run_app_v5(config, head=head, timeout_s=timeout_s)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def reserved(head: RayHead) -> list[list[dict[str, float]]]:
    """The bundles of every placement group that is there now, as Ray has them."""
    script = (
        "import json, os, ray; ray.init(address=os.environ['RAY_ADDRESS'], log_to_driver=False);"
        "groups = ray.util.placement_group_table().values();"
        "print(json.dumps([[g['bundles'][i] for i in sorted(g['bundles'])] "
        "for g in groups if g['state'] == 'CREATED']))"
    )
    groups: list[list[dict[str, float]]] = json.loads(head.run("-c", script).stdout)
    return groups


def wait_for_gpu_line(head: RayHead, expected: str) -> None:
    """`ray status` is the autoscaler's report, a few seconds old; its totals may have a float's
    noise (0.8999999999999999), what is used and reserved has not."""
    wait_until(
        lambda: re.search(expected, head.ray_status()), 30, f"`ray status` to say {expected}"
    )


def test_both_architectures_answer_and_reserve_exactly_their_cpu(
    serve_head: RayHead, tmp_path: Path, http_port: int, tiny_llama: Path, tiny_falcon_h1: Path
) -> None:
    share = {"num_cpus": 1, "num_gpus": 0}
    hybrid = application("falcon-h1", tiny_falcon_h1, share)
    # The other one has the 1 GiB of the cluster's environment.
    hybrid["args"]["llm_configs"][0]["runtime_env"] = {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "2"}}
    summary = deploy(
        serve_head, tmp_path, http_port, application("falcon3", tiny_llama, share), hybrid
    )
    assert "Total applications deployed: 2/2" in summary
    assert summary.count("Resources per replica: 1.0 CPUs\n") == 2
    for name in ("falcon3", "falcon-h1"):
        assert f"Base URL: http://localhost:{http_port}/{name}\n" in summary
        assert isinstance(chat(f"http://localhost:{http_port}/{name}", name), str)
        assert f"✓ POST /v1/chat/completions to {name}: answered in" in summary
    assert reserved(serve_head) == [[{"CPU": 1.0}], [{"CPU": 1.0}]]
    assert summary.count("1.0 CPUs, on ") == 4  # the two models and their ingresses

    engines = engine_pids(serve_head)
    assert len(engines) == 2
    config = tmp_path / "config.yaml"
    assert (
        predicted(serve_head, config)
        == logged(serve_head)
        == {
            ("2,097,152", "16384.00"),
            ("1,398,101", "10922.67"),
        }
    )
    more = {**share, "autoscaling_config": {"min_replicas": 1, "max_replicas": 2}}
    again = deploy(
        serve_head,
        tmp_path,
        http_port,
        application("falcon3", tiny_llama, more),
        hybrid,
    )
    assert "in place because args.llm_configs[0].deployment_config.autoscaling_config" in again
    assert "   unchanged" in again
    assert engine_pids(serve_head) == engines


def predicted(head: RayHead, config: Path) -> set[tuple[str, str]]:
    """The tokens and full requests that vLLM said each engine has room for before it started: the
    run that deployed it keeps that in the cluster."""
    plan = json.loads(run_app_v5(config, "--plan", "--json", head=head).stdout)
    assert {row["change"] for row in plan["applications"]} == {"unchanged"}
    rooms = [room for row in plan["applications"] for room in row["rooms"] if room]
    return {(f"{room['tokens']:,}", f"{room['requests']:.2f}") for room in rooms}


def logged(head: RayHead) -> set[tuple[str, str]]:
    """The same, as the engines say when they have started (vllm/v1/core/kv_cache_utils.py)."""
    line = re.compile(r"KV cache size: ([\d,]+) tokens, Maximum concurrency for .*: ([\d.]+)x")
    logs = (head.temp_dir / "session_latest" / "logs").glob("worker-*")
    return {pair for log in logs for pair in line.findall(log.read_text(errors="replace"))}


def engine_pids(head: RayHead) -> set[int]:
    """The processes of vLLM's engines; vLLM names them so (vllm/v1/engine/core.py)."""
    return {
        process.pid
        for process in head.nodes[0].processes()
        if "EngineCore" in " ".join(process.cmdline())
    }


@on_request
def test_two_replicas_on_the_gpu_code_path_share_one_gpu(
    one_gpu_head: RayHead, tmp_path: Path, http_port: int, tiny_llama: Path
) -> None:
    share = {"num_cpus": 1, "num_gpus": 0.45, "num_replicas": 2}
    summary = deploy(one_gpu_head, tmp_path, http_port, application("falcon3", tiny_llama, share))
    assert "Resources per replica: 1.0 CPUs, 0.45 GPUs\n" in summary
    assert re.search(
        r"✓ Reserved by LLMServer:falcon3: 1.0 CPUs, 0.45 GPUs, on \S+ GPU 0 \(2 replicas\)",
        summary,
    )
    assert reserved(one_gpu_head) == [[{"CPU": 1.0, "GPU": 0.45}]] * 2
    config = tmp_path / "config.yaml"
    assert predicted(one_gpu_head, config) == logged(one_gpu_head) == {("2,097,152", "16384.00")}
    wait_for_gpu_line(one_gpu_head, r" GPU \(0\.9 used of 0\.9 reserved")
    assert isinstance(chat(f"http://localhost:{http_port}/falcon3", "falcon3"), str)


@on_request
def test_tensor_parallel_workers_share_what_the_replica_declares(
    gpu_serve_head: RayHead, tmp_path: Path, http_port: int, tiny_llama: Path
) -> None:
    share = {"num_cpus": 1, "num_gpus": 0.9}
    summary = deploy(
        gpu_serve_head,
        tmp_path,
        http_port,
        application("falcon3", tiny_llama, share, tensor_parallel_size=2),
    )
    assert "✓ Reserved by LLMServer:falcon3: 1.0 CPUs, 0.9 GPUs, on " in summary
    assert reserved(gpu_serve_head) == [[{"CPU": 1.0, "GPU": 0.45}, {"GPU": 0.45}]]
    wait_for_gpu_line(gpu_serve_head, r" GPU \(0\.9 used of 0\.9 reserved")
    assert isinstance(chat(f"http://localhost:{http_port}/falcon3", "falcon3"), str)


@on_request
def test_a_plain_config_reserves_the_same_without_this_program(
    gpu_serve_head: RayHead, tmp_path: Path, http_port: int, tiny_llama: Path, tiny_falcon_h1: Path
) -> None:
    share = {"num_cpus": 1, "num_gpus": 0.45}
    models = {"falcon3": tiny_llama, "falcon-h1": tiny_falcon_h1}
    applications = [application(name, model, share) for name, model in models.items()]
    config, plain = tmp_path / "config.yaml", tmp_path / "plain.yaml"
    options = {"host": "127.0.0.1", "port": http_port}
    config.write_text(json.dumps({"http_options": options, "applications": applications}))
    exported = run_app_v5(config, "--export", "serve", head=gpu_serve_head)
    plain.write_text(exported.stdout)
    serve_deploy(gpu_serve_head, plain)

    def all_run() -> bool:
        found = gpu_serve_head.serve_details()["applications"].values()
        return [row["status"] for row in found] == ["RUNNING"] * 2

    wait_until(all_run, 400, "both applications to run")
    assert reserved(gpu_serve_head) == [[{"CPU": 1.0, "GPU": 0.45}]] * 2
    for name in models:
        assert isinstance(chat(f"http://localhost:{http_port}/{name}", name), str)
    planned = run_app_v5(config, "--plan", head=gpu_serve_head)
    assert planned.stdout.count("RESTART because `serve deploy` brought it") == 2
