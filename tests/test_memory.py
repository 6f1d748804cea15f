"""What a share of a card buys: the arithmetic, and vLLM's own figures for models of real size."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

import app_v5 as app
from user import on_request

GIB = 2**30
FALCON3 = app.Memory(
    weights=int(3.11 * GIB),
    block=9 * 2**20,
    requests=((4096, 32), (2048, 16), (896, 7)),
    fraction=0.405,
)


read_demand = TypeAdapter(app.Demand).validate_python
"""As the program reads what a record and a builder's process have."""


def demand(memory: app.Memory | None = FALCON3, gpu: float = 0.45, **more: Any) -> app.Demand:
    return app.Demand("a", "LLMServer:m", ({"CPU": 1.0, "GPU": gpu},), memory=memory, **more)


def node(card: int, used: int = 0) -> app.Node:
    total = {"CPU": 16.0, "GPU": 1.0}
    return app.Node("n", total, total, cards=(app.Card(card * GIB, used * GIB),))


def room_in(nodes: list[app.Node], wanted: app.Demand) -> app.Room:
    """What an engine has room for on the largest card of some nodes."""
    room = app.room_in(app.Plan(nodes, []), wanted)
    assert room is not None
    return room


def in_words(plan: app.Plan) -> list[str]:
    """What the plan says of the memory of the one engine in it."""
    [fit] = plan.fits
    return app.format_memory(fit.demand, app.room_in(plan, fit.demand))


def reason(fit: app.Fit) -> str:
    """What a misfit says after the verdict."""
    return fit.misfit.partition("; ")[2]


def test_a_share_of_a_card_in_words() -> None:
    plan = app.predict([demand(max_ongoing_requests=100, target_ongoing_requests=85)], [node(80)])
    assert plan.misfits == []
    assert in_words(plan) == [
        "memory: weights 3.11 GiB · a request of 4,096 tokens needs 0.28 GiB of KV cache",
        "  0.45 of 80 GiB, at gpu_memory_utilization 0.405: 32.4 GiB; 27.79 GiB for the KV cache"
        " (1.5 GiB kept for activations, a guess)",
        "  room for 404,608 tokens, 98 full requests at once"
        " (max_ongoing_requests is 100: the last 2 would queue)",
        "  the smallest num_gpus that serves target_ongoing_requests 85 in full: 0.4",
    ]


@pytest.mark.parametrize("requests", [1, 7, 85, 200])
def test_the_smallest_share_is_enough_and_a_smaller_one_is_not(requests: int) -> None:
    def full(gpus: float) -> float:
        memory = replace(FALCON3, fraction=gpus * app.WHOLE_GPU_MEMORY_FRACTION)
        return room_in([node(80)], demand(memory)).requests

    least = float(app.least_gpus(demand(), 80 * GIB, requests))
    assert full(least) >= requests
    assert full(least - 0.01) < requests + 1


def test_the_smallest_share_of_several_workers_is_their_sum() -> None:
    large = demand(replace(FALCON3, weights=22 * GIB), 0.5)
    assert app.least_gpus(large, 24 * GIB, 1) == "more than a card a worker"
    two = app.Demand("a", "D", ({"GPU": 0.2}, {"GPU": 0.2}), memory=replace(FALCON3, fraction=0.18))
    [fit] = app.predict([two], [replace(node(24), total={"GPU": 2.0}, free={"GPU": 2.0})]).misfits
    assert fit.misfit.endswith("; num_gpus that would do: 0.46")


def test_a_share_without_room_for_one_request_does_not_fit() -> None:
    plan = app.predict([demand(replace(FALCON3, fraction=0.2), 0.22)], [node(24)])
    [fit] = plan.misfits
    assert not fit.never  # 1.5 GiB of it is a guess
    assert reason(fit) == (
        "a request of 4,096 tokens needs 0.28 GiB of KV cache, and there is room for 0.18 GiB;"
        " max_model_len that would do: 2048; num_gpus that would do: 0.23"
    )


def test_without_any_room_no_length_would_do() -> None:
    [fit] = app.predict([demand(replace(FALCON3, fraction=0.16), 0.18)], [node(24)]).misfits
    assert reason(fit).endswith(
        " of KV cache, and there is room for 0 GiB; num_gpus that would do: 0.23"
    )


def test_only_what_is_sure_is_refused_by_a_deployment() -> None:
    small = replace(FALCON3, fraction=0.1)  # 2.4 GiB for weights of 3.11
    [fit] = app.predict([demand(small)], [node(24)]).misfits
    assert fit.never
    assert "replicas fit" not in fit.misfit
    # On a card of another size it has room.
    waiting = app.predict([demand(small)], [node(24), replace(node(80), name="m", free={})])
    assert [fit.never for fit in waiting.misfits] == [False]


def test_what_fits_nowhere_anyway_stays_what_never_fits() -> None:
    four = app.Demand("a", "LLMServer:m", ({"CPU": 1.0, "GPU": 4.0},), memory=FALCON3)
    [fit] = app.predict([four], [node(2)]).misfits
    assert fit.never
    assert reason(fit).startswith("needs 4 GPU; the most free in one place is 1")


def test_more_sequences_than_mamba_blocks_never_fit() -> None:
    hybrid = replace(FALCON3, weights=GIB, block=14 * 2**20, sequences=256)
    [fit] = app.predict([demand(replace(hybrid, fraction=0.2))], [node(24)]).misfits
    assert reason(fit) == (
        "max_num_seqs is 256, and its share holds 168 Mamba blocks;"
        " set engine_kwargs.max_num_seqs to 168 or less"
    )
    assert app.predict([demand(hybrid)], [node(24)]).misfits == []


def test_what_others_hold_of_a_card_counts() -> None:
    [fit] = app.predict([demand()], [node(24, 20)]).misfits
    assert not fit.never
    assert reason(fit) == "needs 9.72 GiB free on a GPU of node n; others leave 4 GiB at the most"


@pytest.mark.parametrize(
    ("card", "count", "fitting"), [(24, 2, 2), (24, 4, 4), (24, 8, 0), (80, 8, 8)]
)
def test_several_models_on_one_card(card: int, count: int, fitting: int) -> None:
    share = 1 / count
    memory = replace(FALCON3, fraction=round(share * 0.9, 4))
    models = [replace(demand(memory, share), application=f"m{n}") for n in range(count)]
    plan = app.predict(models, [node(card)])
    assert sum(not fit.misfit for fit in plan.fits) == fitting


def test_a_card_s_sum_stands_beside_it() -> None:
    two = [replace(demand(), application=name) for name in "ab"]
    [line, *_] = app.format_node(app.predict(two, [node(80)]), 0)
    assert line == (
        "node n · GPU 0 █████████▓▓▓▓▓▓▓▓▓·· a/LLMServer:m 0.45 + b/LLMServer:m 0.45 · 0.10 free"
        " · memory: 64.8 GiB of 80 GiB asked for"
    )


@pytest.mark.parametrize(
    ("used", "sums"), [(0, "32.4 GiB of 80 GiB"), (30, "30 GiB in use, 32.4 GiB of 80 GiB")]
)
def test_what_is_in_use_stands_beside_it(used: int, sums: str) -> None:
    half = replace(node(80, used), free={"CPU": 8.0, "GPU": 0.55})
    [line, *_] = app.format_node(app.predict([demand()], [half]), 0)
    assert line.endswith(f" + already running 0.45 · 0.10 free · memory: {sums} asked for")


def test_a_fixed_cache_has_to_fit_on_a_card_beside_the_weights() -> None:
    pinned = replace(FALCON3, pinned=22 * GIB)
    [fit] = app.predict([demand(pinned)], [node(24)]).misfits
    assert fit.never
    assert reason(fit) == "weights and kv_cache_memory_bytes are 25.11 GiB, a card has 24 GiB"
    assert app.predict([demand(pinned)], [node(80)]).misfits == []
    cpu = replace(app.Demand("a", "LLMServer:m", ({"CPU": 1.0},)), memory=pinned)
    assert app.predict([cpu], [node(24)]).misfits == []  # of main memory nobody here knows


def test_a_fraction_of_the_user_s_own_gets_no_advice_about_num_gpus() -> None:
    [fit] = app.predict([demand(replace(FALCON3, fraction=0.2))], [node(24)]).misfits
    assert reason(fit).endswith("max_model_len that would do: 2048")


def test_a_whole_card_has_what_vllm_takes_of_it() -> None:
    whole = demand(replace(FALCON3, weights=20 * GIB, fraction=0.92), 1.0)
    assert room_in([node(24)], whole).requests >= 2


def test_cards_of_a_silent_node_are_not_guessed_from_another_s() -> None:
    silent = replace(node(24), name="silent", cards=())
    full = replace(node(24), free={})
    plan = app.predict([demand(replace(FALCON3, fraction=0.1))], [silent, full])
    assert plan.misfits == []
    assert in_words(plan)[-1].endswith("--gpu-memory 80GiB would plan with one")


def test_what_an_older_run_left_of_a_model_without_a_cache_is_not_known() -> None:
    assert app.format_memory(demand(app.Memory(weights=10)), None) == ["memory: not known: "]
    assert app.room_in(app.Plan([node(80)], []), demand(app.Memory(weights=10))) is None


def test_what_is_not_known_is_said() -> None:
    unknown = demand(app.Memory(unknown="it has a draft model"))
    assert app.format_memory(unknown, None) == ["memory: not known: it has a draft model"]
    assert app.format_memory(demand(), None)[1].endswith("--gpu-memory 80GiB would plan with one")
    assert app.format_memory(demand(None), None) == []


def test_the_dashboard_s_cards() -> None:
    gpu = {"memoryTotal": 81920, "memoryUsed": 20480, "processesPids": None}
    summary = {"data": {"summary": [{"raylet": {"nodeId": "abc"}, "gpus": [gpu]}, {"raylet": {}}]}}
    assert app.read_cards(summary)["abc"] == (app.Card(80 * GIB, 20 * GIB),)
    assert app.read_cards({}) == {}


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * GIB), ("24576MiB", 24 * GIB), ("24G", 24 * GIB)]
)
def test_sizes_of_cards(text: str, size: int) -> None:
    assert app.parse_options(["c.yaml", "--gpu-memory", text]).gpu_memory == size


def test_a_wrong_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.parse_options(["c.yaml", "--gpu-memory", "much"])
    assert "'much' is no size such as 80GiB" in capsys.readouterr().err


# -- vLLM's own figures ------------------------------------------------------------------------

REAL: dict[str, dict[str, Any]] = {
    "falcon3-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 131072,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
    "falcon-h1-0.5b": {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "vocab_size": 32784,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 16384,
        "mamba_d_ssm": 1536,
        "mamba_n_heads": 24,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
    },
}
SCRIPT = """
import json, sys
import app_v5
builder = app_v5.Builder()
print("ANSWERS" + json.dumps(builder.memory(json.loads(sys.argv[1]))))
"""


def in_a_process(script: str, argument: Any) -> subprocess.CompletedProcess[str]:
    """What a script prints for an argument. vLLM makes a process group that lasts."""
    return subprocess.run(
        [sys.executable, "-c", script, json.dumps(argument)],
        cwd=Path(app.__file__).parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.engine
def test_models_of_real_size_from_their_config_alone(tmp_path: Path) -> None:
    llms = []
    for name, tensor_parallel, more in (
        ("falcon3-1b", 1, {}),
        ("falcon3-1b", 2, {}),
        ("falcon-h1-0.5b", 1, {}),
        ("falcon-h1-0.5b", 1, {"enforce_eager": True}),
        ("falcon3-1b", 1, {"max_model_len": 99_999}),
        ("falcon3-1b", 1, {"pipeline_parallel_size": 2}),
        ("falcon3-1b", 1, {"data_parallel_size": 2}),
        ("falcon3-1b", 1, {"quantization": "fp8"}),
    ):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        shape = {**REAL[name], "torch_dtype": "bfloat16", "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(shape))
        engine = {
            "max_model_len": 4096,
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "tensor_parallel_size": tensor_parallel,
            **more,
        }
        loading = {"model_id": name, "model_source": str(folder)}
        llms.append({"model_loading_config": loading, "engine_kwargs": engine})
    config = {"import_path": "ray.serve.llm:build_openai_app", "args": {"llm_configs": llms}}
    done = in_a_process(SCRIPT, config)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.partition("ANSWERS")[2])
    falcon3, halves, hybrid, eager, long, *unknown = answers

    def request(answer: dict[str, Any]) -> float:
        size: int = answer["block"] * answer["requests"][0][1]
        return round(size / GIB, 2)

    assert (round(falcon3["weights"] / GIB, 2), request(falcon3)) == (3.11, 0.28)
    # How the states of a hybrid lie in memory depends on the CPU (vllm/platforms/cpu.py); that the
    # figures are those of the started engine on the same one, tests/test_engine.py shows.
    assert round(hybrid["weights"] / GIB, 2) == 0.97
    assert request(hybrid) in (0.11, 0.14)
    # A table of positions and the layers' norms are whole in each shard.
    assert halves["weights"] == pytest.approx(falcon3["weights"] / 2, rel=0.001)
    assert halves["block"] * 2 == falcon3["block"]
    room = room_in([], demand(app.Memory(**{**falcon3, "pinned": 20 * GIB})))
    assert (room.tokens, int(room.requests)) == (291_200, 71)
    # Where no CUDA graphs are, as on the CPU, more sequences than Mamba blocks are no fault.
    assert hybrid["sequences"] == eager["sequences"] == falcon3["sequences"] == 0
    assert "max_model_len" in long["unknown"]
    assert [answer["unknown"].partition(",")[0] for answer in unknown] == [
        "it has pipeline_parallel_size",
        "it has data_parallel_size",
        "it has quantization",
    ]


TOO_SMALL = """
import json, sys
import app_v5
from vllm import LLM
if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    try:
        LLM(**options)
    except Exception:
        print("ASKED", json.dumps(app_v5.ask_vllm(options)))
"""


@pytest.mark.engine
@on_request
@pytest.mark.parametrize("kilobytes", [300_000, 40_000])
def test_what_a_started_engine_says_of_too_small_a_cache(
    tmp_path: Path, tiny_llama: Path, kilobytes: int
) -> None:
    """Digit for digit: with room for a part of a request, and with less than a block besides the
    one that is never used."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    shape = json.loads((folder / "config.json").read_text())
    shape["max_position_embeddings"] = 4096
    shape |= {"num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 16}
    (folder / "config.json").write_text(json.dumps(shape | {"head_dim": 256}))
    options: dict[str, Any] = {"model": str(folder), "load_format": "dummy", "dtype": "bfloat16"}
    options |= {"max_model_len": 4096, "enforce_eager": True}
    options["kv_cache_memory_bytes"] = kilobytes * 1000
    done = in_a_process(TOO_SMALL, options)
    answer = json.loads(done.stdout.partition("ASKED ")[2])
    found = read_demand({"application": "a", "deployment": "D", "bundles": [], "memory": answer})
    said = app.memory_misfit(found, room_in([], found))
    pattern = (
        r"ValueError: To serve .* max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, .*"
        r"available KV cache memory \(([\d.]+) GiB\)\.(?:.* maximum model length is (\d+))?"
    )
    engine = re.search(pattern, done.stdout + done.stderr)
    assert engine
    length, need, left, fits = engine.groups()
    texts = [f"a request of {int(length):,} tokens needs {need} GiB of KV cache"]
    if kilobytes == 300_000:
        texts.append(f" and there is room for {left} GiB; max_model_len that would do: {fits}")
    else:
        assert (left, fits) == ("0.0", None)
        texts.append(" and there is room for 2.15 MiB")
    assert said == ",".join(texts)
