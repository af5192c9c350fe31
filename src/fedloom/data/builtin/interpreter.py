"""A safe interpreter for the four small languages of `builtin:code`.

A program is one function of whole numbers. The languages differ in their surface only:

    alder   f(x) = (x + 3) * 2              infix, with ^ for powers and max(a, b), min(a, b)
    birch   (fn x (mul (add x 3) 2))        prefix
    cedar   x : x 3 + 2 * ;                 postfix
    maple   x | plus 3 | times 2            a pipeline that starts with the first parameter

Every program is translated to the same list of stack instructions, which a single loop executes. The text may come from
a language model, so nothing is ever handed to Python's own evaluator, every loop has a bound, nesting is limited long
before Python's recursion limit, and whatever is wrong raises `ProgramError` and nothing else.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

MAX_CHARS = 2_000
MAX_TOKENS = 400
MAX_DEPTH = 40
MAX_STEPS = 1_000
MAX_PARAMETERS = 8
MAX_DIGITS = 9
MAX_MAGNITUDE = 10**12
MAX_EXPONENT = 8


class ProgramError(ValueError):
    """The program cannot be read, or it cannot be executed within its limits."""


class Instruction(NamedTuple):
    """`push` a number, `load` a parameter, or apply an operation to the top of the stack."""

    op: str
    value: int = 0


class Program(NamedTuple):
    """A translated program."""

    num_parameters: int
    code: tuple[Instruction, ...]


def _power(base: int, exponent: int) -> int:
    if not 0 <= exponent <= MAX_EXPONENT:
        raise ProgramError(f"exponent {exponent} is not between 0 and {MAX_EXPONENT}")
    return int(base**exponent)


_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "pow": _power,
    "max": max,
    "min": min,
}
_UNARY: dict[str, Callable[[int], int]] = {"neg": operator.neg, "sq": lambda value: value * value}
_OPERATIONS = frozenset(_BINARY) | frozenset(_UNARY)

_TOKEN = re.compile(r"\s*(?:(?P<number>[0-9]+)|(?P<name>[a-z]+)|(?P<symbol>[-+*^(),=|:;]))")


def _tokens(text: str) -> list[str]:
    """Numbers, lower-case names and single symbols; white space only separates."""
    if len(text) > MAX_CHARS:
        raise ProgramError(f"program of {len(text)} characters, at most {MAX_CHARS} are read")
    text = text.strip()
    tokens: list[str] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ProgramError(f"unreadable character {text[place:].lstrip()[:1]!r}")
        token = match.group().strip()
        if match.lastgroup == "number" and len(token) > MAX_DIGITS:
            raise ProgramError(f"number of {len(token)} digits, at most {MAX_DIGITS} are read")
        tokens.append(token)
        if len(tokens) > MAX_TOKENS:
            raise ProgramError(f"program of more than {MAX_TOKENS} tokens")
        place = match.end()
    return tokens


def _is_name(token: str) -> bool:
    return bool(token) and token.isascii() and token.isalpha()


def _is_number(token: str) -> bool:
    return token.isascii() and token.isdigit()


class _Reader:
    """A cursor over the tokens that also collects the parameters and the instructions."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens
        self.place = 0
        self.parameters: list[str] = []
        self.code: list[Instruction] = []

    def peek(self) -> str:
        """The next token, or "" at the end."""
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise ProgramError("the program ends too early")
        self.place += 1
        return token

    def expect(self, wanted: str) -> None:
        if self.peek() != wanted:
            self.fail(f"{wanted!r}")
        self.place += 1

    def fail(self, wanted: str) -> NoReturn:
        found = repr(self.peek()) if self.peek() else "the end"
        raise ProgramError(f"expected {wanted}, found {found}")

    def parameter(self) -> None:
        """Read the name of one more parameter."""
        if not _is_name(self.peek()):
            self.fail("the name of a parameter")
        name = self.take()
        if name in self.parameters:
            raise ProgramError(f"two parameters are called {name!r}")
        if len(self.parameters) == MAX_PARAMETERS:
            raise ProgramError(f"more than {MAX_PARAMETERS} parameters")
        self.parameters.append(name)

    def operand(self) -> None:
        """Read a number or the name of a parameter."""
        token = self.peek()
        if _is_number(token):
            self.code.append(Instruction("push", int(token)))
        elif token in self.parameters:
            self.code.append(Instruction("load", self.parameters.index(token)))
        else:
            self.fail("a number or a parameter")
        self.place += 1

    def program(self) -> Program:
        """The finished program; nothing may be left over."""
        if self.peek():
            self.fail("the end of the program")
        return Program(len(self.parameters), tuple(self.code))


def _deeper(depth: int) -> int:
    if depth >= MAX_DEPTH:
        raise ProgramError(f"nested deeper than {MAX_DEPTH}")
    return depth + 1


# alder: sum = product {("+" | "-") product}; product = signed {"*" signed}; signed = "-" signed | power;
#        power = atom ["^" number]; atom = "(" sum ")" | ("max" | "min") "(" sum "," sum ")" | operand


def _alder(reader: _Reader) -> None:
    reader.expect("f")
    reader.expect("(")
    reader.parameter()
    while reader.peek() == ",":
        reader.take()
        reader.parameter()
    reader.expect(")")
    reader.expect("=")
    _alder_sum(reader, 0)


def _alder_sum(reader: _Reader, depth: int) -> None:
    _alder_product(reader, depth)
    while reader.peek() in ("+", "-"):
        op = "add" if reader.take() == "+" else "sub"
        _alder_product(reader, depth)
        reader.code.append(Instruction(op))


def _alder_product(reader: _Reader, depth: int) -> None:
    _alder_signed(reader, depth)
    while reader.peek() == "*":
        reader.take()
        _alder_signed(reader, depth)
        reader.code.append(Instruction("mul"))


def _alder_signed(reader: _Reader, depth: int) -> None:
    signs = 0
    while reader.peek() == "-":
        reader.take()
        signs += 1
    _alder_power(reader, depth)
    reader.code.extend([Instruction("neg")] * signs)


def _alder_power(reader: _Reader, depth: int) -> None:
    _alder_atom(reader, _deeper(depth))
    if reader.peek() == "^":
        reader.take()
        if not _is_number(reader.peek()):
            reader.fail("a whole exponent")
        reader.operand()
        reader.code.append(Instruction("pow"))


def _alder_atom(reader: _Reader, depth: int) -> None:
    token = reader.peek()
    if token == "(":
        reader.take()
        _alder_sum(reader, depth)
        reader.expect(")")
    elif token in ("max", "min"):
        reader.take()
        reader.expect("(")
        _alder_sum(reader, depth)
        reader.expect(",")
        _alder_sum(reader, depth)
        reader.expect(")")
        reader.code.append(Instruction(token))
    else:
        reader.operand()


# birch: "(" "fn" (name | "(" name {name} ")") body ")"; body = operand | "(" operation body [body] ")"


def _birch(reader: _Reader) -> None:
    reader.expect("(")
    reader.expect("fn")
    if reader.peek() == "(":
        reader.take()
        reader.parameter()
        while reader.peek() != ")":
            reader.parameter()
        reader.take()
    else:
        reader.parameter()
    _birch_body(reader, 0)
    reader.expect(")")


def _birch_body(reader: _Reader, depth: int) -> None:
    if reader.peek() != "(":
        reader.operand()
        return
    depth = _deeper(depth)
    reader.take()
    if reader.peek() not in _OPERATIONS - {"pow"}:
        reader.fail("an operation")
    op = reader.take()
    _birch_body(reader, depth)
    if op in _BINARY:
        _birch_body(reader, depth)
    reader.code.append(Instruction(op))
    reader.expect(")")


# cedar: name {name} ":" {operand | operation} ";"

_CEDAR_SYMBOLS = {"+": "add", "-": "sub", "*": "mul", "sq": "sq", "neg": "neg", "max": "max", "min": "min"}


def _cedar(reader: _Reader) -> None:
    reader.parameter()
    while reader.peek() != ":":
        reader.parameter()
    reader.take()
    while reader.peek() != ";":
        if reader.peek() in _CEDAR_SYMBOLS and reader.peek() not in reader.parameters:
            reader.code.append(Instruction(_CEDAR_SYMBOLS[reader.take()]))
        else:
            reader.operand()
    reader.take()


# maple: name {name} {"|" (verb operand | verb)}

_MAPLE_BINARY = {"plus": "add", "minus": "sub", "times": "mul", "floor": "max", "cap": "min"}
_MAPLE_UNARY = {"square": "sq", "flip": "neg"}


def _maple(reader: _Reader) -> None:
    reader.parameter()
    while reader.peek() and reader.peek() != "|":
        reader.parameter()
    reader.code.append(Instruction("load", 0))
    while reader.peek():
        reader.expect("|")
        verb = reader.peek()
        if verb in _MAPLE_BINARY:
            reader.take()
            reader.operand()
            reader.code.append(Instruction(_MAPLE_BINARY[verb]))
        elif verb in _MAPLE_UNARY:
            reader.take()
            reader.code.append(Instruction(_MAPLE_UNARY[verb]))
        else:
            reader.fail("a verb")


_PARSERS: dict[str, Callable[[_Reader], None]] = {"alder": _alder, "birch": _birch, "cedar": _cedar, "maple": _maple}
LANGUAGES = tuple(_PARSERS)


def translate(language: str, text: str) -> Program:
    """Read `text` as a program of `language`; raises `ProgramError` if it is none."""
    if language not in _PARSERS:
        raise ProgramError(f"no language {language!r}, there are {', '.join(LANGUAGES)}")
    reader = _Reader(_tokens(text))
    _PARSERS[language](reader)
    return reader.program()


def execute(program: Program, arguments: Sequence[int]) -> int:
    """The value of `program` for `arguments`; raises `ProgramError` when a limit is passed."""
    if len(arguments) != program.num_parameters:
        raise ProgramError(f"{program.num_parameters} parameters, but {len(arguments)} arguments")
    if len(program.code) > MAX_STEPS:
        raise ProgramError(f"more than {MAX_STEPS} steps")
    stack: list[int] = []
    for op, value in program.code:
        if op == "push":
            stack.append(value)
        elif op == "load":
            stack.append(arguments[value])
        elif op in _BINARY:
            if len(stack) < 2:
                raise ProgramError(f"{op} needs two values")
            right = stack.pop()
            stack.append(_BINARY[op](stack.pop(), right))
        else:
            if not stack:
                raise ProgramError(f"{op} needs a value")
            stack.append(_UNARY[op](stack.pop()))
        if abs(stack[-1]) > MAX_MAGNITUDE:
            raise ProgramError(f"a value beyond {MAX_MAGNITUDE}")
    if len(stack) != 1:
        raise ProgramError(f"{len(stack)} values are left, not one")
    return stack[0]


def run(language: str, text: str, arguments: Sequence[int]) -> int:
    """Translate and execute in one go."""
    return execute(translate(language, text), arguments)
