#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1: load_dataset("json") turns a column of strings into datetimes where all of its
# strings read as dates, "2024-01-01" or "2024-01-01T10:00:00". The answer "2024-01-01" then prints as
# "2024-01-01 00:00:00", which no answer of a model equals. One other string in the column, and all stay strings: the type
# of a row's answer depends on the rest of the file, so that a split or a shorter file changes it. An integer beyond 64
# bits becomes a float and loses its digits, in a column of integers too. Dataset.from_list keeps the strings.
#
# Expected: strings stay strings, since JSON has no dates, and integers stay integers, or an error.
# Seen:
#
#   ["2024-01-01", "1999-12-31"] -> timestamp[s], first row datetime.datetime(2024, 1, 1, 0, 0)
#   ["2024-01-01T10:00:00", "2024-01-01T10:00:01"] -> timestamp[s], first row datetime.datetime(2024, 1, 1, 10, 0)
#   ["2024-01-01", "unknown"] -> string, first row '2024-01-01'
#   [12345678901234567890123, 2] -> float64, first row 1.2345678901234568e+22
#
# Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cat > "$folder/load.py" <<'PY'
import datetime, json, sys
import datasets

datasets.disable_progress_bars()
CASES = [
    (["2024-01-01", "1999-12-31"], "timestamp[s]", datetime.datetime(2024, 1, 1)),
    (["2024-01-01T10:00:00", "2024-01-01T10:00:01"], "timestamp[s]", datetime.datetime(2024, 1, 1, 10)),
    (["2024-01-01", "unknown"], "string", "2024-01-01"),
    ([12345678901234567890123, 2], "float64", 1.2345678901234568e22),
]
same = True
for number, (answers, kind, first) in enumerate(CASES):
    rows = [{"answer": answer} for answer in answers]
    path = f"{sys.argv[1]}/{number}.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = datasets.load_dataset("json", data_files=path, split="train", cache_dir=f"{sys.argv[1]}/cache{number}")
    print(f"{json.dumps(answers)} -> {found.features['answer'].dtype}, first row {found[0]['answer']!r}")
    same &= found.features["answer"].dtype == kind and repr(found[0]["answer"]) == repr(first)
    if isinstance(answers[0], str):
        same &= datasets.Dataset.from_list(rows)["answer"][0] == answers[0]
sys.exit(0 if same else 1)
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" "$folder/load.py" "$folder"
