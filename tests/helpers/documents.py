"""The code blocks of the README, of CONTRIBUTING.md and of docs/."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
NOT_CHECKED = "<!-- not checked:"

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One code block: its place, as `PAGE:LINE`, its language and its text."""

    place: str
    language: str
    code: str


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of these languages in all pages, without those marked as not checked."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            before = text[: match.start()]
            if match["language"] in languages and not _is_marked(before):
                place = f"{page.relative_to(ROOT)}:{before.count(chr(10)) + 1}"
                indent = match["indent"]
                code = re.sub(f"^{indent}", "", match["code"], flags=re.MULTILINE)
                found.append(Block(place, match["language"], code))
    return found


def _is_marked(before: str) -> bool:
    lines = before.rstrip().splitlines()
    return bool(lines) and lines[-1].strip().startswith(NOT_CHECKED)


def shell_commands(code: str) -> Iterator[list[str]]:
    """Give the words of each simple command in a block of shell code, substitutions included."""
    for inner in re.findall(r"\$\(([^)]*)\)", code):
        yield from shell_commands(inner)
    joined = re.sub(r"\\\n", " ", re.sub(r'"?\$\([^)]*\)"?', "SUBSTITUTED", code))
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, w in enumerate(words) if w in ("&&", "||", "|", ";")), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.match(r"^[A-Z_]+=", command[0]):
                command = command[1:]
            if command:
                yield command
