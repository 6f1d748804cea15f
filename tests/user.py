"""A user of app_v5.py in the tests: writes configs, runs the program, asks the applications."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import APP_V5, PYTHON, RayHead, free_port, get_json, run_app_v5

Config = dict[str, Any]

on_request = pytest.mark.skipif(
    not os.environ.get("FAULTS"), reason="takes long: FAULTS=1 runs it, as CI does"
)


def app(name: str, builder: str = "good", **keys: Any) -> Config:
    """One application of fixture_apps, under its own route."""
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": f"fixture_apps:{builder}",
        **keys,
    }


class User:
    """Writes configs and runs app_v5.py on them."""

    def __init__(self, head: RayHead, path: Path, port: int) -> None:
        self.head, self.path, self.port = head, path, port
        self.started: list[subprocess.Popen[str]] = []

    def write(self, *applications: Config, name: str = "config.yaml", **top: Any) -> Path:
        http_options = {"host": "127.0.0.1", "port": self.port}
        document = {"http_options": http_options, **top, "applications": applications}
        file = self.path / name
        file.write_text(json.dumps(document))
        return file

    def run(
        self, *arguments: str, config: Path, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        return run_app_v5(config, *arguments, head=self.head, timeout_s=timeout_s)

    def start(self, config: Path, *arguments: str) -> subprocess.Popen[str]:
        """The program in the background, in a process group of its own."""
        process = subprocess.Popen(
            # Under `nohup`, or behind a shell's `&`, the program would ignore these.
            ["env", "--default-signal=HUP,INT", PYTHON, str(APP_V5), str(config), *arguments],
            env=self.head.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def deploy(self, *applications: Config, **top: Any) -> subprocess.CompletedProcess[str]:
        return self.run(config=self.write(*applications, **top))

    def get(self, route: str) -> Any:
        return get_json(f"{self.base_url}{route}")

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(head: RayHead, path: Path) -> Iterator[User]:
    """A user of one Serve that lasts for all tests of a file, as starting one costs ten seconds.

    What a test leaves there stays, and the next one deploys over it, as in a user's life.
    """
    user = User(head, path, free_port())
    try:
        yield user
    finally:
        for process in user.started:
            with process:
                process.kill()  # it has ended, unless its test has failed
        head.shut_down_serve()


def serve_deploy(head: RayHead, config: Path) -> None:
    """`serve deploy`, which returns before anything runs."""
    head.run("-m", "ray.serve.scripts", "deploy", str(config), "-a", head.dashboard_url)


def about(name: str, summary: str) -> str:
    """The lines of a summary that are about one application."""
    found = re.search(rf"^• {re.escape(name)}\b.*?(?=^\s*$)", summary, re.MULTILINE | re.DOTALL)
    assert found, summary
    return found[0]


def get_text(user: User, route: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{user.port}{route}") as answer:
        text: str = answer.read().decode()
        return text
