"""The row contract on the CPU backends."""

from row_contract import RowContract
from row_options_contract import RowOptionsContract


class TestRowContract(RowContract): ...


class TestRowOptions(RowOptionsContract): ...
