"""Plays as text: a line with a name and a colon, what the person says, an empty line.

Each speech becomes a row with its `speaker`, who is a natural client. Names are told apart without regard to capitals
(a nurse is NURSE in one scene and Nurse in the next).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["speeches"]

_NAME = re.compile(r"[^\W\d_][\w' .,&-]{0,60}:\Z")


def speeches(lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    """Rows with `speaker` and `text` from the lines of a play, in their order.

    What follows an empty line without a name goes on with the speech before it. A name without a speech has an empty
    text; text before the first name has no speaker.
    """
    speaker: str | None = None
    said: list[str] = []
    begun = False
    blank = True
    for line in lines:
        text = line.rstrip("\r\n")
        if blank and _NAME.fullmatch(text.strip()):
            if begun or any(part.strip() for part in said):
                yield _row(speaker, said)
            speaker, said, begun = text.strip()[:-1].upper(), [], True
        else:
            said.append(text)
        blank = not text.strip()
    if begun or any(part.strip() for part in said):
        yield _row(speaker, said)


def _row(speaker: str | None, said: list[str]) -> Mapping[str, Any]:
    return {"speaker": speaker, "text": "\n".join(said).strip()}
