"""The command line: parse, call the library, print. Torch is imported only once a command runs."""

from transquant.cli.app import main

__all__ = ["main"]
