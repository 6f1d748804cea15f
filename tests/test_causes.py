"""The section Causes: recorded messages and logs → the cause in one line, and what would help.

`recorded/` holds what Serve and the engine really said (Ray 2.60, vLLM 0.29 on the CPU), with paths
and addresses neutralised. What needs a GPU or a network is put together from the format strings of
the libraries instead: `from_source_*`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import app_v5 as app

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> tuple[str, str]:
    """The cause and the hint that the program finds in what was recorded under a name."""
    message, log = (RECORDED / f"{name}.{kind}.txt" for kind in ("message", "log"))
    engine_died = "RuntimeError: Engine core initialization failed. See root cause above."
    return app.root_cause(
        message.read_text() if message.exists() else engine_died,
        [log.read_text()] if log.exists() else [],
    )


WHAT_WAS_RECORDED = [
    pytest.param(
        "wrong-path",
        "Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/no/such/model'. Use `repo_type` argument if needed.",
        "there is no such model: check model_source; a path has to exist on every node",
        id="wrong local path",
    ),
    pytest.param(
        "unknown-id",
        "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and outgoing traffic has been disabled. To enable repo look-ups and downloads online, pass 'local_files_only=False' as input.",
        "not on the node, which can't reach Hugging Face (or HF_HUB_OFFLINE is set): check model_source",
        id="unknown model, no network",
    ),
    pytest.param(
        "architecture",
        "Model architectures ['FalconOfTheFutureForCausalLM'] are not supported for now.",
        "",
        id="unsupported architecture",
    ),
    pytest.param(
        "too-long",
        "User-specified max_model_len (999999) is greater than the derived max_model_len (max_position_embeddings=256.0 or model_max_length=None in model's config.json). To allow overriding this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1. VLLM_ALLOW_LONG_MAX_MODEL_LEN must be used with extre...",
        "the model can take 256 tokens: set engine_kwargs.max_model_len to 256 or less",
        id="max_model_len too large",
    ),
    pytest.param(
        "cannot-fit",
        "ValueError: Cannot schedule RayWorkerProc with the placement group because the resource request {'CPU': 0, 'GPU': 1.0} cannot fit into any bundles for the placement group, [{'CPU': 1.0, 'GPU': 0.45}].",
        'a bundle holds 0.45 GPU: set VLLM_RAY_PER_WORKER_GPUS: "0.45" in runtime_env.env_vars',
        id="the executor's cannot fit, from the log",
    ),
    pytest.param(
        "cpu-memory",
        "ValueError: Available memory on node 0 (5.31/14.84 GiB) on startup is less than desired CPU memory utilization (0.92, 13.65 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction of CPU memory reserved (despite its name). To resolve: decrease `--gpu-memory-utilization...",
        "lacks main memory: lower VLLM_CPU_KVCACHE_SPACE, kv_cache_memory_bytes or gpu_memory_utilization",
        id="too little main memory, from the log",
    ),
    pytest.param(
        "worker-memory",
        "Available memory on node 0 (11.75/23.54 GiB) on kv cache allocation is less than requested memory for kv (100.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.",
        "lacks main memory: lower VLLM_CPU_KVCACHE_SPACE, kv_cache_memory_bytes or gpu_memory_utilization",
        id="too little main memory, told by a Ray worker of the engine",
    ),
    pytest.param(
        "no-cache-blocks",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine (this flag also controls CPU memory reservation on the CPU backend, despite its name). See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.",
        "raise num_gpus or gpu_memory_utilization; if engines started together, set kv_cache_memory_bytes",
        id="no room for the KV cache",
    ),
    pytest.param(
        "no-gpu",
        "ValueError: current platform cpu does not support ray.",
        "the node has no GPU that vLLM can use: see nvidia-smi, or set num_gpus: 0 for the CPU engine",
        id="no accelerator",
    ),
    pytest.param(
        "own-code",
        "The repository /models/own-code contains custom code which must be executed to correctly load the model. You can inspect the repository content at /models/own-code . You can inspect the repository content at https://hf.co//models/own-code. Please pass the argument `trust_remote_code=True` to allo...",
        "the model brings its own code: set engine_kwargs.trust_remote_code: true if you trust it",
        id="trust_remote_code",
    ),
    pytest.param(
        "torn-weights",
        "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered",
        "a weights file is broken or not whole: fetch the model again",
        id="weights cut short",
    ),
    pytest.param(
        "unknown-argument",
        "ValueError: Unknown engine argument: unheard_of",
        "the import, or the builder with these args, raised it",
        id="unknown engine argument",
    ),
    pytest.param(
        "wrong-value",
        "2 validation errors for ModelConfig dtype.literal['auto','half','float16','bfloat16','float','float32'] Input should be 'auto', 'half', 'float16', 'bfloat16', 'float' or 'float32'",
        "",
        id="wrong value of an engine argument",
    ),
    pytest.param(
        "accelerator-type",
        "ValidationError: 1 validation error for LLMServingArgs llm_configs.accelerator_type Value error, Unsupported accelerator type: NOSUCH",
        "the import, or the builder with these args, raised it",
        id="LLMConfig refuses a value",
    ),
    pytest.param(
        "missing-module",
        "ModuleNotFoundError: No module named 'no_such_module'",
        "install it on the nodes, or name it in runtime_env",
        id="missing module",
    ),
    pytest.param(
        "missing-attribute",
        "AttributeError: module 'fixture_apps' has no attribute 'nothing'",
        "the import, or the builder with these args, raised it",
        id="missing attribute",
    ),
    pytest.param(
        "builder-raises",
        "LookupError: the builder found nothing",
        "the import, or the builder with these args, raised it",
        id="builder raises",
    ),
    pytest.param(
        "builder-returns-nothing",
        "TypeError: Application builder functions must return an `Application` returned `from `Deployment.bind()`, but got: <class 'NoneType'>.",
        "the import, or the builder with these args, raised it",
        id="builder returns None",
    ),
    pytest.param(
        "builder-exits",
        "Worker exits unexpectedly. Worker exits with an exit code 3.",
        "the process was killed, crashed or ended itself: see its logs, and dmesg for the OOM killer",
        id="builder calls sys.exit",
    ),
    pytest.param(
        "builder-dies",
        "Worker unexpectedly exits with a connection error code 2. End of file.",
        "the process was killed, crashed or ended itself: see its logs, and dmesg for the OOM killer",
        id="builder kills its process",
    ),
    pytest.param(
        "constructor-raises",
        "ZeroDivisionError: this constructor always fails",
        "",
        id="constructor raises, three times",
    ),
    pytest.param(
        "replica-killed",
        "Worker unexpectedly exits with a connection error code 2. End of file.",
        "the process was killed, crashed or ended itself: see its logs, and dmesg for the OOM killer",
        id="constructor kills its process",
    ),
    pytest.param(
        "bad-pip",
        "No matching distribution found for no-such-package-xyz",
        "check runtime_env",
        id="runtime_env: no such package",
    ),
    pytest.param(
        "bad-working-dir",
        "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='127.0.0.1', port=1): Max retries exceeded with url: /code.zip (Caused by NewConnectionError(\"HTTPSConnection(host='127.0.0.1', port=1): Failed to establish a new connection: [Errno 111] Connection refused\"))",
        "check runtime_env",
        id="runtime_env: no such working_dir",
    ),
    pytest.param(
        "bad-deployment-runtime-env",
        "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='127.0.0.1', port=1): Max retries exceeded with url: /code.zip (Caused by NewConnectionError(\"HTTPSConnection(host='127.0.0.1', port=1): Failed to establish a new connection: [Errno 111] Connection refused\"))",
        "check runtime_env",
        id="runtime_env of a deployment",
    ),
]


@pytest.mark.parametrize(("name", "text", "hint"), WHAT_WAS_RECORDED)
def test_what_was_recorded(name: str, text: str, hint: str) -> None:
    assert recorded(name) == (text, hint)
    assert len(text) <= app.MOST_CAUSE_CHARACTERS


WHAT_THE_SOURCES_SAY = [
    pytest.param(
        "from_source_cuda-oom",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is free. Process 1234 has 77.80 GiB memory in use. Of the allocated memory 76.10 GiB is allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated.",
        "the GPU's memory is full: raise num_gpus, lower max_model_len, or use a smaller model",
        id="c10/cuda/CUDACachingAllocator.cpp",
    ),
    pytest.param(
        "from_source_kv-too-long",
        "ValueError: To serve at least one request with the model's max seq len (32768), (4.0 GiB KV cache is needed, which is larger than the available KV cache memory (1.5 GiB). Based on the available memory, the estimated maximum model length is 12288. Try increasing `gpu_memory_utilization` (which als...",
        "lower engine_kwargs.max_model_len (it is 32768), or raise num_gpus",
        id="vllm/v1/core/kv_cache_utils.py: another length fits",
    ),
    pytest.param(
        "from_source_kv-far-too-long",
        "ValueError: To serve at least one request with the model's max seq len (32768), (4.0 GiB KV cache is needed, which is larger than the available KV cache memory (0.01 GiB). Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or decreasing `max_model_len` whe...",
        "lower engine_kwargs.max_model_len (it is 32768), or raise num_gpus",
        id="vllm/v1/core/kv_cache_utils.py: no length fits",
    ),
    pytest.param(
        "from_source_profiling-race",
        "Error in memory profiling. Initial free memory 60.1 GiB, current free memory 71.5 GiB. This happens when other processes sharing the same container release GPU memory while vLLM is profiling during initialization. To fix this, ensure consistent GPU memory allocation or isolate vLLM in its own con...",
        "another engine disturbed it: set engine_kwargs.kv_cache_memory_bytes, or use --max-workers 1",
        id="vllm/v1/worker/gpu_worker.py",
    ),
    pytest.param(
        "from_source_gpu-not-free",
        "ValueError: Free memory on device cuda:0 (10.5/79.1 GiB) on startup is less than desired GPU memory utilization (0.45, 35.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "lower num_gpus or gpu_memory_utilization, or stop what else runs on that GPU (see nvidia-smi)",
        id="vllm/v1/worker/utils.py",
    ),
    pytest.param(
        "from_source_no-driver",
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from http://www.nvidia.com/Download/index.aspx",
        "the node has no GPU that vLLM can use: see nvidia-smi, or set num_gpus: 0 for the CPU engine",
        id="torch/cuda",
    ),
    pytest.param(
        "from_source_port-taken",
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
        "",
        id="torch's TCPStore",
    ),
    pytest.param(
        "from_source_http-port-taken",
        "RuntimeError: Failed to bind to address '0.0.0.0:8000'.",
        "port 8000 is taken (ss -ltnp tells by what): stop that, or set another http_options.port",
        id="ray/serve/_private/http_util.py",
    ),
    pytest.param(
        "from_source_node-memory",
        "OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.1, ID: 0123456789abcdef) was 61.20GB used / 62.80GB limit (0.974522)",
        "the node ran out of main memory: fewer replicas on it, or a ray_actor_options.memory",
        id="the raylet",
    ),
    pytest.param(
        "from_source_gated",
        "You are trying to access a gated repo. Make sure to have access to it at https://huggingface.co/tiiuae/private-model. 403 Client Error. (Request ID: Root=1-23) Cannot access gated repo for url https://huggingface.co/tiiuae/private-model/resolve/main/config.json. Access to model tiiuae/private-mod...",
        "the model is gated: accept its licence, and set HF_TOKEN in runtime_env.env_vars",
        id="huggingface_hub: not in the list",
    ),
    pytest.param(
        "from_source_gated-no-token",
        "You are trying to access a gated repo. Make sure to have access to it at https://huggingface.co/tiiuae/private-model. 401 Client Error. (Request ID: Root=1-23) Cannot access gated repo for url https://huggingface.co/tiiuae/private-model/resolve/main/config.json.",
        "the model is gated: accept its licence, and set HF_TOKEN in runtime_env.env_vars",
        id="huggingface_hub: no token",
    ),
    pytest.param(
        "from_source_not-on-the-hub",
        "401 Client Error. (Request ID: Root=1-23) Repository Not Found for url: https://huggingface.co/tiiuae/private-model/resolve/main/config.json. Please make sure you specified the correct `repo_id` and `repo_type`. If you are trying to access a private or gated repo, make sure you are authenticated ...",
        "no such model, or a private one: check model_source, or set HF_TOKEN in runtime_env.env_vars",
        id="huggingface_hub: not there, or private",
    ),
    pytest.param(
        "from_source_no-network",
        "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files. Check your internet connection or see how to run the library in offline mode at 'https://huggingface.co/docs/transformers/installation#offline-mode'.",
        "not on the node, which can't reach Hugging Face (or HF_HUB_OFFLINE is set): check model_source",
        id="transformers/utils/hub.py",
    ),
]


@pytest.mark.parametrize(("name", "text", "hint"), WHAT_THE_SOURCES_SAY)
def test_what_the_sources_say(name: str, text: str, hint: str) -> None:
    assert recorded(name) == (text, hint)


def test_every_recorded_file_has_its_row() -> None:
    files = {file.name.split(".")[0] for file in RECORDED.glob("*.txt")}
    rows = {row.values[0] for row in WHAT_WAS_RECORDED + WHAT_THE_SOURCES_SAY}
    assert files == rows | {"start"}


@pytest.mark.parametrize(
    ("file", "words"),
    [
        pytest.param(
            "vllm/v1/core/kv_cache_utils.py", "larger than the available KV cache", id="KV"
        ),
        pytest.param(
            "vllm/v1/core/kv_cache_utils.py", "estimated maximum model length is", id="fits"
        ),
        pytest.param(
            "vllm/v1/core/kv_cache_utils.py", "No available memory for the cache blocks", id="none"
        ),
        pytest.param("vllm/v1/worker/gpu_worker.py", "Error in memory profiling", id="race"),
        pytest.param("vllm/v1/worker/utils.py", "Free memory on device ", id="GPU memory"),
        pytest.param("vllm/v1/worker/cpu_worker.py", "Available memory on node ", id="main memory"),
        pytest.param(
            "vllm/v1/executor/multiproc_executor.py", "Worker failed with error '", id="worker"
        ),
        pytest.param("vllm/v1/engine/utils.py", "Engine core initialization failed", id="wrapper"),
        pytest.param(
            "vllm/model_executor/models/registry.py", "are not supported for now", id="model"
        ),
        pytest.param("vllm/config/device.py", "Failed to infer device type", id="no GPU"),
        pytest.param("vllm/config/model.py", "than the derived max_model_len", id="max_model_len"),
        pytest.param(
            "vllm/v1/executor/ray_executor_v2.py", "does not support ray", id="no GPU for Ray"
        ),
        pytest.param("ray/util/placement_group.py", " cannot fit into any bundles", id="bundles"),
        pytest.param("ray/serve/_private/http_util.py", "Failed to bind to address", id="port"),
        pytest.param("transformers/utils/hub.py", "We couldn't connect to", id="network"),
        pytest.param(
            "huggingface_hub/utils/_http.py", "Repository Not Found for url", id="repository"
        ),
        pytest.param("huggingface_hub/utils/_http.py", "Cannot access gated repo", id="gated"),
        pytest.param(
            "huggingface_hub/utils/_validators.py", "Repo id must be in the form", id="path"
        ),
        pytest.param(
            "ray/llm/_internal/serve/engines/vllm/vllm_engine.py",
            "Failed to create vLLM engine config",
            id="config",
        ),
        pytest.param(
            "ray/_private/runtime_env/utils.py", "failed with the following details", id="pip"
        ),
        pytest.param("huggingface_hub/_snapshot_download.py", "Fetching {", id="downloading"),
        pytest.param("vllm/v1/worker/gpu_model_runner.py", "Starting to load model", id="loading"),
        pytest.param("vllm/compilation/monitor.py", "torch.compile took", id="compiling"),
        pytest.param("vllm/v1/worker/gpu_model_runner.py", "Capturing CUDA graphs", id="graphs"),
    ],
)
def test_the_installed_libraries_still_say_so(file: str, words: str) -> None:
    """A new version that words it differently shows here, not at night."""
    package, _, path = file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    assert words in (Path(spec.submodule_search_locations[0]) / path).read_text()


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
            [
                "(EngineCore pid=1) ERROR 11-23 10:00:00 [core.py:1] Traceback (most recent call last):\n"
                "(EngineCore pid=1) ERROR 11-23 10:00:00 [core.py:1] ValueError: first\n" * 3
            ],
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
            "RuntimeError: Engine core initialization failed. See root cause above.",
            ["ValueError: now\n", "ModuleNotFoundError: No module named 'before'\n"],
            "ValueError: now",
            id="the latest replica counts, whatever an earlier one met",
        ),
        pytest.param(
            "RuntimeError: Engine core initialization failed. See root cause above.",
            ["ActorDiedError: The actor is dead because it was killed by `ray.kill`.\n"],
            "RuntimeError: Engine core initialization failed. See root cause above.",
            id="no log says more",
        ),
        pytest.param(
            'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    g()\nmine.Broken: no\n',
            [],
            "mine.Broken: no",
            id="an exception of any name, below a stack",
        ),
        pytest.param(
            'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    assert no\nAssertionError\n',
            [],
            "AssertionError",
            id="an exception without words",
        ),
        pytest.param(
            "ValueError: in\ntwo lines\nThe deployment failed to start 3 times in a row.",
            [],
            "ValueError: in two lines",
            id="an exception's further lines",
        ),
        pytest.param(
            "RuntimeError: Engine core initialization failed. See root cause above.",
            [
                "(EngineCore pid=1) ray.exceptions.ActorDiedError: The actor died unexpectedly before "
                "finishing this task.\n"
                "(EngineCore pid=1) \tclass_name: RayWorkerProc\n"
                "(EngineCore pid=1) The actor is dead because its worker process has died. Worker exit "
                "type: SYSTEM_ERROR Worker exit detail: Worker exits with an exit code 6. Some common "
                "causes include: (1) many.\n"
            ],
            "Worker exits with an exit code 6.",
            id="a worker of the engine died",
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
            "deployment_config\n  Value error, Invalid deployment config [type=value_error, input_value={}]\n    For further information visit https://x\n",
            [],
            "ValidationError: 1 validation error for LLMConfig "
            "deployment_config Value error, Invalid deployment config",
            id="a pydantic model",
        ),
        pytest.param(
            "ray::Builder.build() (pid=1)\n"
            '  File "/app/x.py", line 9, in build\n    import_attr(path)\n'
            '  File "/app/mine.py", line 3\n    x ==== 1\n         ^\nSyntaxError: invalid syntax\n',
            [],
            'SyntaxError: invalid syntax ("/app/mine.py", line 3)',
            id="a file that can't be parsed, with its place",
        ),
        pytest.param(
            "GET http://localhost:8000/x/v1/models: 500 no",
            [],
            "GET http://localhost:8000/x/v1/models: 500 no",
            id="what an application answers",
        ),
    ],
)
def test_the_first_real_exception_is_found(message: str, logs: list[str], text: str) -> None:
    assert app.root_cause(message, logs)[0] == text


@pytest.mark.parametrize(
    ("lines", "phase"),
    [
        pytest.param(30, "", id="imports"),
        pytest.param(31, "loading weights", id="loading"),
        pytest.param(None, "loading weights", id="to the end"),
    ],
)
def test_the_phases_of_a_recorded_start(lines: int | None, phase: str) -> None:
    log = (RECORDED / "start.log.txt").read_text().splitlines()[:lines]
    assert app.engine_phase("\n".join(log)) == phase


@pytest.mark.parametrize(
    ("log", "phase"),
    [
        pytest.param("", "", id="nothing yet"),
        pytest.param("WARNING Enforce eager set, disabling torch.compile\n", "", id="no phase yet"),
        pytest.param("INFO Dynamo bytecode transform time: 2.1 s\n", "compiling", id="compile"),
        pytest.param("Capturing CUDA graphs (mixed): 10%\n", "warming up", id="graphs"),
        pytest.param(
            "Capturing CUDA graphs (mixed): 10%\nINFO Loading weights took 1 s\n",
            "warming up",
            id="stderr ends with an earlier phase",
        ),
    ],
)
def test_the_phase_of_an_engine_on_a_gpu(log: str, phase: str) -> None:
    assert app.engine_phase(f"INFO Starting to load model /m...\n{log}" if phase else log) == phase
