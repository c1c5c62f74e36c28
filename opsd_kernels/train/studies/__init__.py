"""Experiments: `opsd reproduce` tests claims of papers on toys; `opsd probe` and `opsd discover` stand alone.

papers/ has one module per paper, with a function `study(lab)`; lab.py runs its cells, compare.py its arms,
statistics.py grades its claims, and pages.py writes its page.
"""
