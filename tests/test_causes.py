"""Section 7: recorded messages and logs → the cause in one line, and what would help.

`recorded/` holds what Serve and the engine really said (Ray 2.60, vLLM 0.29 on the CPU), with paths
and addresses neutralised. What needs a GPU or a network is quoted from vLLM's source instead.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import app_v5 as app

RECORDED = Path(__file__).parent / "recorded"
NO_SUCH_MODEL = (
    "there is no such model: check model_source (a Hugging Face id, or a path that exists on every "
    "node), and whether the node reaches the hub"
)


def recorded(name: str) -> app.Cause:
    """The cause that the program finds in what was recorded under a name."""
    message, log = (RECORDED / f"{name}.{kind}.txt" for kind in ("message", "log"))
    engine_died = "RuntimeError: Engine core initialization failed. See root cause above."
    return app.root_cause(
        message.read_text() if message.exists() else engine_died,
        [log.read_text()] if log.exists() else [],
    )


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        pytest.param(
            "wrong-path",
            "Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/no/such/model'. "
            "Use `repo_type` argument if needed.",
            NO_SUCH_MODEL,
            id="wrong local path",
        ),
        pytest.param(
            "unknown-id",
            "Cannot find an appropriate cached snapshot folder for the specified revision on the "
            "local disk and outgoing traffic has been disabled. To enable repo look-ups and downloads "
            "online, pass 'local_files_only=False' as input.",
            NO_SUCH_MODEL,
            id="unknown model, no network",
        ),
        pytest.param(
            "architecture",
            "Model architectures ['FalconOfTheFutureForCausalLM'] are not supported for "
            "now. Supported architectures:",
            "this version of vLLM does not know the model's architecture: use another model or vLLM",
            id="unsupported architecture",
        ),
        pytest.param(
            "too-long",
            "User-specified max_model_len (999999) is greater than the derived "
            "max_model_len (max_position_embeddings=256.0",
            "the model can take 256 tokens: set engine_kwargs.max_model_len to 256 or less",
            id="max_model_len too large",
        ),
        pytest.param(
            "cannot-fit",
            "ValueError: Cannot schedule RayWorkerProc with the placement group because the resource "
            "request {'CPU': 0, 'GPU': 1.0} cannot fit into any bundles",
            "the engine asks for more of a GPU than the replica's bundles hold: set "
            "VLLM_RAY_PER_WORKER_GPUS in runtime_env.env_vars to a worker's share, as a text",
            id="the executor's cannot fit, from the log",
        ),
        pytest.param(
            "cpu-memory",
            "ValueError: Available memory on node 0 (5.31/14.84 GiB) on startup is less than desired "
            "CPU memory utilization (0.92, 13.65 GiB).",
            "the CPU engine wants a part of the machine's memory, and 5.31 of 14.84 GiB are free: "
            "lower engine_kwargs.gpu_memory_utilization (it means main memory there)",
            id="too little main memory, from the log",
        ),
    ],
)
def test_what_was_recorded(name: str, text: str, hint: str) -> None:
    cause = recorded(name)
    assert cause.text.startswith(text)
    assert cause.hint == hint
    assert len(cause.text) <= app.MOST_CAUSE_CHARACTERS


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        pytest.param(
            "ValueError: To serve at least one request with the model's max seq len (8192), (1.0 GiB KV "
            "cache is needed, which is larger than the available KV cache memory (0.5 GiB). Based on "
            "the available memory, the estimated maximum model length is 4096. Try increasing",
            "set engine_kwargs.max_model_len to 4096 or less (it is 8192), or raise num_gpus",
            id="v1/core/kv_cache_utils.py: too long for the memory",
        ),
        pytest.param(
            "ValueError: No available memory for the cache blocks. Try increasing",
            "the weights leave no room in the share: raise num_gpus or gpu_memory_utilization; if the "
            "engines started together, set engine_kwargs.kv_cache_memory_bytes",
            id="v1/core/kv_cache_utils.py: no room at all",
        ),
        pytest.param(
            "AssertionError: Error in memory profiling. Initial free memory 3 GiB, current free 4 GiB.",
            "another engine took or freed memory of this GPU during the measurement: set "
            "engine_kwargs.kv_cache_memory_bytes, or deploy again with --max-workers 1",
            id="v1/worker/gpu_worker.py: the race",
        ),
        pytest.param(
            "ValueError: Free memory on device cuda:0 (10.5/79.1 GiB) on startup is less than desired",
            "the GPU has 10.5 of 79.1 GiB free: lower num_gpus or gpu_memory_utilization, or stop what "
            "else runs there (nvidia-smi shows it)",
            id="v1/worker/utils.py: too little is free",
        ),
        pytest.param(
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
            "the GPU's memory is full: raise num_gpus, lower max_model_len, or use a smaller model",
            id="out of memory",
        ),
        pytest.param(
            "OSError: You are trying to access a gated repo. 401 Client Error.",
            "the model is gated: accept its licence on Hugging Face, and set HF_TOKEN in "
            "runtime_env.env_vars",
            id="gated",
        ),
        pytest.param(
            "ValueError: current platform cpu does not support ray.",
            "the node has no GPU that vLLM can use: set num_gpus: 0 for the CPU engine",
            id="no GPU",
        ),
        pytest.param(
            'RayServeException: Prefix /a is being used by application "x". Failed to deploy "y".',
            "give one of the two another route_prefix",
            id="route taken",
        ),
        pytest.param(
            "ModuleNotFoundError: No module named 'x'",
            "install it on the nodes, or name it in runtime_env",
            id="module",
        ),
        pytest.param(
            "AttributeError: module 'm' has no attribute 'x'",
            "check the part of import_path behind the colon",
            id="attribute",
        ),
        pytest.param("ValueError: something new", "", id="unknown"),
    ],
)
def test_known_causes_have_a_hint_in_their_own_numbers(message: str, hint: str) -> None:
    assert app.root_cause(f"Traceback (most recent call last):\n{message}\n").hint == hint


SERVE_SAYS = (
    "The deployment failed to start 3 times in a row. This may be due to a problem with its "
    "constructor or initial health check failing. See controller logs for details. Error:\n"
)


@pytest.mark.parametrize(
    ("message", "logs", "text"),
    [
        pytest.param(
            f"Failed to update the deployments ['D'].\n{SERVE_SAYS}"
            "\x1b[36mray::ServeReplica:a:D.initialize()\x1b[39m (pid=1, ip=10.0.0.1)\n"
            "RuntimeError: Traceback (most recent call last):\n"
            '  File "x.py", line 1, in f\nZeroDivisionError: no\n',
            [],
            "ZeroDivisionError: no",
            id="wrapped by Serve and Ray",
        ),
        pytest.param(
            "RuntimeError: Engine core initialization failed. See root cause above.",
            ["(EngineCore pid=1) ERROR 11-23 10:00:00 [core.py:1] ValueError: first\n" * 3],
            "ValueError: first",
            id="repeated attempts, from a log with prefixes",
        ),
        pytest.param(
            "RuntimeError: Engine core initialization failed. See root cause above.",
            ["nothing of use\n", "(RayWorkerProc pid=2) KeyError: 'second'\n"],
            "KeyError: 'second'",
            id="from the second log",
        ),
        pytest.param(
            "Failed to update the deployments ['D'].\nThe deployment was killed.",
            [],
            "The deployment was killed.",
            id="no exception at all",
        ),
        pytest.param("", [], "(no message)", id="nothing said"),
        pytest.param(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for LLMConfig\n"
            "deployment_config\n  Value error, Invalid deployment config\n    For further\n",
            [],
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for LLMConfig "
            "deployment_config Value error, Invalid deployment config For further",
            id="a pydantic model",
        ),
    ],
)
def test_the_first_real_exception_is_found(message: str, logs: list[str], text: str) -> None:
    assert app.root_cause(message, logs).text == text


@pytest.mark.parametrize(
    ("log", "phase"),
    [
        pytest.param("", "", id="nothing yet"),
        pytest.param("INFO Initializing a V1 LLM engine\n", "", id="no phase yet"),
        pytest.param("INFO Starting to load model /m...\n", "loading weights", id="loading"),
        pytest.param(
            "INFO Starting to load model /m...\nINFO Model loading took 1.0 GiB memory and 2 seconds\n",
            "profiling memory",
            id="the latest counts",
        ),
        pytest.param("INFO GPU KV cache size: 12,345 tokens\n", "making the KV cache", id="cache"),
        pytest.param("Capturing CUDA graphs (mixed): 10%\n", "warming up", id="graphs"),
    ],
)
def test_the_phase_of_an_engine(log: str, phase: str) -> None:
    assert app.engine_phase(log) == phase


def said(required: str, available: str) -> str:
    """What Serve says of a replica that is not placed (deployment_state.py)."""
    return (
        "Deployment 'D' in application 'a' has 1 replicas that have taken more than 30s to be "
        f"scheduled. Resources required for each replica: {required}, total resources available: "
        f"{available}. Use `ray status` for more details."
    )


@pytest.mark.parametrize(
    ("message", "need"),
    [
        pytest.param(
            said('{"GPU": 2.0}', '{"GPU": 1.0}'), ({"GPU": 2.0}, {"GPU": 1.0}), id="short"
        ),
        pytest.param(
            said('[{"CPU": 1}, {"CPU": 2}]', '{"CPU": 2.5}'),
            ({"CPU": 3.0}, {"CPU": 2.5}),
            id="bundles",
        ),
        pytest.param(
            said('{"CPU": 1}', '{"CPU": 9.0}'), None, id="enough: its process just starts"
        ),
        pytest.param(said('{"CPU": 1}', "{}"), None, id="unknown"),
        pytest.param("another message", None, id="another message"),
    ],
)
def test_what_serve_says_of_replicas_that_wait(
    message: str, need: tuple[dict[str, float], dict[str, float]] | None
) -> None:
    assert app.pending_need(message) == need
