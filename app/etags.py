"""Row versions as entity tags (RFC 9110, section 8.8.3) and back. Pure."""

import re

# What a list of entity tags consists of: an optional W/, and a quoted opaque part.
_TAG = re.compile(r'\s*(W/)?"([\x21\x23-\x7e\x80-\xff]*)"\s*')
_VERSION = re.compile(r"[1-9][0-9]{0,9}")


def of_version(version: int) -> str:
    """The strong entity tag of this version of a hero."""
    return f'"{version}"'


def _opaque_tags(header: str) -> list[tuple[bool, str]]:
    tags = []
    for member in _members(header):
        if not (tag := _TAG.fullmatch(member)):
            raise ValueError("Not a list of entity tags")
        tags.append((tag[1] is not None, tag[2]))
    if not tags:
        raise ValueError("Not a list of entity tags")
    return tags


def _members(header: str) -> list[str]:
    # A comma may stand within the quotes.
    return [member for member in re.findall(r'(?:[^",]|"[^"]*")+', header) if member.strip()]


def matches(header: str, version: int) -> bool:
    """Whether `If-None-Match` names this version: by weak comparison, `*` names every one.

    Raises `ValueError` where the header is malformed.
    """
    if header.strip() == "*":
        return True
    return any(opaque == str(version) for _, opaque in _opaque_tags(header))


def versions(header: str) -> frozenset[int] | None:
    """The versions that `If-Match` allows: by strong comparison, None for `*`, which allows any.

    Raises `ValueError` where the header is malformed.
    """
    if header.strip() == "*":
        return None
    return frozenset(
        int(opaque)
        for weak, opaque in _opaque_tags(header)
        if not weak and _VERSION.fullmatch(opaque)
    )
