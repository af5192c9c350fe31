"""The programming language of a row that asks for code.

Tried in this order, and the first that says something decides: a column that names it, an input that is nothing but its
name, the fence around the answer, what the answer itself gives away (`#include <iostream>`), and what the question asks
for. Where two signs of one kind disagree, or the answer's and the question's do, the row stays undecided: a wrong
language is worse than none, as it puts a row at the wrong client.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedloom.data.rows import LeftOut

__all__ = ["NINE", "canonical", "code_search_net", "language_of", "with_language"]

# Those of rosetta_alpaca.json that have a client; it has X86-64 Assembly as well, which is left out.
NINE = ("C", "C#", "C++", "Go", "Java", "PHP", "Pascal", "Python", "Scala")

# Other spellings, in lower case. What is not among the nine is recognised so that it is not taken for one of them.
_NAMES: Mapping[str, str] = {
    "c": "C",
    "c#": "C#",
    "csharp": "C#",
    "c sharp": "C#",
    "cs": "C#",
    "c++": "C++",
    "cpp": "C++",
    "cxx": "C++",
    "go": "Go",
    "golang": "Go",
    "java": "Java",
    "php": "PHP",
    "pascal": "Pascal",
    "object pascal": "Pascal",
    "delphi": "Pascal",
    "python": "Python",
    "python3": "Python",
    "python 3": "Python",
    "py": "Python",
    "scala": "Scala",
    "javascript": "JavaScript",
    "js": "JavaScript",
    "node": "JavaScript",
    "node.js": "JavaScript",
    "nodejs": "JavaScript",
    "jsx": "JavaScript",
    "typescript": "TypeScript",
    "ts": "TypeScript",
    "sql": "SQL",
    "mysql": "SQL",
    "html": "HTML",
    "css": "CSS",
    "ruby": "Ruby",
    "rust": "Rust",
    "swift": "Swift",
    "kotlin": "Kotlin",
    "bash": "Shell",
    "shell": "Shell",
    "sh": "Shell",
    "powershell": "Shell",
    "r": "R",
    "perl": "Perl",
    "lua": "Lua",
    "haskell": "Haskell",
    "dart": "Dart",
    "matlab": "MATLAB",
    "visual basic": "Visual Basic",
    "vb.net": "Visual Basic",
    "assembly": "Assembly",
    "x86-64 assembly": "Assembly",
    "xml": "XML",
    "json": "JSON",
    "yaml": "YAML",
}

_FENCE = re.compile(r"```[ \t]*([A-Za-z][\w+#.-]*)[ \t]*\n")

# What an answer gives away: things that no other language here has. Simple on purpose: a file may have a million rows.
_SIGNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile("|".join(patterns), re.MULTILINE))
    for name, patterns in (
        ("C++", (r"#include\s*<(?:iostream|vector|string|map|algorithm|sstream|memory|set|queue|stack)>",
                 r"\bstd::\w", r"\busing namespace std\b", r"\bcout\s*<<", r"\bcin\s*>>")),
        ("C", (r"#include\s*<(?:stdio|stdlib|string)\.h>",)),
        ("C#", (r"^\s*using System\b", r"\bConsole\.(?:Write|Read)", r"\bstatic void Main\(")),
        ("Java", (r"\bpublic static void main\b", r"\bSystem\.out\.print", r"^\s*import javax?\.")),
        ("PHP", (r"<\?php", r"\bfunction \w+\(&?\$\w", r"^\s*\$\w+ = [^;\n]*;", r"^\s*echo \$")),
        ("Go", (r"^package \w+$", r"\bfmt\.(?:Print|Sprint)")),
        ("Python", (r"^\s*def \w+\([^{}\n]*\)[^{}\n]*:\s*$", r"^\s*elif [^{}\n]*:\s*$", r"^from [\w.]+ import ",
                    r"^import (?:numpy|pandas|re|os|sys|math|random|requests|json|string|datetime)$",
                    r"^\s*(?:for|while|if|try|with|class)\b[^{};\n]*:$", r"^print\(\w+\)$")),
        ("Pascal", (r"^\s*program \w+;", r"^\s*writeln\(")),
        ("Scala", (r"^\s*object \w+ (?:extends App )?\{", r"\bdef \w+\([^)\n]*\): [\w\[\]]+ =")),
        ("JavaScript", (r"\bconsole\.log\(", r"\bdocument\.(?:get|query|create|add)", r"^\s*(?:const|let) [\w{\[]",
                        r"\bmodule\.exports\b", r"\bfunction \w*\([\w, ]*\) \{", r"\) => [\w{(]", r"\brequire\('")),
        ("SQL", (r"^\s*(?:SELECT|CREATE TABLE|INSERT INTO|ALTER TABLE|DELETE FROM|UPDATE)\b",)),
        ("HTML", (r"<!DOCTYPE html", r"<html\b", r"</(?:div|form|table|body)>")),
        ("CSS", (r"^[.#]?[\w-]+ \{\n\s+[a-z-]+: [^;{}\n]+;",)),
        ("Shell", (r"\A#!/(?:usr/)?bin/",)),
        ("Ruby", (r"^\s*puts ", r"^\s*\w+\.each do \|")),
        ("Swift", (r"^\s*import (?:UIKit|Foundation|SwiftUI)$", r"\bfunc \w+\(_ ")),
    )
)  # fmt: skip

# Often found within an answer in another language: a page with a script, a script with a query.
_EMBEDDED = frozenset({"HTML", "CSS", "SQL"})

# Names that are words as well count only where the sentence makes them a language.
_PLAIN = (
    "python3?", "java", r"c\+\+", "cpp", "c#", "php", "golang", r"pascal(?!'s| triangle)", "scala", "javascript", "js",
    r"node\.?js", "typescript", "ruby", "kotlin", "sql", "html5?", "css3?", "bash", "shell script", "matlab", "haskell",
    "perl", r"vb\.net",
)  # fmt: skip
_WORDS = ("c", "go", "r", "rust", "swift", "lua", "dart", "assembly")
_MADE = (
    r"(?:program|programming|function|code|method|script|class|struct|application|app|language|routine|implementation"
    r"|snippet)"
)
_ASKED = re.compile(
    rf"(?<![\w.#+-])(?:(?P<plain>{'|'.join(_PLAIN)})(?![\w+#])"
    rf"|(?:in|using|with|into|to|the|an?) (?P<after>{'|'.join(_WORDS)})"
    rf"(?=\s+{_MADE}\b|\s*[,.:;?)]|\s*\Z|\s+(?:that|to|which|using|and|for)\b)"
    rf"|(?P<before>{'|'.join(_WORDS)})(?=\s+{_MADE}\b))",
    re.IGNORECASE,
)
_LIBRARIES: Mapping[str, str] = {
    "django": "Python",
    "flask": "Python",
    "numpy": "Python",
    "pandas": "Python",
    "pytorch": "Python",
    "tensorflow": "Python",
    "matplotlib": "Python",
    "laravel": "PHP",
    "symfony": "PHP",
    "asp.net": "C#",
    "linq": "C#",
    "spring boot": "Java",
    "jquery": "JavaScript",
    "express.js": "JavaScript",
    "react": "JavaScript",
}
_LIBRARY = re.compile(rf"(?<![\w.])({'|'.join(re.escape(name) for name in _LIBRARIES)})(?![\w])", re.IGNORECASE)
_TARGET = re.compile(
    rf"\b(?:convert|translate|rewrite|port|transform|change|equivalent)\b[^.?!]*\b(?:to|into|in|as)\s+"
    rf"(?:an?\s+|the\s+)?(?:equivalent\s+)?"
    rf"(?P<name>{'|'.join((*_PLAIN, *_WORDS))})(?![\w+#])",
    re.IGNORECASE,
)


def canonical(name: str) -> str | None:
    """A language's usual name, None when it is no name of one."""
    return _NAMES.get(" ".join(name.split()).strip().lower())


def language_of(instruction: str, input: str = "", output: str = "", column: str = "") -> str | None:
    """The language that an answer is written in, None when that cannot be told.

    >>> language_of("Sort a list in Python.", output="def f(xs):\\n    return sorted(xs)"), language_of("Sort a list.")
    ('Python', None)
    """
    if column.strip():
        return canonical(column)
    asked = _asked(instruction)
    named = canonical(input) if 1 < len(input.strip()) <= 24 or input.strip() in ("C", "R") else None
    if named is not None and (not asked or named in asked):
        return named
    fences = {canonical(name) for name in _FENCE.findall(output)} - {None}
    shown = {str(fences.pop())} if len(fences) == 1 else _shown(output)
    if "C++" in shown:
        shown.discard("C")  # whose headers it has, too
    if asked:
        agreed = asked & shown if shown else asked
        if asked == {"C++"} and shown == {"C"}:
            agreed = asked
        return agreed.pop() if len(agreed) == 1 else None
    shown = shown or _shown(input)  # code to explain or to mend
    shown = shown if len(shown) == 1 else shown - _EMBEDDED
    return shown.pop() if len(shown) == 1 else None


def _shown(output: str) -> set[str]:
    return {name for name, pattern in _SIGNS if pattern.search(output)}


def _asked(instruction: str) -> set[str]:
    """The languages that a question names; of a translation only the one that is asked for."""
    target = _TARGET.search(instruction)
    if target is not None and (name := _named(target["name"])):
        return {name}
    found = {_named(match["plain"] or match["after"] or match["before"]) for match in _ASKED.finditer(instruction)}
    if not found - {None}:
        found = {_LIBRARIES[match.lower()] for match in _LIBRARY.findall(instruction)}
    named = {name for name in found if name is not None}
    return named - _EMBEDDED or named


def _named(name: str) -> str | None:
    name = name.lower()
    return canonical(name) or canonical(name.rstrip("0123456789")) or ("Shell" if name == "shell script" else None)


# ---------------------------------------------------------------- conversions of named sets


def with_language(raw: Mapping[str, Any]) -> Mapping[str, Any] | LeftOut:
    """A row of CodeAlpaca with its `language`; left out unless that is one of the nine."""
    said = next((raw[name] for name in ("language", "lang") if isinstance(raw.get(name), str)), "")
    instruction, given, output = (_str(raw.get(name)) for name in ("instruction", "input", "output"))
    found = language_of(instruction, given, output or _str(raw.get("response")), said)
    if found is None:
        return LeftOut("language undecided")
    if found not in NINE:
        return LeftOut(f"language without a client: {found}")
    return {**raw, "language": found}


def code_search_net(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of CodeSearchNet under one set of names, without the token lists, which are most of it."""
    doc = _str(raw.get("docstring", raw.get("func_documentation_string")))
    code = _str(raw.get("code", raw.get("func_code_string")))
    kept = {name: raw[name] for name in ("repo", "repository_name", "path", "func_name", "language") if name in raw}
    # The code often begins with its own documentation, which is the question.
    return {**kept, "docstring": doc, "code": code.replace(doc, "") if doc.strip() else code}


def _str(value: Any) -> str:
    return value if isinstance(value, str) else ""
