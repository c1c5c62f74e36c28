"""The row contract on the CPU backends, and the numbers of the divergences in each language."""

import re
from pathlib import Path

from column_contract import ColumnContract
from row_contract import RowContract
from row_options_contract import RowOptionsContract

from opsd_kernels.spec import Kind

ROOT = Path(__file__).resolve().parents[2]


class TestRowContract(RowContract): ...


class TestRowOptions(RowOptionsContract): ...


class TestColumns(ColumnContract): ...


def test_cpp_numbers_the_divergences_as_spec_does():
    source = (ROOT / "csrc" / "row_args.h").read_text()
    names = re.search(r"enum class Kind : int \{ REVERSE_KL = 0, ([A-Z_, ]+) \};", source)
    count = re.search(r"KINDS = (\d+);", source)
    assert names and count, "row_args.h no longer defines Kind and KINDS in one line each"
    assert ["REVERSE_KL", *names[1].split(", ")] == [kind.name for kind in Kind]
    assert int(count[1]) == len(Kind)
