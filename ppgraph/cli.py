"""The command line: `ppgraph COMMAND ...`, also as `python -m ppgraph`.

Each command is a module with `add_arguments(parser)`, which must not import torch (`--help` answers at once), and
`run(args)`, which returns the text for stdout; everything else goes to stderr. Exit codes: 0 done, 1 an error that is
said in one line, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from ppgraph import PPGraphError, __version__

# Name: where it is, what it does.
COMMANDS = {
    "explain": ("ppgraph.commands.explain", "say what pruning would do to a model, and why not to some blocks"),
    "bench": ("ppgraph.commands.bench", "time a model's prefill, compiled, dense and pruned"),
    "calibrate": ("ppgraph.commands.calibrate", "fill a history from a text and save it"),
    "eval": ("ppgraph.commands.evaluate", "compare methods on a text: perplexity, FLOPs, time, zero-shot tasks"),
    "demo": ("ppgraph.commands.demo", "prune a small real model: perplexity, time, what was pruned"),
}

EPILOG = """\
MODEL is a folder, a .gguf file, a hub name, or config:FAMILY for a small random model.

  ppgraph explain config:llama
  ppgraph explain ./my-model --ratio 0.2 --dump graphs     # then open graphs/index.html
  ppgraph bench config:llama --batch 20 --length 256 --json
  ppgraph calibrate ./my-model --text c4.txt --out history
  ppgraph COMMAND --help
"""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Examples stay as they are, and options of usual length have their help on the same line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser_for(given).parse_args(given)
    logging.basicConfig(format="ppgraph: %(message)s", level=logging.INFO if args.verbose else logging.ERROR)
    try:
        with warnings.catch_warnings():
            if not args.verbose:
                warnings.simplefilter("ignore")  # of torch and transformers, about their own code
            text = importlib.import_module(COMMANDS[args.command][0]).run(args)
        print(text, flush=True)
    except PPGraphError as error:
        print(f"ppgraph: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `ppgraph explain ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("ppgraph: interrupted", file=sys.stderr)
        return 130
    return 0


def parser_for(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the command that `arguments` name gets its own arguments."""
    parser = argparse.ArgumentParser(
        prog="ppgraph",
        description="Probe Pruning for language models, as a transformation of their torch.compile graphs.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ppgraph {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = next((argument for argument in arguments if argument in COMMANDS), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=HelpFormatter,
        )
        command.add_argument("-v", "--verbose", action="store_true", help="say on stderr what the passes do")
        if name == named:
            importlib.import_module(module).add_arguments(command)
    return parser
