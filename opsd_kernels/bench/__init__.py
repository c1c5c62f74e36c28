"""The engine behind `opsd bench`.

command.py, runner.py      the command: progress, tables, files; the suites in a row
shapes.py, providers.py    the settings and the implementations that are measured
suites/                    one function per suite, which returns its tasks
measure/                   gate, timing, memory, ceilings, profiling, and rows of one comparison
report/                    rows and reports as JSON, tables, plots, comparison of two reports
pages/                     docs pages and README's table from committed reports
parallel.py                arithmetic of vocabulary and data ranks
internals.py               the only imports of `_core` and `_rows`
"""
