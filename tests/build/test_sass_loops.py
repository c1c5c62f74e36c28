"""Loops over entries in machine code, by hand."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parent))
import sass_budget
from sass_loops import loops_over_entries, parse

# A loop over 8 pairs of 16 bits: of its 11 instructions in line 2 exclude each other, 3 are cold. An inner
# part is skipped by way of a barrier. After it a reduction over partial sums.
LISTING = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR6][R30.64] ;
        /*0020*/                   BSSY B0, `(.L_x_2) ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   LDG.E.128 R8, desc[UR6][R16.64] ;
        /*0050*/                   BSYNC B0 ;
.L_x_1:
        /*0060*/                   LDG.E.128 R8, desc[UR6][R18.64] ;
.L_x_2:
        /*0070*/                   SHF.L.U32 R33, R4.reuse, 0x10, RZ ;
        /*0080*/                   MUFU.EX2 R33, R4 ;
        /*0090*/               @P1 BRA `(.L_x_4) ;
.L_x_3:
        /*00a0*/                   FFMA R4, R4, R5, R6 ;
        /*00b0*/              @!P2 BRA `(.L_x_0) ;
.L_x_5:
        /*00c0*/                   LDS.128 R8, [R46+0x330] ;
        /*00d0*/               @P3 BRA `(.L_x_5) ;
        /*00e0*/                   EXIT ;
.L_x_4:
        /*00f0*/                   FADD R4, R4, R5 ;
        /*0100*/                   FADD R4, R4, R5 ;
        /*0110*/                   BRA `(.L_x_3) ;
"""


def test_a_loop_by_hand():
    ((name, code),) = parse(LISTING)
    assert name == "kernel" and len(code) == 18
    (loop,) = loops_over_entries(code, 4)
    assert loop.entries == 8 and loop.read == 32 and loop.written == 0
    assert loop.hot == 11 and loop.cold == 3
    # LDG BSSY BRA LDG BSYNC, then SHF MUFU BRA FFMA BRA
    assert loop.issued == 10
    assert dict(zip(("fp32", "mufu", "convert", "integer", "memory"), loop.mix, strict=True)) == {
        "fp32": 1,
        "mufu": 1,
        "convert": 1,
        "integer": 5,
        "memory": 3,
    }


def row(sweep: str, each: float) -> list[str]:
    line = ["cuda", "fused", "bf16", "90", sweep, "8", str(each)]
    return line + ["0"] * (len(sass_budget.HEADER) - len(line))


def test_sums_over_sweeps_with_and_without_metrics():
    rows = [row("near_sweep", 20.0), row("near_sweep metrics", 28.0), row("gradient", 10.0)]
    key = ("cuda", "fused", "bf16", "90")
    assert sass_budget.totals(rows) == {key: (30.0, 38.0)}
    header, line = sass_budget.side_by_side([row("near_sweep", 60.0)], rows)
    assert dict(zip(header, line, strict=True))["ratio"] == "0.50"


def test_a_change_of_the_table_is_told():
    first, *rest = [line for line in sass_budget.read_table() if line[0] == "triton"]
    assert sass_budget.changes([first, *rest], "triton") == []
    worse = [*first[:6], "999.0", *first[7:]]
    told = sass_budget.changes([worse, *rest], "triton")
    assert sorted(line.split()[0] for line in told) == ["before", "now"] and len(told) == 2
