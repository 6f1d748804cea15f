"""What a config may say, and what is said about one that is wrong."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app_v5 as app
from cluster import APP_V5, PYTHON, ROOT, run_app_v5

ONE = "applications:\n- {name: a, import_path: m:a"
LLM = """applications:
- import_path: ray.serve.llm:build_openai_app
  args:
    llm_configs:
    - model_loading_config: {model_id: m}
"""
ALIAS_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

NO_CONFIG = (
    ":1:1: expected a mapping with `applications` (the old form is one item of it; of a RayService "
    "it is what serveConfigV2 holds)"
)
BROKEN = [
    pytest.param(
        "a: [",
        [
            ":1:5: not YAML: while parsing a flow node from line 1, expected the node content, but found '<stream end>'"
        ],
        id="not closed",
    ),
    pytest.param(
        "applications:\n\t- name: a\n",
        [
            ":2:1: not YAML: found character '\\t' that cannot start any token (indent with spaces, not tabs)"
        ],
        id="tab indent",
    ),
    pytest.param(
        "applications: a: b\n",
        [":1:16: not YAML: mapping values are not allowed here"],
        id="colon in a value",
    ),
    pytest.param(
        "applications:\n- name: 'a\n",
        [
            ":3:1: not YAML: while scanning a quoted scalar from line 2, found unexpected end of stream"
        ],
        id="quote not closed",
    ),
    pytest.param("", [NO_CONFIG], id="empty"),
    pytest.param("# nothing\n", [NO_CONFIG], id="only a comment"),
    pytest.param("- a\n- b\n", [NO_CONFIG], id="a list"),
    pytest.param(
        "hello\n",
        [NO_CONFIG],
        id="a text",
    ),
    pytest.param(
        "applications: []\n---\napplications: []\n",
        [
            ":2:1: not YAML: expected a single document in the stream from line 1, but found another document"
        ],
        id="two documents",
    ),
    pytest.param(
        "apiVersion: v1\nkind: Pod\n",
        [NO_CONFIG],
        id="a manifest",
    ),
    pytest.param(
        "apiVersion: ray.io/v1\nkind: RayService\nspec: {}\n",
        [NO_CONFIG],
        id="a RayService",
    ),
    pytest.param(
        "application: []\n",
        [NO_CONFIG],
        id="applications misspelt",
    ),
    pytest.param(
        b"applications: []\n# caf\xe9\n",
        [
            ': not YAML in UTF-8: unacceptable character #x00e9: invalid continuation byte in "<byte string>", position 22'
        ],
        id="latin-1",
    ),
    pytest.param(
        "applications: []".encode("utf-16-le"),
        [
            ': not YAML in UTF-8: unacceptable character #x0000: special characters are not allowed in "<byte string>", position 1'
        ],
        id="UTF-16",
    ),
    pytest.param(
        b"applications: []\x00",
        [
            ': not YAML in UTF-8: unacceptable character #x0000: special characters are not allowed in "<byte string>", position 16'
        ],
        id="NUL",
    ),
    pytest.param(
        "a: " + "[" * 101 + "]" * 101,
        [":1:103: can't be read: more than 100 levels, or 100000 values"],
        id="nested too deep",
    ),
    pytest.param(
        ALIAS_BOMB,
        [":1:8: can't be read: more than 100 levels, or 100000 values"],
        id="alias bomb",
    ),
    pytest.param(
        "applications: &x\n- b: *x\n",
        [":2:3: can't be read: more than 100 levels, or 100000 values"],
        id="alias of itself",
    ),
    pytest.param(
        "applications: *nowhere\n",
        [":1:15: not YAML: found undefined alias"],  # it may be a password without quotes
        id="unknown alias",
    ),
    pytest.param(
        "applications: !!python/object/apply:os.system [touch /tmp/pwn]\n",
        [
            ":1:15: not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'"
        ],
        id="python tag",
    ),
    pytest.param(
        "applications: !!python/name:os.system\n",
        [
            ":1:15: not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'"
        ],
        id="python name",
    ),
    pytest.param(
        "applications: !mine []\n",
        [":1:15: not YAML: could not determine a constructor for the tag"],
        id="own tag",
    ),
    pytest.param(
        ONE + ", name: b}\n",
        [":2:31: applications[0].name: is given twice, in line 2 and in line 2; keep one of them"],
        id="same key twice",
    ),
    pytest.param(
        "applications: []\napplications: []\n",
        [
            ":2:1: applications: is given twice, in line 1 and in line 2; keep one of them",
        ],
        id="applications twice",
    ),
    pytest.param(
        "http_option: {port: 1}\napplications: []\n",
        [":1:1: http_option: unknown key, did you mean 'http_options'?"],
        id="top key near miss",
    ),
    pytest.param(
        "http_options: {prot: 1}\napplications: []\n",
        [":1:16: http_options.prot: unknown key, did you mean 'port'?"],
        id="http option misspelt",
    ),
    pytest.param(
        "http_options: {port: eight}\napplications: []\n",
        [":1:16: http_options.port: 'eight' is not a port, 1 to 65535"],
        id="port text",
    ),
    pytest.param(
        "http_options: {port: 70000}\napplications: []\n",
        [":1:16: http_options.port: 70000 is not a port, 1 to 65535"],
        id="port too big",
    ),
    pytest.param(
        "target_capacity: 50\napplications: []\n",
        [
            ":1:1: target_capacity: 50 is not taken for single applications: leave it out, or use `serve deploy`"
        ],
        id="target_capacity",
    ),
    pytest.param(
        "applications: {a: 1}\n",
        [
            ":1:1: applications: {'a': 1} is not a list",
        ],
        id="applications a mapping",
    ),
    pytest.param(
        "applications: [a]\n",
        [":1:16: applications[0]: a text is not a mapping"],
        id="application a text",
    ),
    pytest.param(
        ONE + ", rout_prefix: /a}\n",
        [":2:31: applications[0].rout_prefix: unknown key, did you mean 'route_prefix'?"],
        id="application key misspelt",
    ),
    pytest.param(
        "applications:\n- name: a\n",
        [":2:3: applications[0]: import_path is missing"],
        id="no import_path",
    ),
    pytest.param(
        "applications:\n- {name: a, import_path: mymodule}\n",
        [
            ':2:13: applications[0].import_path: \'mymodule\': Got invalid import path "mymodule". An import path must contain at least on dot or colon separating the module (and potentially submodules) from the deployment graph. E.g.: "module.deployment_graph".'
        ],
        id="import_path without attribute",
    ),
    pytest.param(
        "applications:\n- {name: a, import_path: 'a:b:c'}\n",
        [
            ":2:13: applications[0].import_path: 'a:b:c': Got invalid import path \"a:b:c\". An import path may have at most one colon."
        ],
        id="import_path with two colons",
    ),
    pytest.param(
        "applications:\n- {name: a, import_path: 3}\n",
        [":2:13: applications[0].import_path: 3: Input should be a valid string"],
        id="import_path a number",
    ),
    pytest.param(
        "applications:\n- {name: 'a#b', import_path: m:a}\n",
        [
            ":2:4: applications[0].name: 'a#b' is not a name for Ray: printable ASCII, no '#', at most 231 characters"
        ],
        id="name with #",
    ),
    pytest.param(
        "applications:\n- {name: '', import_path: m:a}\n",
        [
            ":2:4: applications[0].name: '' is not a name for Ray: printable ASCII, no '#', at most 231 characters"
        ],
        id="name empty",
    ),
    pytest.param(
        "applications:\n- {name: 5, import_path: m:a}\n",
        [
            ":2:4: applications[0].name: 5 is not a name for Ray: printable ASCII, no '#', at most 231 characters"
        ],
        id="name a number",
    ),
    pytest.param(
        ONE + ", route_prefix: /a}\n- {name: a, import_path: m:a, route_prefix: /b}\n",
        [":3:3: applications[1]: 'a' is there twice, first in applications[0]; give each its own"],
        id="same name",
    ),
    pytest.param(
        "applications:\n- {import_path: m:a, route_prefix: /a}\n- {import_path: m:a, route_prefix: /b}\n",
        [
            ':1:1: applications: Found multiple configs for application "default". Please remove all duplicates.'
        ],
        id="no names",
    ),
    pytest.param(
        ONE + ", route_prefix: /a}\n- {name: b, import_path: m:a, route_prefix: /a}\n",
        [
            ':1:1: applications: Found duplicate applications for route prefix "/a". Please ensure each application\'s route_prefix is unique.'
        ],
        id="same route",
    ),
    pytest.param(
        ONE + "}\n- {name: b, import_path: m:a}\n",
        [
            ':1:1: applications: Found duplicate applications for route prefix "/". Please ensure each application\'s route_prefix is unique.'
        ],
        id="both routes missing",
    ),
    pytest.param(
        ONE + ", route_prefix: a}\n",
        [
            ":2:31: applications[0].route_prefix: 'a' is not an ASCII path like /a/b: no braces, no last /"
        ],
        id="route without slash",
    ),
    pytest.param(
        ONE + ", route_prefix: /a/}\n",
        [
            ":2:31: applications[0].route_prefix: '/a/' is not an ASCII path like /a/b: no braces, no last /"
        ],
        id="route with slash at the end",
    ),
    pytest.param(
        ONE + ", route_prefix: '/{a}'}\n",
        [
            ":2:31: applications[0].route_prefix: '/{a}' is not an ASCII path like /a/b: no braces, no last /"
        ],
        id="route with braces",
    ),
    pytest.param(
        ONE + ", autoscaling_policy: {policy_function: m:f}}\n",
        [
            ":2:31: applications[0].autoscaling_policy: {'policy_function': 'm:f'} is not taken for single applications: leave it out, or use `serve deploy`"
        ],
        id="autoscaling_policy",
    ),
    pytest.param(
        ONE + ", runtime_env: {env_vars: {A: 1}}}\n",
        [":2:56: applications[0].runtime_env.env_vars.A: 1 is not a text: put it in quotes"],
        id="env var a number",
    ),
    pytest.param(
        ONE + ", runtime_env: {env_vars: {A: yes}}}\n",
        [":2:56: applications[0].runtime_env.env_vars.A: true is not a text: put it in quotes"],
        id="env var a boolean",
    ),
    pytest.param(
        ONE + ", runtime_env: {env_vars: [HF_TOKEN=hf_abcdefgh]}}\n",
        [":2:45: applications[0].runtime_env.env_vars: a list is not a mapping"],
        id="env_vars a list, which may hold secrets",
    ),
    pytest.param(
        ONE + ", runtime_env: x}\n",
        [":2:31: applications[0].runtime_env: a text is not a mapping"],
        id="runtime_env a text",
    ),
    pytest.param(
        ONE + ", args: 3}\n",
        [":2:31: applications[0].args: 3: Input should be a valid dictionary"],
        id="args a number",
    ),
    pytest.param(
        ONE + ", deployments: {d: 1}}\n",
        [
            ":2:31: applications[0].deployments: {'d': 1} is not a list",
        ],
        id="deployments a mapping",
    ),
    pytest.param(
        ONE + ", deployments: [{num_replicas: 1}]}\n",
        [":2:45: applications[0].deployments[0]: name is missing"],
        id="deployment without name",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d}, {name: d}]}\n",
        [
            ":2:56: applications[0].deployments[1]: 'd' is there twice, first in applications[0].deployments[0]; give each its own"
        ],
        id="deployment twice",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, num_replica: 2}]}\n",
        [
            ":2:55: applications[0].deployments[0].num_replica: unknown key, did you mean 'num_replicas'?"
        ],
        id="num_replica",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, num_gpu: 2}]}\n",
        [":2:55: applications[0].deployments[0].num_gpu: unknown key, did you mean 'num_gpus'?"],
        id="num_gpu",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, num_gpus: abc}]}\n",
        [":2:55: applications[0].deployments[0].num_gpus: 'abc' is not a number, 0 or more"],
        id="num_gpus text",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, num_gpus: -1}]}\n",
        [":2:55: applications[0].deployments[0].num_gpus: -1 is not a number, 0 or more"],
        id="num_gpus negative",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, num_gpus: .nan}]}\n",
        [":2:55: applications[0].deployments[0].num_gpus: nan is not a number, 0 or more"],
        id="num_gpus NaN",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, num_gpus: .inf}]}\n",
        [":2:55: applications[0].deployments[0].num_gpus: inf is not a number, 0 or more"],
        id="num_gpus infinite",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, num_gpus: true}]}\n",
        [":2:55: applications[0].deployments[0].num_gpus: true is not a number, 0 or more"],
        id="num_gpus true",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, cpus: 1, num_cpus: 2}]}\n",
        [
            ":2:64: applications[0].deployments[0].num_cpus: num_cpus: 2 and cpus: 1 disagree; give one of them"
        ],
        id="cpus and num_cpus",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, gpus: 1, ray_actor_options: {num_gpus: 2}}]}\n",
        [
            ":2:55: applications[0].deployments[0].gpus: gpus: 1 and ray_actor_options.num_gpus: 2 disagree; give one of them"
        ],
        id="gpus and actor options",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, ray_actor_options: {num_cpu: 1}}]}\n",
        [
            ":2:75: applications[0].deployments[0].ray_actor_options.num_cpu: unknown key, did you mean 'num_cpus'?"
        ],
        id="actor option misspelt",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, ray_actor_options: [1]}]}\n",
        [":2:55: applications[0].deployments[0].ray_actor_options: a list is not a mapping"],
        id="actor options a list",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, num_replicas: 0}]}\n",
        [":2:55: applications[0].deployments[0].num_replicas: 0: Input should be greater than 0"],
        id="replicas zero",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, num_replicas: many}]}\n",
        [
            ':2:45: applications[0].deployments[0]: `num_replicas` must be an int or "auto", but got: many'
        ],
        id="replicas a word",
    ),
    pytest.param(
        ONE
        + ", deployments: [{name: d, num_replicas: 2, autoscaling_config: {max_replicas: 3}}]}\n",
        [
            ":2:45: applications[0].deployments[0]: Manually setting num_replicas is not allowed when autoscaling_config is provided."
        ],
        id="replicas and autoscaling",
    ),
    pytest.param(
        ONE
        + ", deployments: [{name: d, autoscaling_config: {min_replicas: 3, max_replicas: 2}}]}\n",
        [
            ":2:55: applications[0].deployments[0].autoscaling_config: max_replicas (2) must be greater than or equal to min_replicas (3)!"
        ],
        id="min above max",
    ),
    pytest.param(
        ONE
        + ", deployments: [{name: d, autoscaling_config: {min_replicas: 1, max_replicas: 2, initial_replicas: 5}}]}\n",
        [
            ":2:55: applications[0].deployments[0].autoscaling_config: max_replicas (2) must be greater than or equal to initial_replicas (5)!"
        ],
        id="initial outside",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, max_replicas: 3}]}\n",
        [
            ":2:55: applications[0].deployments[0].max_replicas: does not belong here; move it into autoscaling_config, or beside it"
        ],
        id="max_replicas beside",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, autoscaling_config: {max_ongoing_requests: 3}}]}\n",
        [
            ":2:76: applications[0].deployments[0].autoscaling_config.max_ongoing_requests: does not belong here; move it into deployment_config, or beside it"
        ],
        id="max_ongoing_requests inside",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, max_ongoing_requests: 0}]}\n",
        [
            ":2:55: applications[0].deployments[0].max_ongoing_requests: 0: Input should be greater than 0"
        ],
        id="max_ongoing_requests zero",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, autoscaling_config: {max_replica: 3}}]}\n",
        [
            ":2:76: applications[0].deployments[0].autoscaling_config.max_replica: unknown key, did you mean 'max_replicas'?"
        ],
        id="autoscaling key misspelt",
    ),
    pytest.param(
        ONE + ", deployments: [{name: d, autoscaling_config: {target_ongoing_requests: 0}}]}\n",
        [
            ":2:76: applications[0].deployments[0].autoscaling_config.target_ongoing_requests: 0: Input should be greater than 0"
        ],
        id="target zero",
    ),
    pytest.param(
        ONE + ", llm_configs: []}\n",
        [
            ":2:31: applications[0].llm_configs: does not belong here; move it into args, or beside it"
        ],
        id="llm_configs outside args",
    ),
    pytest.param(
        "applications:\n- {import_path: ray.serve.llm:build_openai_app, args: {llm_configs: 5}}\n",
        [":2:56: applications[0].args.llm_configs: 5 is not a list"],
        id="llm_configs a number",
    ),
    pytest.param(
        "applications:\n- {import_path: ray.serve.llm:build_openai_app, args: {llm_confgs: []}}\n",
        [":2:56: applications[0].args.llm_confgs: unknown key, did you mean 'llm_configs'?"],
        id="llm_config misspelt",
    ),
    pytest.param(
        "applications:\n- {import_path: ray.serve.llm:build_openai_app, args: {llm_configs: [{engine_kwargs: {}}]}}\n",
        [":2:70: applications[0].args.llm_configs[0].model_loading_config: is missing"],
        id="no model_loading_config",
    ),
    pytest.param(
        "applications:\n- {import_path: ray.serve.llm:build_openai_app, args: {llm_configs: [{model_loading_config: {model_source: x}}]}}\n",
        [":2:71: applications[0].args.llm_configs[0].model_loading_config.model_id: is missing"],
        id="no model_id",
    ),
    pytest.param(
        LLM + "      model_id: m\n",
        [
            ":6:7: applications[0].args.llm_configs[0].model_id: does not belong here; move it into model_loading_config, or beside it"
        ],
        id="model_id beside",
    ),
    pytest.param(
        LLM + "      type: x\n",
        [
            ":6:7: applications[0].args.llm_configs[0].type: unknown key, which the installed Ray and vLLM do not take"
        ],
        id="unknown LLM key",
    ),
    pytest.param(
        LLM + "      num_gpus: 1\n",
        [
            ":6:7: applications[0].args.llm_configs[0].num_gpus: does not belong here; move it into deployment_config, or beside it"
        ],
        id="num_gpus of the LLM",
    ),
    pytest.param(
        LLM + "    - model_loading_config: {model_id: m}\n",
        [
            ":6:7: applications[0].args.llm_configs[1]: 'm' is there twice, first in applications[0].args.llm_configs[0]; give each its own"
        ],
        id="same model_id",
    ),
    pytest.param(
        LLM + "      deployment_config: {num_gpu: 0.45}\n",
        [
            ":6:27: applications[0].args.llm_configs[0].deployment_config.num_gpu: unknown key, did you mean 'num_gpus'?"
        ],
        id="num_gpu of an LLM",
    ),
    pytest.param(
        LLM + "      deployment_config: {num_gpus: 1.5}\n",
        [
            ":6:7: applications[0].args.llm_configs[0].deployment_config: num_gpus: 1.5 for 1 engine worker(s), and each uses one GPU; use 1, or set engine_kwargs.tensor_parallel_size: 2"
        ],
        id="fraction above one",
    ),
    pytest.param(
        LLM + "      engine_kwargs: {tensor_parallel_size: 0}\n",
        [
            ":6:23: applications[0].args.llm_configs[0].engine_kwargs.tensor_parallel_size: 0 is not a whole number, 1 to 9999"
        ],
        id="tensor parallel zero",
    ),
    pytest.param(
        LLM + "      engine_kwargs: {max_model_length: 10}\n",
        [
            ":6:23: applications[0].args.llm_configs[0].engine_kwargs.max_model_length: unknown key, did you mean 'max_model_len'?"
        ],
        id="engine key misspelt",
    ),
    pytest.param(
        LLM + "      engine_kwargs: {gpu_memory_utilization: 1.5}\n",
        [
            ":6:23: applications[0].args.llm_configs[0].engine_kwargs.gpu_memory_utilization: 1.5 is not above 0, 1 at most"
        ],
        id="utilization above one",
    ),
    pytest.param(
        LLM + "      placement_group_config: {bundle_per_workr: {GPU: 1}}\n",
        [
            ":6:32: applications[0].args.llm_configs[0].placement_group_config.bundle_per_workr: unknown key, did you mean 'bundle_per_worker'?"
        ],
        id="placement misspelt",
    ),
    pytest.param(
        ONE + ", args: {x: '${MODEL_ID}'}}\n",
        [
            ":2:41: applications[0].args.x: environment variable MODEL_ID is not set; export it, or give a default: ${MODEL_ID:-...}; $${ stands for a plain ${"
        ],
        id="variable not set",
    ),
]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str | bytes, environ: dict[str, str] | None = None) -> app.Document:
    Path("config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    document = app.Document("config.yaml", environ or {})
    assert document.problems == []
    return document


def secrets_of(found: app.Config) -> set[str]:
    """What no output may show of a config that has these keys besides."""
    return set(load(json.dumps({"applications": [], **found})).secrets)


CHECK_VALUES = app.RayCluster(app.Options("")).check_values


def problems(text: str | bytes, environ: dict[str, str] | None = None) -> list[str]:
    """All that the program says about a config, without the file's name."""
    Path("config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        document = app.Document("config.yaml", environ or {})
        _, found = app.check_config(document, CHECK_VALUES)
    except app.ConfigError as error:
        found = [*error.args]
    return [app.format_problem(problem).removeprefix("config.yaml") for problem in found]


@pytest.fixture
def process_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `main` changes of the process: the signals' handlers, and where prints go."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))
    before = {number: signal.getsignal(number) for number in app.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("process_restored")
@pytest.mark.parametrize(("text", "expected"), BROKEN)
def test_what_is_wrong_is_said_with_its_place_and_exit_code_2(
    text: str | bytes, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    assert problems(text) == expected
    assert app.main(["config.yaml", "--address", "127.0.0.1:1"]) == 2
    output = capsys.readouterr()
    icons = ["⚠️ " if ": warning: " in line else "❌" for line in expected]
    lines = [f"{icon} config.yaml{line}" for icon, line in zip(icons, expected, strict=True)]
    assert output.err.splitlines()[2:] == lines
    assert "❌" in icons
    assert output.out == ""
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["gone.yaml"],
            "gone.yaml: can't be read: No such file or directory: 'gone.yaml'",
            id="gone",
        ),
        pytest.param(
            ["."], ".: can't be read: no regular file of at most 2097152 bytes: .", id="a directory"
        ),
    ],
)
def test_a_file_that_is_none(arguments: list[str], message: str) -> None:
    with pytest.raises(app.ConfigError) as error:
        app.Document(arguments[0], {})
    assert [app.format_problem(problem) for problem in error.value.args] == [message]


def test_a_huge_file_is_not_read() -> None:
    with Path("config.yaml").open("wb") as file:
        file.truncate(50 * 1024 * 1024)
    with pytest.raises(app.ConfigError, match="no regular file of at most 2097152 bytes"):
        app.Document("config.yaml", {})


@pytest.mark.parametrize("name", ["not closed", "python tag", "num_gpu"])
def test_the_program_says_it_with_exit_code_2_and_without_ray(name: str) -> None:
    (case,) = (case for case in BROKEN if case.id == name)
    text, expected = case.values
    assert isinstance(text, str)
    assert isinstance(expected, list)
    Path("broken.yaml").write_text(text)
    finished = subprocess.run(
        [PYTHON, "-X", "importtime", str(APP_V5), "broken.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
    )
    lines = finished.stderr.splitlines()
    imported = {
        line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")
    }
    said = [line for line in lines if not line.startswith("import time:")]
    assert finished.returncode == 2
    assert said[2:] == [f"❌ broken.yaml{problem}" for problem in expected]
    assert not {"ray", "vllm", "torch"} & imported
    assert not Path("/tmp/pwn").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "the following arguments are required: CONFIG.yaml", id="no config"),
        pytest.param(["x", "--max-workers", "-1"], "are numbers, 0 or more", id="less than none"),
        pytest.param(["x", "--timeout", "-1"], "are numbers, 0 or more", id="negative time"),
        pytest.param(["x", "--timeout", "inf"], "are numbers, 0 or more", id="endless time"),
        pytest.param(
            ["x", "--nonsense"], "unrecognized arguments: --nonsense", id="unknown option"
        ),
        pytest.param(
            ["x", "--export", "serve", "--plan"], "--export excludes --plan", id="export and plan"
        ),
        pytest.param(["x", "--detailed-exitcode"], "is for --plan", id="nothing to be detailed of"),
    ],
)
def test_a_wrong_command_line_ends_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app.parse_options(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_name_that_no_application_has_ends_with_2() -> None:
    finished = run_app_v5(ROOT / "test_single_model.yaml", "--only", "gpt*")
    assert finished.returncode == 2
    message = "--only gpt*: no application has that name; there are falcon3-1b-instruct-app"
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("name", ["multi_model_config.yaml", "test_single_model.yaml"])
def test_the_ready_made_configs_are_right(name: str) -> None:
    document = app.Document(str(ROOT / name), {})
    applications, found = app.check_config(document, CHECK_VALUES)
    assert found == []
    for application in applications:
        (llm,) = application.config["args"]["llm_configs"]
        assert llm["placement_group_config"] == {"bundle_per_worker": {"GPU": 0.45}}


# -- what is accepted ---------------------------------------------------------------------------

ACCEPTED = [
    pytest.param("\ufeffapplications:\n- import_path: m:a\n", id="BOM"),
    pytest.param("applications:\r\n- import_path: m:a\r\n", id="CRLF"),
    pytest.param(
        "# chú thích\napplications:\n- {import_path: m:a, args: {text: mô-hình}}\n", id="non-ASCII"
    ),
    pytest.param("applications:\n- {import_path: m.n.a}\n", id="dotted import_path"),
    pytest.param("applications:\n- {import_path: m:a, route_prefix: null}\n", id="no HTTP route"),
    pytest.param("applications:\n- {import_path: m:a, args: {anything: [1, {x: 2}]}}\n", id="args"),
    pytest.param(
        "applications:\n- {import_path: m:a, args: {1: a, 2020-01-01: c, null: d, NO: e}}\n",
        id="keys of many types",
    ),
    pytest.param(
        "applications:\n- {name: a, import_path: m:a, route_prefix: /a}\n"
        "- {name: b, import_path: m:a, route_prefix: /a/b}\n",
        id="a route below another",
    ),
    pytest.param(
        """
proxy_location: HeadOnly
http_options: {host: 0.0.0.0, port: 8000, root_path: /x, request_timeout_s: 10}
grpc_options: {port: 9000, grpc_servicer_functions: [m:f], request_timeout_s: 3}
logging_config: {log_level: DEBUG, encoding: JSON, enable_access_log: false}
controller_options: {runtime_env: {env_vars: {A: "1"}}}
applications:
- import_path: m:a
  name: a
  route_prefix: /a
  runtime_env: {working_dir: "https://example.com/code.zip", pip: [torch]}
  external_scaler_enabled: false
  deployments:
  - name: d
    num_replicas: auto
    max_ongoing_requests: 5
    max_queued_requests: -1
    user_config: {threshold: 0.5}
    autoscaling_config:
      min_replicas: 0
      initial_replicas: 0
      max_replicas: 10
      target_ongoing_requests: 2
      metrics_interval_s: 1
      look_back_period_s: 3
      upscale_delay_s: 0
      downscale_delay_s: 1.5
      policy: {policy_function: "ray.serve.autoscaling_policy:default_autoscaling_policy"}
    ray_actor_options:
      {num_cpus: 0.5, num_gpus: "0.5", memory: 1.0e+9, resources: {a: 1}, accelerator_type: A10G}
    health_check_period_s: 5
    graceful_shutdown_timeout_s: 0
    logging_config: {log_level: INFO}
    request_router_config:
      request_router_class: ray.serve.experimental.round_robin_router:RoundRobinRouter
      request_router_kwargs: {a: 1}
    max_surge_percent: 100
  - {name: e, placement_group_bundles: [{CPU: 1}, {GPU: 1}], placement_group_strategy: SPREAD}
  - {name: f, max_replicas_per_node: 2, num_replicas: 3}
""",
        id="all of Serve's keys",
    ),
    pytest.param(
        LLM
        + """
      accelerator_type: A10G
      lora_config: {dynamic_lora_loading_path: "s3://b/l", max_num_adapters_per_replica: 2}
      engine_kwargs: {max_model_len: 100, enable_lora: true, gpu_memory_utilization: 0.4,
                      dtype: bfloat16, enable_auto_tool_choice: true, tool_call_parser: hermes}
      runtime_env: {env_vars: {A: "1"}}
      log_engine_metrics: false
      experimental_configs: {num_ingress_replicas: 2}
      deployment_config: {num_replicas: 2, cpus: 1, gpus: 0.45, health_check_period_s: 10}
    - model_loading_config: {model_id: n, model_source: {bucket_uri: "s3://b/m"}}
      placement_group_config: {bundle_per_worker: {CPU: 1, GPU: 1}, strategy: SPREAD}
    ingress_deployment_config: {num_replicas: 2}
    ingress_cls_config: {ingress_extra_kwargs: {}}
""",
        id="LLMs",
    ),
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_ray_accepts_is_accepted(text: str) -> None:
    assert problems(text) == []


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_these_tables_accept_ray_accepts(text: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    data = yaml.safe_load(text.removeprefix("\ufeff"))
    ServeDeploySchema.model_validate(data)


LLMS = "applications:\n- import_path: ray.serve.llm:build_openai_app\n  args:\n    llm_configs: "


@pytest.mark.parametrize(
    ("text", "key"),
    [
        *(
            pytest.param(
                f"{ONE}, deployments: [{{name: d, {key}: [{{{inner}: 1}}]}}]}}\n", key, id=key
            )
            for key, inner in (
                ("ray_actor_options", "num_cpus"),
                ("autoscaling_config", "max_replicas"),
            )
        ),
        *(
            pytest.param(f"{LLM}      {key}: [{{{inner}: 1}}]\n", key, id=key)
            for key, inner in (
                *(("deployment_config", "num_gpus"), ("engine_kwargs", "max_model_len")),
                *(
                    ("placement_group_config", "bundles"),
                    ("lora_config", "max_num_adapters_per_replica"),
                ),
            )
        ),
        pytest.param(f"http_options: [{{port: 1}}]\n{ONE}}}\n", "http_options", id="http_options"),
        pytest.param(
            LLM.replace("{model_id: m}", "[{model_id: m}]"), "model_loading_config", id="loading"
        ),
        pytest.param(
            f"{LLMS}{{model_loading_config: {{model_id: m}}}}\n",
            "llm_configs",
            id="one LLM, no list",
        ),
        pytest.param(f"{LLMS}llm.yaml\n", "llm_configs", id="one path, no list"),
        pytest.param(f"{LLM}      runtime_env: 5\n", "runtime_env", id="an LLM's runtime_env"),
        pytest.param(
            f"{LLM}      engine_kwargs: {{tensor_parallel_size: 100000000000}}\n"
            "      deployment_config: {num_gpus: 1}\n",
            "tensor_parallel_size",
            id="more workers than there are GPUs",
        ),
        pytest.param("applications: 5\n", "applications", id="applications a number"),
        pytest.param(ONE + ", deployments: 5}\n", "deployments", id="deployments a number"),
        pytest.param(
            f"{LLM}      deployment_config: {{ray_actor_options: {{memory: 2GB}}}}\n",
            "memory",
            id="memory a text",
        ),
        pytest.param(
            f"{LLM}      deployment_config: {{num_gpus: 1{'0' * 400}}}\n",
            "num_gpus",
            id="more than a float holds",
        ),
        pytest.param(
            f"{LLM}      placement_group_config: {{bundles: [{{GPU: x}}]}}\n",
            "bundles[0].GPU",
            id="a bundle's amount a text",
        ),
        pytest.param(f"{LLM}    foo: 1\n", "args.foo", id="an argument that Ray's builder refuses"),
    ],
)
def test_what_has_another_shape_is_refused_at_its_key(text: str, key: str) -> None:
    """None of it may reach what reads the values, nor a cluster."""
    errors = [line for line in problems(text) if "warning: " not in line]
    assert errors
    assert all(line.split(": ")[1].rpartition(key)[1] for line in errors), errors


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param("2020-13-45", "month must be in 1..12", id="no such month"),
        pytest.param("!!int abc", "invalid literal for int", id="no number"),
        pytest.param("!!bool abc", "'abc'", id="no boolean"),
        pytest.param("!!timestamp abc", "'NoneType' object has no", id="no time"),
        pytest.param("9" * 5000, "Exceeds the limit", id="thousands of digits"),
    ],
)
def test_a_value_that_yaml_can_not_read_is_named(value: str, message: str) -> None:
    (found,) = problems(f"applications:\n- import_path: m:a\n  args:\n    x: {value}\n")
    assert found.startswith(f":4:8: can't be read: {message}")


def test_one_cause_is_said_once() -> None:
    (found,) = problems(LLM.replace("model_id: m", "model_id: '${NOPE}'"))
    assert "environment variable NOPE is not set" in found
    (found,) = problems(f"logging_config: {{log_level: LOUD}}\n{ONE}}}\n")
    assert found.startswith(":1:18: logging_config.log_level: ")


def test_aliases_mean_the_same_as_what_they_stand_for_and_share_nothing() -> None:
    aliased = load(
        """
applications:
- import_path: ray.serve.llm:build_pd_openai_app
  args:
    prefill_config: &config
      model_loading_config: {model_id: m}
      deployment_config: {num_gpus: 0.5}
    decode_config: *config
"""
    ).data
    args = aliased["applications"][0]["args"]
    assert args["prefill_config"] == args["decode_config"]
    args["prefill_config"]["deployment_config"]["num_gpus"] = 1
    assert args["decode_config"]["deployment_config"]["num_gpus"] == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: 1, c: [1, 2]}\nd: {<<: *x, b: 2}\ne: *x\n",
        "a: &x {b: 1}\nc: &y {b: 2, d: 3}\ne: {<<: [*x, *y], f: 4}\n",
        "a: 010\nb: 1_000\nc: yes\nd: ~\ne: .5\nf: 1e3\ng: '1'\nh: 2020-01-01\ni: !!str 3\n",
        "a: |\n  text\n  more\nb: >\n  folded\n",
    ],
)
def test_values_are_what_yaml_says(text: str) -> None:
    document = load(f"applications: []\n{text}")
    assert document.data == yaml.safe_load(f"applications: []\n{text}")


def test_a_switch_is_no_secret_and_a_header_is_one() -> None:
    found = {
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "AUTHORIZATION": "Bearer xyz",
        "PIN_KEY": "123456",
    }
    assert secrets_of(found) == {"Bearer xyz", "123456"}


def test_keys_are_what_serve_deploy_sends() -> None:
    """In JSON a key is a text; what it is not in JSON's words is the text that it was."""
    document = load("applications: []\n7: a\ntrue: b\n2.5: c\nnull: d\n2020-01-01: e\nNO: f\n")
    sent = json.loads(json.dumps({7: "a", True: "b", 2.5: "c", None: "d"}))
    assert document.data == {"applications": [], **sent, "2020-01-01": "e", "NO": "f"}


def test_a_key_that_stands_beside_a_merge_has_its_own_place() -> None:
    text = "x: &x {b: 1}\napplications: []\nd:\n  b: 2\n  <<: *x\n"
    assert load(text).places["d", "b"] == ("config.yaml", 4, 3)


PATH = "applications[0].args.llm_configs[0]"


def naming(path: str) -> str:
    """A config whose one LLM stands in another file."""
    return (
        "applications:\n- import_path: ray.serve.llm:build_openai_app\n"
        f"  args: {{llm_configs: [{path}]}}\n"
    )


def test_llm_configs_may_be_paths_and_problems_point_into_them() -> None:
    Path("llm.yaml").write_text(
        "model_loading_config: {model_id: m}\ndeployment_config: {num_gpu: 1}\n"
    )
    (problem,) = problems(naming("llm.yaml"))
    assert problem == (
        f"{Path('llm.yaml').absolute()}:2:21: applications[0].args.llm_configs[0]"
        ".deployment_config.num_gpu: unknown key, did you mean 'num_gpus'?"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(
            None,
            f":3:24: {PATH}: can't be read: No such file or directory: '/",
            id="gone",
        ),
        pytest.param("", f"llm.yaml:1:1: {PATH}: null is not a mapping", id="empty"),
        pytest.param("- a\n", f"llm.yaml:1:1: {PATH}: a list is not a mapping", id="a list"),
        pytest.param("other.yaml\n", f"llm.yaml:1:1: {PATH}: a text is not a mapping", id="a text"),
        pytest.param("a: [\n", f"llm.yaml:2:1: {PATH}: not YAML", id="not closed"),
        pytest.param(
            "a: 1\n---\nb: 1\n", f"llm.yaml:2:1: {PATH}: not YAML: expected a single", id="two"
        ),
        pytest.param(
            "a: \xe9 é\n",
            f"llm.yaml: {PATH}: not YAML in UTF-8: unacceptable character #x00e9",
            id="latin-1",
        ),
        pytest.param(
            '\n"\\U00110000"',
            f"llm.yaml: {PATH}: can't be read: chr() arg not in range",
            id="no character",
        ),
        pytest.param(
            "#" * (app.MAX_FILE_BYTES + 1),
            "no regular file of at most 2097152 bytes: /",
            id="huge",
        ),
    ],
)
def test_a_file_that_holds_no_llm_is_named(content: str | None, said: str) -> None:
    if content is not None:
        Path("llm.yaml").write_text(content, encoding="latin-1")
    found = problems(naming("llm.yaml"))
    assert said in found[0]
    assert len(found) == 1


@pytest.mark.parametrize(
    "name", [pytest.param("x" * 5000, id="too long"), pytest.param("a\\0b", id="NUL")]
)
def test_a_path_that_can_be_none_is_no_file(name: str) -> None:
    (found,) = problems(naming(f'"{name}"'))
    assert found.startswith(":3:24: applications[0].args.llm_configs[0]: ")


def test_variables_are_filled_in_the_named_files_too() -> None:
    for number in range(20):
        Path(f"{number}.yaml").write_text(
            f"model_loading_config: {{model_id: '{number}-${{X}}'}}\n"
        )
    names = ", ".join(f"{number}.yaml" for number in range(20))
    llms = load(naming(names), {"X": "x"}).data["applications"][0]["args"]["llm_configs"]
    ids = [llm["model_loading_config"]["model_id"] for llm in llms]
    assert ids == [f"{number}-x" for number in range(20)]


# -- variables and secrets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        pytest.param("${SHARE}", 0.45, id="unquoted: a number again"),
        pytest.param("'${SHARE}'", "0.45", id="quoted: a text"),
        pytest.param("${GONE:-0.5}", 0.5, id="default"),
        pytest.param("${GONE:-}", None, id="empty default"),
        pytest.param("a-${WORD}-b", "a-word-b", id="in a text"),
        pytest.param("$${WORD}", "${WORD}", id="escaped"),
        pytest.param("$WORD", "$WORD", id="without braces it is none"),
    ],
)
def test_variables_are_filled_in(written: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"applications:\n- import_path: m:a\n  args:\n    x: {written}\n"
    for name, filled in {"SHARE": "0.45", "WORD": "word"}.items():
        monkeypatch.setenv(name, filled)
    Path("config.yaml").write_text(text)
    document = app.Document("config.yaml", os.environ)
    assert (document.problems, document.data["applications"][0]["args"]["x"]) == ([], value)


@pytest.mark.parametrize(
    "key",
    [
        *("HF_TOKEN", "api_key", "api-key", "dbPassword", "secret", "KEY", "PGPASSWORD"),
        *("MYSQL_PWD", "DB_PASS", "api_keys", "HF_TOKENS", "secrets", "credentials"),
    ],
)
def test_keys_that_name_a_secret(key: str) -> None:
    assert secrets_of({key: ["abc"]}) == {"abc"}
    assert secrets_of({key: {"openai": "abc", "more": [{"value": "def"}]}}) == {"abc", "def"}


@pytest.mark.parametrize("key", ["tokenizer", "ssl_keyfile", "monkey", "keyword", "passive"])
def test_keys_that_do_not(key: str) -> None:
    assert secrets_of({key: "abc"}) == set()


LONG = "long-" + "x1" * 300
HARD = [
    'with"quote',
    'with"both\\',
    "back\\slash",
    "tab\there",
    "new\nline",
    "café-secret",
    "abc",
    LONG,
]


@pytest.mark.parametrize("secret", HARD, ids=range(len(HARD)))
def test_a_secret_is_hidden_however_others_write_it(secret: str) -> None:
    from urllib.parse import quote

    error = ValueError(secret)
    texts = [
        f"token {secret} end",
        repr(error),
        str({"token": secret}),
        json.dumps({"token": secret}),
        json.dumps({"token": secret}, ensure_ascii=False),
        f"http://host/{quote(secret, safe='')}/x",
        json.dumps({"error": repr(error)}),
        f"token {secret[:40]}..." if len(secret) > 40 else secret,
    ]
    for text in texts:
        hidden = app.redact(text, frozenset({secret}))
        assert app.HIDDEN in hidden, text
        for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret)):
            assert form not in hidden, (text, hidden)
            assert form[:20] not in hidden or len(form) < 32, (text, hidden)


def test_three_characters_are_hidden_as_a_word_alone() -> None:
    assert app.redact("abc, abcd, x=abc", frozenset({"abc"})) == "***, abcd, x=***"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://u:SECRET@host/x?token=SECRET&b=1", "https://***@host/x?token=***&b=***"),
        ("postgres://user:pw@db:5432/x", "postgres://***@db:5432/x"),
        ("postgres://user:p@ss@db/x", "postgres://***@db/x"),
        ("see http://localhost:8000/a/v1/models", "see http://localhost:8000/a/v1/models"),
    ],
)
def test_what_urls_hold_of_secrets_is_hidden(text: str, hidden: str) -> None:
    assert app.redact(text, frozenset()) == hidden


def test_secrets_are_what_comes_from_variables_and_what_keys_name() -> None:
    text = (
        "applications:\n- import_path: m:a\n  route_prefix: ${ROUTE}\n"
        "  args: {hf_token: hf_12345, x: hf_12345, n: '${N}', eager: '${EAGER}'}\n"
    )
    environ = {"ROUTE": "/not-to-be-shown", "N": "12345", "EAGER": "true"}
    assert load(text, environ).secrets == {"hf_12345", "/not-to-be-shown"}


def test_values_are_redacted_before_they_become_json() -> None:
    hide = partial(app.redact, secrets=frozenset({'a"b', "true"}))
    report = {"submitted": True, "cause": 'a"b is true', "rows": ('a"b', 1, None)}
    assert json.loads(json.dumps(app.copied(report, hide))) == {
        "submitted": True,
        "cause": "*** is ***",
        "rows": ["***", 1, None],
    }


def test_an_unset_variable_under_an_anchor_is_named_once() -> None:
    found = problems("x: &v ${UNSET}\napplications:\n- {import_path: m:a, args: [*v, *v]}\n")
    assert sum("UNSET is not set" in problem for problem in found) == 1


def test_a_variable_that_is_not_utf_8_is_named() -> None:
    found = problems("applications:\n- {import_path: m:a, args: {x: '${X}'}}\n", {"X": "a\udcff"})
    assert len(found) == 1
    assert found[0].startswith(":2:32: applications[0].args.x: environment variable X is not UTF-8")


@pytest.mark.parametrize(
    ("config", "key"), [("fifo", ""), ("config.yaml", f":3:24: {PATH}")], ids=["alone", "named"]
)
def test_a_fifo_is_refused_at_once(tmp_path: Path, config: str, key: str) -> None:
    os.mkfifo("fifo")
    Path("config.yaml").write_text(naming("fifo"))
    finished = run_app_v5(str(tmp_path / config), timeout_s=30.0)
    assert finished.returncode == 2
    said = f"can't be read: no regular file of at most 2097152 bytes: {tmp_path}/fifo"
    assert finished.stderr.splitlines()[2:] == [f"❌ {tmp_path}/{config}{key}: {said}"]


def test_a_variable_that_is_not_utf_8_is_named_beside_json_too(tmp_path: Path) -> None:
    Path("config.yaml").write_text("applications:\n- import_path: m:a\n  args: {x: '${X}'}\n")
    finished = subprocess.run(
        [PYTHON, str(APP_V5), str(tmp_path / "config.yaml"), "--json"],
        capture_output=True,
        timeout=30,
        check=False,
        env={**os.environb, b"X": b"secret\xff", b"RAY_ADDRESS": b"127.0.0.1:1"},
    )
    assert (finished.returncode, finished.stdout) == (2, b"")
    said = finished.stderr.decode()
    assert "applications[0].args.x: environment variable X is not UTF-8" in said
    assert "secret" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "good"),
    [
        *(("a b.c~1", True), ("x" * 231, True), ("x" * 232, False), ("", False)),
        *(("café", False), ("a#b", False), ("a\nb", False)),
    ],
    ids=range(7),
)
def test_names_that_ray_can_not_bear(name: str, good: bool) -> None:
    assert (app.check_value(name, "name", ()) == []) is good
    quoted = json.dumps(name)
    found = problems(f"applications:\n- {{import_path: m:a, name: {quoted}}}\n")
    assert bool(found) is not good
    llm = LLM.replace("model_id: m", f"model_id: {quoted}")
    assert bool(problems(llm)) is not good


def test_a_route_that_is_not_ascii() -> None:
    (found,) = problems(ONE + ", route_prefix: /café}\n")
    assert "'/café' is not an ASCII path" in found


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
def test_old_names_get_their_successor(old: str, new: str) -> None:
    (found,) = problems(ONE + f", deployments: [{{name: d, {old}: 3}}]}}\n")
    assert found.endswith(f"{old}: is not taken here; write {new}")


@pytest.mark.parametrize(
    "key", ["name", "working_dir", "env_vars", "requirements", "compute_config", "image_uri"]
)
def test_other_tools_keys_at_the_top_are_warnings(key: str) -> None:
    found = problems(f"{key}: x\napplications:\n- import_path: m:a\n")
    assert found == [f":1:1: warning: {key}: unknown key; Ray ignores it"]


def test_a_missing_file_does_not_hide_the_rest() -> None:
    text = (
        "http_option: {}\napplications:\n- import_path: ray.serve.llm:build_openai_app\n"
        "  args: {llm_configs: [gone.yaml]}\n- {import_path: m:a, name: c, nam: b, route_prefix: /b}\n"
    )
    found = problems(text)
    assert len(found) == 3
    assert ["gone.yaml" in text for text in found] == [False, True, False]


# -- the schemas, read without importing Ray ----------------------------------------------------


def test_the_fields_read_from_source_are_those_that_ray_has() -> None:
    from ray.serve import schema
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    known = app.known_schemas()
    models = [
        *(schema.ServeDeploySchema, schema.ServeApplicationSchema, schema.DeploymentSchema),
        *(schema.RayActorOptionsSchema, schema.HTTPOptionsSchema, schema.gRPCOptionsSchema),
        *(schema.LoggingConfig, AutoscalingConfig, RequestRouterConfig),
    ]
    for model in models:
        own = {*app.SHORT_RESOURCES, "max_constructor_retry_count"}
        assert set(known[model.__name__]) - own == set(model.model_fields) - own, model


def test_an_llm_has_the_options_that_ray_takes_for_a_deployment() -> None:
    from ray.serve.deployment import Deployment

    taken = {name for name in inspect.signature(Deployment.options).parameters if name[0] != "_"}
    ours = set(app.known_schemas()[app.OPTIONS])
    assert taken - {"self", "func_or_class", "version"} <= ours


@pytest.mark.parametrize(
    "llm",
    [
        pytest.param("path/to/llm.yaml", id="a path"),
        pytest.param("{model: m, gpus: many}", id="other keys"),
        pytest.param("{model_loading_config: {id: 1}}", id="another model_loading_config"),
        pytest.param(
            "{model_loading_config: {model_id: m}, deployment_config: {num_gpus: auto}}",
            id="words for numbers",
        ),
    ],
)
def test_a_builder_of_ones_own_may_take_anything(llm: str) -> None:
    assert problems(naming(llm).replace("ray.serve.llm:", "mine:")) == []


def test_the_options_that_change_in_place_are_rays() -> None:
    from ray.serve._private.config import DeploymentConfig

    for option in app.LIGHTWEIGHT_OPTIONS:
        extra: Any = DeploymentConfig.model_fields[option].json_schema_extra
        assert extra["update_type"].name != "HeavyWeight", option


@pytest.mark.engine
def test_the_fields_of_llms_and_of_the_engine_are_those_that_the_builder_takes() -> None:
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig, ModelLoadingConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    known = app.known_schemas()
    for model in (LLMConfig, ModelLoadingConfig):
        assert set(known[model.__name__]) == set(model.model_fields), model
    taken = {
        field.name for args in (AsyncEngineArgs, FrontendArgs) for field in dataclasses.fields(args)
    }
    assert set(known[app.ENGINE]) >= {name for name in taken if not name.startswith("_")}


# -- whatever a file holds ----------------------------------------------------------------------

VALID = [case.values[0] for case in ACCEPTED if isinstance(case.values[0], str)]
STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def judged(text: str) -> None:
    """Any text gives a document or a ConfigError, and every check comes to an end."""
    for problem in problems(text.encode("utf-8", "surrogatepass")):
        assert "Traceback" not in problem


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(VALID), st.integers(0, 3000), st.integers(0, 8), st.text(max_size=6))
def test_no_text_breaks_the_program(text: str, start: int, length: int, inserted: str) -> None:
    start %= len(text)
    judged(text[:start] + inserted + text[start + length :])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(VALID), st.integers(0, 10**6), STRANGE)
def test_no_value_in_any_place_breaks_the_program(text: str, number: int, value: Any) -> None:
    data = copy.deepcopy(yaml.safe_load(text.removeprefix("\ufeff")))
    choices = places(data)[1:]
    *above, key = choices[number % len(choices)]
    holder = data
    for step in above:
        holder = holder[step]
    holder[key] = value
    judged(yaml.safe_dump(data, allow_unicode=True))


SEEDS = [
    (ROOT / f"{name}.yaml").read_text() for name in ("multi_model_config", "test_single_model")
]
SEEDS += VALID[-2:]  # all of Serve's keys, and LLMs
SEED_DATA = [(text, yaml.safe_load(text)) for text in SEEDS]


def mutated(chance: random.Random) -> str:
    """A config with an edit or two, as people make them by mistake: of its lines, or of its values."""
    text, seed = chance.choice(SEED_DATA)
    if chance.random() < 0.3:
        lines = text.splitlines(keepends=True)
        line = chance.randrange(len(lines))
        cut = chance.randrange(len(lines[line]))
        edits = [
            *("", lines[line] * 2, "  " + lines[line], lines[line].lstrip()),
            *(lines[line][:cut] + lines[line][cut + 1 :], lines[line].replace(":", "", 1)),
        ]
        lines[line] = chance.choice(edits)
        return "".join(lines)
    data = copy.deepcopy(seed)
    for _ in range(chance.randint(1, 2)):
        *above, key = chance.choice(places(data)[1:])
        holder = data
        for step in above:
            holder = holder[step]
        value = holder.pop(key)
        new = [
            [value],
            {"x": value},
            [value, value],
            str(value),
            [],
            {},
            None,
            -1,
            0.5,
            2**70,
            True,
        ]
        if isinstance(holder, list):
            holder.insert(key, chance.choice(new))
        elif chance.random() < 0.3:
            holder[f"{key}"[:-1]] = value
        elif chance.random() < 0.9:
            holder[key] = chance.choice(new)
    return yaml.safe_dump(data, sort_keys=False)


def test_no_slip_of_the_pen_breaks_the_program() -> None:
    chance = random.Random(2026)
    refused = 0
    for number in range(100):
        text = mutated(chance)
        try:
            found = problems(text)
        except Exception as error:
            raise AssertionError(f"mutation {number}:\n{text}") from error
        refused += any("warning: " not in line for line in found)
    assert 50 < refused < 100


# -- what Ray would refuse later -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        pytest.param("llm_engine", "SGLang", "'SGLang' is not vLLM", id="engine"),
        pytest.param(
            "deployment_config",
            "{max_replicas_per_node: 0}",
            "0 is not a whole number, 1 to 100",
            id="replicas per node",
        ),
        pytest.param(
            "placement_group_config",
            "{strategy: FOO, bundles: [{GPU: 1}]}",
            "'FOO' is not PACK, SPREAD",
            id="a strategy",
        ),
    ],
)
def test_what_ray_refuses_later_is_refused_before(option: str, value: str, said: str) -> None:
    [problem] = problems(f"{LLM}      {option}: {value}\n")
    assert re.match(rf":\d+:\d+: applications\[0\]\.args\.llm_configs\[0\]\.{option}", problem)
    assert said in problem


@pytest.mark.serve
def test_the_engines_are_those_that_ray_has() -> None:
    from ray.llm._internal.serve.core.configs.llm_config import LLMEngine

    assert all(app.check_value(engine.value, "llm_engine", ()) == [] for engine in LLMEngine)


def test_memory_in_quotes_is_a_number_for_rays_builder() -> None:
    """YAML takes 2e9 for a text, and Ray's LLM builder would add it to a number."""
    data = yaml.safe_load(
        "applications: [{import_path: 'ray.serve.llm:build_openai_app', args: {llm_configs: ["
        "{model_loading_config: {model_id: m}, deployment_config: {num_gpus: 0.5, "
        "ray_actor_options: {memory: 2e9}}}]}}]"
    )
    [application], found = app.read_applications(data)
    [llm] = application.config["args"]["llm_configs"]
    assert found == []
    assert llm["deployment_config"]["ray_actor_options"]["memory"] == 2e9
