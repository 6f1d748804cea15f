"""The rules that keep the one file readable: what may stand in which section."""

from __future__ import annotations

import ast
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
RAY_SECTION, DEPLOY_SECTION, REPORT_SECTION = 7, 10, 11


def section(node: ast.AST) -> int:
    """The number of the section that a node stands in; 1 is the head of the file."""
    line = getattr(node, "lineno", 0)
    return max((number for start, number, _ in SECTIONS if start <= line), default=1)


def walk(kind: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(TREE) if isinstance(node, kind))


def test_the_sections_are_there_in_their_order() -> None:
    assert [number for _, number, _ in SECTIONS] == list(range(2, 13))
    names = [name for _, _, name in SECTIONS]
    assert names == [
        *("Types", "Config", "Resources", "Plan", "Changes", "Ray", "Causes", "Verify"),
        *("Deploy", "Report"),
        "Command line",
    ]


def test_ray_is_imported_only_in_its_section_and_only_when_needed() -> None:
    for node in [*walk(ast.Import), *walk(ast.ImportFrom)]:
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
        pytest.param("Thread", {DEPLOY_SECTION}, id="threads"),
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
        and node.end_lineno - node.lineno + 1 > 75
    }
    assert long == {}


def test_private_ray_api_is_in_the_ray_section_alone() -> None:
    for number, line in enumerate(SOURCE.splitlines(), 1):
        if re.search(r"\bray\.\S*\._|ray\._|_bound_deployment", line) and "from " in line:
            here = max((n for start, n, _ in SECTIONS if start <= number), default=1)
            assert here == RAY_SECTION, (number, line)
