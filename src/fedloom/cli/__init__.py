"""The command line: one file per command or small group. Nothing heavy is imported before a command needs it."""

from fedloom.cli.app import main

__all__ = ["main"]
