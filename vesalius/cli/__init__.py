"""The command line: `vesalius --help`."""

from vesalius.cli.app import main

__all__ = ["main"]
