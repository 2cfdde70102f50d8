"""The command blocks of README and docs: indented or fenced, each with the comment before it that says why it is not run.

    <!-- commands: needs a card -->

stands on the line before a block (a blank line between is allowed) and takes one of

    needs a card | needs data | needs the internet | needs a server | needs several machines | needs a quiet machine (a benchmark)
                                       and any of these joined by ' and '
    covered by tests/FILE.py::TEST     run in full there; several joined by commas
    none                               the block is a tree, a listing or a program's text

A block without a comment is run as it stands. A command and the words that explain it are two spaces apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backend.config import REPO_ROOT

NEEDS = ("a card", "data", "the internet", "a server", "several machines", "a quiet machine")
_COMMENT = re.compile(r"^<!-- commands: (.+?) -->$")
_INLINE = re.compile(r"`((?:\.venv/bin/)?(?:deephair|make|python|bash) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """file: below the checkout; line: of its first line, from 1; mark: the comment's words, empty where there is none; fence: the language of a
    fenced block, None for an indented one."""

    file: str
    line: int
    text: tuple[str, ...]
    mark: str
    fence: str | None = None

    @property
    def commands(self) -> list[str]:
        """The commands without the words behind them; a line that ends in a backslash goes on in the next."""
        joined = "\n".join(self.text).replace("\\\n", " ")
        return [command for line in joined.split("\n") if (command := command_of(line))]

    @property
    def name(self) -> str:
        """For messages and test ids."""
        return f"{self.file}:{self.line}"


def command_of(line: str) -> str:
    """A line without its explanation; empty for a comment."""
    command = re.split(r"\s{2,}", line.strip())[0]
    return "" if command.startswith("#") else command


def documents() -> list[Path]:
    """README, the Vietnamese one, CONTRIBUTING and every page of docs."""
    return sorted([*REPO_ROOT.glob("*.md"), *(REPO_ROOT / "docs").glob("*.md")])


def blocks(path: Path) -> Iterator[Block]:
    """Every indented or fenced block of a page."""
    file = path.relative_to(REPO_ROOT).as_posix()
    lines = path.read_text(encoding="utf-8").split("\n")
    number, mark, free = 0, "", True  # free: the line before was blank, so an indented line begins a block
    while number < len(lines):
        line = lines[number]
        if comment := _COMMENT.match(line):
            mark, free = comment[1], True
            number += 1
            continue
        start = number
        if line.startswith("```"):
            number += 1
            while number < len(lines) and not lines[number].startswith("```"):
                number += 1
            yield Block(file, start + 2, tuple(lines[start + 1 : number]), mark, line[3:].strip())
            number += 1
        elif free and line.startswith("    ") and line.strip():
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            text = "\n".join(one[4:] for one in lines[start:number]).rstrip()
            yield Block(file, start + 1, tuple(text.split("\n")), mark)
        else:
            free = not line.strip()
            mark = mark if free else ""
            number += 1
            continue
        mark, free = "", True


def inline_commands(path: Path) -> Iterator[tuple[int, str]]:
    """(line, command) of every command that stands in running text."""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.startswith("    "):
            yield from ((number, found) for found in _INLINE.findall(line))
