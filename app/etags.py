"""Row versions as entity tags (RFC 9110, section 8.8.3) and back. Pure."""

import re

# An entity tag: an optional W/, and a quoted opaque part.
_TAG = r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"'
# What If-Match and If-None-Match may be: a list, whose elements may be empty, or anything at all.
LIST = rf"^([ \t,]*{_TAG}[ \t]*(,[ \t,]*{_TAG}[ \t]*)*[ \t,]*|[ \t]*\*[ \t]*)$"
_VERSION = re.compile(r"[1-9][0-9]{0,9}")


def of_version(version: int) -> str:
    """The strong entity tag of this version of a hero."""
    return f'"{version}"'


def matches(header: str, version: int) -> bool:
    """Whether `If-None-Match`, a `LIST`, names this version: weakly compared, `*` names each."""
    if header.strip() == "*":
        return True
    return any(opaque == str(version) for _, opaque in re.findall(_TAG, header))


def versions(header: str) -> frozenset[int] | None:
    """The versions that `If-Match`, a `LIST`, allows: strongly compared, None for `*`, any."""
    if header.strip() == "*":
        return None
    return frozenset(
        int(opaque)
        for weak, opaque in re.findall(_TAG, header)
        if not weak and _VERSION.fullmatch(opaque)
    )
