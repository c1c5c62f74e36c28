"""Run the cells of `opsd reproduce variance` that need a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Imported by the child process; here too, so that its modules count in the digest of the cells.
from opsd_kernels.train.studies import cells
from opsd_kernels.train.studies.lab import Result

CHILD = (
    f"import json, sys; from pathlib import Path; from {cells.__name__} import train; "
    "found = [train(config, Path(folder)) for config, folder in json.loads(sys.stdin.read())]; "
    "Path(sys.argv[1]).write_text(json.dumps(found))"
)


def elsewhere(arguments: dict[str, Any], folder: Path) -> Result:
    """Train in a process that uses another set of torch's kernels; with `warm_too` from the warm start on."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": arguments["capability"]}
    if arguments["warm_too"]:
        environment["OPSD_CACHE"] = str(folder / "cache")
    jobs = []
    for place, config in enumerate(arguments["configs"]):
        (folder / str(place)).mkdir()
        jobs.append((config, str(folder / str(place))))
    out = folder / "found.json"
    subprocess.run(
        [sys.executable, "-c", CHILD, str(out)],
        input=json.dumps(jobs),
        text=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return {"runs": json.loads(out.read_text())}
