"""Tables in Markdown, and the sections of README files that hold them."""

from collections.abc import Sequence
from pathlib import Path

_END = "<!-- to here -->"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def replace_section(readme: Path, begin: str, text: str) -> None:
    """Replace the text between the marker and the next end marker."""
    before, found, rest = readme.read_text().partition(begin)
    _, end, after = rest.partition(_END)
    if not found or not end:
        raise ValueError(f"{readme} has no section from {begin} to {_END}")
    readme.write_text(f"{before}{begin}\n{text}{end}{after}")
