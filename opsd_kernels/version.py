"""The version of the package, which setup.py, `opsd --version` and the wheel's metadata take from here."""

__version__ = "0.1.0"
