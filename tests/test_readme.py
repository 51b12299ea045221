"""Every Python block of the README and of the documentation runs by itself and prints what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).parents[1]
PAGES = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
BLOCKS = {
    f"{page}: {section.splitlines()[0]}": code
    for page, text in PAGES.items()
    for section in text.split("\n## ")
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
}


@pytest.mark.parametrize("title", BLOCKS)
def test_block_prints_what_it_says(title: str, tmp_path: Path):
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", BLOCKS[title], re.MULTILINE)

    done = fresh.run(BLOCKS[title], cwd=tmp_path)

    assert done.stdout.splitlines() == expected, done.stderr


def test_quickstart_has_twenty_lines():
    assert len(BLOCKS["README.md: Quickstart"].splitlines()) <= 20


def test_handler_has_thirty_lines():
    assert len(BLOCKS["README.md: Your own handler"].splitlines()) <= 30


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page])

    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("target", re.findall(r"^make (\S+)", PAGES["README.md"], re.MULTILINE))
def test_commands_are_targets(target: str):
    assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
