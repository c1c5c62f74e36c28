"""The version of the package: the source of setup.py, `opsd --version` and the wheel's metadata."""

__version__ = "0.1.0"
