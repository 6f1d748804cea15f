"""A config for others: what comes out, and what never does."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import app_v5 as app
from cluster import run_app_v5

SECRET = "hf_abcdefgh12345678"
CONFIG = f"""
applications:
- name: one
  route_prefix: /one
  import_path: ray.serve.llm:build_openai_app
  runtime_env: {{env_vars: {{HF_TOKEN: "{SECRET}", HUB: "https://me:{SECRET}@hub/x"}}}}
  args:
    llm_configs:
    - other.yaml
    - model_loading_config: {{model_id: second, model_source: "${{MODELS}}/second"}}
      deployment_config:
        cpus: 1
        gpus: ${{SHARE}}
        max_ongoing_requests: ${{ASKED}}
- name: two
  route_prefix: /two
  import_path: m:a
"""
OTHER = """
model_loading_config: {model_id: first, model_source: "${NOT_THERE:-/models}/first"}
deployment_config: {num_cpus: 1, num_gpus: 0.45}
"""
VARIABLES = {"MODELS": "/a/secret/place", "SHARE": "0.3", "ASKED": "7"}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in VARIABLES.items():
        monkeypatch.setenv(name, text)
    (tmp_path / "other.yaml").write_text(OTHER)
    file = tmp_path / "My config.yaml"
    file.write_text(CONFIG)
    return file


def export(config: Path, *arguments: str) -> tuple[int | None, str, str]:
    """The exit code, stdout and stderr; no cluster is there to be asked."""
    options = app.parse_options([str(config), "--export", *arguments])
    out, err = io.StringIO(), io.StringIO()
    session = app.Session(options, app.RayCluster(app.Options("")), out, err)
    session.work()
    return session.code, out.getvalue(), err.getvalue()


def llms(text: str) -> list[Any]:
    [application, *_] = yaml.safe_load(text)["applications"]
    found: list[Any] = application["args"]["llm_configs"]
    return found


def test_a_plain_config_has_what_a_deployment_would_have(config: Path) -> None:
    code, out, _ = export(config, "serve")
    assert code == 0
    first, second = llms(out)
    assert first["model_loading_config"]["model_source"] == "/models/first"
    for llm, share in ((first, 0.45), (second, 0.3)):
        options = llm["deployment_config"]
        assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.0}
        assert llm["placement_group_config"] == {"bundle_per_worker": {"GPU": share}}
        assert llm["engine_kwargs"] == {"gpu_memory_utilization": round(0.9 * share, 4)}
        # It hides what the application has, and so repeats it.
        assert llm["runtime_env"]["env_vars"]["VLLM_RAY_PER_WORKER_GPUS"] == str(share)
        assert llm["runtime_env"]["env_vars"]["HF_TOKEN"] == "${HF_TOKEN}"
    comments = [line for line in out.splitlines() if line.startswith("#")]
    assert any(
        "one: args.llm_configs[1].deployment_config.gpus: 0.3 → (not given)" in c for c in comments
    )
    assert any("placement_group_config" in line for line in comments)
    assert not any(" two: " in line for line in comments)


def test_secrets_are_not_written_and_texts_of_variables_stay(config: Path) -> None:
    _, out, err = export(config, "serve")
    assert SECRET not in out + err
    assert VARIABLES["MODELS"] not in out + err
    assert llms(out)[1]["model_loading_config"]["model_source"] == "${MODELS}/second"
    assert llms(out)[1]["deployment_config"]["max_ongoing_requests"] == 7  # not a text
    [application, _] = yaml.safe_load(out)["applications"]
    variables = application["runtime_env"]["env_vars"]
    assert variables == {"HF_TOKEN": "${HF_TOKEN}", "HUB": "https://***@hub/x"}
    assert "# Fill in before, with `envsubst` for example: ***, HF_TOKEN, MODELS\n" in out


def test_what_is_filled_in_stays_a_text(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `envsubst` does it, which knows nothing of YAML."""
    monkeypatch.setenv("PORT", "8001")
    variables = '{env_vars: {API_KEY: "123456789", PORT: "${PORT}"}}'
    config.write_text(CONFIG + f"  runtime_env: {variables}\n")
    _, out, _ = export(config, "serve", "--only", "two")
    filled = out.replace("${API_KEY}", "123456789").replace("${PORT}", "8001")
    [application] = yaml.safe_load(filled)["applications"]
    assert application["runtime_env"]["env_vars"] == {"API_KEY": "123456789", "PORT": "8001"}


def test_each_secret_of_a_list_has_a_name_of_its_own(config: Path) -> None:
    config.write_text(CONFIG + "  args: {api_keys: [first-secret, '${GONE:-second-secret}']}\n")
    _, out, _ = export(config, "serve", "--only", "two")
    [application] = yaml.safe_load(out)["applications"]
    assert application["args"] == {"api_keys": ["${API_KEYS_0}", "${API_KEYS_1}"]}


def test_what_comes_out_goes_in_and_needs_no_change(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = export(config, "serve")
    again = tmp_path / "again.yaml"
    again.write_text(out)
    code, _, err = export(again, "serve")
    assert (code, "environment variable HF_TOKEN is not set" in err) == (2, True)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    code, twice, err = export(again, "serve")
    assert (code, yaml.safe_load(twice)) == (0, yaml.safe_load(out))
    assert SECRET not in twice + err
    assert " → " not in twice


def test_only_what_is_chosen_and_nothing_of_a_wrong_file(config: Path) -> None:
    _, out, _ = export(config, "serve", "--only", "two")
    assert [item["name"] for item in yaml.safe_load(out)["applications"]] == ["two"]
    config.write_text(CONFIG.replace("route_prefix: /two", "rout_prefix: /two"))
    code, out, err = export(config, "serve")
    assert (code, out) == (2, "")
    assert "did you mean 'route_prefix'" in err


def test_as_a_user_calls_it(config: Path) -> None:
    finished = run_app_v5(config, "--export", "serve", "--only", "two")
    assert finished.returncode == 0
    assert yaml.safe_load(finished.stdout)["applications"][0]["name"] == "two"
    refused = run_app_v5(config, "--export", "helm")
    assert refused.returncode == 2
    assert json.dumps("helm")[1:-1] in refused.stderr


def test_what_a_variable_gives_may_be_a_date_or_elsewhere_a_secret(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAY", "2026-05-01")
    args = "  args:\n    day: ${DAY}\n    hf_token: hunter2secret\n    other: ${X:-hunter2secret}\n"
    config.write_text(CONFIG + args)
    code, out, _ = export(config, "serve", "--only", "two")
    assert (code, "hunter2secret" in out) == (0, False)
    assert "day: 2026-05-01\n" in out
