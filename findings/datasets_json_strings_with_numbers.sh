#!/usr/bin/env bash
# datasets 5.2.0: where a column of a JSON lines file has strings in some rows and numbers in others, load_dataset("json")
# keeps the numbers and parses every string that happens to be JSON once more: "007" comes back as the number 7, "true" as
# True, "null" as None, "[1]" as a list, and "\"q\"" loses its quotes. Strings that are not JSON stay. So the reference
# answer of a row changes its type, or is gone, because of another row; a verifier that tells "1" from 1 then judges by a
# wrong one. Nothing is said. The same strings alone in a column are kept.
#
# Expected: what the file says, or an error.
# Seen, for files of two rows, the string and the number 2:
#
#   "1" -> 1; "007" -> 7; "1.0" -> 1.0; "1e3" -> 1000.0; "true" -> True; "null" -> None; "[1]" -> [1]; "\"q\"" -> 'q';
#   "x" -> 'x'; with "2" in place of 2 all are kept
#   in a list of tests, [["f(1)", "1"], ["f(2)", 2]] -> [['f(1)', 1], ['f(2)', 2]]
#
# Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cat > "$folder/load.py" <<'PY'
import json, sys
import datasets

datasets.disable_progress_bars()
SEEN = {
    "1": 1, "007": 7, "1.0": 1.0, "1e3": 1000.0, "true": True, "null": None, "[1]": [1], '"q"': "q", "x": "x"
}
count = 0


def loaded(*values):
    global count
    count += 1
    path = f"{sys.argv[1]}/{count}.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"answer": value}) + "\n" for value in values)
    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=f"{sys.argv[1]}/cache{count}")
    return [row["answer"] for row in rows]


same = True
for text, expected in SEEN.items():
    mixed, alone = loaded(text, 2), loaded(text, "2")
    print(f"{json.dumps(text)} beside 2: {mixed!r}; beside \"2\": {alone!r}")
    same &= repr(mixed) == repr([expected, 2]) and alone == [text, "2"]
tests = loaded([["f(1)", "1"], ["f(2)", 2]])[0]
print(tests)
same &= repr(tests) == repr([["f(1)", 1], ["f(2)", 2]])
sys.exit(0 if same else 1)
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/load.py" "$folder"
