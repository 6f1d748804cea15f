"""The rules that keep the one file readable: what may stand in which section."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator

import pytest

from cluster import APP_V5

SOURCE = APP_V5.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# =+\n# (\d+)\. ([^:\n]+)", re.MULTILINE)
SECTIONS = [
    (SOURCE.count("\n", 0, match.start()) + 1, int(match[1]), match[2])
    for match in BANNER.finditer(SOURCE)
]
RAY_SECTION, DEPLOY_SECTION, REPORT_SECTION, COMMAND_SECTION = 9, 11, 12, 13

MOST_LINES, MOST_SECTION_LINES, MOST_FUNCTION_LINES = 4_300, 600, 60
"""Ceilings, which only ever go down: 3,300 lines and 520 a section are what they shall be."""


def section(node: ast.AST) -> int:
    """The number of the section that a node stands in; 1 is the head of the file."""
    line = getattr(node, "lineno", 0)
    return max((number for start, number, _ in SECTIONS if start <= line), default=1)


def walk(kind: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(TREE) if isinstance(node, kind))


def test_the_sections_are_there_in_their_order() -> None:
    assert [number for _, number, _ in SECTIONS] == list(range(1, 14))
    assert [name for _, _, name in SECTIONS] == [
        *("Settings", "Types", "Config", "Check", "Resources", "Plan", "Changes", "Causes", "Ray"),
        *("Verify", "Deploy", "Report", "Command line"),
    ]


def test_the_file_stays_one_that_a_person_can_carry() -> None:
    lines = SOURCE.count("\n")
    ends = [start for start, _, _ in SECTIONS[1:]] + [lines]
    sizes = {name: end - start for (start, _, name), end in zip(SECTIONS, ends, strict=True)}
    print(f"app_v5.py: {lines} lines; {sizes}")
    assert lines <= MOST_LINES
    assert {name: size for name, size in sizes.items() if size > MOST_SECTION_LINES} == {}


def test_ray_is_imported_only_in_its_section_and_only_when_needed() -> None:
    typing = {
        id(node)
        for block in TREE.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
    }
    for node in [*walk(ast.Import), *walk(ast.ImportFrom)]:
        if id(node) in typing:
            continue
        names = [alias.name for alias in getattr(node, "names", [])]
        module = getattr(node, "module", None) or names[0]
        if module.split(".")[0] in ("ray", "vllm", "pydantic"):
            assert section(node) == RAY_SECTION, (module, node.lineno)  # type: ignore[attr-defined]
            assert node.col_offset > 0, (module, node.lineno)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        pytest.param("print", {REPORT_SECTION}, id="print"),
        pytest.param("Console", {REPORT_SECTION}, id="the console"),
        pytest.param("Live", {REPORT_SECTION}, id="the live view"),
        pytest.param("ThreadPoolExecutor", {DEPLOY_SECTION}, id="pools"),
        pytest.param("Thread", {DEPLOY_SECTION, COMMAND_SECTION}, id="threads"),
    ],
)
def test_who_may_write_and_who_may_start_threads(name: str, allowed: set[int]) -> None:
    calls = [
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call)
        and name in (getattr(node.func, "id", ""), getattr(node.func, "attr", ""))
    ]
    assert calls
    assert {section(call) for call in calls} <= allowed


def test_no_section_calls_a_later_one() -> None:
    defined = {
        node.name: section(node)
        for node in TREE.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    annotations = {
        id(name)
        for node in ast.walk(TREE)
        for part in (
            getattr(node, "annotation", None),
            getattr(node, "returns", None) if isinstance(node, ast.FunctionDef) else None,
        )
        if part
        for name in ast.walk(part)
    }
    parameters = {node.arg for node in ast.walk(TREE) if isinstance(node, ast.arg)}
    later = {
        (node.id, section(node), defined[node.id])
        for node in ast.walk(TREE)
        if isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Load)
        and node.id not in parameters
        and id(node) not in annotations
        and defined.get(node.id, 0) > section(node) > 1
    }
    assert later == set()


def test_functions_fit_a_screen() -> None:
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(TREE)
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno + 1 > MOST_FUNCTION_LINES
    }
    assert long == {}


def ray_names() -> list[tuple[str, str]]:
    """What the program imports of Ray, and from where."""
    return [
        (node.module or "", alias.name)
        for node in ast.walk(TREE)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray"
        for alias in node.names
    ]


@pytest.mark.parametrize(("module", "name"), sorted(set(ray_names())), ids="-".join)
def test_what_the_program_uses_of_ray_is_still_there(module: str, name: str) -> None:
    """A failure says which name has moved; the Ray section has the one place that uses it."""
    found = importlib.import_module(module)
    assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), (
        f"{module} has no {name} any more: see section {RAY_SECTION} of app_v5.py"
    )


def test_what_is_asked_of_serves_controller_is_still_there() -> None:
    from ray.serve._private.controller import ServeController

    asked = set(re.findall(r'ask_controller\(\s*"(\w+)"', SOURCE))
    assert asked >= {"get_serve_instance_details", "deploy_applications", "get_deployment_info"}
    assert [name for name in asked if not hasattr(ServeController, name)] == []


def test_private_parts_of_rays_objects_are_used_in_the_ray_section_alone() -> None:
    private = {
        (node.attr, section(node))
        for node in ast.walk(TREE)
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and ast.unparse(node.value) not in ("self", "os", "sys")
    }
    assert {where for _, where in private} <= {RAY_SECTION}, private
