#!/usr/bin/env python3
"""Put many language models on a Ray cluster from one YAML file, correctly and at once.

    ray start --head
    python3 app_v5.py multi_model_config.yaml

The file is a Ray Serve config (what `serve deploy` takes). Every application is built by Ray's own
builders, fitted to the exact CPUs and GPUs that it declares, and deployed concurrently; one that
fails does not touch the others, and its real cause is printed.

Exit codes: 0 every application runs and answers; 1 one failed; 2 the config or the command line is
wrong and nothing was touched; 3 no Ray cluster, or it was lost; 4 time ran out with one still
deploying; 130 Ctrl-C; 143 SIGTERM.
"""
# To find a section: grep -A1 "^# =====" app_v5.py. To change ...
#   which keys are accepted, or an error's words:  section 3 (Config)
#   what a replica reserves:                       section 4 (Resources)
#   how the plan predicts:                         section 5 (Plan)
#   what restarts, what changes in place:          section 6 (Changes)
#   anything that calls Ray:                       section 7 (Ray)
#   what a failure's cause or hint says:           section 8 (Causes)
#   what is proved of an application that runs:    section 9 (Verify)
#   the order of things, deadlines, stopping:      section 10 (Deploy)
#   what is printed:                               section 11 (Report)
#   options and exit codes:                        section 12 (Command line)

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import dataclasses
import difflib
import enum
import fnmatch
import functools
import hashlib
import http.client
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

# ======================================================================================
# 2. Types: what flows from section to section
# ======================================================================================
Config = dict[str, Any]
"""One mapping as YAML gives it: keys are strings, values are plain data."""

KeyPath = tuple[str | int, ...]
"""Where a value stands in the document: ("applications", 0, "args", "llm_configs", 0)."""

Resources = Mapping[str, float]
"""Ray resources by name: {"CPU": 1.0, "GPU": 0.45, "memory": 2e9} (memory in bytes)."""


Holders = Mapping[str, Sequence[tuple[str, Resources]]]
"""Who holds what on each node, by the node's name: ("application/deployment", its resources)."""


class Severity(enum.Enum):
    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, order=True)
class Mark:
    """A place in a file; line and column start at 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Problem:
    """One thing wrong in the config: where, what, and what would be right."""

    file: str
    mark: Mark | None
    path: KeyPath
    message: str
    hint: str = ""
    severity: Severity = Severity.ERROR


class ConfigError(Exception):
    """The config or the command line is wrong and nothing was touched (exit code 2)."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(problem.message for problem in problems))
        self.problems = problems


@dataclass(frozen=True)
class Document:
    """A loaded YAML file: plain data without shared objects, and where every key stands.

    `marks` holds, for each key path, where its key (or list item) starts. `origins` maps the path
    of an inlined llm_configs entry to the file it came from. `secrets` are the texts that no output
    may show.
    """

    file: str
    data: Config
    marks: Mapping[KeyPath, Mark]
    origins: Mapping[KeyPath, str] = field(default_factory=dict)
    secrets: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Node:
    """One live node. `free_gpus` are the free shares of its single GPUs, by index (a prediction
    where Ray does not tell); `labels` are Ray's node labels."""

    name: str
    total: Resources
    free: Resources
    free_gpus: tuple[float, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Demand:
    """What each replica of one deployment reserves, from Ray's own build of the application."""

    application: str
    deployment: str
    bundles: tuple[Resources, ...]
    strategy: str  # PACK, SPREAD, STRICT_PACK, STRICT_SPREAD
    min_replicas: int
    max_replicas: int
    max_replicas_per_node: int | None = None
    label_selectors: tuple[Mapping[str, str], ...] = ()  # one per bundle, or empty
    initial_replicas: int | None = None
    autoscaling: bool = False
    ingress: bool = False

    @property
    def reserved(self) -> dict[str, float]:
        """What one replica reserves in all its bundles."""
        total: dict[str, float] = {}
        for bundle in self.bundles:
            for resource, amount in bundle.items():
                total[resource] = total.get(resource, 0.0) + amount
        return total


@dataclass(frozen=True)
class Finding:
    """A problem of a value at a key path, before it is known where in a file that stands; `place`
    is the key to point at, where it is another."""

    path: KeyPath
    message: str
    hint: str = ""
    severity: Severity = Severity.ERROR
    place: KeyPath = ()


Findings = list[Finding]


@dataclass(frozen=True)
class ModelSpec:
    """One LLM of an application, for what people read."""

    model_id: str
    source: str
    deployment_name: str
    memory_fraction: float = 0.0  # of each card that a worker of its engine uses; 0: no GPU
    promised: Resources = field(
        default_factory=dict
    )  # what a replica shall reserve, as far as said
    share: float = 0.0  # of a GPU, for each worker of the engine
    measures_memory: bool = False  # shares a card, and sizes its KV cache by what is free there
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ApplicationSpec:
    """One application of the config, normalised: `config` is what Ray's own schema takes."""

    index: int
    name: str
    route_prefix: str | None
    config: Config
    models: tuple[ModelSpec, ...] = ()
    sealed: Config = field(default_factory=dict)
    """`config` with fingerprints in the place of secrets: what may be kept and shown."""


@dataclass(frozen=True)
class ReplicaState:
    """One replica as Serve's controller knows it."""

    replica_id: str
    state: str
    node: str
    pid: int
    actor_id: str = ""
    started_s: float = 0.0  # seconds since 1970
    log_file: str = ""


@dataclass(frozen=True)
class DeploymentState:
    """One running deployment; the words are Serve's own."""

    name: str
    status: str
    message: str
    target_replicas: int
    replicas: tuple[ReplicaState, ...] = ()
    dead_replicas: tuple[ReplicaState, ...] = ()

    @property
    def running(self) -> int:
        return sum(replica.state == "RUNNING" for replica in self.replicas)


@dataclass(frozen=True)
class ApplicationState:
    """One application on the cluster; the words are Serve's own."""

    name: str
    status: str
    message: str = ""
    route_prefix: str | None = None
    source: str = "imperative"
    deployments: tuple[DeploymentState, ...] = ()

    @property
    def broken(self) -> bool:
        return self.status in ("DEPLOY_FAILED", "UNHEALTHY")


@dataclass(frozen=True)
class Running:
    """An application that is on the cluster already, and what this program knows about it.

    `versions` are its deployments' versions. `record` is what the run that gave them left in the
    cluster, None when the application came there by other means.
    """

    state: ApplicationState
    versions: frozenset[str] = frozenset()
    record: Record | None = None


@dataclass(frozen=True)
class Record:
    """What a run leaves in the cluster about an application: enough to tell what a later one would
    change. Secrets stand in `config` as fingerprints."""

    version: str
    config: Config
    demands: tuple[Demand, ...]


class Change(enum.Enum):
    """What a run does to what runs under an application's name."""

    CREATE = "create"
    UNCHANGED = "unchanged"
    IN_PLACE = "in place"
    RESTART = "RESTART"
    DELETE = "delete"


@dataclass(frozen=True)
class Action:
    """What a run does with one application, and why. Serve compares `version` for itself.

    `restarting` names the deployments that get new replicas, None when all of them do. A `refusal`
    says why the application is not touched at all. `surge` starts new replicas before the old ones
    stop. `before` is what ran under the name.
    """

    application: ApplicationSpec
    change: Change
    version: str = ""
    reasons: tuple[str, ...] = ()
    restarting: frozenset[str] | None = None
    surge: bool = False
    refusal: Cause | None = None
    before: Running | None = None
    attempt: int = 1


@dataclass(frozen=True)
class Claim:
    """Which run of this program works on an application now; `job` is its id in Ray."""

    job: str
    host: str
    pid: int
    since: str  # local time of that run's host, ISO 8601


def failed_replicas(state: ApplicationState) -> list[ReplicaState]:
    """The replicas that do not run, of the deployments that are not healthy, the latest first.

    Serve calls a replica dead some seconds after it has given up on the application, so the dead
    ones alone would leave out the one that tells why.
    """
    failed = [
        replica
        for deployment in state.deployments
        if deployment.status != "HEALTHY"
        for replica in (*deployment.replicas, *deployment.dead_replicas)
        if replica.actor_id and replica.state != "RUNNING"
    ]
    return sorted(failed, key=lambda replica: replica.started_s, reverse=True)


@dataclass(frozen=True)
class Reservation:
    """What one running replica holds, read back from Ray; `gpus` are the indices of its GPUs on
    `nodes`, as far as Ray tells."""

    deployment: str
    replica_id: str
    reserved: Resources
    nodes: tuple[str, ...]
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Response:
    """What came back over HTTP; times in seconds since the request was sent. `ended` is false for
    what was still being sent when there was enough of it, or no more time."""

    status: int
    text: str
    first_s: float
    total_s: float
    ended: bool = True


@dataclass(frozen=True)
class Answer:
    """A request that an application has answered well."""

    request: str
    total_s: float
    model_id: str = ""
    first_token_s: float | None = None


@dataclass(frozen=True)
class EngineFigures:
    """What the engine of one replica says of itself; None for what its log does not have."""

    model_id: str
    replica_id: str
    node: str
    share: float
    kv_cache_tokens: int | None = None
    max_concurrency: float | None = None
    kv_cache_gib: float | None = None
    weights_gib: float | None = None
    weights_s: float | None = None
    start_s: float | None = None


@dataclass(frozen=True)
class Proof:
    """What was checked of an application that runs. `mismatches` are broken promises in words,
    `skipped` says why nothing was asked over HTTP."""

    reservations: tuple[Reservation, ...] = ()
    mismatches: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()
    engines: tuple[EngineFigures, ...] = ()
    skipped: str = ""
    asleep: tuple[str, ...] = ()  # ids of models without a replica, which were not woken up
    mute: tuple[str, ...] = ()  # ids of models that have learnt none of what is asked


class Result(enum.Enum):
    """How an application's deployment ended."""

    RUNNING = "RUNNING"
    DELETED = "DELETED"
    FAILED = "FAILED"
    STILL_DEPLOYING = "STILL DEPLOYING"
    UNKNOWN = "UNKNOWN"
    INTERRUPTED = "INTERRUPTED"


RESULT_WORDS = frozenset(result.value for result in Result)


@dataclass(frozen=True)
class Cause:
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of one application; `seconds` count from its turn to its end."""

    action: Action
    result: Result
    seconds: float
    cause: Cause | None = None
    detail: str = ""
    demands: tuple[Demand, ...] = ()
    state: ApplicationState | None = None
    submitted: bool = False
    deleted: bool = False
    rollback: str = ""  # what --on-failure rollback came to, in words
    proof: Proof | None = None
    disturbed: bool = False  # by another engine that started with it: worth another attempt, alone

    @property
    def application(self) -> ApplicationSpec:
        return self.action.application


class ApplicationError(Exception):
    """One application failed; the others go on."""


class ClusterError(Exception):
    """No cluster, or it was lost (exit code 3)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ServeNotRunning(ClusterError):
    """The cluster has no Serve."""


class StillDeploying(Exception):
    """An application's time ran out."""


class Interrupted(Exception):
    """A signal came before anything was deployed."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Stopped(Exception):
    """The run was interrupted, or the cluster was lost."""


EXIT_OK, EXIT_FAILED, EXIT_CONFIG, EXIT_CLUSTER, EXIT_TIMEOUT = 0, 1, 2, 3, 4
EXIT_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
DEFAULT_TIMEOUT_S = 30 * 60.0


@dataclass(frozen=True)
class Options:
    """The command line."""

    config: str
    address: str | None = None
    max_workers: int | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    worker_logs: bool = False
    plan: bool = False
    allow_pending: bool = False
    force: bool = False
    only: tuple[str, ...] = ()
    json: bool = False
    on_failure: str = "keep"
    no_downtime: bool = False
    stagger: bool = False
    smoke_test: bool = True
    wake: bool = False
    prune: bool = False
    delete: bool = False


# ======================================================================================
# 3. Config: text → document with line marks → checked
# ======================================================================================

MAX_BYTES = 2 * 1024 * 1024
MAX_DEPTH = 100
MAX_VALUES = 100_000
MOST_VALUE_CHARACTERS = 60
"""A file's limits, aliases expanded; real configs stay a hundred times below them."""

YAML_TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = frozenset(
    YAML_TAG + name
    for name in (
        *("null", "bool", "int", "float", "str", "binary", "timestamp"),
        *("map", "seq", "merge", "omap", "pairs", "set"),
    )
)
VARIABLE = re.compile(r"\$(?:\$\{|\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\})")
SECRET_WORDS = frozenset(
    ("token", "key", "apikey", "password", "passwd", "secret", "credential", "credentials")
)
SHORTEST_SECRET = 4
SEAL = "sha256:"


LLM_ARGS = ("llm_config", "prefill_config", "decode_config")
"""Builder arguments that hold one LLM each; `llm_configs` holds a list of them."""

DEFAULT_APPLICATION = "default"
DEFAULT_ROUTE = "/"
"""What Ray's schema takes when `name` and `route_prefix` are not given."""


# -- text → document ---------------------------------------------------------------------------


def load_document(file: str, environ: Mapping[str, str]) -> Document:
    """Read a config file into plain data, with the place of every key.

    Environment variables are filled in, and `llm_configs` entries that are paths are replaced by
    what those files hold. Raises ConfigError.
    """
    text = read_text(file)
    loader = DocumentLoader(file, environ)
    data = loader.load(text)
    problem = check_top(file, data)
    if problem:
        raise ConfigError([problem])
    loader.inline_files(data)
    if loader.problems:
        raise ConfigError(sorted(loader.problems, key=position))
    return Document(
        file, data, loader.marks, loader.origins, frozenset(loader.secrets | secrets_in(data))
    )


def position(problem: Problem) -> tuple[str, Mark]:
    return problem.file, problem.mark or Mark(0, 0)


def read_text(file: str) -> str:
    """A file's text. Raises ConfigError when it can't be read as UTF-8 text of sane size."""

    def broken(message: str, hint: str = "") -> ConfigError:
        return ConfigError([Problem(file, None, (), message, hint)])

    try:
        with Path(file).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise broken("this is a directory", "give the YAML file in it") from None
    except OSError as error:
        raise broken(f"can't be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise broken(f"{max(size, len(data))} bytes are more than the limit of {MAX_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise broken(
            f"byte {error.start} is not UTF-8: {error.reason}", "save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise broken(
            f"byte {data.index(0)} is a NUL: this is not UTF-8 text", "save the file as UTF-8"
        )
    return text


class DocumentLoader:
    """Turns YAML nodes into plain data, and keeps where each key stands.

    PyYAML's own constructor takes the last of two equal keys, shares one object between aliases,
    and has no limits; its parser, resolver and scalar constructors are used as they are.
    """

    def __init__(self, file: str, environ: Mapping[str, str]) -> None:
        self.file = file
        self.environ = environ
        self.marks: dict[KeyPath, Mark] = {}
        self.origins: dict[KeyPath, str] = {}
        self.secrets: set[str] = set()
        self.problems: list[Problem] = []
        self.values = 0
        self.scalars = yaml.SafeLoader("")
        self.files = [file]

    def problem(self, mark: Mark | None, path: KeyPath, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.files[-1], mark, path, message, hint))

    def load(self, text: str, path: KeyPath = ()) -> Any:
        """The document's data. Raises ConfigError for what makes all of it unusable."""
        file = self.files[-1]
        try:
            check_events(file, text)
            nodes = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
        except yaml.MarkedYAMLError as error:
            raise ConfigError([syntax_problem(file, text, error)]) from None
        except yaml.YAMLError as error:
            raise ConfigError([Problem(file, None, (), f"not YAML: {error}")]) from None
        if len(nodes) > 1:
            raise ConfigError(
                [
                    Problem(
                        file, mark_of(nodes[1]), (), "a second document starts here", ONE_DOCUMENT
                    )
                ]
            )
        if not nodes or nodes[0] is None:
            raise ConfigError([Problem(file, None, (), f"is empty; expected {EXPECTED_TOP}")])
        return self.value(nodes[0], path, ())

    def value(self, node: yaml.Node, path: KeyPath, above: tuple[int, ...]) -> Any:
        """One node's plain data; `above` are the nodes that it lies in."""
        self.values += 1
        if self.values > MAX_VALUES:
            message = f"excessive aliasing: more than {MAX_VALUES} values when aliases are expanded"
            raise ConfigError([Problem(self.files[-1], mark_of(node), path, message)])
        if id(node) in above:
            message = "an alias stands inside of what it refers to"
            raise ConfigError([Problem(self.files[-1], mark_of(node), path, message)])
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, (*above, id(node)))
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.marks[(*path, index)] = mark_of(item)
                items.append(self.value(item, (*path, index), (*above, id(node))))
            return items
        assert isinstance(node, yaml.ScalarNode)
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath, above: tuple[int, ...]) -> Config:
        """A mapping; what `<<` merges in stands below what is written."""
        merged: Config = {}
        own: Config = {}
        lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == YAML_TAG + "merge":
                sources = (
                    value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                )
                for source in reversed(sources):
                    if isinstance(source, yaml.MappingNode):
                        merged.update(self.value(source, path, above))
                    else:
                        self.problem(mark_of(source), path, "`<<` takes a mapping")
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(mark_of(key_node), path, "a mapping or a list can't be a key")
                continue
            key, mark = self.scalars.construct_object(key_node), mark_of(key_node)
            if key in own:
                message = f"{key!r} is given twice, in line {lines[key]} and in line {mark.line}"
                self.problem(mark, path, message, "keep one of them")
            lines[key] = mark.line
            self.marks[(*path, key)] = mark
            own[key] = self.value(value_node, (*path, key), above)
            self.marks[(*path, key)] = mark
        return {**merged, **own}

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        """A scalar, with environment variables filled in; unquoted ones get their type anew."""
        if "${" in node.value and node.tag in (YAML_TAG + "str", YAML_TAG + "merge"):
            filled = VARIABLE.sub(lambda match: self.variable(match, node, path), node.value)
            tag = node.tag
            if node.style is None:
                tag = self.scalars.resolve(yaml.ScalarNode, filled, (True, False))  # type: ignore[no-untyped-call]
            node = yaml.ScalarNode(tag, filled, node.start_mark, node.end_mark, node.style)
        try:
            return self.scalars.construct_object(node)
        except (ValueError, yaml.YAMLError) as error:
            self.problem(mark_of(node), path, f"{node.value!r} can't be read: {error}")
            return None

    def variable(self, match: re.Match[str], node: yaml.Node, path: KeyPath) -> str:
        name, default = match["name"], match["default"]
        if name is None:
            return "${"
        if name in self.environ:
            text = self.environ[name]
            if len(text) >= SHORTEST_SECRET and not is_number(text):
                self.secrets.add(text)
            return text
        if default is None:
            hint = f"export it, or give a default: ${{{name}:-...}}"
            self.problem(mark_of(node), path, f"environment variable {name} is not set", hint)
        return default or ""

    def inline_files(self, data: Config) -> None:
        """Replace the paths among the builders' LLMs by what the files hold."""
        for index, application in enumerate(as_list(data.get("applications"))):
            args = application.get("args") if isinstance(application, dict) else None
            if not isinstance(args, dict):
                continue
            for key in LLM_ARGS:
                self.inline(args, key, ("applications", index, "args", key))
            entries = args.get("llm_configs")
            if isinstance(entries, list):
                for place in range(len(entries)):
                    path = ("applications", index, "args", "llm_configs", place)
                    self.inline(entries, place, path)

    def inline(self, holder: Any, key: str | int, path: KeyPath) -> None:
        name = holder.get(key) if isinstance(holder, dict) else holder[key]
        if not isinstance(name, str):
            return
        base, here = Path(self.file).absolute().parent, Path.cwd()
        found = next(
            (str(folder / name) for folder in (base, here) if (folder / name).exists()), None
        )
        if found is None:
            hint = f"looked in {base} and in {here}"
            self.problem(self.marks.get(path), path, f"there is no file {name!r}", hint)
            return
        self.files.append(found)
        try:
            value = self.load(read_text(found), path)
            if not isinstance(value, dict):
                self.problem(None, path, "expected a mapping with `model_loading_config`")
            holder[key] = value
            self.origins[path] = found
        except ConfigError as error:
            self.problems += error.problems
        finally:
            self.files.pop()


EXPECTED_TOP = "a mapping with `applications`"
ONE_DOCUMENT = "keep one document in the file"


def mark_of(node: yaml.Node | yaml.Event) -> Mark:
    start = node.start_mark
    return Mark(start.line + 1, start.column + 1) if start else Mark(1, 1)


def check_events(file: str, text: str) -> None:
    """Look at the stream of events before anything is built from it. Raises ConfigError."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        mark = mark_of(event)
        if depth > MAX_DEPTH:
            raise ConfigError([Problem(file, mark, (), f"nested deeper than {MAX_DEPTH} levels")])
        tag = getattr(event, "tag", None)
        if tag and tag not in PLAIN_TAGS and tag != "!":
            message = f"the tag {tag.replace(YAML_TAG, '!!')} is not allowed"
            raise ConfigError([Problem(file, mark, (), message, "plain YAML values only")])


def syntax_problem(file: str, text: str, error: yaml.MarkedYAMLError) -> Problem:
    """A parser's complaint with the line that it is about."""
    place = error.problem_mark or error.context_mark
    if place is None:
        return Problem(file, None, (), f"not YAML: {error.problem}")
    lines = text.splitlines()
    shown = lines[place.line].strip() if place.line < len(lines) else "(end of the file)"
    message = f"not YAML: {error.problem}"
    if "\\t" in str(error.problem):
        message += " (indent with spaces, not tabs)"
    return Problem(file, Mark(place.line + 1, place.column + 1), (), message, f"the line: {shown}")


def check_top(file: str, data: Any) -> Problem | None:
    """What is wrong with a document as a whole."""
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "a single value"
        return Problem(file, Mark(1, 1), (), f"expected {EXPECTED_TOP}, this is {kind}")
    if "apiVersion" in data and "kind" in data and "applications" not in data:
        hint = f"expected {EXPECTED_TOP}"
        if data["kind"] == "RayService":
            hint = "its spec.serveConfigV2 holds the Serve config: save that text as a file"
        message = f"this is a Kubernetes manifest ({data['kind']})"
        return Problem(file, Mark(1, 1), (), message, hint)
    if "applications" not in data:
        similar = did_you_mean("applications", data)
        return Problem(file, Mark(1, 1), (), f"expected {EXPECTED_TOP}", similar)
    return None


def did_you_mean(wanted: str, keys: Iterable[Any]) -> str:
    close = difflib.get_close_matches(wanted, [key for key in keys if isinstance(key, str)], 1, 0.7)
    return f"did you mean {wanted!r} by {close[0]!r}?" if close else ""


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def llm_configs(application: Config) -> list[tuple[KeyPath, Config]]:
    """The LLMs among an application's builder arguments, each with its path below it."""
    args = application.get("args") or {}
    found: list[tuple[KeyPath, Any]] = [
        (("args", "llm_configs", index), llm)
        for index, llm in enumerate(as_list(args.get("llm_configs")))
    ]
    found += [(("args", key), args[key]) for key in LLM_ARGS if key in args]
    return [(path, llm) for path, llm in found if isinstance(llm, dict)]


# -- secrets -----------------------------------------------------------------------------------


def is_secret_key(key: str) -> bool:
    """Whether a key names a secret: HF_TOKEN, api-key, dbPassword; not max_tokens, tokenizer."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)
    return any(word.lower() in SECRET_WORDS for word in words)


def secrets_in(value: Any, key: str = "") -> set[str]:
    """The texts under keys that name secrets."""
    if isinstance(value, dict):
        return set().union(*(secrets_in(item, str(name)) for name, item in value.items()))
    if isinstance(value, list):
        return set().union(*(secrets_in(item, key) for item in value))
    long_enough = isinstance(value, str) and len(value) >= SHORTEST_SECRET
    return {value} if long_enough and is_secret_key(key) else set()


def seal(value: Any, secrets: Collection[str]) -> Any:
    """A copy in which each text with a secret in it is a fingerprint: equal only if it is equal."""
    if isinstance(value, dict):
        return {key: seal(item, secrets) for key, item in value.items()}
    if isinstance(value, list):
        return [seal(item, secrets) for item in value]
    if isinstance(value, str) and any(secret in value for secret in secrets):
        return SEAL + hashlib.sha256(value.encode()).hexdigest()[:16]
    return value


def mask(text: str, secrets: Collection[str]) -> str:
    """`text` without the secrets, the longest first."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


# -- which keys there are: Ray's own schemas, read without importing Ray -------------------------

SCHEMA_SOURCES = (
    ("ray", "serve/schema.py"),
    ("ray", "serve/config.py"),
    ("ray", "llm/_internal/serve/core/configs/llm_config.py"),
    ("ray", "llm/_internal/serve/core/configs/accelerators.py"),
    ("ray", "llm/_internal/serve/core/ingress/builder.py"),
    ("ray", "llm/_internal/serve/serving_patterns/data_parallel/builder.py"),
    ("ray", "llm/_internal/serve/serving_patterns/prefill_decode/builder.py"),
    ("ray", "llm/_internal/common/placement.py"),
    ("ray", "llm/_internal/common/utils/cloud_utils.py"),
    ("vllm", "engine/arg_utils.py"),
    ("vllm", "entrypoints/launchers/cli_args.py"),
)
"""Where the schemas stand: importing them takes 2 s for Serve's and 10 s for the LLM's."""

SHORT_RESOURCES = frozenset(("num_cpus", "cpus", "num_gpus", "gpus"))
LLM_LISTS = {"llm_configs", *LLM_ARGS}
ENGINE, OPTIONS, LLM_BUILDER, BUNDLE = "engine", "deployment options", "LLM builder", "bundle"

SCHEMA_PARTS: Mapping[str, tuple[str, ...]] = {
    ENGINE: ("EngineArgs", "AsyncEngineArgs", "FrontendArgs", "BaseFrontendArgs"),
    LLM_BUILDER: ("LLMServingArgs", "DPOpenAiServingArgs", "PDServingArgs"),
    "accelerator": ("AcceleratorConfig", "CPUConfig", "GPUConfig", "TPUConfig"),
    "model source": ("CloudMirrorConfig", "LoraMirrorConfig"),
}
"""Places that accept the fields of several classes."""

CHILDREN: Mapping[tuple[str, str], str] = {
    ("ServeDeploySchema", "http_options"): "HTTPOptionsSchema",
    ("ServeDeploySchema", "grpc_options"): "gRPCOptionsSchema",
    ("ServeDeploySchema", "logging_config"): "LoggingConfig",
    ("ServeDeploySchema", "tracing_config"): "TracingConfig",
    ("ServeDeploySchema", "controller_options"): "ControllerOptions",
    ("ServeDeploySchema", "applications"): "ServeApplicationSchema",
    ("ServeApplicationSchema", "logging_config"): "LoggingConfig",
    ("ServeApplicationSchema", "deployments"): "DeploymentSchema",
    ("DeploymentSchema", "ray_actor_options"): "RayActorOptionsSchema",
    ("DeploymentSchema", "autoscaling_config"): "AutoscalingConfig",
    ("DeploymentSchema", "logging_config"): "LoggingConfig",
    ("DeploymentSchema", "request_router_config"): "RequestRouterConfig",
    ("DeploymentSchema", "gang_scheduling_config"): "GangSchedulingConfig",
    (OPTIONS, "ray_actor_options"): "RayActorOptionsSchema",
    (OPTIONS, "autoscaling_config"): "AutoscalingConfig",
    (OPTIONS, "logging_config"): "LoggingConfig",
    (LLM_BUILDER, "llm_configs"): "LLMConfig",
    **{(LLM_BUILDER, key): "LLMConfig" for key in LLM_ARGS},
    (LLM_BUILDER, "ingress_deployment_config"): OPTIONS,
    ("LLMConfig", "model_loading_config"): "ModelLoadingConfig",
    ("LLMConfig", "deployment_config"): OPTIONS,
    ("LLMConfig", "engine_kwargs"): ENGINE,
    ("LLMConfig", "lora_config"): "LoraConfig",
    ("LLMConfig", "placement_group_config"): "PlacementGroupConfig",
    ("LLMConfig", "accelerator_config"): "accelerator",
    ("PlacementGroupConfig", "bundle_per_worker"): BUNDLE,
    ("PlacementGroupConfig", "bundles"): BUNDLE,
    ("ModelLoadingConfig", "model_source"): "model source",
}
"""Which schema the value of a field has, where it is a mapping or a list of mappings."""

FORBIDS_OTHERS = frozenset(
    ("LLMConfig", "ModelLoadingConfig", "LoraConfig", "LoggingConfig", ENGINE)
)
"""Schemas for which Ray refuses an unknown field; the others ignore it without a word."""

KnownKeys = Mapping[str, frozenset[str]]
"""Schema name -> its fields; a schema that was not found is not in it, and is not checked."""


@functools.cache
def known_keys() -> KnownKeys:
    """The fields of the installed Ray's and vLLM's schemas, from their source (0.1 s)."""
    classes: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {}
    for package, file in SCHEMA_SOURCES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            with contextlib.suppress(OSError, SyntaxError):
                classes.update(read_classes(Path(folder, file).read_text("utf-8")))
    known = {name: fields_of(name, classes) for name in classes}
    for place, parts in SCHEMA_PARTS.items():
        if any(part in known for part in parts):
            known[place] = frozenset().union(*(known.get(part, ()) for part in parts))
    spec = importlib.util.find_spec("ray")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        with contextlib.suppress(OSError, SyntaxError, StopIteration):
            known[OPTIONS] = deployment_options(Path(folder, "serve/api.py").read_text("utf-8"))
    return known


def read_classes(source: str) -> dict[str, tuple[frozenset[str], tuple[str, ...]]]:
    """The annotated fields and the bases of each class in a source file."""
    return {
        node.name: (
            frozenset(
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and not item.target.id.startswith("_")
            ),
            tuple(base.id for base in node.bases if isinstance(base, ast.Name)),
        )
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }


def fields_of(
    name: str, classes: Mapping[str, tuple[frozenset[str], tuple[str, ...]]]
) -> frozenset[str]:
    fields, bases = classes[name]
    return fields.union(*(fields_of(base, classes) for base in bases if base in classes))


def deployment_options(source: str) -> frozenset[str]:
    """The options of `@serve.deployment`, which is what a `deployment_config` is passed to."""
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "deployment"
    )
    names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    return frozenset(name for name in names if not name.startswith("_"))


# -- document → problems -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What a value has to be."""

    kinds: tuple[type, ...]
    words: str
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    others: tuple[str, ...] = ()

    def broken_by(self, value: Any) -> bool:
        if value is None or value in self.others:
            return False
        if isinstance(value, bool) and bool not in self.kinds:
            return True
        if isinstance(value, str) and float in self.kinds and is_number(value):
            value = float(value)  # Ray's schema reads numbers that stand in quotes
        if not isinstance(value, self.kinds):
            return True
        if isinstance(value, int | float) and not isinstance(value, bool):
            return not (self.least <= value <= self.most and value > self.above)
        return False


AMOUNT = Rule((int, float), "a number, 0 or more", least=0, most=1e18)
POSITIVE = Rule((int, float), "a number above 0", above=0, most=1e18)
COUNT = Rule((int,), "a whole number, 1 or more", least=1)
COUNT_FROM_0 = Rule((int,), "a whole number, 0 or more", least=0)
TEXT = Rule((str,), "a text")
MAPPING = Rule((dict,), "a mapping")
LIST = Rule((list,), "a list")

RULES: Mapping[str, Rule] = {
    **dict.fromkeys((*SHORT_RESOURCES, "memory"), AMOUNT),
    **dict.fromkeys(("max_replicas", "max_ongoing_requests"), COUNT),
    **dict.fromkeys(("min_replicas", "initial_replicas"), COUNT_FROM_0),
    **dict.fromkeys(
        ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"), COUNT
    ),
    **dict.fromkeys(
        ("target_ongoing_requests", "metrics_interval_s", "look_back_period_s"), POSITIVE
    ),
    **dict.fromkeys(("upscale_delay_s", "downscale_delay_s"), AMOUNT),
    **dict.fromkeys(("health_check_period_s", "health_check_timeout_s"), POSITIVE),
    **dict.fromkeys(("graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s"), AMOUNT),
    "max_queued_requests": Rule((int,), "a whole number, -1 (no limit) or more", least=-1),
    "num_replicas": Rule((int,), "a whole number, 1 or more, or auto", least=1, others=("auto",)),
    "gpu_memory_utilization": Rule((int, float), "a number above 0, 1 at most", above=0, most=1),
    "port": Rule((int,), "a port, 1 to 65535", least=1, most=65535),
    **dict.fromkeys(("model_id", "import_path", "name", "host", "route_prefix"), TEXT),
    "model_source": Rule((str, dict), "a text, or a mapping with bucket_uri"),
    **dict.fromkeys(
        (
            "args",
            "runtime_env",
            "env_vars",
            "ray_actor_options",
            "deployment_config",
            "engine_kwargs",
        ),
        MAPPING,
    ),
    **dict.fromkeys(("model_loading_config", "http_options", "grpc_options", "resources"), MAPPING),
    **dict.fromkeys(("placement_group_config", "accelerator_config", "lora_config"), MAPPING),
    **dict.fromkeys(("autoscaling_config", "logging_config", "bundle_per_worker"), MAPPING),
    **dict.fromkeys(("tracing_config", "controller_options", *LLM_ARGS), MAPPING),
    **dict.fromkeys(("request_router_config", "gang_scheduling_config"), MAPPING),
    "ingress_deployment_config": MAPPING,
    **dict.fromkeys(("applications", "deployments", "llm_configs", "bundles"), LIST),
    "proxy_location": Rule((str,), "EveryNode, HeadOnly or Disabled"),
}
"""What the value of a key has to be, wherever a schema of ours has that key."""

BELONGS: Mapping[str, str] = {
    **dict.fromkeys(("min_replicas", "max_replicas", "initial_replicas"), "autoscaling_config"),
    **dict.fromkeys(("target_ongoing_requests", "upscale_delay_s"), "autoscaling_config"),
    **dict.fromkeys(("downscale_delay_s", "metrics_interval_s"), "autoscaling_config"),
    **dict.fromkeys(
        ("max_ongoing_requests", "num_replicas", "autoscaling_config"), "deployment_config"
    ),
    **dict.fromkeys(("ray_actor_options", "user_config", *SHORT_RESOURCES), "deployment_config"),
    **dict.fromkeys(("model_id", "model_source"), "model_loading_config"),
    **dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size"), "engine_kwargs"),
    **dict.fromkeys(("max_model_len", "gpu_memory_utilization", "dtype"), "engine_kwargs"),
    **dict.fromkeys(("llm_configs", "llm_config"), "args"),
    **dict.fromkeys(("model_loading_config", "engine_kwargs", "deployment_config"), "llm_configs"),
    **dict.fromkeys(("memory", "resources", "accelerator_type"), "ray_actor_options"),
    **dict.fromkeys(("name", "route_prefix", "import_path", "deployments"), "applications"),
    **dict.fromkeys(("env_vars", "pip", "working_dir"), "runtime_env"),
}
"""Where a key belongs that people put elsewhere, and that Ray then ignores without a word."""


def check_document(document: Document, known: KnownKeys) -> list[Problem]:
    """Everything wrong with a document, sorted by its place."""
    findings = check_schema(document.data, "ServeDeploySchema", (), known)
    for key in UNSUPPORTED_TOP:
        if document.data.get(key) is not None:
            findings.append(Finding((key,), *UNSUPPORTED))
    applications = as_list(document.data.get("applications"))
    if document.data.get("applications") == []:
        findings.append(Finding(("applications",), "there is no application", "", Severity.WARNING))
    for index, application in enumerate(applications):
        path = ("applications", index)
        if isinstance(application, dict):
            findings += check_application(application, path, known)
    findings += check_unique_applications(applications)
    return problems_of(document, findings)


UNSUPPORTED_TOP = ("target_capacity",)
UNSUPPORTED = (
    "is only supported by `serve deploy`: Serve does not take it for single applications",
    "leave it out, or deploy this file with `serve deploy`",
)


def check_schema(value: Config, schema: str, path: KeyPath, known: KnownKeys) -> Findings:
    """Unknown and misplaced keys, and wrong values, of a mapping and of all below it."""
    findings: Findings = []
    fields = known.get(schema)
    extra = SHORT_RESOURCES if schema in ("DeploymentSchema", OPTIONS) else frozenset()
    for key, item in value.items():
        here = (*path, key)
        if fields is not None and key not in fields | extra:
            findings.append(unknown_key(key, schema, here, fields | extra))
            continue
        rule = RULES.get(key) if isinstance(key, str) else None
        if rule and rule.broken_by(item):
            findings.append(Finding(here, f"{show_value(item)} is not {rule.words}"))
            continue
        child = CHILDREN.get((schema, key))
        for place, below in children(item, here):
            if child and isinstance(below, dict):
                findings += check_schema(below, child, place, known)
            elif child and (isinstance(item, list) or (rule is None and below is not None)):
                findings.append(Finding(place, f"{show_value(below)} is not a mapping"))
        if key == "runtime_env" and isinstance(item, dict):
            findings += check_runtime_env(item, here)
        if (child == BUNDLE or key == "resources") and not findings:
            findings += check_amounts(item, here)
    if schema in ("DeploymentSchema", OPTIONS):
        findings += check_replicas(value, path)
    return findings


def children(item: Any, path: KeyPath) -> list[tuple[KeyPath, Any]]:
    """A value itself, or the items of a list, each with its place."""
    if isinstance(item, list):
        return [((*path, index), below) for index, below in enumerate(item)]
    return [(path, item)]


def check_amounts(item: Any, path: KeyPath) -> Findings:
    """The amounts of a resource mapping, or of a list of them."""
    return [
        Finding((*place, resource), f"{show_value(amount)} is not {AMOUNT.words}")
        for place, below in children(item, path)
        for resource, amount in (below or {}).items()
        if AMOUNT.broken_by(amount)
    ]


def unknown_key(key: Any, schema: str, path: KeyPath, fields: frozenset[str]) -> Finding:
    """What to say about a key that a schema does not have.

    A near miss is an error. A key that may be new in a later Ray is one only where Ray refuses it.
    """
    above = path[:-1]

    def finding(message: str, hint: str = "", severity: Severity = Severity.ERROR) -> Finding:
        return Finding(above, message, hint, severity, place=path)

    close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.75)
    belongs = BELONGS.get(str(key))
    if schema == "AutoscalingConfig" and key == "max_ongoing_requests":
        return finding(f"{key!r} does not belong here", "move it up, beside autoscaling_config")
    if belongs and schema != ENGINE and belongs not in path:
        return finding(f"{key!r} does not belong here", f"move it into {belongs}")
    if close:
        return finding(f"unknown key {key!r}, did you mean {close[0]!r}?")
    if schema in FORBIDS_OTHERS and schema != ENGINE:
        return finding(f"unknown key {key!r}", f"known are {', '.join(sorted(fields))}")
    ignored = "Ray ignores it" if schema != ENGINE else "the engine may refuse it"
    return finding(f"unknown key {key!r}; {ignored}", severity=Severity.WARNING)


def show_value(value: Any) -> str:
    """A value in a message, short and in YAML's words."""
    text = {True: "true", False: "false", None: "null"}.get(value) if is_word(value) else None
    text = text or (repr(value) if isinstance(value, str) else str(value))
    return shortened(text, MOST_VALUE_CHARACTERS)


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def check_runtime_env(runtime_env: Config, path: KeyPath) -> Findings:
    """Values of env_vars that are no texts have broken Serve's controller."""
    variables = runtime_env.get("env_vars")
    if variables is None:
        return []
    if not isinstance(variables, dict):
        return [Finding((*path, "env_vars"), f"{show_value(variables)} is not a mapping")]
    return [
        Finding(
            (*path, "env_vars", name),
            f"{show_value(value)} is not a text",
            f'put it in quotes: {name}: "{show_value(value)}"',
        )
        for name, value in variables.items()
        if not isinstance(value, str)
    ]


def check_replicas(options: Config, path: KeyPath) -> Findings:
    """Replica counts that contradict each other."""
    autoscaling = options.get("autoscaling_config")
    number = options.get("num_replicas")
    if not isinstance(autoscaling, dict):
        return []
    findings: Findings = []
    if number is not None and number != "auto":
        findings.append(
            Finding(
                (*path, "num_replicas"),
                "num_replicas and autoscaling_config exclude each other",
                "remove one of them, or set num_replicas: auto",
            )
        )
    least, most = autoscaling.get("min_replicas", 1), autoscaling.get("max_replicas", 1)
    first = autoscaling.get("initial_replicas")
    numbers = [n for n in (least, most, first) if n is not None]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        return findings
    if "max_replicas" not in autoscaling and number == "auto":
        most = 100
    if least is not None and most is not None and least > most:
        message = f"min_replicas: {least} is more than max_replicas: {most}"
        findings.append(Finding((*path, "autoscaling_config"), message))
    elif first is not None and not (least or 0) <= first <= (most or 1):
        message = f"initial_replicas: {first} is not between {least} and {most}"
        findings.append(Finding((*path, "autoscaling_config", "initial_replicas"), message))
    return findings


def check_application(application: Config, path: KeyPath, known: KnownKeys) -> Findings:
    """What Ray's schema alone does not say about one application."""
    findings: Findings = []
    if application.get("import_path") is None:
        hint = "for LLMs: import_path: ray.serve.llm:build_openai_app"
        findings.append(Finding(path, "import_path is missing", hint))
    elif isinstance(application["import_path"], str):
        findings += check_import_path(application["import_path"], (*path, "import_path"))
    if application.get("autoscaling_policy") is not None:
        findings.append(Finding((*path, "autoscaling_policy"), *UNSUPPORTED))
    name = application.get("name", DEFAULT_APPLICATION)
    if name == "" or name is None or (isinstance(name, str) and "#" in name):
        findings.append(
            Finding((*path, "name"), "a name is a text with something in it and no '#'")
        )
    findings += check_route(application.get("route_prefix", DEFAULT_ROUTE), (*path, "route_prefix"))
    for index, override in enumerate(as_list(application.get("deployments"))):
        if isinstance(override, dict) and not override.get("name"):
            findings.append(Finding((*path, "deployments", index), "name is missing"))
    names = [
        ((*path, "deployments", index, "name"), override.get("name"))
        for index, override in enumerate(as_list(application.get("deployments")))
        if isinstance(override, dict)
    ]
    findings += check_unique(names, "deployment")
    args = application.get("args")
    rays_own = str(application.get("import_path")).startswith("ray.serve.llm")
    if isinstance(args, dict) and (rays_own or args.keys() & LLM_LISTS):
        findings += check_llm_args(args, (*path, "args"), known, rays_own)
    return findings


def check_import_path(import_path: str, path: KeyPath) -> Findings:
    """The forms that Ray's ServeApplicationSchema takes."""
    module, colon, attribute = import_path.partition(":")
    if not colon:
        module, _, attribute = import_path.rpartition(".")
    if module and attribute and ":" not in attribute and " " not in import_path.strip():
        return []
    hint = "module:attribute, such as ray.serve.llm:build_openai_app"
    return [Finding(path, f"{import_path!r} is not an import path", hint)]


def check_route(route: Any, path: KeyPath) -> Findings:
    """Serve's rules for a route_prefix; null means that there is no HTTP route."""
    if not isinstance(route, str) or route == "/":
        return []
    if not route.startswith("/"):
        return [Finding(path, f"{route!r} does not start with '/'", f"write /{route}")]
    if route.endswith("/"):
        return [Finding(path, f"{route!r} ends with '/'", "leave the last '/' out")]
    if "{" in route or "}" in route:
        return [Finding(path, f"{route!r} has a wildcard, which Serve does not take")]
    return []


def check_unique_applications(applications: Sequence[Any]) -> Findings:
    names, routes = [], []
    for index, application in enumerate(applications):
        if isinstance(application, dict):
            path: KeyPath = ("applications", index)
            names.append(((*path, "name"), application.get("name", DEFAULT_APPLICATION)))
            route = application.get("route_prefix", DEFAULT_ROUTE)
            route = route.rstrip("/") or "/" if isinstance(route, str) else route
            routes.append(((*path, "route_prefix"), route))
    return check_unique(names, "application") + check_unique(routes, "route")


def check_unique(values: Sequence[tuple[KeyPath, Any]], what: str) -> Findings:
    """A finding for each value that stood at another place before."""
    findings: Findings = []
    first: dict[str, KeyPath] = {}
    for path, value in values:
        if not isinstance(value, str):
            continue
        if value in first:
            message = f"the {what} {value!r} is there twice, first at {format_key(first[value])}"
            findings.append(Finding(path, message, "give each its own"))
        first.setdefault(value, path)
    return findings


def check_llm_args(args: Config, path: KeyPath, known: KnownKeys, rays_own: bool) -> Findings:
    """The arguments of a builder that takes LLMs; a builder of the user's own may take more."""
    fields = {key: value for key, value in args.items() if rays_own or key in LLM_LISTS}
    findings = check_schema(fields, LLM_BUILDER, path, known)
    if not args.keys() & LLM_LISTS:
        findings.append(Finding(path, "there is no LLM", "give llm_configs, a list of them"))
    models, names = [], []
    for llm_path, llm in llm_configs({"args": args}):
        where = (*path, *llm_path[1:])
        loading = llm.get("model_loading_config")
        if loading is None:
            findings.append(Finding(where, "model_loading_config is missing", "it holds model_id"))
        if not isinstance(loading, dict):
            continue
        model_id = loading.get("model_id")
        if model_id is None:
            findings.append(Finding((*where, "model_loading_config"), "model_id is missing"))
        models.append(((*where, "model_loading_config", "model_id"), model_id))
        deployment = llm.get("deployment_config")
        named = deployment.get("name") if isinstance(deployment, dict) else None
        if named:
            names.append(((*where, "deployment_config", "name"), named))
    if "llm_configs" in args:
        findings += check_unique(models, "model id") + check_unique(names, "deployment")
        if args["llm_configs"] == []:
            findings.append(Finding((*path, "llm_configs"), "there is no LLM"))
    return findings


# -- problems → text -----------------------------------------------------------------------------


def problems_of(document: Document, findings: Findings) -> list[Problem]:
    """Findings with the file and the line of the nearest key that stands in one, in their order."""
    problems = []
    for finding in findings:
        path = finding.place or finding.path
        nearest = [path[:length] for length in range(len(path), 0, -1)]
        place = next((above for above in nearest if above in document.marks), ())
        origin = next((above for above in nearest if above in document.origins), ())
        problems.append(
            Problem(
                document.origins.get(origin, document.file),
                document.marks.get(place, Mark(1, 1)),
                finding.path,
                mask(finding.message, document.secrets),
                mask(finding.hint, document.secrets),
                finding.severity,
            )
        )
    return sorted(dict.fromkeys(problems), key=position)


def format_problem(problem: Problem) -> str:
    """ "config.yaml:14:9: applications[0].name: what is wrong; what would be right"."""
    place = problem.file
    if problem.mark:
        place += f":{problem.mark.line}:{problem.mark.column}"
    warning = "warning: " if problem.severity is Severity.WARNING else ""
    key = f"{format_key(problem.path)}: " if problem.path else ""
    hint = f"; {problem.hint}" if problem.hint else ""
    return f"{place}: {warning}{key}{problem.message}{hint}"


def format_key(path: KeyPath) -> str:
    """A key path as people write it: applications[0].args.llm_configs[0]."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


# ======================================================================================
# 4. Resources: short keys, the engine's share, what one replica reserves
# ======================================================================================

SHORT_KEYS = {"num_cpus": ("num_cpus", "cpus"), "num_gpus": ("num_gpus", "gpus")}
"""Ray's actor option -> the spellings accepted beside `ray_actor_options`."""

WHOLE_GPU_MEMORY_FRACTION = 0.9
"""What an engine takes of a card that it has to itself; vLLM's own default is 0.92, and engines
that share a card need room for one CUDA context each."""

MOST_SHARE_FOR_TWO = 0.5
GPU_STEP = 10_000
"""Ray counts resources in steps of 1/10000."""


def read_applications(document: Document) -> tuple[tuple[ApplicationSpec, ...], Findings]:
    """The applications of a checked document, normalised, with what there is to say about them."""
    applications: list[ApplicationSpec] = []
    findings: Findings = []
    for index, given in enumerate(document.data.get("applications") or []):
        config, found = normalise_application(given, ("applications", index))
        findings += found
        if config.get("logging_config") is None and document.data.get("logging_config"):
            config["logging_config"] = unshared(document.data["logging_config"])
        config.setdefault("name", DEFAULT_APPLICATION)
        applications.append(
            ApplicationSpec(
                index=index,
                name=config["name"],
                route_prefix=config.get("route_prefix", DEFAULT_ROUTE),
                config=config,
                models=tuple(describe_model(llm) for _, llm in llm_configs(config)),
                sealed=seal(config, document.secrets),
            )
        )
    return tuple(applications), findings


def describe_model(llm: Config) -> ModelSpec:
    """What people read about one LLM; the deployment's name is made as Ray's builder makes it."""
    loading = llm["model_loading_config"]
    model_id = str(loading["model_id"])
    source = loading.get("model_source") or model_id
    if isinstance(source, dict):
        source = source.get("bucket_uri", "")
    deployment = llm.get("deployment_config") or {}
    options = deployment.get("ray_actor_options") or {}
    engine = llm.get("engine_kwargs") or {}
    notes = []
    if "num_gpus" not in options and not llm.get("placement_group_config"):
        notes.append("num_gpus is not given: Ray's default of 1 GPU for each engine worker")
    share = own_worker_share(llm)
    env_vars = (llm.get("runtime_env") or {}).get("env_vars") or {}
    if "VLLM_RAY_PER_WORKER_GPUS" in env_vars and "gpu_memory_utilization" in engine:
        notes.append(
            f"gpu_memory_utilization {short(engine['gpu_memory_utilization'])} for a share of "
            f"{env_vars['VLLM_RAY_PER_WORKER_GPUS']} GPU a worker"
        )
    return ModelSpec(
        model_id=model_id,
        source=str(source),
        deployment_name=deployment.get("name") or model_id.replace("/", "--").replace(".", "_"),
        memory_fraction=0.0
        if accelerator_kind(llm) in ("cpu", "tpu") or "kv_cache_memory_bytes" in engine
        else float(engine.get("gpu_memory_utilization") or WHOLE_GPU_MEMORY_FRACTION),
        promised=promised_resources(llm),
        share=share,
        measures_memory=0 < share < 1
        and accelerator_kind(llm) not in ("cpu", "tpu")
        and engine.get("kv_cache_memory_bytes") is None,
        notes=tuple(notes),
    )


def promised_resources(llm: Config) -> Resources:
    """What the config says of one replica of a fitted LLM: nothing of what it leaves to Ray."""
    if llm.get("server_cls"):
        return {}
    options = (llm.get("deployment_config") or {}).get("ray_actor_options") or {}
    promised: dict[str, float] = dict(options.get("resources") or {})
    workers = worker_bundles(llm)
    if options.get("num_cpus") is not None:
        cpus = sum(float(bundle.get("CPU") or 0) for bundle in workers)
        promised["CPU"] = float(options["num_cpus"]) + cpus
    if workers:
        gpus = sum(float(bundle.get("GPU") or 0) for bundle in workers)
        promised["GPU"] = float(options.get("num_gpus") or 0) + gpus
    if options.get("memory") is not None:
        promised["memory"] = float(options["memory"])
    return promised


def normalise_application(config: Config, path: KeyPath) -> tuple[Config, Findings]:
    """Return a copy of one application in the form that Ray's schema and builders take.

    Short resource keys go into `ray_actor_options`, and each LLM's engine is fitted to the share
    that its deployment declares. The input is never changed: with YAML aliases one object may
    stand in two places.
    """
    config = unshared(config)
    findings: Findings = []
    for index, override in enumerate(config.get("deployments") or []):
        findings += move_short_keys(override, (*path, "deployments", index))
    for llm_path, llm in llm_configs(config):
        where = (*path, *llm_path)
        deployment = llm["deployment_config"] = llm.get("deployment_config") or {}
        findings += move_short_keys(deployment, (*where, "deployment_config"))
        findings += fit_engine(llm, where, config.get("runtime_env") or {})
    return config, findings


def unshared(value: Any) -> Any:
    """A deep copy in which no two places hold the same object (`copy.deepcopy` keeps them)."""
    if isinstance(value, dict):
        return {key: unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unshared(item) for item in value]
    return value


def move_short_keys(options: Config, path: KeyPath) -> Findings:
    """Move `num_cpus`/`cpus` and `num_gpus`/`gpus` into `ray_actor_options`, as floats."""
    findings: Findings = []
    actor_options = dict(options.get("ray_actor_options") or {})
    for option, spellings in SHORT_KEYS.items():
        given: dict[KeyPath, Any] = {
            (key,): options.pop(key) for key in spellings if key in options
        }
        if option in actor_options:
            given[("ray_actor_options", option)] = actor_options[option]
        values = {where: float(value) for where, value in given.items() if value is not None}
        if len(set(values.values())) > 1:
            first, second = list(values)[:2]
            findings.append(
                Finding(
                    (*path, *first),
                    f"{format_key(first)}: {short(values[first])} and "
                    f"{format_key(second)}: {short(values[second])} disagree",
                    "give one of them",
                )
            )
        if values:
            actor_options[option] = next(iter(values.values()))
    if actor_options:
        options["ray_actor_options"] = actor_options
    return findings


def fit_engine(llm: Config, path: KeyPath, application_runtime_env: Config) -> Findings:
    """Make one LLM's replicas reserve exactly the CPUs and GPUs that it declares (in place).

    Ray's `LLMServer` reserves the *sum* of `ray_actor_options` and of one bundle an engine worker
    (1 GPU each by default), so `num_gpus: 0.45` alone reserves 1.45 GPU (measured on Ray 2.60). The
    share therefore moves to the workers' bundles, and the replica actor keeps the CPUs.
    """
    if llm.get("server_cls") or accelerator_kind(llm) == "tpu":
        return []
    if llm.get("placement_group_config"):
        return check_own_placement_group(llm, path) + share_memory(
            llm, path, own_worker_share(llm), application_runtime_env
        )
    actor_options: Config = llm["deployment_config"].get("ray_actor_options") or {}
    gpus = actor_options.get("num_gpus")
    if accelerator_kind(llm) == "cpu" or gpus == 0:
        return fit_cpu_engine(llm, path)
    if gpus is None:
        return []
    return fit_gpu_engine(llm, path, float(gpus), application_runtime_env)


def accelerator_kind(llm: Config) -> str:
    """ "cpu", "gpu", "tpu", or "" when the config does not say."""
    declared = (llm.get("accelerator_config") or {}).get("kind")
    if declared:
        return str(declared)
    accelerator = str(llm.get("accelerator_type") or "")
    return "tpu" if accelerator.startswith("TPU") else "gpu" if accelerator else ""


def engine_workers(llm: Config) -> int:
    """How many workers an engine has: tensor parallel times pipeline parallel."""
    engine = llm.get("engine_kwargs") or {}
    sizes = (engine.get("tensor_parallel_size"), engine.get("pipeline_parallel_size"))
    return math.prod(int(size or 1) for size in sizes)


def fit_cpu_engine(llm: Config, path: KeyPath) -> Findings:
    """One bundle with nothing in it for the workers: they are local processes of the replica."""
    options = llm["deployment_config"].get("ray_actor_options") or {}
    gpus = options.get("num_gpus")
    if accelerator_kind(llm) == "gpu":
        return [
            Finding(
                (*path, "deployment_config"),
                "num_gpus: 0 asks for the CPU engine, but "
                + ("accelerator_type" if llm.get("accelerator_type") else "accelerator_config")
                + " asks for GPUs",
                "remove one of them, or give num_gpus the share that a replica takes",
            )
        ]
    llm["accelerator_config"] = {"kind": "cpu"}
    if "num_cpus" not in options and gpus is None:
        return []
    worker: Config = {"CPU": 0}
    if gpus:
        worker["GPU"] = gpus
        options["num_gpus"] = 0.0
    llm["placement_group_config"] = {"bundles": [worker]}
    return []


def fit_gpu_engine(llm: Config, path: KeyPath, gpus: float, app_env: Config) -> Findings:
    """`gpus` GPUs in all for one replica, spread evenly over its engine's workers."""
    workers = engine_workers(llm)
    share = math.floor(round(gpus / workers * GPU_STEP, 3)) / GPU_STEP
    findings: Findings = []
    if share > 1 and share != int(share):
        return [
            Finding(
                (*path, "deployment_config"),
                f"num_gpus: {short(gpus)} over {workers} engine worker(s) is {short(share)} GPU "
                "a worker; above 1 Ray takes whole GPUs only",
                f"use {int(share) * workers} or {(int(share) + 1) * workers}",
            )
        ]
    if share > 1:
        findings.append(
            Finding(
                (*path, "deployment_config"),
                f"num_gpus: {short(gpus)} reserves {short(share)} GPUs for each of "
                f"{workers} engine worker(s), and a worker uses one",
                f"set engine_kwargs.tensor_parallel_size: {int(gpus)}",
                Severity.WARNING,
            )
        )
    if abs(share * workers - gpus) > 0.5 / GPU_STEP:
        findings.append(
            Finding(
                (*path, "deployment_config"),
                f"num_gpus: {short(gpus)} does not divide evenly over {workers} engine workers: "
                f"a replica reserves {short(share * workers)} GPU",
                severity=Severity.WARNING,
            )
        )
    if workers > 1 and share <= MOST_SHARE_FOR_TWO:
        findings.append(
            Finding(
                (*path, "deployment_config"),
                f"{workers} engine workers of {short(share)} GPU fit on one card, and Ray may put "
                "them there; on real GPUs NCCL refuses two workers on one",
                "give each worker more than half a GPU, or use one worker",
                Severity.WARNING,
            )
        )
    llm["deployment_config"]["ray_actor_options"]["num_gpus"] = 0.0
    llm["placement_group_config"] = {"bundle_per_worker": {"GPU": share}}
    return findings + share_memory(llm, path, share, app_env)


def share_memory(llm: Config, path: KeyPath, share: float, app_env: Config) -> Findings:
    """Tell an engine that gets a part of a card to ask Ray, and the card's memory, for that part.

    Without the variable the engine asks Ray for a whole GPU and dies with "cannot fit"
    (ray-project/ray#63875); without the fraction each engine takes 0.9 of the card.
    """
    if not 0 < share < 1:
        return []
    runtime_env = dict(llm.get("runtime_env") or {})
    actor_options = llm["deployment_config"].get("ray_actor_options") or {}
    # LLMServer lays the LLM's runtime_env over the actor's and the application's key by key, so
    # an `env_vars` here would hide theirs: it has to repeat them.
    sources = (runtime_env, actor_options.get("runtime_env") or {}, app_env)
    inherited: Config = next((env["env_vars"] for env in sources if env.get("env_vars")), {})
    runtime_env["env_vars"] = {"VLLM_RAY_PER_WORKER_GPUS": str(share), **inherited}
    llm["runtime_env"] = runtime_env
    if accelerator_kind(llm) == "cpu":
        return []
    engine = llm["engine_kwargs"] = dict(llm.get("engine_kwargs") or {})
    asked = engine.get("gpu_memory_utilization")
    if asked is None and engine.get("kv_cache_memory_bytes") is None:
        engine["gpu_memory_utilization"] = round(WHOLE_GPU_MEMORY_FRACTION * share, 4)
    if asked is not None and asked > share:
        return [
            Finding(
                (*path, "engine_kwargs", "gpu_memory_utilization"),
                f"{short(asked)} of the card's memory is more than the {short(share)} GPU that a "
                "worker reserves: engines that share the card may run out of memory",
                f"leave it out (it becomes {short(WHOLE_GPU_MEMORY_FRACTION * share)}) or lower it",
                Severity.WARNING,
            )
        ]
    return []


def worker_bundles(llm: Config) -> list[Config]:
    """The engine workers' bundles that a user's own `placement_group_config` asks for."""
    config = llm.get("placement_group_config") or {}
    if config.get("bundle_per_worker") is not None:
        return [dict(config["bundle_per_worker"])] * engine_workers(llm)
    return [dict(bundle) for bundle in config.get("bundles") or []]


def own_worker_share(llm: Config) -> float:
    """The GPU share of a worker in a user's own placement group, 0 when there is none."""
    return next((float(b["GPU"]) for b in worker_bundles(llm) if b.get("GPU")), 0.0)


def check_own_placement_group(llm: Config, path: KeyPath) -> Findings:
    """A user's own `placement_group_config` stays as it is; warn when it counts something twice."""
    actor_options = llm["deployment_config"].get("ray_actor_options") or {}
    workers = sum(float(bundle.get("GPU") or 0) for bundle in worker_bundles(llm))
    actor = float(actor_options.get("num_gpus") or 0)
    if not (workers and actor):
        return []
    return [
        Finding(
            (*path, "placement_group_config"),
            f"{short(workers)} GPU here and num_gpus: {short(actor)} count twice: a replica "
            f"reserves {short(workers + actor)} GPU",
            "set num_gpus: 0, or leave out placement_group_config",
            Severity.WARNING,
        )
    ]


def short(number: float) -> str:
    """A number as people write it: 0.45, 1, 16."""
    return f"{number:.4f}".rstrip("0").rstrip(".")


def format_resources(resources: Resources) -> str:
    """ "1.0 CPUs, 0.45 GPUs" and then whatever else: "memory 2.0 GB, custom 1"."""
    parts = [
        f"{round(float(resources[key]), 4)} {key}s" for key in ("CPU", "GPU") if key in resources
    ]
    for key, amount in sorted(resources.items()):
        if key == "memory":
            parts.append(f"memory {amount / 1e9:.1f} GB")
        elif key not in ("CPU", "GPU"):
            parts.append(f"{key} {short(amount)}")
    return ", ".join(parts) or "nothing"


# ======================================================================================
# 5. Plan: demands and nodes → placement, fit, what would help
# ======================================================================================
#
# How Ray 2.60 places a placement group, as far as it was read and tried (test_plan_against_ray.py):
#   1. GCS picks nodes by each node's *sums* (gcs_placement_group_scheduler.cc).
#   2. Each picked raylet allocates *instances*: a share of a GPU comes from one GPU
#      (resource_instance_set.cc). It may refuse what GCS picked (ray-project/ray#52133, #54729).
#   3. After a refusal GCS wrongly keeps the refused amounts deducted from its view of that node,
#      until something changes there. So its next attempts try the other nodes; but what it could
#      place there meanwhile has to wait as well. What comes of that is a matter of timing: such
#      verdicts are not `sure`.

UNITS = 10_000
"""Ray counts resources in steps of 1/10000 (fixed_point.h); all amounts in this section do."""

PER_DEVICE = frozenset(
    ("GPU", "TPU", "neuron_cores", "NPU", "HPU", "RBLN", "FURIOSA", "TTNPU", "MBLT")
)
"""Resources that Ray allocates device by device (ray_config_def.h, unit_instance_resources)."""

PREDEFINED = ("object_store_memory", "memory", "CPU")

IMPLICIT = "node:__internal_implicit_resource_"
"""Every node has 1 of each resource named so; Serve's `max_replicas_per_node` takes 1/n of it."""

ORDERS_TRIED = 8

UNSURE = (
    "fits, but Ray may be slow to see it: it picks nodes by the sum of their free GPU shares, and "
    "single GPUs refuse (ray-project/ray#52133)"
)
HELP_EFFORT = 60_000
"""How many times a replica may be tried on a node while looking for help: about half a second."""

Amounts = Mapping[str, int]


class Fit(enum.Enum):
    FITS = "fits"
    NOT_NOW = "does not fit now"
    NEVER = "can never fit"


@dataclass(frozen=True)
class Bundle:
    """One bundle of a placement group, in Ray's units."""

    needs: Amounts
    selector: Mapping[str, str]


@dataclass(frozen=True)
class Stock:
    """What one node has: each resource by instance (a GPU, a share of it), and in sum."""

    name: str
    labels: Mapping[str, str]
    instances: Mapping[str, tuple[int, ...]]
    sums: Amounts


@dataclass(frozen=True)
class Slot:
    """One bundle's place: the node, what it takes there, and which GPUs with which shares."""

    node: int
    resources: Resources
    gpus: tuple[tuple[int, float], ...] = ()


Replica = tuple[Slot, ...]


@dataclass(frozen=True)
class Shortage:
    """Why a deployment's replica finds no place. `resource` is empty when each resource is free
    somewhere, only not together. Amounts are as people write them (0.45 GPU, bytes of memory)."""

    resource: str
    needed: float
    largest_free: float = 0.0
    free_where: str = ""
    largest_total: float = 0.0
    total_where: str = ""
    held_by: tuple[str, ...] = ()
    detail: str = ""
    help: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitting:
    """What became of one demand: where its minimum of replicas goes, and how far it could grow."""

    demand: Demand
    fit: Fit
    replicas: tuple[Replica, ...]
    room_for: int = 0
    shortage: Shortage | None = None
    sure: bool = True  # False: Ray's answer depends on the moment of its attempts

    @property
    def label(self) -> str:
        return label_of(self.demand)


@dataclass(frozen=True)
class Prediction:
    nodes: tuple[Node, ...]
    fittings: tuple[Fitting, ...]
    ledger: Ledger

    @property
    def misfits(self) -> tuple[Fitting, ...]:
        return tuple(fitting for fitting in self.fittings if fitting.fit is not Fit.FITS)


def label_of(demand: Demand) -> str:
    return f"{demand.application}/{demand.deployment}"


# -- from nodes and demands to Ray's units -----------------------------------------------------


def requested_units(amount: float) -> int:
    """A requested amount as Ray counts it: the rest is cut off, not rounded (fixed_point.h), so
    seven replicas of 1/7 do fit on one node."""
    return int(amount * UNITS)


def reported_units(amount: float) -> int:
    """An amount that Ray reported, which is a multiple of 1/10000 but for float noise."""
    return round(amount * UNITS)


def stock_of(node: Node, amounts: Resources, gpus: tuple[float, ...] = ()) -> Stock:
    """A node with these amounts of each resource, and these shares of its GPUs where known."""
    instances: dict[str, tuple[int, ...]] = {}
    for resource, total in node.total.items():
        amount = amounts.get(resource, 0.0)  # Ray leaves out what is used up
        if resource not in PER_DEVICE:
            instances[resource] = (reported_units(amount),)
        else:
            shares = gpus if resource == "GPU" and gpus else initial_free_gpus(total, (), amount)
            instances[resource] = tuple(map(reported_units, shares))
    sums = {resource: sum(shares) for resource, shares in instances.items()}
    return Stock(node.name, node.labels, instances, sums)


def bundles_of(demand: Demand) -> tuple[Bundle, ...]:
    """One replica's bundles. `max_replicas_per_node` becomes a share of an implicit resource, as
    Serve does it (deployment_scheduler.py, `_schedule_replica`)."""
    extra: dict[str, float] = {}
    if demand.max_replicas_per_node:
        extra[IMPLICIT + label_of(demand)] = 1.0 / demand.max_replicas_per_node
    selectors = demand.label_selectors or ({},) * len(demand.bundles)
    bundles = []
    for bundle, selector in zip(demand.bundles, selectors, strict=True):
        amounts = {r: requested_units(a) for r, a in (*bundle.items(), *extra.items())}
        bundles.append(Bundle({r: a for r, a in amounts.items() if a > 0}, selector))
        extra = {}
    return tuple(bundles)


def initial_free_gpus(
    total: float, running: Sequence[float], free: float | None = None
) -> tuple[float, ...]:
    """Guess the free share of each GPU of a node from the GPU demands that run on it, in the order
    in which they came; Ray itself reports only their sum (`free`).

    Where the sum is lower than the replay says, somebody else holds the difference: whole GPUs as
    far as there are, the rest on the freest ones, so that the guess promises too little.
    """
    gpus = (UNITS,) * int(total)
    for demand in map(requested_units, running):
        taken = allocate(gpus, demand) or drained(gpus, demand)
        gpus = subtract(gpus, taken)
    unknown = 0 if free is None else max(0, sum(gpus) - reported_units(free))
    whole = allocate(gpus, unknown // UNITS * UNITS)
    if whole is not None:
        gpus = subtract(gpus, whole)
        unknown %= UNITS
    return tuple(gpu / UNITS for gpu in subtract(gpus, drained(gpus, unknown)))


def drained(instances: tuple[int, ...], amount: int) -> tuple[int, ...]:
    """Take `amount` from the freest instances first, across as many as it needs."""
    taken = [0] * len(instances)
    for index in sorted(range(len(instances)), key=lambda i: -instances[i]):
        taken[index] = min(instances[index], amount)
        amount -= taken[index]
    return tuple(taken)


# -- the raylet: instances ---------------------------------------------------------------------


def allocate(instances: tuple[int, ...], demand: int) -> tuple[int, ...] | None:
    """What a raylet takes from each instance: whole free devices for the whole part of the demand,
    the rest from the one device that it fits best (NodeResourceInstanceSet::TryAllocate)."""
    if len(instances) == 1:
        return (demand,) if instances[0] >= demand else None
    taken = [0] * len(instances)
    for index, free in enumerate(instances):
        if demand >= UNITS and free == UNITS:
            taken[index] = UNITS
            demand -= UNITS
    if demand >= UNITS:
        return None
    if demand > 0:
        rooms = [(f - t - demand, i) for i, (f, t) in enumerate(zip(instances, taken, strict=True))]
        best = min((room for room in rooms if room[0] >= 0), default=None)
        if best is None:
            return None
        taken[best[1]] += demand
    return tuple(taken)


def subtract(instances: tuple[int, ...], taken: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(have - take for have, take in zip(instances, taken, strict=True))


def grant(stock: Stock, bundle: Bundle, node: int) -> tuple[Stock, Slot] | None:
    """What PrepareBundle does on a raylet: all resources of the bundle, or a refusal."""
    instances, sums = dict(stock.instances), dict(stock.sums)
    gpus: tuple[tuple[int, float], ...] = ()
    for resource, need in bundle.needs.items():
        taken = allocate(instances.get(resource) or (left(sums, resource),), need)
        if taken is None:
            return None
        instances[resource] = subtract(instances.get(resource) or (left(sums, resource),), taken)
        sums[resource] = left(sums, resource) - need
        if resource == "GPU":
            gpus = tuple((index, share / UNITS) for index, share in enumerate(taken) if share)
    amounts = {r: need / UNITS for r, need in bundle.needs.items() if not r.startswith(IMPLICIT)}
    return replace(stock, instances=instances, sums=sums), Slot(node, amounts, gpus)


# -- GCS: sums ---------------------------------------------------------------------------------


def left(sums: Amounts, resource: str) -> int:
    amount = sums.get(resource)
    if amount is None:
        return UNITS if resource.startswith(IMPLICIT) else 0
    return amount


class View:
    """What GCS believes to be free on each node, by sums. A placement attempt works on a copy."""

    def __init__(self, sums: Mapping[int, Amounts], labels: Mapping[int, Mapping[str, str]]):
        self.sums = dict(sums)
        self.labels = labels

    def copy(self, order: Sequence[int] | None = None) -> View:
        """A copy that considers nodes in another order: among equals the first one is taken."""
        sums = self.sums if order is None else {node: self.sums[node] for node in order}
        return View(sums, self.labels)

    def deduct(self, node: int, needs: Amounts) -> None:
        sums = dict(self.sums[node])
        for resource, need in needs.items():
            sums[resource] = max(0, left(sums, resource) - need)
        self.sums[node] = sums

    def takes(self, node: int, bundle: Bundle) -> bool:
        sums = self.sums[node]
        return all(
            left(sums, resource) >= need for resource, need in bundle.needs.items()
        ) and matches(self.labels[node], bundle.selector)

    def best(self, bundle: Bundle, nodes: Sequence[int]) -> int | None:
        """The node that keeps the largest part of what the bundle asks for (scorer.cc,
        LeastResourceScorer). Scores are rounded: Ray adds them in any order, so that equal nodes
        differ by float noise."""
        best, best_score = None, -1.0
        for node in nodes:
            if not self.takes(node, bundle):
                continue
            sums = self.sums[node]
            score = round(sum(1 - need / left(sums, r) for r, need in bundle.needs.items()), 9)
            if score > best_score:
                best, best_score = node, score
        return best


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Ray's label selectors: "v", "!v", "in(a,b)", "!in(a,b)"; a missing label is not anything."""
    for key, wanted in selector.items():
        negated = wanted.startswith("!")
        text = wanted.removeprefix("!").strip()
        values = text[3:-1].split(",") if text.startswith("in(") and text.endswith(")") else [text]
        is_one = key in labels and labels[key] in [value.strip() for value in values]
        if is_one == negated:
            return False
    return True


def scarce_first(bundles: Sequence[Bundle]) -> list[int]:
    """The order in which GCS places bundles: GPUs first, then custom resources, memory, CPUs, each
    the largest first (bundle_scheduling_policy.cc, SortRequiredResources)."""
    named = {resource for bundle in bundles for resource in bundle.needs}
    keys = ("GPU", *sorted(named - {"GPU", *PREDEFINED}), *PREDEFINED)
    return sorted(
        range(len(bundles)), key=lambda index: [-bundles[index].needs.get(key, 0) for key in keys]
    )


def pick_packed(bundles: Sequence[Bundle], view: View) -> dict[int, int] | None:
    """PACK: the best node for the scarcest bundle, then all others that it takes too; and so on."""
    picked: dict[int, int] = {}
    waiting, candidates = scarce_first(bundles), list(view.sums)
    while waiting:
        node = view.best(bundles[waiting[0]], candidates)
        if node is None:
            return None
        candidates.remove(node)
        for index in tuple(waiting):
            if view.takes(node, bundles[index]):
                view.deduct(node, bundles[index].needs)
                picked[index] = node
                waiting.remove(index)
    return picked


def pick_one_node(bundles: Sequence[Bundle], view: View) -> dict[int, int] | None:
    """STRICT_PACK: the best node for the sum of all bundles."""
    node = view.best(together(bundles), list(view.sums))
    return None if node is None else dict.fromkeys(range(len(bundles)), node)


def pick_apart(bundles: Sequence[Bundle], view: View, strict: bool = True) -> dict[int, int] | None:
    """STRICT_SPREAD: a node of its own for each bundle; SPREAD uses a node again where it must."""
    picked: dict[int, int] = {}
    for index in scarce_first(bundles):
        used = set(picked.values())
        node = view.best(bundles[index], [node for node in view.sums if node not in used])
        if node is None and not strict:
            node = view.best(bundles[index], [node for node in view.sums if node in used])
        if node is None:
            return None
        view.deduct(node, bundles[index].needs)
        picked[index] = node
    return picked


def together(bundles: Sequence[Bundle]) -> Bundle:
    needs: dict[str, int] = {}
    selector: dict[str, str] = {}
    for bundle in bundles:
        selector.update(bundle.selector)
        for resource, need in bundle.needs.items():
            needs[resource] = needs.get(resource, 0) + need
    return Bundle(needs, selector)


PICKERS: Mapping[str, Callable[[Sequence[Bundle], View], dict[int, int] | None]] = {
    "PACK": pick_packed,
    "SPREAD": partial(pick_apart, strict=False),
    "STRICT_PACK": pick_one_node,
    "STRICT_SPREAD": pick_apart,
}


# -- both together: one replica ----------------------------------------------------------------


@dataclass(frozen=True)
class Placing:
    """One replica placed, or not (`slots` is None); `refused`: a raylet refused what GCS picked."""

    stocks: tuple[Stock, ...]
    slots: Replica | None
    refused: bool


def place_replica(stocks: tuple[Stock, ...], bundles: Sequence[Bundle], strategy: str) -> Placing:
    """Place one replica as GCS and raylets do in the end.

    Among equal nodes GCS takes a random one, and another one at its next attempt: so one order in
    which it works is enough.
    """
    labels = {node: stock.labels for node, stock in enumerate(stocks)}
    fresh = View({node: stock.sums for node, stock in enumerate(stocks)}, labels)
    refused_once = False
    for shift in range(min(max(1, len(stocks)), ORDERS_TRIED)):
        view = fresh.copy([*range(shift, len(stocks)), *range(shift)])
        while (picked := PICKERS[strategy](bundles, view.copy())) is not None:
            (after, slots), refused = prepare(stocks, bundles, picked)
            if not refused:
                return Placing(after, slots, refused_once)
            refused_once = True
            outright = [node for node, first in refused.items() if first]
            if not outright:
                break  # the same nodes again, mostly for ever
            for index, node in picked.items():
                if node in outright:
                    view.deduct(node, bundles[index].needs)
        if not refused_once:
            break  # not even by sums
    return Placing(stocks, None, refused_once)


def prepare(
    stocks: Sequence[Stock], bundles: Sequence[Bundle], picked: Mapping[int, int]
) -> tuple[tuple[tuple[Stock, ...], Replica], dict[int, bool]]:
    """Ask the picked raylets; return what they would have then, and which of them refuse.

    The flag says that it refused its first bundle: then nothing changed there, it reports nothing
    to GCS, and GCS keeps the deduction. Otherwise GCS sees the truth again, and picks it again.
    """
    after, slots = list(stocks), []
    refused: dict[int, bool] = {}
    touched: set[int] = set()
    for index, bundle in enumerate(bundles):
        node = picked[index]
        if node in refused:
            continue
        granted = grant(after[node], bundle, node)
        if granted is None:
            refused[node] = node not in touched
            continue
        after[node] = granted[0]
        slots.append(granted[1])
        touched.add(node)
    return (tuple(after), tuple(slots)), refused


# -- the ledger: one deployment after the other ------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """What is free where, after what was placed. A value: `place` returns the next one."""

    stocks: tuple[Stock, ...]
    empty: tuple[Stock, ...]
    holders: Holders = field(default_factory=dict)
    placed: tuple[tuple[str, Slot], ...] = ()
    contended: bool = False  # something waits that GCS picks nodes for, in vain

    @classmethod
    def of(
        cls,
        nodes: Sequence[Node],
        holders: Holders | None = None,
    ) -> Ledger:
        """`holders` says what runs on each node (by name): ("app/deployment", its resources)."""
        stocks = tuple(stock_of(node, node.free, node.free_gpus) for node in nodes)
        return cls(stocks, tuple(stock_of(node, node.total) for node in nodes), holders or {})

    def place(self, demand: Demand) -> tuple[Fitting, Ledger]:
        """Place the minimum of replicas; those that fit stay placed even if others do not."""
        bundles, wanted = bundles_of(demand), demand.min_replicas
        filling = fill(self.stocks, bundles, demand.strategy, wanted)
        replicas = filling.replicas
        slots = tuple((label_of(demand), slot) for replica in replicas for slot in replica)
        after = replace(
            self,
            stocks=filling.stocks,
            placed=self.placed + slots,
            contended=self.contended or filling.waits_refused,
        )
        if replicas and len(replicas) == wanted:
            sure = not (filling.refused or self.contended)
            return Fitting(demand, Fit.FITS, replicas, wanted, sure=sure), after
        # What scales from zero must be able to have one replica.
        alone = fill(self.empty, bundles, demand.strategy, max(1, wanted))
        if len(alone.replicas) < max(1, wanted):
            emptied = replace(self, stocks=alone.stocks, placed=(), holders={})
            shortage, fit, waits = explain(emptied, demand), Fit.NEVER, alone.waits_refused
        elif len(replicas) < wanted:
            shortage, fit, waits = explain(after, demand), Fit.NOT_NOW, filling.waits_refused
        else:
            return Fitting(demand, Fit.FITS, (), 0), after
        sure = len(bundles) == 1 or not waits  # one bundle that all raylets refuse fits nowhere
        return Fitting(demand, fit, replicas, len(replicas), shortage, sure), after

    def room_for(self, demand: Demand, limit: int) -> int:
        """How many more replicas of this deployment would fit, up to `limit`."""
        return len(fill(self.stocks, bundles_of(demand), demand.strategy, limit).replicas)


@dataclass(frozen=True)
class Filling:
    """Equal replicas placed one after the other, up to the first that finds no place."""

    replicas: tuple[Replica, ...]
    stocks: tuple[Stock, ...]
    refused: bool = False
    waits_refused: bool = False


def fill(
    stocks: tuple[Stock, ...], bundles: Sequence[Bundle], strategy: str, count: int
) -> Filling:
    replicas: list[Replica] = []
    refused = False
    while len(replicas) < count:
        placing = place_replica(stocks, bundles, strategy)
        refused = refused or placing.refused
        if placing.slots is None:
            return Filling(tuple(replicas), stocks, refused, placing.refused)
        stocks = placing.stocks
        replicas.append(placing.slots)
    return Filling(tuple(replicas), stocks, refused)


def place_all(demands: Sequence[Demand], ledger: Ledger) -> tuple[tuple[Fitting, ...], Ledger]:
    fittings = []
    for demand in demands:
        fitting, ledger = ledger.place(demand)
        fittings.append(fitting)
    return tuple(fittings), ledger


def predict(
    demands: Sequence[Demand],
    nodes: Sequence[Node],
    holders: Holders | None = None,
) -> Prediction:
    """Place every demand's minimum in the given order; then tell how far each alone could grow."""
    start = Ledger.of(nodes, holders)
    fittings, ledger = place_all(demands, start)
    adviser = Adviser(fittings, start, nodes)
    grown = []
    for index, fitting in enumerate(fittings):
        if fitting.shortage is None:
            more = ledger.room_for(
                fitting.demand, fitting.demand.max_replicas - len(fitting.replicas)
            )
            grown.append(replace(fitting, room_for=len(fitting.replicas) + more))
        else:
            advice = tuple(adviser.advice(index, fitting.shortage))
            grown.append(replace(fitting, shortage=replace(fitting.shortage, help=advice)))
    return Prediction(tuple(nodes), tuple(grown), ledger)


# -- misfits: what is short, and what would help ------------------------------------------------


def explain(ledger: Ledger, demand: Demand) -> Shortage:
    """Why one more replica does not fit: the scarcest resource that no node has enough of."""
    bundles = bundles_of(demand)
    single = [(bundle, has_device_room) for bundle in bundles]
    whole = [(together(bundles), has_sum)] if demand.strategy == "STRICT_PACK" else []
    for bundle, has_room in single + whole:
        nodes = [n for n, s in enumerate(ledger.stocks) if matches(s.labels, bundle.selector)]
        if not nodes:
            labels = ", ".join(f"{key}: {value}" for key, value in bundle.selector.items())
            detail = f"no node matches the labels {labels}" if labels else "there is no live node"
            return Shortage("", 0.0, detail=detail)
        for resource in sorted(bundle.needs, key=lambda r: (r == "CPU", r != "GPU", r)):
            need = bundle.needs[resource]
            if not any(has_room(ledger.stocks[n], resource, need) for n in nodes):
                return shortage_of(ledger, nodes, resource, need)
    one = format_amounts({r: need / UNITS for r, need in together(bundles).needs.items()})
    where = "on one node" if len(bundles) == 1 or whole else f"in {len(bundles)} bundles"
    return Shortage("", 0.0, detail=f"needs {one} {where} ({demand.strategy})")


def has_device_room(stock: Stock, resource: str, need: int) -> bool:
    return (
        allocate(stock.instances.get(resource) or (left(stock.sums, resource),), need) is not None
    )


def has_sum(stock: Stock, resource: str, need: int) -> bool:
    return left(stock.sums, resource) >= need


def shortage_of(ledger: Ledger, nodes: Sequence[int], resource: str, need: int) -> Shortage:
    """The nearest that the nodes come to `need`, now and when they are empty."""

    def largest(stocks: Sequence[Stock]) -> tuple[int, int, int | None]:
        by_share = resource in PER_DEVICE and need < UNITS
        found: tuple[int, int, int | None] = (-1, 0, None)
        for node in nodes:
            shares = stocks[node].instances.get(resource) or (left(stocks[node].sums, resource),)
            if resource in PER_DEVICE and need >= UNITS:
                shares = (sum(share for share in shares if share == UNITS),)
            index = max(range(len(shares)), key=lambda i: shares[i])
            if shares[index] > found[0]:
                found = (shares[index], node, index if by_share else None)
        return found

    free, node, device = largest(ledger.stocks)
    total, total_node, _ = largest(ledger.empty)
    where = f"node {ledger.stocks[node].name}"
    return Shortage(
        resource=resource,
        needed=need / UNITS,
        largest_free=free / UNITS,
        free_where=where if device is None else f"{where}, {resource} {device}",
        largest_total=total / UNITS,
        total_where=f"node {ledger.stocks[total_node].name}",
        held_by=tuple(holders_of(ledger, node, resource, device)),
    )


def holders_of(ledger: Ledger, node: int, resource: str, device: int | None) -> list[str]:
    """Who has the resource on that node: by this plan (on that device), and what already runs."""
    held: dict[str, float] = {}
    for label, slot in ledger.placed:
        if slot.node == node:
            amount = slot.resources.get(resource, 0.0)
            if device is not None and resource == "GPU":
                amount = dict(slot.gpus).get(device, 0.0)
            held[label] = held.get(label, 0.0) + amount
    for label, amounts in ledger.holders.get(ledger.stocks[node].name, ()):
        held[label] = held.get(label, 0.0) + amounts.get(resource, 0.0)
    most = sorted((label for label in held if held[label]), key=lambda label: -held[label])
    texts = [f"{label} {format_amount(resource, held[label])}" for label in most[:3]]
    return texts + [f"{len(most) - 3} others"] * (len(most) > 3)  # noqa: PLR2004


class Adviser:
    """Finds changes that make a misfit fit and push nothing else out. Each is tried by predicting
    again, as long as the effort lasts."""

    def __init__(self, fittings: Sequence[Fitting], start: Ledger, nodes: Sequence[Node]) -> None:
        self.demands = [fitting.demand for fitting in fittings]
        self.fitting = {i for i, fitting in enumerate(fittings) if fitting.fit is Fit.FITS}
        self.placed = [len(fitting.replicas) for fitting in fittings]
        self.start = start
        self.nodes = nodes
        self.effort = HELP_EFFORT

    def advice(self, index: int, shortage: Shortage) -> Iterator[str]:
        if shortage.resource:
            yield from self.lower_amount(index, shortage)
        yield from self.fewer_replicas(index)
        yield from self.one_more_node(index)

    def works(self, index: int, change: Mapping[int, Demand], extra: Sequence[Node] = ()) -> bool:
        demands = [change.get(i, demand) for i, demand in enumerate(self.demands)]
        added = Ledger.of(extra)
        ledger = replace(
            self.start,
            stocks=self.start.stocks + added.stocks,
            empty=self.start.empty + added.empty,
        )
        self.effort -= len(ledger.stocks) * sum(demand.min_replicas for demand in demands)
        if self.effort < 0:
            return False
        fits = {i for i, f in enumerate(place_all(demands, ledger)[0]) if f.fit is Fit.FITS}
        return fits >= self.fitting | {index}

    def lower_amount(self, index: int, shortage: Shortage) -> Iterator[str]:
        """The largest round amount that fits: a part of what is free, or an even part of a GPU."""
        demand, resource = self.demands[index], shortage.resource
        parts = range(1, demand.min_replicas + 1)
        wholes = {1.0, shortage.largest_free} if resource in PER_DEVICE else set()
        for stock in self.start.stocks:
            wholes |= {share / UNITS for share in stock.instances.get(resource, ())}
            wholes.add(left(stock.sums, resource) / UNITS)
        amounts = {rounded_down(resource, whole / part) for whole in wholes for part in parts}
        for amount in sorted((a for a in amounts if 0 < a < shortage.needed), reverse=True)[:12]:
            bundles = tuple(
                {r: a * amount / shortage.needed if r == resource else a for r, a in b.items()}
                for b in demand.bundles
            )
            changed = replace(demand, bundles=bundles)
            if self.works(index, {index: changed}):
                option = {"CPU": "num_cpus", "GPU": "num_gpus"}.get(resource, resource)
                yield f"lower {option} to {format_amount(resource, changed.reserved[resource])}"
                return

    def fewer_replicas(self, index: int) -> Iterator[str]:
        """Its own minimum down to what fits, or the minimum of another deployment."""
        options = [(index, self.placed[index])] if self.placed[index] else []
        for other, demand in enumerate(self.demands):
            if other != index and self.placed[other] > 1:
                options += [(other, count) for count in {demand.min_replicas - 1: 0, 1: 0}]
        found: set[bool] = set()
        for which, count in options:
            demand = self.demands[which]
            if (which == index) not in found and self.works(
                index, {which: replace(demand, min_replicas=count)}
            ):
                found.add(which == index)
                yield (
                    f"lower min_replicas of {label_of(demand)} "
                    f"from {demand.min_replicas} to {count}"
                )

    def one_more_node(self, index: int) -> Iterator[str]:
        """A copy of a node that there is, or else one that is as large as the replica."""
        shapes = {tuple(sorted(node.total.items())): node for node in self.nodes}
        for node in list(shapes.values())[:3]:
            empty = replace(node, free=node.total, free_gpus=())
            if self.works(index, {}, [empty]):
                yield f"add a node like {node.name}"
                return
        demand = self.demands[index]
        count = max(1, demand.min_replicas)
        total = {
            r: math.ceil(a * count) if r in PER_DEVICE else a * count
            for r, a in demand.reserved.items()
        }
        if self.works(index, {}, [Node("new", total, total)]):
            yield f"add a node with {format_amounts(total)}"


def rounded_down(resource: str, amount: float) -> float:
    """A number that one would write: 0.33, 3, a tenth of a gigabyte."""
    if resource in ("memory", "object_store_memory"):
        return math.floor(amount / 1e8) * 1e8
    return math.floor(amount) if amount >= 1 else math.floor(amount * 100 + 1e-6) / 100


# -- as text -----------------------------------------------------------------------------------


def format_amount(resource: str, amount: float) -> str:
    """ "0.45", "0.10", "1", "16"; bytes as "2 GB"."""
    if resource in ("memory", "object_store_memory"):
        return f"{amount / 1e9:.3g} GB"
    rounded = round(amount, 4)
    return (
        f"{rounded:.0f}"
        if rounded == int(rounded)
        else f"{rounded:.4f}"[:-2] + (f"{rounded:.4f}"[-2:].rstrip("0"))
    )


def format_amounts(resources: Resources) -> str:
    return " + ".join(f"{format_amount(r, a)} {r}" for r, a in sorted(resources.items()))


def format_prediction(prediction: Prediction) -> list[str]:
    """The packing node by node, how far the deployments could grow, and what does not fit."""
    lines = ["predicted packing at min replicas (Ray decides in the end):"]
    for index, node in enumerate(prediction.nodes):
        lines += format_gpus(prediction.ledger, index)
        if node.total.get("CPU"):
            lines.append(format_cpus(prediction.ledger, index))
    for fitting in prediction.fittings:
        demand = fitting.demand
        if fitting.shortage is not None:
            lines.append(format_misfit(fitting))
            continue
        if not fitting.sure:
            lines.append(f"{fitting.label}: {UNSURE}")
        if demand.max_replicas > demand.min_replicas:
            lines.append(
                f"{fitting.label}: room for {fitting.room_for} of {demand.max_replicas} replicas"
            )
    return lines


def format_gpus(ledger: Ledger, node: int) -> list[str]:
    """One line a GPU; neighbours with nothing to tell apart share one."""
    stock, texts = ledger.stocks[node], []
    for device, free in enumerate(stock.instances.get("GPU", ())):
        shares = Counter(
            (label, dict(slot.gpus)[device])
            for label, slot in ledger.placed
            if slot.node == node and device in dict(slot.gpus)
        )
        held = [
            f"{label} {f'{count} x ' * (count > 1)}{format_amount('GPU', share)}"
            for (label, share), count in shares.items()
        ]
        running = 1 - free / UNITS - sum(share * count for (_, share), count in shares.items())
        if round(running, 4) > 0:
            held.append(f"already running {format_amount('GPU', running)}")
        texts.append(
            f"{' + '.join(held)} · " * bool(held) + f"{format_amount('GPU', free / UNITS)} free"
        )
    lines, first = [], 0
    for device, text in enumerate(texts):
        if device + 1 < len(texts) and texts[device + 1] == text and "+" not in text:
            continue
        span = f"{first}" if first == device else f"{first}-{device}, each"
        lines.append(f"node {stock.name} · GPU {span}: {text}")
        first = device + 1
    return lines


def format_cpus(ledger: Ledger, node: int) -> str:
    total, free = ledger.empty[node].sums["CPU"], ledger.stocks[node].sums["CPU"]
    planned = sum(s.resources.get("CPU", 0.0) for _, s in ledger.placed if s.node == node)
    running = (total - free) / UNITS - planned
    others = f", {format_amount('CPU', running)} by what runs" if round(running, 4) > 0 else ""
    return (
        f"node {ledger.stocks[node].name} · CPU: {format_amount('CPU', planned)} of "
        f"{format_amount('CPU', total / UNITS)} used by this plan{others}, "
        f"{format_amount('CPU', free / UNITS)} free"
    )


def format_misfit(fitting: Fitting) -> str:
    shortage, demand = fitting.shortage, fitting.demand
    if shortage is None:
        return f"{fitting.label}: fits"
    resource, never = shortage.resource, fitting.fit is Fit.NEVER
    amount = format_amount(resource, shortage.needed)
    if not resource:
        reason = shortage.detail
    elif never and shortage.largest_total < shortage.needed:
        largest = format_amount(resource, shortage.largest_total)
        reason = (
            f"needs {amount} {resource}; no node has {amount} {resource}: "
            f"the largest has {largest} ({shortage.total_where})"
        )
    else:
        held = f", held by {' + '.join(shortage.held_by)}" if shortage.held_by else ""
        shared = resource in PER_DEVICE and shortage.needed < 1
        kind = "largest free share" if shared else "most that one node has free"
        largest = format_amount(resource, shortage.largest_free)
        reason = f"needs {amount} {resource}; the {kind} is {largest} ({shortage.free_where}{held})"
    found = f"{len(fitting.replicas)} of {demand.min_replicas} replicas fit"
    parts = [f"predicted: {fitting.fit.value}", *([found] if fitting.replicas else []), reason]
    parts += [", or ".join(shortage.help)] if shortage.help else []
    return f"{fitting.label}: {'; '.join(parts)}"


# ======================================================================================
# 6. Changes: config and what runs → what a run does with each application
# ======================================================================================

LIGHTWEIGHT_OPTIONS = (
    "num_replicas",
    "autoscaling_config",
    "max_ongoing_requests",
    "max_queued_requests",
    "user_config",
    "health_check_period_s",
    "health_check_timeout_s",
    "graceful_shutdown_wait_loop_s",
    "graceful_shutdown_timeout_s",
    "backpressure_config",
    "logging_config",
    "max_constructor_retry_count",
    "rolling_update_percentage",
    "max_surge_percent",
)
"""Deployment options that Serve changes in place, without a new replica."""


def restart_relevant(config: Config) -> Config:
    """The part of a normalised application whose change needs new replicas.

    `deployments` overrides are not in it: Serve compares those itself, deployment by deployment.
    """
    kept = {key: unshared(config.get(key)) for key in ("import_path", "runtime_env", "args")}
    args = kept["args"] or {}
    option_sets = [llm.get("deployment_config") for _, llm in llm_configs(kept)]
    for options in [*option_sets, args.get("ingress_deployment_config")]:
        for key in LIGHTWEIGHT_OPTIONS:
            if isinstance(options, dict):
                options.pop(key, None)
    return kept


def version_of(application: ApplicationSpec) -> str:
    """A fingerprint of what needs new replicas when it changes; Serve compares it for itself."""
    text = json.dumps(restart_relevant(application.config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def decide(
    application: ApplicationSpec,
    running: Running | None,
    options: Options,
    *,
    mark: str,
    claim: Claim | None = None,
) -> Action:
    """Compare one application with what runs under its name; `claim` is another run's.

    A version is a fingerprint, and after a dot a mark where equal fingerprints have to restart:
    Serve takes an application with the version of a failed one for the failed one. `mark` is such
    a mark that was not used before.
    """
    action = compare(application, running, force=options.force, mark=mark)
    if running is not None and running.state.source == "declarative":
        action = replace(action, reasons=(*action.reasons, COMES_BACK))
    if claim is not None and action.change is not Change.UNCHANGED:
        action = replace(action, refusal=claimed_by(claim))
    surge = options.no_downtime and action.change is Change.RESTART
    return replace(action, before=running, surge=surge)


def changes(action: Action) -> bool:
    """Whether an application has to be built and submitted."""
    return action.change in (Change.CREATE, Change.IN_PLACE, Change.RESTART) and not action.refusal


PRUNED = "the file does not name it (--prune)"


def deletion(
    application: ApplicationSpec,
    running: Mapping[str, Running],
    claims: Mapping[str, Claim],
    reason: str = "--delete",
) -> Action:
    """Delete an application, if it is there."""
    claim, before = claims.get(application.name), running.get(application.name)
    declared = before is not None and before.state.source == "declarative"
    return Action(
        application,
        Change.DELETE,
        reasons=(reason, COMES_BACK) if declared else (reason,),
        refusal=claimed_by(claim) if claim else None,
        before=before,
    )


COMES_BACK = (
    "what `serve deploy` brought comes back when Serve's controller restarts, until `serve deploy` "
    "runs with a file without it"
)
"""The controller applies its checkpoint of the declarative config again (seen on Ray 2.60;
ray/serve/_private/controller.py `_recover_state_from_checkpoint`)."""


def claimed_by(claim: Claim) -> Cause:
    return Cause(
        f"another run of this program works on it: process {claim.pid} on {claim.host}, "
        f"since {claim.since}",
        "wait until it has ended, or stop it, and run this again",
    )


def compare(
    application: ApplicationSpec, running: Running | None, *, force: bool, mark: str
) -> Action:
    """What has to happen to an application, and why."""
    fingerprint = version_of(application)
    if running is None:
        return Action(application, Change.CREATE, fingerprint)
    record = running.record
    if force:
        reason = "--force"
    elif running.state.source == "declarative":
        reason = "it was deployed by `serve deploy`: there is nothing to compare with"
    elif record is None or running.versions != {record.version}:
        reason = "it was deployed by other means: there is nothing to compare with"
    elif running.state.broken:
        reason = f"it is {running.state.status}"
    else:
        return compare_configs(application, running.state, record)
    used = any(version.partition(".")[0] == fingerprint for version in running.versions)
    version = f"{fingerprint}.{mark}" if used else fingerprint
    return Action(application, Change.RESTART, version, (reason,))


def compare_configs(
    application: ApplicationSpec, state: ApplicationState, record: Record
) -> Action:
    """What an edit needs, for an application whose last deployment is known."""
    edits = differences(record.config, application.sealed)
    heavy = tuple(edit.text for edit in edits if edit.restarts)
    light = tuple(edit.text for edit in edits if not edit.restarts)
    fingerprint = version_of(application)
    if record.version.partition(".")[0] != fingerprint:
        return Action(application, Change.RESTART, fingerprint, heavy)
    if heavy:
        named = [overridden(application, edit.path) for edit in edits if edit.restarts]
        restarting = None if None in named else frozenset(filter(None, named))
        return Action(application, Change.RESTART, record.version, heavy, restarting)
    if light:
        return Action(application, Change.IN_PLACE, record.version, light)
    if state.status != "RUNNING":
        return Action(application, Change.IN_PLACE, record.version, (f"it is {state.status}",))
    return Action(application, Change.UNCHANGED, record.version)


def overridden(application: ApplicationSpec, path: KeyPath) -> str | None:
    """The deployment that an edit in `deployments` is about; None when that is not one alone."""
    if path[:1] != ("deployments",) or not path[1:]:
        return None
    entry: Config = application.sealed["deployments"][path[1]]
    return str(entry["name"])


SURGE_PERCENT = 20
"""How many replicas more than wanted --no-downtime starts at a time: as many as Serve otherwise
stops, max(20%, 1) (ray/serve/_private/deployment_state.py)."""


def restarted(action: Action) -> list[DeploymentState]:
    """The deployments whose running replicas a restart replaces."""
    if action.change is not Change.RESTART or action.before is None:
        return []
    return [
        deployment
        for deployment in action.before.state.deployments
        if action.restarting is None or deployment.name in action.restarting
    ]


def gap(action: Action) -> str:
    """What a restart means for those who send requests; empty when nothing restarts."""
    deployments = [d for d in restarted(action) if d.running]
    if not deployments:
        return ""
    if action.surge:
        return "no gap: new replicas start before the old ones stop (--no-downtime)"
    alone = [d.name for d in deployments if d.target_replicas <= 1]
    if not alone:
        return "rolling: Serve stops a fifth of the replicas at a time, and at least one"
    return (
        f"with a gap: Serve stops the one replica of {' and of '.join(alone)} before it starts the "
        "new one (--no-downtime starts the new one first, where there is room)"
    )


def counted(action: Action, demands: Sequence[Demand]) -> tuple[Demand, ...]:
    """What the plan has to find room for: everything, or, where the old replicas stay until the
    new ones run, the new ones that start at once."""
    if not action.surge:
        return tuple(demands)
    targets = {deployment.name: deployment.target_replicas for deployment in restarted(action)}
    return tuple(
        replace(demand, min_replicas=math.ceil(targets[demand.deployment] * SURGE_PERCENT / 100))
        if demand.deployment in targets
        else replace(demand, min_replicas=0)
        if action.restarting is not None
        else demand
        for demand in demands
    )


def moving(actions: Iterable[Action]) -> frozenset[str]:
    """The applications whose replicas of now give up what they hold before the new ones start."""
    return frozenset(
        action.application.name
        for action in actions
        if not action.surge and not action.refusal and action.change is not Change.UNCHANGED
    )


def taken_routes(
    applications: Sequence[ApplicationSpec], states: Mapping[str, ApplicationState]
) -> Findings:
    """The routes that other running applications hold: Serve would refuse the second one."""
    holders = {state.route_prefix: state for state in states.values() if state.status != "DELETING"}
    findings = []
    for application in applications:
        route = application.route_prefix
        holder = holders.get(route)
        if route is None or holder is None or holder.name == application.name:
            continue
        origin = " (deployed by `serve deploy`)" if holder.source == "declarative" else ""
        findings.append(
            Finding(
                ("applications", application.index, "route_prefix"),
                f"{route} is the route of {holder.name}, which is running{origin}",
                f"choose another route, or delete {holder.name} first",
            )
        )
    return findings


@dataclass(frozen=True)
class Difference:
    """One edit of a normalised config, as people read it."""

    path: KeyPath
    text: str
    restarts: bool


def differences(before: Any, after: Any, path: KeyPath = ()) -> tuple[Difference, ...]:
    """What was edited: "args.llm_configs[0].engine_kwargs.max_model_len: 2048 → 4096"."""
    pairs: list[tuple[Any, Any, Any]]
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        pairs = [(key, before.get(key), after.get(key)) for key in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(index, old, after[index]) for index, old in enumerate(before)]
    elif before == after:
        return ()
    else:
        text = f"{format_key(path)}: {format_value(before)} → {format_value(after)}"
        return (Difference(path, text, restarts=needs_restart(path)),)
    return tuple(edit for key, old, new in pairs for edit in differences(old, new, (*path, key)))


def needs_restart(path: KeyPath) -> bool:
    """Whether a change at this place of an application needs new replicas."""
    if path[:1] in (("route_prefix",), ("logging_config",), ("external_scaler_enabled",)):
        return False
    for parent, option in itertools.pairwise(path):
        if parent in ("deployment_config", "ingress_deployment_config"):
            return option not in LIGHTWEIGHT_OPTIONS
    if path[:1] == ("deployments",):
        return not {*path[2:3]} <= {*LIGHTWEIGHT_OPTIONS, "name"}
    return True


def format_value(value: Any) -> str:
    """A value in one line; a secret's never."""
    if isinstance(value, str) and value.startswith(SEAL):
        return "***"
    text = "(not given)" if value is None else json.dumps(value, default=str)
    return shortened(text, MOST_VALUE_CHARACTERS)


# ======================================================================================
# 7. Ray: the only section that imports Ray, and the only one that knows its private parts
# ======================================================================================

SERVE_NAMESPACE = "serve"
SERVE_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
REPLICA_PREFIX = "SERVE_REPLICA::"
RECORDS, LAST_GOOD, CLAIMS = "app_v5", "app_v5/last_good", "app_v5/claims"
"""What this program keeps in the key-value store of the head node, by application: see `remember`,
`keep_last_good` and `claim`."""

CONNECT_TIMEOUT_S = 10.0
POLL_TIMEOUT_S = 5.0
CONTROLLER_TIMEOUT_S = 30.0
"""How long the controller may take to answer: to a poll, which comes again, and to other calls, in
which it may restart."""

MOST_BODY_BYTES = 2**20

START_HINT = "start one with `ray start --head`, or give another with --address or RAY_ADDRESS"
TOKEN_HINT = (
    "something listens there: if it is a Ray head that wants a token, set RAY_AUTH_MODE=token (and "
    "RAY_AUTH_TOKEN_PATH, if the token is not in ~/.ray/auth_token)"
)
MOST_LOGS, LOG_LINES = 3, 400
DEATHS = {
    "oom_context": "OutOfMemoryError",
    "runtime_env_failed_context": "RuntimeEnvSetupError",
}
"""What Ray calls the causes of an actor's death (ActorDeathCause in common.proto)."""


class Builder:
    """Imports, builds and submits applications, inside one Ray actor.

    It runs in the application's own `runtime_env`, as the build task of `serve deploy` does, so a
    builder that lives in a remote `working_dir` is found, and one that calls `os._exit` or hangs
    takes this process with it and not the program. An actor runs one call at a time, which is the
    one lock that `RequestRouterConfig` needs (it edits a process-global pickling table,
    measured on Ray 2.60), and keeps what it imported.
    """

    def __init__(self) -> None:
        self.targets: dict[str, Any] = {}

    def warm_up(self, module: str) -> None:
        """Import a builder's module ahead of its first use; errors are the build's to report."""
        with contextlib.suppress(Exception):
            importlib.import_module(module)

    def build(self, config: Config, route_prefix: str | None) -> list[Config]:
        """Build one application and apply its `deployments` overrides with Ray's own code.

        Returns one mapping a deployment, in plain data: see `read_demand`.
        """
        from ray import get_runtime_context
        from ray._common.utils import import_attr
        from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
        from ray.serve._private.application_state import override_deployment_info
        from ray.serve._private.build_app import build_app
        from ray.serve._private.deploy_utils import deploy_args_to_deployment_info, get_deploy_args
        from ray.serve.schema import ServeApplicationSchema

        schema = ServeApplicationSchema.model_validate(config)
        target = call_user_app_builder_with_args_if_necessary(
            import_attr(schema.import_path), schema.args
        )
        built = build_app(
            target,
            name=schema.name,
            route_prefix=route_prefix,
            default_runtime_env=get_runtime_context().runtime_env,
        )
        built.validate_single_fastapi_ingress()
        infos = {
            deployment.name: deploy_args_to_deployment_info(
                **get_deploy_args(
                    deployment.name,
                    replica_config=deployment._replica_config,
                    deployment_config=deployment._deployment_config,
                    ingress=deployment.name == built.ingress_deployment_name,
                ),
                app_name=schema.name,
            )
            for deployment in built.deployments
        }
        infos = override_deployment_info(infos, schema)
        for info in infos.values():
            if schema.logging_config and info.deployment_config.logging_config is None:
                info.deployment_config.logging_config = schema.logging_config.model_dump()
        # build_app lists deployments in the order of the graph below, each once.
        for node, deployment in zip(graph_nodes(target), built.deployments, strict=True):
            info, bound = infos[deployment.name], node._bound_deployment
            bound._name = deployment.name
            bound._deployment_config = info.deployment_config
            bound._replica_config.update(
                ray_actor_options=info.replica_config.ray_actor_options,
                placement_group_bundles=info.replica_config.placement_group_bundles,
                placement_group_strategy=info.replica_config.placement_group_strategy,
                placement_group_bundle_label_selector=(
                    info.replica_config.placement_group_bundle_label_selector
                ),
                placement_group_fallback_strategy=(
                    info.replica_config.placement_group_fallback_strategy
                ),
                max_replicas_per_node=info.replica_config.max_replicas_per_node,
            )
        self.targets[schema.name] = target
        return [
            describe_deployment(name, info, ingress=name == built.ingress_deployment_name)
            for name, info in infos.items()
        ]

    def submit(
        self, config: Config, route_prefix: str | None, version: str, surge_percent: int
    ) -> None:
        """Hand a built application to Serve without waiting for it to run.

        A stable `_version` lets Serve compare for itself: equal ones change in place, others
        restart (measured on Ray 2.60). `serve.run` would draw a random one. With `surge_percent`
        new replicas start before the old ones stop, where the config does not say so itself.
        """
        from ray import serve

        target = self.targets[config["name"]]
        for node in graph_nodes(target):
            bound = node._bound_deployment
            bound._version = version
            if surge_percent and not bound._deployment_config.max_surge_percent:
                bound._deployment_config.max_surge_percent = surge_percent
        serve.run_many(
            [
                serve.RunTarget(
                    target,
                    name=config["name"],
                    route_prefix=route_prefix,
                    external_scaler_enabled=bool(config.get("external_scaler_enabled")),
                )
            ],
            wait_for_applications_running=False,
        )


def graph_nodes(target: Any) -> list[Any]:
    """The bound applications of a graph, children first, each once, as `build_app` visits them."""
    from ray.dag.py_obj_scanner import _PyObjScanner

    nodes: list[Any] = []
    seen: set[int] = set()

    def visit(node: Any) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        bound = node._bound_deployment
        scanner = _PyObjScanner(source_type=type(target))
        try:
            children = scanner.find_nodes((bound.init_args, bound.init_kwargs))
        finally:
            scanner.clear()
        for child in children:
            visit(child)
        nodes.append(node)

    visit(target)
    return nodes


def describe_deployment(name: str, info: Any, *, ingress: bool) -> Config:
    """One deployment of a built application in plain data (`read_demand` gives it types)."""
    replica, options = info.replica_config, info.deployment_config
    autoscaling = options.autoscaling_config
    return {
        "name": name,
        "ingress": ingress,
        "bundles": replica.placement_group_bundles or [dict(replica.resource_dict)],
        "strategy": replica.placement_group_strategy or "PACK",
        "label_selectors": (replica.placement_group_bundle_label_selector or [])
        if replica.placement_group_bundles
        else [replica.ray_actor_options.get("label_selector") or {}],
        "max_replicas_per_node": replica.max_replicas_per_node,
        "min_replicas": autoscaling.min_replicas if autoscaling else options.num_replicas,
        "initial_replicas": autoscaling.initial_replicas if autoscaling else None,
        "max_replicas": autoscaling.max_replicas if autoscaling else options.num_replicas,
        "autoscaling": autoscaling is not None,
    }


class RayCluster:
    """The effects that the program has on one Ray cluster.

    Every wait has a deadline or ends when `patience` says so. `connect` comes first.
    """

    def __init__(self, worker_logs: bool = False) -> None:
        self.worker_logs = worker_logs
        self.address = ""
        self.dashboard_url = ""
        self.builders: dict[str, Any] = {}
        self.holders: dict[str, Any] = {}
        self.builders_lock = threading.Lock()

    # -- connecting ---------------------------------------------------------------------

    def connect(self, address: str | None) -> None:
        """Join the running cluster at `address`, at RAY_ADDRESS, or on this machine.

        Raises ClusterError when there is none; it never starts one.
        """
        wanted = address or os.environ.get("RAY_ADDRESS") or "auto"
        if "://" in wanted:
            raise ClusterError(
                f"{wanted}: Ray Client and dashboard addresses are not supported",
                "give HOST:PORT of the head (port 6379 by default), or run on a cluster node",
            )
        import ray
        from ray._private.services import canonicalize_bootstrap_address

        try:
            # ray.init would wait for ever for a head that is gone.
            found = canonicalize_bootstrap_address("auto" if wanted == "local" else wanted)
            check_reachable(found)
            context = ray.init(
                # Ray looks for a token (~/.ray/auth_token) only when it finds the cluster itself
                # (ray/_private/worker.py).
                address=wanted if wanted == "auto" else found,
                namespace=SERVE_NAMESPACE,
                log_to_driver=self.worker_logs,
                logging_level=logging.INFO if self.worker_logs else logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            listens = "Failed to connect to Ray cluster" in str(error)
            raise ClusterError(
                f"no Ray cluster{'' if wanted == 'auto' else f' at {wanted}'}: "
                f"{first_line(str(error))}",
                TOKEN_HINT if listens else START_HINT,
            ) from error
        self.dashboard_url = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        self.address = ray.get_runtime_context().gcs_address

    def alive(self) -> bool:
        """Whether the head node answers at all. Ray itself kills a driver that has lost it for a
        minute, without a word (ray gcs_rpc_client/rpc_client.h), so the watcher asks first."""
        try:
            check_reachable(self.address, timeout_s=2.0)
        except ClusterError:
            return False
        return True

    def check_schema(self, document: Document) -> None:
        """Let Ray's own schema look at the normalised config. Raises ConfigError."""
        from pydantic import ValidationError
        from ray.serve.schema import ServeDeploySchema

        applications, _ = read_applications(document)
        config = {**document.data, "applications": [app.config for app in applications]}
        try:
            ServeDeploySchema.model_validate(unshared(config))
        except ValidationError as error:
            findings = [Finding(row["loc"], row["msg"]) for row in error.errors()]
            raise ConfigError(problems_of(document, findings)) from error

    # -- Serve --------------------------------------------------------------------------

    def start_serve(self, config: Config) -> tuple[str, ...]:
        """Start Serve with the config's cluster-wide options, as `serve deploy` does.

        Returns the `http_options` that differ from those of a Serve that is already running (it
        keeps its own). Raises ClusterError when Serve does not come up.
        """
        from ray import serve
        from ray.serve.schema import ServeDeploySchema

        schema = ServeDeploySchema.model_validate({**config, "applications": []})
        http_options = schema.http_options.model_dump()
        running = self.serve_details()
        quiet_serve_loggers(self.worker_logs)
        start = partial(
            serve.start,
            http_options=http_options,
            proxy_location=schema.proxy_location,
            grpc_options=schema.grpc_options.model_dump(),
            logging_config=schema.logging_config,
            tracing_config=schema.tracing_config,
            controller_options=schema.controller_options,
        )
        try:
            try:
                start()
            except ValueError:
                # "already exists": another run has started Serve at the same moment.
                start()
        except Exception as error:
            raise ClusterError(
                f"Ray Serve did not start: {first_line(str(error))}",
                "see the controller's log under /tmp/ray/session_latest/logs/serve",
            ) from error
        if running is None:
            return ()
        current = type(schema.http_options).model_validate(running["http_options"] or {})
        given = (config.get("http_options") or {}).keys()
        now = current.model_dump()
        return tuple(sorted(key for key in given if now.get(key) != http_options.get(key)))

    def ask_controller(
        self, method: str, *arguments: Any, timeout_s: float = CONTROLLER_TIMEOUT_S
    ) -> Any:
        """What a method of Serve's controller returns.

        Ray itself repeats a call when the controller restarts during it (`max_task_retries` in
        ray/serve/_private/default_impl.py). Raises ServeNotRunning, ClusterError when there is no
        answer in time, and RayTaskError for what the method itself raises.
        """
        import ray

        try:
            controller = ray.get_actor(SERVE_CONTROLLER, namespace=SERVE_NAMESPACE)
        except ValueError as error:
            raise ServeNotRunning("Serve is not running") from error
        try:
            return ray.get(getattr(controller, method).remote(*arguments), timeout=timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise ClusterError(f"the Serve controller does not answer: {error}") from error

    def serve_details(self, timeout_s: float = CONTROLLER_TIMEOUT_S) -> Config | None:
        """What the controller knows, in the shape of Ray's `ServeInstanceDetails`; None when Serve
        is not running. 1 ms of CPU; `serve.status()` costs 57 (measured on Ray 2.60)."""
        import ray

        try:
            details: Config = self.ask_controller("get_serve_instance_details", timeout_s=timeout_s)
        except ServeNotRunning:
            return None
        except ray.exceptions.RayTaskError as error:
            raise ClusterError(f"the Serve controller can't tell its state: {error}") from error
        return details

    def states(self, timeout_s: float = CONTROLLER_TIMEOUT_S) -> dict[str, ApplicationState]:
        """The state of every application on the cluster, by name."""
        details = self.serve_details(timeout_s) or {"applications": {}}
        return {name: read_state(app) for name, app in details["applications"].items()}

    def delete(self, name: str) -> None:
        """Have Serve remove an application; it is gone some seconds later."""
        from ray import serve
        from ray.experimental.internal_kv import _internal_kv_del

        serve.delete(name, _blocking=False)
        for namespace in (RECORDS, LAST_GOOD):
            _internal_kv_del(name, namespace=namespace)

    def running(self, states: Iterable[ApplicationState]) -> dict[str, Running]:
        """What this program knows about some applications of the cluster, by name."""
        import ray
        from ray.experimental.internal_kv import _internal_kv_get

        found = {}
        for state in states:
            if state.status == "DELETING":
                continue
            kept = _internal_kv_get(state.name, namespace=RECORDS)
            try:
                infos = [info for info, _ in self.deployment_infos(state).values()]
            except ray.exceptions.RayTaskError:
                infos = []  # a deployment has gone meanwhile: nothing to compare with
            versions = frozenset(info.version for info in infos)
            record = read_record(json.loads(kept)) if kept else None
            found[state.name] = Running(state, versions, record)
        return found

    def deployment_infos(self, state: ApplicationState) -> dict[str, tuple[Any, str]]:
        """What Serve's controller was told about each deployment, and the route of the ingress."""
        from ray.serve.generated.serve_pb2 import DeploymentRoute

        found = {}
        for deployment in state.deployments:
            text = self.ask_controller("get_deployment_info", deployment.name, state.name)
            answer = DeploymentRoute.FromString(text)
            found[deployment.name] = (answer.deployment_info, answer.route)
        return found

    def remember(self, action: Action, demands: Sequence[Demand]) -> None:
        """Leave in the cluster what a later run needs to tell what it would change.

        It lies in the key-value store of the head node, as Serve's own state does; the version in
        it tells whether somebody else has deployed the application since.
        """
        from ray.experimental.internal_kv import _internal_kv_put

        record = Record(action.version, action.application.sealed, tuple(demands))
        text = json.dumps(dataclasses.asdict(record), default=str)
        _internal_kv_put(action.application.name, text, overwrite=True, namespace=RECORDS)

    def keep_last_good(self, running: Running) -> None:
        """Keep, whole, what runs well now, so that a failed edit of it can be undone.

        Kept is what Serve's controller itself keeps in the same store, environment variables
        included; so it can be brought back even if this program did not deploy it.
        """
        from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

        ingresses = {
            demand.deployment
            for demand in (running.record.demands if running.record else ())
            if demand.ingress
        }
        record = _internal_kv_get(running.state.name, namespace=RECORDS) or b""
        kept = {
            "record": record.decode(),
            "route_prefix": running.state.route_prefix,
            "deployments": [
                {
                    "name": name,
                    "info": base64.b64encode(info.SerializeToString()).decode(),
                    "ingress": name in ingresses if ingresses else bool(route),
                }
                for name, (info, route) in self.deployment_infos(running.state).items()
            ],
        }
        text = json.dumps(kept)
        _internal_kv_put(running.state.name, text, overwrite=True, namespace=LAST_GOOD)

    def roll_back(self, name: str) -> None:
        """Hand an application's last good configuration to Serve again, with its old version, so
        that replicas of it that still run stay. Raises ApplicationError when none is kept."""
        import ray
        from ray.experimental.internal_kv import (
            _internal_kv_del,
            _internal_kv_get,
            _internal_kv_put,
        )
        from ray.serve.generated.serve_pb2 import ApplicationArgs, DeploymentArgs, DeploymentInfo

        text = _internal_kv_get(name, namespace=LAST_GOOD)
        if not text:
            raise ApplicationError("no configuration of it is known that ran well")
        kept = json.loads(text)
        arguments = []
        for row in kept["deployments"]:
            info = DeploymentInfo.FromString(base64.b64decode(row["info"]))
            deployment = DeploymentArgs(
                deployment_name=row["name"],
                deployment_config=info.deployment_config.SerializeToString(),
                replica_config=info.replica_config.SerializeToString(),
                deployer_job_id=ray.get_runtime_context().get_job_id(),
                ingress=row["ingress"],
            )
            if row["ingress"] and kept["route_prefix"]:
                deployment.route_prefix = kept["route_prefix"]
            arguments.append(deployment.SerializeToString())
        options = ApplicationArgs().SerializeToString()
        self.ask_controller("deploy_applications", {name: arguments}, {name: options})
        if kept["record"]:
            _internal_kv_put(name, kept["record"], overwrite=True, namespace=RECORDS)
        else:
            _internal_kv_del(name, namespace=RECORDS)

    # -- one run at a time for an application ----------------------------------------------

    def claim(self, names: Iterable[str]) -> dict[str, Claim]:
        """Claim applications for this run. Returns those that another living run has, by name."""
        others = {}
        for name in names:
            holder = self.claim_one(name)
            if holder is not None:
                others[name] = holder
        return others

    def claim_one(self, name: str) -> Claim | None:
        """Claim one application, or tell who has it.

        The store can put a key atomically if it is not there, but not compare and swap. So a claim
        is the next key of a row, valid if it is the latest: two that find the same dead claim put
        the same key, and one of them fails. A run that was killed is a dead job to Ray at once.
        """
        from ray.experimental.internal_kv import (
            _internal_kv_del,
            _internal_kv_get,
            _internal_kv_list,
            _internal_kv_put,
        )

        mine = Claim(self.job_id(), socket.gethostname(), os.getpid(), f"{datetime.now():%F %T}")
        while True:
            keys = sorted(_internal_kv_list(f"{name}\n", namespace=CLAIMS))
            last = keys[-1] if keys else b"\n0"
            text = _internal_kv_get(last, namespace=CLAIMS) if keys else b""
            holder = Claim(**json.loads(text)) if text else None
            if holder is not None and holder.job in self.living_jobs():
                return None if holder == mine else holder
            number = int(last.decode().rpartition("\n")[2]) + 1
            key = f"{name}\n{number:012}"
            text = json.dumps(dataclasses.asdict(mine))
            if not _internal_kv_put(key, text, overwrite=False, namespace=CLAIMS):
                if max(_internal_kv_list(f"{name}\n", namespace=CLAIMS)) == key.encode():
                    for old in keys:
                        _internal_kv_del(old, namespace=CLAIMS)
                    return None
                _internal_kv_del(key, namespace=CLAIMS)

    def job_id(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_job_id())

    def living_jobs(self) -> set[str]:
        from ray._private.state import jobs

        return {job["JobID"] for job in jobs() if not job["IsDead"]}

    def endpoint(self) -> str:
        """The public HTTP address, without a trailing slash: "http://localhost:8000"; empty when
        Serve has no proxy (`proxy_location: Disabled`).

        `root_path` is not in it: that is what a proxy in front of Serve has cut off.
        """
        import ray
        from ray.serve.schema import HTTPOptionsSchema

        details = self.serve_details() or {}
        if plain(details.get("proxy_location")) == "Disabled":
            return ""
        options = HTTPOptionsSchema.model_validate(details.get("http_options") or {})
        proxies = [proxy["node_ip"] for proxy in (details.get("proxies") or {}).values()]
        here = ray.util.get_node_ip_address()
        scheme = "https" if options.ssl_certfile else "http"
        local = not proxies or here in proxies
        loopback = options.host in ("0.0.0.0", "::", "127.0.0.1", "localhost")
        host = "localhost" if local and loopback else options.host if local else proxies[0]
        return f"{scheme}://{host}:{options.port}"

    # -- building and submitting ----------------------------------------------------------

    def prepare(self, applications: Sequence[ApplicationSpec]) -> None:
        """Start the builders' processes and their imports, which take 10 s for an LLM."""
        for application in applications:
            builder = self.builder(application)
            builder.warm_up.remote(import_module_of(application.config["import_path"]))

    def builder(self, application: ApplicationSpec, *, alone: bool = False) -> Any:
        """The actor that builds an application, shared by those with one module and runtime_env."""
        import ray

        runtime_env = application.config.get("runtime_env") or {}
        key = json.dumps(
            [
                application.name if alone else "",
                import_module_of(application.config["import_path"]),
                runtime_env,
            ],
            sort_keys=True,
        )
        with self.builders_lock:
            if key not in self.builders:
                actor = ray.remote(num_cpus=0)(Builder)
                self.builders[key] = actor.options(runtime_env=runtime_env or None).remote()
            return self.builders[key]

    def build(self, application: ApplicationSpec, patience: Patience) -> tuple[Demand, ...]:
        """Ray's own build of one application: what each of its deployments reserves.

        Raises ApplicationError when the import, the builder or an override fails.
        """
        import ray

        try:
            try:
                return self.build_in(self.builder(application), application, patience)
            except ray.exceptions.ActorDiedError:
                # Another application of the same module may have killed the shared process.
                return self.build_in(self.builder(application, alone=True), application, patience)
        except ray.exceptions.RayError as error:
            raise build_failure(error) from error

    def build_in(
        self, builder: Any, application: ApplicationSpec, patience: Patience
    ) -> tuple[Demand, ...]:
        import ray

        call = builder.build.remote(application.config, application.route_prefix)
        try:
            rows = self.wait_for(call, patience)
        except StillDeploying:
            ray.kill(builder)
            raise
        self.holders[application.name] = builder
        return tuple(read_demand(application.name, row) for row in rows)

    def submit(self, action: Action, demands: Sequence[Demand], patience: Patience) -> None:
        """Hand a built application to Serve. Raises ApplicationError when Serve refuses it."""
        import ray

        application = action.application

        def call() -> None:
            builder = self.holders[application.name]
            surge = SURGE_PERCENT if action.surge else 0
            arguments = (application.config, application.route_prefix, action.version, surge)
            self.wait_for(builder.submit.remote(*arguments), patience)

        ran = action.before is not None and action.before.state.status == "RUNNING"
        if action.before and ran and action.attempt == 1:
            self.keep_last_good(action.before)

        try:
            try:
                call()
            except ray.exceptions.ActorDiedError:
                self.build_in(self.builder(application, alone=True), application, patience)
                call()
        except ray.exceptions.RayError as error:
            raise build_failure(error) from error
        self.remember(action, demands)

    def wait_for(self, reference: Any, patience: Patience) -> Any:
        """The value of a Ray call; `patience` ends the wait."""
        import ray

        while not ray.wait([reference], timeout=0.2)[0]:
            patience.check()
        return ray.get(reference)

    # -- resources and logs -----------------------------------------------------------------

    def nodes(self, moving: Collection[str] = ()) -> tuple[tuple[Node, ...], Holders]:
        """The live nodes with what is free on each, and who holds the rest of it there.

        What the replicas of the applications in `moving` hold counts as free: they are about to be
        deployed again. Ray tells what is free on a node only in sums; a GPU's own free share is
        worked out from the replicas that hold parts of it.
        """
        import ray
        from ray._private.state import available_resources_per_node

        available = available_resources_per_node()
        alive = [node for node in ray.nodes() if node["Alive"]]
        addresses = [node["NodeManagerAddress"] for node in alive]
        holdings = self.holdings()
        nodes, holders = [], {}
        for row in alive:
            address, node_id = row["NodeManagerAddress"], row["NodeID"]
            name = address if addresses.count(address) == 1 else f"{address}/{node_id[:6]}"
            here = [(label, held) for where, label, held in holdings if where == node_id]
            staying = [(label, held) for label, held in here if label.split("/")[0] not in moving]
            free = dict(available.get(node_id, {}))
            for label, held in here:
                if (label, held) not in staying:
                    for resource, amount in held.items():
                        free[resource] = free.get(resource, 0.0) + amount
            shares = [held["GPU"] for _, held in staying if held.get("GPU")]
            nodes.append(
                Node(
                    name=name,
                    total=row["Resources"],
                    free=free,
                    free_gpus=initial_free_gpus(
                        row["Resources"].get("GPU", 0.0), shares, free.get("GPU", 0.0)
                    ),
                    labels=row.get("Labels") or {},
                )
            )
            holders[name] = staying
        return tuple(nodes), holders

    def grows(self) -> bool:
        """Whether an autoscaler may add nodes. Without one the head's monitor calls each node a
        type of its own, `node_<id>` (ray/autoscaler/_private/util.py format_readonly_node_type)."""
        from ray.experimental.internal_kv import _internal_kv_get

        status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
        active = (status.get("autoscaler_report") or {}).get("active_nodes") or {}
        return any(not re.fullmatch(r"node_[0-9a-f]{28,}", kind) for kind in active)

    def holdings(self) -> list[tuple[str, str, Resources]]:
        """What every Serve replica holds now: (node id, "application/deployment", resources).

        A replica with a placement group is one row a bundle.
        """
        import ray

        rows: list[tuple[str, str, Resources]] = []
        grouped = set()
        for group in ray.util.placement_group_table().values():
            name = group["name"]
            if group["state"] != "CREATED" or not name.startswith(REPLICA_PREFIX):
                continue
            grouped.add(name)
            application, deployment, _ = name.removeprefix(REPLICA_PREFIX).split("#")
            for index, bundle in group["bundles"].items():
                node_id = group["bundles_to_node_id"][index]
                rows.append((node_id, f"{application}/{deployment}", bundle))
        for app in (self.serve_details() or {"applications": {}})["applications"].values():
            for name, deployment in (app.get("deployments") or {}).items():
                for replica in deployment["replicas"]:
                    held = deployment.get("required_resources") or {}
                    if replica.get("node_id") and replica.get("actor_name") not in grouped:
                        rows.append((replica["node_id"], f"{app['name']}/{name}", held))
        return rows

    def held_by(self, name: str) -> str:
        """What an application's placement groups still hold, in words; empty when nothing."""
        import ray

        held: Counter[str] = Counter()
        for group in ray.util.placement_group_table().values():
            ours = group["name"].startswith(f"{REPLICA_PREFIX}{name}#")
            for bundle in group["bundles"].values() if ours and group["state"] != "REMOVED" else ():
                held.update(bundle)
        return format_resources(held) if held else ""

    def reservations(self, state: ApplicationState) -> tuple[Reservation, ...]:
        """What each running replica of an application holds, from GCS's own tables.

        A replica holds its placement group or its own resources, and what actors hold that it
        started outside of a group. GPU indices come from the actors' resource mappings.
        """
        import ray
        from ray._private.state import state as gcs
        from ray.core.generated.gcs_pb2 import ActorTableData

        groups = {group["name"]: group for group in ray.util.placement_group_table().values()}
        rows = gcs._connect_and_get_accessor().get_actor_table(None, "ALIVE")
        actors = [ActorTableData.FromString(row) for row in rows]
        names = {row["NodeID"]: row["NodeManagerAddress"] for row in ray.nodes()}
        found = []
        for deployment in state.deployments:
            for replica in deployment.replicas:
                name = f"{REPLICA_PREFIX}{state.name}#{deployment.name}#{replica.replica_id}"
                mine = next((a for a in actors if a.actor_id.hex() == replica.actor_id), None)
                if replica.state != "RUNNING" or mine is None:
                    continue
                group, mine_id = groups.get(name), mine.address.worker_id
                group_id = bytes.fromhex(group["placement_group_id"]) if group else None
                children = [a for a in actors if a.owner_address.worker_id == mine_id]
                outside = [a for a in [mine, *children] if not a.placement_group_id]
                inside = [a for a in actors if group_id and a.placement_group_id == group_id]
                held: Counter[str] = Counter()
                for resources in [
                    *(group["bundles"].values() if group else ()),
                    *(dict(actor.required_resources) for actor in outside),
                ]:
                    # "node:..." only says where something is to run.
                    amounts = {
                        k: v for k, v in resources.items() if v and not k.startswith("node:")
                    }
                    held.update(amounts)
                nodes = group["bundles_to_node_id"].values() if group else [mine.node_id.hex()]
                found.append(
                    Reservation(
                        deployment.name,
                        replica.replica_id,
                        dict(held),
                        tuple(dict.fromkeys(names.get(node, node) for node in nodes)),
                        gpu_indices([*outside, *inside]),
                    )
                )
        return tuple(found)

    def fetch(self, url: str, body: Config | None, timeout_s: float) -> Response:
        """GET `url`, or POST `body` to it as JSON. Raises ApplicationError without an answer.

        A certificate is not checked: it is that of the user's own cluster. An answer without an
        end, such as a stream of events, is cut off.
        """
        started = time.monotonic()
        request = urllib.request.Request(
            url,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        context = ssl._create_unverified_context() if url.startswith("https") else None
        try:
            try:
                answer = urllib.request.urlopen(request, timeout=timeout_s, context=context)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                return read_response(answer, started, timeout_s)
        except TimeoutError as error:
            raise ApplicationError(f"no answer within {timeout_s:.0f} s from {url}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                reason = f"no answer within {timeout_s:.0f} s"
            raise ApplicationError(f"{url}: {reason}") from error

    def replica_log(self, actor_id: str) -> str:
        """The ends of a replica's two logs; its engine's processes write into them, too."""
        return "\n".join(self.log_tail(actor_id, suffix) for suffix in ("out", "err"))

    def failure_logs(self, state: ApplicationState) -> list[str]:
        """What the replicas that failed have left, one text each, the latest first.

        Serve kills a replica whose constructor raised, and calls it dead some seconds after it has
        given up on the application; so all that do not run count, of what is not healthy.
        """
        return [self.last_words(r.actor_id) for r in failed_replicas(state)[:MOST_LOGS]]

    def last_words(self, actor_id: str) -> str:
        """The ends of a replica's logs and how its process ended, then the same of its engine's
        workers, which are actors of another job in the replica's placement group."""
        import ray
        from ray.util.state import get_actor, list_actors

        actors: list[Any] = []
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError, OSError):
            replica = get_actor(actor_id, timeout=10)
            actors += [replica] if replica else []
            if replica and replica.placement_group_id:
                ended = [("class_name", "=", "RayWorkerProc"), ("state", "=", "DEAD")]
                workers = list_actors(filters=ended, detail=True, limit=1000, timeout=10)
                group = replica.placement_group_id
                actors += [row for row in workers if row.placement_group_id == group][:MOST_LOGS]
        parts = []
        for actor in actors:
            parts += [self.log_tail(actor.actor_id, suffix) for suffix in ("err", "out")]
            for kind, context in (actor.death_cause or {}).items():
                name = DEATHS.get(kind, "ActorDiedError")
                parts.append(f"{name}: {(context or {}).get('error_message') or ''}")
        return "\n".join(filter(None, parts))

    def starting_log(self, state: ApplicationState) -> str:
        """The ends of the logs of an application's replicas that start now."""
        return "".join(
            self.log_tail(replica.actor_id, suffix)
            for deployment in state.deployments
            for replica in deployment.replicas
            if replica.state == "STARTING" and replica.node
            for suffix in ("out", "err")
        )

    def log_tail(self, actor_id: str, suffix: str) -> str:
        """The end of one actor's "err" or "out" file; empty when Ray has it no more."""
        import ray
        from ray.util.state import get_log

        with contextlib.suppress(ray.exceptions.RayError, RuntimeError, OSError):
            return "".join(get_log(actor_id=actor_id, suffix=suffix, tail=LOG_LINES, timeout=10))
        return ""


def read_response(answer: Any, started: float, timeout_s: float) -> Response:
    """What an `http.client.HTTPResponse` sends in `timeout_s` from `started`, or its first
    `MOST_BODY_BYTES`."""
    parts: list[bytes] = []
    first_s, ended = 0.0, False
    with contextlib.suppress(TimeoutError):
        while time.monotonic() - started < timeout_s and sum(map(len, parts)) < MOST_BODY_BYTES:
            part = answer.read1(MOST_BODY_BYTES)
            first_s = first_s or time.monotonic() - started
            parts.append(part)
            if not part:
                ended = not answer.length  # of what was announced, nothing is missing
                break
    text = b"".join(parts).decode(errors="replace")
    return Response(answer.status, text, first_s, time.monotonic() - started, ended)


def read_demand(application: str, row: Config) -> Demand:
    """`describe_deployment`'s plain data with types."""
    return Demand(
        application=application,
        deployment=row["name"],
        bundles=tuple(
            {key: float(amount) for key, amount in bundle.items() if amount}
            for bundle in row["bundles"]
        ),
        strategy=row["strategy"],
        min_replicas=row["min_replicas"],
        max_replicas=row["max_replicas"],
        initial_replicas=row["initial_replicas"],
        autoscaling=row["autoscaling"],
        ingress=row["ingress"],
        max_replicas_per_node=row["max_replicas_per_node"],
        label_selectors=tuple(row["label_selectors"]),
    )


def gpu_indices(actors: Iterable[Any]) -> tuple[int, ...]:
    """The GPUs that some actors hold parts of. In a placement group a GPU is held under the names
    of the group and of the bundle (ray/gcs.proto ResourceMapEntry)."""
    return tuple(
        sorted(
            {
                part.index
                for actor in actors
                for entry in actor.resource_mapping
                if re.fullmatch(r"GPU(_group_\w+)?", entry.name)
                for part in entry.resource_ids
            }
        )
    )


def read_record(record: Config) -> Record:
    """A record as `remember` left it."""
    demands = []
    for row in record["demands"]:
        tuples = {key: tuple(row[key]) for key in ("bundles", "label_selectors")}
        demands.append(Demand(**{**row, **tuples}))
    return Record(record["version"], record["config"], tuple(demands))


def read_state(app: Config) -> ApplicationState:
    """One application of `ServeInstanceDetails` in our own types; what is not known yet is not
    there (the controller dumps with `exclude_unset`)."""
    return ApplicationState(
        name=app["name"],
        status=plain(app["status"]),
        message=app.get("message") or "",
        route_prefix=app.get("route_prefix"),
        source=plain(app.get("source")),
        deployments=tuple(
            DeploymentState(
                name=name,
                status=plain(deployment["status"]),
                message=deployment.get("message") or "",
                target_replicas=deployment.get("target_num_replicas") or 0,
                replicas=tuple(read_replica(replica) for replica in deployment["replicas"]),
                dead_replicas=tuple(
                    read_replica(replica)
                    for replica in deployment.get("recent_dead_replicas") or ()
                ),
            )
            for name, deployment in (app.get("deployments") or {}).items()
        ),
    )


def read_replica(replica: Config) -> ReplicaState:
    return ReplicaState(
        replica_id=replica["replica_id"],
        state=plain(replica["state"]),
        node=replica.get("node_ip") or "",
        pid=replica.get("pid") or 0,
        actor_id=replica.get("actor_id") or "",
        started_s=replica.get("start_time_s") or 0.0,
        log_file=replica.get("log_file_path") or "",
    )


def plain(value: Any) -> str:
    """Serve's enums, which older and newer versions give as such or as text, as text."""
    return str(getattr(value, "value", value))


def build_failure(error: Exception) -> ApplicationError:
    """What went wrong in a builder's process, for the one application concerned."""
    import ray

    if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
        return ApplicationError(f"the runtime_env could not be set up: {error}")
    if isinstance(error, ray.exceptions.ActorDiedError):
        return ApplicationError(f"the process that builds the application died: {error}")
    return ApplicationError(str(error))


def check_reachable(address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
    """Raise ClusterError unless something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster at {address}: {error}",
            START_HINT,
        ) from error


def import_module_of(import_path: str) -> str:
    """The module of an import path, in both of Ray's forms: "m.n:attribute" and "m.n.attribute"."""
    return import_path.partition(":")[0] if ":" in import_path else import_path.rpartition(".")[0]


def quiet_serve_loggers(worker_logs: bool) -> None:
    """Keep Serve's own log lines out of the terminal unless `--logs` asks for them."""
    if not worker_logs:
        for name in ("ray", "ray.serve", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


# ======================================================================================
# 8. Causes: what Serve and the engine say → the root cause, a hint, the phase of a start
# ======================================================================================

MOST_CAUSE_CHARACTERS = 300
ANSI = re.compile(r"\x1b\[[0-9;]*m|\[\d+m(?=ray::|\))")
LOG_PREFIX = re.compile(
    r"^(?:\([^()]*pid=\d+[^()]*\) ?)*"  # (EngineCore pid=123) (RayWorkerProc pid=124)
    r"(?:(?:ERROR|WARNING|INFO|DEBUG|CRITICAL)\s+[\d-]+\s+[\d:,.]+\s+"
    r"(?:\[[^]]*\]|\S+ \S+ --) ?)?"
)
FRAME = re.compile(r'^\s*File "')
NAMED = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failure|Died|Killed|Timeout|"
    r"NotFound)\w*(?:\([\w.]+\))?(?:: ?.*)?$"
)
UNNAMED = re.compile(r"^[A-Za-z_][\w.]*(?:: .*)?$")
"""An exception's line wherever it stands, and one that only stands below a stack's frames."""

NEXT_MESSAGE = re.compile(
    r"^\s*File \"|^Traceback|^During handling|^The above exception|^ray::|^:\w+:|^\[|^\S+:\d+: |"
    r"^Failed to update|^The deployment |^Deployment '|^A replica "
)
"""What ends the lines that belong to an exception."""

WRAPPERS = re.compile(
    "|".join(
        (
            r"^RuntimeError: (Traceback|Engine core initialization failed|Engine process failed)",
            r"^Exception: WorkerProc initialization failed",
            r"^(ray\.exceptions\.)?RayTaskError",
            r"^(\w+\.)*CancelledError",
            r"^RuntimeError: Failed to update the deployments",
            r"^SystemExit: ",
            r"See root cause above|in a background process",
            # How Serve ends a replica whose constructor raised, and the engine's workers with it.
            r"killed by `ray\.kill`|its owner has died|^ActorDiedError: $",
        )
    )
)
"""Exceptions whose text only points elsewhere (vllm/v1/engine/utils.py, vllm/v1/executor)."""

SHORTER: tuple[tuple[str, str], ...] = (
    # ray/llm/_internal/serve/engines/vllm/vllm_engine.py, vllm/v1/executor/multiproc_executor.py
    (r"^RuntimeError: Failed to create vLLM engine config: ", ""),
    (r"^(?:RuntimeError: )?Worker failed with error '(.*)', please check the stack trace.*", r"\1"),
    # pydantic
    (r"^pydantic_core\._pydantic_core\.", ""),
    (r"^\d+ validation errors? for \w+ Value error, ", ""),
    (r" \[type=\w+, input_value=.*| For further information visit .*", ""),
    # ray/_private/runtime_env/utils.py: the last line of what pip or another program printed
    (r"^\S+CalledProcessError: Run cmd\[\d+\] failed.* ((?:ERROR|error): )", r"\1"),
    # The raylet about a process that ended (ray/exceptions.py ActorDiedError)
    (r"^(?:\S*ActorDiedError: )?The actor (?:died|is dead).* exit detail: ", "the process died: "),
    (r" Some common causes include: .*", ""),
    (r" Supported architectures: .*", ""),
)
"""What of an exception nobody needs to read -> what stays of it."""

HINTS: tuple[tuple[str, str], ...] = (
    # vllm/v1/core/kv_cache_utils.py
    (
        r"max seq len\s*\((?P<asked>\d+)\).*?estimated maximum model length is (?P<fits>\d+)",
        "set engine_kwargs.max_model_len to {fits} or less (it is {asked}), or raise num_gpus",
    ),
    (
        r"max seq len\s*\((?P<asked>\d+)\).*?larger than the available KV cache",
        "lower engine_kwargs.max_model_len (it is {asked}), or raise num_gpus",
    ),
    (
        r"No available memory for the cache blocks",
        "the weights leave no room in the share: raise num_gpus or gpu_memory_utilization; if the "
        "engines started together, set engine_kwargs.kv_cache_memory_bytes",
    ),
    # vllm/v1/worker/gpu_worker.py
    (
        r"Error in memory profiling",
        "another engine took or freed memory of this GPU during the measurement: set "
        "engine_kwargs.kv_cache_memory_bytes, or deploy again with --max-workers 1",
    ),
    # vllm/v1/worker/utils.py
    (
        r"Free memory on device \S* ?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\)",
        "the GPU has {free} of {total} GiB free: lower num_gpus or gpu_memory_utilization, or stop "
        "what else runs there (nvidia-smi shows it)",
    ),
    # vllm/v1/worker/cpu_worker.py
    (
        r"Available memory on node \d+ \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on kv cache.*? "
        r"requested memory for kv \((?P<asked>[\d.]+)",
        "the CPU engine asks for {asked} GiB of KV cache, and {free} of {total} GiB are free: "
        "lower VLLM_CPU_KVCACHE_SPACE or engine_kwargs.kv_cache_memory_bytes",
    ),
    (
        r"Available memory on node \d+ \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\)",
        "the CPU engine wants a part of the machine's memory, and {free} of {total} GiB are free: "
        "lower engine_kwargs.gpu_memory_utilization (it means main memory there)",
    ),
    # c10/cuda/CUDACachingAllocator.cpp
    (
        r"CUDA out of memory.* capacity of (?P<total>[\d.]+ \w+) of which (?P<free>[\d.]+ \w+) is",
        "the GPU's memory is full ({free} of {total} are free): raise num_gpus, lower "
        "max_model_len, or use a smaller model",
    ),
    # vllm/config/model.py
    (
        r"max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len "
        r"\(\w+=(?P<most>\d+)",
        "the model can take {most} tokens: set engine_kwargs.max_model_len to {most} or less",
    ),
    # huggingface_hub/utils/_http.py; the hub answers 401 for a model that is not there, too
    (
        r"Repository Not Found for url",
        "there is no such model on Hugging Face, or it is private: check model_source, or set "
        "HF_TOKEN in runtime_env.env_vars",
    ),
    (
        r"401 Client Error|40[13] (?:Forbidden|Unauthorized)|gated repo|is restricted",
        "the model is gated: accept its licence on Hugging Face, and set HF_TOKEN in "
        "runtime_env.env_vars",
    ),
    # huggingface_hub/utils/_validators.py: a path that is not there is taken for an id
    (
        r"Repo id must be in the form .*?: '(?P<path>/[^']*)'",
        "there is no {path} on the node of the replica: check model_source; a path has to exist on "
        "every node",
    ),
    # transformers/utils/hub.py, vllm/transformers_utils/config.py
    (
        r"local_files_only|couldn't connect to",
        "the model is not on the node, and the node does not reach Hugging Face (or HF_HUB_OFFLINE "
        "is set): check model_source",
    ),
    (
        r"Repo id must be in the form|is not a local folder|Can't load the config|"
        r"Invalid repository ID or local directory",
        "there is no such model: check model_source, a Hugging Face id or a path on every node",
    ),
    (
        r"SafetensorError|header too large|incomplete metadata",
        "a weights file is broken or not whole: fetch the model again",
    ),
    # vllm/model_executor/models/registry.py
    (
        r"Model architectures \[(?P<name>[^\]]*)\] are not supported",
        "this version of vLLM does not know the model's architecture: use another model or vLLM",
    ),
    (
        r"trust_remote_code",
        "the model brings its own code: set engine_kwargs.trust_remote_code: true if you trust it",
    ),
    # ray/util/placement_group.py
    (
        r"Cannot schedule .*'GPU': (?P<asked>[\d.]+)\} cannot fit .*'GPU': (?P<held>[\d.]+)",
        "the engine asks for {asked} GPU, and the replica's bundles hold {held}: set "
        'VLLM_RAY_PER_WORKER_GPUS: "{held}" in runtime_env.env_vars',
    ),
    # torch's C++, vllm/v1/executor/ray_executor_v2.py, vllm/config/device.py
    (
        r"does not support ray|Failed to infer device type|No CUDA GPUs|Found no NVIDIA driver|"
        r"libcuda\.so|NVIDIA driver on your system is too old|CUDA driver version is insufficient",
        "the node has no GPU that vLLM can use: look at nvidia-smi there, or set num_gpus: 0 for "
        "the CPU engine",
    ),
    (r"Unknown engine argument|unexpected keyword argument", "check the spelling of the key"),
    (r"ModuleNotFoundError|No module named", "install it on the nodes, or name it in runtime_env"),
    (r"module '[^']*' has no attribute", "check the part of import_path behind the colon"),
    # ray/exceptions.py RuntimeEnvSetupError; Serve's own words: deployment_state.py
    (
        r"runtime_env could not be set up|Failed to set up runtime env|Runtime env setup for",
        "check runtime_env",
    ),
    # torch's TCPStore; ray/serve/_private/http_util.py
    (r"port: (?P<port>\d+).*address already in use", "another process has port {port} on the node"),
    (r"Failed to bind to address '(?P<at>[^']*)'", "another process has {at}: change http_options"),
    (r"[Aa]ddress already in use", "another process has the port"),
    # The raylet's and the GCS's texts (ray/core/src/ray/raylet, `strings` shows them)
    (
        r"running low on memory|Memory on the node .* was (?P<used>[\d.]+)GB used",
        "the node ran out of main memory: fewer replicas on it, or a ray_actor_options.memory",
    ),
    (r"exits with an exit code (?P<code>\d+)", "its own code ended it with exit code {code}"),
    (
        r"Worker exit type: SYSTEM_ERROR",
        "the process was killed or crashed: its logs, and the node's dmesg, tell whether main "
        "memory ran out",
    ),
    (r"Prefix \S+ is being used by application", "give one of the two another route_prefix"),
    # ray/serve/_private/deployment_state.py
    (
        r"have taken more than \d+s to be scheduled",
        "its resources are in use, or its runtime_env is being installed: see `ray status`",
    ),
    (
        r"have taken more than \d+s to initialize",
        "the constructor is still at work, or hangs: see the replica's logs",
    ),
    (r"ray::Builder\.build\(\)", "import_path's builder raised it: check args"),
    (r"validation errors? for \w+Config .*Input should be", "check that value in engine_kwargs"),
    (r"See root cause above", "the cause may stand in the replica's logs"),
    (
        r"^(?:GET|POST) http\S+: \d{3} ",
        "its replicas run, and this is what it says to a request: see their logs; --force starts "
        "them anew, --no-smoke-test asks nothing",
    ),
)
"""What a cause's text matches -> what would help; {name}s come from the match."""


def root_cause(message: str, logs: Sequence[str] = ()) -> Cause:
    """The first real exception in what Serve says, or in what dead replicas left, latest first.

    Serve's message often only points at a log; then the logs are asked. Of
    several exceptions that which has a hint counts; without one the last in Serve's message, as
    Python prints the outermost last, and the first in a log, as the engine's processes pass it on.
    """
    said = real_exceptions(message)
    logged = next(filter(None, map(real_exceptions, logs)), [])
    hinted = [text for text in said or logged if hint_for(text)]
    text = (hinted or said)[-1] if said else (hinted or logged or [plain_cause(message)])[0]
    hint = hint_for(text) or hint_for(message.partition('\n  File "')[0])
    return Cause(shortened(without_wrapping(text), MOST_CAUSE_CHARACTERS), hint)


def real_exceptions(text: str) -> list[str]:
    """The exceptions in a text that wrap no other, in their order, each once and on one line."""
    rows = [split_prefix(line) for line in text.splitlines()]
    found = []
    in_stack = False
    for index, (prefix, line) in enumerate(rows):
        raised = NAMED.match(line) or (in_stack and UNNAMED.match(line))
        if raised and not WRAPPERS.search(line):
            below = itertools.takewhile(partial(belongs_to, prefix), rows[index + 1 :])
            further = (part.strip() for _, part in below)
            found.append(" ".join([line, *filter(None, further)]))
        in_stack = bool(FRAME.match(line)) or (in_stack and line[:1].isspace())
    return list(dict.fromkeys(found))


def belongs_to(prefix: str, row: tuple[str, str]) -> bool:
    """Whether a line, in two parts, goes on with what stands above it."""
    return row[0] == prefix and not NEXT_MESSAGE.match(row[1])


def split_prefix(line: str) -> tuple[str, str]:
    """What a logger puts before a line, and the line."""
    line = ANSI.sub("", line).rstrip()
    match = LOG_PREFIX.match(line)
    end = match.end() if match else 0
    return line[:end], line[end:]


def without_wrapping(text: str) -> str:
    """An exception in the words that tell something."""
    for pattern, words in SHORTER:
        text = re.sub(pattern, words, text)
    return text


def plain_cause(message: str) -> str:
    """The last line that says something, of a message without an exception."""
    lines = [ANSI.sub("", line).strip() for line in message.splitlines()]
    said = [line for line in lines if line and not line.startswith(("File ", "Traceback", "ray::"))]
    telling = [line for line in said if not line.startswith(POINTERS)]
    return (telling or said or ["(no message)"])[-1]


POINTERS = ("Failed to update the deployments", "This may be caused by", "ActorDiedError()")


def hint_for(text: str) -> str:
    """What would help against a known cause, in its own numbers; empty for an unknown one."""
    for pattern, hint in HINTS:
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return hint.format(**match.groupdict())
    return ""


PHASES: tuple[tuple[str, str], ...] = (
    (r"Downloading|Fetching \d+ files", "downloading"),
    # vllm/v1/worker/gpu_model_runner.py, cpu_model_runner.py
    (r"Starting to load model|Loading safetensors|Loading weights took", "loading weights"),
    (r"Model loading took|Memory profiling takes", "profiling memory"),
    # vllm/compilation/backends.py, monitor.py
    (r"Dynamo bytecode|Compiling a graph|torch\.compile (?:took|and)", "compiling"),
    # vllm/v1/core/kv_cache_utils.py, vllm/v1/worker/gpu_worker.py
    (r"Available KV cache memory|GPU KV cache size|GiB for KV cache", "making the KV cache"),
    (r"Capturing .*graph|Graph capturing|Warming up model", "warming up"),
    (r"init engine \(profile, create kv cache|Started vLLM engine", "starting the server"),
)
"""What an engine's log has -> the phase that its start is in, in the order of a start."""


def engine_phase(log: str) -> str:
    """The phase of an engine's start that its log shows; empty when it shows none yet.

    The furthest counts, not the latest line: the log is that of several processes.
    """
    phases = (phase for pattern, phase in reversed(PHASES) if re.search(pattern, log))
    return next(phases, "")


def pending_need(message: str) -> tuple[Resources, Resources] | None:
    """What a replica that Serve can't place needs, and what the cluster has free of that.

    None when the message says nothing of the kind, or when there is enough: Serve also words so a
    replica whose process is just starting (ray/serve/_private/deployment_state.py
    `resource_requirements`). What is used up is missing in what it calls available; and for
    bundles, a list, it never finds anything available, so there it can't be told and counts.
    """
    match = re.search(
        r"Resources required for each replica: (.*?), total resources available: (\{.*?\})\.",
        message,
    )
    if not match:
        return None
    try:
        needed, available = (ast.literal_eval(text) for text in match.groups())
    except (ValueError, SyntaxError):
        return None
    total: dict[str, float] = {}
    for bundle in needed if isinstance(needed, list) else [needed]:
        for resource, amount in bundle.items():
            total[resource] = total.get(resource, 0.0) + amount
    free = {resource: available.get(resource, 0.0) for resource in total}
    return (total, free) if any(free[resource] < total[resource] for resource in total) else None


# ======================================================================================
# 9. Verify: an application that runs → the proof that it is what was promised, and answers
# ======================================================================================

SMOKE_TIMEOUT_S = 60.0
ROUTE_ATTEMPTS = 20
OK, NOT_FOUND, SERVER_ERROR = 200, 404, 500
QUESTIONS: tuple[tuple[str, Config], ...] = (
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1,
            "stream": True,
        },
    ),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 1, "stream": True}),
    ("/v1/embeddings", {"input": "Hello"}),
    ("/v1/score", {"text_1": "Hello", "text_2": "Hello"}),
)
"""What a model is asked, the next where it has not learnt the one before."""

CANNOT = re.compile(
    r"chat template|does not support|not support(?:ed)? by|Not Found", re.IGNORECASE
)
Fetch = Callable[[str, Config | None], Response]
"""GET a URL, or POST JSON to it. Raises ApplicationError when nothing answers."""


def mismatches(
    application: ApplicationSpec, demands: Sequence[Demand], reservations: Sequence[Reservation]
) -> tuple[str, ...]:
    """The promises about resources that running replicas do not keep, in words."""
    rows = []
    for demand in demands:
        said = promises(application, demand, demands)
        promised = {**demand.reserved, **said}
        for held in reservations:
            if held.deployment != demand.deployment:
                continue
            for resource in sorted({*promised, *held.reserved}):
                wanted, found = promised.get(resource, 0.0), held.reserved.get(resource, 0.0)
                if abs(wanted - found) > 1e-4:  # noqa: PLR2004 - Ray counts in ten thousandths
                    rows.append(
                        f"{demand.deployment}: promised {format_amount(resource, wanted)} "
                        f"{resource}, reserved {format_amount(resource, found)} "
                        f"({held_because(demand, resource, found)})"
                    )
    return tuple(dict.fromkeys(rows))


def promises(application: ApplicationSpec, demand: Demand, demands: Sequence[Demand]) -> Resources:
    """What the config itself says of a deployment's replicas; empty when it says nothing."""
    for model in application.models:
        if demand_of(model, demands) is demand:
            return model.promised
    return {}


def held_because(demand: Demand, resource: str, found: float) -> str:
    """Who asked Ray for what a replica holds."""
    if abs(demand.reserved.get(resource, 0.0) - found) < 1e-4:  # noqa: PLR2004
        return "its builder asks Ray for that, not for what the config says"
    return "a replica of it holds more or less than its deployment asks for"


def demand_of(model: ModelSpec, demands: Sequence[Demand]) -> Demand | None:
    """The deployment that serves a model; Ray names it "<server class>:<deployment name>"."""
    suffix = ":" + model.deployment_name
    return next((demand for demand in demands if demand.deployment.endswith(suffix)), None)


def wait_for_route(
    application: ApplicationSpec, base_url: str, fetch: Fetch, pause: Callable[[], None]
) -> None:
    """Wait until Serve's proxy, and nobody else at its address, knows the application's route.

    Raises ApplicationError when it does not come to know it: the proxies hear of a new
    application a moment after the controller (ray/serve/_private/proxy.py, "/-/routes").
    """
    said = ""
    for attempt in range(ROUTE_ATTEMPTS):
        if attempt:
            pause()
        try:
            response = fetch(f"{base_url}/-/routes", None)
        except ApplicationError as error:
            said = str(error)  # a proxy that restarts listens again in some seconds
            continue
        if read_json(response.text).get(application.route_prefix or "") == application.name:
            return
        said = (
            f"{base_url}/-/routes does not have {application.route_prefix} as the route of "
            f"{application.name}, but says: {format_refusal(response)}"
        )
    raise ApplicationError(said)


def smoke_test(
    application: ApplicationSpec, asleep: Collection[str], base_url: str, fetch: Fetch
) -> tuple[tuple[Answer, ...], tuple[str, ...]]:
    """Ask an application over its public address. Raises ApplicationError for a bad answer.

    `asleep` are the ids of models without a replica, which are not asked to answer. Returns the
    answers, and the ids of the models that have learnt none of what is asked.
    """
    url = base_url + quote((application.route_prefix or "").rstrip("/"))
    listed = fetch(f"{url}/v1/models", None) if application.models else None
    own_builder = not application.config["import_path"].startswith("ray.serve.llm")
    if listed is None or (listed.status == NOT_FOUND and own_builder):
        return (ask_ingress(url, fetch),), ()
    if listed.status != OK:
        raise ApplicationError(f"GET {url}/v1/models: {format_refusal(listed)}")
    ids = [str(row.get("id")) for row in read_json(listed.text).get("data") or []]
    for model in application.models:
        if model.model_id not in ids:
            raise ApplicationError(
                f"GET {url}/v1/models lists {', '.join(ids) or 'nothing'}, not {model.model_id}"
            )
    awake = [model.model_id for model in application.models if model.model_id not in asleep]
    said = {model_id: ask_model(model_id, url, fetch) for model_id in awake}
    mute = tuple(model_id for model_id, answer in said.items() if answer is None)
    return (Answer("GET /v1/models", listed.total_s), *filter(None, said.values())), mute


def ask_ingress(url: str, fetch: Fetch) -> Answer:
    """One request to an application that is none of models: any answer below 500 is good."""
    for path in ("/health", "/"):
        response = fetch(url + path, None)
        if response.status != NOT_FOUND:
            break
    if response.status >= SERVER_ERROR:
        raise ApplicationError(f"GET {url}{path}: {format_refusal(response)}")
    return Answer(f"GET {path}", response.total_s)


def ask_model(model_id: str, url: str, fetch: Fetch) -> Answer | None:
    """One token from a model, over the first interface that it has; None when it says itself that
    it has none of them, as a model does that transcribes."""
    for path, question in QUESTIONS:
        response = fetch(url + path, {**question, "model": model_id})
        parts = read_parts(response.text)
        refused = next((part["error"] for part in parts if part.get("error")), None)
        if response.status == OK and refused is None:
            break
        unknown = response.status < SERVER_ERROR or refused is not None
        if not (unknown and CANNOT.search(response.text)):
            raise ApplicationError(f"POST {url}{path}: {format_refusal(response)}")
    else:
        return None
    names = {str(part["model"]) for part in parts if part.get("model")}
    if names != {model_id}:
        said = ", ".join(sorted(names)) or "nobody"
        raise ApplicationError(f"POST {url}{path}: {model_id} was asked, and {said} answered")
    if not response.ended:
        seconds = f"{response.total_s:.0f} s"
        raise ApplicationError(f"POST {url}{path}: one token had no end within {seconds}")
    first_s = response.first_s if question.get("stream") else None
    return Answer(f"POST {path}", response.total_s, model_id, first_s)


def read_parts(text: str) -> list[Config]:
    """The JSON objects of an answer: one, or those of an event stream."""
    lines = [line.partition("data:")[2] for line in text.splitlines() if line.startswith("data:")]
    return [part for part in map(read_json, lines or [text]) if part]


def read_json(text: str) -> Config:
    """A JSON object; empty for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def format_refusal(response: Response) -> str:
    """An answer that is none: its status, and the message in its body."""
    parts = read_parts(response.text)
    error = next((part["error"] for part in parts if part.get("error")), None)
    message = error.get("message") if isinstance(error, dict) else error
    detail = next((part["detail"] for part in parts if part.get("detail")), None)
    text = " ".join(str(message or detail or response.text or "").split()) or "no body"
    return f"{response.status} {shortened(text, MOST_CAUSE_CHARACTERS)}"


# -- the engine's own figures ---------------------------------------------------------------------

FIGURES: tuple[tuple[str, type, str], ...] = (
    # vllm/v1/core/kv_cache_utils.py
    ("kv_cache_tokens", int, r"GPU KV cache size: ([\d,]+) tokens"),
    ("max_concurrency", float, r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x"),
    # vllm/v1/worker/gpu_worker.py
    ("kv_cache_gib", float, r"Available KV cache memory: ([\d.]+) GiB"),
    # vllm/v1/worker/gpu_model_runner.py
    ("weights_gib", float, r"Model loading took ([\d.]+) GiB memory"),
    # vllm/model_executor/model_loader/default_loader.py
    ("weights_s", float, r"Loading weights took ([\d.]+) seconds"),
    # vllm/v1/engine/core.py
    ("start_s", float, r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s"),
)
LITTLE_MEMORY = 0.7
"""Below this part of its neighbour's memory an engine was measured while another one started."""


def engine_figures(log: str) -> dict[str, Any]:
    """What the log of a replica says about its engine, by field of `EngineFigures`."""
    found: dict[str, Any] = {}
    for name, kind, pattern in FIGURES:
        values = re.findall(pattern, log)
        if values:
            found[name] = kind(values[-1].replace(",", ""))
    return found


def small_caches(engines: Sequence[EngineFigures]) -> list[str]:
    """The engines that got far less memory than a neighbour of the same share, in words.

    Weights and KV cache together are about gpu_memory_utilization of the card, whatever the model;
    one that was measured while another started gets less (vllm-project/vllm#55827, #56830).
    """
    warnings = []
    for engine in engines:
        mine = memory_gib(engine)
        peers = [
            memory_gib(other)
            for other in engines
            if (other.node, other.share) == (engine.node, engine.share)
        ]
        if mine and mine < LITTLE_MEMORY * max(peers):
            warnings.append(
                f"{engine.model_id}: its engine got {mine:.1f} GiB for weights and KV cache, where "
                f"a neighbour of the same share got {max(peers):.1f}: they disturbed each other's "
                "measurement; set engine_kwargs.kv_cache_memory_bytes, or deploy it again with "
                "--force --stagger"
            )
    return warnings


def memory_gib(engine: EngineFigures) -> float:
    """What an engine has for its weights and its KV cache; 0 when its log does not say."""
    if engine.kv_cache_gib is None or engine.weights_gib is None:
        return 0.0
    return engine.kv_cache_gib + engine.weights_gib


# -- engines that start together on one card ------------------------------------------------------

DISTURBED = re.compile(
    "No available memory for the cache blocks|Error in memory profiling|"
    r"Free memory on device .* is less than desired|"
    "Initial free memory .* current free memory"
)
"""How an engine fails that measured its memory while another one took or freed some
(vllm/v1/worker/gpu_worker.py, vllm/v1/core/kv_cache_utils.py)."""


def shares_gpu(application: ApplicationSpec) -> bool:
    """Whether an application has engines that share a card and measure what is free on it."""
    return any(model.measures_memory for model in application.models)


def was_disturbed(application: ApplicationSpec, failure: str) -> bool:
    """Whether an application failed as engines do that start together on one card."""
    return shares_gpu(application) and bool(DISTURBED.search(failure))


# ======================================================================================
# 10. Deploy: the pool, the one watcher, deadlines, stop signals
# ======================================================================================

POLL_INTERVAL_S = 1.0
HEARTBEAT_INTERVAL_S = 5.0
LOG_INTERVAL_S = 5.0
LOST_AFTER_S = 30.0
UNHEALTHY_GRACE_S = 30.0
STOP_GRACE_S = 1.0
WAITING_FOR_TURN = "waiting for its turn"


class Cluster(Protocol):
    """What deploying needs of a cluster. `RayCluster` is the real one; tests script another."""

    def build(self, application: ApplicationSpec, patience: Patience) -> tuple[Demand, ...]: ...
    def submit(self, action: Action, demands: Sequence[Demand], patience: Patience) -> None: ...
    def nodes(self, moving: Collection[str]) -> tuple[tuple[Node, ...], Holders]: ...
    def states(self, timeout_s: float) -> dict[str, ApplicationState]: ...
    def failure_logs(self, state: ApplicationState) -> list[str]: ...
    def starting_log(self, state: ApplicationState) -> str: ...
    def delete(self, name: str) -> None: ...
    def roll_back(self, name: str) -> None: ...
    def held_by(self, name: str) -> str: ...
    def endpoint(self) -> str: ...
    def reservations(self, state: ApplicationState) -> tuple[Reservation, ...]: ...
    def fetch(self, url: str, body: Config | None, timeout_s: float) -> Response: ...
    def replica_log(self, actor_id: str) -> str: ...
    def alive(self) -> bool: ...


@dataclass(frozen=True)
class Progress:
    """What one application is doing, in words; times are the board's clock, in seconds."""

    application: ApplicationSpec
    words: str = "queued"
    detail: str = ""
    started: float | None = None
    ended: float | None = None


class Board:
    """What every application is doing: the one object that the threads share, under one lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.changed = threading.Condition()
        self.progress: dict[str, Progress] = {}
        self.states: dict[str, ApplicationState] = {}
        self.polled_at = -math.inf
        self.phases: dict[str, str] = {}
        self.closed = False
        self.stop_code = 0
        self.stop_reason = ""

    def enter(self, application: ApplicationSpec, words: str, detail: str = "") -> None:
        """Note what an application does now; "queued" before its turn, a result's word after."""
        with self.changed:
            now = self.clock()
            before = self.progress.get(application.name, Progress(application))
            over = words in RESULT_WORDS
            self.progress[application.name] = Progress(
                application,
                words,
                detail,
                started=before.started if words == "queued" or before.started else now,
                ended=now if over else None,
            )
            self.changed.notify_all()

    def publish(self, states: dict[str, ApplicationState], polled_at: float) -> None:
        """Take over what the watcher read; `polled_at` is when it began to read."""
        with self.changed:
            self.states, self.polled_at = states, polled_at
            self.changed.notify_all()

    def stop(self, code: int, reason: str) -> None:
        """End every wait; the first reason stands."""
        with self.changed:
            if not self.stop_code:
                self.stop_code, self.stop_reason = code, reason
            self.changed.notify_all()

    def close(self) -> None:
        """Every application has its outcome: the watcher may go."""
        self.closed = True

    def wait_for_change(self, timeout_s: float) -> list[Progress]:
        """What all applications are doing, at the next change or after `timeout_s`."""
        with self.changed:
            self.changed.wait(timeout_s)
            return list(self.progress.values())

    def next_state(
        self, application: ApplicationSpec, patience: Patience, after: float
    ) -> ApplicationState | None:
        """The application's state in the next poll that began later than `after`."""
        with self.changed:
            while self.polled_at <= after:
                patience.check()
                self.changed.wait(0.5)
            return self.states.get(application.name)


@dataclass(frozen=True)
class Patience:
    """How long one application's waits may last: until its deadline or until the run stops."""

    board: Board
    deadline: float

    def check(self) -> None:
        """Raise Stopped or StillDeploying when waiting has to end."""
        if self.board.stop_code:
            raise Stopped
        if self.board.clock() >= self.deadline:
            raise StillDeploying

    def pause(self) -> None:
        """Sleep until it is worth looking again. Raises as `check` does."""
        self.check()
        time.sleep(POLL_INTERVAL_S)

    def seconds_left(self, most: float) -> float:
        """What a single call may take: `most`, or less."""
        self.check()
        return min(most, self.deadline - self.board.clock())


NO_ROOM = "--no-downtime: there is no room for a new replica beside the old ones"


class Gate:
    """Asks of each built application whether the cluster can hold it, in the order of arrival."""

    def __init__(self, cluster: Cluster, actions: Sequence[Action], allow_pending: bool) -> None:
        self.nodes, self.holders = cluster.nodes(moving(actions))
        self.demands: tuple[Demand, ...] = ()
        self.lock = threading.Lock()
        self.allow_pending = allow_pending

    def admit(self, action: Action, demands: tuple[Demand, ...]) -> Admission:
        """Count an application in. Raises ApplicationError for what can never fit, and for a
        restart without downtime for which there is no room."""
        demands = counted(action, demands)
        with self.lock:
            prediction = predict([*self.demands, *demands], self.nodes, self.holders)
            mine = prediction.fittings[len(self.demands) :]
            misfits = [item for item in mine if item.fit is not Fit.FITS]
            never = [item for item in misfits if item.fit is Fit.NEVER]
            if misfits and action.surge:
                raise ApplicationError(f"{NO_ROOM}: {'; '.join(map(format_misfit, misfits))}")
            if never and not self.allow_pending:
                raise ApplicationError("\n".join(map(format_misfit, never)))
            self.demands += demands
        placed = {
            self.nodes[replica.node].name
            for item in mine
            for slots in item.replicas
            for replica in slots
        }
        every = frozenset(node.name for node in self.nodes)
        return Admission(
            "\n".join(map(format_misfit, misfits)), every if misfits else frozenset(placed)
        )


@dataclass(frozen=True)
class Admission:
    """`waits_for`: what of an application does not fit now, and will wait; `nodes`: where it may
    start, by the plan's prediction."""

    waits_for: str
    nodes: frozenset[str]


class Turns:
    """Whose turn it is to start on a node, for --stagger."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.busy: frozenset[str] = frozenset()

    @contextlib.contextmanager
    def on(self, nodes: frozenset[str], patience: Patience) -> Iterator[None]:
        """Have some nodes for oneself. Raises as `patience.check` does while it waits for them."""
        with self.changed:
            while self.busy & nodes:
                patience.check()
                self.changed.wait(0.2)
            self.busy |= nodes
        try:
            yield
        finally:
            with self.changed:
                self.busy -= nodes
                self.changed.notify_all()


def worker_count(applications: int, cpu_cores: int, wanted: int | None) -> int:
    """How many applications deploy at once."""
    return max(1, wanted or min(applications, max(2, cpu_cores)))


@dataclass(frozen=True)
class Run:
    """What the workers of one run have in common."""

    cluster: Cluster
    board: Board
    gate: Gate
    options: Options
    turns: Turns = field(default_factory=Turns)
    crowded: bool = False  # several engines that may share a card start in it

    def patience(self) -> Patience:
        """As long as one application may take from now on."""
        return Patience(self.board, self.board.clock() + (self.options.timeout_s or math.inf))


def deploy(
    actions: Sequence[Action],
    cluster: Cluster,
    board: Board,
    options: Options,
    show: Callable[[list[Progress]], None],
) -> list[Outcome]:
    """Deploy all applications concurrently; outcomes come back in the order of the file.

    A worker is held until its application settles, so `max_workers` bounds what starts at once
    and 1 is V4's sequential mode. `show` gets the progress at every change, in this thread.
    """
    for action in actions:
        board.enter(action.application, "queued")
    start_threads(cluster, board, watch, check_alive, follow_logs)
    outcomes: dict[str, Outcome] = {}
    try:
        deletions = [action for action in actions if action.change is Change.DELETE]
        others = [action for action in actions if action.change is not Change.DELETE]
        for stage in filter(None, (deletions, others)):
            if outcomes and board.stop_code:
                outcomes |= {a.application.name: unfinished(a, board) for a in stage}
                continue
            gate = Gate(cluster, stage, options.allow_pending)
            crowded = sum(changes(a) and shares_gpu(a.application) for a in stage) > 1
            run = Run(cluster, board, gate, options, crowded=crowded)
            outcomes |= deploy_stage(stage, run, show)
        disturbed = [action for action in others if outcomes[action.application.name].disturbed]
        for action in disturbed if not board.stop_code else ():
            again = replace(action, version=f"{action.version}.again", attempt=2)
            gate = Gate(cluster, [again], options.allow_pending)
            outcomes |= deploy_stage([again], Run(cluster, board, gate, options), show)
    finally:
        board.close()
    show(board.wait_for_change(0))
    return [outcomes[action.application.name] for action in actions]


def start_threads(
    cluster: Cluster, board: Board, *targets: Callable[[Cluster, Board], None]
) -> None:
    """Start what runs beside the workers until the board is closed, or the run stops."""
    for target in targets:
        name = target.__name__
        threading.Thread(target=target, args=(cluster, board), daemon=True, name=name).start()


def deploy_stage(
    actions: Sequence[Action], run: Run, show: Callable[[list[Progress]], None]
) -> dict[str, Outcome]:
    """Take some applications to their outcomes, by name, each in a worker of a pool."""
    # Those that wait for their turn come last, so that they keep no worker from the others.
    staggered = partial(is_staggered, options=run.options)
    ordered = sorted(actions, key=staggered)
    workers = worker_count(len(actions), os.cpu_count() or 1, run.options.max_workers)
    calls = [partial(deploy_application, action, run) for action in ordered]
    outcomes = in_workers(calls, workers, run.board, show)
    return {
        action.application.name: outcome or unfinished(action, run.board)
        for action, outcome in zip(ordered, outcomes, strict=True)
    }


Returned = TypeVar("Returned")


def in_workers(
    calls: Sequence[Callable[[], Returned]],
    workers: int,
    board: Board,
    show: Callable[[list[Progress]], None],
) -> list[Returned | None]:
    """What some calls return, made by a pool of threads; None for those that were not done when
    the run stopped: a thread may hang in a call of Ray then, and is not waited for."""
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="worker")
    futures = [pool.submit(call) for call in calls]
    while not all(future.done() for future in futures) and not board.stop_code:
        show(board.wait_for_change(POLL_INTERVAL_S))
    pool.shutdown(wait=False, cancel_futures=True)
    wait_for_futures(futures, timeout=STOP_GRACE_S if board.stop_code else None)
    return [f.result() if f.done() and not f.cancelled() else None for f in futures]


def is_staggered(action: Action, options: Options) -> bool:
    """Whether an application waits until nobody else starts where it will."""
    return options.stagger and shares_gpu(action.application)


def watch(cluster: Cluster, board: Board) -> None:
    """Poll the cluster for all applications, about once a second, until the run stops.

    One poller, because a poll costs CPU and N threads would pay it N times (measured on Ray 2.60).
    """
    while not board.stop_code and not board.closed:
        polled_at = board.clock()
        try:
            board.publish(cluster.states(POLL_TIMEOUT_S), polled_at)
        except ClusterError:
            pass  # a controller that restarts is silent for a while
        except Exception:  # noqa: BLE001
            # Without its watcher every application would wait for its deadline.
            board.stop(EXIT_CLUSTER, traceback.format_exc())
        time.sleep(POLL_INTERVAL_S)


def check_alive(cluster: Cluster, board: Board) -> None:
    """Stop the run when the head node has gone.

    In a thread of its own: a call of Ray may hang in that case, until Ray ends the whole program.
    """
    alive_at = board.clock()
    while not board.stop_code and not board.closed:
        time.sleep(HEARTBEAT_INTERVAL_S)
        if cluster.alive():
            alive_at = board.clock()
        elif board.clock() - alive_at > LOST_AFTER_S:
            board.stop(EXIT_CLUSTER, f"the head node has not answered for {LOST_AFTER_S:.0f} s")


def follow_logs(cluster: Cluster, board: Board) -> None:
    """Tell from the logs of starting replicas which phase their engines are in.

    In a thread of its own: a node that is slow to send a log must not hold up the watcher.
    """
    while not board.stop_code and not board.closed:
        time.sleep(LOG_INTERVAL_S)
        for name, state in list(board.states.items()):
            progress = board.progress.get(name)
            if progress and progress.words.startswith("starting"):
                board.phases[name] = engine_phase(cluster.starting_log(state))


def deploy_application(action: Action, run: Run) -> Outcome:
    """Take one application from its config to a result. Runs in a worker thread; never raises."""
    application, board = action.application, run.board
    started = board.clock()
    reached: dict[str, Any] = {}
    cause, detail = action.refusal, ""
    try:
        result = Result.FAILED if action.refusal else carry_out(action, run, reached)
    except ApplicationError as error:
        state = reached["state"] = board.states.get(application.name)
        logs = run.cluster.failure_logs(state) if state and reached.get("submitted") else []
        result, cause, detail = Result.FAILED, root_cause(str(error), logs), str(error)
        said = "\n".join([detail, cause.text, *logs])
        first = action.attempt == 1 and run.crowded
        reached["disturbed"] = first and was_disturbed(application, said)
    except StillDeploying:
        state = reached["state"] = board.states.get(application.name)
        message = failure_message(state) if state else ""
        result, cause = Result.STILL_DEPLOYING, root_cause(message) if message else None
    except Stopped:
        reached["state"] = board.states.get(application.name)
        lost = board.stop_code == EXIT_CLUSTER
        result = Result.UNKNOWN if lost else Result.INTERRUPTED
    except ClusterError as error:
        result, cause = Result.UNKNOWN, Cause(str(error), error.hint)
    except Exception as error:  # noqa: BLE001
        # Isolation: a defect that one application meets must not hide what became of the others.
        result, cause, detail = Result.FAILED, root_cause(repr(error)), traceback.format_exc()
    ended = result in (Result.FAILED, Result.STILL_DEPLOYING)
    if ended and reached.get("submitted") and not reached.get("disturbed"):
        reached.update(undo(action, run))
    board.enter(application, result.value, cause.text if cause else "")
    return Outcome(action, result, board.clock() - started, cause, detail, **reached)


def carry_out(action: Action, run: Run, reached: dict[str, Any]) -> Result:
    """Do what an action says; `reached` gets the fields of its outcome on the way.

    Raises ApplicationError, StillDeploying and Stopped.
    """
    if action.change is Change.DELETE:
        if action.before:
            reached["submitted"] = True
            delete_application(action, run)
        return Result.DELETED
    if action.before and action.change is Change.UNCHANGED:
        record = action.before.record
        reached.update(state=action.before.state, demands=record.demands if record else ())
        prove(action.application, run, run.patience(), reached)
        return Result.RUNNING
    application, board = action.application, run.board
    board.enter(application, "building")
    reached["demands"] = run.cluster.build(application, run.patience())
    admission = run.gate.admit(action, reached["demands"])
    nodes = admission.nodes if is_staggered(action, run.options) else frozenset()
    if nodes:
        board.enter(application, WAITING_FOR_TURN, "--stagger")
    with run.turns.on(nodes, Patience(board, math.inf)):
        board.enter(application, "submitting", admission.waits_for)
        patience = run.patience()
        reached["submitted"] = True
        run.cluster.submit(action, reached["demands"], patience)
        reached["state"] = settled(application, board, patience, admission.waits_for)
    prove(application, run, patience, reached)
    return Result.RUNNING


def prove(
    application: ApplicationSpec, run: Run, patience: Patience, reached: dict[str, Any]
) -> None:
    """Check what runs against what was promised, and ask it something; `reached` gets the proof.

    Raises ApplicationError for a bad answer.
    """
    cluster, state, demands = run.cluster, reached["state"], reached["demands"]
    run.board.enter(application, "checking")
    held = cluster.reservations(state)
    asleep = [] if run.options.wake else asleep_in(demands, state)
    proof = reached["proof"] = Proof(
        held,
        mismatches(application, demands, held),
        engines=read_engines(application, demands, held, state, cluster),
        skipped=not_asked(application, run, any(demand.ingress for demand in asleep)),
    )
    if proof.skipped:
        return

    def fetch(url: str, body: Config | None) -> Response:
        # A model that has to be woken up first takes as long as its start.
        most = DEFAULT_TIMEOUT_S if run.options.wake else SMOKE_TIMEOUT_S
        return cluster.fetch(url, body, patience.seconds_left(most))

    ids = [model.model_id for model in application.models if demand_of(model, demands) in asleep]
    base_url = cluster.endpoint()
    wait_for_route(application, base_url, fetch, patience.pause)
    answers, mute = smoke_test(application, ids, base_url, fetch)
    reached["proof"] = replace(proof, answers=answers, mute=mute, asleep=tuple(ids))


def not_asked(application: ApplicationSpec, run: Run, asleep: bool) -> str:
    """Why an application is not asked anything over HTTP; empty when it is."""
    if not run.options.smoke_test:
        return "--no-smoke-test"
    if application.route_prefix is None:
        return "it has no HTTP route"
    if asleep:
        return "its ingress has scaled to zero (--wake asks it)"
    return "" if run.cluster.endpoint() else "Serve has no HTTP proxy (proxy_location: Disabled)"


def asleep_in(demands: Sequence[Demand], state: ApplicationState) -> list[Demand]:
    """The deployments that have scaled to zero; a request would start a replica."""
    targets = {deployment.name: deployment.target_replicas for deployment in state.deployments}
    return [demand for demand in demands if not targets.get(demand.deployment, 1)]


def read_engines(
    application: ApplicationSpec,
    demands: Sequence[Demand],
    held: Sequence[Reservation],
    state: ApplicationState,
    cluster: Cluster,
) -> tuple[EngineFigures, ...]:
    """The figures in the logs of the running engines, of the first few replicas of each model."""
    actors = {r.replica_id: r.actor_id for d in state.deployments for r in d.replicas}
    rows = []
    for model in application.models:
        demand = demand_of(model, demands)
        mine = [item for item in held if demand and item.deployment == demand.deployment]
        for item in mine[:MOST_LOGS]:
            figures = engine_figures(cluster.replica_log(actors[item.replica_id]))
            if figures:
                row = EngineFigures(model.model_id, item.replica_id, item.nodes[0], model.share)
                rows.append(replace(row, **figures))
    return tuple(rows)


def delete_application(action: Action, run: Run) -> None:
    """Delete an application, and wait until what it held is free."""
    application, board, patience = action.application, run.board, run.patience()
    board.enter(application, "deleting")
    run.cluster.delete(application.name)
    after = board.clock()
    while board.next_state(application, patience, after) or run.cluster.held_by(application.name):
        after = board.polled_at
        held = run.cluster.held_by(application.name)
        board.enter(application, "deleting", f"it still holds {held}" if held else "")


def undo(action: Action, run: Run) -> dict[str, Any]:
    """What --on-failure asks to do about an application that did not come up, and what came of it,
    as fields of its outcome."""
    name, wish = action.application.name, run.options.on_failure
    new = action.change is Change.CREATE
    try:
        if wish == "delete" and new:
            run.cluster.delete(name)
            return {"deleted": True}
        if wish != "rollback" or not changes(action) or new:
            return {}
        run.board.enter(action.application, "rolling back")
        run.cluster.roll_back(name)
        state = settled(action.application, run.board, run.patience())
    except ApplicationError as error:
        return {"rollback": f"it could not be rolled back: {root_cause(str(error)).text}"}
    except (StillDeploying, Stopped):
        return {"rollback": "it is being rolled back: its last good configuration does not run yet"}
    except Exception as error:  # noqa: BLE001
        # Isolation, as in deploy_application: the outcome of this one is that it failed.
        return {"rollback": f"--on-failure {wish} did not work: {root_cause(repr(error)).text}"}
    return {"rollback": f"it was rolled back: its last good configuration is {state.status}"}


def settled(
    application: ApplicationSpec, board: Board, patience: Patience, waits_for: str = ""
) -> ApplicationState:
    """Wait until a submitted application runs. Raises ApplicationError when Serve gives up on it.

    Only states that are read from now on count: earlier ones are of what ran before.
    """
    after = board.clock()
    unhealthy_since: float | None = None
    while True:
        state = board.next_state(application, patience, after)
        after = board.polled_at
        if state is None or state.status in ("DELETING", "NOT_STARTED"):
            raise ApplicationError("the application was deleted while it was being deployed")
        if state.status == "RUNNING":
            return state
        if state.status == "DEPLOY_FAILED":
            raise ApplicationError(failure_message(state))
        if state.status == "UNHEALTHY":
            unhealthy_since = unhealthy_since or board.clock()
            if board.clock() - unhealthy_since > UNHEALTHY_GRACE_S:
                raise ApplicationError(failure_message(state))
        else:
            unhealthy_since = None
        phase = board.phases.get(application.name, "")
        board.enter(application, *describe_state(state, waits_for, phase))


def failure_message(state: ApplicationState) -> str:
    """All that Serve says about a failed application: its own message, then its deployments'."""
    messages = [state.message, *(d.message for d in state.deployments if d.status != "HEALTHY")]
    return "\n".join(message for message in messages if message)


def describe_state(
    state: ApplicationState, waits_for: str = "", phase: str = ""
) -> tuple[str, str]:
    """What a deploying application does, in words, and what it waits for.

    `waits_for` is what the plan says does not fit now, and who holds it; `phase` is the engine's.
    """
    waiting = [d for d in state.deployments if d.running < d.target_replicas]
    unplaced = [d for d in waiting if any(not replica.node for replica in d.replicas)]
    need = next((need for d in unplaced if (need := pending_need(d.message))), None)
    if unplaced and waits_for:
        return "waiting for resources", waits_for
    if need:
        return "waiting for resources", f"needs {format_resources(need[0])}"
    running = sum(d.running for d in state.deployments)
    target = sum(d.target_replicas for d in state.deployments)
    exceptions = [text for d in waiting for text in real_exceptions(d.message)]
    failed = f"a replica failed: {root_cause(exceptions[-1]).text}" if exceptions else ""
    return f"starting replicas {running}/{target}", failed or phase


NOT_SENT = ("queued", "building", WAITING_FOR_TURN)
"""What an application is doing, in words, while the cluster has not heard of it."""


def unfinished(action: Action, board: Board) -> Outcome:
    """The outcome of an application whose worker did not come to its end."""
    progress = board.progress[action.application.name]
    lost = board.stop_code == EXIT_CLUSTER
    begun = progress.started is not None
    sent = progress.words not in NOT_SENT and action.change is not Change.UNCHANGED
    return Outcome(
        action,
        Result.UNKNOWN if lost and begun else Result.INTERRUPTED,
        board.clock() - progress.started if progress.started is not None else 0.0,
        submitted=begun and sent,
        state=board.states.get(action.application.name),
    )


INTERRUPTED = Cause("interrupted")


def build_all(
    applications: Sequence[ApplicationSpec],
    cluster: Cluster,
    board: Board,
    options: Options,
    show: Callable[[list[Progress]], None],
) -> list[tuple[Demand, ...] | Cause]:
    """Build every application and deploy none: its demands, or why it can't be built."""

    def build(application: ApplicationSpec) -> tuple[Demand, ...] | Cause:
        patience = Patience(board, board.clock() + (options.timeout_s or math.inf))
        board.enter(application, "building")
        try:
            demands = cluster.build(application, patience)
        except ApplicationError as error:
            cause = root_cause(str(error))
        except StillDeploying:
            cause = Cause("the builder did not return in time", "raise --timeout")
        except Stopped:
            cause = INTERRUPTED
        else:
            board.enter(application, "built")
            return demands
        board.enter(application, Result.FAILED.value, cause.text)
        return cause

    start_threads(cluster, board, check_alive)
    calls = [partial(build, application) for application in applications]
    built = in_workers(calls, len(calls), board, show)
    board.close()
    return [INTERRUPTED if result is None else result for result in built]


def exit_code(outcomes: Sequence[Outcome], stop_code: int) -> int:
    """130/143 before 3 before 1 before 4 before 0."""
    results = {outcome.result for outcome in outcomes}
    if stop_code:
        return stop_code
    if Result.UNKNOWN in results:
        return EXIT_CLUSTER
    if Result.FAILED in results or any(o.proof and o.proof.mismatches for o in outcomes):
        return EXIT_FAILED
    return EXIT_TIMEOUT if Result.STILL_DEPLOYING in results else EXIT_OK


# ======================================================================================
# 11. Report: outcomes → text, live view, JSON
# ======================================================================================

RULE = "=" * 80
THIN_RULE = "-" * 80
LLM_ENDPOINTS = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
)


def format_replicas(demand: Demand) -> str:
    """ "1 → 3 (autoscaling)" or "2"."""
    if demand.autoscaling:
        return f"{demand.min_replicas} → {demand.max_replicas} (autoscaling)"
    return str(demand.max_replicas)


def format_bundles(demand: Demand) -> str:
    """A replica's sum, and its bundles where there are several."""
    text = format_resources(demand.reserved)
    if len(demand.bundles) > 1:
        bundles = " + ".join(f"[{format_resources(bundle)}]" for bundle in demand.bundles)
        text += f" in all: {bundles}, {demand.strategy}"
    return text


def endpoints(application: ApplicationSpec) -> list[tuple[str, str]]:
    """What an application answers to: method and path."""
    if application.route_prefix is None:
        return []
    if not application.models:
        return [("ANY", application.route_prefix)]
    prefix = application.route_prefix.rstrip("/")
    return [(method, f"{prefix}{path}") for method, path in LLM_ENDPOINTS]


def format_running(outcome: Outcome, base_url: str | None) -> list[str]:
    """The summary of one application that runs, in the layout that V5's users know."""
    application = outcome.application
    lines = [f"• {application.name}"]
    if outcome.action.change is Change.UNCHANGED:
        lines.append("   Unchanged: it runs already, and was left alone")
    elif outcome.action.reasons:
        lines += format_action(outcome.action)
    if outcome.action.attempt > 1:
        lines.append("   Second attempt, alone: other engines on its GPU disturbed the first")
    lines += format_deployments(outcome)
    lines += [f"   {line}" for line in format_proof(outcome.proof)]
    return lines + format_address(application, base_url)


def format_deployments(outcome: Outcome) -> list[str]:
    """The models of an application, then its other deployments, with what each reserves."""
    lines, served = [], set()
    for model in outcome.application.models:
        lines += [f"   Model: {model.source}", f"   Model ID: {model.model_id}"]
        demand = demand_of(model, outcome.demands)
        if demand:
            served.add(demand.deployment)
            lines += [
                f"   Resources per replica: {format_bundles(demand)}",
                f"   Replicas: {format_replicas(demand)}",
            ]
        lines += [f"   Note: {note}" for note in model.notes]
    return lines + [
        f"   {'Ingress' if demand.ingress else 'Deployment'} {demand.deployment}: "
        f"{format_bundles(demand)} per replica, replicas {format_replicas(demand)}"
        for demand in outcome.demands
        if demand.deployment not in served
    ]


def format_address(application: ApplicationSpec, base_url: str | None) -> list[str]:
    """Where an application answers; `base_url` is as in `Report`."""
    route = application.route_prefix
    if base_url is None:
        return ["   It ran when the cluster was last seen"]
    if route is None:
        return ["   No HTTP route (route_prefix: null)"]
    if not base_url:
        return []
    lines = [f"   Base URL: {base_url}{quote(route.rstrip('/')) or '/'}", "   Endpoints:"]
    return lines + [f"     • {method:<4} {path}" for method, path in endpoints(application)]


def format_proof(proof: Proof | None) -> list[str]:
    """What was checked of a running application, a line each."""
    if proof is None:
        return []
    places = Counter(
        f"{item.deployment}: {format_resources(item.reserved)}, on {format_place(item)}"
        for item in proof.reservations
    )
    broken = {text.partition(": promised")[0] for text in proof.mismatches}
    lines = [f"✗ {text}" for text in proof.mismatches]
    for text, count in places.items():
        mark = "✗" if text.partition(": ")[0] in broken else "✓"
        lines.append(f"{mark} Reserved by {text}" + f" ({count} replicas)" * (count > 1))
    for answer in proof.answers:
        first = f", first token after {answer.first_token_s:.2f} s" if answer.first_token_s else ""
        who = f" to {answer.model_id}" if answer.model_id else ""
        lines.append(f"✓ {answer.request}{who}: answered in {answer.total_s:.2f} s{first}")
    lines += [f"{name} is scaled to zero: not woken up (--wake asks it)" for name in proof.asleep]
    lines += [
        f"{name} is listed, and neither chats, completes, embeds nor scores: not asked"
        for name in proof.mute
    ]
    lines += [format_engine(engine) for engine in proof.engines]
    return [*lines, f"Not asked over HTTP: {proof.skipped}"] if proof.skipped else lines


def format_place(item: Reservation) -> str:
    """ "10.0.0.1 GPU 0", as far as Ray tells."""
    gpus = f" GPU {', '.join(map(str, item.gpus))}" if item.gpus else ""
    return f"{' + '.join(item.nodes)}{gpus}"


def format_engine(engine: EngineFigures) -> str:
    """The engine's own figures, as far as its log has them."""
    parts = []
    if engine.kv_cache_tokens is not None:
        parts.append(f"KV cache {engine.kv_cache_tokens:,} tokens")
    if engine.kv_cache_gib is not None:
        parts.append(f"{engine.kv_cache_gib:.2f} GiB")
    if engine.max_concurrency is not None:
        parts.append(f"{engine.max_concurrency:g} requests of full length at once")
    if engine.weights_gib is not None:
        parts.append(f"weights {engine.weights_gib:.2f} GiB")
    if engine.weights_s is not None:
        parts.append(f"weights loaded in {engine.weights_s:.1f} s")
    if engine.start_s is not None:
        parts.append(f"engine ready {engine.start_s:.1f} s later")
    return f"Engine of {engine.model_id} says: {', '.join(parts)}"


def format_unfinished(outcome: Outcome, dashboard_url: str) -> list[str]:
    """The summary of one application that does not run: what happened, why, where to look."""
    name = outcome.application.name
    lines = [f"• {name}: {outcome.result.value} after {format_seconds(outcome.seconds)}"]
    if outcome.cause:
        lines += format_cause(outcome.cause)
    if outcome.result is Result.UNKNOWN:
        lines.append("   The cluster was lost: whether it runs, or ever will, is not known")
    doing = "deleting" if outcome.action.change is Change.DELETE else "deploying"
    if outcome.result is Result.INTERRUPTED:
        lines.append(
            f"   It was submitted and goes on {doing}; this program no longer watches it"
            if outcome.submitted
            else "   It was not submitted"
        )
    if outcome.result is Result.STILL_DEPLOYING and outcome.state:
        lines.append(f"   Last state: {' · '.join(filter(None, describe_state(outcome.state)))}")
        if not outcome.deleted:
            lines.append(f"   The cluster goes on {doing} it")
    if outcome.deleted:
        lines.append("   It was deleted again (--on-failure delete)")
    lines += [f"   {line}" for line in format_survivors(outcome)]
    lines += [f"   Logs: {command}" for command in log_commands(outcome)]
    if outcome.submitted and dashboard_url and outcome.result is not Result.UNKNOWN:
        lines.append(f"   Dashboard: {dashboard_url}/#/serve/applications/{quote(name, safe='')}")
    return lines


def format_survivors(outcome: Outcome) -> list[str]:
    """What still serves of what ran before an edit that failed, read from the replicas."""
    action, state = outcome.action, outcome.state
    deleting = action.change is Change.DELETE and outcome.submitted
    if action.before is None or outcome.result is Result.UNKNOWN or deleting:
        return []
    if outcome.rollback:
        return [f"{outcome.rollback[:1].upper()}{outcome.rollback[1:]} (--on-failure rollback)"]
    if not outcome.submitted or state is None:
        return [] if outcome.submitted else ["What ran before was not touched"]
    now = {r.replica_id for d in state.deployments for r in d.replicas if r.state == "RUNNING"}
    left = [
        (d.name, sum(replica.replica_id in now for replica in d.replicas), len(d.replicas))
        for d in action.before.state.deployments
    ]
    if not any(count for _, count, _ in left):
        return ["Nothing from before the edit serves any more"]
    serving = [f"{count} of {total} replicas of {name}" for name, count, total in left]
    return [f"Still serving from before the edit: {', '.join(serving)}"]


def log_commands(outcome: Outcome) -> list[str]:
    """The commands that print what the replica that died last wrote: its stderr, its stdout (the
    engine writes to either), and its log in Serve's words."""
    state = outcome.state if outcome.submitted else None
    dead = failed_replicas(state) if state else []
    if not dead or outcome.result is Result.RUNNING:
        return []
    last = dead[0]
    actor = f"ray logs actor --id {last.actor_id} --tail {LOG_LINES}"
    return [f"{actor} --err", actor, f"ray logs {last.log_file.lstrip('/')}"]


def format_seconds(seconds: float) -> str:
    """ "42 s" or "3 min 05 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class Report:
    """How a run ended. `base_url` is None when the cluster was lost, and empty without an HTTP
    proxy; `others` are the running applications that the file does not name."""

    outcomes: Sequence[Outcome]
    code: int
    base_url: str | None
    dashboard_url: str
    seconds: float
    others: Sequence[ApplicationState] = ()

    @property
    def warnings(self) -> list[str]:
        """What is odd, though no promise is broken."""
        proofs = [outcome.proof for outcome in self.outcomes if outcome.proof]
        return small_caches([engine for proof in proofs for engine in proof.engines])


def format_summary(report: Report) -> list[str]:
    """The whole summary, line by line."""
    running = [outcome for outcome in report.outcomes if outcome.result is Result.RUNNING]
    deleted = [outcome for outcome in report.outcomes if outcome.result is Result.DELETED]
    failed = [o for o in report.outcomes if o.result not in (Result.RUNNING, Result.DELETED)]
    doomed = sum(outcome.action.change is Change.DELETE for outcome in report.outcomes)
    wanted = len(report.outcomes) - doomed
    good = not failed and report.code == EXIT_OK
    title = f"{'✅' if good else '⚠️ '} Deployment Summary"
    lines = [RULE, title, RULE]
    for done, count, total in (("deployed", running, wanted), ("deleted", deleted, doomed)):
        if total:
            seconds = format_seconds(report.seconds)
            lines.append(f"Total applications {done}: {len(count)}/{total} in {seconds}")
    lines += format_group(
        "📋 Successfully Deployed Applications:",
        [format_running(outcome, report.base_url) for outcome in running],
    )
    lines += format_group("🗑️  Deleted Applications:", map(format_deleted, deleted))
    lines += format_group(
        "❌ Not Running:" if wanted else "❌ Not Deleted:",
        [format_unfinished(outcome, report.dashboard_url) for outcome in failed],
    )
    lines += ["", *(f"⚠️  {text}" for text in report.warnings)]
    lines += [*format_others(report.others), RULE]
    if good:
        lines.append(f"🔥 All {'deployments' if wanted else 'deletions'} completed!")
    if report.dashboard_url:
        lines.append(f"💡 Ray Dashboard: {report.dashboard_url}")
        lines.append("💡 Check deployment status and resource usage in the dashboard")
    return [*lines, RULE]


def format_group(title: str, items: Iterable[list[str]]) -> list[str]:
    """A part of the summary; nothing when there is nothing in it."""
    lines = [line for item in items for line in ("", *item)]
    return ["", title, THIN_RULE, *lines] if lines else []


def format_deleted(outcome: Outcome) -> list[str]:
    gone = "deleted; what it held is free" if outcome.action.before else "it was not there"
    notes = outcome.action.reasons[1:]
    return [f"• {outcome.application.name}: {gone}", *(f"   Note: {note}" for note in notes)]


def format_others(others: Sequence[ApplicationState]) -> list[str]:
    """The running applications that the file does not name."""
    names = ", ".join(f"{state.name} ({state.status})" for state in others)
    return [f"💡 Not in the file, left alone: {names}; --prune deletes them", ""] if others else []


JSON_VERSION = 1


def report_json(report: Report) -> Config:
    """The report for programs; the README documents it. A key that is gone or means another thing
    raises the version, a new one does not."""
    return {
        "version": JSON_VERSION,
        "exit_code": report.code,
        "seconds": round(report.seconds, 1),
        "dashboard": report.dashboard_url,
        "warnings": report.warnings,
        "applications": [outcome_json(outcome, report.base_url) for outcome in report.outcomes],
        "not_in_file": [state_json(state) for state in report.others],
    }


def state_json(state: ApplicationState) -> Config:
    return {"name": state.name, "status": state.status, "route_prefix": state.route_prefix}


def outcome_json(outcome: Outcome, base_url: str | None) -> Config:
    """One application of the report."""
    application, state = outcome.application, outcome.state
    route = application.route_prefix
    return {
        **action_json(outcome.action, outcome.demands),
        "result": outcome.result.value,
        "seconds": round(outcome.seconds, 1),
        "submitted": outcome.submitted,
        "deleted": outcome.deleted or outcome.result is Result.DELETED,
        "rollback": outcome.rollback or None,
        "attempts": outcome.action.attempt,
        "proof": dataclasses.asdict(outcome.proof) if outcome.proof else None,
        "status": state.status if state else None,
        "cause": outcome.cause.text if outcome.cause else None,
        "hint": outcome.cause.hint if outcome.cause else None,
        "logs": log_commands(outcome),
        "base_url": base_url + quote(route.rstrip("/")) if base_url and route else None,
        "endpoints": [f"{method} {path}" for method, path in endpoints(application)],
    }


def action_json(action: Action, demands: Sequence[Demand]) -> Config:
    """What a run does, or would do, with one application."""
    return {
        "name": action.application.name,
        "change": action.change.value,
        "reasons": list(action.reasons),
        "gap": gap(action) or None,
        "route_prefix": action.application.route_prefix,
        "models": [
            {
                "model_id": model.model_id,
                "source": model.source,
                "promised": dict(model.promised),
                "measures_memory": model.measures_memory,
                "notes": list(model.notes),
            }
            for model in action.application.models
        ],
        "deployments": [
            {
                "name": demand.deployment,
                "ingress": demand.ingress,
                "reserved_per_replica": demand.reserved,
                "bundles": [dict(bundle) for bundle in demand.bundles],
                "strategy": demand.strategy,
                "min_replicas": demand.min_replicas,
                "max_replicas": demand.max_replicas,
            }
            for demand in demands
        ],
    }


@dataclass(frozen=True)
class PlanReport:
    """What a run would do. `built` has what each deployment reserves, or why it can't be built."""

    actions: Sequence[Action]
    built: Mapping[str, tuple[Demand, ...] | Cause]
    prediction: Prediction
    code: int
    others: Sequence[ApplicationState] = ()

    def demands(self, action: Action) -> tuple[Demand, ...]:
        """What an application's deployments reserve; for one that stays, what they do now."""
        built = self.built.get(action.application.name)
        if built is None and action.before and action.before.record:
            return action.before.record.demands
        return built if isinstance(built, tuple) else ()

    def cause(self, action: Action) -> Cause | None:
        built = self.built.get(action.application.name)
        return built if isinstance(built, Cause) else None


def plan_json(report: PlanReport) -> Config:
    """The plan for programs; the README documents it."""
    rows = []
    for action in report.actions:
        cause = report.cause(action)
        row = action_json(action, report.demands(action))
        rows.append({**row, "cause": cause and cause.text, "hint": cause and cause.hint})
    return {
        "version": JSON_VERSION,
        "exit_code": report.code,
        "applications": rows,
        "not_in_file": [state_json(state) for state in report.others],
        "packing": format_prediction(report.prediction),
        "misfits": [format_misfit(fitting) for fitting in report.prediction.misfits],
    }


def format_plan(report: PlanReport) -> list[str]:
    """What `--plan` prints: what each replica would reserve, and where all of it would go."""
    lines = [RULE, "📋 Plan (nothing was changed)", RULE]
    for action in report.actions:
        application, cause = action.application, report.cause(action)
        lines += ["", f"• {application.name}  {application.route_prefix or '(no HTTP route)'}"]
        lines += format_action(action)
        if cause:
            lines += format_cause(cause)
            continue
        lines += [
            f"   {demand.deployment}{' (ingress)' if demand.ingress else ''}: "
            f"{format_bundles(demand)} per replica, replicas {format_replicas(demand)}"
            for demand in report.demands(action)
        ]
        lines += [f"   Note: {note}" for model in application.models for note in model.notes]
        lines += [
            f"   ⚠️  {model.model_id} shares its GPU and measures at its start what is free there: "
            "engines that start with it disturb that; set engine_kwargs.kv_cache_memory_bytes, or "
            "deploy with --stagger"
            for model in application.models
            if model.measures_memory and changes(action)
        ]
    for state in report.others:
        lines += ["", f"• {state.name}  {state.route_prefix or '(no HTTP route)'}"]
        lines.append(f"   not in file: it is {state.status} and left alone (--prune deletes it)")
    crowded = format_crowded(report)
    return [*lines, "", THIN_RULE, *format_prediction(report.prediction), *crowded, RULE]


def format_crowded(report: PlanReport) -> list[str]:
    """The GPUs whose predicted engines want more than all of the card's memory in sum."""
    prediction = report.prediction
    wanted: dict[str, float] = {}
    for action in report.actions:
        for model in action.application.models:
            demand = demand_of(model, report.demands(action))
            if demand:
                wanted[label_of(demand)] = model.memory_fraction
    sums: dict[tuple[int, int], float] = {}
    for label, slot in prediction.ledger.placed:
        for device, _ in slot.gpus:
            place = (slot.node, device)
            sums[place] = sums.get(place, 0.0) + wanted.get(label, 0.0)
    return [
        f"⚠️  node {prediction.nodes[node].name} · GPU {device}: gpu_memory_utilization adds up to "
        f"{short(total)}; engines that want more than 1 of a card run out of memory"
        for (node, device), total in sorted(sums.items())
        if round(total, 4) > 1
    ]


def format_action(action: Action) -> list[str]:
    """ "RESTART because args...max_model_len: 2048 → 4096", one line a reason, and who notices."""
    first, *more = action.reasons or ("",)
    lines = [f"   {action.change.value}" + (f" because {first}" if first else "")]
    lines += [f"      and {reason}" for reason in more]
    return [*lines, f"      {gap(action)}"] if gap(action) else lines


def format_cause(cause: Cause) -> list[str]:
    """A cause's lines, and its hint."""
    first, *rest = cause.text.splitlines() or [""]
    lines = [f"   Cause: {first}", *(f"          {line}" for line in rest)]
    return [*lines, f"   Hint: {cause.hint}"] if cause.hint else lines


def format_progress(progress: Progress, now: float) -> str:
    """One line about one application: "falcon3-app  starting replicas 1/2  12 s  …"."""
    parts = [progress.application.name, progress.words]
    if progress.started is not None:
        parts.append(format_seconds((progress.ended or now) - progress.started))
    return "  ".join([*parts, *filter(None, [progress.detail])])


class Terminal:
    """The one place that writes: progress and messages to stderr, the summary to stdout."""

    def __init__(self, clock: Callable[[], float], *, live: bool | None = None) -> None:
        self.clock = clock
        self.out = sys.stdout
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.live_view: Live | None = None
        self.live = self.console.is_terminal if live is None else live
        self.shown: dict[str, tuple[str, str]] = {}
        self.secrets: frozenset[str] = frozenset()

    def say(self, text: str) -> None:
        """A message about the run as a whole."""
        self.console.print(mask(text, self.secrets), markup=False, emoji=False)

    def show(self, progress: Sequence[Progress]) -> None:
        """The progress of all applications: one live line each, or one line a change."""
        if self.live:
            self.draw(progress)
            return
        for item in progress:
            now = (item.words, item.detail)
            if self.shown.get(item.application.name) != now:
                self.shown[item.application.name] = now
                stamp = time.strftime("%H:%M:%S")
                self.say(f"{stamp}  {format_progress(item, self.clock())}")

    def draw(self, progress: Sequence[Progress]) -> None:
        """Redraw the live lines; a spinner turns where something is being waited for."""
        if self.live_view is None:
            self.live_view = Live(console=self.console, auto_refresh=False)
            self.live_view.start()
        table = Table.grid(padding=(0, 2))
        for item in progress:
            elapsed = (item.ended or self.clock()) - (item.started or self.clock())
            table.add_row(
                STATE_ICONS.get(item.words, "🚀"),
                Text(item.application.name, style="bold"),
                Text(item.words, style=STATE_STYLES.get(item.words, "yellow")),
                Text(format_seconds(elapsed) if item.started is not None else "", style="dim"),
                Text(
                    mask(item.detail, self.secrets), style="dim", overflow="ellipsis", no_wrap=True
                ),
            )
        self.live_view.update(table, refresh=True)

    def close(self) -> None:
        """End the live view; its last picture stays on the screen."""
        if self.live_view is not None:
            self.live_view.stop()
            self.live_view = None

    def print_report(self, report: Report, options: Options) -> None:
        """The summary, or its JSON, to stdout; tracebacks to stderr when `--logs` asks for them."""
        if options.json:
            self.print_lines([json.dumps(report_json(report), indent=2)])
        else:
            self.print_lines(format_summary(report))
        for outcome in report.outcomes:
            if options.worker_logs and outcome.detail:
                self.say(f"--- {outcome.application.name}\n{outcome.detail}")

    def print_plan(self, report: PlanReport, options: Options) -> None:
        """The plan, or its JSON, to stdout."""
        if options.json:
            self.print_lines([json.dumps(plan_json(report), indent=2)])
        else:
            self.print_lines(format_plan(report))

    def print_lines(self, lines: Sequence[str]) -> None:
        """The plan or the summary, to stdout."""
        print(mask("\n".join(lines), self.secrets), file=self.out, flush=True)


STATE_ICONS = {"queued": "⏳", "RUNNING": "✅", "DELETED": "🗑️", "FAILED": "❌"}
STATE_STYLES = {"queued": "dim", "RUNNING": "green", "DELETED": "green", "FAILED": "red"}


# ======================================================================================
# 12. Command line: options, main() -> int, the one place where exceptions become exit codes
# ======================================================================================


def parse_options(argv: Sequence[str] | None) -> Options:
    """The command line as Options; argparse exits with 2 by itself when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="app_v5.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="a Ray Serve config")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the cluster (default: RAY_ADDRESS, or this machine's)",
    )
    add_purpose_options(parser.add_argument_group("what to do"))
    add_manner_options(parser.add_argument_group("how"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print one JSON document to stdout, all else to stderr"
    )
    output.add_argument(
        "--logs",
        dest="worker_logs",
        action="store_true",
        help="show the workers' logs and tracebacks",
    )
    given = vars(parser.parse_args(argv))
    against = [name for name in ("prune", "force", "no_downtime") if given[name]]
    if given["delete"] and against:
        parser.error(f"--delete and --{against[0].replace('_', '-')} exclude each other")
    return Options(**{**given, "only": tuple(given["only"])})


def add_purpose_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--plan",
        action="store_true",
        help="show what would go where, change nothing; exit 1 when something can't fit",
    )
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="only the applications of this name; may be a pattern such as 'falcon*', and repeated",
    )
    group.add_argument("--force", action="store_true", help="deploy again what runs unchanged, too")
    group.add_argument(
        "--prune",
        action="store_true",
        help="first delete the running applications that the file does not name",
    )
    group.add_argument(
        "--delete",
        action="store_true",
        help="delete the applications that the file names, and wait until what they hold is free",
    )


def add_manner_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-workers",
        type=positive_int,
        metavar="N",
        help="applications that deploy at once (default: min(applications, max(2, CPU cores))); "
        "1 deploys one after the other, as V4 did",
    )
    group.add_argument(
        "--timeout",
        dest="timeout_s",
        type=timeout_seconds,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="how long to wait for an application from its submission (default 1800, 0: for ever)",
    )
    group.add_argument(
        "--allow-pending",
        action="store_true",
        help="deploy what no node can hold, too: the cluster will grow",
    )
    group.add_argument(
        "--stagger",
        action="store_true",
        help="start engines that share a GPU one after the other on each node, so that they do not "
        "disturb each other's memory measurement; others still start at once",
    )
    group.add_argument(
        "--no-smoke-test",
        dest="smoke_test",
        action="store_false",
        help="do not ask the applications anything over HTTP",
    )
    group.add_argument(
        "--wake", action="store_true", help="ask models that have scaled to zero, too"
    )
    group.add_argument(
        "--no-downtime",
        action="store_true",
        help="restart by starting new replicas before the old ones stop; an application for which "
        "there is no room is not touched",
    )
    group.add_argument(
        "--on-failure",
        choices=("keep", "delete", "rollback"),
        default="keep",
        help="what to do when an application failed or ran out of time: delete it if it is new, "
        "or roll an edited one back to its last good configuration (default: keep)",
    )


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def timeout_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError("must be 0 (no limit) or a number of seconds")
    return seconds


@dataclass
class Session:
    """One run of the program: its options, and what it acts on."""

    options: Options
    cluster: RayCluster
    terminal: Terminal
    board: Board


def run(session: Session, environ: Mapping[str, str]) -> int:
    """Load, normalise, plan, deploy, report. Returns the exit code.

    Raises ConfigError (nothing was touched) and ClusterError.
    """
    options, cluster = session.options, session.cluster
    terminal, board = session.terminal, session.board
    started = board.clock()
    document = load_document(options.config, environ)
    terminal.secrets = document.secrets
    everything = checked_applications(document, terminal)
    applications = chosen(everything, options)
    purpose = "delete" if options.delete else "deploy"
    terminal.say(f"📖 Loaded config: {options.config}")
    terminal.say(f"📦 Found {len(applications)} application(s) to {purpose}")
    terminal.say("🔧 Connecting to Ray...")
    cluster.connect(options.address)
    cluster.check_schema(document)
    actions, others = decided(document, everything, applications, session)
    if options.plan:
        return plan(session, actions, others)
    make_ready(session, document, actions)
    with stop_signals(board):
        outcomes = deploy(actions, cluster, board, session.options, terminal.show)
    terminal.close()
    if board.stop_code:
        terminal.say(f"🛑 Stopped: {board.stop_reason}")
    report = Report(
        outcomes,
        exit_code(outcomes, board.stop_code),
        last_endpoint(session),
        cluster.dashboard_url,
        board.clock() - started,
        others,
    )
    terminal.print_report(report, options)
    return report.code


def last_endpoint(session: Session) -> str | None:
    """The public address for the summary; None when the cluster was lost: what became of the
    applications has to be said all the same."""
    if session.board.stop_code == EXIT_CLUSTER:
        return None
    try:
        return session.cluster.endpoint()
    except ClusterError as error:
        session.terminal.say(f"⚠️  {error}")
        return None


def chosen(
    applications: tuple[ApplicationSpec, ...], options: Options
) -> tuple[ApplicationSpec, ...]:
    """The applications that --only names; all without it."""
    # With --prune a pattern may be about applications that only the cluster has.
    if not options.prune:
        check_patterns([application.name for application in applications], options)
    return tuple(item for item in applications if is_chosen(item.name, options))


def check_patterns(names: Sequence[str], options: Options) -> None:
    """Raise ConfigError for an --only that is about none of these applications."""
    for pattern in options.only:
        if not fnmatch.filter(names, pattern):
            message = f"--only {pattern}: no application has that name"
            hint = f"there are {', '.join(names)}"
            raise ConfigError([Problem("command line", None, (), message, hint)])


def is_chosen(name: str, options: Options) -> bool:
    return not options.only or any(fnmatch.fnmatchcase(name, p) for p in options.only)


def decided(
    document: Document,
    everything: Sequence[ApplicationSpec],
    applications: Sequence[ApplicationSpec],
    session: Session,
) -> tuple[list[Action], list[ApplicationState]]:
    """What to do with each application, and the running ones that nobody mentions.

    `everything` is what the file names, `applications` what --only leaves of that. Raises
    ConfigError for a route that another application has.
    """
    options, cluster = session.options, session.cluster
    names = [application.name for application in applications]
    claims = {} if options.plan else cluster.claim(names)
    states = cluster.states()
    known = {application.name for application in everything}
    others = [s for s in states.values() if s.name not in known and s.status != "DELETING"]
    pruned = [state for state in others if options.prune and is_chosen(state.name, options)]
    check_patterns([*known, *(state.name for state in others)], options)
    claims |= {} if options.plan else cluster.claim(state.name for state in pruned)
    mentioned = {*names, *(state.name for state in pruned)}
    running = cluster.running(state for name, state in states.items() if name in mentioned)
    deletions = [
        deletion(ApplicationSpec(-1, s.name, s.route_prefix, {}), running, claims, PRUNED)
        for s in pruned
    ]
    if options.delete:
        return [deletion(item, running, claims) for item in applications], others
    kept = {name: state for name, state in states.items() if state not in pruned}
    findings = taken_routes(applications, kept)
    if findings:
        raise ConfigError(problems_of(document, findings))
    mark = f"{time.time_ns():x}"
    actions = [
        decide(item, running.get(item.name), options, mark=mark, claim=claims.get(item.name))
        for item in applications
    ]
    return [*deletions, *actions], [state for state in others if state not in pruned]


def make_ready(session: Session, document: Document, actions: Sequence[Action]) -> None:
    """Say what is about to happen, and start what takes long: Serve, and the builders' imports."""
    cluster, terminal = session.cluster, session.terminal
    doomed = [a.application.name for a in actions if a.change is Change.DELETE and a.before]
    if doomed:
        terminal.say(f"🗑️  Deleting {', '.join(doomed)}")
    if session.options.delete:
        return
    if cluster.grows() and not session.options.allow_pending:
        terminal.say("⚠️  An autoscaler is active: what no node can hold yet is deployed and waits")
        session.options = replace(session.options, allow_pending=True)
    cluster.prepare([action.application for action in actions if changes(action)])
    terminal.say("🔧 Starting Ray Serve...")
    ignored = cluster.start_serve(document.data)
    if ignored:
        terminal.say(
            f"⚠️  Serve is already running and keeps its own http_options ({', '.join(ignored)}); "
            "`serve shutdown` and a new run would change them"
        )
    terminal.say("🔄 Starting concurrent deployment...")


def plan(session: Session, actions: Sequence[Action], others: Sequence[ApplicationState]) -> int:
    """Build, predict, print. Returns 0 when all fits, 1 when something does not."""
    cluster, terminal, board = session.cluster, session.terminal, session.board
    changing = [action for action in actions if changes(action)]
    applications = [action.application for action in changing]
    cluster.prepare(applications)
    with stop_signals(board):
        built = build_all(applications, cluster, board, session.options, terminal.show)
    terminal.close()
    if board.stop_code:
        terminal.say(f"🛑 Stopped: {board.stop_reason}")
        return board.stop_code
    demands = [
        demand
        for action, result in zip(changing, built, strict=True)
        if isinstance(result, tuple)
        for demand in counted(action, result)
    ]
    prediction = predict(demands, *cluster.nodes(moving(actions)))
    failed = any(isinstance(result, Cause) for result in built)
    code = EXIT_FAILED if failed or prediction.misfits else EXIT_OK
    results = dict(zip([item.name for item in applications], built, strict=True))
    terminal.print_plan(PlanReport(actions, results, prediction, code, others), session.options)
    return code


def checked_applications(document: Document, terminal: Terminal) -> tuple[ApplicationSpec, ...]:
    """The document's applications; warnings go to the terminal. Raises ConfigError."""
    problems = check_document(document, known_keys())
    if not has_errors(problems):
        applications, findings = read_applications(document)
        problems = sorted(problems + problems_of(document, findings), key=position)
    if has_errors(problems):
        raise ConfigError(problems)
    for problem in problems:
        terminal.say(f"⚠️  {format_problem(problem)}")
    return applications


def has_errors(problems: Sequence[Problem]) -> bool:
    return any(problem.severity is Severity.ERROR for problem in problems)


@contextlib.contextmanager
def stop_signals(board: Board) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the waiting; a second one ends the program at once."""

    def stop(number: int, frame: object) -> None:
        code = EXIT_SIGNALS[signal.Signals(number)]
        if board.stop_code:
            os._exit(code)
        board.stop(code, signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in EXIT_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_interrupt(number: int, frame: object) -> None:
    """Before anything is deployed a signal ends the run where it stands."""
    raise Interrupted(EXIT_SIGNALS[signal.Signals(number)])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn every known exception into one clear message and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a terminal that has no emoji shows question marks
    options = parse_options(argv)
    board = Board()
    terminal = Terminal(board.clock)
    sys.stdout = sys.stderr  # Ray prints what raylets say; only the report belongs on stdout
    cluster = RayCluster(options.worker_logs)
    for number in EXIT_SIGNALS:
        signal.signal(number, raise_interrupt)
    try:
        code = run(Session(options, cluster, terminal, board), os.environ)
    except ConfigError as error:
        for problem in error.problems:
            terminal.say(f"❌ {format_problem(problem)}")
        code = EXIT_CONFIG
    except ClusterError as error:
        terminal.say(f"❌ {error}" + (f"\n   {error.hint}" if error.hint else ""))
        code = EXIT_CLUSTER
    except Interrupted as error:
        terminal.say("🛑 Interrupted before anything was deployed")
        code = error.code
    except BrokenPipeError:
        # Whoever read the output has gone, as `| head` does; Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), terminal.out.fileno())
        code = EXIT_FAILED
    terminal.close()
    if code in (EXIT_CLUSTER, *EXIT_SIGNALS.values()):
        # A thread may still wait for a cluster that does not answer, and Python would join it.
        terminal.out.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
