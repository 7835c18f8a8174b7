"""What must happen in one step inside Redis. Each file says what it takes, what it replies and what it guarantees."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files
from typing import Final


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, and the digest by which a server calls it."""

    source: str
    digest: str


def _script(name: str) -> Script:
    source = files(__name__).joinpath(f"{name}.lua").read_text()
    return Script(source, sha1(source.encode(), usedforsecurity=False).hexdigest())


APPEND: Final = _script("append")
CANCEL: Final = _script("cancel")
DUE: Final = _script("due")
ENLIST: Final = _script("enlist")
FORGET: Final = _script("forget")
NOW: Final = _script("now")
PAGE: Final = _script("page")
POST: Final = _script("post")
REAP: Final = _script("reap")
RENEW: Final = _script("renew")
RESTORE: Final = _script("restore")
START: Final = _script("start")

BY_DIGEST: Final = {script.digest: script for script in list(globals().values()) if isinstance(script, Script)}
"""All of them: a server that has forgotten one is given it again."""
