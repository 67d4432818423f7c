// Joint attention with attention mass on the CPU, docs/method.md, section 3.
//
// Floor, per sample: 4 heads N^2 D operations for the two products, heads N^2 exponentials, and 2 heads N_image N_text K operations
// for the mass; query, key, value and out are read or written once, 4 heads N D numbers. At N 1229, D 64, 24 heads that is
// 9.3e9 operations for 30 MB in float32: some hundred operations per byte, bound by arithmetic. An exponential is ten
// instructions per vector beside the 2 D multiply-adds of its logits, so the products bind.
//
// Design. A task is a block of query rows of one head. It walks the keys in blocks: logits in tiles of registers, the new row
// maximum, probabilities, and their product with the values, added to float32 sums that are rescaled when the maximum rises.
// Keys are packed once per head and thread, transposed, and values in panels, so that the tiles read whole vectors in order;
// strided tensors are read in place for that. Image keys come first, text keys in a second loop, and the capture is in that
// loop alone: one more product of the same probabilities, with the unit weights instead of the values.
//
// The mass of each head goes into a slot of its own, and the heads are added in order when all are there. The slots are
// K / D of the size of the query; one buffer for all heads would need the keys of each head packed anew for each task.
// What a row gets does not depend on which thread computes it, or what else is in the batch: results are the same bit for bit
// for any batch and any number of threads.

#include "attention_kernel.h"
#include "star_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace star_kernels {
namespace {

// Multiply-adds that make a second thread worth waking.
constexpr int64_t kWorkPerThread = 1 << 20;

AttentionKernel choose_kernel(at::ScalarType type) {
  const CpuLevel level = cpu_level();
  if (type == at::kBFloat16 && level >= CpuLevel::avx512_bf16) {
    if (const AttentionKernel kernel = attention_avx512_bf16(); kernel.attend != nullptr) return kernel;
  }
  const AttentionInput input = type == at::kFloat      ? AttentionInput::float32
                               : type == at::kBFloat16 ? AttentionInput::bfloat16
                                                       : AttentionInput::float16;
  if (level >= CpuLevel::avx512) {
    if (const AttentionKernel kernel = attention_avx512(input); kernel.attend != nullptr) return kernel;
  }
  if (level >= CpuLevel::avx2) {
    if (const AttentionKernel kernel = attention_avx2(input); kernel.attend != nullptr) return kernel;
  }
  return attention_default(input);
}

// The kernels read along D; a tensor with another innermost dimension is copied.
at::Tensor rows_of_heads(const at::Tensor& tensor) { return tensor.stride(3) == 1 ? tensor : tensor.contiguous(); }

HeadsView view(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void run(const AttentionProblem& problem, const AttentionKernel& kernel,
         void (*pass)(const AttentionProblem&, int64_t, int64_t, void*), int64_t tasks, int64_t keys) {
  const int64_t work = kTaskRows * std::max<int64_t>(keys, 1) * problem.head_dim;
  const int64_t bytes = kernel.scratch_bytes(problem);
  at::parallel_for(0, tasks, std::max<int64_t>(1, kWorkPerThread / work), [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(bytes);
    pass(problem, begin, end, scratch.get());
  });
}

int64_t blocks(int64_t rows) { return (rows + kTaskRows - 1) / kTaskRows; }

// mass [rows, image, K] from head_mass [rows, heads, image, K], head by head in order.
void average_heads(const at::Tensor& head_mass, const at::Tensor& mass) {
  constexpr int64_t block = 1024;
  const int64_t heads = head_mass.size(1), size = head_mass.size(2) * head_mass.size(3);
  const int64_t chunks = (size + block - 1) / block;
  const float* from = head_mass.const_data_ptr<float>();
  float* to = mass.mutable_data_ptr<float>();
  at::parallel_for(0, head_mass.size(0) * chunks, std::max<int64_t>(1, 65536 / (block * heads)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / chunks, first = i % chunks * block, count = std::min(block, size - first);
      float total[block] = {};
      for (int64_t head = 0; head < heads; ++head) {
        const float* values = from + (row * heads + head) * size + first;
        for (int64_t k = 0; k < count; ++k) total[k] += values[k];
      }
      for (int64_t k = 0; k < count; ++k) to[row * size + first + k] = total[k] / static_cast<float>(heads);
    }
  });
}

// U in float32, its units padded with zeros to whole vectors.
at::Tensor pad_units(const at::Tensor& unit_weights) {
  const int64_t units = unit_weights.size(2), padded = (units + kUnitsMultiple - 1) / kUnitsMultiple * kUnitsMultiple;
  const at::Tensor result =
      at::zeros({unit_weights.size(0), unit_weights.size(1), padded}, unit_weights.options().dtype(at::kFloat));
  result.narrow(2, 0, units).copy_(unit_weights);
  return result;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> joint_attention(const at::Tensor& query_in, const at::Tensor& key_in,
                                                               const at::Tensor& value_in,
                                                               const std::optional<at::Tensor>& unit_weights,
                                                               int64_t num_image_tokens, bool text_first, double scale,
                                                               int64_t first_row, int64_t end_row, bool text_to_image) {
  const auto type = query_in.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                   "query: expected dtype float32, bfloat16 or float16, got ", type);
  TORCH_CHECK_VALUE(query_in.dim() == 4 && query_in.numel() > 0, "query: expected [B, heads, N, D] without zero sizes, got ",
                    query_in.sizes());
  const int64_t batch = query_in.size(0), heads = query_in.size(1), num_queries = query_in.size(2), dim = query_in.size(3);
  for (const auto& [name, tensor] : {std::pair("key", &key_in), std::pair("value", &value_in)}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == type, name, ": expected dtype ", type, ", got ", tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->dim() == 4 && tensor->size(2) > 0 &&
                          tensor->sizes() == at::IntArrayRef({batch, heads, key_in.size(2), dim}),
                      name, ": expected [", batch, ", ", heads, ", N_keys, ", dim, "], got ", tensor->sizes());
  }
  const int64_t num_keys = key_in.size(2);
  TORCH_CHECK_VALUE(num_image_tokens >= 1 && num_image_tokens <= num_queries &&
                        (num_image_tokens == num_queries || num_keys == num_queries),
                    "num_image_tokens: expected 1 to ", num_queries, ", and all of them unless keys and queries are the same, got ",
                    num_image_tokens);
  TORCH_CHECK_VALUE(first_row >= 0 && first_row < end_row && end_row <= batch, "rows: expected a range of ", batch, ", got ",
                    first_row, " to ", end_row);
  const int64_t text_queries = num_queries - num_image_tokens, text_keys = text_queries == 0 ? num_keys : text_queries;
  const int64_t image_keys = num_keys - text_keys, rows = end_row - first_row;
  TORCH_CHECK_VALUE(!text_to_image || text_queries > 0, "direction: expected image_to_text without text queries");

  const at::Tensor query = rows_of_heads(query_in), key = rows_of_heads(key_in), value = rows_of_heads(value_in);
  const at::Tensor out = at::empty_like(query_in);
  const at::Tensor result = out.stride(3) == 1 ? out : at::empty(out.sizes(), out.options());
  const at::Tensor log_sum_exp = at::empty({batch, heads, num_queries}, query.options().dtype(at::kFloat));

  AttentionProblem problem{};
  problem.query = view(query);
  problem.key = view(key);
  problem.value = view(value);
  problem.out = view(result);
  problem.batch = batch;
  problem.heads = heads;
  problem.num_queries = num_queries;
  problem.num_keys = num_keys;
  problem.head_dim = dim;
  problem.scale = static_cast<float>(scale);
  const auto place = [&](int64_t image, int64_t text) {
    return text_first ? std::pair(TokenRange{text, text + image}, TokenRange{0, text})
                      : std::pair(TokenRange{0, image}, TokenRange{image, image + text});
  };
  std::tie(problem.image_queries, problem.text_queries) = place(num_image_tokens, text_queries);
  std::tie(problem.image_keys, problem.text_keys) = place(image_keys, text_keys);
  problem.rows = {first_row, end_row};
  problem.log_sum_exp = log_sum_exp.mutable_data_ptr<float>();

  at::Tensor units, head_mass, mass = at::empty({0}, query.options());
  if (unit_weights.has_value()) {
    TORCH_CHECK_VALUE(unit_weights->dim() == 3 && unit_weights->size(2) > 0 && unit_weights->size(0) == rows &&
                          unit_weights->size(1) == text_keys,
                      "unit_weights: expected [", rows, ", ", text_keys, ", K], got ", unit_weights->sizes());
    units = pad_units(*unit_weights);
    problem.units = unit_weights->size(2);
    problem.units_stride = units.size(2);
    head_mass = at::empty({rows, heads, num_image_tokens, problem.units}, log_sum_exp.options());
    mass = at::empty({rows, num_image_tokens, problem.units}, log_sum_exp.options());
    problem.head_mass = head_mass.mutable_data_ptr<float>();
    if (!text_to_image) problem.unit_weights = units.const_data_ptr<float>();
  }

  const AttentionKernel kernel = choose_kernel(type);
  run(problem, kernel, kernel.attend, batch * heads * blocks(num_queries), num_keys);
  if (unit_weights.has_value()) {
    if (text_to_image) {
      problem.unit_weights = units.const_data_ptr<float>();
      run(problem, kernel, kernel.text_to_image, rows * heads * blocks(image_keys), text_queries);
    }
    average_heads(head_mass, mass);
  }
  if (!result.is_same(out)) out.copy_(result);
  return {out, mass, log_sum_exp};
}

}  // namespace star_kernels
