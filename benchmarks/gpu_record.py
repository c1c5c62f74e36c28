"""Write the result of the correctness steps of gpu_check.sh to opsd_kernels/gpu_checks.json.

A record of the device's compute capability makes calls without `backend` take the CUDA kernels there.

python benchmarks/gpu_record.py --commit ID --passed smoke="900 passed" --failed tests=1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from opsd_kernels._rows import extension, gpu_checks
from opsd_kernels.provenance import package_version

# Steps of gpu_check.sh that run the kernels. The first two compare every one with float64, so either makes a
# record; the others add to one.
DECIDING = ("smoke", "tests")
STEPS = (*DECIDING, "memcheck", "racecheck")
OUT_OF_TIME = ("124", "125", "137")  # exit statuses that say nothing of the results


def update(commit: str, passed: dict[str, str], failed: dict[str, str]) -> str:
    """Write the record of this device, or delete it if a step failed; return what was done."""
    passed, failed = ({step: part[step] for step in STEPS if step in part} for part in (passed, failed))
    reason = extension.cuda_unavailable()
    if reason is not None:
        return f"no record: {reason}"
    major, minor = torch.cuda.get_device_capability()
    architecture, sources, records = f"{major}.{minor}", extension.cuda_sources(), gpu_checks.load()
    wrong = [step for step, status in failed.items() if status not in OUT_OF_TIME]
    if wrong:
        gpu_checks.save(gpu_checks.failed(records, architecture, sources))
        return f"no record of {architecture}, {sources}: {', '.join(wrong)} failed"
    known = any((record.architecture, record.sources) == (architecture, sources) for record in records)
    if failed or not passed or not (known or set(passed) & set(DECIDING)):
        return (
            f"records unchanged: {', '.join(failed) or 'no deciding step'} {'ran out of time' * bool(failed)}"
        )
    new = gpu_checks.Record(
        architecture,
        sources,
        torch.cuda.get_device_name(),
        time.strftime("%Y-%m-%d"),
        commit,
        {package: package_version(package) for package in ("torch", "triton")},
        passed,
    )
    gpu_checks.save(gpu_checks.passed(records, new))
    return f"recorded {architecture}, {sources}: {', '.join(passed)}; commit {gpu_checks.FILE.name}"


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """Return {step: result} of arguments STEP=RESULT."""
    return dict(text.split("=", 1) for text in texts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", required=True)
    parser.add_argument("--passed", nargs="*", default=[])
    parser.add_argument("--failed", nargs="*", default=[])
    chosen = parser.parse_args()
    print(update(chosen.commit, pairs(chosen.passed), pairs(chosen.failed)))
