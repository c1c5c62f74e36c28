// Checks of tensor arguments. Every message names the argument, the expected value and the given one.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace opsd {

template <class Got>
inline void expect(bool condition, const char* argument, const std::string& expected, const Got& got) {
  if (condition) return;
  std::ostringstream text;
  text << argument << ": expected " << expected << ", got " << got;
  throw std::runtime_error(text.str());
}

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << "shape (";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ")";
  return text.str();
}

inline void check_shape(const torch::stable::Tensor& x, const char* argument, const std::vector<int64_t>& expected) {
  const auto sizes = x.sizes();
  const std::vector<int64_t> got(sizes.begin(), sizes.end());
  expect(got == expected, argument, shape_text(expected), shape_text(got));
}

inline void check_dtype(const torch::stable::Tensor& x, const char* argument, torch::headeronly::ScalarType expected) {
  expect(x.scalar_type() == expected, argument, torch::headeronly::toString(expected), torch::headeronly::toString(x.scalar_type()));
}

// (n, V) with unit column stride and rows that do not overlap or, if `repeated`, are one row for all.
// Strides of dimensions of size one are ignored.
inline void check_rows(const torch::stable::Tensor& x, const char* argument, int64_t n, int64_t V, bool repeated = false) {
  check_shape(x, argument, {n, V});
  expect(V == 1 || x.stride(1) == 1, argument, "a column stride of 1", x.stride(1));
  expect(n == 1 || x.stride(0) >= V || (repeated && x.stride(0) == 0), argument,
         "a row stride of at least " + std::to_string(V) + (repeated ? ", or 0" : ""), x.stride(0));
}

inline void check_device(const torch::stable::Tensor& x, const char* argument, const torch::stable::Tensor& S) {
  expect(x.device().type() == S.device().type() && x.get_device_index() == S.get_device_index(), argument, "a tensor on the device of S", "one on another");
}

// Contiguous, of the dtype of the statistics.
inline void check_vector(const torch::stable::Tensor& x, const char* argument, const std::vector<int64_t>& shape,
                         torch::headeronly::ScalarType dtype) {
  check_shape(x, argument, shape);
  check_dtype(x, argument, dtype);
  expect(x.is_contiguous(), argument, "a contiguous tensor", "a strided one");
}

}  // namespace opsd
