#!/usr/bin/env bash
# pydantic-monty 1.4.0: generator expressions, map, filter, zip, enumerate and reversed return lists. `yield` is refused
# with an error, but these run and give other results than Python, without a word: all elements are computed at once,
# though any() or next() would stop early, and an iterator that was read to its end is full when it is read again. Code
# that relies on one pass over an iterator passes its tests here and fails in Python, or the reverse.
#
# Expected: the results of Python, or an error, as for yield. Seen:
#
#   g = (x for x in [1, 2]); (list(g), list(g)): Python ([1, 2], []), here ([1, 2], [1, 2])
#   m = map(str, [1, 2]); (list(m), list(m)): Python (['1', '2'], []), here (['1', '2'], ['1', '2'])
#   z = zip([1], [2]); (list(z), list(z)): Python ([(1, 2)], []), here ([(1, 2)], [(1, 2)])
#   e = enumerate('a'); (list(e), list(e)): Python ([(0, 'a')], []), here ([(0, 'a')], [(0, 'a')])
#   n = []; any(n.append(x) or x for x in [0, 1, 2]); n: Python [0, 1], here [0, 1, 2]
#   i = iter([1, 2]); (next(i), list(i), list(i)): Python (1, [2], []), here (1, [2], [])
#
# Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydantic-monty==1.4.0
cat > "$folder/compare.py" <<'PY'
import pydantic_monty

PROGRAMS = (
    "g = (x for x in [1, 2]); (list(g), list(g))",
    "m = map(str, [1, 2]); (list(m), list(m))",
    "z = zip([1], [2]); (list(z), list(z))",
    "e = enumerate('a'); (list(e), list(e))",
    "n = []; any(n.append(x) or x for x in [0, 1, 2]); n",
    "i = iter([1, 2]); (next(i), list(i), list(i))",
)
with pydantic_monty.Monty(max_processes=1) as pool:
    for program in PROGRAMS:
        *statements, last = program.split("; ")
        names = {}
        exec("\n".join(statements), names)
        wanted = eval(last, names)
        with pool.checkout() as session:
            found = session.feed_run("\n".join([*statements, last]))
        print(f"{program}: Python {wanted}, here {found}")
PY
"$folder/venv/bin/python" "$folder/compare.py" | tee "$folder/seen"
grep '^#   ' "$0" | cut -c5- | diff - "$folder/seen"
