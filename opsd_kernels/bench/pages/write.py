"""Write docs/performance.md, docs/scaling.md, and the generated blocks of README and other pages.

Measured tables come from the reports under benchmarks/results/<machine>/, those of docs/sizing.md and
docs/design/projection.md from the planner. Each measured table carries the machine, versions, commit and
command of its report. `make docs` runs this module; a test fails if a page is stale.
"""

from __future__ import annotations

from pathlib import Path

from . import integrations, projection
from .performance import performance, readme_block
from .scaling.page import page as scaling_page
from .sizing import plans_block

ROOT = Path(__file__).resolve().parents[3]
RESULTS = Path("benchmarks/results")
README, SIZING = Path("README.md"), Path("docs/sizing.md")
PROJECTION = Path("docs/design/projection.md")
PERFORMANCE, SCALING = Path("docs/performance.md"), Path("docs/scaling.md")
MARKS = {
    README: ("<!-- performance -->", "<!-- /performance -->"),
    SIZING: ("<!-- plans -->", "<!-- /plans -->"),
    PROJECTION: ("<!-- forms -->", "<!-- /forms -->"),
    **integrations.MARKS,
}


def with_block(text: str, block: str, page: Path = README) -> str:
    """Return `text` with `block` between the page's marks. Raises ValueError for text without marks."""
    start, stop = MARKS[page]
    before, mark, rest = text.partition(start)
    _, end, after = rest.partition(stop)
    if not (mark and end):
        raise ValueError(f"{page}: expected the marks {start} and {stop}, got none")
    return f"{before}{start}\n{block}\n{stop}{after}"


def main(root: Path = ROOT) -> None:
    """Write all pages and blocks below `root`."""
    results = root / RESULTS
    (root / PERFORMANCE).write_text(performance(results))
    (root / SCALING).write_text(scaling_page(results))
    blocks = {
        README: readme_block(results),
        SIZING: plans_block(),
        PROJECTION: projection.block(),
        **integrations.blocks(results),
    }
    for page, block in blocks.items():
        (root / page).write_text(with_block((root / page).read_text(), block, page))
