"""Quickstart: a real model, dense and pruned at 20 and 40 %, with perplexity, time, speedup and what was pruned.

    python examples/quickstart.py                        # SmolLM2-135M, downloaded once (93 MB); so does `make demo`
    python examples/quickstart.py MODEL --text FILE      # a folder, .gguf file or hub name; a text of yours

This is the command `ppgraph demo`, which an installed ppgraph has too; `ppgraph/commands/demo.py` is its code.
"""

from __future__ import annotations

import sys

from ppgraph.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
