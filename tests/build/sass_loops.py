"""Read machine code: the loops of a kernel over entries, from nvdisasm's listing and its line numbers."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

CLASSES = ("fp32", "mufu", "convert", "integer", "memory")
# Helpers that hold a loop, or move entries, on behalf of the sweep that calls them.
HELPERS = ("vectors", "vectors_and_rest", "singles", "walk", "tiles", "load", "store", "store_as")

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\d+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+):")
SECTION = re.compile(r"^\.text\.(\w+):")
LINE = re.compile(r'//## File "([^"]+)", line (\d+)( inlined at)?')
TARGET = re.compile(r"`\((\.L_\w+)\)")
DEFINES = re.compile(
    r"^\s*(?:template\s*<.*>\s*)?OPSD_(?:DEVICE|CALLED|KERNEL)\b(?:.*?__launch_bounds__\([^)]*\))?[^(=;]*?(\w+)\("
    r"|^def (\w+)\("
)


@dataclass
class Instruction:
    predicate: str
    opcode: str
    operands: str
    chain: tuple[tuple[str, int], ...]  # (file, line), the kernel's own first, then the calls inlined there
    target: str = ""
    labels: tuple[str, ...] = ()

    @property
    def conditional(self) -> bool:
        """True if a branch may fall through: a predicate before or after the opcode, or BRA.DIV."""
        return bool(self.predicate) or "," in self.operands or ".DIV" in self.opcode

    @property
    def family(self) -> str:
        """Return the opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    def width(self) -> int:
        """Return the bytes that a vector access of a thread moves; 0 for narrower ones."""
        bits = re.search(r"\.(128|256)\b", self.opcode)
        return int(bits[1]) // 8 if bits else 0

    def kind(self) -> str:
        """Return the class of the instruction, one of CLASSES."""
        name = self.family
        if name == "MUFU":
            return "mufu"
        if name in ("LDG", "LDS", "LD", "LDL", "STG", "STS", "ST", "STL", "LDGSTS", "LDC", "ULDC", "UBLKCP"):
            return "memory"
        if name in ("F2F", "F2FP", "F2I", "I2F", "I2FP", "FRND", "PRMT", "HADD2"):
            return "convert"
        # a bf16 in the upper half of a float: a shift, a product with 2**16, or a mask
        if re.search(r"\b(0x10000|0xffff0000)\b", self.operands) or (
            name == "SHF" and ", 0x10," in self.operands
        ):
            return "convert"
        vector = name in ("HFMA2", "HMUL2", "HMNMX2") and "RZ, RZ" not in self.operands
        if vector or re.match(r"F(ADD|MUL|FMA|MNMX|SEL|CHK|SWZADD)", name):
            return "fp32"
        return "integer"


def disassemble(binary: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """Yield (mangled name, instructions) of each kernel in a cubin, or in an object that holds one."""
    tools = Path(triton.knobs.nvidia.cuobjdump.path).parent
    with tempfile.TemporaryDirectory() as folder:
        if binary.suffix == ".o":
            command = [str(tools / "cuobjdump"), "--extract-elf", "all", str(binary.resolve())]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            (binary,) = Path(folder).glob("*.cubin")
        command = [str(tools / "nvdisasm"), "--print-line-info-inline", "--print-code", str(binary)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    yield from parse(printed)


def parse(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Yield (mangled name, instructions) of each section. Line numbers hold until others come."""
    name, code, chain, labels, fresh = "", [], [], [], True
    for line in listing.splitlines():
        if found := INSTRUCTION.match(line):
            _, predicate, opcode, operands = found.groups()
            target = TARGET.search(operands)
            inner = tuple(reversed(chain))
            goal = target[1] if target else ""
            code.append(Instruction((predicate or "").strip(), opcode, operands, inner, goal, tuple(labels)))
            labels, fresh = [], True
        elif found := LINE.search(line):
            if fresh:
                chain, fresh = [], False
            chain.append((found[1], int(found[2])))
            fresh = not found[3]
        elif found := LABEL.match(line):
            labels.append(found[1])
        elif found := SECTION.match(line):
            if code:
                yield name, code
            name, code, chain, labels = found[1], [], [], []
    if code:
        yield name, code


@dataclass
class Loop:
    """An innermost loop over entries. Counts are instructions of one iteration."""

    sweep: str  # the function that holds the loop
    names: tuple[str, ...]  # the functions around it, the kernel first
    where: str  # the lines of the calls that lead there
    entries: int  # of one thread in one iteration
    hot: int  # between the loop's first instruction and its backward branch
    issued: int  # of `hot`, those on the longest path: branches exclude each other
    cold: int  # of the loop, but laid out elsewhere: code that the compiler takes to be rare
    mix: tuple[int, ...]  # of `hot`, by CLASSES
    exponentials: int
    read: int  # bytes of device memory, in vectors
    written: int


def loops_over_entries(code: list[Instruction], entry_bytes: int) -> list[Loop]:
    """Return the innermost loops that load, in vectors, `entry_bytes` of each entry: both sides' logits.

    Reductions over threads load vectors as well: of partial sums, from shared memory, without exponentials.
    """
    successors = flow(code)
    order = {node: i for i, node in enumerate(postorder(successors))}
    vectors = {i for i, instruction in enumerate(code) if instruction.width()}
    found = [body for body in natural_loops(successors).values() if body & vectors]
    innermost = [body for body in found if not any(other < body for other in found)]
    loops = [measured_loop(code, body, entry_bytes, successors, order) for body in innermost]
    return [loop for loop in loops if loop.entries and (loop.read or loop.exponentials)]


def measured_loop(
    code: list[Instruction],
    body: set[int],
    entry_bytes: int,
    successors: list[list[int]],
    order: dict[int, int],
) -> Loop:
    """Return the counts of a loop.

    Its entries are the bytes that vector loads from device memory bring on one path, or those from shared
    memory where the row is held there, over `entry_bytes`.
    """
    header = max(body, key=order.__getitem__)
    latch = max(i for i in body if header in successors[i])
    hot = {i for i in body if header <= i <= latch}

    def longest(weight: Callable[[Instruction], int]) -> int:
        """Return the largest sum on a path from the header that ends before it comes back."""
        best: dict[int, int] = {}
        for i in sorted(body, key=order.__getitem__):
            ahead = [best[j] for j in successors[i] if j in best and j != header]
            best[i] = weight(code[i]) + max(ahead, default=0)
        return best[header]

    def moved(family: str) -> int:
        return longest(lambda instruction: instruction.width() if instruction.family == family else 0)

    # LD: sums over a row in device memory, which kernels that hold no row read through a generic pointer.
    read = moved("LDG") or moved("LDGSTS") or moved("LD")
    inline = {id(code[i]) for i in hot}
    kinds = [code[i].kind() for i in hot]
    names, where = place(code[latch].chain)
    return Loop(
        sweep=next((name for name in reversed(names) if name not in HELPERS), "loop"),
        names=names,
        where=where,
        entries=(read or moved("LDS")) // entry_bytes,
        hot=len(hot),
        issued=longest(lambda instruction: id(instruction) in inline),
        cold=len(body) - len(hot),
        mix=tuple(kinds.count(name) for name in CLASSES),
        exponentials=sum(code[i].opcode.startswith("MUFU.EX2") for i in hot),
        read=read,
        written=moved("STG"),
    )


def flow(code: list[Instruction]) -> list[list[int]]:
    """Return the instructions that may follow each one. Calls of division routines return."""
    at = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    barriers: list[dict[str, str]] = [{} for _ in code]  # BSSY sets where BSYNC of the same register goes
    successors: list[list[int]] = [[] for _ in code]
    work, seen = [0], set()
    while work:
        i = work.pop()
        if i in seen:
            continue
        seen.add(i)
        here, name = code[i], code[i].family
        state = barriers[i]
        if name == "BSSY":
            state = {**state, here.operands.partition(",")[0]: here.target}
        nexts = [i + 1] if i + 1 < len(code) else []
        if name == "BRA" and here.target in at:
            nexts = [at[here.target], *(nexts if here.conditional else [])]
        elif name == "BSYNC":
            nexts = [at[state[here.operands]]] if here.operands in state else nexts
        elif name in ("EXIT", "RET", "BRX", "JMX") and not here.predicate:
            nexts = []
        successors[i] = nexts
        for following in nexts:
            barriers[following] = state
            work.append(following)
    return successors


def natural_loops(successors: list[list[int]]) -> dict[int, set[int]]:
    """Return the body of the loop of each header, which dominates the sources of its backward edges."""
    order = postorder(successors)
    number = {node: i for i, node in enumerate(order)}
    predecessors = defaultdict(list)
    for node in order:
        for following in successors[node]:
            predecessors[following].append(node)
    dominator = immediate_dominators(order, number, predecessors)
    bodies: dict[int, set[int]] = {}
    for node in order:
        for header in successors[node]:
            if number[header] >= number[node] and dominates(header, node, dominator):
                body, work = bodies.setdefault(header, {header}), [node]
                while work:
                    inside = work.pop()
                    if inside not in body:
                        body.add(inside)
                        work += predecessors[inside]
    return bodies


def postorder(successors: list[list[int]]) -> list[int]:
    order, seen, stack = [], {0}, [(0, iter(successors[0]))]
    while stack:
        node, rest = stack[-1]
        following = next((other for other in rest if other not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return order


def immediate_dominators(
    order: list[int], number: dict[int, int], predecessors: dict[int, list[int]]
) -> dict[int, int]:
    """Return each instruction's immediate dominator (Cooper, Harvey, Kennedy: A Simple, Fast Dominance)."""

    def common(a: int, b: int) -> int:
        while a != b:
            while number[a] < number[b]:
                a = dominator[a]
            while number[b] < number[a]:
                b = dominator[b]
        return a

    dominator, changed = {0: 0}, True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [other for other in predecessors[node] if other in dominator]
            nearest = functools.reduce(common, known)
            if dominator.get(node) != nearest:
                dominator[node], changed = nearest, True
    return dominator


def dominates(header: int, node: int, dominator: dict[int, int]) -> bool:
    while node not in (header, 0):
        node = dominator[node]
    return node == header


@functools.lru_cache
def functions(file: str) -> list[str]:
    """Return the name of the function around each line of a source file."""
    names, name = [], ""
    for line in Path(file).read_text().splitlines():
        if found := DEFINES.match(line):
            name = found[1] or found[2]
        names.append(name)
    return names


def place(chain: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], str]:
    """Return the functions around a backward branch, and the lines of the calls that lead there."""
    # nvdisasm 13.1 gives some calls of sm_100 code lines past the end of their file
    known = [(file, line) for file, line in chain if Path(file).exists() and line <= len(functions(file))]
    calls = [Path(file).read_text().splitlines()[line - 1].strip() for file, line in known[:-1]]
    return tuple(functions(file)[line - 1] for file, line in known), " < ".join(calls)
