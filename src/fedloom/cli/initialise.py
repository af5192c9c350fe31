"""`init`: a commented recipe from a data file, or from another tool's settings."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.cli.common import WORDS, out, relative, say
from fedloom.cli.recipes import schema_comment, write_new
from fedloom.errors import UserError

if TYPE_CHECKING:
    from fedloom.data.catalog import NamedSet
    from fedloom.data.rows import Source
    from fedloom.study.load import Override

__all__ = ["put", "recipe_for", "register"]

MOST_CLIENTS = 50  # more categories than this are seldom meant as one client each
MOST_LOOKED_AT = 20_000  # rows, for how long they are
USUAL_LENGTH = 1024
CHARACTERS_PER_TOKEN = 3  # on the safe side for English with a usual vocabulary


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("init", context_settings=WORDS)(init)


def init(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA] [KEY=VALUE]...",
            show_default=False,
            help="A file, a folder, a hub id, builtin:NAME or a name of `ls data`; and keys of the recipe.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="M", help="A hub id, a folder, or builtin.", show_default=False),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Settings of TRL, Axolotl or LLaMA-Factory.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: named after the data.", show_default=False),
    ] = None,
) -> None:
    """Write a commented recipe for your data, or from an Axolotl file."""
    from fedloom.study.load import split_words, validate_text

    overrides, names = split_words(words or [])
    if len(names) > 1:
        raise UserError(
            f"init takes one data file, and there are {len(names)}: {', '.join(names)}", code="cli.too_many"
        )
    data = names[0] if names else None
    if source is None and data is None:
        raise UserError("init needs a data file", "fedloom init DATA --model M", "cli.missing_argument")
    target = output or Path(f"fed_{source.stem}.yaml" if source is not None else f"{_name_of(data or '')}.yaml")
    _not_there(target)
    if source is not None:
        text, notes = _translated(source, data, model)
    else:
        text, notes = _inspected(data or "", model, target.stem, overrides)
    for override in overrides:
        text = put(text, override.key, override.value)
    text = f"{schema_comment(target)}\n{text}"
    validate_text(text, source=str(target), name=target.stem)
    write_new(target, text)
    for note in notes:
        say(note)
    out(relative(target))
    say(f"next: fedloom preview {relative(target)}    # then fedloom run {relative(target)}, with --smoke first")


def _not_there(target: Path) -> None:
    """Said before the data is read, which may take a while."""
    if target.exists():
        raise UserError(f"{target} exists already; nothing was written", "another name: --output FILE", "file.exists")


def _name_of(data: str) -> str:
    stem = Path(data.rstrip("/")).name.split(".")[0] if not data.startswith("builtin:") else data.partition(":")[2]
    return re.sub(r"[^\w-]+", "_", stem).strip("_") or "recipe"


def _translated(source: Path, data: str | None, model: str | None) -> tuple[str, list[str]]:
    from fedloom.study.foreign import translate
    from fedloom.study.yaml_text import yaml_value

    translated = translate(source)
    text = translated.text
    for key, value in (("model", model), ("data.path", data)):
        text = text if value is None else put(text, key, yaml_value(value))
    notes = [f"{source}: read as {translated.tool}"]
    notes += [f"  {theirs} -> {ours}" for theirs, ours in translated.taken]
    if translated.dropped:
        notes.append(f"dropped {len(translated.dropped)}:")
        notes += [f"  {key}: {value}    {reason}" for key, value, reason in translated.dropped]
    return text, notes


def put(text: str, name: str, value: str) -> str:
    """The recipe's text with this key set to a value (as YAML), in place of the one it has or where it belongs."""
    from fedloom.study.load import find_key

    if name.startswith("data.columns."):
        there = re.search(r"(?m)^  columns: \{(.+)\}", text)
        columns = dict(pair.split(": ", 1) for pair in there[1].split(", ")) if there else {}
        columns[name.removeprefix("data.columns.")] = value
        name, value = "data.columns", f"{{{', '.join(f'{ours}: {theirs}' for ours, theirs in columns.items())}}}"
    block, _, leaf = find_key(name).rpartition(".")
    line = f"{'  ' if block else ''}{leaf}: {value}"
    start, end = 0, len(text)
    if block:
        header = re.search(rf"(?m)^{block}:.*\n", text)
        if header is None:
            return f"{text}{block}:\n{line}\n"
        start = header.end()
        following = re.compile(r"(?m)^\S").search(text, start)
        end = following.start() if following else len(text)
    pattern = rf"(?m)^{'  ' if block else ''}{leaf}:.*$"
    part, found = re.subn(pattern, lambda _: line, text[start:end], count=1)
    if not found:
        part = f"{line}\n{part}" if block else f"{part}{line}\n"
    return text[:start] + part + text[end:]


def _inspected(data: str, model: str | None, name: str, overrides: Sequence[Override]) -> tuple[str, list[str]]:
    from fedloom.data.catalog import CATALOG
    from fedloom.data.rows import read

    if model is None:
        raise UserError(
            "init needs to know the model",
            f"fedloom init {data} --model FOLDER-OR-HUB-ID    # builtin is the small one that comes with fedloom",
            "cli.missing_argument",
        )
    kind = next((override.value for override in overrides if override.key in ("data.type", "type")), "auto")
    columns = {
        override.key.removeprefix("data.columns."): override.value
        for override in overrides
        if override.key.startswith("data.columns.")
    }
    if data in CATALOG:
        return _named(data, model, name, overrides)
    tests = _test_file(Path(data))
    rows = read(data, type=kind, columns=columns, exclude=[] if tests is None else [str(tests)])
    return recipe_for(rows, data, model, name, tests), [f"{data}: {rows.said}", *rows.notes]


def _named(data: str, model: str, name: str, overrides: Sequence[Override]) -> tuple[str, list[str]]:
    """A recipe for a set of the catalogue, which brings its columns, its split and perhaps its test rows."""
    from fedloom.data.catalog import find_set
    from fedloom.data.sources import sources_of
    from fedloom.study.blocks import DataRecipe

    copy = next((override.value for override in overrides if override.key in ("data.path", "path")), "")
    settings = DataRecipe(name=data, path=copy)
    rows, tests = sources_of(settings, 42)
    entry = find_set(data)
    notes = [f"{rows.name}: {rows.said}; {entry.licence}", *rows.notes]
    if rows.kind == "preference":
        notes.append(
            "pairs of answers: a run compares them by DPO; data.columns.completion=chosen imitates the chosen ones"
        )
    return recipe_for(rows, data, model, name, named=entry, own_tests=None if tests is None else len(tests.rows)), notes


def _test_file(folder: Path) -> Path | None:
    """The one file of a folder that says it is for testing (test.jsonl, global_test.json), if others are beside it."""
    if not folder.is_dir():
        return None
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith((".", "_"))]
    found = [file for file in files if re.search(r"(?:^|[_-])test(?:[_-]|$)", file.name.split(".")[0].lower())]
    return found[0] if len(found) == 1 and len(files) > 1 else None


def recipe_for(
    source: Source,
    data: str,
    model: str,
    name: str,
    tests: Path | None = None,
    *,
    named: NamedSet | None = None,
    own_tests: int | None = None,
) -> str:
    """A commented recipe for what was read, without its first line.

    Args:
        source: what `fedloom.data.rows.read` made of the data.
        data: the path as it was given.
        model: hub id, folder or builtin.
        name: of the recipe.
        tests: a file of test rows beside the others, which `source` leaves out.
        named: the set of the catalogue that `data` is the name of, and `own_tests` its number of test rows.
    """
    from fedloom.study.yaml_text import yaml_value

    builtin = data.startswith("builtin:")
    categories = Counter(source.rows.counts("category"))
    split, clients = _split(source, categories, builtin) if named is None else _split_of(named, categories)
    length, length_note = _length(source, model)
    rows_per_client = max(1, len(source.rows) // max(1, clients))
    batch = 4 if rows_per_client >= 8 else 1
    steps = max(1, min(30, round(0.85 * rows_per_client / batch)))
    lines = [
        f"# {source.said}",
        f"model: {yaml_value(model)}",
        "dtype: auto                     # bfloat16 where the hardware has it",
        "",
        "data:",
        f"  path: {yaml_value(data)}" if named is None else f"  name: {data}".ljust(32) + f"# {named.licence}",
    ]
    if not builtin and named is None:
        lines.append(f"  type: {source.kind}" + _columns_note(source))
        renamed = {field: column for field, column in source.columns.items() if field != column}
        if renamed:
            lines.append(f"  columns: {yaml_value(dict(renamed))}")
    lines.append(f"  max_length: {length}".ljust(32) + f"# tokens; {length_note}")
    if not builtin:
        lines.append(f"  val_set_size: {_size(0.05, rows_per_client, clients)}".ljust(32) + "# a share, or rows in all")
        if own_tests is not None:
            lines.append(
                f"  # tests are the {own_tests:,} rows that are published for it; test_set_size: 0.1 would do without"
            )
        elif tests is None:
            lines.append(f"  test_set_size: {_size(0.1, rows_per_client, clients)}".ljust(32) + "# or test_path: FILE")
        else:
            lines.append(f"  test_path: {yaml_value(str(tests))}    # left out of the clients' rows")
    lines += [
        "",
        *split,
        "",
        "adapter:",
        "  kind: lora",
        "  lora_r: 8",
        "  lora_alpha: 16",
        "  lora_target_modules: auto     # PEFT's choice for the architecture; or all-linear, or [q_proj, v_proj]",
        "",
        "method: fedavg                  # fedprox, fedavgm, fedadam, fedyogi, fedadagrad: fedloom ls methods",
        "rounds: 10",
        "clients_per_round: null         # all; a whole number, or a share below 1",
        f"local_steps: {steps}".ljust(32) + f"# per client and round; about {rows_per_client:,} rows a client",
        "",
        "client:",
        "  learning_rate: 2.0e-04",
        "  optim: adamw",
        f"  per_device_train_batch_size: {batch}",
        "  lr_scheduler_type: cosine     # over all rounds",
        "",
        "arms: [base, federated]         # add local and global to compare with",
        "evaluate:",
        "  eval_rounds: 5                # 0: only at the end",
    ]
    lines += [] if builtin else ["  limit: 50                     # test rows that are scored, per client"]
    lines += ["seed: 42", f"output_dir: {yaml_value(f'runs/{name}')}"]
    return "\n".join(lines) + "\n"


def _size(share: float, rows: int, clients: int) -> str:
    """A share of each client's `rows`, or about one row per client where the share would round to none."""
    return f"{share}" if share * rows >= 0.5 else str(clients)


def _columns_note(source: Source) -> str:
    there = list(dict.fromkeys(name for row in source.rows[:100] for name in row.get("columns", {})))
    shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    return f"{' ' * max(1, 24 - len(source.kind))}# the file's columns: {shown}" if there else ""


def _split(source: Source, categories: Counter[str], builtin: bool) -> tuple[list[str], int]:
    """The block of the split, and how many clients it makes."""
    if builtin:
        clients = len(source.natural or {}) or 1
        return ["split:", "  kind: natural".ljust(32) + f"# the task brings {clients} clients"], clients
    if len(source.files) > 1:
        return [
            "split:",
            "  kind: files".ljust(32) + f"# {len(source.files)} files, one client each",
        ], len(source.files)
    if 2 <= len(categories) <= MOST_CLIENTS and min(categories.values()) >= 4:
        shown = ", ".join(f"{name} {count:,}" for name, count in categories.most_common(8))
        more = f" and {len(categories) - 8} more" if len(categories) > 8 else ""
        return [
            f"# categories: {shown}{more}",
            "split:",
            "  kind: by_category             # one client per category; or iid, dirichlet with alpha: 0.5",
            f"  clients: {len(categories)}",
        ], len(categories)
    clients = max(1, min(4, len(source.rows) // 4))
    return [
        "split:",
        "  kind: iid                     # dealt at random; or by_column with column: NAME, dirichlet with alpha: 0.5",
        f"  clients: {clients}",
    ], clients


def _split_of(named: NamedSet, categories: Counter[str]) -> tuple[list[str], int]:
    """The split that belongs to a named set, and about how many clients it makes."""
    from fedloom.study.yaml_text import yaml_value

    kind, *others = named.split.items()
    lines = ["split:", f"  kind: {kind[1]}".ljust(32) + f"# the set's own: fedloom ls data {named.name}"]
    lines += [f"  {key}: {yaml_value(value)}" for key, value in others]
    if kind[1] == "iid" and named.clients is None:
        lines.append("  clients: 4")
    if kind[1] == "iid":
        return lines, named.split.get("clients", 4)
    held = sum(count >= named.split.get("min_rows", 1) for count in categories.values())
    return lines, max(1, min(held, named.split.get("clients", held)))


def _length(source: Source, model: str) -> tuple[int, str]:
    """A limit in tokens that few rows reach, as far as characters tell, within what the model takes."""
    step = -(-len(source.rows) // MOST_LOOKED_AT)  # of a large file, rows from all over it
    sizes = sorted(map(_characters, source.rows if step <= 1 else source.rows[::step]))
    at_95 = sizes[int(0.95 * (len(sizes) - 1))]
    wanted = USUAL_LENGTH
    note = f"fedloom preview counts; 95 % of rows are within {at_95:,} characters"
    most = _context_of(model)
    if most is not None and most < wanted:
        return most, f"the model takes {most}; {note}"
    while wanted * CHARACTERS_PER_TOKEN < at_95 and wanted < 8192 and (most is None or wanted * 2 <= most):
        wanted *= 2
    return wanted, note


def _characters(row: Any) -> int:
    texts: Sequence[str] = [
        str(row.get(key, "")) for key in ("instruction", "input", "output", "prompt", "completion", "text")
    ]
    answers = [row[key] for key in ("chosen", "rejected") if key in row]
    longest = max((len(one) if isinstance(one, str) else _said(one) for one in answers), default=0)
    return sum(map(len, texts)) + _said(row.get("messages", [])) + longest


def _said(messages: Sequence[Any]) -> int:
    return sum(len(str(message.get("content", ""))) for message in messages)


def _context_of(model: str) -> int | None:
    """The model's own limit, where its config lies at hand."""
    if model == "builtin":
        from importlib.resources import files

        config = Path(str(files("fedloom.models"))) / "builtin_base" / "config.json"
    else:
        config = Path(model) / "config.json"
    try:
        value = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = value.get("max_position_embeddings") or value.get("n_positions") if isinstance(value, dict) else None
    return found if isinstance(found, int) and found >= 8 else None
