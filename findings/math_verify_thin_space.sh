#!/usr/bin/env bash
# Math-Verify 0.9.0 with latex2sympy2_extended 1.11.0, Python 3.11: a thin space between groups of three digits, LaTeX's
# usual thousands separator, makes a sum: \boxed{1\,234} is read as 1 + 234 = 235, and `verify` accepts it for 235.
#
# Expected: 1234, as for 1{,}234 and 1,234, or no number.
# Seen:
#
#   \boxed{1,234} [1234, '1234']
#   \boxed{1{,}234} [1234, '1,234']
#   \boxed{1\,234} [235, '1\\,234']
#   \boxed{1 234} [235, '1 234']
#   1\,234 for 235: True, for 1234: False
#
# Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q math-verify==0.9.0
cat > "$folder/read.py" <<'PY'
import sys
from math_verify import parse, verify

for text in (r"\boxed{1,234}", r"\boxed{1{,}234}", r"\boxed{1\,234}", r"\boxed{1 234}"):
    print(text, parse(text))
answer = parse(r"\boxed{1\,234}")
wrong, right = verify(parse("235"), answer), verify(parse("1234"), answer)
print(rf"1\,234 for 235: {wrong}, for 1234: {right}")
sys.exit(0 if wrong and not right else 1)
PY
"$folder/venv/bin/python" "$folder/read.py"
