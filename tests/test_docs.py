"""The pages for people who come from Orbax: their snippets run on both libraries, and every row of the table is pinned."""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # Orbax warns of much

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "from-orbax.md").read_text(encoding="utf-8")
TABLE = (ROOT / "docs" / "orbax-compatibility.md").read_text(encoding="utf-8")

_PREAMBLE, *_sections = GUIDE.split("\n## ")
_FENCE = re.compile(r"```py\n(.*?)```", re.DOTALL)
PAIRS = {section.splitlines()[0]: _FENCE.findall(section) for section in _sections}

ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith("| Orbax")
]
_NAMED = re.compile(r"`tests/([\w/]+\.py)::(\w+)`")


@pytest.fixture(scope="module")
def collected() -> Iterator[None]:
    """What Orbax leaves unawaited is collected after the last test here, where its warnings are ignored, not in another file."""
    yield
    gc.collect()


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("title", PAIRS)
def test_before_and_after_print_the_same(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = PAIRS[title]
    assert ("orbax" in before, "orbax" in after) == (True, False)
    assert _printed(before, tmp_path / "before", monkeypatch) == _printed(after, tmp_path / "after", monkeypatch) != ""


def _printed(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    directory.mkdir()
    monkeypatch.chdir(directory)
    names: dict[str, Any] = {"__name__": "snippet"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n".join([*_FENCE.findall(_PREAMBLE), code]), directory.name, "exec", dont_inherit=True), names)  # noqa: S102 - our own pages
    return printed.getvalue()


def test_every_section_of_the_guide_has_a_before_and_an_after() -> None:
    assert {title: len(pair) for title, pair in PAIRS.items()} == dict.fromkeys(PAIRS, 2)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_every_row_of_the_table_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 4, "what it is | Orbax | ckptkit | tests"
    named = _NAMED.findall(row[3])
    assert named or row[2].startswith("Not there"), "no test pins it, and it does not say that it is not there"
    assert [f"{file}::{test}" for file, test in named if test not in _tests(file)] == []


def _tests(file: str) -> set[str]:
    parsed = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in parsed.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_the_table_has_rows() -> None:
    assert len(ROWS) > 100
