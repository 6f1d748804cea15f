"""What Ray's documentation writes is taken, and what it writes for others is told apart exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import app_v5 as app
from documented_configs import DOCUMENTED, LLMS, OPENAI, SERVE, go_where_they_are
from test_config import NO_CONFIG, problems

BY_SERVE_DEPLOY = "is not taken for single applications: leave it out, or use `serve deploy`"
REMOTE_ONLY = (
    "runtime_envs in the Serve config support only remote URIs in working_dir and py_modules, or "
    '"local://" URIs for directories that already exist on every node. Got error when parsing '
    "URI: Expected URI but received path "
)
IGNORED = "unknown key; Ray ignores it"
NOT_OF_VLLM = "unknown key, which the installed Ray and vLLM do not take"
LLM = "applications[0].args.llm_configs[0]"
DEPLOYMENT = "applications[0].deployments[0]"


@pytest.fixture(autouse=True)
def with_what_the_configs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_where_they_are(tmp_path, monkeypatch)


# -- what is taken ------------------------------------------------------------------------------


def test_there_are_many_and_no_two_are_the_same() -> None:
    assert len(DOCUMENTED) >= 60
    parsed = [yaml.safe_load(text) for text in DOCUMENTED.values()]
    assert all(parsed.count(data) == 1 for data in parsed)
    assert min(len(SERVE), len(LLMS)) >= 40


OF_A_ROUTER = "prefix-aware routing"  # which Ray imports, with all of its LLM builders


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.serve] * (n == OF_A_ROUTER)) for n in DOCUMENTED],
)
def test_what_the_documentation_writes_is_taken_as_ray_takes_it(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load(DOCUMENTED[name]))
    assert [line for line in problems(DOCUMENTED[name]) if ": warning: " not in line] == []


ONCE_REFUSED = [
    pytest.param(
        OPENAI
        + """
    - model_loading_config:
        model_id: mirrored
        model_source:
          bucket_uri: s3://some-bucket/mirrored
          extra_files: [{bucket_uri: "s3://more/files", destination_path: /tmp/more}]
""",
        id="extra files of a bucket",
    ),
    pytest.param(
        OPENAI
        + """
    - model_loading_config: {model_id: sg, model_source: someone/SG-8B}
      server_cls: ray.llm._internal.serve.engines.sglang.SGLangServer
      engine_kwargs: {model_path: someone/SG-8B, tp_size: 1, mem_fraction_static: 0.8}
""",
        id="SGLang: engine_kwargs of another engine",
    ),
    pytest.param(
        OPENAI
        + """
    - model_loading_config: {model_id: sg, model_source: someone/SG-70B}
      server_cls: ray.llm._internal.serve.engines.sglang.SGLangServer
      placement_group_config:
        placement_group_bundles: [{CPU: 1, GPU: 4}, {GPU: 4}]
        placement_group_strategy: PACK
""",
        id="SGLang: a bundle for each node",
    ),
]


@pytest.mark.parametrize("text", ONCE_REFUSED)
def test_what_was_once_refused_is_taken(text: str) -> None:
    assert [line for line in problems(text) if ": warning: " not in line] == []


# -- documented, and refused on purpose ---------------------------------------------------------

ON_PURPOSE = [
    pytest.param(
        """applications:
- name: together
  import_path: together:app
  autoscaling_policy:
    policy_function: policies:by_the_clock
  deployments:
  - name: Before
    autoscaling_config: {min_replicas: 1, max_replicas: 5}
""",
        [
            ":4:3: applications[0].autoscaling_policy: "
            f"{{'policy_function': 'policies:by_the_clock'}} {BY_SERVE_DEPLOY}"
        ],
        id="one policy for an application",
    ),
    pytest.param(
        "target_capacity: 40\napplications:\n- import_path: m:app\n",
        [f":1:1: target_capacity: 40 {BY_SERVE_DEPLOY}"],
        id="target_capacity",
    ),
    pytest.param(
        "applications:\n- import_path: m:app\n  runtime_env:\n    working_dir: .\n",
        [f":3:3: applications[0].runtime_env: {REMOTE_ONLY}."],
        id="the folder as working_dir",
    ),
    pytest.param(
        "applications:\n- import_path: m:app\n  runtime_env: {py_modules: [./lib]}\n",
        [f":3:3: applications[0].runtime_env: {REMOTE_ONLY}./lib"],
        id="a folder as py_modules",
    ),
    pytest.param(
        """applications:
- import_path: m:app
  deployments:
  - name: D
    ray_actor_options: {runtime_env: {working_dir: /srv/app}}
""",
        [f":5:25: {DEPLOYMENT}.ray_actor_options.runtime_env: {REMOTE_ONLY}/srv/app"],
        id="a deployment's folder",
    ),
    # vLLM has left these; older pages and samples still write them.
    pytest.param(
        f"{OPENAI}    - model_loading_config: {{model_id: m}}\n"
        "      engine_kwargs: {task: embed}\n",
        [f":6:23: {LLM}.engine_kwargs.task: {NOT_OF_VLLM}"],
        id="the task of an embedding model",
    ),
    pytest.param(
        f"{OPENAI}    - model_loading_config: {{model_id: m}}\n"
        "      engine_kwargs: {disable_log_requests: true}\n",
        [
            f":6:23: {LLM}.engine_kwargs.disable_log_requests: unknown key, "
            "did you mean 'enable_log_requests'?"
        ],
        id="no log of requests",
    ),
    pytest.param(
        "name: one\nimport_path: m:app\nhost: 0.0.0.0\nport: 8000\n",
        [NO_CONFIG],
        id="the old form with all that belongs to it",
    ),
    pytest.param(
        "import_path: m:app\n\nruntime_env: {}\n\ndeployments:\n- name: D\n  num_replicas: 1\n",
        [NO_CONFIG],
        id="the old form as `serve build` wrote it",
    ),
    pytest.param(
        "host: 0.0.0.0\nport: 8000\nimport_path: ray.serve.llm:build_openai_app\nargs: {}\n",
        [NO_CONFIG],
        id="the old form of an LLM",
    ),
]


@pytest.mark.parametrize(("text", "expected"), ON_PURPOSE)
def test_what_is_refused_on_purpose(text: str, expected: list[str]) -> None:
    assert problems(text) == expected


# -- configs of others --------------------------------------------------------------------------

OF_ANYSCALE = {
    "name": "shop",
    "image_uri": "registry.example.org/ray-llm:2.60.0",
    "containerfile": "./Dockerfile",
    "registry_login_secret": "login",
    "ray_version": "2.60.0",
    "compute_config": "{auto_select_worker_config: true, head_node: {instance_type: big}}",
    "working_dir": ".",
    "excludes": "[.git]",
    "requirements": "[torch]",
    "env_vars": "{HF_TOKEN: hf_x, N: 5}",
    "py_modules": "[lib]",
    "cloud": "",
    "project": "shop",
    "query_auth_token_enabled": "false",
    "ray_gcs_external_storage_config": "{enabled: true}",
    "tags": "{team: a}",
    "version_name": "v2",
}
"""What an Anyscale service says at its top, beside what is Ray's."""


@pytest.mark.parametrize("key", OF_ANYSCALE)
def test_a_key_of_an_anyscale_service_is_a_warning(key: str) -> None:
    text = f"{key}: {OF_ANYSCALE[key]}\napplications:\n- import_path: m:app\n"
    assert problems(text) == [f":1:1: warning: {key}: {IGNORED}"]


def test_a_whole_anyscale_service_is_taken() -> None:
    lines = [f"{key}: {value}" for key, value in OF_ANYSCALE.items()]
    lines += ["http_options: {request_timeout_s: 60}", "logging_config: {log_level: INFO}"]
    lines += ["tracing_config: {enabled: true}", "applications:", "- import_path: m:app", ""]
    assert problems("\n".join(lines)) == [
        f":{line}:1: warning: {key}: {IGNORED}" for line, key in enumerate(OF_ANYSCALE, start=1)
    ]


def test_an_anyscale_service_of_the_first_kind_has_no_applications() -> None:
    text = "name: s\ncluster_env: e:5\nray_serve_config:\n  applications: [{import_path: m:app}]\n"
    assert problems(text) == [NO_CONFIG]


def test_an_anyscale_service_with_a_slip_is_told_only_of_that() -> None:
    text = "name: s\nworking_dir: .\nhttp_option: {port: 1}\napplications: [{import_path: m:app}]\n"
    assert problems(text) == [
        f":1:1: warning: name: {IGNORED}",
        f":2:1: warning: working_dir: {IGNORED}",
        ":3:1: http_option: unknown key, did you mean 'http_options'?",
    ]


# -- builders of others -------------------------------------------------------------------------

FOREIGN = "applications:\n- name: mine\n  import_path: mine:build\n  args:\n    "
OF_OTHERS = {
    "paths": "llm_configs: [./a.yaml, s3://bucket/b.yaml]",
    "one path": "llm_config: a.yaml",
    "mappings with other keys": "llm_configs: [{model: m, gpus: 2, port: 99999}]",
    "texts": "llm_configs: [small, large]",
    "a mapping by name": "llm_configs: {small: {path: a}}",
    "a number": "llm_configs: 5",
    "an LLM with more in it": "llm_configs: [{model_loading_config: {model_id: m}, own: 1}]",
    "other values": "llm_configs: [{model_loading_config: {model_id: m}, deployment_config: "
    "{own: 1, num_gpus: x}, engine_kwargs: [a]}]",
    "prefill and decode": "prefill_config: {a: 1}\n    decode_config: b.yaml",
    "mixed keys": "llm_configs: [{7: a, b: 2, true: c}]",
    "ingress options": "ingress_deployment_config: {own: 1}\n    llm_configs: [a]",
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_foreign_builder_takes_what_it_likes(name: str) -> None:
    text = FOREIGN + OF_OTHERS[name] + "\n"
    assert problems(text) == []
    (application,) = loaded(text)
    if "model_loading_config" not in text:  # what looks like an LLM is fitted to its share
        given = yaml.safe_load(text)["applications"][0]["args"]
        assert application["args"] == json.loads(json.dumps(given))  # as Ray sends them


def loaded(text: str) -> list[app.Config]:
    """A config's applications as the program would deploy them."""
    Path("config.yaml").write_text(text)
    document = app.Document("config.yaml", {})
    applications, _ = app.read_applications(document.data)
    return [application.config for application in applications]


FOREIGN_ONCE_REFUSED = {
    "a text as model_loading_config": "llm_configs: [{model_loading_config: small}]",
    "no model_id": "llm_configs: [{model_loading_config: {name: small}}]",
    "one model twice": "llm_configs: [{model_loading_config: {model_id: m}}, "
    "{model_loading_config: {model_id: m}}]",
    "bundles of its own": "llm_configs: [{model_loading_config: {model_id: m}, "
    "deployment_config: {placement_group_bundles: [{CPU: 1}]}}]",
    "an own form of names": "llm_configs: [{model_loading_config: {model_id: 'a#b'}}]",
}


@pytest.mark.parametrize("name", FOREIGN_ONCE_REFUSED)
def test_a_foreign_builder_is_not_held_to_the_rules_of_rays(name: str) -> None:
    assert problems(FOREIGN + FOREIGN_ONCE_REFUSED[name] + "\n") == []


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        pytest.param(
            "gone.yaml",
            "llm_configs[0]: can't be read: No such file or directory: '/",
            id="a path to nothing",
        ),
        pytest.param("5", "llm_configs[0]: 5 is not a mapping", id="a number"),
        pytest.param(
            "{model: m}",
            "llm_configs[0].model_loading_config: is missing",
            id="other keys",
        ),
    ],
)
def test_rays_builders_take_only_llms(entry: str, expected: str) -> None:
    found = problems(f"{OPENAI}    - {entry}\n")
    assert any(f"applications[0].args.{expected}" in line for line in found)


# -- retired keys -------------------------------------------------------------------------------

IN_DEPLOYMENT = "applications:\n- import_path: m:app\n  deployments:\n  - name: D\n"
IN_LLM = f"{OPENAI}    - model_loading_config: {{model_id: m}}\n      deployment_config:\n"
AUTOSCALING = "autoscaling_config"
RETIRED = [
    (f"{IN_DEPLOYMENT}    OLD: 3\n", f":5:5: {DEPLOYMENT}."),
    (f"{IN_DEPLOYMENT}    {AUTOSCALING}:\n      OLD: 3\n", f":6:7: {DEPLOYMENT}.{AUTOSCALING}."),
    (f"{IN_LLM}        OLD: 3\n", f":7:9: {LLM}.deployment_config."),
    (
        f"{IN_LLM}        {AUTOSCALING}:\n          OLD: 3\n",
        f":8:11: {LLM}.deployment_config.{AUTOSCALING}.",
    ),
]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_concurrent_queries", "max_ongoing_requests"),
        (
            "target_num_ongoing_requests_per_replica",
            "target_ongoing_requests, in autoscaling_config",
        ),
    ],
)
@pytest.mark.parametrize(
    ("text", "place"), RETIRED, ids=["deployment", "its autoscaling", "LLM", "its autoscaling too"]
)
def test_a_retired_key_is_named_with_its_successor(
    text: str, place: str, old: str, new: str
) -> None:
    said = f"{place}{old}: is not taken here; write {new}"
    assert problems(text.replace("OLD", old)) == [said]


def test_deprecated_keys_that_ray_still_takes_are_taken() -> None:
    scaling = "{smoothing_factor: 0.5, upscale_smoothing_factor: 1, downscale_smoothing_factor: 2}"
    assert problems(f"{IN_DEPLOYMENT}    autoscaling_config: {scaling}\n") == []
