"""`chat`, `generate`, `export`: what to do with a run that is done."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedloom.cli.common import FormatOption, OutputFormat, out, print_data, relative, say
from fedloom.errors import UserError

if TYPE_CHECKING:
    from fedloom.evaluate.generate import Sampling

__all__ = ["Which", "register", "which_checkpoint"]

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a PEFT adapter folder.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="M", help="The base, where it now lies elsewhere.", show_default=False),
]
NewTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="Longest answer. Default: the recipe's.", show_default=False),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens of this total probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw among so many tokens; 0 is all.")]
Seed = Annotated[int, typer.Option(help="Of the draws.")]


class Checkpoint(enum.StrEnum):
    """A state of a run."""

    best = "best"
    last = "last"


Which = Annotated[
    Checkpoint | None,
    typer.Option(
        "--checkpoint", help="A checkpoint in place of adapter/; the run may be unfinished.", show_default=False
    ),
]


class ExportFormat(enum.StrEnum):
    """What `export` writes."""

    lora = "lora"
    merged = "merged"


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(chat)
    app.command()(generate)
    app.command()(export)


def _sampling(temperature: float, top_p: float, top_k: int, seed: int) -> Sampling | None:
    from fedloom.evaluate.generate import Sampling

    if temperature == 0 and (top_p != 1.0 or top_k != 0):
        raise UserError(
            "--top-p and --top-k have no effect at temperature 0, which takes the most likely token",
            "--temperature 0.7",
            "generate.sampling",
        )
    return None if temperature == 0 else Sampling(temperature, top_p, top_k, seed)


def generate(
    run: Run,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="- reads standard input.")] = None,
    input_text: Annotated[str, typer.Option("--input", help="The input that goes with an instruction.")] = "",
    max_new_tokens: NewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    model: Model = None,
    checkpoint: Which = None,
    output: FormatOption = OutputFormat.text,
) -> None:
    """Answer one or more prompts."""
    if not prompts:
        raise UserError("generate needs a prompt", f'fedloom generate {run} "PROMPT"', "cli.missing_argument")
    sampling = _sampling(temperature, top_p, top_k, seed)
    from fedloom.study.tuned import open_tuned

    tuned = open_tuned(run, model=model, checkpoint=which_checkpoint(checkpoint))
    answers = []
    for prompt in prompts:
        text = sys.stdin.read() if prompt == "-" else prompt
        turn = [{"role": "user", "content": text}]
        answer = tuned.answer(turn, input=input_text, max_new_tokens=max_new_tokens, sampling=sampling)
        answers.append({"prompt": text, "completion": answer})
        if output is OutputFormat.text:
            out(answer)
    if output is OutputFormat.json:
        print_data(answers)


def chat(
    run: Run,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    model: Model = None,
    checkpoint: Which = None,
) -> None:
    """Talk to the tuned model; an empty line or Ctrl-D ends."""
    sampling = _sampling(temperature, top_p, top_k, seed)
    from dataclasses import replace

    from fedloom.study.tuned import open_tuned

    tuned = open_tuned(run, model=model, checkpoint=which_checkpoint(checkpoint))
    say(f"{run}: {tuned.base.name}, trained on {tuned.kind} rows; /new forgets, an empty line ends")
    if not tuned.remembers:
        say("each question stands by itself: that is what the model was trained on")
    history: list[dict[str, str]] = []
    turn = 0
    while True:
        text = _ask()
        if text is None or not text.strip():
            return
        if text.strip() == "/new":
            history = []
            continue
        if not tuned.remembers:
            history = []
        history.append({"role": "user", "content": text})
        # Each answer has draws of its own, and the same ones when the talk is repeated.
        own = None if sampling is None else replace(sampling, seed=sampling.seed + turn)
        answer = tuned.answer(history, max_new_tokens=max_new_tokens, sampling=own, on_text=_write)
        _write("\n")
        history.append({"role": "assistant", "content": answer})
        turn += 1


def which_checkpoint(checkpoint: Checkpoint | None) -> Literal["best", "last"] | None:
    return None if checkpoint is None else "best" if checkpoint is Checkpoint.best else "last"


def _ask() -> str | None:
    """A line of standard input; the sign before it only where a person types."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def export(
    run: Run,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that is not there yet.")],
    kind: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="lora: a PEFT adapter folder, of whatever kind; merged: a model with it in its weights. "
            "A run that trained the model's own weights has a model only.",
        ),
    ] = ExportFormat.lora,
    model: Model = None,
    checkpoint: Which = None,
) -> None:
    """Write the adapter, or the model with it merged in."""
    from fedloom.study.tuned import export_lora, export_merged

    if kind is ExportFormat.lora:
        export_lora(run, destination, model=model, checkpoint=which_checkpoint(checkpoint))
    else:
        difference = export_merged(run, destination, model=model, checkpoint=which_checkpoint(checkpoint))
        say(f"logits differ from the run's by at most {difference:.1e} of the largest")
    out(relative(destination))
