"""Models that can't start, on the real engine: the cause is on the screen, and what would help."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster import RayHead, run_app_v5
from user import on_request

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600), on_request]

ENGINE = {"max_model_len": 128, "enforce_eager": True, "dtype": "bfloat16"}


def application(
    name: str, model: Path | str, engine: Mapping[str, Any] | None = None, **keys: Any
) -> dict[str, Any]:
    once = {"num_cpus": 1, "num_gpus": 0.3, "max_constructor_retry_count": 1}
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {
            "llm_configs": [
                {
                    "model_loading_config": {"model_id": name, "model_source": str(model)},
                    "engine_kwargs": {**ENGINE, **(engine or {})},
                    "deployment_config": {**once, **keys.pop("deployment", {})},
                    **keys,
                }
            ]
        },
    }


def test_each_model_that_fails_says_why(
    gpu_serve_head: RayHead, tmp_path: Path, http_port: int, tiny_llama: Path
) -> None:
    unknown = tmp_path / "unknown"
    shutil.copytree(tiny_llama, unknown)
    config = json.loads((unknown / "config.json").read_text())
    config["architectures"] = ["FalconOfTheFutureForCausalLM"]
    (unknown / "config.json").write_text(json.dumps(config))
    applications = [
        application("wrong-path", "/no/such/model"),
        application("architecture", unknown),
        application("too-long", tiny_llama, {"max_model_len": 999_999}),
        application(
            "cannot-fit",
            tiny_llama,
            deployment={"num_gpus": 0},
            placement_group_config={"bundle_per_worker": {"GPU": 0.3}},
            runtime_env={"env_vars": {"VLLM_RAY_PER_WORKER_GPUS": "1.0"}},
        ),
    ]
    file = tmp_path / "config.yaml"
    options = {"host": "127.0.0.1", "port": http_port}
    file.write_text(json.dumps({"http_options": options, "applications": applications}))
    finished = run_app_v5(
        file, "--json", "--max-workers", "2", "--timeout", "300", head=gpu_serve_head, timeout_s=560
    )
    assert finished.returncode == 1, finished.stderr
    report = json.loads(finished.stdout)["applications"]
    found = {row["name"]: (row["cause"], row["hint"]) for row in report}
    expected = {
        "wrong-path": ("'/no/such/model'", "a path has to exist on every node"),
        "architecture": ("['FalconOfTheFutureForCausalLM'] are not supported", ""),
        "too-long": ("max_model_len (999999) is greater", "to 256 or less"),
        "cannot-fit": ("{'CPU': 0, 'GPU': 1.0} cannot fit", 'VLLM_RAY_PER_WORKER_GPUS: "0.3"'),
    }
    for name, (cause, hint) in expected.items():
        assert cause in found[name][0]
        assert hint in found[name][1]
    logs = next(row["logs"] for row in report if row["name"] == "cannot-fit")
    assert gpu_serve_head.run("-m", "ray.scripts.scripts", *logs[0].split()[1:]).stdout
