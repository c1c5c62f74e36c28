"""Plant a bug, and run the check that must kill it."""

import functools
from dataclasses import dataclass

import pytest


def check(function, *args, **kwargs):
    return functools.partial(function, *args, **kwargs)


# ---------------------------------------------------------------- planted bugs


@dataclass(frozen=True)
class Mutant:
    where: object  # the module or dict that holds the name
    name: object
    change: object  # original -> mutant
    killer: functools.partial

    def plant(self, monkeypatch) -> None:
        if isinstance(self.where, dict):
            monkeypatch.setitem(self.where, self.name, self.change(self.where[self.name]))
        else:
            monkeypatch.setattr(self.where, self.name, self.change(getattr(self.where, self.name)))


def result(transform):
    """Return a mutant that changes the result of the original."""
    return lambda original: lambda *args, **kwargs: transform(original(*args, **kwargs), *args)


def arguments(transform):
    """Return a mutant that changes the arguments of the original."""
    return lambda original: lambda *args, **kwargs: original(*transform(*args), **kwargs)


def freeze(killer: functools.partial):
    return killer.func, repr(killer.args), repr(sorted(killer.keywords.items()))


PASSED = set()


def kill(mutant: Mutant, monkeypatch) -> None:
    """Assert that the check passes without the bug and fails with it."""
    if freeze(mutant.killer) not in PASSED:
        mutant.killer()
        PASSED.add(freeze(mutant.killer))
    mutant.plant(monkeypatch)
    with pytest.raises(AssertionError):
        mutant.killer()
