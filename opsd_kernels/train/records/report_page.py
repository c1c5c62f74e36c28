"""Write report.html: one page of curves, tables and samples, without scripts or requests.

Answers and feedback are untrusted: every text is escaped, and the page's policy also forbids scripts and
requests.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from html import escape
from typing import Any

from opsd_kernels.train.config import TrainConfig
from opsd_kernels.train.config.presets import PRESETS
from opsd_kernels.train.records.charts import line_chart
from opsd_kernels.train.records.report import MEASURED, PANELS, Record, points_of

# Largest number of steps whose samples are shown.
SHOWN_STEPS = 40
# Nats from which a token is shaded more.
SHADES = (0.1, 0.5, 1.5, 4.0)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark;
  --bg: #fff; --fg: #1b1d20; --dim: #5a6068; --line: #d8dce1; --panel: #f5f6f8;
  --s0: #1f5fbf; --s1: #b8450f; --s2: #0b7a4b; --s3: #8a35b0; --up: 31, 95, 191; --down: 200, 80, 10; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #15171a; --fg: #e6e8eb; --dim: #9aa1aa; --line: #343a41; --panel: #1e2125;
    --s0: #7db0ff; --s1: #ff9d5c; --s2: #4fd08f; --s3: #d59bf5; --up: 90, 150, 255; --down: 255, 140, 60; } }
body { background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { margin-bottom: 0; } h2 { margin: 2em 0 .6em; } .dim, .none, figcaption, dt, th { color: var(--dim); }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25em 1.2em .25em 0; border-bottom: 1px solid var(--line);
  font-weight: normal; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td, code { overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1em; }
figure { margin: 0; }
figure, details, article { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: .7em; }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 12px; }
.axes line { stroke: var(--line); }
polyline { fill: none; stroke: currentColor; stroke-width: 1.6; } circle { fill: currentColor; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1.2em; margin: .3em 0 0; padding: 0;
  font-size: 13px; }
.legend li::before { content: ""; display: inline-block; width: 1em; border-top: 3px solid;
  vertical-align: middle; margin-right: .4em; }
details { margin: .5em 0; } summary { cursor: pointer; } article { background: var(--bg); margin: .6em 0; }
dl { display: grid; grid-template-columns: 8em minmax(0, 1fr); gap: .3em 1em; margin: 0; } dd { margin: 0; }
pre, .text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: 13px/1.45 ui-monospace, monospace; margin: 0; }
.u1 { background: rgba(var(--up), .12); } .u2 { background: rgba(var(--up), .25); }
.u3 { background: rgba(var(--up), .42); } .u4 { background: rgba(var(--up), .62); }
.d1 { background: rgba(var(--down), .12); } .d2 { background: rgba(var(--down), .25); }
.d3 { background: rgba(var(--down), .42); } .d4 { background: rgba(var(--down), .62); }
"""


def page(run: Record) -> bytes:
    """Return the whole page, UTF-8."""
    parts = [
        f"<h1>{escape(run.name)}</h1>\n<p class=dim>{escape(status(run))}</p>",
        before_and_after(run),
        f'<h2>Curves</h2>\n<div class="curves">{curves(run)}</div>',
        f"<h2>Settings</h2>\n{settings(run.config)}",
        f"<h2>Samples</h2>\n{samples(run.samples)}",
    ]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(run.name)} - opsd train</title><style>{STYLE}</style></head><body>\n"
    )
    # A verifier may return a lone surrogate, which has no UTF-8.
    return (head + "\n".join(parts) + "\n</body></html>\n").encode("utf-8", "replace")


def status(run: Record) -> str:
    """Describe the run and its progress in one line."""
    what = f"{run.config['env']}, {run.config['model']}, seed {run.config['seed']}"
    if run.complete:
        return f"{what}: {run.facts['steps']} steps in {run.facts['seconds']:.0f} s"
    made = run.metrics[-1]["step"] if run.metrics else 0
    return f"{what}: unfinished, step {made} of {run.config['steps']}"


def before_and_after(run: Record) -> str:
    rows = []
    for label, name in MEASURED:
        before, (after, step) = run.before(name), run.after(name)
        # Both None in an environment without an untrained skill, or before the first measurement.
        if before is None and after is None:
            continue
        gained = "" if before is None or after is None else f"{100 * (after - before):+.1f} points"
        rows.append((label, _percent(before), _percent(after), gained, "" if after is None else str(step)))
    if not rows:
        return '<h2>Before and after</h2>\n<p class="none">Nothing was measured yet.</p>'
    header = ("", "before", "after" if run.complete else "latest", "change", "at step")
    return f"<h2>Before and after</h2>\n{table(header, rows, numbers=range(1, 5))}"


def curves(run: Record) -> str:
    charts = [
        line_chart(title, [(name.replace("_", " "), points_of(run.metrics, name)) for name in names])
        for title, names in PANELS
    ]
    name = "divergence_by_position"
    steps = [(line["step"], line[name]) for line in run.metrics if line.get(name) is not None]
    # The first step, one in the middle, the last.
    chosen = dict(steps[i] for i in (0, len(steps) // 2, -1) if steps)
    lines = [
        (f"step {step}", [(place, value) for place, value in enumerate(values, 1) if value is not None])
        for step, values in chosen.items()
    ]
    return "\n".join([*charts, line_chart("divergence by position, nats", lines, "token of the answer")])


def settings(config: dict[str, Any]) -> str:
    """Show the settings that differ from the defaults, and all settings in a closed block."""
    defaults = (
        {field.name: field.default for field in dataclasses.fields(TrainConfig)}
        | PRESETS.get(config["env"], {})
        | {"env": config["env"]}
    )
    # A run of another version may have other keys.
    theirs = {key: json.dumps(defaults[key]) if key in defaults else "-" for key in config}
    changed = [
        (key, json.dumps(value), theirs[key])
        for key, value in config.items()
        if theirs[key] != json.dumps(value)
    ]
    shown = (
        table(("setting", "this run", f"default of {config['env']}"), changed)
        if changed
        else f"<p>The defaults of {escape(config['env'])}.</p>"
    )
    every = "\n".join(f"{key}: {json.dumps(value)}" for key, value in config.items())
    return f"{shown}\n<details><summary>all settings</summary><pre>{escape(every)}</pre></details>"


def samples(lines: list[dict[str, Any]]) -> str:
    """Show samples by step, with the last step open.

    A long run shows some steps, with the first and the last.
    """
    if not lines:
        return '<p class="none">None were kept (samples_kept, samples_every).</p>'
    steps = sorted({line["step"] for line in lines})
    shown = (
        steps
        if len(steps) <= SHOWN_STEPS
        else sorted({steps[round(i * (len(steps) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)})
    )
    told = f"{len(lines)} answers of {len(steps)} steps, drawn at random"
    if len(shown) < len(steps):
        told += f"; those of {len(shown)} steps are shown, all are in samples.jsonl"
    told += ". Shaded: tokens more probable under the teacher than under the student (blue) or less (orange)."
    out = [f"<p class=dim>{told}</p>"]
    for step in shown:
        mine = [line for line in lines if line["step"] == step]
        right = sum(line["reward"] >= 1 for line in mine)
        opened = " open" if step == shown[-1] else ""
        title = f"<summary>step {step}: {right} of {len(mine)} right</summary>"
        out.append(f"<details{opened}>{title}{''.join(map(sample, mine))}</details>")
    return "\n".join(out)


def sample(line: dict[str, Any]) -> str:
    gaps = [gap for gap in line["gap"] or () if gap is not None]
    turns = [*(f"{turn['role']}: {turn['content']}" for turn in line.get("before", ())), line["prompt"]]
    view = "<span class=none>no context: not distilled</span>"
    if line["teacher_view"] is not None:
        view = _text(line["teacher_view"])
    rows = [
        ("prompt", _text("\n".join(turns))),
        ("answer", shaded(line)),
        ("reward", f"{line['reward']:g}"),
        ("feedback", _text(line["feedback"])),
        ("teacher saw", view),
        ("gap", f"{sum(gaps) / len(gaps):+.3f} nats a token" if gaps else "<span class=none>-</span>"),
    ]
    body = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in rows)
    return f"<article><dl>{body}</dl></article>"


def shaded(line: dict[str, Any]) -> str:
    """Return the answer token by token, shaded by the gap between teacher and student."""
    if not line["gap"]:
        return _text(line["answer"])
    spans = []
    for token, gap in zip(line["tokens"], line["gap"], strict=True):
        level = len(SHADES) if gap is None else sum(abs(gap) >= bound for bound in SHADES)
        side = "u" if gap is not None and gap > 0 else "d"
        told = "the teacher gives it probability 0" if gap is None else f"{gap:+.3f} nats"
        spans.append(f'<span class="{side}{level}" title="{told}">{escape(token)}</span>')
    return f'<span class="text">{"".join(spans)}</span>'


def table(header: Iterable[str], rows: Iterable[Iterable[str]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def line(cells: Iterable[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if i in right else ''}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line(header, 'th')}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _text(text: str | None) -> str:
    return '<span class="none">-</span>' if text is None else f"<pre>{escape(text)}</pre>"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
