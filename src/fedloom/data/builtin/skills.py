"""`builtin:skills`: eight small skills of language, one instruction category per client."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedloom.data.builtin.pools import SPLITS, Pool, number_of, pool_of, random_of
from fedloom.data.builtin.words import (
    ALPHABET,
    CITIES,
    CLASSES,
    CONSONANTS,
    ENGLISH,
    ITEMS,
    JOBS,
    NAMES,
    VOWELS,
    with_article,
)

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 128, 32, 50  # rows per client


class Drawn(NamedTuple):
    """One instance before it is known whether its pool is the wanted one."""

    pool: Pool
    key: str  # the content, whatever the phrasing
    instruction: str
    input: str
    output: str


PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "reverse": (
        "Write the word backwards.",
        "Reverse the word.",
        "Turn the word around.",
        "Spell this word from the end to the start.",
    ),
    "upper": (
        "Write the word in capital letters.",
        "Make every letter a capital.",
        "Change the word to upper case.",
        "Capitalize all letters.",
    ),
    "sort": (
        "Sort the letters.",
        "Put the letters in alphabetical order.",
        "Order these letters from a to z.",
        "Arrange the letters by the alphabet.",
    ),
    "count": (
        "How many items are in the list?",
        "Count the items.",
        "Give the number of words in this list.",
        "How long is the list?",
    ),
    "last": (
        "Name the last item of the list.",
        "Which item comes last?",
        "Give the final word of the list.",
        "What is at the end of the list?",
    ),
    "compare": (
        "Which number is larger?",
        "Pick the bigger number.",
        "Give the greater of the two numbers.",
        "Find the maximum.",
    ),
    "extract": (
        "Find the city in the sentence.",
        "Which city is mentioned?",
        "Extract the name of the place.",
        "Copy the city from the text.",
    ),
    "classify": (
        "What kind of things are these?",
        "Classify the words.",
        "Give the category of the words.",
        "Say which group the things belong to.",
    ),
}


def draw_word(rng: random.Random) -> str:
    """A made-up word of 3-5 letters, vowels and consonants in turn; about 2 x 10^5 exist."""
    while True:
        length = rng.choice((3, 4, 4, 5, 5))
        consonant_first = rng.random() < 0.7
        word = "".join(rng.choice(CONSONANTS if (i % 2 == 0) == consonant_first else VOWELS) for i in range(length))
        if not {word, word[::-1]} & ENGLISH:
            return word


def draw_letters(rng: random.Random, length: int) -> str:
    """`length` different letters in random order that make no English word, neither as they are nor sorted."""
    while True:
        letters = "".join(rng.sample(ALPHABET, length))
        if not {letters, letters[::-1], "".join(sorted(letters))} & ENGLISH:
            return letters


def word_key(word: str) -> str:
    """All orders of the same letters are one content: the answer to one would be the question of another."""
    return "".join(sorted(word))


def word_pool(word: str) -> Pool:
    """Pool of a made-up word or letter string: one space for every category that works on letters."""
    return pool_of("word", word_key(word))


def list_pool(items: list[str]) -> Pool:
    return pool_of("list", ", ".join(items))


def number_pool(a: int, b: int) -> Pool:
    """Pool of an unordered pair of numbers."""
    return pool_of("numbers", f"{min(a, b)} {max(a, b)}")


def story_pool(name: str, city: str, job: str) -> Pool:
    return pool_of("story", f"{name} {city} {job}")


def _class_words() -> dict[Pool, dict[str, tuple[str, ...]]]:
    """Words of each class for each split: half for training, a fifth for validation, the rest for test."""
    parts: dict[Pool, dict[str, tuple[str, ...]]] = {split: {} for split in SPLITS}
    for name, words in CLASSES.items():
        shuffled = sorted(words, key=lambda word: number_of("class", word))
        first, second = len(words) // 2, len(words) * 7 // 10
        parts["train"][name] = tuple(shuffled[:first])
        parts["validation"][name] = tuple(shuffled[first:second])
        parts["test"][name] = tuple(shuffled[second:])
    return parts


CLASS_WORDS = _class_words()


def _reverse(rng: random.Random) -> Drawn:
    word = draw_word(rng)
    return Drawn(word_pool(word), word_key(word), rng.choice(PHRASINGS["reverse"]), word, word[::-1])


def _upper(rng: random.Random) -> Drawn:
    word = draw_word(rng)
    return Drawn(word_pool(word), word_key(word), rng.choice(PHRASINGS["upper"]), word, word.upper())


def _sort(rng: random.Random) -> Drawn:
    letters = draw_letters(rng, rng.choice((3, 4)))
    return Drawn(
        word_pool(letters), word_key(letters), rng.choice(PHRASINGS["sort"]), letters, "".join(sorted(letters))
    )


def _count(rng: random.Random) -> Drawn:
    items = rng.sample(ITEMS, rng.randint(2, 7))
    text = ", ".join(items)
    return Drawn(list_pool(items), text, rng.choice(PHRASINGS["count"]), text, str(len(items)))


def _last(rng: random.Random) -> Drawn:
    items = rng.sample(ITEMS, rng.randint(2, 5))
    text = ", ".join(items)
    return Drawn(list_pool(items), text, rng.choice(PHRASINGS["last"]), text, items[-1])


def _compare(rng: random.Random) -> Drawn:
    a, b = rng.sample(range(10, 100), 2)
    key = f"{min(a, b)} {max(a, b)}"
    return Drawn(number_pool(a, b), key, rng.choice(PHRASINGS["compare"]), f"{a} and {b}", str(max(a, b)))


def _extract(rng: random.Random) -> Drawn:
    name, city, job = rng.choice(NAMES), rng.choice(CITIES), rng.choice(JOBS)
    item = rng.choice(CLASSES["animal"])
    sentence = rng.choice(
        (
            f"{name} is {with_article(job)} from {city} and has {with_article(item)}.",
            f"{name} lives in {city} and works as {with_article(job)}.",
            f"The {job} {name} moved to {city} with {with_article(item)}.",
            f"In {city}, {name} the {job} found {with_article(item)}.",
        )
    )
    key = f"{name} {city} {job}"
    return Drawn(story_pool(name, city, job), key, rng.choice(PHRASINGS["extract"]), sentence, city)


def _classify(rng: random.Random) -> Drawn:
    # The split comes first here: the words themselves are divided, so a test pair holds no word of a training pair.
    pool = rng.choice(SPLITS)
    name = rng.choice(tuple(CLASSES))
    first, second = rng.sample(CLASS_WORDS[pool][name], 2)
    key = " ".join(sorted((first, second)))
    return Drawn(pool, key, rng.choice(PHRASINGS["classify"]), f"{first} and {second}", name)


GENERATORS: Mapping[str, Callable[[random.Random], Drawn]] = {
    "reverse": _reverse,
    "upper": _upper,
    "sort": _sort,
    "count": _count,
    "last": _last,
    "compare": _compare,
    "extract": _extract,
    "classify": _classify,
}
CATEGORIES = tuple(GENERATORS)


def _rows_of(category: str, split: Pool, number: int, rng: random.Random, seen: set[str]) -> list[dict[str, Any]]:
    """`number` new rows of one category whose content lies in `split`'s pool; `seen` spans all clients and splits."""
    rows: list[dict[str, Any]] = []
    while len(rows) < number:
        drawn = GENERATORS[category](rng)
        if drawn.pool != split or drawn.key in seen:
            continue
        seen.add(drawn.key)
        rows.append(
            {
                "instruction": drawn.instruction,
                "input": drawn.input,
                "output": drawn.output,
                "category": category,
            }
        )
    return rows


def skills_rows(seed: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{category: {"train" | "validation" | "test": rows}}; the test sets are the same for every seed."""
    sizes = {"test": NUM_TEST, "train": NUM_TRAIN, "validation": NUM_VALIDATION}
    seen: set[str] = set()
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {category: {} for category in CATEGORIES}
    # Test first: what `seen` rejects must not depend on the seed.
    for split in ("test", "train", "validation"):
        for category in CATEGORIES:
            rng = random_of("skills", split, category, 0 if split == "test" else seed)
            rows[category][split] = _rows_of(category, split, sizes[split], rng, seen)
    return rows
