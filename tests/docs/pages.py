"""What the pages of the documentation hold: code, commands, links, sentences."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"(\w+)=(.*)")


@dataclass(frozen=True)
class Command:
    """One command line, without what stands around it in the shell."""

    page: str
    environment: dict[str, str]
    words: list[str]
    planned: bool
    """Beside it stands "not run yet"."""

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def code(language: str, page: Path) -> list[str]:
    """The blocks of a language."""
    return [text for name, text in _FENCE.findall(page.read_text("utf-8")) if name == language]


def commands(page: Path) -> list[Command]:
    """The command lines of the console blocks, in order."""
    found = []
    for block in code("console", page):
        for part in (part for line in block.splitlines() for part in line.split(" && ")):
            words = shlex.split(part, comments=True)
            environment = {}
            while words and (match := _ASSIGNMENT.fullmatch(words[0])):
                environment[match[1]] = match[2]
                words.pop(0)
            if words:
                found.append(Command(page.name, environment, words, "# not run yet" in block))
    return found


def prose(page: Path) -> str:
    """The text between blocks of code."""
    return _FENCE.sub("", page.read_text("utf-8"))


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def links(page: Path) -> list[str]:
    """Targets of links that are files of the repository."""
    targets = (target.partition("#")[0] for target in _LINK.findall(prose(page)))
    return [target for target in targets if target and "://" not in target]
