// The mass from the log-sum-exps of an attention that something else computed, docs/method.md, section 3.
//
// Floor, per sample: 2 heads N_image N_text (D + K) operations and heads N_image N_text exponentials, over the text tokens that
// count for a unit; queries and keys are read once. At N_image 1024, D 64, 24 heads and 24 such tokens that is 85e6 operations
// for 6.6 MB in float32, 13 per byte: reading the image queries binds nearly as much as arithmetic.
//
// Design. The tiles of joint attention without its maxima and values: a task is a block of image tokens of one head, logits in
// tiles of registers, probabilities, and their product with U. A text token that counts for no unit, or lies beyond its row's
// length, adds nothing: only the others are packed, with their rows of U. What a row gets depends on that row alone, and sums
// are added in one order whatever the threads.

#include "attention_host.h"
#include "star_kernels.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <vector>

namespace star_kernels {

AttentionKernel choose_attention_kernel(at::ScalarType type) {
  const CpuLevel level = cpu_level();
  if (type == at::kBFloat16 && level >= CpuLevel::avx512_bf16) {
    if (const AttentionKernel kernel = attention_avx512_bf16(); kernel.attend.run != nullptr) return kernel;
  }
  const AttentionInput input = type == at::kFloat      ? AttentionInput::float32
                               : type == at::kBFloat16 ? AttentionInput::bfloat16
                                                       : AttentionInput::float16;
  if (level >= CpuLevel::avx512) {
    if (const AttentionKernel kernel = attention_avx512(input); kernel.attend.run != nullptr) return kernel;
  }
  if (level >= CpuLevel::avx2) {
    if (const AttentionKernel kernel = attention_avx2(input); kernel.attend.run != nullptr) return kernel;
  }
  return attention_default(input);
}

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

std::optional<at::Tensor> checked_text_lengths(const std::optional<at::Tensor>& text_lengths, int64_t rows, int64_t num_text) {
  if (!text_lengths.has_value()) return std::nullopt;
  TORCH_CHECK_TYPE(text_lengths->scalar_type() == at::kInt || text_lengths->scalar_type() == at::kLong,
                   "text_lengths: expected dtype int32 or int64, got ", text_lengths->scalar_type());
  TORCH_CHECK_VALUE(text_lengths->sizes() == at::IntArrayRef({rows}), "text_lengths: expected [", rows, "], got ",
                    text_lengths->sizes());
  const at::Tensor lengths = text_lengths->to(at::kLong).contiguous();
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t length = lengths.const_data_ptr<int64_t>()[b];
    TORCH_CHECK_VALUE(0 <= length && length <= num_text, "text_lengths: expected values from 0 to ", num_text, ", got ", length);
  }
  return lengths;
}

at::Tensor attention_mass(const at::Tensor& query, const at::Tensor& key, const at::Tensor& unit_weights,
                          const at::Tensor& log_sum_exp, double scale, const std::optional<at::Tensor>& text_lengths,
                          bool text_to_image) {
  const auto type = query.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                   "query: expected dtype float32, bfloat16 or float16, got ", type);
  TORCH_CHECK_TYPE(key.scalar_type() == type, "key: expected dtype ", type, ", got ", key.scalar_type());
  TORCH_CHECK_TYPE(log_sum_exp.scalar_type() == at::kFloat, "log_sum_exp: expected dtype float32, got ",
                   log_sum_exp.scalar_type());
  TORCH_CHECK_VALUE(query.dim() == 4 && query.numel() > 0, "query: expected [rows, heads, N, D] without zero sizes, got ",
                    query.sizes());
  const int64_t rows = query.size(0), heads = query.size(1), dim = query.size(3);
  TORCH_CHECK_VALUE(key.dim() == 4 && key.size(2) > 0 && key.sizes() == at::IntArrayRef({rows, heads, key.size(2), dim}),
                    "key: expected [", rows, ", ", heads, ", N_keys, ", dim, "], got ", key.sizes());
  TORCH_CHECK_VALUE(log_sum_exp.sizes() == at::IntArrayRef({rows, heads, query.size(2)}), "log_sum_exp: expected [", rows, ", ",
                    heads, ", ", query.size(2), "], got ", log_sum_exp.sizes());
  const at::Tensor image = rows_of_heads(text_to_image ? key : query), text = rows_of_heads(text_to_image ? query : key);
  const int64_t num_image = image.size(2), num_text = text.size(2);
  TORCH_CHECK_VALUE(unit_weights.dim() == 3 && unit_weights.size(2) > 0 &&
                        unit_weights.sizes() == at::IntArrayRef({rows, num_text, unit_weights.size(2)}),
                    "unit_weights: expected [", rows, ", ", num_text, ", K], got ", unit_weights.sizes());
  const int64_t units = unit_weights.size(2), units_stride = padded_units(units);
  const std::optional<at::Tensor> lengths = checked_text_lengths(text_lengths, rows, num_text);

  const at::Tensor weights = unit_weights.to(at::kFloat).contiguous();
  const at::Tensor packed = at::empty({rows, num_text, units_stride}, weights.options());
  std::vector<int64_t> counts(rows), tokens(rows * num_text);
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t length = lengths.has_value() ? lengths->const_data_ptr<int64_t>()[b] : num_text;
    for (int64_t token = 0; token < length; ++token) {
      const float* from = weights.const_data_ptr<float>() + (b * num_text + token) * units;
      if (std::all_of(from, from + units, [](float weight) { return weight == 0.0f; })) continue;
      float* to = packed.mutable_data_ptr<float>() + (b * num_text + counts[b]) * units_stride;
      std::fill(std::copy(from, from + units, to), to + units_stride, 0.0f);
      tokens[b * num_text + counts[b]++] = token;
    }
  }

  const at::Tensor head_mass = at::empty({rows, heads, num_image, units}, log_sum_exp.options());
  const at::Tensor mass = at::empty({rows, num_image, units}, log_sum_exp.options());
  MassProblem problem{};
  problem.image = view(image);
  problem.text = view(text);
  problem.rows = rows;
  problem.heads = heads;
  problem.num_image = num_image;
  problem.num_text = num_text;
  problem.head_dim = dim;
  problem.scale = static_cast<float>(scale);
  problem.log_sum_exp = log_sum_exp.const_data_ptr<float>();
  problem.log_sum_exp_row = log_sum_exp.stride(0);
  problem.log_sum_exp_head = log_sum_exp.stride(1);
  problem.log_sum_exp_token = log_sum_exp.stride(2);
  problem.of_text = text_to_image;
  problem.counts = counts.data();
  problem.tokens = tokens.data();
  problem.unit_weights = packed.const_data_ptr<float>();
  problem.units = units;
  problem.units_stride = units_stride;
  problem.head_mass = head_mass.mutable_data_ptr<float>();
  run_tasks(problem, choose_attention_kernel(type).mass, rows * heads, num_image, *std::max_element(counts.begin(), counts.end()));
  average_heads(head_mass, mass);
  return mass;
}

}  // namespace star_kernels
