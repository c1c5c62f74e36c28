"""DistillationHead under DeepSpeed ZeRO-3, one rank without a valid token: two gloo processes against one."""

import importlib.util
import subprocess
import sys

import pytest

DEEPSPEED = "0.19.8"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Return the folder of DeepSpeed, "" for this environment.

    pip builds it without an operator, in seconds, for this test alone: if it were installed, transformers and
    accelerate would load it everywhere.
    """
    if importlib.util.find_spec("deepspeed") is not None:
        return ""
    place = tmp_path_factory.mktemp("deepspeed")
    what = [
        "--no-deps",
        "--no-build-isolation",
        "--retries",
        "1",
        "--timeout",
        "10",
        f"deepspeed=={DEEPSPEED}",
        "einops",
        "hjson",
        "msgpack",
    ]
    try:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--target", str(place), *what],
            check=True,
            capture_output=True,
            timeout=120,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no deepspeed {DEEPSPEED}: pip install failed ({type(error).__name__})")
    return str(place)


@pytest.mark.slow
def test_ranks_equal_one_process(launching, packages, tmp_path):
    results = launching.launch("deepspeed_ranks.py", 2, tmp_path, packages)
    assert len(results[0]) == 3
    launching.assert_none_failed(results)
