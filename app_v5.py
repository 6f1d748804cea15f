#!/usr/bin/env python3
"""Put many language models on a Ray cluster from one YAML file, correctly and at once.

    ray start --head
    python3 app_v5.py multi_model_config.yaml

The file is a Ray Serve config (what `serve deploy` takes). Every application is built by Ray's own
builders, fitted to the exact CPUs and GPUs that it declares, and deployed concurrently; one that
fails does not touch the others, and its real cause is printed.

Exit codes: 0 every application runs and answers; 1 one failed, or could not be verified; 2 the
config or the command line is wrong and nothing was touched; 3 no Ray cluster, or it was lost;
4 time ran out with one still deploying; 5 something would change (--detailed-exitcode);
129 SIGHUP; 130 Ctrl-C; 143 SIGTERM.
"""
# The sections, in the order in which the data flows: grep "^# ==" app_v5.py

from __future__ import annotations

import importlib.util
import os
import signal
import sys

if __name__ == "__main__":
    # The imports below take a moment, and nothing is there yet that a signal could leave behind.
    for early in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(early) is not signal.SIG_IGN:
            signal.signal(early, lambda number, _: os._exit(128 + number))
    needed = ("ray", "fastapi", "rich", "yaml")  # Serve needs FastAPI, Ray alone does not
    if missing := [name for name in needed if not importlib.util.find_spec(name)]:
        sys.exit(f"❌ {', '.join(missing)}: not installed; pip install -r requirements.txt")

import argparse
import ast
import contextlib
import dataclasses
import difflib
import fnmatch
import hmac
import io
import itertools
import json
import logging
import math
import re
import socket
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO
from urllib.parse import quote, quote_plus, urlencode

import yaml

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationDetails, DeploymentDetails, ReplicaDetails

# == 1. Settings: what one may want to tweak ===========================================

POLL_INTERVAL_S = 1.0
HEARTBEAT_INTERVAL_S = 5.0
CONNECT_TIMEOUT_S = 10.0
BUILD_PATIENCE_S = 8.0  # with another's builder, once its module is imported
POLL_TIMEOUT_S = 5.0
LOG_TIMEOUT_S = 5
CONTROLLER_TIMEOUT_S = 30.0  # Serve's controller may restart in that time
CLUSTER_LOST_AFTER_S = 30.0
CONTROLLER_LOST_AFTER_S = 120.0
UNHEALTHY_GRACE_S = 30.0
PROXY_TIMEOUT_S = 60.0  # a proxy that restarts took 25 s
SMOKE_TIMEOUT_S = 60.0
STOP_GRACE_S = 2.0
MEMORY_TIMEOUT_S = 30.0  # for vLLM to tell of a model's memory; it may fetch a config.json

MAX_FILE_BYTES = 2 * 1024 * 1024
MAX_DEPTH = 100
MAX_VALUES = 100_000  # aliases expanded; real configs stay a hundred times below all three
MOST_VALUE_CHARACTERS = 60
MOST_CAUSE_CHARACTERS = 300
MOST_BODY_BYTES = 2**24
MOST_LOGS, LOG_LINES = 3, 400
MANY_REQUESTS = 1_000_000  # Ray's max_ongoing_requests for LLMs is above that: no limit

WHOLE_GPU_MEMORY_FRACTION = 0.9
"""What an engine takes of a card that it has to itself; vLLM's own default is 0.92, and engines
that share a card need room for one CUDA context each."""

ACTIVATIONS_BYTES = 3 * 2**29
"""What an engine keeps of its share for activations, graphs and CUDA's context: a guess (from 0.6
to 5.6 GiB was seen for models of 0.5 to 1 billion parameters)."""

SURGE_PERCENT = 20
"""How many replicas more than wanted --no-downtime starts at a time: as many as Serve otherwise
stops, max(20%, 1) (ray/serve/_private/deployment_state.py)."""

# == 2. Types: what flows from section to section ======================================

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GIB = 2**30
EXIT_OK, EXIT_FAILED, EXIT_CONFIG, EXIT_CLUSTER, EXIT_TIMEOUT, EXIT_CHANGES = 0, 1, 2, 3, 4, 5

Config = dict[str, Any]  # one mapping as YAML gives it: keys are strings, values are plain data
KeyPath = tuple[str | int, ...]  # where a value stands: ("applications", 0, "args", "llm_configs")
Place = tuple[str, int, int]  # a file, and a line and a column in it, which start at 1
Resources = Mapping[str, float]  # Ray's, by name: {"CPU": 1.0, "GPU": 0.45, "memory": 2e9} (bytes)
Response = tuple[int, str, float]  # over HTTP: status, text, and the seconds since it was asked for


@dataclass(frozen=True)
class Problem:
    """One thing wrong in the config: at which key, what, and what would be right."""

    path: KeyPath
    message: str
    hint: str = ""
    warning: bool = False
    place: Place | None = None


Problems = list[Problem]


class ConfigError(Exception):
    """What was given is wrong and nothing was touched (exit code 2): the arguments say what."""


@dataclass(frozen=True)
class ModelSpec:
    """One LLM of an application; `promised` is what a replica shall reserve, as far as the config
    says it. `measures_memory`: its engine asks what is free on a card that it shares."""

    model_id: str
    source: str
    deployment_name: str
    promised: Resources = field(default_factory=dict)
    measures_memory: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ApplicationSpec:
    """One application of the config, normalised: `config` is what Ray's own schema takes."""

    index: int
    name: str
    route_prefix: str | None
    config: Config
    models: tuple[ModelSpec, ...] = ()


@dataclass(frozen=True)
class Card:
    """A GPU's memory in bytes: all of it, and what is in use."""

    total: int
    used: int = 0


@dataclass(frozen=True)
class Node:
    """One live node; it `matches` label selectors as Ray says; `cards` are GPUs, where known."""

    name: str
    total: Resources
    free: Resources
    matches: Callable[[Mapping[str, str]], bool] = lambda selector: not selector
    holders: tuple[Reservation, ...] = ()
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True)
class Memory:
    """What vLLM says of one worker of an engine before it loads a weight, in bytes and in blocks of
    its KV cache. `requests` has the longest requests, in tokens, for the blocks that max_model_len
    needs and, in steps of 1%, for less; `sequences` is max_num_seqs where each needs a block
    (Mamba); `pinned` is kv_cache_memory_bytes. `unknown` says why there is nothing of all that."""

    weights: int = 0
    block: int = 0
    requests: tuple[tuple[int, int], ...] = ()
    sequences: int = 0
    fraction: float = 0.0
    pinned: int = 0
    platform: str = ""
    unknown: str = ""


@dataclass(frozen=True)
class Demand:
    """What each replica of one deployment reserves, from Ray's own build of the application."""

    application: str
    deployment: str
    bundles: tuple[Resources, ...]
    strategy: str = "PACK"  # or SPREAD, STRICT_PACK, STRICT_SPREAD
    min_replicas: int = 1
    max_replicas: int = 1
    initial_replicas: int = 1  # that Serve starts
    ingress: bool = False
    max_replicas_per_node: int | None = None
    label_selectors: tuple[Mapping[str, str], ...] = ()  # one per bundle, or empty
    max_ongoing_requests: int = 0
    target_ongoing_requests: float = 0.0
    memory: Memory | None = None  # of an LLM's engine

    @property
    def label(self) -> str:
        return f"{self.application}/{self.deployment}"

    @property
    def reserved(self) -> Resources:
        """What one replica reserves in all its bundles."""
        return dict(sum((Counter(bundle) for bundle in self.bundles), Counter[str]()))


@dataclass(frozen=True)
class Record:
    """What a run leaves in the cluster about an application: enough to tell what a later one would
    change. Secrets stand in `config` as keyed fingerprints."""

    version: str
    config: Config
    demands: tuple[Demand, ...]


Running = tuple["ApplicationDetails", str, Record | None]
"""An application that is on the cluster already, its deployments' version, and what the run left
that gave them that; None where it was no run of this program."""


@dataclass(frozen=True)
class Reservation:
    """What one replica holds on one node, read back from Ray; `gpus` are indices there."""

    application: str
    deployment: str
    replica_id: str
    node_id: str
    node: str
    reserved: Resources
    gpus: tuple[int, ...] = ()


@dataclass
class Proof:
    """What was checked of an application that runs. `mismatches` are broken promises; `answers` are
    requests, "POST /v1/completions to MODEL", and the seconds that each took; `notes` say what was
    not asked, and `unverified` why it could not be."""

    reservations: Sequence[Reservation] = ()
    mismatches: Sequence[str] = ()
    answers: Sequence[tuple[str, float]] = ()
    notes: tuple[str, ...] = ()
    unverified: str = ""


Change = Literal["create", "unchanged", "in place", "RESTART", "delete"]
Result = Literal["RUNNING", "DELETED", "FAILED", "STILL DEPLOYING", "UNKNOWN", "INTERRUPTED"]
"""What a run does to what runs under an application's name, and how that ended."""


@dataclass
class Action:
    """What a run does with one application, and what comes of it; only its worker changes that.

    Serve compares `version` for itself. `restarting` names the deployments that get new replicas;
    `surge` starts those before the old ones stop. `record` is of the run that deployed what runs
    `before`; `kept` is what will be remembered of the config.
    Times are the run's clock, in seconds. `words` and `detail` say what the application does now.
    `sent`: it was handed to Serve, or is being."""

    application: ApplicationSpec
    change: Change
    version: str = ""
    reasons: tuple[str, ...] = ()
    restarting: frozenset[str] = frozenset()
    surge: bool = False
    before: ApplicationDetails | None = None
    record: Record | None = None
    kept: Config = field(default_factory=dict)

    attempt: int = 1
    result: Result | None = None
    words: str = "queued"
    detail: str = ""
    started: float | None = None
    ended: float | None = None
    demands: tuple[Demand, ...] = ()
    phase: str = ""
    sent: bool = False
    details: ApplicationDetails | None = None
    proof: Proof | None = None
    cause: str = ""
    hint: str = ""
    trace: str = ""

    @property
    def name(self) -> str:
        return self.application.name

    @property
    def submits(self) -> bool:
        """Whether the application has to be built and submitted."""
        return self.change not in ("unchanged", "delete")

    def seconds(self, now: float = 0.0) -> float:
        """From its turn to its end, or until now."""
        return 0.0 if self.started is None else max(0.0, (self.ended or now) - self.started)


class ApplicationError(Exception):
    """One application failed; the others go on."""


class ClusterError(Exception):
    """The cluster, or a part of it, could not be asked, which says nothing about an application; a
    run that can not do without ends with exit code 3. A hint stands in a second line."""


class Stopped(Exception):
    """Time ran out, the run was interrupted, or the cluster was lost."""


def option(default: Any, text: str, **how: Any) -> Any:
    """An option of the command line: its default, its help, and what argparse needs besides."""
    kind = str if default is None else type(default)
    how = {"action": "store_true"} if kind is bool else {"type": kind, **how}
    return field(default=default, metadata={"help": text, **how})


def parse_bytes(text: str) -> int:
    """ "80GiB", "80G" or "24576MiB" in bytes. Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d+) ?([MG])i?B?", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 80GiB or 24576MiB")
    return int(found[1]) << {"M": 20, "G": 30}[found[2]]


@dataclass(frozen=True)
class Options:
    """The command line: every field but the first is an option."""

    config: str
    plan: bool = option(False, "show what would go where, change nothing; exit 1 for a misfit")
    only: Sequence[str] | None = option(None, "only names like this: falcon*", action="append")
    force: bool = option(False, "deploy again what runs unchanged, too")
    prune: bool = option(False, "first delete what runs and the file does not name")
    delete: bool = option(False, "delete what the file names, until what it holds is free")
    allow_pending: bool = option(False, "deploy what no node can hold, too: the cluster will grow")
    no_downtime: bool = option(False, "start new replicas before the old ones stop")
    max_workers: int = option(0, "how many at once (min(applications, max(2, CPUs)); 1: as V4)")
    timeout: float = option(1800.0, "seconds for an application (1800; 0: for ever)")
    detailed_exitcode: bool = option(False, "with --plan: 5 when a run would change something")
    export: str = option("", "print the config with exact shares", choices=("serve",))
    gpu_memory: int = option(0, "size of a GPU, where Ray knows none: 80GiB", type=parse_bytes)
    no_smoke_test: bool = option(False, "do not ask the applications anything over HTTP")
    address: str = option("", "HOST:PORT of the cluster (RAY_ADDRESS, or this machine's)")
    json: bool = option(False, "print one JSON document to stdout, all else to stderr")
    logs: bool = option(False, "show the workers' logs and tracebacks")


# == 3. Config: text → document with the place of every key; secrets ===================

TEXT_TAG, MERGE_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
VALUE_ERRORS = (ValueError, LookupError, AttributeError, OverflowError, TypeError)  # PyYAML's, too
VARIABLE = re.compile(r"\$(?:\$\{|\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\})")

LLM_ARGS = ("llm_config", "prefill_config", "decode_config")
"""Builder arguments that hold one LLM each; `llm_configs` holds a list of them."""


class Document:
    """A config file as plain data: environment variables are filled in, and `llm_configs` entries
    that are paths are replaced by what those files hold. Beside it the place of every key and list
    item, the texts that no output may show, how texts are `written` for others, and what is wrong.
    PyYAML alone takes the last of two equal keys, and has no limits. Raises ConfigError for what
    makes all of the file unusable."""

    def __init__(self, file: str, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.yaml = yaml.SafeLoader("")
        self.places: dict[KeyPath, Place] = {(): (file, 0, 0)}
        self.secrets: frozenset[str] = frozenset()
        self.written: dict[Any, str] = {}
        self.problems: Problems = []
        self.values = 0
        self.data: Config = self.load(file, ())
        if as_dict(self.data).get("applications") is None:
            what = "the old form is one item of it; of a RayService it is what serveConfigV2 holds"
            said = f"expected a mapping with `applications` ({what})"
            raise ConfigError(Problem((), said, place=(file, 1, 1)))
        for path, llm, holder in llm_places(self.data):
            if isinstance(llm, str):
                beside = str(Path(file).absolute().parent / llm)
                found = next(filter(os.path.exists, (beside, llm)), beside)
                try:
                    holder[path[-1]] = self.load(found, path)
                except ConfigError as error:
                    self.problems += error.args

    def load(self, file: str, path: KeyPath) -> Any:
        """A file's data, None when there is none. Raises ConfigError when all of it is unusable."""
        self.at = self.places[path]
        try:
            if Path(file).stat().st_size > MAX_FILE_BYTES or not Path(file).is_file():
                raise OSError(f"no regular file of at most {MAX_FILE_BYTES} bytes: {file}")
            self.source, self.at, self.places[path] = file, (file, 0, 0), (file, 1, 1)
            node = yaml.compose(Path(file).read_bytes(), Loader=yaml.SafeLoader)
            return self.walk(node, path) if node else None
        except yaml.MarkedYAMLError as error:
            # Without the line itself, since a secret may stand in it.
            mark, self.at = error.context_mark, self.place(error.problem_mark)
            context = f"{error.context} from line {mark.line + 1}, " if mark else ""
            problem = re.sub("(alias|tag) '(?!tag:).*", r"\1", str(error.problem))
            tabs = " (indent with spaces, not tabs)" if "\\t" in problem else ""
            said = f"not YAML: {context}{problem}{tabs}"
        except (OSError, yaml.YAMLError, RecursionError, *VALUE_ERRORS) as error:
            kind = "not YAML in UTF-8" if isinstance(error, yaml.YAMLError) else "can't be read"
            text = " ".join(re.sub(r"^\[Errno \d+\]", "", str(error)).split())
            said = f"{kind}: {shortened(text, MOST_CAUSE_CHARACTERS)}"
        raise ConfigError(Problem(path, said, place=self.at))

    def place(self, mark: yaml.Mark | None) -> Place:
        return (self.source, mark.line + 1, mark.column + 1) if mark else (self.source, 0, 0)

    def walk(self, node: yaml.Node, path: KeyPath) -> Any:
        """The plain data of a node; variables are filled in, and what is unquoted gets its type
        anew. Raises RecursionError, and what reading a value raises."""
        self.values += 1
        if self.values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise RecursionError(f"more than {MAX_DEPTH} levels, or {MAX_VALUES} values")
        self.at = self.place(node.start_mark)
        self.places.setdefault(path, self.at)
        known = node.tag in yaml.SafeLoader.yaml_constructors
        if isinstance(node, yaml.MappingNode) and known:
            return self.walk_mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and known:
            return [self.walk(item, (*path, index)) for index, item in enumerate(node.value)]
        value = self.yaml.construct_object(node)  # which refuses all other tags
        if isinstance(node, yaml.ScalarNode) and "${" in str(value):
            fill = partial(self.variable, path=path)
            text = VARIABLE.sub(fill, node.value)
            tag = TEXT_TAG if node.style else tag_of(text)
            value = self.yaml.construct_object(yaml.ScalarNode(tag, text, node.start_mark))
            self.yaml.constructed_objects[node] = value  # once for all aliases
            self.written.setdefault(value, VARIABLE.sub(partial(fill, stays=True), node.value))
        if is_secret(value, path):
            self.secrets |= {value}
            if self.written.get(value, value) == value:  # a default may be one, too
                self.written[value] = f"${{{variable_name(path)}}}"
        return value

    def walk_mapping(self, node: yaml.MappingNode, path: KeyPath) -> Config:
        """The same for a mapping. All keys are texts, as in JSON."""
        data: Config = {}
        lines: dict[str, int] = {}
        for key_node, value in sorted(node.value, key=lambda pair: pair[0].tag != MERGE_TAG):
            if key_node.tag == MERGE_TAG:
                merged = self.walk(value, path)
                for mapping in reversed(merged if isinstance(merged, list) else [merged]):
                    data |= dict(mapping.items())
                continue
            key, place = self.yaml.construct_scalar(key_node), self.place(key_node.start_mark)
            here = (*path, key)
            if key in lines:
                message = f"is given twice, in line {lines[key]} and in line {place[1]}"
                self.problems.append(Problem(here, message, "keep one of them", place=place))
            lines[key], self.places[here] = place[1], place
            data[key] = self.walk(value, here)
        return data

    def variable(self, match: re.Match[str], path: KeyPath, stays: bool = False) -> str:
        """A variable's value; where it `stays`, only its default, which no tool fills in."""
        name = match["name"]
        if name is None or (stays and name in self.environ):
            return f"${{{name}}}" if name else "${"
        text = self.environ.get(name, match["default"])
        if text is None or "\\udc" in ascii(text):
            message = f"environment variable {name} is not {'set' if text is None else 'UTF-8'}"
            hint = f"export it, or give a default: ${{{name}:-...}}; $${{ stands for a plain ${{"
            self.problems.append(Problem(path, message, hint, place=self.at))
        elif name in self.environ and tag_of(text) == TEXT_TAG:
            # Not a number, nor a `true`: those would be hidden wherever else they stand.
            self.secrets |= {text}
        return text or ""


def variable_name(path: KeyPath) -> str:
    """What a variable for a secret may be called: as its key, with its place in a list of them."""
    last = max(index for index, key in enumerate(path) if isinstance(key, str))
    return re.sub(r"\W+", "_", "_".join(map(str, path[last:]))).upper()


def tag_of(text: str) -> str:
    """What YAML takes an unquoted text for."""
    return str(yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False)))  # type: ignore[no-untyped-call]


def show_value(value: Any) -> str:
    """A value in a message, short and in YAML's words."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return shortened(repr(value) if isinstance(value, str) else text, MOST_VALUE_CHARACTERS)


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def read_json(text: str) -> Config:
    """A JSON object; empty for anything else."""
    with contextlib.suppress(ValueError):
        return as_dict(json.loads(text))
    return {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_dict(value: Any) -> Config:
    return value if isinstance(value, dict) else {}


def is_rays_builder(application: Config) -> bool:
    return str(application.get("import_path")).startswith("ray.serve.llm")


def llm_places(data: Config) -> Iterator[tuple[KeyPath, Any, Any]]:
    """What may be LLMs among the builders' arguments of a document: path, value, holder. A builder
    of the user's own may take anything there, of which the mappings count."""
    for number, application in enumerate(as_list(data.get("applications"))):
        args = as_dict(as_dict(application).get("args"))
        path: KeyPath = ("applications", number, "args")
        places = [((*path, key), args[key], args) for key in LLM_ARGS if args.get(key)]
        entries: Any = as_list(args.get("llm_configs"))
        places += [((*path, "llm_configs", i), llm, entries) for i, llm in enumerate(entries)]
        for place, llm, holder in places:
            if isinstance(llm, dict) or is_rays_builder(application):
                yield place, llm, holder


# -- secrets -----------------------------------------------------------------------------------

SECRET_WORD = re.compile(
    r"(?:.*(?:password|passwd|passphrase|secret)|pass|pwd|(?:auth)?token|(?:api)?key|cred|"
    r"credential|auth|authorization|bearer|dsn)s?"
)
SHORTEST_SECRET, SHORTEST_NUMBER, LONG_SECRET = 4, 5, 32
HIDDEN, FINGERPRINT = "***", "hmac:"
URL_SECRETS = re.compile(r"(?<=://)[^/?#\s'\"]+(?=@)|(?<=[?&;])([\w.~-]+=)[^&;#\s'\"]+")
"""User info, and the values of a query, or of a connection string."""


def is_secret(value: Any, path: KeyPath) -> bool:
    """Whether it is a text under a key that names secrets: HF_TOKEN, dbPass, but not tokenizer."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", ".".join(map(str, path)))
    # DISABLE_TOKEN: "1" is none, and would be hidden wherever else a 1 stands.
    named = isinstance(value, str) and any(SECRET_WORD.fullmatch(word.lower()) for word in words)
    return named and (len(value) > SHORTEST_NUMBER or tag_of(value) == TEXT_TAG)


@cache
def spellings(secrets: frozenset[str]) -> list[str]:
    """Secrets, and their single lines, as others may have written them; the longest first."""
    # What prints a text of several lines may put something before each.
    forms = secrets | {x for s in secrets for x in s.splitlines() if len(x) > SHORTEST_SECRET}
    for _ in range(2):  # as a `repr` in JSON
        for form in forms:
            forms |= {quote(form), quote(form, safe=""), quote_plus(form), repr(form)[1:-1]}
            forms |= {json.dumps(form, ensure_ascii=flag)[1:-1] for flag in (True, False)}
    return sorted(forms, key=len, reverse=True)


def redact(text: str, secrets: frozenset[str]) -> str:
    """`text` without the secrets, and without what URLs hold of them. Of a long one its beginning
    is enough, since a message may cut it short."""
    for form in spellings(secrets):
        if len(form) < SHORTEST_SECRET:
            text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", HIDDEN, text)
            continue
        least = LONG_SECRET // 2 if len(form) >= LONG_SECRET else len(form)
        for shown in range(len(form), least - 1, -1) if form[:least] in text else ():
            text = text.replace(form[:shown], HIDDEN)
    return URL_SECRETS.sub(lambda match: (match[1] or "") + HIDDEN, text)


def copied(value: Any, change: Callable[[str], str] = str) -> Any:
    """A copy of plain data, with each text changed."""
    if isinstance(value, Mapping):
        return {key: copied(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copied(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def fingerprint(text: str, key: bytes) -> str:
    """16 hexadecimal digits; who has not the key can't guess a weak text from it."""
    return hmac.new(key, text.encode(errors="replace"), "sha256").hexdigest()[:16]


# == 4. Check: document → problems =====================================================

SCHEMA_SOURCES = (
    ("ray", "serve/schema.py"),
    ("ray", "serve/config.py"),
    ("ray", "llm/_internal/serve/core/configs/llm_config.py"),
    ("ray", "llm/_internal/serve/*/*/builder.py"),
    ("ray", "llm/_internal/common/placement.py"),
    ("vllm", "engine/arg_utils.py"),
    ("vllm", "entrypoints/launchers/cli_args.py"),
)
"""Where the schemas stand: importing them takes 2 s for Serve's and 10 s for the LLM's."""

TAKEN = re.compile(r"\w+(?:Schema|Config|Options|Args)\b|AutoscalingPolicy")
"""Which of the classes there are schemas, and neither enumerations nor what Serve tells."""

TOP, DEPLOYMENT, BUILDER = "ServeDeploySchema", "DeploymentSchema", "LLMServingArgs"
LLM, ENGINE, OPTIONS = "LLMConfig", "AsyncEngineArgs", "an LLM's deployment, or its ingress"
VARIABLES, AMOUNTS = "environment variables", "amounts of resources"
PARTS = {"FrontendArgs": ENGINE, "DPOpenAiServingArgs": BUILDER, "PDServingArgs": BUILDER}
"""Schemas whose fields may stand in another's place, too."""

SHORT_RESOURCES = ("num_cpus", "cpus", "num_gpus", "gpus")
"""The spellings accepted beside `ray_actor_options`."""

CHILDREN = {
    "deployment_config": OPTIONS,
    "ingress_deployment_config": OPTIONS,
    "engine_kwargs": ENGINE,
    "placement_group_config": "PlacementGroupConfig",
    "args": BUILDER,
    "runtime_env": "runtime_env",
    "env_vars": VARIABLES,
    **dict.fromkeys(("resources", "bundle_per_worker", "bundles"), AMOUNTS),
}
"""Key -> the schema of its value, where Ray's annotations do not tell it."""

IGNORING = re.compile("Schema$|^Autoscaling|^RequestRouter|^GangScheduling|^DeploymentActor")
"""Schemas for which Ray ignores an unknown key without a word; for the others it refuses one."""

REQUIRED = {LLM: ["model_loading_config"], "ModelLoadingConfig": ["model_id"]}
LISTS = ("applications", "deployments", "deployment_actors", "llm_configs", "bundles")
PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")
INSTEAD = {
    "max_concurrent_queries": "max_ongoing_requests",
    "target_num_ongoing_requests_per_replica": "target_ongoing_requests, in autoscaling_config",
}
"""Old names, which Ray ignores."""

RULES: Mapping[str, tuple[str, type | str | range | tuple[float, float]]] = {
    **dict.fromkeys(LISTS, ("a list", list)),
    **dict.fromkeys((*SHORT_RESOURCES, "memory", AMOUNTS), ("a number, 0 or more", (0, 1e18))),
    **dict.fromkeys(PARALLEL_SIZES, ("a whole number, 1 to 9999", range(1, 10_000))),
    "port": ("a port, 1 to 65535", range(1, 65_536)),
    "max_replicas_per_node": ("a whole number, 1 to 100", range(1, 101)),
    "gpu_memory_utilization": ("above 0, 1 at most", (1e-6, 1)),
    "llm_engine": ("vLLM", "vLLM"),
    "strategy": ("PACK, SPREAD, STRICT_PACK or STRICT_SPREAD", "(STRICT_)?(PACK|SPREAD)"),
    # Ray's metrics take ASCII alone: another name stops Serve's controller for good. "#" separates
    # the parts of a replica's name, which, with its application's, becomes a file's (255 bytes).
    **dict.fromkeys(
        ("name", "model_id"),
        ("a name for Ray: printable ASCII, no '#', at most 231 characters", r"[ -\"$-~]{1,231}"),
    ),
    "route_prefix": ("an ASCII path like /a/b: no braces, no last /", r"/|/[\0-z|~]*(?<!/)"),
    VARIABLES: ("a text: put it in quotes", str),
    **dict.fromkeys(
        ("target_capacity", "autoscaling_policy"),
        ("taken for single applications: leave it out, or use `serve deploy`", type(None)),
    ),
}
"""Key, or schema of which every value counts -> what a value has to be, as in "5 is not ...", and
its type, the pattern of a text, a range of whole numbers, or the least and the most of others:
where this program itself reads a value, or Ray says nothing, or too little."""


@cache
def known_schemas() -> dict[str, dict[str, str]]:
    """The installed Ray's and vLLM's schemas, from their source (0.1 s): their fields, and the
    schemas of those, or "". What was not found is not in it, and is not checked."""
    nodes: dict[str, ast.ClassDef] = {}
    for package, pattern in SCHEMA_SOURCES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(folder).glob(pattern)):
                body = ast.parse(file.read_text("utf-8")).body
                nodes |= {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    known = defaultdict[str, dict[str, str]](dict)
    for schema in filter(TAKEN.fullmatch, nodes):
        for base in map(ast.unparse, nodes[schema].bases):
            known[schema] |= known.get(base, {})
        for item in nodes[schema].body:
            if isinstance(item, ast.AnnAssign) and (name := ast.unparse(item.target))[0] != "_":
                named = TAKEN.findall(ast.unparse(item.annotation))
                known[schema][name] = next((word for word in named if word in nodes), "")
        known[PARTS.get(schema, schema)] |= known[schema]
    known[DEPLOYMENT] |= dict.fromkeys(SHORT_RESOURCES, "")
    known[OPTIONS] = known[DEPLOYMENT] | {"max_constructor_retry_count": ""}
    return known


def check_keys(value: Any, schema: str, path: KeyPath) -> Problems:
    """What is wrong with a value that has to be a mapping of this schema, and with all below it."""
    fields = known_schemas().get(schema, {})
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a text" if isinstance(value, str) else ""
        return [Problem(path, f"{kind or show_value(value)} is not a mapping")]
    needed = [key for key in REQUIRED.get(schema, ()) if value.get(key) is None]
    problems = [Problem((*path, key), "is missing") for key in needed]
    for key, item in value.items():
        here = (*path, key)
        child = CHILDREN.get(key) or fields.get(key)
        engine = value.get("server_cls") and key in ("engine_kwargs", "placement_group_config")
        others = engine or (key == "args" and not is_rays_builder(value))
        if fields and key not in fields:
            problems.append(unknown_key(key, schema, here))
        elif item is None and schema != VARIABLES:
            pass  # as if it were not given
        elif wrong := check_value(item, schema if schema in RULES else key, here):
            problems += wrong
        elif key in LISTS:
            for index, below in enumerate(item):
                problems += check_keys(below, str(child), (*here, index))
            problems += check_names(item, here)
        elif child and not others:
            problems += check_keys(item, child, here)
    return problems


def check_value(value: Any, rule: str, path: KeyPath) -> Problems:
    """What a rule says against a value; Ray reads a number that stands in quotes, too."""
    (needed, allowed), fits = RULES.get(rule, ("", object)), False
    if isinstance(allowed, type):
        fits = isinstance(value, allowed)
    elif isinstance(allowed, str):
        fits = isinstance(value, str) and bool(re.fullmatch(allowed, value))
    elif not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number, is_range = float(value), isinstance(allowed, range)
            fits = number in allowed if is_range else allowed[0] <= number <= allowed[1]
    return [] if fits else [Problem(path, f"{show_value(value)} is not {needed}")]


def check_names(items: list[Any], path: KeyPath) -> Iterator[Problem]:
    """What has the same name in a list of deployments, or of LLMs, as something before it."""
    first: dict[str, int] = {}
    for index, item in enumerate(map(as_dict, items)):
        name = as_dict(item.get("model_loading_config")).get("model_id", item.get("name"))
        if isinstance(name, str) and first.setdefault(name, index) != index:
            message = f"{name!r} is there twice, first in {format_key((*path, first[name]))}"
            yield Problem((*path, index), message, "give each its own")


def unknown_key(key: str, schema: str, path: KeyPath) -> Problem:
    """What to say about a key that a schema does not have: where it belongs, or what it resembles;
    else an error where Ray refuses it. At the top it may be another tool's."""
    schemas = known_schemas()
    if key in INSTEAD:
        return Problem(path, "is not taken here", f"write {INSTEAD[key]}")
    pairs = itertools.chain(CHILDREN.items(), *(fields.items() for fields in schemas.values()))
    for parent, child in pairs if schema != TOP else ():
        if key in schemas.get(child, ()):
            return Problem(path, "does not belong here", f"move it into {parent}, or beside it")
    if close := difflib.get_close_matches(key, schemas[schema], n=1, cutoff=0.75):
        return Problem(path, f"unknown key, did you mean {close[0]!r}?")
    if IGNORING.search(schema):
        return Problem(path, "unknown key; Ray ignores it", warning=True)
    return Problem(path, "unknown key, which the installed Ray and vLLM do not take")


def schema_problems(schema: Any, path: KeyPath, data: Any) -> Iterator[Problem]:
    """What one of Ray's schemas says of a value. pydantic's places end with names of types."""
    from pydantic import ValidationError

    try:
        schema.model_validate(copied(data))
    except ValidationError as error:
        for row in error.errors():
            keys, value = path, data
            with contextlib.suppress(LookupError, TypeError):
                for key in row["loc"]:
                    keys, value = (*keys, key), value[key]
            message = row["msg"].removeprefix("Value error, ")
            if row["type"] == "missing":
                message = f"{row['loc'][-1]} is missing"
            elif keys != path and not isinstance(value, dict | list):
                message = f"{show_value(value)}: {message}"
            yield Problem(keys, message)
    except ImportError:
        pass  # of a class that the cluster may have: the builder's process will tell
    except (Exception, SystemExit) as error:  # noqa: BLE001
        # Ray imports what a request router or a policy names, which may raise anything.
        yield Problem(path, str(error))


def deployment_options(data: Config) -> Iterator[tuple[KeyPath, Config]]:
    """The options of single deployments in a normalised document, with their places."""
    for index, application in enumerate(data["applications"]):
        for number, override in enumerate(as_list(application.get("deployments"))):
            yield ("applications", index, "deployments", number), as_dict(override)
        ingress = as_dict(application.get("args")).get("ingress_deployment_config")
        if is_rays_builder(application) and ingress:
            yield ("applications", index, "args", "ingress_deployment_config"), ingress
    for path, llm, _ in llm_places(data):
        if is_rays_builder(data["applications"][path[1]]):
            yield (*path, "deployment_config"), as_dict(llm["deployment_config"])


def located(document: Document, problems: Problems) -> Problems:
    """Problems with the place of the nearest key that stands in a file, in the order of those."""

    def place_of(path: KeyPath) -> Place:
        return document.places.get(path) or place_of(path[:-1])

    found = [replace(each, place=each.place or place_of(each.path)) for each in problems]
    return sorted(dict.fromkeys(found), key=lambda problem: problem.place or ("", 0, 0))


def format_problem(problem: Problem) -> str:
    """ "config.yaml:14:9: applications[0].name: what is wrong; what would be right"."""
    file, line, column = problem.place or ("", 0, 0)
    place = f"{file}:{line}:{column}" if line else file
    said = f"{problem.message}; {problem.hint}" if problem.hint else problem.message
    parts = (place, "warning" if problem.warning else "", format_key(problem.path), said)
    return ": ".join(filter(None, parts))


def format_key(path: KeyPath) -> str:
    """A key path as people write it: applications[0].args.llm_configs[0]."""
    parts = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in path]
    return "".join(parts).removeprefix(".")


# == 5. Resources: short keys, the engine's share, what one replica reserves ===========

STEPS = 10_000
"""Ray counts resources in steps of 1/10000."""


def read_applications(data: Config) -> tuple[tuple[ApplicationSpec, ...], Problems]:
    """The applications of a checked document, normalised, with what there is to say about them.

    Short resource keys go into `ray_actor_options`, and each LLM's engine is fitted to the share
    that its deployment declares. The data is not changed."""
    data, problems, specs = copied(data), Problems(), []
    models: dict[Any, list[ModelSpec]] = defaultdict(list)
    for path, llm, _ in llm_places(data):
        application = data["applications"][path[1]]
        # A builder of the user's own may take anything; what is written as Ray's LLMs counts.
        if is_rays_builder(application) or not check_keys(llm, LLM, ()):
            options = llm["deployment_config"] = llm.get("deployment_config") or {}
            problems += move_short_keys(options, (*path, "deployment_config"))
            problems += fit_engine(llm, path, application)
            models[path[1]].append(describe_model(llm))
    for path, options in deployment_options(data):
        problems += move_short_keys(options, path)  # an LLM's a second time, which changes nothing
    for index, config in enumerate(data["applications"]):
        if config.get("logging_config") is None and data.get("logging_config"):
            config["logging_config"] = data["logging_config"]
        name = config.setdefault("name", "default")  # as in Ray's schema
        route = config.get("route_prefix", "/")
        specs.append(ApplicationSpec(index, name, route, config, tuple(models[index])))
    return tuple(specs), problems


def move_short_keys(options: Config, path: KeyPath) -> Problems:
    """Move `num_cpus`/`cpus` and `num_gpus`/`gpus` into `ray_actor_options`, as floats."""
    problems: Problems = []
    actor = as_dict(options.get("ray_actor_options"))
    for option in ("num_cpus", "num_gpus", "memory"):  # 2e9 is a text in YAML, and Ray adds to it
        given = {key: options.pop(key, None) for key in (option, option.removeprefix("num_"))}
        given[f"ray_actor_options.{option}"] = actor.get(option)
        values = {key: float(value) for key, value in given.items() if value is not None}
        if values:
            first, actor[option] = next(iter(values.items()))
            options["ray_actor_options"] = actor
            if set(values.values()) != {actor[option]}:
                said = " and ".join(f"{key}: {short(value)}" for key, value in values.items())
                problems.append(Problem((*path, first), f"{said} disagree", "give one of them"))
    return problems


def actor_options(llm: Config) -> Config:
    return as_dict(as_dict(llm.get("deployment_config")).get("ray_actor_options"))


def engine_workers(llm: Config) -> int:
    """How many workers an engine has: tensor parallel times pipeline parallel."""
    engine = as_dict(llm.get("engine_kwargs"))
    return math.prod(int(float(engine.get(size) or 1)) for size in PARALLEL_SIZES)


def worker_bundles(llm: Config) -> list[Config]:
    """The bundles of the engine's workers, as `placement_group_config` asks for them."""
    config = as_dict(llm.get("placement_group_config"))
    each = config.get("bundle_per_worker")
    return (config.get("bundles") or []) if each is None else [each] * engine_workers(llm)


def part_of_card(llm: Config) -> float:
    """The part of a GPU that a worker gets; 0 for none or a whole one, and for the CPU engine."""
    share = next((float(b["GPU"]) for b in worker_bundles(llm) if b.get("GPU")), 0.0)
    on_cpu = as_dict(llm.get("accelerator_config")).get("kind") == "cpu"
    return share if share < 1 and not on_cpu else 0.0


def fit_engine(llm: Config, path: KeyPath, application: Config) -> Problems:
    """Make one LLM's replicas reserve exactly the CPUs and GPUs that it declares (in place).

    Ray's `LLMServer` reserves the *sum* of `ray_actor_options` and of one bundle an engine worker
    (1 GPU each by default), so `num_gpus: 0.45` alone reserves 1.45 GPU (measured on Ray 2.60). The
    share therefore moves to the workers' bundles, and the replica actor keeps the CPUs."""
    kind = as_dict(llm.get("accelerator_config")).get("kind")
    if llm.get("server_cls") or kind == "tpu" or str(llm.get("accelerator_type"))[:3] == "TPU":
        return []
    options, problems = actor_options(llm), Problems()
    gpus = options.get("num_gpus")
    if llm.get("placement_group_config"):
        # The user's own stays as it is.
        held = sum(float(bundle.get("GPU") or 0) for bundle in worker_bundles(llm))
        if held and gpus:
            message = f"with num_gpus: {short(gpus)} a replica reserves {short(held + gpus)} GPU"
            hint = "set num_gpus: 0, or leave out placement_group_config"
            problems = [Problem((*path, "placement_group_config"), message, hint, warning=True)]
    elif kind == "cpu" or (gpus == 0 and not kind):
        llm["accelerator_config"] = {"kind": "cpu"}
        if options.get("num_cpus") is not None or gpus is not None:
            # Nothing for the workers, which are local processes of the replica.
            llm["placement_group_config"] = {"bundles": [{"CPU": 0}]}
    elif gpus is not None:
        workers = engine_workers(llm)
        share = math.floor(round(gpus / workers * STEPS, 3)) / STEPS
        options["num_gpus"] = 0.0
        llm["placement_group_config"] = {"bundle_per_worker": {"GPU": share}}
        problems = check_share(gpus, workers, share, (*path, "deployment_config"))
    return problems + share_memory(llm, path, application)


def check_share(gpus: float, workers: int, share: float, path: KeyPath) -> Problems:
    """What is wrong with a worker's share, when `gpus` are spread evenly over an engine's."""
    if not share:  # and it is not the CPU engine, which needs none
        message = f"num_gpus: {gpus:g} leaves an engine for GPUs no part of one"
        return [Problem(path, message, "raise it, or leave out accelerator_config")]
    if share > 1:  # of which Ray takes whole ones only
        message = f"num_gpus: {short(gpus)} for {workers} engine worker(s), and each uses one GPU"
        hint = f"use {workers}, or set engine_kwargs.tensor_parallel_size: {math.ceil(gpus)}"
        return [Problem(path, message, hint, warning=share == int(share))]
    if workers > 1 and 2 * share <= 1:
        message = f"Ray may put two workers of {short(share)} GPU on one card, where NCCL fails"
        hint = "give each worker more than half a GPU, or use one worker"
        return [Problem(path, message, hint, warning=True)]
    return []


def share_memory(llm: Config, path: KeyPath, application: Config) -> Problems:
    """Tell an engine that gets a part of a card to ask Ray, and the card's memory, for that part.

    Without the variable the engine asks Ray for a whole GPU and dies with "cannot fit"
    (ray-project/ray#63875); without the fraction each engine takes 0.9 of the card, and it demands
    that much free memory even where `kv_cache_memory_bytes` is given (vllm/v1/worker/utils.py)."""
    share = part_of_card(llm)
    if not share:
        return []
    # LLMServer lays the LLM's runtime_env over the actor's and the application's key by key, so
    # an `env_vars` here would hide theirs: it has to repeat them.
    sources = [as_dict(each.get("runtime_env")) for each in (llm, actor_options(llm), application)]
    inherited: Config = next((each["env_vars"] for each in sources if each.get("env_vars")), {})
    variables = {"VLLM_RAY_PER_WORKER_GPUS": str(share), **inherited}
    llm["runtime_env"] = {**sources[0], "env_vars": variables}
    engine = llm["engine_kwargs"] = as_dict(llm.get("engine_kwargs"))
    fitting, key = round(WHOLE_GPU_MEMORY_FRACTION * share, 4), "gpu_memory_utilization"
    engine[key] = asked = float(engine.get(key) or fitting)
    message = f"{short(asked)} of the card's memory is more than the {short(share)} GPU of a worker"
    hint = f"leave it out (it becomes {short(fitting)}) or lower it"
    problem = Problem((*path, "engine_kwargs", key), message, hint, warning=True)
    return [problem] if asked > share else []


def describe_model(llm: Config) -> ModelSpec:
    """What people read about a fitted LLM, and what it promises: nothing of what it leaves to Ray.
    The deployment's name is made as Ray's builder makes it."""
    loading, name = llm["model_loading_config"], llm["deployment_config"].get("name")
    model_id, engine = str(loading["model_id"]), as_dict(llm.get("engine_kwargs"))
    source = loading.get("model_source") or model_id
    ours = {} if llm.get("server_cls") else llm  # another engine's arguments mean other things
    options, share = actor_options(ours), part_of_card(ours)
    asked = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus")}
    asked |= {"memory": options.get("memory"), **(options.get("resources") or {})}
    promised = {}
    for resource, own in asked.items():
        held = sum(float(bundle.get(resource) or 0) for bundle in (asked, *worker_bundles(ours)))
        # Where no CPUs are given, the actor has its default of 1 besides its engine's.
        if own is not None or (held and resource != "CPU"):
            promised[resource] = round(held, 4)
    fraction = engine.get("gpu_memory_utilization")
    note = f"gpu_memory_utilization {fraction} for a share of {short(share)} GPU a worker"
    return ModelSpec(
        model_id,
        source=str(source.get("bucket_uri", "") if isinstance(source, dict) else source),
        deployment_name=name or model_id.replace("/", "--").replace(".", "_"),
        promised=promised,
        measures_memory=bool(share) and not engine.get("kv_cache_memory_bytes"),
        notes=(note,) if share else (),
    )


def serves(deployment: str, model: ModelSpec) -> bool:
    """Whether a deployment is a model's; Ray names it "<server class>:<deployment name>"."""
    return deployment.endswith(f":{model.deployment_name}")


def short(number: float) -> str:
    """A number as people write it: 0.45, 1, 16."""
    return f"{number:.4f}".rstrip("0").rstrip(".")


def format_amount(resource: str, amount: float) -> str:
    """ "0.45", "0.10", "1", "16"; bytes as "2 GB"."""
    if resource in ("memory", "object_store_memory"):
        return f"{amount / 1e9:.3g} GB"
    text = short(amount)
    return f"{text}0" if re.fullmatch(r"\d+\.\d", text) else text


def format_resources(resources: Resources) -> str:
    """ "1.0 CPUs, 0.45 GPUs" and then whatever else: "memory 2 GB, custom 1"."""
    parts = [f"{round(float(resources[k]), 4)} {k}s" for k in ("CPU", "GPU") if k in resources]
    others = sorted(resources.keys() - {"CPU", "GPU"})
    parts += [f"{resource} {format_amount(resource, resources[resource])}" for resource in others]
    return ", ".join(parts) or "nothing"


# == 6. Memory: what vLLM says of an engine → what its share of a card buys ============


@dataclass(frozen=True)
class Room:
    """What one worker of an engine has room for in its share of a card, of `card` bytes: the KV
    cache, in bytes, and the tokens and full requests that go into that."""

    card: int
    cache: int
    tokens: int
    requests: float


def gib(amount: float) -> str:
    small = 0 < amount < GIB / 10
    return f"{amount / 2**20:.3g} MiB" if small else f"{short(round(amount / GIB, 2))} GiB"


def gpu_shares(demand: Demand) -> list[float]:
    return [bundle["GPU"] for bundle in demand.bundles if bundle.get("GPU")]


def memory_misfit(demand: Demand, room: Room) -> str:
    """Why an engine would not start in its room, and what would help, or "". One block of the room
    is never used (vllm/v1/core/kv_cache_utils.py)."""
    memory = demand.memory or Memory()
    blocks, held = room.cache // memory.block, memory.weights + room.cache
    length, needed = memory.requests[0]
    if memory.pinned and held > room.card > 0:
        return f"weights and kv_cache_memory_bytes are {gib(held)}, a card has {gib(room.card)}"
    if blocks <= needed:
        left = gib(max(0, room.cache - memory.block))
        text = f"a request of {length:,} tokens needs {gib(needed * memory.block)} of KV cache, "
        text += f"and there is room for {left}"
        if fits := next((tokens for tokens, count in memory.requests if count < blocks), 0):
            text += f"; max_model_len that would do: {fits}"
        share = WHOLE_GPU_MEMORY_FRACTION * min([1.0, *gpu_shares(demand)])
        if not memory.pinned and memory.fraction > share - 0.01:
            text += f"; num_gpus that would do: {least_gpus(demand, room.card, 1)}"
        return text
    if memory.sequences > blocks:
        text = f"max_num_seqs is {memory.sequences}, and its share holds {blocks} Mamba blocks"
        return f"{text}; set engine_kwargs.max_num_seqs to {blocks} or less"
    return ""


def least_gpus(demand: Demand, card: int, requests: float) -> str:
    """The smallest num_gpus with room for so many full requests, in words."""
    memory, workers = demand.memory or Memory(), len(gpu_shares(demand))
    cache = (math.ceil(requests * memory.requests[0][1]) + 1) * memory.block
    needed = (memory.weights + ACTIVATIONS_BYTES + cache) / WHOLE_GPU_MEMORY_FRACTION
    least = math.ceil(needed / card * 100) / 100
    return short(least * workers) if least <= 1 else "more than a card a worker"


def format_memory(demand: Demand, room: Room | None) -> list[str]:
    """What an engine's share of a card buys."""
    memory, shares = demand.memory, gpu_shares(demand)
    if memory is None or not memory.requests:
        return [f"memory: not known: {memory.unknown}"] if memory else []
    length, blocks = memory.requests[0]
    request = f"a request of {length:,} tokens needs {gib(blocks * memory.block)} of KV cache"
    lines = [f"memory: weights {gib(memory.weights)} · {request}"]
    if memory.platform == "cpu" and shares:
        lines[0] += " (as a CPU build has it: blocks are smaller on a GPU)"
    if room is None:  # of main memory the engine itself takes what is free
        hint = "  no card's size is known here: --gpu-memory 80GiB would plan with one"
        return [*lines, hint] if shares else lines
    cache = f"{gib(room.cache)} for the KV cache"
    if memory.pinned:
        lines.append(f"  {cache}: kv_cache_memory_bytes")
    else:
        share = f"{short(shares[0])} of {gib(room.card)}, at gpu_memory_utilization "
        share += f"{short(memory.fraction)}: {gib(room.card * memory.fraction)}; {cache}"
        lines.append(f"  {share} ({gib(ACTIVATIONS_BYTES)} kept for activations, a guess)")
    most, full = demand.max_ongoing_requests, math.floor(room.requests)
    queue = f" (max_ongoing_requests is {most}: the last {most - full} would queue)"
    lines.append(f"  room for {room.tokens:,} tokens, {full:,} full requests at once")
    lines[-1] += queue if full < most < MANY_REQUESTS else ""
    target = demand.target_ongoing_requests
    if 0 < target < MANY_REQUESTS and not memory.pinned:
        what = "the smallest num_gpus that serves target_ongoing_requests"
        lines.append(f"  {what} {short(target)} in full: {least_gpus(demand, room.card, target)}")
    return lines


def measure_memory(llm: Config, options_of: Callable[[Config], Config]) -> Config:
    """The fields of a `Memory` for an LLM's engine, in 0.5 s; `options_of` gives what the engine is
    started with. Whatever goes wrong, the engine itself will say: this is a help only."""
    from unittest import mock

    variables = as_dict(as_dict(llm.get("runtime_env")).get("env_vars"))
    # Ray hides a node's GPUs from who reserves none, and vLLM's platform is then no GPU's.
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        with mock.patch.dict(os.environ, variables):
            return ask_vllm(options_of(llm))
    except Exception as error:  # noqa: BLE001
        text = " ".join(str(error).split()) or repr(error)
        return {"unknown": shortened(text, MOST_CAUSE_CHARACTERS)}


def ask_vllm(options: Config) -> Config:
    """See `measure_memory`: vLLM's own code makes the model on torch's meta device, where it has no
    weights, and from that the layout of the KV cache. Of several workers it is the first one's:
    `world_size` alone makes a shard. Compared with started engines for Llama and Falcon-H1."""
    import torch
    from huggingface_hub import snapshot_download
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    options = {k: v for k, v in options.items() if k != "distributed_executor_backend"}
    workers = options.pop("tensor_parallel_size", 1)
    with contextlib.suppress(ValueError, OSError):  # a path, or it is not in the cache
        # Of what is, the network is not asked whether it has changed.
        find = partial(snapshot_download, revision=options.get("revision"), local_files_only=True)
        options["model"] = find(options["model"], allow_patterns=["*.json", "*.safetensors"])
    config = AsyncEngineArgs(**options).create_engine_config()
    with set_current_vllm_config(config):
        if not parallel_state.model_parallel_is_initialized():
            method = f"file://{tempfile.mkstemp()[1]}"
            parallel_state.init_distributed_environment(1, 0, method, 0, "gloo")
            parallel_state.ensure_model_parallel_initialized(1, 1)
        config.parallel_config.tensor_parallel_size = workers
        parallel_state.get_tp_group().world_size = workers
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            model = initialize_model(config)
        current_platform.update_block_size_for_backend(config)
        weights = sum(part.numel() * part.element_size() for part in model.parameters())
        return {"weights": weights, "platform": current_platform.device_type, **cache_of(config)}


def cache_of(config: Any) -> Config:
    """The part of `ask_vllm` about the KV cache, of a config for which the model has been made."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.v1.attention.backends import utils as backends
    from vllm.v1.core import kv_cache_utils as caches
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    if not (specs := get_kv_cache_spec(config)):
        raise ValueError("it has no KV cache")
    layouts = backends.get_supported_kv_cache_layouts(get_current_attn_backends(config))
    backends.resolve_kv_cache_layout(config, [[layout.name for layout in layouts]], specs.values())
    groups = caches.get_kv_cache_groups(config, specs)
    block = caches._pool_bytes_per_block(groups)
    cache = caches.get_kv_cache_config_from_groups(config, groups, block)
    most = caches._max_memory_usage_bytes_from_groups(config, groups) // block
    counts = range(most, 0, -max(1, most // 100))
    longest = partial(caches._estimate_max_model_len_from_groups, config, groups)
    requests = [(tokens, count) for count in counts if (tokens := longest(count * block))]
    # A CPU engine has no graphs, and starts with more (vllm/config/compilation.py).
    graphs = config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    return {
        "block": block,
        "requests": tuple(requests),
        "sequences": config.scheduler_config.max_num_seqs * (cache.has_mamba_layers and graphs),
        "fraction": config.cache_config.gpu_memory_utilization,
        "pinned": config.cache_config.kv_cache_memory_bytes or 0,
    }


# == 7. Plan: demands × nodes → placement ==============================================
#
# GCS picks nodes by each node's *sums*; the raylets then allocate *devices* (a share of a GPU comes
# from one GPU), and may refuse, upon which GCS tries others, perhaps for seconds: "slow" here
# (ray-project/ray#52133). Compared with raylets in test_plan_against_ray.py.

BAR, BAR_WIDTH = "█▓▒", 20
SLOW = "fits, but Ray, which sees only sums of GPU shares, may be slow to place it (ray#52133)"

Amounts = Counter[str | int]
"""Of each resource, and of each single GPU by its index, in Ray's steps."""

Bundle = tuple[Amounts, Mapping[str, str]]
"""What a bundle needs, and the labels that its node must have."""

Slot = tuple[Demand, int, Amounts]
"""What one bundle of a demand takes of a node (its index)."""


@dataclass
class Fit:
    """What became of one demand: whether it `never` fits, was `slow` to place, and what is said of
    it where not all of its minimum fits: "app/D: predicted: does not fit now; ..."."""

    demand: Demand
    never: bool
    slow: bool
    misfit: str


def gpus_of(amounts: Amounts) -> list[int]:
    return [key for key in amounts if isinstance(key, int)]


def take(free: Amounts, need: int) -> Amounts | None:
    """The GPUs that a raylet takes: whole free ones for the whole part of a need, the rest from the
    one that it fits best (NodeResourceInstanceSet::TryAllocate). None when they refuse."""
    whole = [gpu for gpu in gpus_of(free) if free[gpu] == STEPS][: need // STEPS]
    taken, rest = Amounts(dict.fromkeys(whole, STEPS)), need - STEPS * len(whole)
    fitting = [(free[gpu], gpu) for gpu in gpus_of(free) if free[gpu] >= rest and gpu not in whole]
    if rest and fitting:
        taken[min(fitting)[1]] = rest
    return taken if taken.total() == need else None


def read_cards(summary: Config) -> dict[str, tuple[Card, ...]]:
    """The GPUs of each node (id) in the dashboard's `GET /nodes?view=summary`, which has MiB."""
    found = {}
    for row in as_list(as_dict(summary.get("data")).get("summary")):
        gpus = row.get("gpus") or ()
        sizes = [(int(gpu["memoryTotal"]), int(gpu["memoryUsed"])) for gpu in gpus]
        cards = tuple(Card(total * 2**20, used * 2**20) for total, used in sizes)
        found[as_dict(row.get("raylet")).get("nodeId", "")] = cards
    return found


def describe_deployment(name: str, info: Any) -> Config:
    """The fields of a `Demand`, as plain data, from Serve's `DeploymentInfo`."""
    replica, options = info.replica_config, info.deployment_config
    scaling, bundles = options.autoscaling_config, replica.placement_group_bundles
    selectors = replica.placement_group_bundle_label_selector or []
    least = scaling.min_replicas if scaling else options.num_replicas
    if not bundles:
        bundles = [replica.resource_dict]
        actor = replica.ray_actor_options  # with a fallback, another node will do
        selectors = [{} if actor.get("fallback_strategy") else actor.get("label_selector") or {}]
    return {
        "deployment": name,
        "ingress": info.ingress,
        "bundles": tuple({r: float(n) for r, n in b.items() if n} for b in bundles),
        "label_selectors": tuple(selectors),
        "strategy": replica.placement_group_strategy or "PACK",
        "max_replicas_per_node": replica.max_replicas_per_node,
        "max_ongoing_requests": options.max_ongoing_requests,
        "target_ongoing_requests": scaling.get_target_ongoing_requests() if scaling else 0,
        "min_replicas": least,
        "max_replicas": scaling.max_replicas if scaling else least,
        "initial_replicas": (scaling and scaling.initial_replicas) or least,
    }


def stock(node: Node) -> Amounts:
    """What is free on a node. Ray reports only sums, so for single GPUs this is a guess from what
    runs there, in the order in which it came. What nobody is known to hold is taken from the freest
    ones, so that the guess promises too little."""
    gpus = Amounts(dict.fromkeys(range(int(node.total.get("GPU", 0.0))), STEPS))
    for holder in node.holders:
        workers = holder.gpus or (0,)  # each has a part of one card
        share = int(holder.reserved.get("GPU", 0.0) / len(workers) * STEPS)
        for _ in workers:
            gpus.subtract(take(gpus, share) or {})
    left = round(node.free.get("GPU", 0.0) * STEPS)
    for gpu in sorted(gpus_of(gpus), key=lambda gpu: (gpus[gpu], -gpu)):
        gpus[gpu] = min(left, gpus[gpu])
        left -= gpus[gpu]
    # Ray leaves out what is used up.
    sums = Amounts({r: round(node.free.get(r, 0.0) * STEPS) for r in node.total})
    return Amounts({**gpus, **sums, "GPU": gpus.total()})


def bundles_of(demand: Demand) -> list[Bundle]:
    """What each of a replica's bundles needs. Ray cuts off what is below its step, so seven
    replicas of 1/7 do fit on one node (fixed_point.h)."""
    bundles = [{r: int(n * STEPS) for r, n in b.items() if n * STEPS >= 1} for b in demand.bundles]
    selectors = demand.label_selectors or ({},) * len(bundles)
    return list(zip(map(Amounts, bundles), selectors, strict=True))


@dataclass
class Plan:
    """Where everything goes, and what is `free` on each node after that; `slow` once a node had
    enough in sum and its devices refused."""

    nodes: Sequence[Node]
    free: list[Amounts]
    slots: list[Slot] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)
    slow: bool = False

    @property
    def misfits(self) -> list[Fit]:
        return [fit for fit in self.fits if fit.misfit]

    def place(self, demand: Demand) -> bool:
        """Place one more replica; nothing is taken when there is no place for it."""
        before, begin = list(self.free), len(self.slots)
        bundles = bundles_of(demand)
        # The scarcest first, as GCS does (bundle_scheduling_policy.cc, SortRequiredResources).
        scarcest = sorted(demand.reserved, key=lambda r: (r == "CPU", r == "memory", r != "GPU", r))
        bundles.sort(key=lambda bundle: [-bundle[0][r] for r in scarcest])
        for wanted in [bundles] if demand.strategy == "STRICT_PACK" else [[b] for b in bundles]:
            if not self.grant(demand, wanted, [node for _, node, _ in self.slots[begin:]]):
                self.free, self.slots = before, self.slots[:begin]
                return False
        return True

    def grant(self, demand: Demand, wanted: Sequence[Bundle], used: Sequence[int]) -> bool:
        """Put some bundles of a replica together on a node, in the order in which GCS tries them:
        as its strategy says of those that are `used` for it already, then that first which keeps
        most of what is free (scorer.cc, LeastResourceScorer; rounded: Ray adds in any order)."""
        total = sum((needs for needs, _ in wanted), Amounts())
        here = Counter(node for other, node, _ in self.slots if other is demand)
        most, ranked = demand.max_replicas_per_node or math.inf, []
        for node, free in enumerate(self.free):
            fits = here[node] < most and all(free[r] >= need for r, need in total.items())
            if fits and all(self.nodes[node].matches(selector) for _, selector in wanted):
                rank = {"PACK": [*used, node].index(node), "SPREAD": used.count(node) > 0}
                score = round(sum(need / free[r] for r, need in total.items()), 9)
                ranked.append((rank.get(demand.strategy, 0), score, node))
        for _, _, node in sorted(ranked):
            if demand.strategy == "STRICT_SPREAD" and node in used:
                continue
            free, slots = Amounts(self.free[node]), list[Slot]()
            for needs, _ in wanted:
                gpus = take(free, needs["GPU"])
                if gpus is None:
                    self.slow = True
                    break
                free.subtract(needs + gpus)
                slots.append((demand, node, needs + gpus))
            else:
                self.free[node] = free
                self.slots += slots
                return True
        return False


def predict(demands: Sequence[Demand], nodes: Sequence[Node]) -> Plan:
    """Place what Serve starts of every demand, in the given order; some may fit and others not."""
    plan = Plan(nodes, [stock(node) for node in nodes])
    whole = [replace(node, free=node.total, holders=()) for node in nodes]
    for demand in demands:
        # GCS tries a misfit that sums allow again and again, and what comes after waits with it.
        plan.slow = any(fit.slow for fit in plan.misfits)
        replicas = sum(plan.place(demand) for _ in range(demand.initial_replicas))
        # What scales from zero must be able to have one replica.
        empty, reason = Plan(whole, [stock(node) for node in whole]), ""
        never = not all(empty.place(demand) for _ in range(max(1, demand.min_replicas)))
        if never or replicas < demand.initial_replicas:
            some = f"{replicas} of {demand.initial_replicas} replicas fit; " if replicas else ""
            reason = some + shortage(empty if never else plan, demand)
        elif (room := room_in(plan, demand)) and (reason := memory_misfit(demand, room)):
            # Refused is only what has no room on any card, even without activations.
            most = room_in(Plan(nodes, []), demand, activations=0) or room
            never = bool(memory_misfit(demand, most))
        if reason := reason or card_misfit(plan, demand):
            verdict = "can never fit" if never else "does not fit now"
            reason = f"{demand.label}: predicted: {verdict}; {reason}"
        plan.fits.append(Fit(demand, never, plan.slow, reason))
    return plan


def shortage(plan: Plan, demand: Demand) -> str:
    """Why one more replica does not fit: the first resource that every node lacks, or all of it."""
    for needs, selector in bundles_of(demand):
        nodes = [n for n, node in enumerate(plan.nodes) if node.matches(selector)]
        if not nodes:
            return f"no node matches the labels {dict(selector)}"
        for resource in sorted(map(str, needs), key=lambda r: (r == "CPU", r != "GPU", r)):
            if lack := lack_of(plan, resource, needs[resource], nodes):
                return lack
    most, bundles = demand.max_replicas_per_node, f"{len(demand.bundles)} bundle(s)"
    limit = f", max_replicas_per_node: {most}" if most else ""
    free = {r: sum(free[r] for free in plan.free) / STEPS for r in demand.reserved}
    needed = f"{format_resources(demand.reserved)} in {bundles} ({demand.strategy}{limit})"
    return f"needs {needed}; free on all nodes, in pieces: {format_resources(free)}"


def lack_of(plan: Plan, resource: str, need: int, nodes: Sequence[int]) -> str:
    """The nearest that a node comes to what is needed of a resource, and who holds the rest, or ""
    where one has enough; a share has to come from one GPU."""
    places = []
    for n in nodes:
        gpus = gpus_of(plan.free[n]) if resource == "GPU" and need <= STEPS else []
        keys: Sequence[str | int] = gpus or [resource]
        places += [(plan.free[n][key], n, key) for key in keys]
    most, index, key = max(places, key=lambda p: (p[0], resource in plan.nodes[p[1]].total))
    if most >= need:
        return ""
    held = Counter[str]()
    for demand, node, taken in plan.slots:
        held[demand.label] += taken[key] if node == index else 0
    for r in plan.nodes[index].holders:
        held[f"{r.application}/{r.deployment}"] += round(r.reserved.get(resource, 0.0) * STEPS)
    amount = {n: format_amount(resource, n / STEPS) for n in (need, most, *held.values())}
    texts = [f"{label} {amount[n]}" for label, n in held.most_common() if n]
    others = [f"{len(texts) - MOST_LOGS} others"] * (len(texts) > MOST_LOGS)
    where = plan.nodes[index].name if key == resource else f"{plan.nodes[index].name}, GPU {key}"
    where += f", held by {' + '.join(texts[:MOST_LOGS] + others)}" if texts else ""
    said = f"needs {amount[need]} {resource}; the most free in one place is {amount[most]}"
    return f"{said} (node {where})"


def room_in(plan: Plan, demand: Demand, activations: int = ACTIVATIONS_BYTES) -> Room | None:
    """What an engine has room for on the smallest card of the nodes to which a plan gives it; where
    it gives it to none, on the largest that there is. None where nobody knows. The figures are
    those that the engine logs at its start (vllm/v1/core/kv_cache_utils.py)."""
    memory, card = demand.memory, 0
    if gpu_shares(demand):
        slots = [slot for slot in plan.slots if slot[0].label == demand.label]
        mine = [plan.nodes[node] for _, node, taken in slots if gpus_of(taken)]
        sizes = [card.total for node in mine or plan.nodes for card in node.cards]
        card = (min if mine else max)(sizes, default=0)
    if memory is None or not memory.requests or not (memory.pinned or card):
        return None
    budget = int(card * memory.fraction)
    cache = memory.pinned or max(0, budget - memory.weights - activations)
    length, blocks = memory.requests[0]
    requests = cache // memory.block / blocks
    return Room(card, cache, int(requests * length), requests)


def card_misfit(plan: Plan, demand: Demand) -> str:
    """Which node has no card with as much memory free as an engine demands at its start, or ""; on
    which of its cards Ray puts it, is a guess."""
    fraction = demand.memory.fraction if demand.memory else 0.0
    mine = [index for other, index, taken in plan.slots if other is demand and gpus_of(taken)]
    for node in (plan.nodes[index] for index in mine):
        card = max(node.cards, key=lambda card: card.total - card.used, default=Card(0))
        asked, free = card.total * fraction, card.total - card.used
        if asked > free:
            most = f"others leave {gib(free)} at the most"
            return f"needs {gib(asked)} free on a GPU of node {node.name}; {most}"
    return ""


def format_prediction(plan: Plan) -> list[str]:
    """The packing node by node, how far the deployments could grow, and what does not fit."""
    lines = ["predicted packing at the start (Ray decides in the end):"]
    for index in range(len(plan.nodes)):
        lines += format_node(plan, index)
    for fit in plan.fits:
        demand, count = fit.demand, fit.demand.initial_replicas
        if fit.misfit:
            lines.append(fit.misfit)
            continue
        lines += [f"{demand.label}: {SLOW}"] * fit.slow
        trial = Plan(plan.nodes, list(plan.free), list(plan.slots))
        while count < demand.max_replicas and trial.place(demand):
            count += 1
        if demand.max_replicas > demand.min_replicas:
            lines.append(f"{demand.label}: room for {count} of {demand.max_replicas} replicas")
    return lines


def format_node(plan: Plan, index: int) -> list[str]:
    """One line a GPU, and one for the CPUs: who has which share, and what is free. A bar has one
    pattern a holder, and dots for what is free."""
    node, free = plan.nodes[index], plan.free[index]
    slots = [(demand, taken) for demand, where, taken in plan.slots if where == index]
    lines = []
    for gpu in gpus_of(free):
        shares, asked = Counter[str](), 0.0
        for demand, taken in slots:
            shares[demand.label] += taken[gpu]
            asked += demand.memory.fraction if demand.memory and taken[gpu] else 0.0
        shares += Counter({"already running": STEPS - free[gpu] - shares.total()})
        bar, held = "", 0
        for share, pattern in zip(shares.values(), itertools.cycle(BAR)):
            held += share
            bar = bar.ljust(round(held / STEPS * BAR_WIDTH), pattern)
        parts = [f"{who} {format_amount('GPU', share / STEPS)}" for who, share in shares.items()]
        unused = f"{format_amount('GPU', free[gpu] / STEPS)} free"
        text = " · ".join(filter(None, [" + ".join(parts), unused]))
        line = f"node {node.name} · GPU {gpu} {bar.ljust(BAR_WIDTH, '·')} {text}"
        for card in node.cards[gpu : gpu + 1] if asked else ():
            used = f"{gib(card.used)} in use, " if card.used else ""
            line += f" · memory: {used}{gib(asked * card.total)} of {gib(card.total)} asked for"
        lines.append(line)
    if total := node.total.get("CPU"):
        planned, idle = sum(taken["CPU"] for _, taken in slots) / STEPS, free["CPU"] / STEPS
        text = f"{short(planned)} of {short(total)} used by this plan, {short(idle)} free"
        lines.append(f"node {node.name} · CPU: {text}")
    return lines


# == 8. Changes: config and what runs → what a run does with each application ==========

LIGHTWEIGHT_OPTIONS = {
    *("num_replicas", "autoscaling_config", "max_ongoing_requests", "max_queued_requests"),
    *("user_config", "health_check_period_s", "health_check_timeout_s", "backpressure_config"),
    *("graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s", "logging_config"),
    *("max_constructor_retry_count", "rolling_update_percentage", "max_surge_percent"),
}
"""Deployment options that Serve changes in place, without a new replica."""

DEPLOYMENT_CONFIGS = ("deployment_config", "ingress_deployment_config")
BUILDER_ARGS = (*LLM_ARGS, "llm_configs", "ingress_deployment_config")
NOT_GIVEN = object()
BY_SERVE_DEPLOY = "`serve deploy` brought it, and Serve's controller does again when it restarts"
"""From its checkpoint of the declarative config (Ray 2.60, serve/_private/controller.py)."""


def heavy_part(kept: Config) -> Config:
    """What of an application needs new replicas when it changes."""

    def heavy(found: Config, names: Collection[str] = DEPLOYMENT_CONFIGS) -> Config:
        for n in found.keys() & names:
            found[n] = {k: v for k, v in as_dict(found[n]).items() if k not in LIGHTWEIGHT_OPTIONS}
        return {name: item for name, item in found.items() if item or name not in names}

    args, deployments = dict(as_dict(kept.get("args"))), kept["deployments"]
    # A builder of the user's own may do anything with what it calls so.
    known = {name: args.pop(name) for name in BUILDER_ARGS if name in args}
    args |= json.loads(json.dumps(known), object_hook=heavy)
    found = {name: kept[name] for name in ("import_path", "runtime_env") if name in kept}
    return found | {"args": args, "deployments": heavy(dict(deployments), deployments)}


def decide(
    application: ApplicationSpec,
    running: Running | None,
    options: Options,
    secrets: frozenset[str],
    key: bytes,
) -> Action:
    """What has to happen to an application, and why; `running` is what runs under its name.

    Serve replaces all replicas when the version is another one. It compares the options of single
    deployments for itself, and takes the version of a failed application for the failed one. The
    version is a fingerprint, so that the file of before brings back what still runs of it; with the
    time behind it where what runs has it, too, and has to restart.
    """
    before, seen, record = running or (None, "", None)
    hidden_before = json.dumps(record.config) if record else ""

    def hide(text: str) -> str:
        # What was a secret stays one, so that only another text counts as an edit.
        hidden = FINGERPRINT + fingerprint(text, key)
        return hidden if redact(text, secrets) != text or hidden in hidden_before else text

    # By their names, in which a secret may stand, since their order means nothing.
    rows = {row.pop("name"): row for row in copied(as_list(application.config.get("deployments")))}
    kept = copied(application.config | {"deployments": rows}, hide)
    kept = json.loads(json.dumps(kept, default=str))  # as it will be read back: a date is a text
    # Without `deployments`: Serve compares those itself.
    version = fingerprint(json.dumps(heavy_part(kept | {"deployments": {}}), sort_keys=True), key)
    action = Action(application, "create", version, before=before, record=record, kept=kept)
    if before is None:
        return action
    if seen.partition(".")[0] == version:
        action.version = f"{version}.{time.time_ns():x}"
    action.change, action.surge = "RESTART", options.no_downtime
    action.restarting = frozenset(before.deployments)
    status, declared = before.status.value, before.source == "declarative"
    found = {
        "--force": options.force,
        BY_SERVE_DEPLOY: declared,
        "it was deployed by other means: nothing to compare with": not (record or declared),
        f"it is {status}": status in ("DEPLOY_FAILED", "UNHEALTHY"),
    }
    action.reasons = tuple(text for text, is_so in found.items() if is_so)
    if record and not action.reasons:
        apply_edits(action, copied(record.config, hide), record.version, status)
    return action


def apply_edits(action: Action, before: Config, version: str, status: str) -> None:
    """Make of a restart as little as the edits need since `before`, which has this version."""
    heavy = list(differences(heavy_part(before), heavy_part(action.kept)))
    reasons = tuple(text for _, text in heavy or differences(before, action.kept))
    action.reasons = reasons or (f"it is {status}",) * (status != "RUNNING")
    # Serve compares only these, and the version; where nothing heavy is edited, none restarts.
    if all((path[0], *path[2:3]) == ("deployments", "ray_actor_options") for path, _ in heavy):
        action.version = version
        action.restarting &= {str(path[1]) for path, _ in heavy}
    if not heavy:
        action.change = "in place" if action.reasons else "unchanged"
        action.surge = False


def differences(before: Any, after: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """What was edited: its path, and "args.llm_configs[0].engine_kwargs.seed: 1 → 2"."""
    same = isinstance(before, list) and isinstance(after, list) and len(before) == len(after)
    sides = [dict(enumerate(side)) if same else side for side in (before, after)]
    old, new = ({} if side is NOT_GIVEN else side for side in sides)
    if isinstance(old, dict) and isinstance(new, dict) and (old or new):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key, NOT_GIVEN), new.get(key, NOT_GIVEN), (*path, key))
    elif before != after:
        texts = ["(not given)" if s is NOT_GIVEN else json.dumps(s) for s in (before, after)]
        texts = [re.sub(f'"{FINGERPRINT}[0-9a-f]+"', HIDDEN, text) for text in texts]
        edit = " → ".join(shortened(text, MOST_VALUE_CHARACTERS) for text in texts)
        yield path, f"{format_key(path)}: {edit}"


def deletion(application: ApplicationSpec, running: Running | None, reason: str) -> Action:
    """Delete an application, if it is there."""
    before, _, record = running or (None, "", None)
    declared = before and before.source == "declarative"
    reasons = (reason, BY_SERVE_DEPLOY) if declared else (reason,)
    return Action(application, "delete", reasons=reasons, before=before, record=record)


def running_replicas(deployment: DeploymentDetails) -> list[ReplicaDetails]:
    return [replica for replica in deployment.replicas if replica.state == "RUNNING"]


def gap(action: Action) -> str:
    """What a restart means for those who send requests; empty when nothing restarts."""
    deployments = action.before.deployments.values() if action.before else ()
    restarted = [d for d in deployments if d.name in action.restarting and running_replicas(d)]
    if restarted and action.surge:
        return "no gap, where there is room: new replicas start before the old ones stop"
    if alone := " and of ".join(d.name for d in restarted if d.target_num_replicas <= 1):
        return f"with a gap: Serve stops the one replica of {alone} first (see --no-downtime)"
    return "rolling: Serve stops a fifth of the replicas at a time" if restarted else ""


def demands_at_once(action: Action) -> list[Demand]:
    """What there has to be room for: all replicas, or with --no-downtime a new one of each
    deployment that restarts, since an old one stops when that runs."""
    before, demands = action.before.deployments if action.before else {}, []
    staying = before.keys() - action.restarting if action.surge else ()
    for demand in [demand for demand in action.demands if demand.deployment not in staying]:
        old, first = before.get(demand.deployment), demand.initial_replicas
        if action.surge and old:
            first = min(1, first)
        elif old and first == demand.min_replicas:  # Serve keeps what autoscaling has made of it
            first = min(demand.max_replicas, max(first, old.target_num_replicas))
        demands.append(replace(demand, initial_replicas=first))
    return demands


def taken_routes(
    applications: Sequence[ApplicationSpec], others: Mapping[str, ApplicationDetails]
) -> Iterator[Problem]:
    """The routes that other running applications hold: Serve would refuse the second one."""
    for spec, holder in itertools.product(applications, others.values()):
        if holder.route_prefix == (spec.route_prefix or "") and holder.name != spec.name:
            message = f"{holder.route_prefix} is the route of {holder.name}, which is running"
            hint = f"choose another route, delete {holder.name}, or first give it another one"
            yield Problem(("applications", spec.index, "route_prefix"), message, hint)


# == 9. Causes: what Serve and the engine say → the root cause, a hint, the phase of a start

ANSI = re.compile(r"\x1b\[[\d;]*m")
LOG_PREFIX = re.compile(
    r"^((?:\([^()]*pid=\d+[^()]*\) ?)*"  # (EngineCore pid=123) (RayWorkerProc pid=124)
    r"(?:[A-Z]+ +[\d-]+ [\d:,.]+ (?:\[[^]]*\]|\S+ \S+ --) ?)?)"
)
FRAME = re.compile(r'^\s*File (?:"[^"]*", line \d+, in|(?P<place>"[^"]*", line \d+))')
RAISED = re.compile(r"^(?P<name>[A-Za-z_][\w.]*)(?:\([\w.]+\))?(?::|: .*)?$")
NEXT_MESSAGE = re.compile(
    r"Traceback|During handling|The above exception|The deployment |Deployment '|A replica |"
    r"ray::|:\w+:|\[|\S+:\d+: "
)
"""What ends the lines that belong to an exception."""

WRAPPERS = re.compile(
    r"^RuntimeError: Traceback|^(?:ray\.exceptions\.)?RayTaskError|^(?:\w+\.)*CancelledError|"
    r"^SystemExit: |See root cause above|in a background process|"
    # How Serve ends a replica whose constructor raised, and the engine's workers with it.
    r"killed by `ray\.kill`|its owner has died|^ActorDiedError:?$"
)
"""Exceptions whose text only points elsewhere (vllm/v1/engine/utils.py, vllm/v1/executor)."""

NEEDLESS = re.compile(
    r"^(?:(?:\S*ActorDiedError: )?The actor (?:died|is dead).*? exit detail: |"
    r"RuntimeError: Failed to create vLLM engine config: |pydantic_core\._pydantic_core\.|"
    r"(?:RuntimeError: )?Worker failed with error '(?!')|\d+ validation errors? for \w+ Value "
    r"error, |\S+CalledProcessError: .*(?:ERROR|error): )+|"  # what pip printed, but its last line
    r"(?:', please check| \[type=\w+, | Some common causes| Supported architectures:).*"
)
"""What nobody needs to read before an exception's own words, and behind them."""

HINTS = r"""
max seq len\s*\((?P<asked>\d+)\).* larger than the available KV cache
    lower engine_kwargs.max_model_len (it is {asked}), or raise num_gpus
No available memory for the cache blocks
    raise num_gpus or gpu_memory_utilization; if engines started together, set kv_cache_memory_bytes
Error in memory profiling
    another engine disturbed it: set engine_kwargs.kv_cache_memory_bytes, or use --max-workers 1
Free memory on device
    lower num_gpus or gpu_memory_utilization, or stop what else runs on that GPU (see nvidia-smi)
Available memory on node \d+
    lacks main memory: lower VLLM_CPU_KVCACHE_SPACE, kv_cache_memory_bytes or gpu_memory_utilization
CUDA out of memory
    the GPU's memory is full: raise num_gpus, lower max_model_len, or use a smaller model
max_model_len \(\d+\) is greater than the derived max_model_len \(\w+=(?P<most>\d+)
    the model can take {most} tokens: set engine_kwargs.max_model_len to {most} or less
Repository Not Found for url
    no such model, or a private one: check model_source, or set HF_TOKEN in runtime_env.env_vars
401 Client Error|40[13] (?:Forbidden|Unauthorized)|gated repo|is restricted
    the model is gated: accept its licence, and set HF_TOKEN in runtime_env.env_vars
local_files_only|couldn't connect to
    not on the node, which can't reach Hugging Face (or HF_HUB_OFFLINE is set): check model_source
Repo id must be in the form|is not a local folder|Can't load the config|Invalid repository ID
    there is no such model: check model_source; a path has to exist on every node
SafetensorError
    a weights file is broken or not whole: fetch the model again
trust_remote_code
    the model brings its own code: set engine_kwargs.trust_remote_code: true if you trust it
Cannot schedule .* cannot fit .*'GPU': (?P<held>[\d.]+)
    a bundle holds {held} GPU: set VLLM_RAY_PER_WORKER_GPUS: "{held}" in runtime_env.env_vars
does not support ray|Failed to infer device type|No CUDA GPUs|NVIDIA driver|libcuda\.so|CUDA driver
    the node has no GPU that vLLM can use: see nvidia-smi, or set num_gpus: 0 for the CPU engine
ModuleNotFoundError|No module named
    install it on the nodes, or name it in runtime_env
runtime_env could not be set up|Failed to set up runtime env|Runtime env setup for
    check runtime_env
Failed to bind to address '\S+:(?P<port>\d+)'
    port {port} is taken (ss -ltnp tells by what): stop that, or set another http_options.port
running low on memory
    the node ran out of main memory: fewer replicas on it, or a ray_actor_options.memory
Worker exit type: SYSTEM_ERROR
    the process was killed, crashed or ended itself: see its logs, and dmesg for the OOM killer
ray::Builder\.build\(\)
    the import, or the builder with these args, raised it
^(?:GET|POST) http\S+: \d{3}\b
    it runs, and this is its answer: see its logs; --force restarts it, --no-smoke-test won't ask
"""
"""What a cause's text matches, and below what would help, indented; {name}s come from the match.
tests/test_causes.py tells the files of vLLM, Ray and others in which all such texts are made."""

DISTURBED = re.compile("No available memory|Error in memory profiling|Free memory on .* less than")
"""How an engine fails that measured its memory while another one took or freed some."""


def root_cause(message: str, logs: Sequence[str] = ()) -> tuple[str, str]:
    """The first real exception in what Serve says or, where that only points at a log, in what dead
    replicas left, the latest first; and a hint. Of several that with a hint counts, from the last
    in Serve's message (Python prints the outermost last), and from the first in an engine's log."""
    lines = [line.strip() for line in ANSI.sub("", message).splitlines() if line.strip()]
    last = [x for x in lines if not x.startswith(("This may be caused by", "ActorDied"))] or lines
    said = [real_exceptions(message)[::-1], *map(real_exceptions, logs), last[-1:]]
    found = next(filter(None, said), ["(no message)"])
    text = next(filter(hint_for, found), found[0])
    hint = hint_for(text) or hint_for(message.partition('\n  File "')[0])
    return shortened(NEEDLESS.sub("", text), MOST_CAUSE_CHARACTERS), hint


def real_exceptions(text: str) -> list[str]:
    """The exceptions in a text that wrap no other, in their order, each once and on one line."""
    found: list[list[str]] = []
    frame, speaker = None, None
    for whole in ANSI.sub("", text).splitlines():
        _, prefix, line = LOG_PREFIX.split(whole.rstrip(), 1)
        raised = RAISED.match(line)
        if raised and (frame or raised["name"].endswith(("Error", "Exception"))):
            # Of a file that can't be parsed, the place, which is no frame of a stack.
            found.append([line, f"({frame['place']})" if frame and frame["place"] else ""])
            speaker = prefix
        elif prefix != speaker or NEXT_MESSAGE.match(line):
            speaker = None
        else:
            found[-1].append(line.strip())
        frame = FRAME.match(line) or (frame if line[:1].isspace() else None)
    real = (" ".join(filter(None, parts)) for parts in found if not WRAPPERS.search(parts[0]))
    return list(dict.fromkeys(real))


def hint_for(text: str) -> str:
    """What would help against a known cause, in its own numbers; empty for an unknown one."""
    for pattern, hint in re.findall(r"^(\S.*)\n {4}(.*)", HINTS, re.MULTILINE):
        if match := re.search(pattern, text, re.DOTALL):
            return str(hint.format(**match.groupdict()))
    return ""


PHASES: tuple[tuple[str, str], ...] = (
    (r"Downloading|Fetching \d+ files", "downloading"),
    (r"Starting to load model|Loading safetensors|Loading weights took", "loading weights"),
    (r"Dynamo bytecode|Compiling a graph|torch\.compile took", "compiling"),
    (r"Capturing .*graph|Graph capturing|Warming up model", "warming up"),
)
"""What an engine's log has -> the phase that its start is in, in the order of a start."""


def engine_phase(log: str) -> str:
    """The furthest phase of an engine's start in a log of several processes, or "" for none."""
    return next((phase for pattern, phase in reversed(PHASES) if re.search(pattern, log)), "")


# == 10. Ray: the only section that imports Ray, and the only one that knows its private parts

SERVE, SERVE_CONTROLLER, REPLICA_PREFIX = "serve", "SERVE_CONTROLLER_ACTOR", "SERVE_REPLICA::"
RECORDS, KEYS, CLAIMS = b"app_v5/records", b"app_v5", "app_v5/claims"
"""What this program keeps in the cluster: in the key-value store of the head node a `Record` an
application, and the key of their fingerprints; with its Ray job, what a run works on."""

OK, NOT_FOUND, SERVER_ERROR = 200, 404, 500
LOG = "api/v0/logs/file"
WORKER = "RayWorkerProc"  # vllm/v1/executor/ray_executor_v2.py
START_HINT = "start one with `ray start --head`, or give HOST:PORT in --address or RAY_ADDRESS"


class Builder:
    """Imports and builds applications, inside one Ray actor in the application's own `runtime_env`,
    as the build task of `serve deploy` does.

    An actor keeps what it imported, and runs one call at a time, which is the one lock that
    `RequestRouterConfig` needs (it edits a process-global pickling table, measured on Ray 2.60).
    """

    def warm_up(self, module: str) -> None:
        """Import a builder's module ahead of its first use; errors are the build's to report. Not
        in the constructor: of one that dies there Ray says only that the actor never ran."""
        with contextlib.suppress(Exception):
            importlib.import_module(module)

    def build(self, config: Config, version: str, surge: int) -> tuple[list[Config], Any]:
        """Build one application and apply its `deployments` overrides with Ray's own code. Returns
        the fields of its deployments' `Demand`s, and what Serve's controller takes, serialised. A
        stable `version` lets it compare for itself: equal ones change in place, others restart
        (measured on Ray 2.60), while `serve.run` draws a random one."""
        from ray.serve._private.application_state import build_serve_application
        from ray.serve._private.application_state import override_deployment_info as override
        from ray.serve._private.deploy_utils import deploy_args_to_deployment_info
        from ray.serve.generated.serve_pb2 import ApplicationArgs, DeploymentArgs
        from ray.serve.schema import LoggingConfig, ServeApplicationSchema

        schema = ServeApplicationSchema.model_validate(config)
        quiet = LoggingConfig(log_level="WARNING")  # else it writes the arguments, and secrets
        what: Any = schema.import_path, version, schema.name, schema.args, quiet, None, {}, {}, {}
        _, found, refusal = build_serve_application._function(*what)
        if refusal:
            raise ValueError(refusal)
        built = {row["deployment_name"]: row for row in found}
        infos = {n: deploy_args_to_deployment_info(**built[n], app_name=schema.name) for n in built}
        demands, rows = [], []
        for name, info in override(infos, schema).items():
            options = info.deployment_config
            options.max_surge_percent = options.max_surge_percent or surge
            if schema.logging_config and options.logging_config is None:
                options.logging_config = schema.logging_config.model_dump()
            same = DeploymentArgs.DESCRIPTOR.fields_by_name.keys() & built[name].keys()
            row = {key: built[name][key] for key in same} | {"route_prefix": info.route_prefix}
            row["deployment_config"] = options.to_proto_bytes()
            row["replica_config"] = info.replica_config.to_proto_bytes()
            rows.append(DeploymentArgs(**row).SerializeToString())
            demands.append(describe_deployment(name, info) | {"application": schema.name})
        arguments = ApplicationArgs(external_scaler_enabled=schema.external_scaler_enabled)
        return demands, (rows, arguments.SerializeToString())

    def memory(self, config: Config) -> list[Config]:
        """The fields of a `Memory` for each LLM of an application."""
        places = llm_places({"applications": [config]})
        return [measure_memory(llm, engine_options) for _, llm, _ in places]


def engine_options(llm: Config) -> Config:
    """What an LLM's engine is started with. Raises ValueError where vLLM can't tell its memory."""
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    engine = LLMConfig.model_validate(llm).get_engine_config()
    options: Config = engine.get_initialization_kwargs()
    sizes = ("pipeline_parallel_size", "data_parallel_size", "nnodes")
    unknown = [key for key in sizes if options.get(key, 1) > 1]
    others = ("speculative_config", "quantization", "cpu_offload_gb", "num_gpu_blocks_override")
    unknown += [key for key in others if options.get(key)]
    unknown += [key for key in ("server_cls", "lora_config") if llm.get(key)]
    unknown += ["a model in a bucket"] if engine.mirror_config else []
    unknown += ["max_model_len: -1"] if options.get("max_model_len") == -1 else []
    if unknown:
        raise ValueError(f"it has {', '.join(unknown)}, which is not looked into")
    return options


@dataclass
class BuildProcess:
    """An actor that builds one application at a time; `began` is when the one at its turn did."""

    actor: Any
    imports: Any
    turn: threading.Lock = field(default_factory=threading.Lock)
    began: float = math.inf


def fetch(
    url: str, body: Config | None = None, timeout_s: float = SMOKE_TIMEOUT_S, **headers: str
) -> Response:
    """GET `url`, or POST `body` to it as JSON, never through a proxy of the environment. An answer
    without an end is cut off; a certificate is not checked: it is that of the user's own cluster.
    Raises ClusterError, and ApplicationError where somebody listens and does not answer."""
    import urllib3

    urllib3.disable_warnings()
    started, content = time.monotonic(), b""
    pool = urllib3.PoolManager(timeout=timeout_s, retries=False, cert_reqs="CERT_NONE")
    how: Any = {"json": body, "headers": headers, "preload_content": False}
    try:
        answer = pool.request("POST" if body else "GET", url, **how)
    except urllib3.exceptions.ReadTimeoutError as error:
        raise ApplicationError(f"no answer within {timeout_s:.0f} s from {url}") from error
    except urllib3.exceptions.HTTPError as error:
        raise ClusterError(f"{url}: {error.__context__ or error}") from error
    with answer, contextlib.suppress(urllib3.exceptions.HTTPError):
        for part in iter(partial(answer.read1, MOST_BODY_BYTES), b""):
            content += part
            if time.monotonic() - started > timeout_s or len(content) > MOST_BODY_BYTES:
                break
    return answer.status, content.decode(errors="replace"), time.monotonic() - started


class RayCluster:
    """The effects that the program has on one Ray cluster. `connect` comes first."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.dashboard_url = ""
        self.ray: Any = None  # the module, from `connect` on: to import it takes a second
        self.gcs: Any = None  # Ray's client of the head node
        self.latest: Any = None  # of `states`
        self.builders: dict[str, BuildProcess] = {}
        self.built: dict[str, Any] = {}  # by application, what Serve's controller takes

    def connect(self, address: str, claims: Collection[str] = ()) -> None:
        """Join the running cluster at `address`, at RAY_ADDRESS, or on this machine, as a job that
        says which applications this run works on. Raises ClusterError when there is none."""
        import ray.serve
        from ray._private.authentication import authentication_token_setup as tokens
        from ray._private.services import canonicalize_bootstrap_address
        from ray._raylet import GcsClient

        self.ray, level = ray, logging.INFO if self.options.logs else logging.ERROR
        for name in ("ray", "ray.serve", "ray.data"):
            logging.getLogger(name).setLevel(level)
        wanted = address or os.environ.get("RAY_ADDRESS") or "auto"
        try:
            found = canonicalize_bootstrap_address("auto" if wanted == "local" else wanted)
            # ray.init would wait for ever for a head that is gone.
            host, _, port = found.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
            # Ray does this only for the cluster that it finds by itself (ray/_private/worker.py).
            tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            tokens.ensure_token_if_auth_enabled(None, create_token_if_missing=False)
            self.gcs = GcsClient(address=found)
            context = ray.init(
                address=found,
                namespace=SERVE,
                job_config=ray.job_config.JobConfig(metadata={CLAIMS: json.dumps(list(claims))}),
                log_to_driver=self.options.logs,
                logging_level=level,
            )
        except (OSError, RuntimeError, ValueError, OverflowError, ray.exceptions.RayError) as error:
            where = "" if wanted == "auto" else f" at {wanted}"
            text = shortened(" ".join(str(error).split()), MOST_CAUSE_CHARACTERS)
            raise ClusterError(f"no Ray cluster{where}: {text}\n   {START_HINT}") from error
        if dashboard := context.address_info["webui_url"]:
            self.dashboard_url = f"http://{dashboard}"

    def alive(self) -> bool:
        """Whether the head node answers, and a raylet lives. Ray itself kills a driver that has
        lost its head for a minute, without a word (ray gcs_rpc_client/rpc_client.h)."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            nodes = self.gcs.get_all_node_info(timeout=2.0).values()
            return any(node.state == node.ALIVE for node in nodes)
        return False

    def ask_dashboard(self, path: str, **query: Any) -> str:
        """An answer of the dashboard. Raises ClusterError for whatever goes wrong: what it tells is
        a help, and never a condition. Ray's own `get_log` tells its timeout only to the server, and
        waits for ever for a dashboard that hangs (ray/util/state/api.py)."""
        from ray._private.authentication import http_token_authentication as tokens
        from ray.dashboard.utils import ray_address_to_api_server_url

        try:
            url = ray_address_to_api_server_url(self.ray.get_runtime_context().gcs_address)
            auth = tokens.get_auth_headers_if_auth_enabled({})
            status, text, _ = fetch(f"{url}/{path}?{urlencode(query)}", None, LOG_TIMEOUT_S, **auth)
        except Exception as error:
            raise ClusterError(first_line(str(error)) or repr(error)) from error
        if status != OK:
            raise ClusterError(f"{status} {first_line(text)}")
        return text

    def check_values(self, document: Document, applications: Sequence[ApplicationSpec]) -> Problems:
        """What Ray's own schemas say against the values of a normalised config."""
        from ray.serve._private.config import DeploymentConfig
        from ray.serve.config import AutoscalingConfig
        from ray.serve.schema import ServeDeploySchema

        data = {**document.data, "applications": [app.config for app in applications]}
        found = list(schema_problems(ServeDeploySchema, (), data))
        for path, options in deployment_options(data):
            auto = {"max_replicas": 100} if options.get("num_replicas") == "auto" else {}
            scaling = {**auto, **as_dict(options.get("autoscaling_config"))}
            if path[-1] in DEPLOYMENT_CONFIGS:
                fields = DeploymentConfig.model_fields.keys() - {"autoscaling_config"}
                own = {k: v for k, v in options.items() if k in fields and v != "auto"}
                found += schema_problems(DeploymentConfig, path, own)
            found += schema_problems(AutoscalingConfig, (*path, "autoscaling_config"), scaling)
        # Of a union pydantic says for each part why it is not that; and what the applications have
        # from the top is said there.
        once = {problem.path: problem for problem in reversed(found)}
        mine = [p for p in once if p[2:3] != ("logging_config",) or p[:3] in document.places]
        return [once[path] for path in mine]

    # -- Serve --------------------------------------------------------------------------

    def start_serve(self, config: Config) -> tuple[str, ...]:
        """Start Serve with the config's cluster-wide options, as `serve deploy` does. Returns the
        `http_options` of which a Serve that runs already keeps its own. Raises ClusterError."""
        serve = self.ray.serve
        schema = serve.schema.ServeDeploySchema.model_validate({**config, "applications": []})
        options = schema.model_dump(exclude={"applications", "target_capacity"})
        try:
            try:
                serve.start(**options)
            except ValueError:  # another run has started Serve at the same moment
                serve.start(**options)
        except Exception as error:
            said = "\n   ".join(filter(None, root_cause(str(error))))
            raise ClusterError(f"Ray Serve did not start: {said}") from error
        self.states()
        found, wanted = self.latest.http_options.model_dump(), options["http_options"]
        return tuple(k for k in config.get("http_options") or () if found.get(k) != wanted.get(k))

    def ask_controller(
        self, method: str, *arguments: Any, timeout_s: float = CONTROLLER_TIMEOUT_S
    ) -> Any:
        """What a method of Serve's controller returns, None when Serve is not running; Ray repeats
        the call when the controller restarts meanwhile. Raises ClusterError when there is no answer
        in time, and ApplicationError for what the method raises."""
        errors = self.ray.exceptions
        try:
            controller = self.ray.get_actor(SERVE_CONTROLLER, namespace=SERVE)
            return self.ray.get(getattr(controller, method).remote(*arguments), timeout=timeout_s)
        except errors.RayTaskError as error:  # before ValueError, which it may be, too
            raise ApplicationError(str(error)) from error
        except (errors.RayActorError, errors.GetTimeoutError) as error:
            raise ClusterError(f"the Serve controller does not answer: {error}") from error
        except ValueError:
            return None

    def states(self, timeout_s: float = CONTROLLER_TIMEOUT_S) -> dict[str, ApplicationDetails]:
        """The state of every application on the cluster, by name; `latest` keeps all that Serve
        tells, None when it is not running. 1 ms of CPU; `serve.status()` costs 57 (measured on Ray
        2.60). Raises as `ask_controller` does."""
        details = self.ask_controller("get_serve_instance_details", timeout_s=timeout_s)
        for application in details["applications"].values() if details else ():
            application.pop("deployed_app_config", None)  # may name a module that is not here
            for name, deployment in application["deployments"].items():
                # Nobody asks for it, and its request router would be pickled, 2 ms each.
                deployment["deployment_config"] = {"name": name}
        schema = self.ray.serve.schema.ServeInstanceDetails
        self.latest = found = details and schema.model_validate(details)
        return found.applications if found else {}

    def endpoint(self) -> str:
        """Serve's HTTP address for this node, by the last poll: "http://localhost:8000"; empty when
        it has no proxy. `root_path` is not in it: a proxy in front of Serve cuts that off."""
        details = self.latest
        if details is None or details.proxy_location == "Disabled":
            return ""
        options, proxies = details.http_options, [p.node_ip for p in details.proxies.values()]
        local = not proxies or self.ray.util.get_node_ip_address() in proxies
        host = options.host if local else proxies[0]
        host = "localhost" if host in ("0.0.0.0", "::", "127.0.0.1") else host
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if options.ssl_certfile else 'http'}://{host}:{options.port}"

    def submit(self, action: Action) -> None:
        """Hand a built application to Serve, and do not wait. Raises ApplicationError."""
        name, (rows, args) = action.name, self.built[action.name]
        record = Record(action.version, action.kept, action.demands)
        if action.record is None or action.record.version != action.version:
            # Before, too, so that it is there even if this run ends while Serve takes it over.
            self.remember(name, record)
        most_s = CONTROLLER_LOST_AFTER_S
        try:
            self.ask_controller("deploy_applications", {name: rows}, {name: args}, timeout_s=most_s)
        except ApplicationError:
            self.remember(name, action.record)
            action.sent = False
            raise
        self.remember(name, record)

    def delete(self, name: str) -> None:
        """Have Serve remove an application; it is gone some seconds later."""
        self.ask_controller("delete_apps", [name], timeout_s=CONTROLLER_LOST_AFTER_S)
        self.remember(name, None)

    # -- what this program keeps in the cluster ---------------------------------------------

    def fingerprint_key(self, *, make: bool) -> bytes:
        """The random key of this cluster's fingerprints; the first run that may makes it."""
        if make:
            self.gcs.internal_kv_put(b"key", os.urandom(32), overwrite=False, namespace=KEYS)
        return self.gcs.internal_kv_get(b"key", namespace=KEYS) or b""

    def running(self, found: Collection[ApplicationDetails]) -> dict[str, Running]:
        """What this program knows about some applications of the cluster, by name."""
        from pydantic import TypeAdapter
        from ray.serve.generated.serve_pb2 import DeploymentRoute

        kept = TypeAdapter(Record)

        def look_up(details: ApplicationDetails) -> tuple[str, Running]:
            version, record = "", None
            name = next(iter(details.deployments), "")  # all of an application have one version
            with contextlib.suppress(ApplicationError):  # it may have gone meanwhile
                answer = self.ask_controller("get_deployment_info", name, details.name)
                version = DeploymentRoute.FromString(answer).deployment_info.version
            # There may be none, or another version of this program has left another form.
            with contextlib.suppress(ValueError):
                text = self.gcs.internal_kv_get(details.name.encode(), namespace=RECORDS)
                left = kept.validate_python(json.loads(text or "null"))
                record = left if version in ("", left.version) else None
            return details.name, (details, version, record)

        with ThreadPoolExecutor(len(found) or 1) as pool:  # a busy controller takes its time
            return dict(pool.map(look_up, found))

    def remember(self, name: str, record: Record | None) -> None:
        """Leave in the cluster what a later run needs to tell what it would change; the version in
        it tells whether somebody else has deployed the application since."""
        if record is None:
            self.gcs.internal_kv_del(name.encode(), del_by_prefix=False, namespace=RECORDS)
        else:
            text = json.dumps(dataclasses.asdict(record), default=str).encode()
            self.gcs.internal_kv_put(name.encode(), text, overwrite=True, namespace=RECORDS)

    def claims(self) -> dict[str, str]:
        """The applications on which earlier runs work that still live, and which run: it says so
        with its Ray job (`connect`), and one that was killed is a dead job at once."""
        rows = self.gcs.get_all_job_info(skip_is_running_tasks_field=True).values()
        jobs = sorted(rows, key=lambda job: (job.start_time, job.job_id))
        me, taken = self.ray.get_runtime_context().get_job_id(), dict[str, str]()
        for job in itertools.takewhile(lambda job: job.job_id.hex() != me, jobs):
            claimed = [] if job.is_dead else json.loads(job.config.metadata.get(CLAIMS) or "[]")
            who = f"process {job.driver_pid} on {job.driver_address.ip_address}"
            taken = dict.fromkeys(claimed, who) | taken  # the first of several is the one at work
        return taken

    # -- building -----------------------------------------------------------------------------

    def process_of(self, application: ApplicationSpec, alone: bool = False) -> BuildProcess:
        """Where an application is built: alone, or with those of its module and runtime_env. The
        first call starts the process and its imports, which take 10 s for an LLM."""
        runtime_env = application.config.get("runtime_env") or {}
        module = application.config["import_path"].replace(":", ".").rpartition(".")[0]
        key = json.dumps([alone and application.name, module, runtime_env], sort_keys=True)
        if key not in self.builders:
            # Where there are GPUs, what vLLM says of its memory is of their platform.
            gpus = [row["NodeID"] for row in self.ray.nodes() if row["Resources"].get("GPU")]
            on_node = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
            where = on_node(gpus[0], soft=True) if gpus else "DEFAULT"
            how = {"runtime_env": runtime_env or None, "scheduling_strategy": where}
            actor = self.ray.remote(num_cpus=0, **how)(Builder).remote()
            self.builders[key] = BuildProcess(actor, actor.warm_up.remote(module))
        return self.builders[key]

    def wait_for(self, call: Any, check: Callable[[], None], most_s: float = math.inf) -> Any:
        """What an actor's call returns; None after `most_s`. `check` may end it by raising."""
        while most_s > 0 and not self.ray.wait([call], timeout=0.2)[0]:
            check()
            most_s -= 0.2
        return self.ray.get(call) if most_s > 0 else None

    def build(
        self, action: Action, check: Callable[[], None], alone: bool = False
    ) -> tuple[Demand, ...]:
        """Ray's own build of one application: what each of its deployments reserves, and what vLLM
        says of the memory of Ray's LLMs in it. `check` ends the wait; raises ApplicationError when
        the import, the builder or an override fails. Where another's builder hangs in their
        process, or kills it, it gets one of its own."""
        application, how = action.application, (action.version, SURGE_PERCENT * action.surge)
        facts: Any = []
        process = self.process_of(application, alone)
        while not process.turn.acquire(timeout=0.2):
            check()
            if time.monotonic() - process.began > BUILD_PATIENCE_S:
                return self.build(action, check, alone=True)
        try:
            self.wait_for(process.imports, check)
            process.began = time.monotonic()
            call = process.actor.build.remote(application.config, *how)
            demands, self.built[application.name] = self.wait_for(call, check)
            process.began = math.inf
            # An application that has lost its process once is not asked for this a second time.
            if is_rays_builder(application.config) and not alone:
                call = process.actor.memory.remote(application.config)
                facts = self.wait_for(call, check, MEMORY_TIMEOUT_S)
            if facts is None:
                self.ray.kill(process.actor)  # who comes next gets another one
                facts = [{"unknown": "vLLM did not tell in time"}] * len(application.models)
        except Stopped:
            self.ray.kill(process.actor)
            raise
        except self.ray.exceptions.RayError as error:
            if isinstance(error, self.ray.exceptions.RayActorError) and not alone:
                return self.build(action, check, alone=True)
            raise ApplicationError(str(error)) from error
        finally:
            process.turn.release()
        for fields in demands:
            # Of prefill and decode, which may have one name, nobody can tell whose is whose.
            known = zip(application.models, facts, strict=False)
            mine = [fact for model, fact in known if serves(fields["deployment"], model)]
            fields["memory"] = Memory(**mine[0]) if len(mine) == 1 else None
        return tuple(Demand(**fields) for fields in demands)

    # -- resources and logs ------------------------------------------------------------------

    def nodes(self, giving_way: Collection[str] = ()) -> list[Node]:
        """The live nodes with what is free on each, and who holds the rest of it there; what the
        replicas of the applications in `giving_way` hold counts as free."""
        available = self.ray._private.state.available_resources_per_node()
        reservations, cards = self.reservations(), {}
        # As far as the dashboard tells: another Ray's may have another form.
        with contextlib.suppress(ClusterError, KeyError, TypeError, ValueError, AttributeError):
            cards = read_cards(read_json(self.ask_dashboard("nodes", view="summary")))
        nodes = []
        for row in [row for row in self.ray.nodes() if row["Alive"]]:
            node_id, total = row["NodeID"], row["Resources"]
            held = [each for each in reservations if each.node_id == node_id]
            leaving = [each for each in held if each.application in giving_way]
            given_back = (Counter(each.reserved) for each in leaving)
            free = sum(given_back, Counter(available.get(node_id, {})))
            staying = tuple(each for each in held if each not in leaving)
            # On a laptop without a GPU, too, which stands for the cluster that is to come.
            count = max(1, int(total.get("GPU", 0))) if self.options.gpu_memory else 0
            mine = cards.get(node_id) or (Card(self.options.gpu_memory),) * count
            # What gives way holds memory, too, and nobody knows on which card.
            if any(each.reserved.get("GPU") for each in leaving):
                mine = tuple(replace(card, used=0) for card in mine)
            matches = partial(self.ray._raylet.node_labels_match_selector, row["Labels"])
            nodes.append(Node(row["NodeManagerAddress"], total, free, matches, staying, mine))
        return nodes

    def reservations(self) -> list[Reservation]:
        """What Serve's replicas hold now: the bundles of their placement groups, and what actors,
        they and those that they started, have outside of them. GPU indices come from the actors'
        resource mappings, where a group's name goes with its part (gcs.proto, ResourceMapEntry)."""
        actors, groups = self.actors("ALIVE"), self.ray.util.placement_group_table()
        held: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        gpus: dict[tuple[str, str], set[int]] = defaultdict(set)
        for group in groups.values():
            where = group["bundles_to_node_id"] if group["state"] != "REMOVED" else {}
            for index, node_id in where.items():
                held[group["name"], node_id].update(group["bundles"][index])
        names = {actor.address.worker_id: actor.name for actor in actors}
        for actor in actors:
            owner = names.get(actor.owner_address.worker_id, "")
            name = owner if owner.startswith(REPLICA_PREFIX) else actor.name
            amounts = {r: n for r, n in actor.required_resources.items() if r[:5] != "node:"}
            if actor.placement_group_id:
                group = groups.get(actor.placement_group_id.hex(), {})
                name, amounts = group.get("name", ""), {}
            key = name, actor.node_id.hex()
            held[key].update(amounts)
            for part in actor.resource_mapping:
                if re.fullmatch(r"GPU(_group_\w+)?", part.name):
                    gpus[key] |= {piece.index for piece in part.resource_ids}
        addresses = {row["NodeID"]: row["NodeManagerAddress"] for row in self.ray.nodes()}
        found = []
        for (name, node_id), amounts in sorted(held.items()):
            if name.startswith(REPLICA_PREFIX) and name.count("#") > 1:
                application, deployment, replica = name.removeprefix(REPLICA_PREFIX).rsplit("#", 2)
                where, indices = addresses.get(node_id, ""), tuple(sorted(gpus[name, node_id]))
                row = (application, deployment, replica, node_id, where, dict(amounts), indices)
                found.append(Reservation(*row))
        return found

    def autoscales(self) -> bool:
        """Whether an autoscaler may add nodes. Of the head's own only its log tells, with v1 and v2
        (tried on Ray 2.60); KubeRay's is not on the head, and labels its nodes."""
        rows, log = self.ray.nodes(), ""
        heads = [row["NodeID"] for row in rows if "node:__internal_head__" in row["Resources"]]
        with contextlib.suppress(ClusterError, IndexError):
            log = self.ask_dashboard(LOG, filename="monitor.log", node_id=heads[0], lines=-1)
        grouped = any("ray.io/node-group" in row["Labels"] for row in rows)
        return grouped or "--autoscaling-config=" in log

    def actors(self, state: str) -> list[Any]:
        """The `ActorTableData` of the actors that are "ALIVE", or "DEAD". Raises ClusterError."""
        try:
            tables = self.ray._private.state.state._connect_and_get_accessor()
            rows = tables.get_actor_table(None, state)
        except Exception as error:
            raise ClusterError(f"the head node does not tell its actors: {error}") from error
        return list(map(self.ray.core.generated.gcs_pb2.ActorTableData.FromString, rows))

    def replica_log(self, actor_id: str, state: str = "") -> str:
        """The ends of a replica's logs, and its engine's; with the `state` that it is in also those
        of the actors in its placement group, and how each ended. Raises ClusterError."""
        actors = self.actors(state) if state else []
        found = [actor for actor in actors if actor.actor_id.hex() == actor_id]
        groups = {actor.placement_group_id for actor in found} - {b""}
        workers = [a for a in actors if a.class_name == WORKER and a.placement_group_id in groups]
        ids = [actor_id, *(worker.actor_id.hex() for worker in workers[:MOST_LOGS])]
        read = partial(self.ask_dashboard, LOG, lines=LOG_LINES)
        parts = [read(actor_id=key, suffix=suffix) for key in ids for suffix in ("err", "out")]
        for actor in [*found, *workers[:MOST_LOGS]]:
            for _, cause in actor.death_cause.ListFields():
                parts.append(f"ActorDiedError: {getattr(cause, 'error_message', '')}")
        return "\n".join(filter(None, parts))


# == 11. Verify: an application that runs → the proof that it is what was promised, and answers

ROUTE_QUESTIONS = 6
ONE_TOKEN: Config = {"max_tokens": 1, "temperature": 0}
QUESTIONS: tuple[tuple[str, Config], ...] = (
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], **ONE_TOKEN}),
    ("/v1/completions", {"prompt": "Hello", **ONE_TOKEN}),
    ("/v1/embeddings", {"input": "Hello"}),
    ("/v1/score", {"text_1": "Hello", "text_2": "Hello"}),
)
"""What a model is asked, the next where it has not learnt the one before. The likeliest token: for
a drawn one vLLM's CPU engine compiles its sampler first, 2 to 5 s (measured on vLLM 0.29)."""


def mismatches(action: Action, reservations: Sequence[Reservation]) -> tuple[str, ...]:
    """The promises about resources that running replicas do not keep, in words."""
    rows, totals = [], defaultdict[tuple[str, str], Counter[str]](Counter)
    for each in reservations:
        totals[each.deployment, each.replica_id].update(each.reserved)
    for (name, _), held in totals.items():
        asked = next((d.reserved for d in action.demands if d.deployment == name), {})
        mine = [m.promised for m in action.application.models if serves(name, m)]
        promised = {**asked, **(mine[0] if len(mine) == 1 else {})}  # as in `build`
        # "node:..." only says where something is to run.
        names = [r for r in {*promised, *held} if not r.startswith("node:")]
        if any(abs(promised.get(r, 0.0) - held.get(r, 0.0)) > 1 / STEPS for r in names):
            said = f"promised {format_resources(promised)}, reserved {format_resources(held)}"
            rows.append(f"{name}: {said}")
    return tuple(dict.fromkeys(rows))


def wait_for_route(action: Action, base_url: str, questions: int) -> None:
    """Wait until Serve's proxy knows the application's route, a moment after the controller. Raises
    ClusterError when that never comes, or when another server, which shares the port
    (SO_REUSEPORT), gets a part of some questions."""
    url, good, deadline = f"{base_url}/-/routes", 0, time.monotonic() + PROXY_TIMEOUT_S
    while good < questions:
        try:
            status, text, _ = fetch(url)
            if read_json(text).get(action.application.route_prefix or "") == action.name:
                good += 1
                continue
            action.detail = f"{url} says: {format_refusal(status, text)}"
        except (ClusterError, ApplicationError) as error:
            action.detail, good = str(error), 0
        if good:
            raise ClusterError(f"another server answers at the same address: {action.detail}")
        if time.monotonic() > deadline:
            raise ClusterError(action.detail)
        time.sleep(POLL_INTERVAL_S)


def smoke_test(application: ApplicationSpec, asleep: Collection[str], base_url: str) -> Proof:
    """Ask an application over its public address: its answers, and notes on models that were not
    asked, as those whose deployments are `asleep`. Raises ApplicationError for a bad answer; of
    what is none of models, on /health where it has that, any below 500 is good."""
    url = base_url + quote((application.route_prefix or "").rstrip("/"))
    listing = ["/v1/models"] if application.models else []
    rays = application.models and is_rays_builder(application.config)
    for path in (*listing, "/health", "/"):
        status, text, total_s = fetch(url + path)
        # A builder of the user's own need not list its models.
        if rays or status not in (range(OK + 1, SERVER_ERROR) if path in listing else [NOT_FOUND]):
            break
    models = application.models if path == "/v1/models" else ()
    if status >= SERVER_ERROR or (models and status != OK):
        raise ApplicationError(f"GET {url}{path}: {format_refusal(status, text)}")
    ids = [str(as_dict(row).get("id")) for row in as_list(read_json(text).get("data"))]
    answers, notes = [(f"GET {path}", total_s)], []
    for model in models:
        if model.model_id not in ids:
            there = ", ".join(ids) or "nothing"
            raise ApplicationError(f"GET {url}{path} lists {there}, not {model.model_id}")
        if any(serves(deployment, model) for deployment in asleep):
            notes.append(f"{model.model_id} is scaled to zero: not woken up")
        elif answer := ask_model(model.model_id, url):
            answers.append(answer)
        else:
            notes.append(f"{model.model_id} neither chats, completes, embeds nor scores: not asked")
    return Proof(answers=tuple(answers), notes=tuple(notes))


def ask_model(model_id: str, url: str) -> tuple[str, float] | None:
    """One token from a model, over the first interface that it has; None when it says itself that
    it has none of them, as a model does that transcribes."""
    cannot = "chat template|does not support|not support(?:ed)? by|not found"
    for path, question in QUESTIONS:
        status, text, total_s = fetch(url + path, {**question, "model": model_id})
        said = read_json(text).get("model") or "nobody"
        if status == OK and said == model_id:
            return f"POST {path} to {model_id}", total_s
        if status == OK:
            raise ApplicationError(f"POST {url}{path}: {model_id} was asked, and {said} answered")
        if not re.search(cannot, text, re.IGNORECASE):
            raise ApplicationError(f"POST {url}{path}: {format_refusal(status, text)}")
    return None


def format_refusal(status: int, text: str) -> str:
    """An answer that is none: its status, and the message in its body."""
    body = read_json(text)
    error = body.get("error") or body.get("detail") or text
    said = " ".join(str(as_dict(error).get("message") or error).split()) or "no body"
    return f"{status} {shortened(said, MOST_CAUSE_CHARACTERS)}"


# == 12. Deploy: the pool, the one watcher, deadlines, stopping ========================


class Cluster(Protocol):
    """What deploying needs of a cluster: a `RayCluster`, or what tests script."""

    dashboard_url: str

    def alive(self) -> bool: ...
    def build(self, action: Action, check: Callable[[], None]) -> tuple[Demand, ...]: ...
    def submit(self, action: Action) -> None: ...
    def delete(self, name: str) -> None: ...
    def nodes(self, giving_way: Collection[str]) -> list[Node]: ...
    def states(self, timeout_s: float) -> dict[str, ApplicationDetails]: ...
    def reservations(self) -> list[Reservation]: ...
    def endpoint(self) -> str: ...
    def replica_log(self, actor_id: str, state: str = "") -> str: ...


@dataclass
class Run:
    """What the threads of one run share: what they do, the latest states, whether to stop, and what
    is reported besides; `others` are the running applications that the file does not name."""

    options: Options
    cluster: Cluster
    clock: Callable[[], float] = time.monotonic
    started: float = field(default_factory=time.monotonic)
    actions: list[Action] = field(default_factory=list)
    polled: tuple[float, Mapping[str, ApplicationDetails]] = (-math.inf, {})
    nodes: Sequence[Node] = ()
    autoscales: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)  # of `admitted`
    admitted: list[Demand] = field(default_factory=list)
    stop_code: int = 0
    stop_reason: str = ""
    others: Sequence[ApplicationDetails] = ()
    plan: Plan | None = None
    questions: int = ROUTE_QUESTIONS

    def end(self, action: Action, result: Result, cause: str = "", hint: str = "") -> None:
        action.cause, action.hint, action.detail = cause, hint, cause
        action.ended, action.result, action.words = self.clock(), result, result

    def stop(self, code: int, reason: str) -> None:
        """End every wait; the first reason stands."""
        if not self.stop_code:
            self.stop_reason, self.stop_code = reason, code

    def check(self, action: Action) -> None:
        """Raise Stopped when an application's waiting has to end."""
        if self.stop_code or action.seconds(self.clock()) >= (self.options.timeout or math.inf):
            raise Stopped

    def states_of(self, action: Action) -> Iterator[ApplicationDetails | None]:
        """An application's state in every poll that begins from now on: earlier ones are of what
        ran before. Raises as `check` does."""
        seen = self.clock()
        while True:
            polled_at, states = self.polled
            if polled_at > seen:
                seen = polled_at
                yield states.get(action.name)
            self.check(action)
            time.sleep(POLL_INTERVAL_S / 4)


def deploy(actions: list[Action], run: Run, show: Callable[[Run], None]) -> None:
    """Carry out all actions: deletions first, then the others at once, and last, one after the
    other, those again whose engines disturbed each other. With --plan build all and predict. `show`
    gets the progress, in this thread. Raises Stopped in a plan, which has changed nothing."""
    run.actions = actions
    if run.options.plan:
        in_workers(actions, run, show)
        if run.stop_code:
            raise Stopped
        demands = [d for action in actions if action.submits for d in demands_at_once(action)]
        run.plan = predict(demands, run.nodes)
        return
    left = [action for action in actions if action.result is None]
    sharing = [
        a for a in left if a.submits and any(m.measures_memory for m in a.application.models)
    ]
    try:
        in_workers([a for a in left if a.change == "delete"], run, show)
        in_workers([a for a in left if a.change != "delete"], run, show)
        for action in sharing if len(sharing) > 1 else ():
            disturbed = action.result == "FAILED" and DISTURBED.search(action.cause)
            if disturbed and not run.stop_code:
                action.attempt, action.version, action.words = 2, f"{action.version}.2", "queued"
                action.result = action.ended = action.proof = None
                in_workers([action], run, show)
    except ClusterError as error:
        run.stop(EXIT_CLUSTER, str(error))
    for action in [action for action in actions if action.result is None]:
        if run.stop_code == EXIT_CLUSTER and action.started is not None:
            run.end(action, "UNKNOWN")
        elif action.proof:  # it runs, and is slow to answer
            action.proof.unverified = run.stop_reason
            run.end(action, "RUNNING")
        else:
            run.end(action, "INTERRUPTED")
    show(run)


def in_workers(actions: Sequence[Action], run: Run, show: Callable[[Run], None]) -> None:
    """Carry out some of a run's actions in a pool of threads, in view of what is free now, until
    all is done or the run stops: a thread may hang in a call of Ray then, and is not waited for.
    This one looks whether the cluster still answers. A worker is held until its application
    settles, so --max-workers bounds what starts at once, and 1 is V4's sequential mode."""
    if not actions or run.stop_code:
        return
    # The replicas of now give up what they hold before the new ones start, but where those surge.
    leaving = {a.name for a in actions if a.change != "unchanged" and not a.surge}
    run.nodes, run.admitted = run.cluster.nodes(leaving), []
    cores = int(sum(node.total.get("CPU", 0.0) for node in run.nodes))
    most = len(actions) if run.options.plan else run.options.max_workers
    workers = most or min(len(actions), max(2, cores))
    for action in actions[workers:]:
        action.detail = f"behind {', '.join(a.name for a in actions[:workers][:MOST_LOGS])}"
    pool = ThreadPoolExecutor(workers, thread_name_prefix="worker")
    futures = [pool.submit(carry_out, action, run) for action in actions]
    if not run.options.plan:
        threading.Thread(target=watch, args=(run, futures), daemon=True, name="watch").start()
    alive_at = run.clock()
    while not run.stop_code and wait(futures, POLL_INTERVAL_S / 4).not_done:
        show(run)
        silent_s = run.clock() - alive_at
        if silent_s > HEARTBEAT_INTERVAL_S and run.cluster.alive():
            alive_at = run.clock()
        elif silent_s > CLUSTER_LOST_AFTER_S:
            run.stop(EXIT_CLUSTER, f"the head node has not answered for {silent_s:.0f} s")
    pool.shutdown(wait=False, cancel_futures=True)
    wait(futures, STOP_GRACE_S)
    show(run)


def watch(run: Run, futures: Collection[Future[None]]) -> None:
    """Poll the cluster for all applications, about once a second, until the workers are done or the
    run stops; and read in the logs of the starting ones, one after the other, the engine's phase.
    One poller: a poll costs CPU, and N threads would pay it N times (measured on Ray 2.60)."""
    answered_at, turn = run.clock(), 0
    while not run.stop_code and wait(futures, POLL_INTERVAL_S).not_done:
        polled_at = run.clock()
        try:
            run.polled = polled_at, run.cluster.states(POLL_TIMEOUT_S)
            answered_at = polled_at
        except Exception as error:  # noqa: BLE001
            # Without its watcher every application would wait for its deadline.
            if polled_at - answered_at > CONTROLLER_LOST_AFTER_S:
                silent = f"{CONTROLLER_LOST_AFTER_S:.0f} s ({first_line(repr(error))})"
                run.stop(EXIT_CLUSTER, f"Serve's controller has not answered for {silent}")
        if starting := [action for action in run.actions if action.words.startswith("starting")]:
            turn += 1
            action = starting[turn % len(starting)]
            placed = [r for r in replicas_of(action.details) if r.state == "STARTING" and r.node_id]
            with contextlib.suppress(Exception):  # a phase is decoration
                logs = [run.cluster.replica_log(r.actor_id or "") for r in placed[:MOST_LOGS]]
                action.phase = engine_phase("".join(logs))


def replicas_of(details: ApplicationDetails | None) -> list[ReplicaDetails]:
    deployments = details.deployments.values() if details else ()
    return [replica for deployment in deployments for replica in deployment.replicas]


def carry_out(action: Action, run: Run) -> None:
    """Take one application to its result, in a worker thread; with --plan only build it. A defect
    that it meets is its failure alone. What an interrupted one has come to, `deploy` says."""
    action.started = run.clock()
    try:
        if action.submits:
            action.words, action.detail = "building", ""
            action.demands = run.cluster.build(action, partial(run.check, action))
            action.words = "built"
        elif action.record:
            action.demands = action.record.demands
        if run.options.plan:
            return
        if action.change == "delete":
            delete_application(action, run)
            run.end(action, "DELETED")
            return
        if action.submits:
            submit(action, run)
        prove(action, run)
        run.end(action, "RUNNING")
    except Stopped:
        if not run.stop_code:
            state = ": ".join(filter(None, [action.words, action.detail]))
            run.end(action, "STILL DEPLOYING", f"time ran out while {state}", hint_for(state))
    except ClusterError as error:
        run.end(action, "UNKNOWN", str(error))
    except Exception as error:  # noqa: BLE001
        known = isinstance(error, ApplicationError)
        action.trace = str(error) if known else traceback.format_exc()
        logs, unread = failure_logs(action, run.cluster)
        cause, hint = root_cause(action.trace, logs)
        run.end(action, "FAILED", cause, hint or unread)


def submit(action: Action, run: Run) -> None:
    """Submit a built application for which there is or may be room besides those admitted before,
    and wait until it runs. Raises Stopped, and ApplicationError for what can never fit, unless that
    may wait, for names that Ray can't bear, and when Serve gives up."""
    for demand in action.demands:
        for problem in check_value(demand.label, "name", ()):
            raise ApplicationError(problem.message)
    with run.lock:
        demands = demands_at_once(action)
        fits = predict([*run.admitted, *demands], run.nodes).fits[len(run.admitted) :]
        never = [fit.misfit for fit in fits if fit.never]
        if never and not (run.options.allow_pending or run.autoscales):
            raise ApplicationError("\n".join(never))
        run.admitted += demands
    waits_for = "\n".join(fit.misfit for fit in fits if fit.misfit)
    run.check(action)
    action.words, action.detail, action.sent = "submitting", waits_for, True
    run.cluster.submit(action)
    healthy_at = run.clock()
    for details in run.states_of(action):
        if details is None or details.status in ("DELETING", "NOT_STARTED"):
            raise ApplicationError("the application was deleted while it was being deployed")
        action.details = details
        if details.status == "RUNNING":
            return
        healthy_at = healthy_at if details.status == "UNHEALTHY" else run.clock()
        late = run.clock() - healthy_at > UNHEALTHY_GRACE_S
        if details.status == "DEPLOY_FAILED" or late:
            raise ApplicationError(failure_message(details) or f"it is {details.status.value}")
        action.words, action.detail = describe_state(details, waits_for, action.phase)


def failure_message(details: ApplicationDetails) -> str:
    """All that Serve says about a failed application: its own message, then its deployments'."""
    said = [d.message for d in details.deployments.values() if d.status != "HEALTHY"]
    return "\n".join(filter(None, [details.message, *said]))


def describe_state(details: ApplicationDetails, waits_for: str, phase: str) -> tuple[str, str]:
    """What a deploying application does, in words, and what it waits for: what the plan says does
    not fit now (`waits_for`), else what Serve says after 30 s of a replica that it can't place
    (ray/serve/_private/deployment_state.py), or its engine's `phase`."""
    replicas, said = replicas_of(details), failure_message(details)
    waits_for = waits_for or "\n".join(re.findall("[0-9]+ replicas .* scheduled.*}", said))
    if waits_for and not all(replica.node_id for replica in replicas):
        return "waiting for resources", waits_for
    running = sum(replica.state == "RUNNING" for replica in replicas)
    target = sum(d.target_num_replicas for d in details.deployments.values())
    exceptions = real_exceptions(said)
    failed = f"a replica failed: {root_cause(exceptions[-1])[0]}" if exceptions else ""
    return f"starting replicas {running}/{target}", failed or phase


def failed_replicas(action: Action) -> list[ReplicaDetails]:
    """The replicas that do not run, of the deployments that are not healthy, the latest first:
    Serve calls the one that tells why dead only some seconds after it has given up."""
    failed = []
    for deployment in action.details.deployments.values() if action.details else ():
        if deployment.status != "HEALTHY":
            replicas = [*deployment.replicas, *(deployment.recent_dead_replicas or ())]
            failed += [r for r in replicas if r.actor_id and r.state != "RUNNING"]
    return sorted(failed, key=lambda replica: replica.start_time_s or 0.0, reverse=True)


def failure_logs(action: Action, cluster: Cluster) -> tuple[list[str], str]:
    """The logs of the replicas that failed, the latest first, and why one can't be read."""
    logs, unread = [], ""
    for replica in failed_replicas(action)[:MOST_LOGS]:
        try:
            logs.append(cluster.replica_log(replica.actor_id or "", "DEAD"))
        except Exception as error:  # noqa: BLE001 - a log is a help, and never a condition
            unread = f"there is no log of it: {first_line(str(error))}"
    return logs, unread


def prove(action: Action, run: Run) -> None:
    """Check what runs against what was promised, and ask it something, which has limits of its own.
    Raises ApplicationError for a bad answer; not having reached it is not its failure."""
    application, proof, details = action.application, Proof(), action.details or action.before
    assert details is not None
    action.words, action.detail, action.details, action.proof = "checking", "", details, proof
    try:
        proof.notes = suggestions(action, run)
        running = {r.replica_id for r in replicas_of(details) if r.state == "RUNNING"}
        proof.reservations = [r for r in run.cluster.reservations() if r.replica_id in running]
        proof.mismatches = mismatches(action, proof.reservations)
        asleep = {d.name for d in details.deployments.values() if not d.target_num_replicas}
        ingresses = {d.deployment for d in action.demands if d.ingress}
        base_url = run.cluster.endpoint()
        reasons = {
            "--no-smoke-test": run.options.no_smoke_test,
            "it has no HTTP route": application.route_prefix is None,
            "its ingress has scaled to zero": not asleep.isdisjoint(ingresses),
            "Serve has no HTTP proxy (proxy_location: Disabled)": not base_url,
        }
        if skipped := [text for text, is_so in reasons.items() if is_so]:
            proof.notes += (f"not asked over HTTP: {skipped[0]}",)
            return
        wait_for_route(action, base_url, run.questions)
        run.questions = 1  # one server has the port
        asked = smoke_test(application, asleep, base_url)
        proof.answers, proof.notes = asked.answers, proof.notes + asked.notes
    except ClusterError as error:
        proof.unverified = str(error)


def suggestions(action: Action, run: Run) -> tuple[str, ...]:
    """The cache size that each engine which has just measured its memory names in its log, and
    which ends such measuring (vllm/v1/worker/gpu_worker.py)."""
    found = []
    models = [m for m in action.application.models if m.measures_memory and action.submits]
    for deployment in action.details.deployments.values() if action.details else ():
        replicas = running_replicas(deployment)[:1]
        for replica in replicas if any(serves(deployment.name, m) for m in models) else ():
            with contextlib.suppress(ClusterError):
                log = run.cluster.replica_log(replica.actor_id or "", "ALIVE")
                found += re.findall(r"--kv-cache-memory=(\d+)` \([\d.]+ GiB\) to fit", log)[:1]
    return tuple(f"engine_kwargs.kv_cache_memory_bytes: {n} keeps what it has" for n in found)


def delete_application(action: Action, run: Run) -> None:
    """Delete an application, and wait until what it held is free."""
    action.words, action.detail, action.sent = "deleting", "", True
    run.cluster.delete(action.name)
    for details in run.states_of(action):
        held = [r.reserved for r in run.cluster.reservations() if r.application == action.name]
        if details is None and not held:
            return
        action.detail = f"it still holds {' + '.join(map(format_resources, held))}" if held else ""


def exit_code(run: Run) -> int:
    """129/130/143 before 3 before 1 before 4 before 5 before 0."""
    results = {action.result for action in run.actions}
    broken = any(a.proof.mismatches or a.proof.unverified for a in run.actions if a.proof)
    if run.stop_code or "UNKNOWN" in results:
        return run.stop_code or EXIT_CLUSTER
    if results & {"FAILED", "INTERRUPTED"} or broken or (run.plan and run.plan.misfits):
        return EXIT_FAILED
    if "STILL DEPLOYING" in results:
        return EXIT_TIMEOUT
    edits = any(a.submits or (a.before and a.change == "delete") for a in run.actions)
    return EXIT_CHANGES if edits and run.options.detailed_exitcode else EXIT_OK


# == 13. Report: what was reached → text, live view, JSON ==============================

RULE, THIN_RULE = "=" * 80, "-" * 80
LLM_ENDPOINTS = ("POST {}/v1/chat/completions", "POST {}/v1/completions", "GET  {}/v1/models")
OF_A_DEPLOYMENT = "   {name}: {amounts} per replica, replicas {count}"
OF_A_MODEL = "   Resources per replica: {amounts}\n   Replicas: {count}"
OF_AN_ACTION = ("name", "change", "reasons", "result", "sent", "cause", "hint", "proof")
ICONS = {"queued": "⏳", "RUNNING": "✅", "DELETED": "✅", "FAILED": "❌"}


def format_seconds(seconds: float) -> str:
    """ "42 s" or "3 min 05 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def format_demand(demand: Demand, layout: str = OF_A_DEPLOYMENT) -> str:
    """What a replica reserves, bundle by bundle, and how many there are: "1 → 3 (autoscaling)"."""
    name = f"{demand.deployment} (ingress)" if demand.ingress else demand.deployment
    amounts, count = format_resources(demand.reserved), str(demand.max_replicas)
    bundles = " + ".join(f"[{format_resources(bundle)}]" for bundle in demand.bundles)
    amounts += f" in all: {bundles}, {demand.strategy}" * (len(demand.bundles) > 1)
    least, first = demand.min_replicas, demand.initial_replicas
    if least != demand.max_replicas:
        count = f"{least} → {count} (autoscaling{f', {first} at first' * (first > least)})"
    return layout.format(name=name, amounts=amounts, count=count)


def base_url(application: ApplicationSpec, run: Run) -> str:
    """Where an application answers, or ""."""
    route, lost = application.route_prefix, run.stop_code == EXIT_CLUSTER
    address = "" if route is None or lost else run.cluster.endpoint()
    return address and address + quote(route or "")


def format_start(action: Action) -> list[str]:
    """What is said when an application's turn comes."""
    application = action.application
    lines = ["", f"🚀 Deploying: {application.name}"]
    lines += [f"   📦 Model ID: {model.model_id}" for model in application.models]
    lines.append(f"   🌐 Route: {application.route_prefix or '(none)'}")
    names = {"CPU": "num_cpus", "GPU": "num_gpus"}
    for model in application.models:
        mapped = {names.get(name, name): amount for name, amount in model.promised.items()}
        lines.append(f"   📊 Mapped resources to ray_actor_options: {mapped}")
    return lines


def format_end(action: Action) -> str:
    """What is said when an application has its result."""
    deployed = "Running, unchanged" if action.change == "unchanged" else "Deployed successfully"
    words = deployed if action.result == "RUNNING" else action.words.capitalize()
    cause = f" ({action.cause})" if action.cause else ""
    return f"   {ICONS.get(action.words, '⚠️ ')} {words}: {action.name}{cause}"


def format_action(action: Action) -> list[str]:
    """ "RESTART because args...max_model_len: 2048 → 4096", one line a reason, and who notices."""
    lines = [" because ".join([f"   {action.change}", *action.reasons[:1]])]
    lines += [f"      and {reason}" for reason in action.reasons[1:]]
    return [*lines, f"      {gap(action)}"] if gap(action) else lines


def format_running(action: Action, run: Run) -> list[str]:
    """The summary of one application that runs, in the layout that V5's users know."""
    application = action.application
    lines = [f"• {action.name}"]
    lines += format_action(action) if action.change != "create" else []
    if action.attempt > 1:
        lines.append("   Second attempt, alone: other engines on its GPU disturbed the first")
    others = list(action.demands)
    for model in application.models:
        lines += [f"   Model: {model.source}", f"   Model ID: {model.model_id}"]
        for demand in [d for d in others if serves(d.deployment, model)]:
            others.remove(demand)
            lines.append(format_demand(demand, OF_A_MODEL))
        lines += [f"   Note: {note}" for note in model.notes]
    lines += [*map(format_demand, others), *format_proof(action.proof or Proof())]
    lines += ["   It ran when the cluster was last seen"] if run.stop_code == EXIT_CLUSTER else []
    if address := base_url(application, run):
        lines.append(f"   Base URL: {address}")
    if address and application.models:
        prefix = str(application.route_prefix).rstrip("/")
        lines += ["   Endpoints:", *(f"     • {path.format(prefix)}" for path in LLM_ENDPOINTS)]
    return lines


def format_proof(proof: Proof) -> list[str]:
    """What was checked of a running application, a line each."""
    lines, places = [f"✗ {text}" for text in proof.mismatches], Counter[str]()
    for item in proof.reservations:
        name, amounts = item.deployment, format_resources(item.reserved)
        broken = any(text.startswith(f"{name}: promised") for text in proof.mismatches)
        gpus = f" GPU {', '.join(map(str, item.gpus))}" if item.gpus else ""
        places[f"{'✗' if broken else '✓'} Reserved by {name}: {amounts}, on {item.node}{gpus}"] += 1
    lines += [f"{text} ({n} replicas)" if n > 1 else text for text, n in places.items()]
    lines += [f"✓ {request}: answered in {s:.2f} s" for request, s in proof.answers]
    lines += proof.notes
    lines += [f"✗ Not verified: {proof.unverified}"] if proof.unverified else []
    return [f"   {line}" for line in lines]


def format_cause(action: Action) -> list[str]:
    said = {"Cause": action.cause, "Hint": action.hint}
    return [f"   {key}: {text}".replace("\n", "\n          ") for key, text in said.items() if text]


def format_unfinished(action: Action) -> list[str]:
    """The summary of one application that does not run: what happened, why, where to look."""
    result = action.result or "UNKNOWN"
    lines = [f"• {action.name}: {result} after {format_seconds(action.seconds())}"]
    lines += format_cause(action)
    if result != "FAILED":
        handed = "It was handed to Serve, which may go on; this program no longer watches it"
        lines.append(f"   {handed if action.sent else 'It was not submitted'}")
    seen = action.details or (None if action.sent else action.before)
    if action.before and seen and action.submits and result != "UNKNOWN":
        old = {replica.replica_id for replica in replicas_of(action.before)}
        left = [r for r in replicas_of(seen) if r.replica_id in old and r.state == "RUNNING"]
        lines.append(f"   Still serving from before the edit: {len(left)} of {len(old)} replicas")
    lines += [f"   Logs: {command}" for command in log_commands(action)]
    return lines


def log_commands(action: Action) -> list[str]:
    """Commands that print what the replica that died last, or its engine, wrote."""
    for replica in failed_replicas(action)[:1]:
        command = f"ray logs actor --id {replica.actor_id} --tail {LOG_LINES}"
        return [f"{command} --err", command]
    return []


def format_deleted(action: Action) -> list[str]:
    text = "deleted; what it held is free" if action.before else "it was not there"
    return [f"• {action.name}: {text}", *(f"   Note: {note}" for note in action.reasons[1:])]


def format_summary(run: Run) -> list[str]:
    running = [a for a in run.actions if a.result == "RUNNING"]
    deleted = [a for a in run.actions if a.result == "DELETED"]
    failed = [a for a in run.actions if a.result not in ("RUNNING", "DELETED")]
    doomed = sum(action.change == "delete" for action in run.actions)
    wanted = len(run.actions) - doomed
    good, seconds = exit_code(run) == EXIT_OK, format_seconds(run.clock() - run.started)
    lines = [RULE, f"{'✅' if good else '⚠️ '} Deployment Summary", RULE]
    for done, count, total in (("deployed", running, wanted), ("deleted", deleted, doomed)):
        if total:
            lines.append(f"Total applications {done}: {len(count)}/{total} in {seconds}")
    parts = {
        "📋 Successfully Deployed Applications:": [format_running(a, run) for a in running],
        "🗑️  Deleted Applications:": [format_deleted(a) for a in deleted],
        f"❌ Not {'Running' if wanted else 'Deleted'}:": [format_unfinished(a) for a in failed],
    }
    for title, items in parts.items():
        lines += ["", title, THIN_RULE] if items else []
        lines += itertools.chain(*(["", *item] for item in items))
    if run.others and run.stop_code != EXIT_CLUSTER:
        names = ", ".join(f"{d.name} ({d.status.value})" for d in run.others)
        lines += ["", f"💡 Not in the file, left alone: {names}; --prune deletes them"]
    lines += ["", RULE]
    lines += [f"🔥 All {'deployments' if wanted else 'deletions'} completed!"] if good else []
    if run.cluster.dashboard_url:
        lines.append(f"💡 Ray Dashboard: {run.cluster.dashboard_url}")
        lines.append("💡 Check deployment status and resource usage in the dashboard")
    return [*lines, RULE]


def format_plan(run: Run, plan: Plan) -> list[str]:
    """What `--plan` prints: what each replica would reserve, and where all of it would go."""
    lines = [RULE, "📋 Plan (nothing was changed)", RULE]
    for action in run.actions:
        route = action.application.route_prefix or "(no HTTP route)"
        lines += ["", f"• {action.name}  {route}", *format_action(action)]
        lines += format_cause(action)
        for demand in action.demands:
            memory = format_memory(demand, room_in(plan, demand))
            lines += [format_demand(demand), *(f"      {line}" for line in memory)]
        for model in action.application.models:
            lines += [f"   Note: {note}" for note in model.notes]
            if model.measures_memory and action.submits:
                hint = "set engine_kwargs.kv_cache_memory_bytes, or use --max-workers 1"
                what = "shares its GPU and measures at its start what is free there"
                lines.append(f"   ⚠️  {model.model_id} {what}: {hint}")
    for d in run.others:
        lines += ["", f"• {d.name}  {d.route_prefix or '(no HTTP route)'}"]
        lines += [f"   not in file: it is {d.status.value} and left alone (--prune deletes it)"]
    return [*lines, "", THIN_RULE, *format_prediction(plan), RULE]


def report_json(run: Run) -> Config:
    """The report for programs (docs/REFERENCE.md). A key that goes or changes raises `version`."""
    report = {
        "version": 4,
        "exit_code": exit_code(run),
        "seconds": round(run.clock() - run.started, 1),
        "dashboard": run.cluster.dashboard_url,
        "applications": [action_json(action, run) for action in run.actions],
        "not_in_file": [{"name": d.name, "status": d.status.value} for d in run.others],
        "packing": format_prediction(run.plan) if run.plan else [],
        "misfits": [fit.misfit for fit in run.plan.misfits] if run.plan else [],
    }
    return read_json(json.dumps(report, default=dataclasses.asdict))


def action_json(action: Action, run: Run) -> Config:
    """What there is to tell of an application; what does not apply is empty."""
    return {key: getattr(action, key) for key in OF_AN_ACTION} | {
        "route_prefix": action.application.route_prefix,
        "models": action.application.models,
        "deployments": action.demands,
        "rooms": [room_in(run.plan or Plan((), []), d) for d in action.demands],
        "gap": gap(action),
        "seconds": round(action.seconds(), 1),
        "logs": log_commands(action),
        "base_url": base_url(action.application, run),
    }


def export_config(document: Document, apps: Sequence[ApplicationSpec]) -> str:
    """A checked config as this program would deploy it, for `serve deploy`: YAML, with comments
    that name all that was moved or added, and the variables that nobody will fill in there."""

    def unfilled(text: str) -> str:
        return document.written.get(text) or redact(text, frozenset())

    lines = ["Changed so that plain Ray reserves the exact shares:"]
    data = copied(document.data, unfilled)
    before, data["applications"] = data["applications"], []
    for app in apps:
        row = copied(app.config, unfilled)
        lines += [f"  {app.name}: {text}" for _, text in differences(before[app.index], row)]
        data["applications"].append(row)
    if names := set(re.findall(r"(?<=\$\{)\w+(?=\})|\*{3}", json.dumps(data, default=str))):
        lines.append(f"Fill in before, with `envsubst` for example: {', '.join(sorted(names))}")
    comments = "".join(f"# {line}\n" for line in lines)
    styles = {True: '"', False: None}  # what is filled in is a text, even if it looks otherwise
    write = yaml.SafeDumper.represent_scalar
    yaml.SafeDumper.add_representer(str, lambda d, x: write(d, TEXT_TAG, x, styles["${" in x]))
    return comments + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


class Terminal(io.TextIOBase):
    """The one place that writes: progress and messages to stderr, the report to stdout. What others
    print, Ray for one its workers' lines, they write to this: so nobody shows a secret."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        import rich.live
        import rich.table

        self.rich: Any = rich  # which --help does without
        self.out, self.err, self.secrets = out, err, frozenset[str]()
        # What others print while the live view is there goes through the console, too.
        how: dict[str, Any] = {"file": self, "force_terminal": err.isatty(), "soft_wrap": True}
        self.console = rich.console.Console(**how, highlight=False, markup=False, emoji=False)
        self.live = rich.live.Live(console=self.console, auto_refresh=False)
        self.shown: dict[int, tuple[str, str]] = {}

    def write(self, text: str) -> int:
        print(redact(text, self.secrets), end="", file=self.err, flush=True)
        return len(text)

    def output(self, text: str) -> None:
        if not self.out.isatty():
            print(text, file=self.out, flush=True)
            return
        shown = self.rich.text.Text(text)
        for pattern, style in zip(BAR, ("cyan", "magenta", "yellow"), strict=True):
            shown.highlight_regex(f"{pattern}+", style)
        self.rich.console.Console(file=self.out, soft_wrap=True).print(shown)

    def show(self, run: Run) -> None:
        """The progress of all applications: a block when one's turn comes, a line when it ends, and
        in between a live view, or a line a change."""
        table, text = self.rich.table.Table.grid(padding=(0, 2)), self.rich.text.Text
        for action in run.actions:
            before = self.shown.get(id(action), ("queued", ""))
            now = self.shown[id(action)] = action.words, action.detail
            took = format_seconds(action.seconds(run.clock()))
            icon, name = ICONS.get(now[0], "🚀"), text(action.name, style="bold")
            detail = redact(now[1], self.secrets)  # which the ellipsis may cut short
            line = text(detail, style="dim", overflow="ellipsis", no_wrap=True)
            table.add_row(icon, name, now[0], took, line)
            if now == before:
                continue
            begins = action.started is not None and before[0] == "queued"
            if begins and action.submits and not run.options.plan:
                self.console.print(*format_start(action), sep="\n")
            if action.result:
                self.console.print(format_end(action))
            elif not self.console.is_terminal:
                parts = time.strftime("%H:%M:%S"), action.name, now[0], took, now[1]
                self.console.print("  ".join(filter(None, parts)))
        if self.console.is_terminal:
            self.live.start()
            self.console.show_cursor()  # which nobody would do where a signal ends the program
            self.live.update(table, refresh=True)

    def report(self, run: Run) -> int:
        """The plan or summary, or its JSON, to stdout; tracebacks with `--logs`; the exit code."""
        self.live.stop()  # its last picture stays on the screen
        if run.stop_code:
            self.console.print(f"🛑 Stopped: {run.stop_reason}")
        if run.options.json:
            report = copied(report_json(run), partial(redact, secrets=self.secrets))
            text = json.dumps(report, indent=2)
        else:
            lines = format_plan(run, run.plan) if run.plan else format_summary(run)
            text = redact("\n".join(lines), self.secrets)
        self.output(text)
        for action in run.actions:
            if run.options.logs and action.trace:
                self.console.print(f"--- {action.name}\n{action.trace}")
        return exit_code(run)


# == 14. Command line: options, main() -> int, the one place where exceptions become exit codes


def parse_options(argv: Sequence[str] | None) -> Options:
    """The command line as Options; argparse exits with 2 by itself when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="app_v5.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="a Ray Serve config")
    for item in dataclasses.fields(Options)[1:]:
        name = f"--{item.name.replace('_', '-')}"
        parser.add_argument(name, default=item.default, **item.metadata)
    given = parser.parse_args(argv)
    if given.max_workers < 0 or not 0 <= given.timeout < math.inf:
        parser.error("--max-workers and --timeout are numbers, 0 or more")
    if given.delete and (given.prune or given.force or given.no_downtime):
        parser.error("--delete excludes --prune, --force and --no-downtime")
    if given.export and (given.plan or given.delete or given.json):
        parser.error("--export excludes --plan, --delete and --json")
    if given.detailed_exitcode and not given.plan:
        parser.error("--detailed-exitcode is for --plan")
    return Options(**vars(given))


def check_config(
    document: Document, check_values: Callable[..., Problems]
) -> tuple[tuple[ApplicationSpec, ...], Problems]:
    """The applications of a loaded document, and what is wrong with it: first its keys, and once
    those are in order the values, which takes Ray's schemas."""
    said = {problem.path for problem in document.problems}
    found = check_keys(document.data, TOP, ())
    problems = document.problems + [problem for problem in found if problem.path not in said]
    if not all(problem.warning for problem in problems):
        return (), located(document, problems)
    applications, found = read_applications(document.data)
    problems += found
    if all(problem.warning for problem in problems):
        problems += check_values(document, applications)
    return applications, located(document, problems)


class Session:
    """One run of the program, from its options to its exit code, which is None until it ends."""

    def __init__(self, options: Options, cluster: RayCluster, out: TextIO, err: TextIO) -> None:
        self.options, self.cluster, self.run = options, cluster, Run(options, cluster)
        self.terminal = Terminal(out, err)
        self.say = self.terminal.console.print
        self.document: Document  # as soon as it is loaded
        self.names: list[str] = []  # of the applications in it
        self.code: int | None = None

    def work(self) -> None:
        """Do all of it, and turn every known exception into one clear message and its exit code."""
        try:
            self.code = self.deploy()
        except ConfigError as error:
            self.say_problems(error.args)
            self.code = EXIT_CONFIG
        except (ClusterError, ApplicationError) as error:
            self.say(f"❌ {error}")
            self.code = EXIT_CLUSTER
        except Stopped:
            pass  # `main` says it
        except OSError as error:
            # Whoever read the output has gone, as `| head` does, or there is no room for it.
            if not isinstance(error, BrokenPipeError):
                self.say(f"❌ the report can't be written: {error.strerror or error}")
            self.code = EXIT_FAILED
        except Exception as error:  # noqa: BLE001
            self.say(f"❌ this program has a defect: {error!r}")
            if self.options.logs:
                self.say(traceback.format_exc())
            self.code = EXIT_FAILED

    def say_problems(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.say(f"{'⚠️ ' if problem.warning else '❌'} {format_problem(problem)}")

    def deploy(self) -> int:
        """Load, check, export or connect, decide, deploy, report. Returns the exit code. Raises
        ConfigError (nothing was touched), ClusterError, Stopped and OSError."""
        options, cluster, run, say = self.options, self.cluster, self.run, self.say
        if not options.export:
            say("🔧 Initializing Ray and Ray Serve...")
        applications = self.load()
        purpose = "plan" if options.plan else "delete" if options.delete else "deploy"
        say(f"📦 Found {len(applications)} application(s) to {purpose}")
        if options.export:
            self.terminal.output(export_config(self.document, applications).rstrip("\n"))
            return EXIT_OK
        cluster.connect(options.address, [a.name for a in applications if not options.plan])
        actions = self.decide(applications)
        if run.stop_code:
            raise Stopped
        for action in filter(lambda action: action.submits, actions):
            with contextlib.suppress(Exception):  # its build will say it
                cluster.process_of(action.application)
        run.autoscales = cluster.autoscales()
        if run.autoscales:
            say("⚠️  An autoscaler is active: what no node can hold yet is deployed and waits")
        claims = {} if options.plan else cluster.claims()
        for action in [a for a in actions if a.name in claims and a.change != "unchanged"]:
            cause = f"another run of this program works on it: {claims[action.name]}"
            run.end(action, "FAILED", cause, "wait until it has ended, and run this again")
        if not options.plan and not options.delete:
            if ignored := cluster.start_serve(self.document.data):
                say(f"⚠️  Serve runs already and keeps its own http_options: {', '.join(ignored)}")
            say("🔄 Starting concurrent deployment...")
        deploy(actions, run, self.terminal.show)
        return self.terminal.report(run)

    def load(self) -> list[ApplicationSpec]:
        """The config's applications that --only leaves; warnings are said. Raises ConfigError."""
        self.say(f"📖 Loading config from: {self.options.config}")
        self.document = Document(self.options.config, os.environ)
        self.terminal.secrets = self.document.secrets
        applications, problems = check_config(self.document, self.cluster.check_values)
        if not all(problem.warning for problem in problems):
            raise ConfigError(*problems)
        self.say_problems(problems)
        self.names = [item.name for item in applications]
        for pattern in self.options.only or ():
            if not self.options.prune and not fnmatch.filter(self.names, pattern):
                text = f"{pattern}: no application has that name; there are {', '.join(self.names)}"
                raise ConfigError(Problem((), f"--only {text}", place=("command line", 0, 0)))
        return [item for item in applications if self.is_chosen(item.name)]

    def is_chosen(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.options.only or ["*"])

    def decide(self, chosen: Sequence[ApplicationSpec]) -> list[Action]:
        """What to do with each chosen application, and with what --prune deletes. Raises
        ConfigError for a route that another application has."""
        options, cluster = self.options, self.cluster
        states = {n: d for n, d in cluster.states().items() if d.status != "DELETING"}
        others = [d for d in states.values() if d.name not in self.names]
        pruned = {d.name: d for d in others if options.prune and self.is_chosen(d.name)}
        self.run.others = [d for d in others if d.name not in pruned]
        running = cluster.running([d for n, d in states.items() if n in pruned or n in self.names])
        specs = [ApplicationSpec(-1, name, d.route_prefix, {}) for name, d in pruned.items()]
        actions = [deletion(spec, running[spec.name], "--prune") for spec in specs]
        if options.delete:
            return actions + [deletion(app, running.get(app.name), "--delete") for app in chosen]
        staying = {name: d for name, d in states.items() if name not in pruned}
        if problems := list(taken_routes(chosen, staying)):
            raise ConfigError(*located(self.document, problems))
        key, secrets = cluster.fingerprint_key(make=not options.plan), self.document.secrets
        for app in chosen:
            actions.append(decide(app, running.get(app.name), options, secrets, key))
        return actions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program in a thread, while this one heeds signals: Ray's calls would hold them up.
    Whenever one comes, what was reached is printed, and the exit code is the signal's."""
    sys.stdout, sys.stderr = (s or io.StringIO() for s in (sys.stdout, sys.stderr))  # `>&-`
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without emoji shows question marks
    options = parse_options(argv)
    session = Session(options, RayCluster(options), sys.stdout, sys.stderr)
    run = session.run
    # Ray prints what raylets say; only the report belongs on stdout.
    sys.stdout = sys.stderr = session.terminal

    def stop(number: int, _: object) -> None:
        if run.stop_code > EXIT_CHANGES:  # the second signal; a lost cluster is none
            os._exit(run.stop_code)
        run.stop(128 + number, signal.Signals(number).name)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and a shell's `&` leave it
            signal.signal(number, stop)
    thread = threading.Thread(target=session.work, daemon=True)
    thread.start()
    while thread.is_alive() and not run.stop_code:
        thread.join(0.1)
    thread.join(2 * STOP_GRACE_S + POLL_TIMEOUT_S if run.actions else STOP_GRACE_S)
    with contextlib.suppress(OSError):  # whoever read the output has gone, too
        if session.code is None and run.actions and not options.plan:
            session.terminal.report(run)
        elif session.code is None:
            session.say(f"🛑 {run.stop_reason}: nothing was deployed")
    return run.stop_code or (EXIT_FAILED if session.code is None else session.code)


if __name__ == "__main__":
    # Not sys.exit: a thread may hang in a call of Ray, and Ray's own way out takes signals badly.
    os._exit(main())
