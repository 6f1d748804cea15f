"""Requests that flow through applications while something is done to them."""

from __future__ import annotations

import itertools
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from types import TracebackType

INTERVAL_S = 0.05
REQUEST_TIMEOUT_S = 20.0


@dataclass
class Flow:
    """What came back from one route: when, and what; an answer's text or an error's."""

    url: str
    answers: list[tuple[float, str]] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)

    def send(self) -> None:
        try:
            with urllib.request.urlopen(self.url, timeout=REQUEST_TIMEOUT_S) as response:
                text = response.read().decode()
        except OSError as error:
            self.failures.append((time.monotonic(), repr(error)))
        else:
            self.answers.append((time.monotonic(), text))

    @property
    def texts(self) -> set[str]:
        """The different answers."""
        return {text for _, text in self.answers}

    @property
    def longest_silence_s(self) -> float:
        """The longest time between two answers."""
        times = [when for when, _ in self.answers]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


class Traffic:
    """Some 20 requests a second to each of some routes, as long as the `with` block lasts."""

    def __init__(self, base_url: str, *routes: str) -> None:
        self.flows = {route: Flow(base_url + route) for route in routes}
        self.over = threading.Event()
        self.threads = [
            threading.Thread(target=self.send, args=(flow,)) for flow in self.flows.values()
        ]

    def send(self, flow: Flow) -> None:
        while not self.over.wait(INTERVAL_S):
            flow.send()

    def __getitem__(self, route: str) -> Flow:
        return self.flows[route]

    def __enter__(self) -> Traffic:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()
        for route, flow in self.flows.items():
            print(
                f"{route}: {len(flow.answers)} answers, {len(flow.failures)} failures, "
                f"longest silence {flow.longest_silence_s:.1f} s"
            )
