"""`python -m edgellama` is the `edgellama` command."""

import sys

from edgellama.cli import main

if __name__ == "__main__":
    sys.exit(main())
