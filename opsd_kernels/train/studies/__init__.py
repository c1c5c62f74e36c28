"""Experiments that put claims of papers to the test on toys, and report what held: `opsd reproduce`.

One module per paper, with a function `study(lab)`; lab.py runs its cells, compare.py its arms, statistics.py grades its claims, pages.py writes it up.
"""
