#!/usr/bin/env bash
# pydantic-monty 1.4.0: round(x, n) of a float scales by 10**n, rounds to an integer and scales back. Python rounds the
# exact binary value of x, so the two differ where x lies near a tie in decimal: round(2.675, 2) is 2.68 instead of 2.67,
# since the float 2.675 is a little less than 2.675. Python code that an agent or a model writes, and that is checked
# against results of CPython, is then wrong by a cent. Formatting in the same interpreter (f"{2.675:.2f}") is exact.
#
# Expected: no difference from Python in either. Seen, on k / 1000 for k = 5, 15, ... 9995, rounded to two digits:
#
#   f-string: 0 of 1000 differ from Python
#   round: 412 of 1000 differ from Python, first round(0.005, 2): 0.0 instead of 0.01
#
# Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydantic-monty==1.4.0
cat > "$folder/compare.py" <<'PY'
import pydantic_monty

numbers = [k / 1000 for k in range(5, 10000, 10)]
with pydantic_monty.Monty(max_processes=1) as pool, pool.checkout() as session:
    for name, form in ("f-string", "f'{{{x!r}:.2f}}'"), ("round", "round({x!r}, 2)"):
        code = [form.format(x=x) for x in numbers]
        found = session.feed_run("[" + ", ".join(code) + "]")
        wanted = [eval(text) for text in code]
        wrong = [trio for trio in zip(code, found, wanted) if trio[1] != trio[2]]
        first = ", first {}: {} instead of {}".format(*wrong[0]) if wrong else ""
        print(f"{name}: {len(wrong)} of {len(numbers)} differ from Python{first}")
PY
"$folder/venv/bin/python" "$folder/compare.py" | tee "$folder/seen"
diff - "$folder/seen" <<'SEEN'
f-string: 0 of 1000 differ from Python
round: 412 of 1000 differ from Python, first round(0.005, 2): 0.0 instead of 0.01
SEEN
