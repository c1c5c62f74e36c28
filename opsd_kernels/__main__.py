"""The `opsd` command and `python -m opsd_kernels`.

`opsd doctor` runs without the packages that the other commands need.
"""

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command; `doctor` without typer or rich prints plain text."""
    if sys.argv[1:] == ["doctor"] and not (find_spec("typer") and find_spec("rich")):
        from .doctor import print_plainly

        print_plainly()
        return
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
