// What csrc/attention.cpp and csrc/attention_mass.cpp share between PyTorch and the tiles.
#pragma once

#include "attention_kernel.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <optional>

namespace star_kernels {

// U is padded to whole vectors of any instruction set.
constexpr int64_t kUnitsMultiple = 16;
// Multiply-adds that make a second thread worth waking.
constexpr int64_t kWorkPerThread = 1 << 20;

AttentionKernel choose_attention_kernel(at::ScalarType type);

// mass [rows, image, K] from head_mass [rows, heads, image, K], head by head in order.
void average_heads(const at::Tensor& head_mass, const at::Tensor& mass);

// [rows] as int64, side by side. Raises where that is not what it is, or a length is none of `num_text` tokens.
std::optional<at::Tensor> checked_text_lengths(const std::optional<at::Tensor>& text_lengths, int64_t rows, int64_t num_text);

inline int64_t padded_units(int64_t units) { return (units + kUnitsMultiple - 1) / kUnitsMultiple * kUnitsMultiple; }

// The kernels read along D; a tensor with another innermost dimension is copied.
inline at::Tensor rows_of_heads(const at::Tensor& tensor) { return tensor.stride(3) == 1 ? tensor : tensor.contiguous(); }

inline HeadsView view(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The tasks of a pass, one per head of a row and block of its `tokens`, against `others` tokens each.
template <typename Problem>
void run_tasks(const Problem& problem, const Pass<Problem>& pass, int64_t heads, int64_t tokens, int64_t others) {
  const int64_t work = kTaskRows * std::max<int64_t>(others, 1) * problem.head_dim;
  const int64_t tasks = heads * ((tokens + kTaskRows - 1) / kTaskRows), bytes = pass.scratch_bytes(problem);
  at::parallel_for(0, tasks, std::max<int64_t>(1, kWorkPerThread / work), [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(bytes);
    pass.run(problem, begin, end, scratch.get());
  });
}

}  // namespace star_kernels
