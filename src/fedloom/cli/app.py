"""The `fedloom` program: its commands, and the one place where errors become messages and exit codes.

Exit codes: 0 done, 1 run failed, 2 bad input, 3 timed out or too few clients, 4 refused by a policy, 130 stopped by
Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from fedloom.cli import cache, compare, environment, evaluate, explain, initialise, look, models, recipes, run, watch
from fedloom.cli.common import be_quiet, hear_warnings, out, render, say, wait_asleep
from fedloom.errors import FedloomError, RunError, UserError, suggest

__all__ = ["app", "main"]

STOPPED = 130  # 128 + SIGINT, as shells have it

# Typer's own classes for a wrong command line; which package they live in differs between its versions.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _Group(TyperGroup):
    """The commands in the order in which they are needed; an unknown one names the nearest."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise UserError(
                f"no such command: {args[0]}{suggest(args[0], self.commands)}", "fedloom --help", "cli.command"
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    rich_markup_mode=None,  # plain help: drawing boxes would take longer than all the rest of --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def _fedloom(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="With any command: show tracebacks."),
) -> None:
    """Federated fine-tuning of language models: many data holders, one adapter, no data leaves home."""
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as version_of

        try:
            out(f"fedloom {version_of('fedloom')}")
        except PackageNotFoundError:
            out("fedloom (not installed)")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise UserError(
            "which command? `fedloom demo` shows what this is for; `fedloom init DATA --model M` starts your own",
            hint="fedloom --help",
            code="cli.command",
        )


for _module in (run, look, recipes, explain, initialise, evaluate, models, watch, compare, cache, environment):
    _module.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code. Everything that goes wrong becomes a message here."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or bool(os.environ.get("FEDLOOM_DEBUG"))
    words = [word for word in words if word != "--debug"]
    be_quiet()
    wait_asleep()
    hear_warnings()
    try:
        code = app(args=words, prog_name="fedloom", standalone_mode=False)
        sys.stdout.flush()
        if code == STOPPED:  # typer makes an exit code of the first Ctrl-C
            say("fedloom: stopped")
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            traceback.print_exc()
        say("fedloom: stopped")
        return STOPPED
    except FedloomError as error:
        return _failed(error, debug)
    except _UsageError as error:
        return _failed(_wrong_usage(error), debug)
    except BrokenPipeError:  # `fedloom ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _failed(_wrong_system(error), debug)
    except MemoryError as error:
        return _failed(
            RunError(
                f"out of memory{f': {error}' if str(error) else ''}",
                "fewer at once: runtime.clients_per_batch=1 client.per_device_train_batch_size=1 data.max_length=512",
                "run.memory",
            ),
            debug,
        )
    except Exception as error:
        return _failed(
            RunError(
                f"unexpected {type(error).__name__}: {error}",
                "this is a mistake in fedloom; --debug shows where, and an issue with it is welcome",
                "bug",
            ),
            debug,
        )


def _failed(error: FedloomError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stdout.flush()
    say(render(error))
    return error.exit_code


def _wrong_usage(error: Any) -> UserError:
    command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "fedloom"
    possible = getattr(error, "possibilities", None)
    message = str(error.format_message()).rstrip(".")
    near = f", did you mean {sorted(possible)[0]}?" if possible and "Did you mean" not in message else ""
    return UserError(f"{message[:1].lower()}{message[1:]}{near}", f"{command} --help", "cli.usage")


def _wrong_system(error: OSError) -> FedloomError:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"{where}no space left to write", "free some space, then go on with --resume", "run.disk_full")
    if error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EEXIST):
        return UserError(f"{where}{error.strerror}", code="input.file")
    return RunError(f"{where}{error.strerror or error}", code="run.system")
