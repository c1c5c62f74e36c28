// The CUDA sweeps: one entry point per type of buffer, all compiled from rows.cu.
#pragma once

#include "../row_args.h"
#include "launch.h"

#if defined(OPSD_EMULATED)
#include "emulator.h"
#else
#include <cuda_runtime_api.h>

namespace opsd::cuda {
using Stream = cudaStream_t;
}
#endif

namespace opsd::cuda {

void run_float32(const RowArgs& a, Sweep which, const Shape& shape, Stream stream);
void run_bfloat16(const RowArgs& a, Sweep which, const Shape& shape, Stream stream);
void run_float16(const RowArgs& a, Sweep which, const Shape& shape, Stream stream);

}  // namespace opsd::cuda
