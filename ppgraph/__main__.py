"""`python -m ppgraph`: the command line."""

import sys

from ppgraph.cli import main

if __name__ == "__main__":
    sys.exit(main())
