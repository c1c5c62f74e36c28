"""The benchmark's timing: medians, noise, and the order of runs."""

import pytest

from opsd_kernels.bench.measure.timing import Sample, Variant, interleave, noise, ratio


def steady(milliseconds, count=9, jitter=()):
    times = dict.fromkeys(range(count), float(milliseconds))
    for turn, factor in enumerate(jitter):
        times[turn] *= factor
    return Variant(run=lambda: None, times=times)


def test_sample():
    sample = Sample.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (sample.median, sample.q1, sample.q3, sample.n) == (3, 2, 4, 5)
    assert Sample.of([7.0]).uncertainty == 0


def test_ratio_pairs_the_rounds():
    """A machine at half speed in some rounds slows both sides of a ratio."""
    slow = (1, 2, 1, 2, 1, 2)
    assert ratio(steady(30, jitter=slow), steady(10, jitter=slow)) == Sample(3, 3, 3, 9)
    assert ratio(steady(30, count=4), steady(10)).n == 4


@pytest.mark.parametrize(
    "variant, says",
    [
        (steady(10), None),
        (steady(10, count=2), "fewer than three rounds"),
        (steady(10, jitter=(1.5, 0.7, 1.4, 0.8, 1.5, 0.6)), "known within"),
        (steady(10, count=40, jitter=(1.2,) * 20), "moved by 17%"),
    ],
)
def test_noise(variant, says):
    found = noise(variant, steady(10, count=40))
    assert found is None if says is None else says in found


def test_turns(monkeypatch):
    """Timed runs follow an untimed one of the same variant; a failure affects its variant alone."""
    ran = []

    def fails():
        raise MemoryError

    variants = {
        "base": Variant(lambda: ran.append("b")),
        "other": Variant(lambda: ran.append("o"), setup=lambda: ran.append("s")),
        "fails": Variant(fails),
    }
    interleave(variants, "base", "cpu", rounds=(2, 2), seconds=60)
    assert "".join(ran) == "b" + "so" + 2 * ("bb" + "soso")
    assert [sorted(v.times) for v in variants.values()] == [[0, 1], [0, 1], []]
    assert variants["fails"].failure == "out of memory"


def test_a_settled_variant_leaves_and_time_ends_the_rest():
    calls = {"base": 0, "other": 0}

    def count(name):
        return Variant(lambda: calls.__setitem__(name, calls[name] + 1))

    interleave({name: count(name) for name in calls}, "base", "cpu", rounds=(3, 10**6), seconds=0.05)
    assert calls["base"] >= calls["other"] >= 7
