"""Whatever Ray takes is taken: changed configs, judged by the program and by Ray's own code."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import app_v5 as app
from cluster import ROOT
from documented_configs import DOCUMENTED, OPENAI, go_where_they_are
from test_config import CHECK_VALUES, VALID, places

pytestmark = [
    pytest.mark.serve,
    pytest.mark.filterwarnings("ignore"),  # Ray's advice on values is no verdict
]

Builders = dict[str, Callable[[app.Config], object]]

EXAMPLES = 600

DELIBERATE = {
    "is not a name for Ray": "such a name stops Serve's controller, or is too long for a file",
    "is not an ASCII path": "a route that is not ASCII can't be asked",
    "did you mean": "Ray ignores the key without a word, and it is near a known one",
    "does not belong here": "Ray ignores the key without a word, and it is known elsewhere",
    "is not a text: put it in quotes": "a variable that is no text breaks Serve's controller",
    "env_vars: ": "variables that are no mapping fail when the environment is made",
    "is not taken for single applications": "Serve takes it only for all applications at once",
    "is not a port": "no proxy can listen there",
    "is there twice": "of two equal names Ray takes one without a word",
    "disagree; give one of them": "short keys are this program's own",
    "asks for the CPU engine, but": "num_gpus: 0 is this program's word for the CPU engine",
    "above 1 Ray takes whole GPUs only": "Ray refuses it when a replica starts",
    "is not a number, 0 or more": "`true` is no amount, and no machine has 2**70",
    "is not above 0, 1 at most": "vLLM refuses it when the engine starts",
    "is not a whole number, 1 to 9999": "vLLM refuses it when the engine starts",
}
"""What the program refuses and Ray takes, on purpose: how the message reads, and why."""


# -- Ray's own verdict ----------------------------------------------------------------------------


@pytest.fixture
def builders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Builders]:
    """Ray's own builders of LLM applications, which start no cluster here (importing: 20 s)."""
    go_where_they_are(tmp_path, monkeypatch)

    import ray
    from ray import cloudpickle

    serve = "ray.llm._internal.serve"
    paths = {
        "build_openai_app": f"{serve}.core.ingress.builder",
        "build_dp_openai_app": f"{serve}.serving_patterns.data_parallel.builder",
        "build_pd_openai_app": f"{serve}.serving_patterns.prefill_decode.builder",
    }
    modules = {name: importlib.import_module(path) for name, path in paths.items()}
    for module in modules.values():
        once = functools.lru_cache(module.make_fastapi_ingress)
        monkeypatch.setattr(module, "make_fastapi_ingress", once)
    # Asking for a driver's context starts a cluster; pickling the same classes for each
    # application takes 0.3 s.
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env={}))
    dumps, once = cloudpickle.dumps, functools.lru_cache(cloudpickle.dumps)
    monkeypatch.setattr(
        cloudpickle,
        "dumps",
        lambda value, *more: once(value) if isinstance(value, type) else dumps(value, *more),
    )
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield {name: getattr(module, name) for name, module in modules.items()}
    logging.disable(before)
    assert not ray.is_initialized()


def refusal(step: Callable[[], object]) -> str:
    """What one of Ray's steps says against a config, in a line; "" when it takes it."""
    try:
        step()
    except Exception as error:  # noqa: BLE001
        lines = [line.strip() for line in str(error).splitlines()]
        rows = [line.partition(" [type=")[0] for line in lines if " [type=" in line]
        return rows[-1] if rows else lines[0] if lines else repr(error)
    return ""


def serve_says(data: Any) -> tuple[str, str]:
    """Which of Serve's steps says what against a config; ("", "") when all take it."""
    from ray.serve._private.application_state import override_deployment_info
    from ray.serve._private.utils import validate_route_prefix
    from ray.serve.schema import ServeDeploySchema

    schema: Any = None

    def validate() -> None:
        nonlocal schema
        schema = ServeDeploySchema.model_validate(app.copied(data))
        for application in schema.applications:
            validate_route_prefix(application.route_prefix)

    def override() -> None:
        for application in schema.applications:
            infos = {options.name: deployment_info() for options in application.deployments}
            override_deployment_info(infos, application)

    if said := refusal(validate):
        return "schema", said
    said = refusal(override)
    return ("overrides" if said else ""), said


def deployment_info() -> Any:
    """A deployment whose code leaves all options to the config."""
    from ray.serve._private.config import DeploymentConfig, ReplicaConfig
    from ray.serve._private.deployment_info import DeploymentInfo

    return DeploymentInfo(
        deployment_config=DeploymentConfig(),
        replica_config=ReplicaConfig.create(SimpleNamespace),
        start_time_ms=0,
        deployer_job_id="",
    )


def builders_say(builders: Builders, applications: list[Any]) -> str:
    """What Ray's LLM builders say against their arguments; "" for builders of others."""
    for application in applications:
        path = str(application.get("import_path"))
        if path.startswith("ray.serve.llm"):
            builder = builders.get(path.removeprefix("ray.serve.llm")[1:])
            args = app.copied(application.get("args", {}))
            said = refusal(functools.partial(builder, args)) if builder else "no such builder"
            if said:
                return said
    return ""


def as_builders_get_them(data: app.Config) -> list[Any]:
    """The applications with short keys moved, and nothing else done to them."""
    data = app.copied(data)
    with contextlib.suppress(Exception):  # the shapes may be any
        for _, llm, _ in app.llm_places(data):
            options = copy.deepcopy(llm["deployment_config"])
            app.move_short_keys(options, ())
            llm["deployment_config"] = options
    return app.as_list(data.get("applications"))


def our_verdict(text: str) -> tuple[list[str], list[Any]]:
    """The errors, and the applications as the program would deploy them."""
    Path("config.yaml").write_text(text)
    applications: tuple[app.ApplicationSpec, ...] = ()
    try:
        document = app.Document("config.yaml", {})
        applications, found = app.check_config(document, CHECK_VALUES)
    except app.ConfigError as error:
        found = [*error.args]
    errors = [app.format_problem(problem) for problem in found if not problem.warning]
    return errors, [application.config for application in applications]


def rays_verdict(builders: Builders, text: str, fitted: list[Any]) -> tuple[str, str]:
    """Which of Ray's steps says what against a config; `fitted` is what the program would deploy
    of it, or empty when it refuses."""
    data = yaml.safe_load(text)
    step, said = serve_says(data)
    if said:
        return step, said
    said = builders_say(builders, fitted or as_builders_get_them(data))
    if said and fitted and not builders_say(builders, as_builders_get_them(data)):
        return "fitting", said
    return ("builder" if said else ""), said


# -- what is written ------------------------------------------------------------------------------

OF_RAYS_LLMS = [name for name, text in DOCUMENTED.items() if "ray.serve.llm" in text]


def test_documented_llms_are_built_as_written_and_as_fitted(builders: Builders) -> None:
    assert len(OF_RAYS_LLMS) >= 40
    for name in OF_RAYS_LLMS:
        errors, fitted = our_verdict(DOCUMENTED[name])
        assert errors == [], name
        assert builders_say(builders, fitted) == "", name
        assert rays_verdict(builders, DOCUMENTED[name], []) == ("", ""), name


MODEL = f"{OPENAI}    - model_loading_config: {{model_id: m}}\n"
HALF = "{model_loading_config: {model_id: m}}"
MOVED = (
    "{model_loading_config: {model_id: m}, engine_kwargs: {kv_transfer_config: {kv_role: kv_both}}"
)
DISAGGREGATED = "applications:\n- import_path: ray.serve.llm:build_pd_openai_app\n  args:\n"
DEPLOYMENT = "applications:\n- import_path: m:app\n  deployments:\n  - name: D\n"
LATER = {
    # The builder's arguments take no others.
    "another argument": (f"{MODEL}    own: 1\n", "builder", "Extra inputs are not permitted"),
    "the old router_cls": (f"{MODEL}    router_cls: m.R\n", "builder", "Extra inputs are not"),
    "another builder's LLM": (f"{MODEL}    decode_config: {HALF}\n", "builder", "Extra inputs"),
    "an option of the ingress class": (
        f"{MODEL}    ingress_cls_config: {{own: 1}}\n",
        "builder",
        "Extra inputs are not permitted",
    ),
    "an ingress option": (
        f"{MODEL}    ingress_deployment_config: {{own: 1}}\n",
        "builder",
        "unexpected keyword argument 'own'",
    ),
    # So are an LLM's parts.
    "a deployment option": (
        f"{MODEL}      deployment_config: {{own: 1}}\n",
        "builder",
        "unexpected keyword argument 'own'",
    ),
    "an actor option": (
        f"{MODEL}      deployment_config: {{ray_actor_options: {{own: 1}}}}\n",
        "builder",
        "Specifying 'own' in ray_actor_options is not allowed",
    ),
    "a placement option": (
        f"{MODEL}      placement_group_config: {{bundles: [{{GPU: 1}}], own: 1}}\n",
        "builder",
        "Extra inputs are not permitted",
    ),
    "placement without bundles": (
        f"{MODEL}      placement_group_config: {{strategy: PACK}}\n",
        "builder",
        "must specify either 'bundle_per_worker' or 'bundles'",
    ),
    "placement with both": (
        f"{MODEL}      placement_group_config: {{bundle_per_worker: {{GPU: 1}}, bundles: []}}\n",
        "builder",
        "Cannot specify both",
    ),
    "an unknown strategy": (
        f"{MODEL}      placement_group_config: {{bundles: [{{GPU: 1}}], strategy: pack}}\n",
        "builder",
        "Input should be 'PACK'",
    ),
    "a callback option": (
        f"{MODEL}      callback_config: {{own: 1}}\n",
        "builder",
        "Unexpected keyword argument",
    ),
    # Values that LLMConfig refuses
    "an unknown accelerator": (
        f"{MODEL}      accelerator_type: Z9\n",
        "builder",
        "Unsupported accelerator type: Z9",
    ),
    "an unknown kind": (f"{MODEL}      accelerator_config: {{kind: npu}}\n", "builder", "npu"),
    "no kind": (f"{MODEL}      accelerator_config: {{}}\n", "builder", "Unable to extract tag"),
    "a topology alone": (
        f"{MODEL}      accelerator_config: {{kind: tpu, topology: 4x4}}\n",
        "builder",
        "accelerator_type must be provided",
    ),
    "accelerators that differ": (
        f"{MODEL}      accelerator_type: L4\n      accelerator_config: {{kind: tpu}}\n",
        "builder",
        "Hardware mismatch",
    ),
    "adapters on a disk": (
        f"{MODEL}      lora_config: {{dynamic_lora_loading_path: /tmp/adapters}}\n",
        "builder",
        "Invalid lora_config",
    ),
    "no adapters": (
        f"{MODEL}      lora_config: {{max_num_adapters_per_replica: 0}}\n",
        "builder",
        "Invalid lora_config",
    ),
    "an unknown engine": (f"{MODEL}      llm_engine: SGLang\n", "builder", "Unsupported engine"),
    "a retired experiment": (
        f"{MODEL}      experimental_configs: {{num_router_replicas: 2}}\n",
        "builder",
        "renamed to 'num_ingress_replicas'",
    ),
    "metrics without statistics": (
        f"{MODEL}      engine_kwargs: {{disable_log_stats: true}}\n",
        "builder",
        "disable_log_stats cannot be set to True",
    ),
    "a size in quotes": (
        f"{MODEL}      engine_kwargs: {{tensor_parallel_size: '2'}}\n",
        "builder",
        "'str' object cannot be interpreted as an integer",
    ),
    # Prefill and decode belong together
    "no way to move the cache": (
        f"{DISAGGREGATED}    prefill_config: {HALF}\n    decode_config: {HALF}\n",
        "builder",
        "kv_transfer_config is required",
    ),
    "decode alone": (f"{DISAGGREGATED}    decode_config: {HALF}\n", "builder", "Field required"),
    "two models": (
        f"{DISAGGREGATED}    prefill_config: {MOVED}}}\n"
        f"    decode_config: {MOVED.replace('id: m', 'id: n')}}}\n",
        "builder",
        "P/D model id mismatch",
    ),
    "adapters for decode alone": (
        f"{DISAGGREGATED}    prefill_config: {MOVED}}}\n"
        f"    decode_config: {MOVED}, lora_config: {{}}}}\n",
        "builder",
        "P/D LoRA must be configured on both",
    ),
    # What Serve says when it lays the overrides over the code's options
    "a gang of one": (
        f"{DEPLOYMENT}    gang_scheduling_config: {{gang_size: 2}}\n",
        "overrides",
        "must be a multiple of gang_size",
    ),
    "two actors of a name": (
        f"{DEPLOYMENT}    deployment_actors: [{{name: a, actor_class: 'collections:Counter'}}, "
        "{name: a, actor_class: 'collections:Counter'}]\n",
        "overrides",
        "deployment_actors must have unique names",
    ),
    "an empty bundle": (
        f"{DEPLOYMENT}    placement_group_bundles: [{{CPU: 1}}, {{}}]\n",
        "overrides",
        "Bundles cannot be an empty dictionary",
    ),
    "at most none on a node": (
        f"{DEPLOYMENT}    max_replicas_per_node: 0\n",
        "overrides",
        "max_replicas_per_node",
    ),
    "an unknown placement strategy": (
        f"{DEPLOYMENT}    placement_group_bundles: [{{CPU: 1}}]\n"
        "    placement_group_strategy: PACKED\n",
        "overrides",
        "PACKED",
    ),
    "no list of applications": ("applications:\n", "schema", "Input should be a valid list"),
}
"""What a later step of Ray's refuses: the smallest config, the step, its words."""


def test_ray_says_later_what_these_tables_say(builders: Builders) -> None:
    found = {name: rays_verdict(builders, text, []) for name, (text, _, _) in LATER.items()}
    wrong = {
        name: found[name]
        for name, (_, step, words) in LATER.items()
        if found[name][0] != step or words not in found[name][1]
    }
    assert wrong == {}


TOLD_AT_ONCE = frozenset(
    {
        "a deployment option",
        "a placement option",
        "an ingress option",
        "an option of the ingress class",
        "an unknown engine",
        "an unknown strategy",
        "another argument",
        "at most none on a node",
        "no list of applications",
        "the old router_cls",
        "two actors of a name",
    }
)
"""Which of them the program refuses itself, with their lines; the others are left to the builder,
whose application fails alone."""


def test_what_the_program_itself_tells_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {name for name, (text, _, _) in LATER.items() if our_verdict(text)[0]} == TOLD_AT_ONCE


ONCE_CRASHED = {
    "bundles a mapping": f"{MODEL}      placement_group_config: {{bundles: {{GPU: 1}}}}\n",
    "a worker's bundle a list": (
        f"{MODEL}      placement_group_config: {{bundle_per_worker: [{{CPU: 1, GPU: 1}}]}}\n"
    ),
    "resources a list": (
        f"{MODEL}      deployment_config: {{ray_actor_options: {{resources: [{{rack: 1}}]}}}}\n"
    ),
    "nothing for prefill": (f"{DISAGGREGATED}    prefill_config:\n    decode_config: {HALF}\n"),
}


@pytest.mark.parametrize("name", ONCE_CRASHED)
def test_what_broke_the_program_is_an_error_or_left_to_the_builder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bool(our_verdict(ONCE_CRASHED[name])[0]) is (name != "nothing for prefill")


ONCE_REFUSED = {
    "replicas in quotes": f"{MODEL}      deployment_config: {{num_replicas: '2'}}\n",
    "a queue in quotes": f"{MODEL}      deployment_config: {{max_queued_requests: '200'}}\n",
    "user_config a number": f"{MODEL}      deployment_config: {{user_config: 0.5}}\n",
}


def test_what_an_llms_options_may_be(builders: Builders) -> None:
    for name, text in ONCE_REFUSED.items():
        assert our_verdict(text)[0] == [], name
        assert rays_verdict(builders, text, []) == ("", ""), name


# -- what is written with mistakes in it ----------------------------------------------------------

OF_OTHERS = """
applications:
- name: first
  route_prefix: /first
  import_path: mine:build
  args: {llm_configs: [{model_loading_config: {model_id: m}, deployment_config: {num_gpus: 1}}]}
- name: second
  route_prefix: /second
  import_path: mine.build
  args: {llm_config: small.yaml, ingress_deployment_config: {replicas: 2}}
"""
SHORT = f"{MODEL}      deployment_config: {{cpus: 1, gpus: 0.45, num_replicas: 2}}\n"
TEXTS = {**DOCUMENTED, **{f"accepted {number}": text for number, text in enumerate(VALID)}}
TEXTS |= {"short keys": SHORT, "builders of others": OF_OTHERS}
TEXTS |= {file.name: file.read_text() for file in sorted(ROOT.glob("*.yaml"))}
SEEDS = {name: app.copied(yaml.safe_load(t.removeprefix("\ufeff"))) for name, t in TEXTS.items()}

Path_ = tuple[Any, ...]
HUGE = 2**70
STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 2.0, HUGE, "", "x", "1", "auto"),
    *([], {}, ["x"], {"x": 1}),
]


def at(data: Any, path: Path_) -> Any:
    return functools.reduce(lambda holder, step: holder[step], path, data)


def kind_of(path: Path_) -> Path_:
    """A place without the numbers of items in lists."""
    return tuple("[]" if isinstance(step, int) else step for step in path)


KNOWN: dict[Path_, list[Any]] = {}
"""Each kind of place in the configs, with the values that stand there."""
for seed in SEEDS.values():
    for place in places(seed)[1:]:
        KNOWN.setdefault(kind_of(place), []).append(at(seed, place))


def drop(holder: Any, key: Any, *_: Any) -> None:
    del holder[key]


def rename(holder: Any, key: Any, _: Any, chance: random.Random) -> None:
    if isinstance(holder, dict):
        cut = chance.randrange(len(str(key)))
        slip = str(key)[:cut] + str(key)[cut + 1 :]
        holder[chance.choice([slip, f"{key}s", str(key).upper(), "own", f"x_{key}"])] = holder.pop(
            key
        )


def double(holder: Any, key: Any, *_: Any) -> None:
    if isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))


def put_a_strange_value(holder: Any, key: Any, _: Any, chance: random.Random) -> None:
    value = copy.deepcopy(chance.choice(STRANGE))
    # Ray's builder makes a bundle for each worker, until the memory is full.
    huge = str(key).endswith("parallel_size") and value == HUGE
    holder[key] = 64 if huge else value


def change_its_shape(holder: Any, key: Any, _: Any, chance: random.Random) -> None:
    value = holder[key]
    holder[key] = chance.choice([[value], {"x": value}, str(value)])


def put_what_stands_there_elsewhere(
    holder: Any, key: Any, path: Path_, chance: random.Random
) -> None:
    holder[key] = copy.deepcopy(chance.choice(KNOWN.get(kind_of(path), STRANGE)))


def add_what_others_have(holder: Any, key: Any, path: Path_, chance: random.Random) -> None:
    kind, value = kind_of(path), holder[key]
    more = [known for known in KNOWN if known[:-1] == kind and known[-1] != "[]"]
    if isinstance(value, dict) and more:
        added = chance.choice(more)
        value[added[-1]] = copy.deepcopy(chance.choice(KNOWN[added]))


CHANGES = [
    *(drop, rename, double, put_a_strange_value, change_its_shape),
    *(put_what_stands_there_elsewhere, add_what_others_have, add_what_others_have),
]


def move(data: Any, path: Path_, chance: random.Random) -> None:
    """Put a key into another mapping."""
    *above, key = path
    there = chance.choice([p for p in places(data) if isinstance(at(data, p), dict)])
    holder = at(data, tuple(above))
    if isinstance(holder, dict) and there[: len(path)] != path and there != tuple(above):
        at(data, there)[key] = holder.pop(key)


def changed(chance: random.Random) -> tuple[str, str]:
    """A config with an edit or two, and what they were."""
    name = chance.choice(list(SEEDS))
    data, said = copy.deepcopy(SEEDS[name]), [name]
    for _ in range(chance.choice([1, 1, 2])):
        if path := chance.choice([*places(data)[1:], ()]):
            change = chance.choice([*CHANGES, None])
            said.append(f"{change.__name__ if change else 'move'} {app.format_key(path)}")
            if change:
                change(at(data, path[:-1]), path[-1], path, chance)
            else:
                move(data, path, chance)
    return ", ".join(said), yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def excuse(error: str) -> str:
    """Why the program may refuse what Ray takes; "" when it may not."""
    return next((reason for words, reason in DELIBERATE.items() if words in error), "")


def test_what_ray_takes_is_never_refused(
    builders: Builders, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(2026)
    both: Counter[str] = Counter()
    on_purpose: Counter[str] = Counter()
    later: Counter[str] = Counter()
    wrong = []
    for number in range(EXAMPLES):
        said, text = changed(chance)
        errors, fitted = our_verdict(text)
        step, words = rays_verdict(builders, text, fitted)
        if bool(errors) == bool(step):
            both["refused" if errors else "taken"] += 1
        elif errors:
            reasons = [excuse(error) for error in errors]
            on_purpose[reasons[0]] += 1
            wrong += [f"{number}: {said}: {errors}\n{text}"] * (not all(reasons))
        else:
            later[f"{step}: {words[:50]}"] += 1
            # With no application there is nothing to deploy, and no step that could tell; what
            # can't be imported here may be in the application's own environment.
            told = step in ("overrides", "builder") or not fitted or "No module" in words
            wrong += [f"{number}: {said}: {step}: {words}\n{text}"] * (not told)
    with capsys.disabled():
        print(
            f"\n{EXAMPLES} configs: both took {both['taken']} and refused {both['refused']}; "
            f"refused on purpose {on_purpose.total()} {dict(on_purpose)}; "
            f"told later {later.total()} {dict(later)}; wrong {len(wrong)}"
        )
    assert wrong == []
    assert min(both.values()) > EXAMPLES / 5
