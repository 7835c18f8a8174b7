"""The command line: `main` is the program `penstock`."""

from penstock.cli.commands import main

__all__ = ["main"]
