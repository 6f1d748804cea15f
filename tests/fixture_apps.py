"""Applications without models, for the tests on a real Ray Serve; each needs a tenth of a CPU."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI, HTTPException, Request
from ray import serve
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter

LITTLE = {"num_cpus": 0.1}


@serve.deployment(ray_actor_options=LITTLE)
class Good:
    def __init__(self, text: str = "good") -> None:
        self.text = text

    def __call__(self, request: Any) -> dict[str, Any]:
        return {"text": self.text, "pid": os.getpid()}


@serve.deployment(ray_actor_options=LITTLE)
class Slow:
    def __init__(self, seconds: float, answers_after_s: float = 0) -> None:
        time.sleep(seconds)
        self.answers_after_s = answers_after_s

    async def __call__(self, request: Any) -> str:
        await asyncio.sleep(self.answers_after_s)
        return "slow"


@serve.deployment(ray_actor_options=LITTLE)
class Failing:
    def __init__(self) -> None:
        raise ZeroDivisionError("this constructor always fails")


@serve.deployment(ray_actor_options=LITTLE)
class Killed:
    def __init__(self) -> None:
        os._exit(9)


@serve.deployment(ray_actor_options=LITTLE)
class FailsWithout:
    """Fails as long as a file is not there."""

    def __init__(self, path: str) -> None:
        if not Path(path).exists():
            raise RuntimeError(f"{path} is not there yet")

    def __call__(self, request: Any) -> str:
        return "now it is"


@serve.deployment(ray_actor_options=LITTLE)
class Parent:
    def __init__(self, child: Any) -> None:
        self.child = child

    async def __call__(self, request: Any) -> Any:
        return await self.child.answer.remote()


@serve.deployment(ray_actor_options=LITTLE)
class Child:
    def __init__(self, text: str) -> None:
        self.text = text

    def answer(self) -> str:
        return self.text


@serve.deployment(ray_actor_options=LITTLE)
class Versioned:
    """Says which version answers, and by which process; "broken" does not come up."""

    def __init__(self, version: str, seconds: float) -> None:
        time.sleep(seconds)
        if version == "broken":
            raise ZeroDivisionError("this version never comes up")
        self.version = version
        self.config = ""

    def reconfigure(self, config: dict[str, Any]) -> None:
        self.config = config["text"]

    def __call__(self, request: Any) -> str:
        return f"{self.version} {self.config} {os.getpid()}"


api = FastAPI()


@serve.deployment
@serve.ingress(api)
class FakeModel:
    """Speaks as an OpenAI server does; `behaviour` says what is wrong with it, if anything.

    "disturbed" fails the first time, as an engine does that others disturb; `notes` is a folder
    where every start leaves a file with its beginning and its end.
    """

    def __init__(self, model_id: str, behaviour: str, notes: str) -> None:
        self.model_id, self.behaviour = model_id, behaviour
        if notes:
            began = time.time()
            starts = list(Path(notes).glob(f"{model_id}-*"))
            note = Path(notes) / f"{model_id}-{len(starts)}"
            note.touch()
            time.sleep(3)
            note.write_text(f"{began} {time.time()}")
            if behaviour == "disturbed" and not starts:
                raise AssertionError("Error in memory profiling. Initial free memory 1 GiB")

    @api.get("/v1/models")
    def models(self) -> dict[str, Any]:
        return {"data": [{"id": "other" if self.behaviour == "other list" else self.model_id}]}

    @api.post("/v1/chat/completions")
    def chat(self, request: Request) -> dict[str, Any]:
        if self.behaviour == "no chat":
            raise HTTPException(400, "the tokenizer has no chat template")
        return self.answer()

    @api.post("/v1/completions")
    def complete(self, request: Request) -> dict[str, Any]:
        return self.answer()

    def answer(self) -> dict[str, Any]:
        if self.behaviour == "500":
            raise HTTPException(500, "the engine is not well")
        if self.behaviour == "hangs":
            time.sleep(3600)
        model = "other" if self.behaviour == "other model" else self.model_id
        return {"model": model, "choices": []}


@serve.deployment(ray_actor_options=LITTLE)
class Broken:
    """Comes up, and answers 500 to everything."""

    def __call__(self, request: Any) -> str:
        raise ZeroDivisionError("every request fails")


@serve.deployment(ray_actor_options=LITTLE)
class Hoarder:
    """Starts an actor that holds more than its deployment says."""

    def __init__(self) -> None:
        self.holder = ray.remote(num_cpus=0.5)(Holder).remote()
        ray.get(self.holder.ready.remote())

    def __call__(self, request: Any) -> str:
        return "hoarder"


class Holder:
    def ready(self) -> None:
        pass


@ray.remote(num_cpus=0)
class Helper:
    """An actor beside a deployment's replicas."""


Router = type("Router", (PowerOfTwoChoicesRequestRouter,), {})


def one_replica(context: Any) -> tuple[int, dict[str, Any]]:
    """An autoscaling policy."""
    return 1, {}


bound = Good.bind("bound")


def good(args: dict[str, Any]) -> serve.Application:
    return Good.bind(args.get("text", "good"))


def builds_slowly(args: dict[str, Any]) -> serve.Application:
    time.sleep(float(args["seconds"]))
    return Good.bind()


def slow(args: dict[str, Any]) -> serve.Application:
    return Slow.bind(float(args["seconds"]), args.get("answers_after_s", 0))


def versioned(args: dict[str, Any]) -> serve.Application:
    return Versioned.bind(args["version"], float(args.get("seconds", 0)))


def fake_model(args: dict[str, Any]) -> serve.Application:
    """A builder of its own for `llm_configs`; with `hoards` it reserves a whole GPU."""
    [llm] = args["llm_configs"]
    model_id = llm["model_loading_config"]["model_id"]
    actor = dict(llm["deployment_config"]["ray_actor_options"])
    share = llm["placement_group_config"]["bundle_per_worker"]["GPU"]
    actor["num_gpus"] = 1 if args.get("hoards") else share
    deployment = FakeModel.options(name=f"LLMServer:{model_id}", ray_actor_options=actor)
    once = deployment.options(max_constructor_retry_count=1, graceful_shutdown_timeout_s=2)
    return once.bind(model_id, args.get("behaviour", ""), args.get("notes", ""))


def broken(args: dict[str, Any]) -> serve.Application:
    return Broken.bind()


def hoarder(args: dict[str, Any]) -> serve.Application:
    return Hoarder.bind()


def failing(args: dict[str, Any]) -> serve.Application:
    return Failing.bind()


def killed(args: dict[str, Any]) -> serve.Application:
    return Killed.bind()


def fails_without(args: dict[str, Any]) -> serve.Application:
    return FailsWithout.bind(args["path"])


def family(args: dict[str, Any]) -> serve.Application:
    return Parent.bind(Child.bind(args.get("text", "child")))


def raises(args: dict[str, Any]) -> serve.Application:
    raise LookupError("the builder found nothing")


def returns_nothing(args: dict[str, Any]) -> None:
    return None


def exits(args: dict[str, Any]) -> serve.Application:
    sys.exit(3)


def dies(args: dict[str, Any]) -> serve.Application:
    os._exit(7)


def hangs(args: dict[str, Any]) -> serve.Application:
    time.sleep(3600)
    return Good.bind()


@serve.deployment(ray_actor_options=LITTLE)
class Talker:
    """Prints a variable of its environment in several ways, and fails with it where told to."""

    def __init__(self, variable: str, fails: bool) -> None:
        value = os.environ[variable]
        for stream in (sys.stdout, sys.stderr):
            print(f"planted: {value}", repr(value), json.dumps(value), file=stream, flush=True)
        if fails:
            raise RuntimeError(f"can't log in with {value!r}")

    def __call__(self, request: Any) -> str:
        return "said"


@serve.deployment(ray_actor_options=LITTLE, num_replicas=2)
class OneAlone:
    """The first of its replicas runs, the others never come up."""

    def __init__(self, path: str) -> None:
        try:
            Path(path).mkdir()
        except FileExistsError:
            raise RuntimeError("one of us is enough") from None


@serve.deployment(ray_actor_options=LITTLE)
class Transient:
    """Comes up at the second try."""

    def __init__(self, path: str) -> None:
        if not Path(path).exists():
            Path(path).touch()
            raise RuntimeError("not at the first try")

    def __call__(self, request: Any) -> str:
        return "at the second try"


@serve.deployment(ray_actor_options=LITTLE, health_check_period_s=1, health_check_timeout_s=1)
class Ailing:
    """Is well for some seconds after the first of its replicas has come, and never again."""

    def __init__(self, path: str, seconds: float) -> None:
        if not Path(path).exists():
            Path(path).touch()
        self.until = Path(path).stat().st_mtime + seconds

    def check_health(self) -> None:
        if time.time() > self.until:
            raise RuntimeError("not well any more")

    def __call__(self, request: Any) -> str:
        return "ailing"


class Unpicklable(Exception):
    """Can be pickled, and not be loaded again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)
        self.lock = threading.Lock()


def talker(args: dict[str, Any]) -> serve.Application:
    return Talker.bind(args["variable"], args.get("fails", False))


def one_alone(args: dict[str, Any]) -> serve.Application:
    return OneAlone.bind(args["path"])


def transient(args: dict[str, Any]) -> serve.Application:
    return Transient.bind(args["path"])


def ailing(args: dict[str, Any]) -> serve.Application:
    return Ailing.bind(args["path"], float(args["seconds"]))


def unpicklable(args: dict[str, Any]) -> serve.Application:
    raise Unpicklable("an exception ", "with a lock in it")


def named_cafe(args: dict[str, Any]) -> serve.Application:
    return Good.options(name="café").bind()


def wants(args: dict[str, Any]) -> serve.Application:
    """What each replica reserves is in `args`: `actor`, or `bundles`; and how long it starts."""
    actor = {"ray_actor_options": args["actor"]} if "actor" in args else {}
    bundles = {"placement_group_bundles": args["bundles"]} if "bundles" in args else {}
    slow = Slow.options(**actor, **bundles)
    return (
        slow.bind(args["seconds"]) if "seconds" in args else Good.options(**actor, **bundles).bind()
    )
