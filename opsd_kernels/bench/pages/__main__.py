"""`python -m opsd_kernels.bench.pages` writes the pages generated from reports and the planner."""

from .write import main

if __name__ == "__main__":
    main()
