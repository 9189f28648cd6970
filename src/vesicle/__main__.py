"""`python -m vesicle`."""

import sys

from vesicle.cli import main

if __name__ == "__main__":
    sys.exit(main())
