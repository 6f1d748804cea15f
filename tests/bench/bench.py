"""Whole commands side by side, in one run, alternating: see run.sh, and docs/BENCHMARKS.md."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster import APP_V5, PYTHON, RayHead, chat, free_port, run_app_v5, wait_until
from tiny_models import make_falcon_h1, make_llama
from user import User, app, serve_deploy

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FIGURES = DOCS / "benchmarks.json"
OURS, DEPLOY = "app_v5.py", "serve deploy"
ENGINE = {"max_model_len": 128, "enforce_eager": True, "dtype": "bfloat16"}

Side = Callable[[], float]
Measured = dict[str, list[float]]


@dataclass
class Bench:
    """One cluster, on which Serve starts anew for every measurement."""

    head: RayHead
    user: User

    def fresh(self) -> None:
        self.head.shut_down_serve()

    def ours(self, config: Path, *arguments: str) -> float:
        """Seconds until `app_v5.py` ends, with its checks; it must end with 0."""
        started = time.monotonic()
        done = run_app_v5(config, *arguments, head=self.head, timeout_s=1200)
        if done.returncode:
            raise RuntimeError(
                f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
            )
        return time.monotonic() - started

    def deploy(self, config: Path) -> float:
        """Seconds until all that `serve deploy` has accepted is RUNNING."""
        wanted = len(yaml.safe_load(config.read_text())["applications"])
        started = time.monotonic()
        serve_deploy(self.head, config)

        def all_run() -> bool:
            try:
                rows = self.head.serve_details()["applications"].values()
            except OSError:  # with a hundred of them the dashboard may not answer for a while
                return False
            if failed := [row["message"] for row in rows if row["status"] == "DEPLOY_FAILED"]:
                raise RuntimeError(failed[0])
            return [row["status"] for row in rows] == ["RUNNING"] * wanted

        wait_until(all_run, 1200, "all applications to run")
        return time.monotonic() - started

    def plain(self, config: Path) -> Path:
        """The same for `serve deploy`, which takes no short keys."""
        exported = run_app_v5(config, "--export", "serve", head=self.head)
        file = config.with_suffix(".plain.yaml")
        file.write_text(exported.stdout)
        return file

    def sides(self, rounds: int, sides: dict[str, Side]) -> Measured:
        """Each side once a round, each on a Serve of its own."""
        found: Measured = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                self.fresh()
                found[name].append(side())
                print(f"   {name}: {found[name][-1]:.1f}", flush=True)
        return found


def slow8(bench: Bench) -> Measured:
    """8 applications with a constructor of 20 s, default options: seconds"""
    eight = bench.user.write(*(slow(n, 20) for n in range(8)))
    one = bench.user.write(slow(0, 20), name="one.yaml")
    found = bench.sides(
        2,
        {
            "one application alone": lambda: bench.ours(one),
            OURS: lambda: bench.ours(eight),
            DEPLOY: lambda: bench.deploy(eight),
            "8 plain Ray actors that import Serve": lambda: floor(bench, 8),
        },
    )
    return found | bench.sides(
        1, {"--max-workers 1 (V4)": lambda: bench.ours(eight, "--max-workers", "1")}
    )


def slow(number: int, seconds: float) -> dict[str, Any]:
    return app(f"slow-{number}", "slow", args={"seconds": seconds})


def light(count: int, rounds: int) -> Callable[[Bench], Measured]:
    def measure(bench: Bench) -> Measured:
        config = bench.user.write(*(app(f"light-{n}") for n in range(count)))
        one = bench.user.write(app("light-0"), name="one.yaml")
        return bench.sides(
            rounds,
            {
                "one application alone": lambda: bench.ours(one),
                OURS: lambda: bench.ours(config),
                DEPLOY: lambda: bench.deploy(config),
                f"{count} plain Ray actors that import Serve": lambda: floor(bench, count),
            },
        )

    measure.__doc__ = f"{count} light applications: seconds"
    return measure


FLOOR = """
import sys, ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=0.1)
class Plain:
    def __init__(self): import ray.serve
    def ready(self): return True
actors = [Plain.remote() for _ in range(int(sys.argv[1]))]
ray.get([actor.ready.remote() for actor in actors])
"""


def floor(bench: Bench, count: int) -> float:
    return timed(bench, FLOOR, str(count))


def timed(bench: Bench, script: str, argument: str) -> float:
    """Seconds that a script takes on the cluster."""
    started = time.monotonic()
    bench.head.run("-c", script, argument, timeout_s=600)
    return time.monotonic() - started


ENGINES_ALONE = "the engines and ingresses in plain Ray actors"
ENGINES_FLOOR = """
import sys, ray, yaml
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
ray.init(log_to_driver=False)
@ray.remote(num_cpus=0)
class Server:  # what an LLM's replica does, without Serve: its engine, and an answer of that
    async def __init__(self, config):
        from ray.llm._internal.serve.core.server.llm_server import LLMServer
        from ray.serve.llm import LLMConfig
        self.server = LLMServer.sync_init(LLMConfig(**config))
        await self.server.start()
    async def answer(self, model):
        from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest
        messages = [{"role": "user", "content": "Hello"}]
        request = ChatCompletionRequest(model=model, max_tokens=8, messages=messages)
        async for part in await self.server.chat(request):
            return part.choices[0].message.content
@ray.remote(num_cpus=0)
class Ingress:
    def __init__(self): import ray.serve.llm
    def ready(self): return True
rows = yaml.safe_load(open(sys.argv[1]))["applications"]
waiting = []
for config in (row["args"]["llm_configs"][0] for row in rows):
    group = PlacementGroupSchedulingStrategy(
        placement_group([{"CPU": 1}]), placement_group_capture_child_tasks=True
    )
    server = Server.options(scheduling_strategy=group).remote(config)
    waiting += [server.answer.remote(config["model_loading_config"]["model_id"])]
    waiting += [Ingress.remote().ready.remote()]
assert all(ray.get(waiting))
"""


def llm(name: str, model: Path, **deployment: Any) -> dict[str, Any]:
    loading = {"model_id": name, "model_source": str(model)}
    deployment = {"num_cpus": 1, "num_gpus": 0, **deployment}
    config = {"model_loading_config": loading, "deployment_config": deployment}
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [{**config, "engine_kwargs": ENGINE}]},
    }


def models(path: Path) -> list[Path]:
    return [make_llama(path / "falcon3"), make_falcon_h1(path / "falcon-h1")]


def engines(count: int, rounds: int) -> Callable[[Bench], Measured]:
    def measure(bench: Bench) -> Measured:
        tiny = itertools.cycle(models(bench.user.path))
        rows = [llm(f"m{n}", model) for n, model in zip(range(count), tiny, strict=False)]
        config = bench.user.write(*rows)
        plain = bench.plain(config)

        def deploy_and_ask() -> float:
            started = time.monotonic()
            bench.deploy(plain)
            for row in rows:
                chat(f"{bench.user.base_url}/{row['name']}", row["name"])
            return time.monotonic() - started

        return bench.sides(
            rounds,
            {
                OURS: lambda: bench.ours(config),
                DEPLOY: deploy_and_ask,
                ENGINES_ALONE: lambda: timed(bench, ENGINES_FLOOR, str(plain)),
            },
        )

    measure.__doc__ = f"{count} tiny models on the real engine, until each has answered: seconds"
    return measure


def edit(bench: Bench) -> Measured:
    """An edit of an LLM's max_replicas, until it holds: seconds"""
    model = models(bench.user.path)[0]
    files = []
    for most in (2, 3):
        scaling = {"min_replicas": 1, "max_replicas": most}
        row = llm("m0", model, autoscaling_config=scaling)
        files.append(bench.user.write(row, name=f"max{most}.yaml"))

    def holds() -> bool:
        [row] = bench.head.serve_details()["applications"].values()
        mine = [d for name, d in row["deployments"].items() if name.startswith("LLMServer")]
        scalings = [deployment["deployment_config"]["autoscaling_config"] for deployment in mine]
        return row["status"] == "RUNNING" and [s["max_replicas"] for s in scalings] == [3]

    def ours() -> float:
        bench.ours(files[0])
        seconds = bench.ours(files[1])
        assert holds()
        return seconds

    plain = [bench.plain(file) for file in files]

    def deploy() -> float:
        bench.deploy(plain[0])
        started = time.monotonic()
        serve_deploy(bench.head, plain[1])
        time.sleep(1)  # Serve shows what was there before, at first
        wait_until(holds, 600, "the edit to hold")
        return time.monotonic() - started

    return bench.sides(1, {OURS: ours, DEPLOY: deploy})


def rerun(count: int) -> Callable[[Bench], Measured]:
    def measure(bench: Bench) -> Measured:
        config = bench.user.write(*(app(f"light-{n}") for n in range(count)))
        found: Measured = {}
        sides: dict[str, Side] = {
            OURS: lambda: bench.ours(config),
            DEPLOY: lambda: bench.deploy(config),
        }
        for name, side in sides.items():
            bench.fresh()
            side()
            found[name] = [side() for _ in range(3)]
        return found

    measure.__doc__ = f"An unchanged run of {count} applications: seconds"
    return measure


def refused(bench: Bench) -> Measured:
    """A wrong config, until the message: seconds"""
    key = bench.user.write({**app("a"), "rout_prefix": "/x"}, name="key.yaml")
    wrong = {**app("a"), "deployments": [{"name": "Good", "num_replicas": -1}]}
    value = bench.user.write(wrong, name="value.yaml")

    def message(*command: str) -> float:
        started = time.monotonic()
        done = subprocess.run(
            [PYTHON, *command], env=bench.head.env, capture_output=True, check=False
        )
        assert done.returncode, command
        return time.monotonic() - started

    found: Measured = {}
    for name, file in (("key", key), ("value", value)):
        found[f"{OURS}, a wrong {name}"] = [message(str(APP_V5), str(file)) for _ in range(5)]
    arguments = ["-m", "ray.serve.scripts", "deploy", str(value), "-a", bench.head.dashboard_url]
    found[f"{DEPLOY}, a wrong value"] = [message(*arguments) for _ in range(5)]
    return found


def start(bench: Bench) -> Measured:
    """--help, and --plan of two LLMs: seconds"""
    config = bench.user.write(
        *(llm(f"m{n}", model) for n, model in enumerate(models(bench.user.path)))
    )

    def run(*command: str) -> float:
        started = time.monotonic()
        subprocess.run([PYTHON, *command], env=bench.head.env, capture_output=True, check=True)
        return time.monotonic() - started

    sides: dict[str, Side] = {
        "--help": lambda: run(str(APP_V5), "--help"),
        "--plan": lambda: run(str(APP_V5), "--plan", str(config)),
        "the import of Ray's LLM builder": lambda: run("-c", "import ray.serve.llm"),
    }
    return {name: [side() for _ in range(3)] for name, side in sides.items()}


def watching(bench: Bench) -> Measured:
    """8 applications load for 60 s: % of one core, and MiB, of who watches"""
    config = bench.user.write(*(slow(n, 60) for n in range(8)))
    bench.fresh()
    process = bench.user.start(config)
    watched = psutil.Process(process.pid)
    time.sleep(30)  # connected, built and submitted: from here on it only waits
    before, began = sum(watched.cpu_times()[:2]), time.monotonic()
    time.sleep(30)
    share = (sum(watched.cpu_times()[:2]) - before) / (time.monotonic() - began)
    memory = watched.memory_info().rss / 2**20
    process.communicate()
    began, spent = time.monotonic(), os.times()
    while time.monotonic() - began < 20:
        bench.head.run("-m", "ray.serve.scripts", "status", "-a", bench.head.dashboard_url)
        time.sleep(1)
    now = os.times()
    used = now.children_user + now.children_system - spent.children_user - spent.children_system
    return {
        f"{OURS}, CPU %": [100 * share],
        "a loop of `serve status`, CPU %": [100 * used / (time.monotonic() - began)],
        f"{OURS}, memory": [memory],
    }


PARTS: dict[str, Callable[[Bench], Measured]] = {
    "slow8": slow8,
    "light10": light(10, 2),
    "light30": light(30, 1),
    "light100": light(100, 1),
    "engines2": engines(2, 3),
    "engines4": engines(4, 3),
    "edit": edit,
    "rerun10": rerun(10),
    "rerun100": rerun(100),
    "refused": refused,
    "start": start,
    "watching": watching,
}


@contextmanager
def on_a_cluster() -> Iterator[Bench]:
    with RayHead(num_cpus=16, num_gpus=2) as head, tempfile.TemporaryDirectory() as folder:
        # Serve is shut down before each measurement, and has to be there for that.
        user = User(head, Path(folder), free_port())
        yield Bench(head, user)


def summary(values: Sequence[float]) -> dict[str, float]:
    middle = statistics.median(values)
    rounded = (round(value, 2) for value in (middle, min(values), max(values)))
    return dict(zip(("median", "least", "most"), rounded, strict=True)) | {"rounds": len(values)}


WIDTH, ROW = 720, 34


def plot(title: str, sides: dict[str, dict[str, float]]) -> str:
    """Bars as an SVG that is legible on light and on dark pages."""
    most = max(side["most"] for side in sides.values()) or 1
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {ROW * len(sides) + 40}" '
        'font-family="sans-serif" font-size="14">',
        "<style>text{fill:#24292f}.bar{fill:#8c959f}.ours{fill:#0969da}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.ours{fill:#58a6ff}}</style>",
        f'<text x="0" y="18" font-weight="bold">{title}</text>',
    ]
    for number, (name, side) in enumerate(sides.items()):
        y, width = 34 + ROW * number, 330 * side["median"] / most
        kind = "bar ours" if name.startswith(OURS) else "bar"
        lines += [
            f'<text x="0" y="{y + 17}">{name}</text>',
            f'<rect class="{kind}" x="310" y="{y}" width="{width:.1f}" height="22" rx="3"/>',
            f'<text x="{318 + width:.1f}" y="{y + 17}">{side["median"]:g}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def growth(figures: dict[str, Any], count: int) -> list[str]:
    """What each further application cost since the smaller number of them that was measured."""
    counts = sorted(int(part.removeprefix("light")) for part in figures if part[:5] == "light")
    if not (less := max((other for other in counts if other < count), default=0)):
        return []

    def medians(number: int) -> dict[str, float]:
        sides = figures[f"light{number}"]["sides"].items()
        return {name.removeprefix(f"{number} "): side["median"] for name, side in sides}

    before, after = medians(less), medians(count)
    costs = {name: (after[name] - before[name]) / (count - less) for name in after}
    del costs["one application alone"]
    each = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in costs.items())
    return [f"\nEach application from the {less}th to the {count}th: {each}."]


def write_page(figures: dict[str, Any]) -> None:
    """The tables of docs/BENCHMARKS.md behind its head, which people write, and the plots."""
    page = DOCS / "BENCHMARKS.md"
    head, _, _ = page.read_text(encoding="utf-8").partition("<!-- figures -->")
    lines = [head + "<!-- figures -->"]
    for part, found in figures.items():
        title, sides = found["title"], found["sides"]
        (DOCS / f"bench-{part}.svg").write_text(plot(title, sides), encoding="utf-8")
        lines += [f"\n## {title}\n", f"`bash tests/bench/run.sh {part}`, {found['date']}\n"]
        lines += [f"![{title}](bench-{part}.svg)\n", "| side | median | least–most | rounds |"]
        lines += ["|---|---|---|---|"]
        for name, side in sides.items():
            spread = f"{side['least']:g}–{side['most']:g}"
            lines.append(f"| {name} | {side['median']:g} | {spread} | {side['rounds']} |")
        if part.startswith("light"):
            lines += growth(figures, int(part.removeprefix("light")))
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    if unknown := set(argv) - set(PARTS):
        print(f"there are the parts {', '.join(PARTS)}; not {', '.join(sorted(unknown))}")
        return 2
    figures: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for part in argv or PARTS:
        title = str(PARTS[part].__doc__)
        print(f"{part}: {title}", flush=True)
        with on_a_cluster() as bench:
            found = PARTS[part](bench)
        before = figures.get(part, {}).get("sides", {})
        sides = {name: summary(values) for name, values in found.items()}
        figures[part] = {"title": title, "date": time.strftime("%F"), "sides": sides}
        for name, side in sides.items():
            old = before.get(name, {}).get("median")
            change = f" ({100 * (side['median'] / old - 1):+.0f}% since last time)" if old else ""
            print(f"   = {name}: {side['median']}{change}", flush=True)
        ordered = {name: figures[name] for name in PARTS if name in figures}
        FIGURES.write_text(json.dumps(ordered, indent=1) + "\n")
        write_page(ordered)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
