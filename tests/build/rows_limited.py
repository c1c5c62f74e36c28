"""The row contract on the C++ kernels. Collected in subprocesses of test_extension.py, which limit their
instruction set.
"""

import pytest
import torch
from column_contract import ColumnContract
from covering_part import CoveringPart
from row_contract import RowContract
from row_options_contract import RowOptionsContract

from opsd_kernels._rows import backends


class OnCpp(CoveringPart):
    @pytest.fixture
    def row_backend(self):
        return backends.select("cpp", torch.device("cpu"))


class TestRowContract(OnCpp, RowContract):
    HARD = (11, 1003)


class TestRowOptions(OnCpp, RowOptionsContract): ...


class TestColumns(OnCpp, ColumnContract): ...
