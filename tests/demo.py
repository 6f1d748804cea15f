"""Deploys two tiny real models with app_v5.py on a Ray head of its own, and asks each something.

Exit code 0 only if both answered and `ray status` shows exactly the GPUs that the config declares.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from cluster import (
    APP_V5,
    HOST,
    PYTHON,
    ROOT,
    TESTS,
    ClusterError,
    RayHead,
    chat,
    free_port,
    is_free,
    wait_until,
)
from tiny_models import make_falcon_h1, make_llama

RAY_PORT = 6379
DASHBOARD_PORT = 8265
HTTP_PORT = 8000
GPUS_IN_ALL = 0.9
APP_TIMEOUT_S = 900
STATUS_TIMEOUT_S = 30.0  # `ray status` is the autoscaler's report, a few seconds old

CONFIG = """\
# multi_model_config.yaml with two tiny models, on logical GPUs.
http_options:
  host: {host}
  port: {port}

applications:
  - name: falcon3-1b-instruct-app
    import_path: ray.serve.llm:build_openai_app
    route_prefix: /falcon3-1b
    args:
      llm_configs:
        - model_loading_config:
            model_id: falcon3-1b-instruct
            model_source: {falcon3}
          deployment_config:
            num_cpus: 1
            num_gpus: 0.45
            autoscaling_config:
              min_replicas: 1
              max_replicas: 3
              target_ongoing_requests: 85
          engine_kwargs: &engine
            max_model_len: 128
            enforce_eager: true
            dtype: bfloat16

  - name: falcon-h1-0.5b-instruct-app
    import_path: ray.serve.llm:build_openai_app
    route_prefix: /falcon-h1-0.5b
    args:
      llm_configs:
        - model_loading_config:
            model_id: falcon-h1-0.5b-instruct
            model_source: {falcon_h1}
          deployment_config:
            num_cpus: 1
            num_gpus: 0.45
            autoscaling_config:
              min_replicas: 1
              max_replicas: 5
              target_ongoing_requests: 85
          engine_kwargs: *engine
"""

MODELS = {
    "falcon3-1b-instruct": "/falcon3-1b",
    "falcon-h1-0.5b-instruct": "/falcon-h1-0.5b",
}


def write_config(path: Path, http_port: int) -> Path:
    """Make the two models, once, and write the config that deploys them."""
    models = TESTS / ".tmp" / "models"
    path.write_text(
        CONFIG.format(
            host=HOST,
            port=http_port,
            falcon3=f'"{make_llama(models / "falcon3")}"',
            falcon_h1=f'"{make_falcon_h1(models / "falcon-h1")}"',
        ),
        encoding="utf-8",
    )
    return path


def port_or_other(port: int, what: str) -> int:
    """The usual port, or another one when it is taken, which is said."""
    if is_free(port):
        return port
    other = free_port()
    print(f"   port {port} is taken: {what} is on {other}")
    return other


def gpu_line(status: str) -> str:
    """The line of `ray status` about GPUs."""
    return next((line.strip() for line in status.splitlines() if " GPU" in line), "no GPU line")


def reserved_gpus(line: str) -> float | None:
    """How many GPUs placement groups reserve, by that line."""
    found = re.search(r"used of ([\d.]+) reserved", line)
    return round(float(found[1]), 4) if found else None


def wait_for_gpu_line(head: RayHead) -> str:
    """The GPU line, as soon as it says what the config declares, or as it is in the end."""
    line = ""

    def as_declared() -> bool:
        nonlocal line
        line = gpu_line(head.ray_status())
        return reserved_gpus(line) == GPUS_IN_ALL

    with suppress(ClusterError):
        wait_until(as_declared, STATUS_TIMEOUT_S, "the declared GPUs")
    return line


def demonstrate(head: RayHead, http_port: int) -> bool:
    """Deploy, ask, look at the GPUs; return whether all of it was as it must be."""
    config = write_config(head.temp_dir / "demo_config.yaml", http_port)
    print(f"2. app_v5.py on {config}\n", flush=True)
    deployed = subprocess.run(
        [PYTHON, APP_V5, config],
        env=head.env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        timeout=APP_TIMEOUT_S,
        check=False,
    )
    if deployed.returncode:
        print(f"\napp_v5.py ended with exit code {deployed.returncode}")
        return False

    print("\n3. One chat answer from each model (random weights: expect no sense)")
    for model, route in MODELS.items():
        print(f"   {model}: {chat(f'http://{HOST}:{http_port}{route}', model)!r}", flush=True)

    line = wait_for_gpu_line(head)
    exact = reserved_gpus(line) == GPUS_IN_ALL
    print(f"\n4. `ray status`, expecting {GPUS_IN_ALL} GPU reserved in all\n   {line}")
    print("   exactly as declared" if exact else "   NOT what the config declares")
    return exact


def how_to_go_on(head: RayHead, http_port: int) -> str:
    """What `--keep` prints: how to reach what runs, and how to stop it."""
    model, route = next(iter(MODELS.items()))
    pid = head.nodes[0].pid
    leftovers = " ".join(map(str, head.leftovers()))
    return f"""
Left running. To reach it:
   export RAY_ADDRESS={head.address} RAY_DASHBOARD_ADDRESS={head.dashboard_url}
   {PYTHON} -m ray.scripts.scripts status
   curl http://{HOST}:{http_port}{route}/v1/chat/completions -H 'Content-Type: application/json' \\
     -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "hello"}}]}}'
To stop it:
   pkill -TERM -s {pid}; sleep 5; pkill -KILL -s {pid}; rm -rf {leftovers}"""


def run(keep: bool) -> bool:
    """Start a Ray head, demonstrate, and stop it, unless it is to be kept."""
    print("1. A Ray head with 16 logical CPUs and 2 logical GPUs", flush=True)
    head = RayHead(
        logical_gpus=True,
        port=port_or_other(RAY_PORT, "Ray"),
        dashboard_port=port_or_other(DASHBOARD_PORT, "the dashboard"),
    )
    http_port = port_or_other(HTTP_PORT, "Serve")
    with ExitStack() as at_the_end:
        at_the_end.callback(head.stop)
        head.start()
        print(f"   {head.address}, dashboard {head.dashboard_url}")
        well = demonstrate(head, http_port)
        if keep:
            print(how_to_go_on(head, http_port))
            at_the_end.pop_all()
    return well


def main() -> int:
    """Read the command line, and turn the outcome into an exit code."""
    parser = argparse.ArgumentParser(prog="tests/demo.sh", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave it running afterwards")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        well = run(options.keep)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ClusterError, OSError, subprocess.TimeoutExpired) as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        well = False
    print("\nDemo passed." if well else "\nDemo FAILED.")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
