"""`python -m opsd_kernels` is the `opsd` command."""

from .cli import main

if __name__ == "__main__":
    main()
