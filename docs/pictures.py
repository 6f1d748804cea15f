"""The pictures of the READMEs, from real runs on the real engine: see pictures.sh."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from cluster import APP_V5, PYTHON, RayHead, free_port
from test_memory import REAL
from tiny_models import make_falcon_h1, make_llama

DOCS = Path(__file__).parent
COLUMNS = 118


def config(path: Path, port: int, *more: dict[str, Any]) -> Path:
    """multi_model_config.yaml with tiny models that this machine can run."""
    data = yaml.safe_load((DOCS.parent / "multi_model_config.yaml").read_text(encoding="utf-8"))
    sources = [make_llama(path / "falcon3"), make_falcon_h1(path / "falcon-h1")]
    for application, source in zip(data["applications"], sources, strict=True):
        [llm] = application["args"]["llm_configs"]
        llm["model_loading_config"]["model_source"] = str(source)
        llm["engine_kwargs"] = {"max_model_len": 128, "enforce_eager": True, "dtype": "bfloat16"}
    data["applications"] += more
    data["http_options"] = {"host": "127.0.0.1", "port": port}
    file = path / "models.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def real_size(path: Path) -> Path:
    """multi_model_config.yaml with the shapes of its models, without their weights."""
    data = yaml.safe_load((DOCS.parent / "multi_model_config.yaml").read_text(encoding="utf-8"))
    for application, (name, shape) in zip(data["applications"], REAL.items(), strict=True):
        folder = path / name
        folder.mkdir()
        whole = {**shape, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(whole))
        [llm] = application["args"]["llm_configs"]
        llm["model_loading_config"]["model_source"] = str(folder)
    file = path / "multi_model_config.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def on_a_terminal(head: RayHead, *arguments: str) -> list[str]:
    """What the program writes to a terminal: a snapshot at each moment when it redraws, and last
    all of it."""
    master, slave = pty.openpty()
    env = {**head.env, "COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [PYTHON, str(APP_V5), *arguments], env=env, stdout=slave, stderr=slave, stdin=slave
    )
    os.close(slave)
    written = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        written += part
    process.wait()
    return written.decode(errors="replace").replace("\r\n", "\n").split("\x1b[2K")


def picture(name: str, title: str, text: str) -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text.strip("\n")), soft_wrap=False)
    console.save_svg(str(DOCS / f"{name}.svg"), title=title)


def without_control(text: str) -> str:
    return re.sub(r"\x1b\[(?![\d;]*m)[\d;?]*[A-Za-z]|\r", "", text)


def report(parts: list[str]) -> str:
    """What stands behind the last live picture."""
    text = without_control("".join(parts[-1:]))
    return text[text.index("=" * 80) :]


def dashboard(head: RayHead) -> None:
    """The Serve page, in a real browser."""
    browser = shutil.which("chromium")
    if not browser:
        print("no chromium: no picture of the dashboard (apt install chromium)")
        return
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *("--no-first-run", "--disable-background-networking", "--hide-scrollbars"),
                *("--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"),
                *("--window-size=1280,1000", "--virtual-time-budget=20000"),
                f"--screenshot={DOCS / 'dashboard.png'}",
                f"{head.dashboard_url}/#/serve",
            ],
            check=True,
            timeout=120,
            capture_output=True,
        )


def main() -> None:
    broken = {
        "name": "no-such-model-app",
        "import_path": "ray.serve.llm:build_openai_app",
        "route_prefix": "/no-such-model",
        "args": {
            "llm_configs": [
                {
                    "model_loading_config": {"model_id": "no-such", "model_source": "/no/such"},
                    "deployment_config": {"num_cpus": 1, "num_gpus": 0.45},
                }
            ]
        },
    }
    # The size of the CPU engine's cache would stand in the plan as one that the user has fixed.
    unset = {"VLLM_CPU_KVCACHE_SPACE": ""}
    with RayHead(num_cpus=8, env=unset) as head, tempfile.TemporaryDirectory() as folder:
        real = real_size(Path(folder))
        plan = on_a_terminal(head, "--plan", "--gpu-memory", "80GiB", str(real))
        command = "python3 app_v5.py --plan --gpu-memory 80GiB multi_model_config.yaml"
        picture("plan", command, report(plan))
    with RayHead(logical_gpus=True) as head, tempfile.TemporaryDirectory() as folder:
        path, port = Path(folder), free_port()
        file = config(path, port)
        run = on_a_terminal(head, str(file))
        middle = [part for part in run if "starting replicas" in part]
        live = without_control(middle[len(middle) // 2])
        picture("live", "python3 app_v5.py models.yaml, while the engines start", live)
        picture("summary", "python3 app_v5.py models.yaml", report(run))
        time.sleep(5)
        dashboard(head)
        failed = on_a_terminal(head, str(config(path, port, broken)))
        text = report(failed)
        picture("failure", "one of three fails", text[text.index("❌ Not Running") :])


if __name__ == "__main__":
    main()
