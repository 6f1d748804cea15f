"""Applications without models, for the tests on a real Ray Serve; each needs a tenth of a CPU."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from ray import serve

LITTLE = {"num_cpus": 0.1}


@serve.deployment(ray_actor_options=LITTLE)
class Good:
    def __init__(self, text: str = "good") -> None:
        self.text = text

    def __call__(self, request: Any) -> dict[str, Any]:
        return {"text": self.text, "pid": os.getpid()}


@serve.deployment(ray_actor_options=LITTLE)
class Slow:
    def __init__(self, seconds: float) -> None:
        time.sleep(seconds)

    def __call__(self, request: Any) -> str:
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


bound = Good.bind("bound")


def good(args: dict[str, Any]) -> serve.Application:
    return Good.bind(args.get("text", "good"))


def slow(args: dict[str, Any]) -> serve.Application:
    return Slow.bind(float(args["seconds"]))


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
