"""The section Resources: short keys, the engine's share, and what may need a restart."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import app_v5 as app

Config = dict[str, Any]


def llm(deployment: Config | None = None, **keys: Any) -> Config:
    """An LLM config as a user writes it."""
    return {
        "model_loading_config": {"model_id": "m"},
        "deployment_config": deployment or {},
        **keys,
    }


def application(*llms: Config, **keys: Any) -> Config:
    return {
        "name": "a",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": list(llms)},
        **keys,
    }


def read(config: Config) -> tuple[app.ApplicationSpec, list[str]]:
    """An application, normalised, and what was found."""
    (spec,), found = app.read_applications({"applications": [config]})
    return spec, [problem.message for problem in found]


def normalised(config: Config, **keys: Any) -> tuple[Config, list[str]]:
    """The first LLM of an application that holds `config`, and what was found."""
    spec, found = read(application(config, **keys))
    return spec.config["args"]["llm_configs"][0], found


@pytest.mark.parametrize(
    ("given", "options"),
    [
        pytest.param({"num_cpus": 2}, {"num_cpus": 2.0}, id="num_cpus"),
        pytest.param(
            {"cpus": 2, "gpus": 1}, {"num_cpus": 2.0, "num_gpus": 1.0}, id="cpus and gpus"
        ),
        pytest.param(
            {"num_gpus": 1, "ray_actor_options": {"memory": 2e9, "resources": {"r": 1}}},
            {"num_gpus": 1.0, "memory": 2e9, "resources": {"r": 1}},
            id="what stands in ray_actor_options stays",
        ),
        pytest.param(
            {"gpus": 0.5, "ray_actor_options": {"num_gpus": 0.5}},
            {"num_gpus": 0.5},
            id="the same twice",
        ),
        pytest.param({"num_cpus": None}, None, id="null is not given"),
        pytest.param({"num_replicas": 2}, None, id="nothing to move"),
    ],
)
def test_short_keys_of_a_deployment_go_into_ray_actor_options(
    given: Config, options: Config | None
) -> None:
    config = application(deployments=[{"name": "d", **given}])
    spec, found = read(config)
    assert found == []
    (deployment,) = spec.config["deployments"]
    assert deployment.get("ray_actor_options") == options
    assert not {"num_cpus", "cpus", "num_gpus", "gpus"} & deployment.keys()


def test_short_keys_of_the_ingress_go_there_too() -> None:
    config = application(llm())
    config["args"]["ingress_deployment_config"] = {"num_cpus": 2}
    spec, found = read(config)
    moved = {"ray_actor_options": {"num_cpus": 2.0}}
    assert (spec.config["args"]["ingress_deployment_config"], found) == (moved, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(
            {"num_cpus": 1, "cpus": 2}, "num_cpus: 1 and cpus: 2 disagree", id="two spellings"
        ),
        pytest.param(
            {"gpus": 0.5, "ray_actor_options": {"num_gpus": 0.45}},
            "gpus: 0.5 and ray_actor_options.num_gpus: 0.45 disagree",
            id="short and long",
        ),
    ],
)
def test_two_keys_that_disagree_are_an_error_that_names_both(given: Config, message: str) -> None:
    _, found = normalised(llm(given))
    assert message in found


def test_normalising_never_changes_its_input_nor_shares_an_object() -> None:
    shared: Config = {"num_gpus": 0.5}
    one, two = llm(shared), llm(shared)
    config = application(one, two)
    before = copy.deepcopy(config)
    spec, _ = read(config)
    assert config == before
    first, second = spec.config["args"]["llm_configs"]
    assert first == second
    assert first["deployment_config"] is not second["deployment_config"]
    assert first["runtime_env"]["env_vars"] is not second["runtime_env"]["env_vars"]


@pytest.mark.parametrize(
    ("config", "placement", "options"),
    [
        pytest.param(
            llm({"num_cpus": 1, "num_gpus": 0.45}),
            {"bundle_per_worker": {"GPU": 0.45}},
            {"num_cpus": 1.0, "num_gpus": 0.0},
            id="a share of one GPU",
        ),
        pytest.param(
            llm({"num_gpus": 1.2}, engine_kwargs={"tensor_parallel_size": 2}),
            {"bundle_per_worker": {"GPU": 0.6}},
            {"num_gpus": 0.0},
            id="spread over two workers",
        ),
        pytest.param(
            llm({"num_gpus": 2}, engine_kwargs={"tensor_parallel_size": 3}),
            {"bundle_per_worker": {"GPU": 0.6666}},
            {"num_gpus": 0.0},
            id="not divisible",
        ),
        pytest.param(
            llm(
                {"num_gpus": 4},
                engine_kwargs={"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
            ),
            {"bundle_per_worker": {"GPU": 1.0}},
            {"num_gpus": 0.0},
            id="whole GPUs over tensor and pipeline",
        ),
        pytest.param(
            llm({"num_cpus": 2, "num_gpus": 0}),
            {"bundles": [{"CPU": 0}]},
            {"num_cpus": 2.0, "num_gpus": 0.0},
            id="num_gpus 0 is the CPU engine",
        ),
        pytest.param(
            llm({"num_cpus": 2}, accelerator_config={"kind": "cpu"}),
            {"bundles": [{"CPU": 0}]},
            {"num_cpus": 2.0},
            id="a CPU engine reserves its CPUs once",
        ),
        pytest.param(
            llm({"num_cpus": 1, "num_gpus": 0.45}, accelerator_config={"kind": "cpu"}),
            {"bundles": [{"CPU": 0}]},
            {"num_cpus": 1.0, "num_gpus": 0.45},
            id="a CPU engine that holds a logical GPU",
        ),
        pytest.param(
            llm({"num_cpus": 3}), None, {"num_cpus": 3.0}, id="no num_gpus: Ray's default"
        ),
        pytest.param(
            llm({"num_gpus": 1}, server_cls="my.Server"),
            None,
            {"num_gpus": 1.0},
            id="a server class of the user's own is left alone",
        ),
        pytest.param(
            llm(
                {"num_cpus": 1},
                server_cls="my.Server",
                placement_group_config={"bundle_per_worker": {"GPU": 0.3}},
                engine_kwargs={"gpu_memory_utilization": None},
            ),
            {"bundle_per_worker": {"GPU": 0.3}},
            {"num_cpus": 1.0},
            id="with its own bundles and no fraction, too",
        ),
        pytest.param(
            llm({"num_cpus": 1}, accelerator_config={"kind": "tpu"}),
            None,
            {"num_cpus": 1.0},
            id="TPUs are left alone",
        ),
        pytest.param(
            llm({"num_cpus": 1, "num_gpus": 0}, accelerator_type="TPU-V6E"),
            None,
            {"num_cpus": 1.0, "num_gpus": 0.0},
            id="by their name, too",
        ),
        pytest.param(
            llm(
                {"num_cpus": 1, "num_gpus": 0},
                placement_group_config={"bundle_per_worker": {"GPU": 0.3}},
            ),
            {"bundle_per_worker": {"GPU": 0.3}},
            {"num_cpus": 1.0, "num_gpus": 0.0},
            id="a placement group of the user's own stays",
        ),
    ],
)
def test_an_engine_reserves_what_its_deployment_declares(
    config: Config, placement: Config | None, options: Config
) -> None:
    result, found = normalised(config)
    assert found == []
    assert result.get("placement_group_config") == placement
    assert result["deployment_config"]["ray_actor_options"] == options


def test_a_share_below_one_gpu_is_told_to_the_engine_as_text() -> None:
    result, _ = normalised(llm({"num_gpus": 0.9}, engine_kwargs={"tensor_parallel_size": 2}))
    assert result["runtime_env"] == {"env_vars": {"VLLM_RAY_PER_WORKER_GPUS": "0.45"}}
    assert result["engine_kwargs"]["gpu_memory_utilization"] == 0.405


def test_whole_gpus_leave_the_engine_as_it_is() -> None:
    result, _ = normalised(llm({"num_gpus": 1}))
    assert "runtime_env" not in result
    assert "engine_kwargs" not in result


@pytest.mark.parametrize(
    ("own", "actor", "application_env", "expected"),
    [
        pytest.param({"A": "1"}, {"B": "1"}, {"C": "1"}, {"A": "1"}, id="the LLM's own win"),
        pytest.param(None, {"B": "1"}, {"C": "1"}, {"B": "1"}, id="then the actor's"),
        pytest.param(None, None, {"C": "1"}, {"C": "1"}, id="then the application's"),
    ],
)
def test_the_variable_does_not_hide_environment_variables_from_elsewhere(
    own: Config | None, actor: Config | None, application_env: Config, expected: Config
) -> None:
    deployment: Config = {"num_gpus": 0.5}
    if actor:
        deployment["ray_actor_options"] = {"runtime_env": {"env_vars": actor}}
    keys = {"runtime_env": {"env_vars": own, "pip": ["x"]}} if own else {}
    result, _ = normalised(llm(deployment, **keys), runtime_env={"env_vars": application_env})
    assert result["runtime_env"]["env_vars"] == {"VLLM_RAY_PER_WORKER_GPUS": "0.5", **expected}
    if own:
        assert result["runtime_env"]["pip"] == ["x"]


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        pytest.param({"gpu_memory_utilization": 0.3}, 0.3, id="set by the user"),
        pytest.param({"kv_cache_memory_bytes": 10**9}, 0.405, id="memory given in bytes"),
    ],
)
def test_an_engine_never_demands_more_than_its_share(engine: Config, expected: float) -> None:
    result, found = normalised(llm({"num_gpus": 0.45}, engine_kwargs=engine))
    assert result["engine_kwargs"].get("gpu_memory_utilization") == expected
    assert found == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(
            llm({"num_gpus": 0.45}, engine_kwargs={"gpu_memory_utilization": 0.9}),
            "0.9 of the card's memory is more than the 0.45 GPU of a worker",
            id="more memory than the share",
        ),
        pytest.param(
            llm({"num_gpus": 0.45}, placement_group_config={"bundle_per_worker": {"GPU": 1}}),
            "with num_gpus: 0.45 a replica reserves 1.45 GPU",
            id="counted twice",
        ),
        pytest.param(
            llm({"num_gpus": 1.5}),
            "num_gpus: 1.5 for 1 engine worker(s), and each uses one GPU",
            id="a fraction above 1",
        ),
        pytest.param(
            llm({"num_gpus": 2}),
            "num_gpus: 2 for 1 engine worker(s), and each uses one GPU",
            id="more GPUs than workers",
        ),
        pytest.param(
            llm({"num_gpus": 1}, engine_kwargs={"tensor_parallel_size": 2}),
            "Ray may put two workers of 0.5 GPU on one card, where NCCL fails",
            id="two workers that fit on one card",
        ),
        pytest.param(
            llm({"num_gpus": 0}, accelerator_config={"kind": "gpu"}),
            "num_gpus: 0 leaves an engine for GPUs no part of one",
            id="a GPU engine without a GPU",
        ),
    ],
)
def test_what_there_is_to_say_about_a_share(config: Config, message: str) -> None:
    _, found = normalised(config)
    assert found == [message]


def test_an_empty_deployment_config_says_nothing() -> None:
    result, found = normalised({**llm({}), "deployment_config": None})
    assert result["deployment_config"] == {}
    assert found == []


def test_prefill_and_decode_are_fitted_each() -> None:
    shared = llm({"num_gpus": 0.5})
    config = application(args={"prefill_config": shared, "decode_config": shared})
    result = read(config)[0].config
    for key in ("prefill_config", "decode_config"):
        assert result["args"][key]["placement_group_config"] == {"bundle_per_worker": {"GPU": 0.5}}
    assert result["args"]["prefill_config"] is not result["args"]["decode_config"]


@pytest.mark.parametrize(
    ("resources", "text"),
    [
        pytest.param({"CPU": 1.0, "GPU": 0.45}, "1.0 CPUs, 0.45 GPUs", id="CPU and GPU"),
        pytest.param(
            {"GPU": 1.0, "memory": 2e9, "accelerator_type:A100": 0.001},
            "1.0 GPUs, accelerator_type:A100 0.001, memory 2 GB",
            id="others",
        ),
        pytest.param({}, "nothing", id="nothing"),
    ],
)
def test_resources_read_as_in_the_summary(resources: dict[str, float], text: str) -> None:
    assert app.format_resources(resources) == text


@pytest.mark.parametrize(
    "llm_config",
    [
        pytest.param("path/to/llm.yaml", id="a path"),
        pytest.param({"model": "m", "gpus": "many"}, id="other keys"),
        pytest.param(
            {"model_loading_config": {"id": 1}, "deployment_config": {"num_gpus": "auto"}},
            id="words for numbers",
        ),
    ],
)
def test_what_a_builder_of_ones_own_takes_stays_as_it_is(llm_config: Any) -> None:
    spec, found = read(application(llm_config, import_path="my.module:build"))
    assert found == []
    assert spec.config["args"]["llm_configs"] == [llm_config]


def test_a_fixed_cache_or_a_whole_gpu_measures_nothing_that_others_hold() -> None:
    for given, measures in (
        (llm({"num_gpus": 0.45}), True),
        (llm({"num_gpus": 0.45}, engine_kwargs={"kv_cache_memory_bytes": 10**9}), False),
        (llm({"num_gpus": 1}), False),
        (llm({"num_gpus": 0}), False),
    ):
        (model,) = read(application(given))[0].models
        assert model.measures_memory is measures


@pytest.mark.parametrize(
    ("config", "promised"),
    [
        pytest.param(llm({"num_cpus": 1, "num_gpus": 0.45}), {"CPU": 1, "GPU": 0.45}, id="share"),
        pytest.param(
            llm({"num_gpus": 0.9}, engine_kwargs={"tensor_parallel_size": 2}),
            {"GPU": 0.9},
            id="two workers",
        ),
        pytest.param(llm({"num_cpus": 2, "num_gpus": 0}), {"CPU": 2, "GPU": 0}, id="CPU engine"),
        pytest.param(llm({}), {}, id="nothing said"),
        pytest.param(
            llm({}, placement_group_config={"bundle_per_worker": {"CPU": 1, "GPU": 1}}),
            {"GPU": 1},
            id="the actor's CPU is Ray's to add",
        ),
        pytest.param(
            llm({}, server_cls="m:S", engine_kwargs={"tensor_parallel_size": "auto"}),
            {},
            id="another engine's arguments",
        ),
        pytest.param(
            llm({"ray_actor_options": {"num_cpus": 1, "memory": 2e9, "resources": {"x": 1}}}),
            {"CPU": 1, "memory": 2e9, "x": 1},
            id="Ray's own form",
        ),
    ],
)
def test_what_a_config_promises_is_what_it_says(config: Config, promised: Config) -> None:
    (model,) = read(application(config))[0].models
    assert model.promised == promised
