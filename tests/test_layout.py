"""The rules that keep the one file readable, and the private parts of Ray that it leans on."""

from __future__ import annotations

import ast
import importlib
import inspect
import operator
import re
from collections.abc import Iterator
from typing import TypeGuard, TypeVar

import pytest

from cluster import APP_V5

SOURCE = APP_V5.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# == (\d+)\. ([^:\n]+)", re.MULTILINE)
SECTIONS = [
    (SOURCE.count("\n", 0, match.start()) + 1, match[2]) for match in BANNER.finditer(SOURCE)
]
NAMES = [
    *("Settings", "Types", "Config", "Check", "Resources", "Memory", "Plan", "Changes"),
    *("Causes", "Ray", "Verify", "Deploy", "Report", "Command line"),
]

CEILING = 3300
MOST_OF_A_SECTION = 520
MOST_OF_A_FUNCTION = 60


def section(node: ast.AST) -> str:
    """The name of the section that a node stands in; "" is the head of the file."""
    line = getattr(node, "lineno", 0)
    return max(((start, name) for start, name in SECTIONS if start <= line), default=(0, ""))[1]


T = TypeVar("T", bound=ast.AST)


def walk(kind: type[T]) -> Iterator[T]:
    return (node for node in ast.walk(TREE) if isinstance(node, kind))


def imports() -> Iterator[tuple[ast.Import | ast.ImportFrom, str, list[str]]]:
    """All imports: the node, the module, and what is imported from it."""
    for node in walk(ast.Import):
        yield from ((node, alias.name, []) for alias in node.names)
    for found in walk(ast.ImportFrom):
        yield found, found.module or "", [alias.name for alias in found.names]


def test_the_sections_are_there_in_their_order() -> None:
    assert [name for _, name in SECTIONS] == NAMES
    numbers = [int(match[1]) for match in BANNER.finditer(SOURCE)]
    assert numbers == list(range(1, len(NAMES) + 1))


def test_no_section_is_longer_than_one_reads_at_once() -> None:
    starts = [start for start, _ in SECTIONS]
    ends = [*starts[1:], SOURCE.count("\n") + 1]
    lengths = {name: end - start for (start, name), end in zip(SECTIONS, ends, strict=True)}
    assert {n: length for n, length in lengths.items() if length > MOST_OF_A_SECTION} == {}


def test_the_file_is_no_longer_than_it_has_to_be() -> None:
    assert SOURCE.count("\n") <= CEILING


def test_functions_fit_a_screen() -> None:
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1 for node in walk(ast.FunctionDef)
    }
    assert {n: length for n, length in lengths.items() if length > MOST_OF_A_FUNCTION} == {}


def test_ray_and_vllm_are_imported_only_in_their_sections_and_only_when_needed() -> None:
    for_types = {
        id(below)
        for node in walk(ast.If)
        if getattr(node.test, "id", "") == "TYPE_CHECKING"
        for below in ast.walk(node)
    }
    found = 0
    for node, module, _ in imports():
        if module.split(".")[0] in ("ray", "vllm", "pydantic"):
            found += 1
            if id(node) in for_types:
                assert module == "ray.serve.schema", (module, node.lineno)
            else:
                homes = {"ray": ["Ray"], "vllm": ["Memory"], "pydantic": ["Check", "Ray"]}
                assert section(node) in homes[module.split(".")[0]], (module, node.lineno)
                assert node.col_offset > 0, (module, node.lineno)
    assert found > 10


def test_nothing_private_of_ray_is_reached_for_elsewhere() -> None:
    """`ray._private`, or an attribute of what Ray gave, such as `deployment._replica_config`."""
    outside = [
        (node.attr, node.lineno)
        for node in walk(ast.Attribute)
        if section(node) not in ("Memory", "Ray")
        and re.match(r"_[a-z]", node.attr)
        and ast.unparse(node) != "os._exit"
    ]
    assert outside == []


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        pytest.param("print", {"Report"}, id="print"),
        pytest.param("Console", {"Report"}, id="the console"),
        pytest.param("Live", {"Report"}, id="the live view"),
        pytest.param("ThreadPoolExecutor", {"Deploy", "Ray"}, id="pools"),
        pytest.param("Thread", {"Deploy", "Command line"}, id="threads"),
    ],
)
def test_who_may_write_and_who_may_start_threads(name: str, allowed: set[str]) -> None:
    calls = [
        node
        for node in walk(ast.Call)
        if name in (getattr(node.func, "id", ""), getattr(node.func, "attr", ""))
        and ast.unparse(node.func) != "self.console.print"
    ]
    assert {section(call) for call in calls} == allowed


def is_name(node: ast.AST, context: type[ast.expr_context]) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, context)


def test_no_section_calls_a_later_one() -> None:
    """Annotations may: what calls `Cluster` or `Run` need not stand below them."""
    defined = {
        name: NAMES.index(section(node))
        for node in TREE.body
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [part.id for part in ast.walk(node) if is_name(part, ast.Store)]
        )
        if section(node)
    }
    annotations = {
        id(name)
        for node in ast.walk(TREE)
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if part
        for name in ast.walk(part)
    }
    local = {node.arg for node in walk(ast.arg)}
    local |= {
        part.id
        for function in walk(ast.FunctionDef)
        for part in ast.walk(function)
        if is_name(part, ast.Store)
    }
    later = {
        (node.id, section(node))
        for node in walk(ast.Name)
        if is_name(node, ast.Load)
        and node.id not in local
        and id(node) not in annotations
        and section(node)
        and defined.get(node.id, 0) > NAMES.index(section(node))
    }
    assert later == set()


# -- what breaks when Ray moves one of its private parts -----------------------------------------

PRIVATE = sorted(
    {
        (module, name)
        for node, module, names in imports()
        if section(node) == "Ray" and module.split(".")[0] == "ray"
        for name in names
    }
)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(*pair, marks=[pytest.mark.serve] * pair[0].startswith("ray.llm"))
        for pair in PRIVATE
    ],
    ids=lambda part: part,
)
def test_ray_still_has_what_is_imported_from_it(module: str, name: str) -> None:
    if not hasattr(importlib.import_module(module), name):
        importlib.import_module(f"{module}.{name}")


def test_there_is_much_that_may_move() -> None:
    assert sum("._" in module for module, _ in PRIVATE) > 8


REACHED = sorted(
    {
        chain
        for node in walk(ast.Attribute)
        for chain in re.findall(r"^self\.ray\.([\w.]+)$", ast.unparse(node))
    }
)


@pytest.mark.parametrize("chain", REACHED)
def test_ray_still_has_what_is_reached_through_it(chain: str) -> None:
    import ray.serve

    operator.attrgetter(chain)(ray)


ASKED = sorted(node.attr for node in walk(ast.Attribute) if ast.unparse(node.value) == "self.gcs")


@pytest.mark.parametrize("method", ASKED)
def test_the_client_of_the_head_node_still_has_what_is_called(method: str) -> None:
    from ray._raylet import InnerGcsClient

    assert hasattr(InnerGcsClient, method)


CALLED = {
    call.args[0].value: len([arg for arg in call.args[1:] if not isinstance(arg, ast.Starred)])
    for call in walk(ast.Call)
    if getattr(call.func, "attr", "") == "ask_controller" and isinstance(call.args[0], ast.Constant)
}
"""The methods that are called by name on the actor of Serve's controller: their arguments."""


def test_four_methods_of_the_controller_are_called() -> None:
    expected = {"get_serve_instance_details", "deploy_applications", "get_deployment_info"}
    assert set(CALLED) == expected | {"delete_apps"}


@pytest.mark.parametrize(("method", "count"), CALLED.items())
def test_the_controller_still_has_what_is_called_by_name(method: str, count: int) -> None:
    from ray.serve._private.controller import ServeController

    found = getattr(ServeController, method, None)
    assert callable(found)
    inspect.signature(found).bind(None, *range(count))
