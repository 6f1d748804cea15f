"""A private Ray cluster for tests: own ports, own directory, and nothing left afterwards."""

from __future__ import annotations

import contextlib
import http
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import psutil

TESTS: Final = Path(__file__).resolve().parent
ROOT: Final = TESTS.parent
APP_V5: Final = ROOT / "app_v5.py"

# The real path, where .venv is a link: Ray 2.60 does not start from a path with a space in it.
PYTHON: Final = str(Path(sys.prefix).resolve() / "bin" / "python")

HOST: Final = "127.0.0.1"
OWN_PORTS: Final = (20_000, 32_768)  # above those that Ray has by default
START_TIMEOUT_S: Final = 120.0
TERMINATE_TIMEOUT_S: Final = 5.0
STOP_TIMEOUT_S: Final = 120.0  # of dozens of replicas, on a busy machine
START_ATTEMPTS: Final = 3

# Variables of the caller that would lead Ray or Serve to another cluster, or change its behaviour.
FOREIGN_PREFIXES: Final = ("RAY_", "SERVE_", "VLLM_")
ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A token that this machine's user has for another cluster would lock the tests out.
    "RAY_AUTH_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Ray would start a worker for each logical CPU, 2 s of real CPU each, before any is needed.
    "RAY_prestart_worker_first_driver": "0",
}


class ClusterError(Exception):
    """The test cluster did not do what was asked; the message ends in Ray's own output."""


def free_port() -> int:
    """A TCP port that nothing listens on. Not one of those (from 32768 on) that Linux gives to
    whoever asks for any: a Ray process may have it before the test comes to use it."""
    while not is_free(port := random.randrange(*OWN_PORTS)):
        pass
    return port


def is_free(port: int) -> bool:
    """Whether a server could listen on this port, on this machine's every address."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
        return True


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Poll `condition` until it is true; `what` names it in the error when it never is."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.2)


def get_json(url: str, body: object = None, *, timeout_s: float = 30.0) -> Any:
    """GET `url`, or POST `body` to it as JSON, and return the decoded answer."""
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return json.load(response)


def chat(base_url: str, model: str, text: str = "Say hello.", *, timeout_s: float = 120.0) -> str:
    """Ask a deployed model one short question over its OpenAI route, and return what it says."""
    question = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        # Sampled, all random models say the same: nearly flat logits, and the engine's fixed seed.
        "temperature": 0,
    }
    answer = get_json(f"{base_url}/v1/chat/completions", question, timeout_s=timeout_s)
    said: str = answer["choices"][0]["message"]["content"]
    return said


class RayNode:
    """One `ray start --block` with its output in a file, in a Unix session of its own."""

    def __init__(self, arguments: list[str], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [PYTHON, "-m", "ray.scripts.scripts", "start", "--block", *arguments],
                env=env,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process that keeps this node running; SIGTERM stops the node."""
        return self.process.pid

    @property
    def output(self) -> str:
        """What `ray start` has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_started(self) -> None:
        """Return once `ray start` says that this node runs; raise with its output if it ends."""

        def started() -> bool:
            if self.process.poll() is not None:
                raise ClusterError(f"`ray start` ended with {self.process.returncode}")
            return "Ray runtime started" in self.output

        try:
            wait_until(started, START_TIMEOUT_S, "`ray start`")
        except ClusterError as error:
            raise ClusterError(f"{error}:\n{self.output}") from None

    def processes(self) -> list[psutil.Process]:
        """Every live process of this node: its descendants, and its session's orphans."""
        found: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            found = {process.pid: process for process in [root, *root.children(recursive=True)]}
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(process.pid) == self.pid:
                    found.setdefault(process.pid, process)
        return [process for process in found.values() if _is_alive(process)]

    def shared_memory(self) -> set[Path]:
        """The shared memory files that this node's processes have open now."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                found |= set(re.findall(r"/dev/shm/\S+$", maps, re.MULTILINE))
        return {Path(file) for file in found}

    def stop(self) -> None:
        """End this node, and check that no process of it is left."""
        # All at once: Ray's own way down takes half a minute when replicas run.
        mine = set(self.processes())
        for process in mine:
            _signal(process, signal.SIGTERM)
        psutil.wait_procs(mine, TERMINATE_TIMEOUT_S)
        self._kill({*mine, *self.processes()})

    def kill(self) -> None:
        """End this node with no warning, as a machine that loses its power."""
        self._kill(set(self.processes()))

    def _kill(self, processes: set[psutil.Process]) -> None:
        for process in processes:
            _signal(process, signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT_S)
        _, left = psutil.wait_procs(processes, STOP_TIMEOUT_S)
        if left:
            raise ClusterError(f"processes that do not end: {left}")


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        alive: bool = process.status() != psutil.STATUS_ZOMBIE
        return alive
    return False


class RayHead:
    """A Ray head (and more nodes, if asked) that shares nothing with other clusters of the machine.

    `logical_gpus` makes vLLM take Ray's logical GPUs for real ones (`tests/gpu_platform`).
    """

    def __init__(  # noqa: PLR0913 - these are `ray start`'s own options
        self,
        *,
        num_cpus: float = 16,
        num_gpus: float = 2,
        logical_gpus: bool = False,
        resources: Mapping[str, float] | None = None,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        dashboard_port: int | None = None,
        has_dashboard: bool = True,
    ) -> None:
        self.nodes: list[RayNode] = []
        self._shared_memory: set[Path] = set()
        # Ray's Unix sockets lie in here, and a socket's path has room for 107 characters.
        self.temp_dir = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
        self._base_env = _base_environment(logical_gpus, env or {})
        self._resources = _resource_arguments(num_cpus, num_gpus, resources)
        self._wanted_ports, self._has_dashboard = (port, dashboard_port), has_dashboard
        self.address = self.dashboard_url = ""

    @property
    def env(self) -> dict[str, str]:
        """The environment of a user who works with this cluster."""
        return {
            **self._base_env,
            "RAY_ADDRESS": self.address,
            "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
        }

    def start(self) -> None:
        """Start the head; a port that somebody takes at the last moment costs another attempt."""
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._start_once()
                return
            except ClusterError:
                for node in self.nodes:
                    node.stop()
                self.nodes.clear()
                if attempt == START_ATTEMPTS:
                    self.stop()
                    raise

    def _start_once(self) -> None:
        port, dashboard_port = (wanted or free_port() for wanted in self._wanted_ports)
        self.address = f"{HOST}:{port}"
        self.dashboard_url = f"http://{HOST}:{dashboard_port}"
        self._start_node(
            "--head",
            f"--port={port}",
            f"--dashboard-host={HOST}",
            f"--dashboard-port={dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self.temp_dir}",
            f"--include-dashboard={str(self._has_dashboard).lower()}",
            *self._resources,
        )
        if self._has_dashboard:
            what = f"the dashboard {self.dashboard_url}"
            wait_until(self._dashboard_answers, START_TIMEOUT_S, what)

    def _start_node(self, *arguments: str) -> RayNode:
        node = RayNode(
            [
                *arguments,
                f"--node-ip-address={HOST}",
                f"--dashboard-agent-listen-port={free_port()}",
                # 0: the system picks. Ray's fixed range would collide with other clusters here.
                "--min-worker-port=0",
                "--max-worker-port=0",
                "--disable-usage-stats",
            ],
            self._base_env,
            self.temp_dir / f"ray_start_{len(self.nodes)}.log",
        )
        self.nodes.append(node)
        node.wait_started()
        return node

    def add_node(
        self,
        *,
        num_cpus: float = 4,
        num_gpus: float = 0,
        resources: Mapping[str, float] | None = None,
    ) -> RayNode:
        """Add a node to the cluster, and return it when the cluster counts it."""
        before = self._alive_nodes()
        arguments = _resource_arguments(num_cpus, num_gpus, resources)
        node = self._start_node(f"--address={self.address}", *arguments)
        wait_until(lambda: self._alive_nodes() > before, START_TIMEOUT_S, "the node to join")
        return node

    def remove_node(self, node: RayNode) -> None:
        """Kill a node that was added, with no warning, and return once Ray noticed (30 s)."""
        before = self._alive_nodes()
        node.kill()
        self.nodes.remove(node)
        wait_until(lambda: self._alive_nodes() < before, START_TIMEOUT_S, "the node to be missed")

    def stop(self) -> None:
        """End every node, the last one first, and remove what they leave on the machine."""
        _, *shared_memory = self.leftovers()
        while self.nodes:
            self.nodes.pop().stop()
        for file in shared_memory:
            file.unlink(missing_ok=True)
        shutil.rmtree(self.temp_dir, ignore_errors=True)

    def leftovers(self) -> list[Path]:
        """What stays on disk when the processes are killed: the directory, then shared memory.

        An engine that is killed leaves some 0.4 GB in /dev/shm.
        """
        for node in self.nodes:
            self._shared_memory |= node.shared_memory()
        return [self.temp_dir, *sorted(self._shared_memory)]

    def __enter__(self) -> RayHead:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def ray_status(self) -> str:
        """What `ray status` prints."""
        return self.run("-m", "ray.scripts.scripts", "status", timeout_s=60).stdout

    def run(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments, as a user of this cluster; raise when it fails."""
        finished = run_python(*arguments, env=self.env, timeout_s=timeout_s)
        if finished.returncode:
            raise ClusterError(f"{arguments} ended with {finished.returncode}:\n{finished.stderr}")
        return finished

    def serve_details(self) -> dict[str, Any]:
        """Serve's own account of its applications, from the dashboard's REST interface."""
        details: dict[str, Any] = get_json(f"{self.dashboard_url}/api/serve/applications/")
        return details

    def shut_down_serve(self) -> None:
        """Remove Serve with all its applications, and return when its replicas are gone."""
        self.leftovers()  # notes the shared memory of the replicas that end now
        url = f"{self.dashboard_url}/api/serve/applications/"
        with urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=120):
            pass
        wait_until(self._serve_is_gone, STOP_TIMEOUT_S, "Serve's actors to end")

    def _serve_is_gone(self) -> bool:
        actors = get_json(f"{self.dashboard_url}/api/v0/actors?detail=true&limit=10000")
        return not any(
            actor["state"] != "DEAD" and actor["ray_namespace"] == "serve"
            for actor in actors["data"]["result"]["result"]
        )

    def _dashboard_answers(self) -> bool:
        try:
            self.serve_details()
        except urllib.error.HTTPError as error:
            return error.code == http.HTTPStatus.UNAUTHORIZED  # it wants a token
        except OSError:
            return False
        return True

    def _alive_nodes(self) -> int:
        nodes = get_json(f"{self.dashboard_url}/api/v0/nodes?limit=1000")
        return sum(node["state"] == "ALIVE" for node in nodes["data"]["result"]["result"])


class ScalingHead(RayHead):
    """A head of 4 CPUs with an autoscaler, which starts GPU nodes on this machine when one is
    asked for (Ray's fake node provider)."""

    def __init__(self, version: int) -> None:
        port = free_port()
        env = {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": str(version - 1),
        }
        if version == 2:
            env |= {
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_ID,
                "RAY_NODE_TYPE_NAME": FAKE_HEAD_TYPE,
            }
        super().__init__(num_cpus=4, num_gpus=0, port=port, env=env)
        config = self.temp_dir / "autoscaler.json"
        config.write_text(json.dumps(_autoscaler_config(f"{HOST}:{port}")))
        self._resources.append(f"--autoscaling-config={config}")


FAKE_HEAD_ID: Final = "f" * 51 + "00000"
FAKE_HEAD_TYPE: Final = "ray.head.default"  # as the provider has it


def _autoscaler_config(gcs_address: str) -> dict[str, Any]:
    """All keys are needed, the empty ones, too (ray/autoscaler/_private/util.py)."""
    empty: dict[str, Any] = {name: {} for name in ("docker", "auth", "file_mounts")}
    for kind in (
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
        "initialization_commands",
    ):
        empty[kind] = []
    for kind in ("", "head_", "worker_"):
        empty[f"{kind}setup_commands"] = []
    for kind in ("head", "worker"):
        empty[f"{kind}_start_ray_commands"] = []
    gpu_node = {"CPU": 4, "GPU": 1, "object_store_memory": 100_000_000}
    return {
        **empty,
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 60,
        "upscaling_speed": 1.0,
        "file_mounts_sync_continuously": False,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_ID,
            "gcs_address": gcs_address,
        },
        "head_node_type": FAKE_HEAD_TYPE,
        "available_node_types": {
            FAKE_HEAD_TYPE: {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0},
            "gpu_node": {
                "resources": gpu_node,
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
    }


def _base_environment(logical_gpus: bool, extra: Mapping[str, str]) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_PREFIXES)
    }
    path = [str(TESTS), *([str(TESTS / "gpu_platform")] if logical_gpus else [])]
    found = {**inherited, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path), **extra}
    return {name: value for name, value in found.items() if value}  # an empty one is not set


def _resource_arguments(
    num_cpus: float, num_gpus: float, resources: Mapping[str, float] | None
) -> list[str]:
    return [
        f"--num-cpus={num_cpus}",
        f"--num-gpus={num_gpus}",
        f"--resources={json.dumps(dict(resources or {}))}",
    ]


def run_python(
    *arguments: str, env: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run this Python from the project's root, with no stdin, and collect what it prints."""
    return subprocess.run(
        [PYTHON, *arguments],
        env=env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_app_v5(
    *arguments: str | Path, head: RayHead | None = None, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `python app_v5.py ARGUMENTS` as a user of `head` would (None: of no cluster at all)."""
    env = head.env if head else _base_environment(logical_gpus=False, extra={})
    return run_python(str(APP_V5), *map(str, arguments), env=env, timeout_s=timeout_s)
