"""The README in both languages: what it says of the program is what the program has.

Blocks that begin with ```bash runnable are run; they are commands that need no cluster.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import app_v5 as app
from cluster import APP_V5, ROOT
from test_causes import WHAT_THE_SOURCES_SAY, WHAT_WAS_RECORDED

README, VIETNAMESE = ROOT / "README.md", ROOT / "docs" / "README.vi.md"
REFERENCE = ROOT / "docs" / "REFERENCE.md"

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
OPTIONS_OF_OTHERS = {"--head", "--keep", "--resources", "--working-dir"}
OPTIONS_THAT_WENT = {"--on-failure", "--stagger", "--wait", "--wake"}
RECORDED_CAUSES = [
    (str(text), str(hint))
    for _, text, hint in (row.values for row in (*WHAT_WAS_RECORDED, *WHAT_THE_SOURCES_SAY))
]
HINTS = re.findall(r"^(\S.*)\n {4}(.*)", app.HINTS, re.MULTILINE)

Table = list[list[str]]


@dataclass
class Page:
    """A page's text without code blocks, its headings, its tables as cells, its code blocks as
    what stands behind the fence and the code."""

    file: Path
    prose: str
    headings: list[tuple[int, str]]
    tables: list[Table]
    blocks: list[tuple[str, str]]

    @property
    def anchors(self) -> set[str]:
        """What a link to a heading of this page ends in."""
        kept = (re.sub(r"[^\w\- ]", "", title.lower()) for _, title in self.headings)
        return {title.replace(" ", "-") for title in kept}

    @property
    def links(self) -> list[tuple[str, str]]:
        """Text and target of every link into the repository."""
        found = re.findall(r"\[([^]]+)\]\(([^)]+)\)", self.prose)
        return [(text, target) for text, target in found if "://" not in target]

    def table(self, exit_codes: bool) -> Table:
        """The table of exit codes, or that of causes and hints."""
        first = "0" if exit_codes else "`To serve at least"
        return next(rows for rows in self.tables if rows[1][0].startswith(first))


def cells(line: str) -> list[str]:
    """A table's row; a bar in a code span is written with a backslash."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def read(file: Path) -> Page:
    text = file.read_text(encoding="utf-8")
    fenced = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    prose = fenced.sub("", text)
    headings = [(len(m[1]), m[2]) for m in re.finditer(r"^(#+) (.+)$", prose, re.MULTILINE)]
    found = re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE)
    tables = [[cells(line) for line in part.splitlines()] for part in found]
    for rows in tables:
        assert {len(row) for row in rows} == {len(rows[0])}, rows
        del rows[1]  # the rule below the head
    return Page(file, prose, headings, tables, fenced.findall(text))


PAGES = [pytest.param(page, id=page.name) for page in (README, VIETNAMESE, REFERENCE)]
BOTH = PAGES[:2]


def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        app.parse_options(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("file", PAGES)
def test_every_option_is_there_and_no_other(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, listed = help_text(capsys).partition("\noptions:\n")
    options = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", listed, re.MULTILINE))
    named = set(OPTION.findall(file.read_text(encoding="utf-8")))
    assert len(options) > 10
    assert options - named <= {"--help"}
    assert named - options <= OPTIONS_OF_OTHERS | OPTIONS_THAT_WENT


@pytest.mark.parametrize("file", BOTH)
def test_every_exit_code_is_there_and_no_other(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = {value for name, value in vars(app).items() if name.startswith("EXIT_")}
    codes |= {128 + number for number in app.SIGNALS}
    written = [int(code) for row in read(file).table(True)[1:] for code in row[0].split(", ")]
    assert written == sorted(codes)
    said = re.search(r"^Exit codes: .*?\n\n", help_text(capsys), re.MULTILINE | re.DOTALL)
    assert said
    assert sorted(map(int, re.findall(r"\d+", said[0]))) == sorted(codes)


def spans(cell: str) -> list[str]:
    """The code spans of a table's cell."""
    return [double or single for double, single in re.findall(r"`` (.+?) ``|`([^`]+)`", cell)]


def is_printed(message: str, hint: str) -> bool:
    """Whether the program has this hint for this message, … standing for what was left out: for a
    recorded cause, or for the message as it is."""
    like = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")))
    recorded = any(like.search(text) and hint == known for text, known in RECORDED_CAUSES)
    return recorded or app.hint_for(message) == hint


def test_troubleshooting_has_every_hint_in_the_programs_words() -> None:
    _, *rows = read(README).table(False)
    assert len(rows) == len(HINTS)
    for (_, template), (messages, hint) in zip(HINTS, rows, strict=True):
        like = re.sub(r"\\{\w+\\}", ".+", re.escape(template))
        assert re.fullmatch(like, hint), f"the program says: {template}"
        for message in spans(messages):
            assert is_printed(message, hint), message


def test_the_vietnamese_hints_are_about_the_same_messages_and_keys() -> None:
    """Hints are translated; messages, keys, options and numbers stay."""
    pairs = zip(read(README).table(False), read(VIETNAMESE).table(False), strict=True)
    names = re.compile(r"[\w-]+(?:_\w+|\.\w+)+|--[\w-]+|\d+")
    for (message, hint), (same, translated) in list(pairs)[1:]:
        assert same == message
        assert set(names.findall(hint)) <= set(names.findall(translated)), translated


@pytest.mark.parametrize("file", BOTH)
def test_the_programs_own_messages_are_in_it(file: Path) -> None:
    source = APP_V5.read_text(encoding="utf-8")
    [rows] = [rows for rows in read(file).tables if rows[1][0] == "`can never fit`"]
    for message, _ in rows[1:]:
        assert spans(message)
        assert all(span in source for span in spans(message)), message


@pytest.mark.parametrize("file", PAGES)
def test_links_lead_somewhere(file: Path) -> None:
    """A link to a test file has the name of the test that is meant as its text."""
    links = read(file).links
    assert links
    for text, target in links:
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.is_relative_to(ROOT)
        assert linked.exists(), target
        assert not anchor or anchor in read(linked).anchors, target
        if linked.name.startswith("test_") and linked.suffix == ".py":
            assert f"def test_{text.replace(' ', '_')}(" in linked.read_text(), text


def test_both_languages_have_the_same_sections_tables_blocks_and_links() -> None:
    english, vietnamese = read(README), read(VIETNAMESE)
    assert [level for level, _ in vietnamese.headings] == [level for level, _ in english.headings]
    assert [(len(rows), len(rows[0])) for rows in vietnamese.tables] == [
        (len(rows), len(rows[0])) for rows in english.tables
    ]
    assert vietnamese.blocks == english.blocks
    places = [
        [
            (page.file.parent / target).as_posix()
            for _, target in page.links
            if "README" not in target
        ]
        for page in (english, vietnamese)
    ]
    assert [os.path.normpath(p) for p in places[1]] == [os.path.normpath(p) for p in places[0]]


CONFIGS = [text for info, text in read(README).blocks if info == "yaml"]


@pytest.mark.parametrize("text", CONFIGS)
def test_the_configs_are_right(text: str, tmp_path: Path) -> None:
    config = yaml.safe_load(text)
    if "applications" not in config:
        llm = {"model_loading_config": {"model_id": "m"}, **config}
        args = {"llm_configs": [llm]}
        config = {"applications": [{"import_path": "ray.serve.llm:build_openai_app", "args": args}]}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    document = app.Document(str(file), {})
    check_values = app.RayCluster(app.Options("")).check_values
    applications, problems = app.check_config(document, check_values)
    assert problems == []
    assert applications[0].models[0].promised["GPU"] == 0.45


RUNNABLE = [text for info, text in read(README).blocks if info == "bash runnable"]


@pytest.mark.serve
@pytest.mark.parametrize("commands", RUNNABLE)
def test_runnable_blocks_run(commands: str, tmp_path: Path) -> None:
    for file in (APP_V5, *ROOT.glob("*.yaml")):
        shutil.copy(file, tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    finished = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
