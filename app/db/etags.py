"""Row versions as entity tags (RFC 9110, section 8.8.3), and back."""

import re

from app.base import INT4_MAX

# An entity tag: an optional W/, and an opaque part in quotes.
_TAG = r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"'
# A valid If-Match or If-None-Match: a list, which may have empty elements, or `*`.
HEADER_PATTERN = rf"^([ \t,]*{_TAG}[ \t]*(,[ \t,]*{_TAG}[ \t]*)*[ \t,]*|[ \t]*\*[ \t]*)$"
_VERSION = re.compile(r"[1-9][0-9]{0,9}")


def from_version(version: int) -> str:
    """Return the strong entity tag of this version of a row."""
    return f'"{version}"'


def matches(header: str, version: int) -> bool:
    """Return whether a valid `If-None-Match` names this version, by weak comparison."""
    if header.strip() == "*":
        return True
    return any(opaque == str(version) for _, opaque in re.findall(_TAG, header))


def versions(header: str) -> frozenset[int] | None:
    """Return the versions that a valid `If-Match` allows, by strong comparison.

    None means any version.
    """
    if header.strip() == "*":
        return None
    return frozenset(
        int(opaque)
        for weak, opaque in re.findall(_TAG, header)
        # A larger number would be an error of the database, in which versions are int4.
        if not weak and _VERSION.fullmatch(opaque) and int(opaque) <= INT4_MAX
    )
