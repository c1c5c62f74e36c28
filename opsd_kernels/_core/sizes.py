"""Name the dtypes, and the measured sizes and limits, that the planner and the loop share."""

from __future__ import annotations

import torch

DEFAULT_WORKSPACE_BYTES = 1 << 30
ROW_MULTIPLE = 16
# Scratch bytes of the math library and the row sweeps on a CPU, per process and per thread. Measured on an
# AMD EPYC at V = 151936 with H = 64 on 1, 2, 4, 8 and 16 threads: fp32 3.9, 9.7, 20, 48, 96 MiB. oneDNN packs
# more of 16-bit operands for tile units (AMX): 14.8 MiB on two threads under torch 2.13, 16.6 under 2.15.
# Scratch takes at most half of a budget, and always leaves the bytes of one row.
CPU_SCRATCH_BYTES, CPU_SCRATCH_PER_THREAD, CPU_SCRATCH_PER_THREAD_AMX = 2 << 20, 6 << 20, 9 << 20
# Rows per chunk beyond which a call gains nothing. A trainable head reads and writes the fp32 dW once per
# chunk. On two AVX-512 cores with bf16 inputs, 256, 512 and 1024 rows take 1.19, 1.13 and 1.05 of the time of
# the bare GEMMs (H = 1024). fp32 inputs, whose GEMMs take four times as long, take 1.00 at 256 rows and 1.11
# at 1024, because fresh buffers cost time as well. On CUDA dW takes 25 % of the lower bound at 1024 rows and
# 6 % at 4096 (H = 4096).
ROW_LIMITS = {("cpu", True): 1024, ("cpu", False): 256, ("cuda", True): 4096, ("cuda", False): 1024}
WIDE_CPU_ROWS = 256  # the same limit for 32- and 64-bit inputs
ALIGNED_ROWS = 1024  # limit to which a chunk may grow to hold a whole sequence
SUPPORT_BYTES = 96  # per entry of a support: a dozen numbers, each in its own tensor
# Of one head whose entries are listed: per thread (on 8 in fp32 1 MiB, where others take 25); per output
LIST_SCRATCH, LISTED_BYTES = 1 << 20, 12
# fp32 copies in one product of fp16 matrices, and of bf16 ones where the CPU has no units for them
SLICE_BYTES = 8 << 20
# Where products are MKL's, in fp32, it packs columns of a head, per thread and up to this width: 9.9 MiB on
# two threads from a hidden size of 128 on, 3.5 at 64, 2.0 at 32; on 1, 4 and 8 threads 5.2, 14.8 and 38.4
# (V = 151936, 160 rows, an AMD EPYC with AVX2 alone). Of a slice up to twice the width: 10.3 MiB at 192, 3.9
# at 1024. The heap keeps up to HOLES_BYTES more per thread: the budget leaves it, no plan counts it.
PACKED_COLUMNS, PACKED_WIDTH, HOLES_BYTES = 9 << 10, 128, 6 << 20
# Slices of fp32 logits to which an adapter's part is added while they are in the cache of a CPU. At 256 rows,
# V = 32000 and rank 16 both products of the gradient take 17 ms of one thread in slices, and 31 without. On
# CUDA 16-bit logits alone are made in slices.
ADAPTED_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
# A slice of a head that is read by slices, as its GEMM takes it, and the wide copy of the few of its rows
# that are multiplied by their scales at a time.
SLICED_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
COPIED_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}
# A slice of the student's head in fp32, to make a forward-KL cache.
WIDENED_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
COPY_BYTES = 1 << 20  # an fp32 copy of rows of 16-bit hidden states
SELECT_BYTES = 48  # per column: its norm, share, group and index
KEPT_BYTES = 16 << 20  # a slice of the kept columns: of the gradient, of the head and of dW
QUEUE_BYTES = 16  # per column and thread while torch.topk runs
# Per column and thread: a sweep's rows of scratch (csrc/cpu/rows.cpp), and as much again for a divergence of
# two sweeps. With this package's GEMMs there is little else: at V = 151936 on 2 and 8 threads 4 and 16 MiB in
# fp32, up to 7 and 19 in bf16, 32 for two sweeps on 8; at V = 32000 4 on 8.
ROW_BYTES, SWEEP_BYTES = 16, 16
NARROW_BYTES = 4 << 20  # more for 16-bit inputs: one head takes 0 to 4 MiB, three teachers' 10
# The same for a gradient that is narrowed to 16 bits in the buffer of fp32 logits: a copy of the row, for
# which the heap grows a few times. Without a second head 4.7, 9.2 and 18 MiB on 1, 2 and 4 threads at
# V = 151936. Not beside a head that is read by slices: 12.8, 12.5 and 15.2 MiB with the 9 of its slices.
NARROWING_BYTES = 32
# With a trainable head on CUDA a chunk may be projected and swept in parts. The student's buffer becomes the
# gradient of the whole chunk, which the GEMMs of dh and dW take at once; the teacher's is free after a sweep
# and holds one part. The same bytes then hold up to 12/7 of the rows, and dW is read and written less often:
# 6 to 9 % of the GEMMs' time by the model (docs/design/projection.md). Shorter parts would read the head more
# slowly than they multiply it.
MOST_PARTS, LEAST_PART_ROWS = 6, 512
# A row of logits takes a multiple of this: any V then has 16-byte accesses, and a GEMM its fastest leading
# dimension.
CUDA_ROW_BYTES = 128
# Largest logit scale / temperature of 16-bit logits under "auto". At V = 8192 and |z| to 16, without labels,
# the gradient is off by 1 % at 4 and by more than 2 % at 10.
LARGEST_FACTOR = 4.0
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
