"""`python -m vesicle`, and the program `vesicle`.

Little is imported before there is somebody to take an interruption.
"""

import os
import sys


def main() -> int:
    """Run the process's command line, and give its exit status."""
    try:
        from vesicle.cli import main as run

        return run()
    except KeyboardInterrupt:
        # While the command line itself was being imported, or had ended.
        from contextlib import suppress

        with suppress(OSError):  # standard error may be closed
            os.write(2, b"\nvesicle: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
