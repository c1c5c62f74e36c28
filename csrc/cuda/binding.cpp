// Launches a sweep: device, stream, and the shape of a row.
#include <cstdlib>
#include <sstream>
#include <string>

#include "../check.h"
#include "../ops.h"
#include "rows.h"

#if !defined(OPSD_EMULATED)
#include <torch/csrc/stable/accelerator.h>

// Exported by every libtorch_cuda since 2.3. A torch built without CUDA hides the header that declares it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace opsd::cuda {
namespace {

// OPSD_CUDA_CLUSTER: the largest cluster per row; 0: no cluster, each sweep reads from device memory.
int most_blocks() {
  const char* text = std::getenv("OPSD_CUDA_CLUSTER");
  if (!text || !*text) return MOST_BLOCKS;
  const std::string value(text);
  for (const int choice : {0, 1, 2, 4, 8})
    if (value == std::to_string(choice)) return choice;
  expect(false, "OPSD_CUDA_CLUSTER", "0, 1, 2, 4 or 8", value);
  return 0;
}

#if defined(OPSD_EMULATED)
Device device_of(int32_t) { return emulated_device(); }
#else
int attribute(cudaDeviceAttr which, int32_t device) {
  int value = 0;
  const cudaError_t code = cudaDeviceGetAttribute(&value, which, device);
  expect(code == cudaSuccess, "S", "a CUDA device that answers", cudaGetErrorString(code));
  return value;
}

Device device_of(int32_t device) {
  const int architecture = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  return {architecture, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}
#endif

int64_t itemsize(Dtype dtype) { return dtype == Dtype::FLOAT32 ? 4 : 2; }

}  // namespace

void sweep(const RowArgs& a, Sweep which, int32_t device) {
  expect(a.dtype != Dtype::FLOAT64, "S", "float32, bfloat16 or float16 on CUDA", "float64");
  expect(a.V < (int64_t{1} << 31), "S", "fewer than 2**31 columns", a.V);
  if (a.n == 0) return;
#if defined(OPSD_EMULATED)
  Stream stream{};
#else
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream_pointer = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_pointer));
  const Stream stream = static_cast<Stream>(stream_pointer);
#endif
  const Shape shape = shape_for(a.V, itemsize(a.dtype), device_of(device), most_blocks());
  if (a.dtype == Dtype::FLOAT32) run_float32(a, which, shape, stream);
  else if (a.dtype == Dtype::BFLOAT16) run_bfloat16(a, which, shape, stream);
  else run_float16(a, which, shape, stream);
}

std::string launch_text(int64_t V, int64_t itemsize, int64_t architecture) {
  const Device device{static_cast<int>(architecture), architecture >= 90 ? 227 << 10 : 163 << 10};
  const Shape shape = shape_for(V, itemsize, device, most_blocks()), rows = streaming(V, itemsize);
  std::ostringstream text;
  text << "each sweep one block of " << rows.threads << " threads per row";
  if (shape.blocks) {
    text << "; fused " << shape.blocks << " of " << shape.threads << " with " << shape.per_block << " entries each in " << shape.shared_bytes / 1024
         << " KiB of shared memory";
  }
  return text.str();
}

}  // namespace opsd::cuda
