"""The rules of the repository, read from its files. Each check also runs on a planted violation."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import opsd_kernels
from opsd_kernels import env, tested_versions
from opsd_kernels._rows import extension

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE, MAX_FUNCTION = 500, 80

# Who may import whom: a module imports lower levels only. `package.*` stands for every module of a folder,
# whose members may import each other as long as no circle closes. `__init__` is the public namespace: its
# users stand above it, and what it re-exports below.
LEVELS = {
    0: ["env", "provenance", "report_json", "spec", "terminal", "train.types", "version"],
    1: ["_rows.*", "quantized", "weights.*", "testing.*", "tested_versions"],
    2: ["_core.*"],
    3: ["divergence", "logprobs", "cached", "peft_head", "vocab_parallel", "doctor"],
    4: ["topk", "objectives", "modules"],
    5: ["__init__"],
    6: ["integrations.*"],
    7: ["train.*", "bench.*"],
    8: ["cli"],
    9: ["__main__"],
}
# From this level on the modules stand on the public op and import no machinery. The exceptions: `__init__`
# re-exports names, and `opsd bench` times row sweeps by backend and checks the planner's model, through one
# module.
MACHINERY, WITHOUT_MACHINERY = ("_core", "_rows"), 4
MAY_LOOK_INSIDE = ("__init__", "bench.internals")


def level(module: str) -> int | None:
    """A module's level by the longest entry that covers it."""
    exact = {name: number for number, names in LEVELS.items() for name in names}
    while module:
        if module in exact:
            return exact[module]
        if f"{module}.*" in exact:
            return exact[f"{module}.*"]
        module = module.rpartition(".")[0]
    return None


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path, package: Path) -> Iterator[str]:
    """Yield the modules of `package` that a file imports, relative to it; `__init__` is the package."""
    here = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == package.name:
                yield resolve(target[1:], package)


def resolve(parts: list[str], package: Path) -> str:
    """The module that an imported dotted name lives in."""
    while parts:
        path = package.joinpath(*parts)
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts)
        parts = parts[:-1]
    return "__init__"


def import_violations(package: Path) -> list[str]:
    found, edges = [], {}
    for path in sorted(package.rglob("*.py")):
        name = module_name(path, package)
        if path.name == "__init__.py" and not path.read_text().strip():
            continue
        edges[name] = set(imports(path, package)) - {name}
        if level(name) is None:
            found.append(f"{name} has no level")
            continue
        for target in sorted(edges[name]):
            found += [f"{name} imports {target}: {why}" for why in [why_not(name, target, package)] if why]
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(edges)]


def why_not(name: str, target: str, package: Path) -> str | None:
    group, of_target = name.split(".")[0], target.split(".")[0]
    above = level(name) >= WITHOUT_MACHINERY and name not in MAY_LOOK_INSIDE
    if above and of_target in MACHINERY:
        return f"{of_target} from level {level(name)}"
    if group == "testing" and of_target in MACHINERY:
        return "testing judges the kernels"
    if level(target) is None:
        return None if empty_package(target, package) else "it has no level"
    folder = f"{group}.*" in LEVELS.get(level(name), ())
    siblings = folder and group == of_target and level(name) == level(target)
    return (
        None if level(target) < level(name) or siblings else f"level {level(target)} from level {level(name)}"
    )


def empty_package(target: str, package: Path) -> bool:
    init = package.joinpath(*target.split("."), "__init__.py")
    return init.is_file() and not init.read_text().strip()


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The circles that a walk along the imports runs into."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def without_comments(text: str) -> str:
    """C++ with comments, literals and preprocessor lines blanked, line numbers kept."""
    pattern = (
        r'//[^\n]*|/\*.*?\*/|R"\((?:.*?)\)"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^[ \t]*#(?:\\\n|[^\n])*'
    )
    return re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def cpp_functions(text: str) -> Iterator[tuple[int, int]]:
    """Yield (first line, lines) of outermost blocks after a parenthesis, also in namespaces and classes."""
    header, stack, line, start = "", [], 1, 0
    for char in without_comments(text):
        line += char == "\n"
        if char == "{":
            stack.append(
                "(" in header and not re.match(r"\s*(namespace|class|struct|union|enum|extern)\b", header)
            )
            start = line - header.lstrip().count("\n") if stack.count(True) == 1 and stack[-1] else start
        elif char == "}" and stack:
            if stack.pop() and True not in stack:
                yield start, line - start + 1
        header = "" if char in "{};" else header + char


def python_functions(text: str) -> Iterator[tuple[int, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.end_lineno - node.lineno + 1


def source_files(root: Path) -> list[Path]:
    kinds = {".py", ".cpp", ".cu", ".h", ".cuh"}
    places = [
        root / "setup.py",
        *(
            p
            for top in ("opsd_kernels", "csrc", "tests", "benchmarks")
            for p in sorted((root / top).rglob("*"))
        ),
    ]
    return [p for p in places if p.suffix in kinds and p.is_file()]


def length_violations(root: Path) -> list[str]:
    found = []
    for path in source_files(root):
        text, name = path.read_text(), path.relative_to(root)
        if text.count("\n") > MAX_FILE:
            found.append(f"{name}: {text.count(chr(10))} lines")
        functions = python_functions(text) if path.suffix == ".py" else cpp_functions(text)
        found += [
            f"{name}:{line}: function of {lines} lines" for line, lines in functions if lines > MAX_FUNCTION
        ]
    return found


def variable_violations(root: Path, known: set[str]) -> list[str]:
    """List OPSD_* names beside env.py's table, reads of the environment beside it, and unused entries."""
    found, used = [], set()
    sources = [p for p in source_files(root) if "tests" not in p.relative_to(root).parts]
    for path in sources:
        name = path.relative_to(root)
        if name == Path("opsd_kernels/env.py"):
            continue
        text = path.read_text()
        names = set(re.findall(r"""["'](OPSD_[A-Z0-9_]+)["']""", text))
        used |= names | {v.name for v in env.VARIABLES for getter in getters(v) if f"env.{getter}" in text}
        found += [f"{name}: {unknown} is not in env.py" for unknown in sorted(names - known)]
        if (
            path.suffix == ".py"
            and name.parts[0] == "opsd_kernels"
            and re.search(r"os\.(environ|getenv)[^\n]*OPSD_", text)
        ):
            found.append(f"{name}: reads an OPSD_ variable itself")
    return found + [f"env.py: nothing reads {unused}" for unused in sorted(known - used)]


def getters(variable: env.Variable) -> list[str]:
    stem = variable.name.removeprefix("OPSD_")
    return [stem, stem.lower(), f"{stem.lower()}_dir"]


def tolerance_violations(root: Path) -> list[str]:
    """Tolerances written into tests. Zero is exactness, not a tolerance."""
    found = []
    for path in sorted((root / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and own_tolerance(node):
                where = f"{path.relative_to(root)}:{node.lineno}"
                found.append(
                    f"{where}: {ast.unparse(node.func)} has a tolerance of its own; see opsd_kernels.testing"
                )
    return found


def own_tolerance(call: ast.Call) -> bool:
    """Whether a call writes a tolerance as a number, or compares with the library's default one."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    numbers = [named[name] for name in ("atol", "rtol", "abs", "rel", "tol") if name in named]
    compares = ast.unparse(call.func).rpartition(".")[2] in ("allclose", "assert_close", "isclose")
    return any(isinstance(n, ast.Constant) and n.value for n in numbers) or (
        compares and not {"atol", "rtol"} <= named.keys()
    )


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def link_violations(root: Path) -> list[str]:
    """Relative links whose file or heading does not exist."""
    found = []
    for page in [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name) if name else page
            if not path.exists():
                found.append(f"{page.relative_to(root)}: {target} does not exist")
            elif anchor and anchor not in [
                slug(h) for h in re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            ]:
                found.append(f"{page.relative_to(root)}: {target} has no such heading")
    return found


def versions(root: Path) -> set[str]:
    patterns = {
        "opsd_kernels/version.py": r'^__version__ = "([^"]+)"',
        "CHANGELOG.md": r"^## (\d\S*)",
        "CITATION.cff": r"^version: (\S+)",
    }
    return {
        match[1] if (match := re.search(p, (root / f).read_text(), re.MULTILINE)) else f"none in {f}"
        for f, p in patterns.items()
    }


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


# ---------------------------------------------------------------- on this repository


def test_imports_follow_the_levels():
    assert import_violations(ROOT / "opsd_kernels") == []


def test_files_and_functions_are_short():
    assert length_violations(ROOT) == []


def test_environment_variables_are_in_the_table():
    assert variable_violations(ROOT, {v.name for v in env.VARIABLES}) == []


def test_environment_page_is_current():
    assert (ROOT / "docs" / "reference" / "environment.md").read_text() == env.markdown(), "run `make docs`"


def test_page_of_tested_versions_is_current():
    assert (ROOT / tested_versions.PAGE).read_text() == tested_versions.markdown(), "run `make docs`"


def test_tolerances_live_in_testing():
    assert tolerance_violations(ROOT) == []


def test_links_resolve():
    assert link_violations(ROOT) == []


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda form: form.stem
)
def test_issue_forms_ask_for_opsd_doctor(form):
    fields = {
        field.get("id"): field for field in pytest.importorskip("yaml").safe_load(form.read_text())["body"]
    }
    assert "opsd doctor" in fields["doctor"]["attributes"]["description"]
    assert form.stem == "feature" or fields["doctor"]["validations"]["required"]


def test_versions_agree():
    assert versions(ROOT) == {opsd_kernels.__version__}


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorials/getting-started.md"])
def test_examples_run_as_pasted(page):
    """The blocks of a page, one after the other in one session."""
    result = run_python("\n".join(examples(ROOT / page)))
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert (
        result.stderr == ""
        if extension.load() is None
        else re.fullmatch(r".*SlowBackendWarning: .*\n", result.stderr)
    ), result.stderr


def test_readme_example_is_short():
    assert len(examples(ROOT / "README.md")[0].strip().splitlines()) <= 12


BLOCKED_IMPORT = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name.startswith("opsd_kernels._C"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Block())
import torch
def blocked(path):
    raise OSError(f"{path} is blocked")
torch.ops.load_library = torch.classes.load_library = blocked
import opsd_kernels, warnings
opsd_kernels.linear_divergence
from opsd_kernels._rows.backends import SlowBackendWarning
warnings.simplefilter("ignore", SlowBackendWarning)  # a call may warn; the import may not
h, w = torch.ones(2, 3), torch.eye(4, 3)
loss = opsd_kernels.linear_divergence(h, w, -h, w)
assert loss.isfinite() and loss > 0, loss
assert not torch.cuda.is_initialized()
"""


def test_import_needs_neither_triton_nor_the_extension_and_is_silent():
    result = run_python(BLOCKED_IMPORT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---------------------------------------------------------------- the checks find a planted violation


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"spec.py": "from ._core.loop import run", "_core/loop.py": ""}, "level 2 from level 0"),
        (
            {"divergence.py": "def f():\n    import opsd_kernels.logprobs", "logprobs.py": ""},
            "level 3 from level 3",
        ),
        (
            {"train/a.py": "from . import b", "train/b.py": "from .a import x"},
            "circle: train.a -> train.b -> train.a",
        ),
        (
            {"train/a.py": "from .._rows.backends import select", "_rows/backends.py": ""},
            "_rows from level 7",
        ),
        ({"bench/a.py": "from .._core.planner import plan", "_core/planner.py": ""}, "_core from level 7"),
        ({"topk.py": "from ._core import loop", "_core/loop.py": ""}, "_core from level 4"),
        (
            {"cli.py": "def f():\n    from ._rows import backends", "_rows/backends.py": ""},
            "_rows from level 8",
        ),
        (
            {"testing/reference.py": "from opsd_kernels._rows import contract", "_rows/contract.py": ""},
            "testing judges the kernels",
        ),
        ({"divergence.py": "from . import linear", "__init__.py": "linear = 1"}, "level 5 from level 3"),
        ({"novel.py": "x = 1"}, "novel has no level"),
    ],
)
def test_import_check_finds(tmp_path, files, expected):
    package = plant(tmp_path / "opsd_kernels", files)
    assert any(expected in violation for violation in import_violations(package)), import_violations(package)


CPP = (
    "namespace a {{\n// {{ not a brace\ntemplate <int N>\nvoid f(int x) {{\n{body}}}\n"
    "struct S {{ void g() {{ }} }};\n}}\n"
)


@pytest.mark.parametrize(
    "name, text, violations",
    [
        ("opsd_kernels/a.py", "x = 1\n" * 501, 1),
        ("opsd_kernels/b.py", "def f():\n" + "    x = 1\n" * 80, 1),
        ("tests/c.py", "def f():\n" + "    x = 1\n" * 79, 0),
        ("csrc/d.cpp", CPP.format(body="if (x) { }\n" * 80), 1),
        ("csrc/e.cu", CPP.format(body='f("{");\n' * 70), 0),
    ],
)
def test_length_check_finds(tmp_path, name, text, violations):
    assert len(length_violations(plant(tmp_path, {name: text}))) == violations


def test_variable_check_finds(tmp_path):
    root = plant(
        tmp_path,
        {
            "opsd_kernels/a.py": 'import os\nx = os.environ["OPSD_" + "B"]\ny = "OPSD_NEW"',
            "csrc/b.cpp": 'getenv("OPSD_BACKEND")',
        },
    )
    found = variable_violations(root, {"OPSD_BACKEND", "OPSD_CACHE"})
    assert [v.split(": ")[1].split()[0] for v in found] == ["OPSD_NEW", "reads", "nothing"]


@pytest.mark.parametrize(
    "call, violations",
    [
        ("assert_close(a, b)", 1),
        ("f(a, atol=1e-3)", 1),
        ("approx(1, rel=.1)", 1),
        ("assert_close(a, b, atol=0, rtol=0)", 0),
        ("f(a, atol=GATE)", 0),
    ],
)
def test_tolerance_check_finds(tmp_path, call, violations):
    assert len(tolerance_violations(plant(tmp_path, {"tests/unit/test_a.py": call}))) == violations


def test_link_check_finds(tmp_path):
    page = "# Top\n[a](gone.md) [b](#no-heading) [c](#top) [d](https://example.org) [e](docs/b.md#part-one)"
    found = link_violations(
        plant(tmp_path, {"README.md": page, "docs/b.md": "## Part one\n[x](../README.md)"})
    )
    assert found == ["README.md: gone.md does not exist", "README.md: #no-heading has no such heading"]


def test_version_check_finds(tmp_path):
    files = {
        "opsd_kernels/version.py": '__version__ = "1.0"',
        "CHANGELOG.md": "# Changelog",
        "CITATION.cff": "cff-version: 1.2.0\nversion: 0.9",
    }
    assert versions(plant(tmp_path, files)) == {"1.0", "none in CHANGELOG.md", "0.9"}


@pytest.mark.parametrize("dtype, shorter", [("float32", True), ("bfloat16", False)])
def test_the_demo_is_shorter_in_fp32_unless_asked_otherwise(dtype, shorter):
    said = subprocess.run(
        ["make", "--dry-run", "demo", f"DTYPE={dtype}", "ARGS=--set steps=7"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    steps = re.findall(r"--set (steps=\d+)", said.splitlines()[-1])
    assert steps == (["steps=16", "steps=7"] if shorter else ["steps=7"])
