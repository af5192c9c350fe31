"""The rows of a .json file one by one, however large the file: the standard library's parser over a moving window.

What is read, and what is an error at which line and column, is as if the file were parsed whole: numbers, NaN and
repeated keys mean the same. (Parsers made for streams differ there: decimals, no NaN, messages without a line.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

__all__ = ["Text", "list_items", "object_lists", "wrong"]

WINDOW = 1 << 20  # bytes read at a time
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
Decode = Callable[[bytes, int, int], str]  # bytes, where in the file they begin, and on which line


class Text:
    """A window on a UTF-8 file: `text` from `at` on is what was not taken yet."""

    def __init__(self, stream: IO[bytes], decode: Decode) -> None:
        self._stream = stream
        self._decode = decode
        self._rest = b""  # the beginning of a character whose end was not read yet
        self._offset = 0  # of what is decoded next, in the file
        self._byte_line = 1
        self.text = ""
        self.at = 0
        self.ended = False
        self._line = 1  # of text[0], and the column before it
        self._column = 0

    def more(self, size: int = WINDOW) -> None:
        """Read on. What was taken already is let go."""
        self._forget()
        new = self._stream.read(size)
        self.ended = not new
        raw = self._rest + new
        whole = len(raw) if self.ended else _whole_characters(raw)
        self.text += self._decode(raw[:whole], self._offset, self._byte_line)
        self._byte_line += raw.count(b"\n", 0, whole)
        self._offset += whole
        self._rest = raw[whole:]

    def _forget(self) -> None:
        gone = self.text[: self.at]
        lines = gone.count("\n")
        self._line += lines
        self._column = len(gone) - gone.rfind("\n") - 1 if lines else self._column + len(gone)
        self.text = self.text[self.at :]
        self.at = 0

    def place(self, at: int) -> tuple[int, int]:
        """Line and column of `text[at]`, from 1."""
        lines = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) if lines else self._column + at + 1
        return self._line + lines, column

    def skip(self) -> str:
        """The next character that is no space, "" at the end; it is not taken."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found is not None else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more()

    def value(self) -> Any:
        """Take a whole JSON value.

        Raises:
            json.JSONDecodeError: there is none; its `pos` is a place in `text`.
            RecursionError: nested too deeply.
        """
        self.skip()
        while True:
            try:
                found, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended or not _is_cut(error, self.text):
                    raise
            else:
                # A number that ends where the window does may go on behind it: "1", "1.", "1e", "1e+".
                if end + 2 < len(self.text) or self.ended:
                    self.at = end
                    return found
            # Twice as much each time, so that a long value is not parsed again and again.
            self.more(max(WINDOW, len(self.text) - self.at))


def _whole_characters(raw: bytes) -> int:
    """How many bytes make up whole characters of UTF-8, when more may follow."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(raw) - back if needed > back else len(raw)
    return len(raw)


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the error may be only that the window ends here."""
    if error.msg.startswith("Unterminated string"):
        return True  # its place is the beginning of the string
    return error.pos >= len(text) - 16  # "\\ud83d\\ude0", "-Infinit" and the like


def list_items(text: Text) -> Iterator[Any]:
    """Take a list, which `text` is in front of, item by item.

    Raises:
        json.JSONDecodeError, RecursionError: as `Text.value`.
    """
    text.at += 1
    if text.skip() == "]":
        text.at += 1
        return
    while True:
        yield text.value()
        mark = text.skip()
        if mark not in (",", "]") or not mark:
            raise wrong("Expecting ',' delimiter", text)
        text.at += 1
        if mark == "]":
            return


def object_lists(text: Text) -> Iterator[tuple[str, Iterator[Any]]]:
    """Take an object, and give each list that it holds: its name and its items, to be taken before the next. Other
    values are skipped.

    Raises:
        json.JSONDecodeError, RecursionError: as `Text.value`.
    """
    text.at += 1
    if text.skip() == "}":
        text.at += 1
        return
    while True:
        if text.skip() != '"':
            raise wrong("Expecting property name enclosed in double quotes", text)
        name = text.value()
        if text.skip() != ":":
            raise wrong("Expecting ':' delimiter", text)
        text.at += 1
        if text.skip() == "[":
            take = list_items(text)
            yield name, take
            for _ in take:
                pass
        else:
            text.value()
        mark = text.skip()
        if mark not in (",", "}") or not mark:
            raise wrong("Expecting ',' delimiter", text)
        text.at += 1
        if mark == "}":
            return


def wrong(what: str, text: Text) -> json.JSONDecodeError:
    """An error at the place where `text` is."""
    return json.JSONDecodeError(what, text.text, text.at)
