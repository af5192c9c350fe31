"""Values as YAML on one line, the same for readers of YAML 1.1 and 1.2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

__all__ = ["yaml_value"]

_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*(?::[\w./-]+)*")
_NOT_TEXT = re.compile(r"(?i:y|n|yes|no|on|off|true|false|null|none|\.inf|\.nan|[-+.]?\d.*)")


def yaml_value(value: object) -> str:
    """A value as YAML on one line, so that YAML 1.1 and 1.2 readers agree on what it is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e6:
            return repr(value)
        mantissa, exponent = f"{value!r}e0".split("e")[:2] if "e" in repr(value) else _scientific(value)
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+03d}"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and not _NOT_TEXT.fullmatch(value) else _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{yaml_value(key)}: {yaml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(yaml_value(item) for item in value) + "]"
    raise TypeError(f"no YAML for {type(value).__name__}")


def _quoted(text: str) -> str:
    """Text in double quotes. Not JSON's escapes: JSON writes what lies beyond 16 bits as pairs, which YAML does not."""

    def escaped(char: str) -> str:
        if char in '"\\':
            return f"\\{char}"
        return char if char.isprintable() else f"\\U{ord(char):08x}"

    return f'"{"".join(map(escaped, text))}"'


def _scientific(value: float) -> tuple[str, str]:
    exponent = math.floor(math.log10(abs(value)))
    for digits in range(17):  # the shortest that reads back as the same number
        text = f"{value:.{digits}e}"
        if float(text) == value:
            mantissa, power = text.split("e")
            return mantissa, power
    return repr(value / 10**exponent), str(exponent)
