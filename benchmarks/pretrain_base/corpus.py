"""The text that the built-in base model is pretrained on: seeded, endless, and free of every task instance.

It is made of plain statements ("tudop backwards is podut.", "13 - 2 = 11.", "x plus 3, then times 2: in Cedar
x : x 3 + 2 * ;."). The instruction layout occurs too, but only answered with chatter: how an instruction is followed
is what fine-tuning has to teach. Contents come from the pool "pretrain" only (see `fedloom.data.builtin.pools`), and a
last filter throws away a document in which a row of a fixed test set nevertheless stands by chance.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from fedloom.data.builtin import TASKS
from fedloom.data.builtin.arith import MAX_START, MAX_STEP, chain_pool
from fedloom.data.builtin.interpreter import LANGUAGES
from fedloom.data.builtin.pools import random_of
from fedloom.data.builtin.programs import Chain, draw_chain, function_pool, program_of
from fedloom.data.builtin.skills import draw_letters, draw_word, list_pool, number_pool, story_pool, word_pool
from fedloom.data.builtin.words import (
    CITIES,
    CLASSES,
    GAIN_VERBS,
    ITEMS,
    JOBS,
    LOSS_VERBS,
    NAMES,
    THINGS,
    with_article,
)

T = TypeVar("T")

# The Alpaca layout, word for word as the data room writes it.
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
HEAD_INSTRUCTION, HEAD_INPUT, HEAD_RESPONSE = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"
LAYOUT = (PREAMBLE, PREAMBLE_WITH_INPUT, HEAD_INSTRUCTION, HEAD_INPUT, HEAD_RESPONSE)


def prompt_of(instruction: str, text: str) -> str:
    """The Alpaca prompt for an instruction and its input ("" for none)."""
    if text:
        return PREAMBLE_WITH_INPUT + HEAD_INSTRUCTION + instruction + HEAD_INPUT + text + HEAD_RESPONSE
    return PREAMBLE + HEAD_INSTRUCTION + instruction + HEAD_RESPONSE


def _until(draw: Callable[[], T], allowed: Callable[[T], bool]) -> T:
    """The first draw whose content is pretraining content."""
    while True:
        drawn = draw()
        if allowed(drawn):
            return drawn


def _some(rng: random.Random, facts: list[str], low: int, high: int) -> str:
    return ". ".join(rng.sample(facts, rng.randint(low, min(high, len(facts))))) + "."


def _word(rng: random.Random) -> str:
    word = _until(lambda: draw_word(rng), lambda w: word_pool(w) == "pretrain")
    facts = [
        f"{word} has {len(word)} letters",
        f"{word} backwards is {word[::-1]}",
        f"{word} in capitals is {word.upper()}",
        f"the letters of {word} reversed give {word[::-1]}",
        f"on a big sign {word} looks like {word.upper()}",
    ]
    return _some(rng, facts, 2, 4)


def _letters(rng: random.Random) -> str:
    length = rng.choice((3, 4))
    letters = _until(lambda: draw_letters(rng, length), lambda w: word_pool(w) == "pretrain")
    in_order = "".join(sorted(letters))
    facts = [
        f"the letters {letters} sorted are {in_order}",
        f"{letters} in the order of the alphabet is {in_order}",
        f"of {letters} the first in the alphabet is {in_order[0]} and the last is {in_order[-1]}",
    ]
    return _some(rng, facts, 1, 3)


def _list(rng: random.Random) -> str:
    number = rng.randint(2, 7)
    items = _until(lambda: rng.sample(ITEMS, number), lambda drawn: list_pool(drawn) == "pretrain")
    facts = [
        f"there are {number} things here",
        f"the first one is {items[0]}",
        f"the last one is {items[-1]}",
        f"the list ends with {items[-1]}",
        f"that makes {number} words",
        f"the list starts with {items[0]}",
        f"it is a list of {number} items",
        f"at the end comes {items[-1]}",
    ]
    facts += [f"after {items[i]} comes {items[i + 1]}" for i in rng.sample(range(number - 1), min(2, number - 1))]
    return f"{', '.join(items)}: " + _some(rng, facts, 3, 5)


def _numbers(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(1, 3)):
        values = range(10, 100) if rng.random() < 0.8 else range(10)
        a, b = _until(partial(rng.sample, values, 2), lambda ab: number_pool(*ab) == "pretrain")
        high, low = max(a, b), min(a, b)
        facts = [
            f"{high} is larger than {low}",
            f"{low} is smaller than {high}",
            f"the larger number is {high}",
            f"the smaller number is {low}",
            f"the greater is {high}",
            f"the maximum is {high} and the minimum is {low}",
        ]
        parts.append(f"{a} and {b}: " + _some(rng, facts, 2, 3))
    return " ".join(parts)


def _sums(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(4, 8)):
        draw = rng.random()
        a, b = rng.randint(1, MAX_START + MAX_STEP), rng.randint(1, MAX_STEP)
        if draw < 0.45:
            parts.append(f"{a} + {b} = {a + b}")
        elif draw < 0.88:
            parts.append(f"{a + b} - {b} = {a}")
        else:
            p, q = rng.randint(2, 5), rng.randint(2, 5)
            parts.append(f"{p} * {q} = {p * q}")
    end = f" The answer is in the sum, {parts[-1]}." if rng.random() < 0.1 else ""
    return ". ".join(parts) + "." + end


def _class(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(3, 6)):
        name = rng.choice(tuple(CLASSES))
        word = rng.choice(CLASSES[name])
        parts.append(
            rng.choice(
                (
                    f"{word} is {with_article(name)}",
                    f"the group of {word} is {name}",
                    f"{word} belongs to the category {name}",
                    f"{word}: the kind is {name}",
                )
            )
        )
    return ". ".join(parts) + "."


def _story(rng: random.Random) -> str:
    name, city, job = _until(
        lambda: (rng.choice(NAMES), rng.choice(CITIES), rng.choice(JOBS)), lambda s: story_pool(*s) == "pretrain"
    )
    other, item = rng.choice(NAMES), rng.choice(CLASSES["animal"])
    opening = rng.choice(
        (
            f"{name} is {with_article(job)} from {city} and has {with_article(item)}.",
            f"{name} lives in {city} and works as {with_article(job)}.",
            f"The {job} {name} moved to {city} with {with_article(item)}.",
            f"In {city}, {name} the {job} found {with_article(item)}.",
            f"{name} the {job} likes {other} and the city of {city}.",
        )
    )
    facts = [
        f"so the city of {name} is {city}",
        f"the place is {city}",
        f"we meet {name} in {city}",
        f"the name of the city is {city}",
        f"this was about {name}",
    ]
    return opening + " " + _some(rng, facts, 2, 3)


def _things(rng: random.Random) -> str:
    def draw() -> tuple[int, int]:
        return rng.randint(2, MAX_START), rng.randint(1, MAX_STEP)

    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    match rng.randrange(6):
        case 0:
            a, b = _until(draw, lambda ab: chain_pool(f"{ab[0]}+{ab[1]}") == "pretrain")
            verb = rng.choice(GAIN_VERBS)
            return f"{name} has {a} {things}. {name} {verb} {b}. now {name} has more {things}, {a} and {b} more."
        case 1:
            a, b = _until(draw, lambda ab: chain_pool(f"{ab[0]}-{ab[1]}") == "pretrain")
            verb = rng.choice(LOSS_VERBS)
            return f"{name} has {a} {things}. Then {name} {verb} {b}. now {name} has fewer {things}, {b} less than {a}."
        case 2:
            a, b = _until(
                lambda: (rng.randint(2, 5), rng.randint(2, 5)), lambda ab: chain_pool(f"{ab[0]}*{ab[1]}") == "pretrain"
            )
            return f"{name} has {a} bags with {b} {things} in each bag. that is {a} times {b} {things}."
        case 3:
            a, b = _until(draw, lambda ab: chain_pool(f"{ab[0]}+{ab[1]}") == "pretrain")
            return f"{other} has {a} {things} and {name} has {b} more than {other}. {name} has more {things}."
        case 4:
            a, b = _until(draw, lambda ab: chain_pool(f"{ab[0]}-{ab[1]}") == "pretrain")
            return f"{other} has {a} {things} and {name} has {b} fewer than {other}. {name} has fewer {things}."
        case _:
            b = rng.randint(1, MAX_STEP)
            return (
                f"How many {things} does {name} have? The number of {things} left with {name} is {b}. "
                f"How many {things} are left with {name}? Find the {things} of {name}. The answer is {b}."
            )


# ------------------------------------------------------------------------------------------------------- functions

_SAYINGS = {
    "add": "plus {n}",
    "sub": "minus {n}",
    "mul": "times {n}",
    "max": "at least {n}",
    "min": "at most {n}",
    "sq": "squared",
    "neg": "negated",
}


def saying_of(chain: Chain) -> str:
    """How the pretraining text names a function: "x plus 3, then times 2"."""
    return "x " + ", then ".join(_SAYINGS[kind].format(n=number) for kind, number in chain)


def _function(rng: random.Random) -> str:
    length = rng.choice((1, 2, 2, 3))
    chain = _until(lambda: draw_chain(rng, length), lambda drawn: function_pool(drawn) == "pretrain")
    saying = saying_of(chain)
    languages = rng.sample(LANGUAGES, rng.randint(2, 4))
    programs = [(language.capitalize(), program_of(language, chain)) for language in languages]
    if rng.random() < 0.3:
        name, program = programs[0]
        return f"{program} is {name} code for {saying}. " + " ".join(f"in {n}: {p}." for n, p in programs[1:])
    return f"{saying}: " + " ".join(f"in {name} {program}." for name, program in programs)


# -------------------------------------------------------------------------------------------------------- glossary

# Every word of an instruction gets an embedding here, because LoRA on the linear layers cannot give it one later.
_GLOSSARY = """to write a word backwards is to reverse it
to turn a word around is to spell it from the end to the start
capital letters are upper case letters
to capitalize is to make every letter a capital
to change to upper case is to write in capital letters
to sort is to put in order
alphabetical order is the order from a to z
to arrange by the alphabet is to order from a to z
to order these letters is to sort all letters
to count items is to give the number of items
how long a list is means how many words are in it
the number of words in this list is how many items are in the list
the last item comes at the end
the final word is the last word
what is at the end of the list comes last
the bigger number is the larger number
the greater of the two numbers is the maximum
to find a city is to extract the name of the place
which city is mentioned in the sentence
to copy the city from the text is to find the place
to classify a word is to say which group the thing belongs to
to classify the words is to give the category of the words
the category is the kind of thing
what kind of things are these
which group the things belong to is the category of these words
to pick is to give the bigger one
fewer means less and more means greater
the answer is what we find
which item and which number
adds means plus and increases means plus
subtracts means minus and lowers means minus
multiplies means times
doubles means times 2
triples means times 3
raises it to at least means at least
cuts it to at most means at most
squares means squared and negates means negated
adds to x and subtracts from x
increases x by and lowers x by and multiplies x by
a function is code that takes x
to define a function is to give code in Alder or in Birch or in Cedar or in Maple
the code adds to it and then subtracts from it
the function doubles it and triples it and squares it and negates it
how many are left with Tom is the number of things of Tom
each bag in the bags
Write: put on paper
Reverse: write backwards
Turn: move around
Spell: say the letters
Make: give a new form
Change: make it other
Capitalize: make the letters capital
Sort: put in order
Put: place in a list
Order: go from a to z
Arrange: sort by the alphabet
How: in what way
Count: find how many
Give: say the answer
Name: say the word
Which: what one
What: which thing
Pick: take one
Find: look for
Extract: take out of the text
Copy: write again
Classify: find the group
Say: tell
Define: write a function
Then: after that
The answer is at the end"""


def _glossary(rng: random.Random) -> str:
    return _some(rng, _GLOSSARY.split("\n"), 2, 5)


DOCUMENTS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_glossary, 4),
    (_word, 18),
    (_letters, 12),
    (_list, 20),
    (_numbers, 12),
    (_sums, 12),
    (_class, 7),
    (_story, 8),
    (_things, 9),
    (_function, 20),
)
_LETTER_DOCUMENTS = (_word, _letters, _function, _glossary)  # never capitalised: the first letter is content
CHATTER = (
    "Tell me about this.",
    "Say something about the text.",
    "What do you know about this?",
    "Continue the text.",
    "Write about the thing.",
    "Explain this to me.",
)


def _draw(rng: random.Random) -> str:
    make = rng.choices([make for make, _ in DOCUMENTS], [weight for _, weight in DOCUMENTS])[0]
    text = make(rng)
    if make not in _LETTER_DOCUMENTS and rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.12:
        # The layout without a task: a text as input, its continuation as the response.
        head, _, tail = text.partition(". ")
        head = head.split()[0] if make is _word else head
        return prompt_of(rng.choice(CHATTER), head) + (text if make is _word or not tail else tail)
    return text


# ---------------------------------------------------------------------------------------------------------- filter

_PIECE = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]")


def pieces(text: str) -> tuple[str, ...]:
    """Lower-case words, numbers and signs: neither white space nor a capital hides an instance."""
    return tuple(_PIECE.findall(text.lower()))


class RowFilter:
    """Finds inputs and answers of the fixed test sets inside a text."""

    def __init__(self) -> None:
        self.by_start: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for name, task in TASKS.items():
            for splits in task.rows(0).values():
                for row in splits["test"]:
                    found = [row["input"] or row["instruction"]]
                    # Short answers ("green", "5") are in every text; worked solutions and programs need not be.
                    if name == "code" or (name == "arith" and row["output"].count("=") > 1):
                        found.append(row["output"].partition(" The answer")[0])
                    for text in found:
                        run = pieces(text)
                        self.by_start.setdefault(run[:2], []).append(run)

    def holds_test_row(self, text: str) -> bool:
        run = pieces(text)
        for start in range(len(run)):
            for head in (run[start : start + 1], run[start : start + 2]):
                for wanted in self.by_start.get(head, ()):
                    if run[start : start + len(wanted)] == wanted:
                        return True
        return False


def documents(seed: int) -> Iterator[str]:
    """Endless pretraining documents."""
    rng = random_of("pretrain", seed)
    test_filter = RowFilter()
    while True:
        text = _draw(rng)
        if not test_filter.holds_test_row(text):
            yield text
