"""Data sets by name: where they are published, under which licence, what their columns mean, and who holds which rows.

A literal table, which imports nothing heavy. `data.name: fed-dolly` in a recipe (or `data.path: fed-dolly`) takes the
columns and the split of its line here; the rows come from `data.path`, else from the set's place below `data_home()`,
else from a hub. How they are found and read is `fedloom.data.sources`.

A revision, a checksum or a number of rows is here only where it could be checked against a public record; what could
not is None, and a set without a revision says so when it is read from a hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedloom.errors import UserError, suggest

__all__ = ["CATALOG", "LOCAL", "File", "Form", "Hub", "NamedSet", "find_set"]

LOCAL = "local"  # any file or folder: nothing is known of it


class File(NamedTuple):
    """One published file. `name` is its place below the set's folder, where `*` stands for anything."""

    name: str
    url: str = ""
    rows: int | None = None
    sha256: str | None = None
    size: int | None = None  # bytes


class Form(NamedTuple):
    """One form in which a set is to be had; a set may have several."""

    train: tuple[File, ...]
    test: tuple[File, ...] = ()


class Hub(NamedTuple):
    """The same set on a hub. `revision` is the commit it is pinned to; of several `configs` each is read."""

    id: str
    revision: str | None
    configs: tuple[str, ...] = ()
    data_dir: str | None = None
    train: str = "train"
    test: str | None = None


@dataclass(frozen=True)
class NamedSet:
    """One line of the catalogue."""

    name: str
    about: str
    licence: str
    folder: str  # below data_home()
    forms: tuple[Form, ...]  # the usual one first
    published: str  # where, for people
    revision: str | None = None  # of the repository that the files' addresses name
    hub: Hub | None = None
    rows: int | None = None  # training rows as published, those with an empty answer included
    clients: int | None = None  # what its split makes of the whole set
    columns: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[str, Any] = field(default_factory=dict)  # what the recipe has when it says nothing
    kind: str = "auto"
    parse: str | None = None  # of PARSERS in fedloom.data.sources: rows from a text file
    convert: str | None = None  # of CONVERSIONS there: each row before it is read
    score: str | None = None  # how an answer is judged

    @property
    def has_test(self) -> bool:
        """Whether one of its forms has test rows of its own."""
        return any(form.test for form in self.forms)


_HUB = "https://huggingface.co/datasets"
_GITHUB = "https://raw.githubusercontent.com"
_CODEALPACA = f"{_GITHUB}/sahil280114/codealpaca"
_GSM8K = f"{_GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
_DOLLY = f"{_HUB}/databricks/databricks-dolly-15k/resolve/bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"
_HH = f"{_HUB}/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa/harmless-base"
_CSN = "bd0cf261e357a3eb5c8fba490d23ec1a1cd59555"

_SETS = (
    NamedSet(
        "fed-codealpaca",
        "instructions for code; one programming language per client",
        "CC BY-NC 4.0",
        "code",
        (
            Form((File(
                "rosetta_alpaca.json",
                f"{_CODEALPACA}/d269da106a579a623a654529b3cb91b5dfa9c72f/data/rosetta_alpaca.json",
            ),)),
            Form((File(
                "new_codealpaca.json",
                f"{_CODEALPACA}/56da018af5be3bb7b3d6df7333bf282a729a0617/data/new_codealpaca.json",
                4_535,
                "2c8f4bb2dbce75ecc2020ded30f0fa935b7aa89d7be0c271f4ac208062f1bcb6",
                3_549_564,
            ),)),
        ),
        "github.com/sahil280114/codealpaca",
        "d269da106a579a623a654529b3cb91b5dfa9c72f",
        clients=9,
        columns={"category": "language"},
        split={"kind": "by_category", "min_rows": 20},
        kind="alpaca",
        convert="with_language",
    ),
    NamedSet(
        "fed-dolly",
        "instructions written by people; one of 8 kinds per client",
        "CC BY-SA 3.0",
        "dolly",
        (
            Form((File(
                "databricks-dolly-15k.jsonl",
                f"{_DOLLY}/databricks-dolly-15k.jsonl",
                15_011,
                "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec",
            ),)),
            # Cut into ten clients beforehand, as in Shepherd; with split.kind: files those are the clients.
            Form((File("local_training_*.json"),), (File("global_test.json"),)),
        ),
        "huggingface.co/datasets/databricks/databricks-dolly-15k",
        "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
        Hub("databricks/databricks-dolly-15k", "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a"),
        rows=15_011,
        clients=8,
        columns={"instruction": "instruction", "input": "context", "output": "response", "category": "category"},
        split={"kind": "by_category", "clients": 8},
        kind="alpaca",
    ),
    NamedSet(
        "fed-gsm8k",
        "grade-school problems with worked answers; 3 clients alike",
        "MIT",
        "gsm8k",
        (
            Form(
                (File("train.jsonl", f"{_GSM8K}/train.jsonl", 7_473,
                      "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", 4_166_206),),
                (File("test.jsonl", f"{_GSM8K}/test.jsonl", 1_319,
                      "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", 749_738),),
            ),
        ),
        "github.com/openai/grade-school-math",
        "3101c7d5072418e28b9008a6636bde82a006892c",
        Hub("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", ("main",), test="test"),
        rows=7_473,
        clients=3,
        columns={"instruction": "question", "output": "answer"},
        split={"kind": "iid", "clients": 3},
        kind="alpaca",
        score="final_number",
    ),
    NamedSet(
        "fed-codesearchnet",
        "documentation to code; one of 6 languages per client",
        "of each repository",
        "codesearchnet",
        (
            Form((File("*/final/jsonl/train/*.jsonl.gz", f"{_HUB}/code-search-net/code_search_net/resolve/"
                       "fdc6a9e39575768c27eb8a2a5f702bf846eb4759/data/LANGUAGE.zip (unpacked)"),),
                 (File("*/final/jsonl/test/*.jsonl.gz"),)),
            Form((File("*/train-*.parquet", f"{_HUB}/code-search-net/code_search_net/resolve/{_CSN}/LANGUAGE/"),),
                 (File("*/test-*.parquet"),)),
        ),
        "huggingface.co/datasets/code-search-net/code_search_net",
        "fdc6a9e39575768c27eb8a2a5f702bf846eb4759",
        Hub("code-search-net/code_search_net", _CSN, ("go", "java", "javascript", "php", "python", "ruby"),
            test="test"),
        rows=1_880_853,
        clients=6,
        columns={"instruction": "docstring", "input": "language", "output": "code", "category": "language"},
        split={"kind": "by_category", "clients": 6},
        kind="alpaca",
        convert="code_search_net",
    ),
    NamedSet(
        "alpaca",
        "instructions made by a model (Stanford Alpaca)",
        "CC BY-NC 4.0",
        "alpaca",
        (
            Form((File("alpaca_data.json",
                       f"{_GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json",
                       52_002, "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419"),)),
            Form((File("train-00000-of-00001-a09b74b3ef9c3b56.parquet",
                       f"{_HUB}/tatsu-lab/alpaca/resolve/dce01c9b08f87459cf36a430d809084718273017/data/"
                       "train-00000-of-00001-a09b74b3ef9c3b56.parquet",
                       52_002, "06391b656a06fd3fb9d213160ef2398796c3b7f3dc75ef1e3ced30d461517073"),)),
        ),
        "github.com/tatsu-lab/stanford_alpaca",
        "761dc5bfbdeeffa89b8bff5d038781a4055f796a",
        Hub("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017"),
        rows=52_002,
        split={"kind": "iid"},
        kind="alpaca",
    ),
    NamedSet(
        "alpaca-cleaned",
        "Stanford Alpaca with its known faults mended",
        "CC BY 4.0",
        "alpaca-cleaned",
        (
            Form((File("alpaca_data_cleaned.json",
                       f"{_HUB}/yahma/alpaca-cleaned/resolve/12567cabf869d7c92e573c7c783905fc160e9639/"
                       "alpaca_data_cleaned.json", 51_760),)),
        ),
        "huggingface.co/datasets/yahma/alpaca-cleaned",
        "12567cabf869d7c92e573c7c783905fc160e9639",
        Hub("yahma/alpaca-cleaned", "12567cabf869d7c92e573c7c783905fc160e9639"),
        rows=51_760,
        split={"kind": "iid"},
        kind="alpaca",
    ),
    NamedSet(
        "fingpt",
        "the sentiment of financial news (FlowerTune, finance)",
        "MIT (its leaderboard copy)",
        "fingpt",
        (
            Form((File("train-00000-of-00001-dabab110260ac909.parquet",
                       f"{_HUB}/FinGPT/fingpt-sentiment-train/resolve/a2701f2155c1371ba38b92a2c41e8b0c0fca7614/data/"
                       "train-00000-of-00001-dabab110260ac909.parquet", 76_772),)),
        ),
        "huggingface.co/datasets/FinGPT/fingpt-sentiment-train (flwrlabs/fingpt-sentiment-train is its copy)",
        "a2701f2155c1371ba38b92a2c41e8b0c0fca7614",
        Hub("FinGPT/fingpt-sentiment-train", "a2701f2155c1371ba38b92a2c41e8b0c0fca7614"),
        rows=76_772,
        clients=50,
        split={"kind": "iid", "clients": 50},
        kind="alpaca",
    ),
    NamedSet(
        "medalpaca",
        "medical flashcards (FlowerTune, medicine)",
        "CC, unspecified",
        "medalpaca",
        (
            Form((File("medical_meadow_wikidoc_medical_flashcards.json",
                       f"{_HUB}/medalpaca/medical_meadow_medical_flashcards/resolve/"
                       "7597b32036d67c731cb91bae4f49717fcfe5d5f0/medical_meadow_wikidoc_medical_flashcards.json",
                       33_955),)),
        ),
        "huggingface.co/datasets/medalpaca/medical_meadow_medical_flashcards "
        "(flwrlabs/medical-meadow-medical-flashcards is its copy)",
        "7597b32036d67c731cb91bae4f49717fcfe5d5f0",
        Hub("medalpaca/medical_meadow_medical_flashcards", "7597b32036d67c731cb91bae4f49717fcfe5d5f0"),
        rows=33_955,
        clients=20,
        split={"kind": "iid", "clients": 20},
        kind="alpaca",
    ),
    NamedSet(
        "code-alpaca-20k",
        "instructions for code (FlowerTune, code)",
        "Apache 2.0",
        "code",
        (
            Form((File("code_alpaca_20k.json",
                       f"{_HUB}/flwrlabs/code-alpaca-20k/resolve/993cf40c2e806a2641f388fb4026f30c4c73dc97/"
                       "code_alpaca_20k.json"),)),
        ),
        "huggingface.co/datasets/flwrlabs/code-alpaca-20k",
        "993cf40c2e806a2641f388fb4026f30c4c73dc97",
        Hub("flwrlabs/code-alpaca-20k", "993cf40c2e806a2641f388fb4026f30c4c73dc97"),
        clients=10,
        split={"kind": "iid", "clients": 10},
        kind="alpaca",
    ),
    NamedSet(
        "alpaca-gpt4",
        "Alpaca's instructions answered by GPT-4 (FlowerTune, general)",
        "CC BY-NC 4.0",
        "alpaca-gpt4",
        (
            Form((File("train-00000-of-00001-6ef3991c06080e14.parquet",
                       f"{_HUB}/vicgalle/alpaca-gpt4/resolve/2d4198467f90eae5c69f5cfdda23470cfad5fac2/data/"
                       "train-00000-of-00001-6ef3991c06080e14.parquet", 52_002),)),
        ),
        "huggingface.co/datasets/vicgalle/alpaca-gpt4 (flwrlabs/alpaca-gpt4 is its copy)",
        "2d4198467f90eae5c69f5cfdda23470cfad5fac2",
        Hub("vicgalle/alpaca-gpt4", "2d4198467f90eae5c69f5cfdda23470cfad5fac2"),
        rows=52_002,
        clients=20,
        split={"kind": "iid", "clients": 20},
        kind="alpaca",
    ),
    NamedSet(
        "tinyshakespeare",
        "plays; each speaker is a natural client",
        "public domain",
        "text",
        (
            Form((File("tinyshakespeare.txt",
                       f"{_GITHUB}/karpathy/char-rnn/370cbcd448eb7daf32f21a6be560b70e0b33c4e3/data/tinyshakespeare/"
                       "input.txt",
                       7_222, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1_115_394),)),
        ),
        "github.com/karpathy/char-rnn",
        "370cbcd448eb7daf32f21a6be560b70e0b33c4e3",
        rows=7_222,
        clients=98,
        columns={"text": "text", "category": "speaker"},
        split={"kind": "by_column", "column": "speaker", "min_rows": 20},
        kind="completion",
        parse="speeches",
    ),
    NamedSet(
        "hh-harmless",
        "preference pairs: which of two answers does less harm (texts are offensive)",
        "MIT",
        "preference",
        (
            Form(
                (File("hh_harmless_base_train.jsonl.gz", f"{_HH}/train.jsonl.gz", 42_537,
                      "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217"),),
                (File("hh_harmless_base_test.jsonl.gz", f"{_HH}/test.jsonl.gz", 2_312,
                      "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03", 742_801),),
            ),
        ),
        "huggingface.co/datasets/Anthropic/hh-rlhf, folder harmless-base",
        "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
        Hub("Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa", data_dir="harmless-base", test="test"),
        rows=42_537,
        split={"kind": "iid"},
        kind="preference",
    ),
    NamedSet(
        "dpo-en-demo",
        "preference pairs: conversations with two answers",
        "Apache 2.0",
        "preference",
        (
            Form((File("llamafactory_dpo_en_demo.json",
                       f"{_GITHUB}/hiyouga/LLaMA-Factory/main/data/dpo_en_demo.json", 300,
                       "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3", 1_575_286),)),
        ),
        "github.com/hiyouga/LLaMA-Factory, data/dpo_en_demo.json",
        rows=300,
        split={"kind": "iid"},
        kind="preference",
    ),
)  # fmt: skip

CATALOG: Mapping[str, NamedSet] = {one.name: one for one in _SETS}


def find_set(name: str) -> NamedSet:
    """The set of this name.

    Raises:
        UserError: there is none.
    """
    if name in CATALOG:
        return CATALOG[name]
    raise UserError(
        f"data.name {name!r}: no such data set{suggest(name, [*CATALOG, LOCAL])}",
        hint="fedloom ls data    # a file or folder of yours: data.path alone",
        code="data.name",
    )
