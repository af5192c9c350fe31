"""The language of a row: what decides, and that nothing is guessed where signs disagree."""

from __future__ import annotations

import pytest

from fedloom.data.languages import NINE, canonical, code_search_net, language_of, with_language
from fedloom.data.rows import LeftOut

PYTHON, CPP, JAVA = "def f(x):\n    return x", "#include <iostream>\nint main() {}", "System.out.println(1);"


@pytest.mark.parametrize(
    ("row", "language"),
    [
        # what the question asks for
        (("Sort a list in Python.",), "Python"),
        (("Write a Java method that adds.",), "Java"),
        (("Write a JavaScript function that adds.",), "JavaScript"),
        (("Implement a C program that adds.",), "C"),
        (("In C, add two numbers.",), "C"),
        (("Use the C programming language to add.",), "C"),
        (("Implement a C++ class.",), "C++"),
        (("Write a C# method.",), "C#"),
        (("Design a Go function that adds.",), "Go"),
        (("Write a Golang program.",), "Go"),
        (("Write it in Scala 3.",), "Scala"),
        (("Draw Pascal's triangle with a C program.",), "C"),
        (("Which route does the driver go to the shop?",), None),
        (("Give vitamin C an own page.",), None),
        (("Let the ball go in the net.",), None),
        (("Add two numbers.",), None),
        (("Load a file with pandas.",), "Python"),
        # of a translation the language that is asked for
        (("Translate the following Python code to Java.", "def f(): pass"), "Java"),
        (("Convert this Java program into an equivalent C++ program.",), "C++"),
        (("Translate this Python code to JavaScript.", "", "let a = 1"), "JavaScript"),
        # what the answer gives away
        (("Add two numbers.", "", PYTHON), "Python"),
        (("Add two numbers.", "", CPP), "C++"),
        (("Add two numbers.", "", JAVA), "Java"),
        (("Add two numbers.", "", "#include <stdio.h>\nint main(void) {}"), "C"),
        (("Add two numbers.", "", "<?php\necho $a + $b;"), "PHP"),
        (("Add two numbers.", "", "package main\n\nfunc main() {}"), "Go"),
        (("Add two numbers.", "", "using System;\nclass A {}"), "C#"),
        (("Add two numbers.", "", "program Add;\nbegin\n  writeln(1);\nend."), "Pascal"),
        (("Add two numbers.", "", "object Add extends App {\n}"), "Scala"),
        (("Add two numbers.", "", "see below\n```python\nx + y\n```\n"), "Python"),
        (("Print a page.", "", "<html>\n<script>\nconst a = 1;\n</script></html>"), "JavaScript"),
        (("A C++ program that adds.", "", "#include <stdio.h>\nint main() {}"), "C++"),
        # what is to be explained
        (("What is wrong with this code?", PYTHON, "It is slow."), "Python"),
        # a language named by the input, or by a column
        (("Count to ten.", "Pascal", "begin end."), "Pascal"),
        (("Count to ten.", "X86-64 Assembly", "mov"), "Assembly"),
        (("Is this letter a vowel? Use Python.", "c", ""), "Python"),
        # signs that disagree
        (("Write a Java method.", "", PYTHON), None),
        (("A Python and a Java program.", "", "no code"), None),
        (("A Python and a Java program.", "", JAVA), "Java"),
        (("Add two numbers.", "", PYTHON + "\n" + JAVA), None),
        (("A C program.", "", CPP), None),
    ],
)
def test_the_language_of_a_row(row: tuple[str, ...], language: str | None) -> None:
    assert language_of(*row) == language


def test_a_column_decides_before_everything() -> None:
    assert language_of("Write it in Java.", "", PYTHON, "golang") == "Go"
    assert language_of("Write it in Java.", "", PYTHON, "Klingon") is None
    assert [canonical(name) for name in (" C Sharp", "CPP", "node.js", "x")] == ["C#", "C++", "JavaScript", None]
    assert all(canonical(name) == name for name in NINE)


def test_rows_are_given_their_language_or_left_out() -> None:
    row = {"instruction": "Add in PHP.", "input": "", "response": "<?php", "output": None}
    assert with_language(row) == {**row, "language": "PHP"}
    assert with_language({"instruction": "Add.", "output": "1"}) == LeftOut("language undecided")
    assert isinstance(with_language({"instruction": "Add in Ruby.", "output": "1"}), LeftOut)
    assert with_language({"lang": "python", "instruction": "Add.", "output": "1"})["language"] == "Python"  # type: ignore[index]


def test_documentation_is_taken_out_of_the_code() -> None:
    made = code_search_net({"docstring": "adds", "code": 'def f():\n  """adds"""', "language": "python", "sha": "1"})
    assert made == {"docstring": "adds", "code": 'def f():\n  """"""', "language": "python"}
    assert code_search_net({"docstring": "", "code": "x"})["code"] == "x"
