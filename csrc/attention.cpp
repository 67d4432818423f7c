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

#include "attention_host.h"
#include "star_kernels.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

namespace star_kernels {
namespace {

// U in float32, its units padded with zeros to whole vectors.
at::Tensor pad_units(const at::Tensor& unit_weights) {
  const int64_t units = unit_weights.size(2);
  const at::Tensor result =
      at::zeros({unit_weights.size(0), unit_weights.size(1), padded_units(units)}, unit_weights.options().dtype(at::kFloat));
  result.narrow(2, 0, units).copy_(unit_weights);
  return result;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> joint_attention(const at::Tensor& query_in, const at::Tensor& key_in,
                                                               const at::Tensor& value_in,
                                                               const std::optional<at::Tensor>& unit_weights,
                                                               int64_t num_image_tokens, bool text_first, double scale,
                                                               int64_t first_row, int64_t end_row, bool text_to_image,
                                                               const std::optional<at::Tensor>& text_lengths) {
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
  const at::Tensor out = at::empty({batch, num_queries, heads, dim}, query.options()).transpose(1, 2);
  const at::Tensor log_sum_exp = at::empty({batch, heads, num_queries}, query.options().dtype(at::kFloat));

  AttentionProblem problem{};
  problem.query = view(query);
  problem.key = view(key);
  problem.value = view(value);
  problem.out = view(out);
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
  problem.image_queries = place(num_image_tokens, text_queries).first;
  std::tie(problem.image_keys, problem.text_keys) = place(image_keys, text_keys);
  const std::optional<at::Tensor> lengths = checked_text_lengths(text_lengths, batch, text_keys);
  if (lengths.has_value()) problem.text_lengths = lengths->const_data_ptr<int64_t>();
  problem.rows = {first_row, end_row};
  problem.log_sum_exp = log_sum_exp.mutable_data_ptr<float>();

  at::Tensor units, head_mass, mass = at::empty({0}, query.options());
  if (unit_weights.has_value()) {
    TORCH_CHECK_VALUE(unit_weights->dim() == 3 && unit_weights->size(2) > 0 && unit_weights->size(0) == rows &&
                          unit_weights->size(1) == text_keys,
                      "unit_weights: expected [", rows, ", ", text_keys, ", K], got ", unit_weights->sizes());
  }
  if (unit_weights.has_value() && !text_to_image) {
    units = pad_units(*unit_weights);
    problem.units = unit_weights->size(2);
    problem.units_stride = units.size(2);
    problem.unit_weights = units.const_data_ptr<float>();
    head_mass = at::empty({rows, heads, num_image_tokens, problem.units}, log_sum_exp.options());
    problem.head_mass = head_mass.mutable_data_ptr<float>();
  }
  run_tasks(problem, choose_attention_kernel(type).attend, batch * heads, num_queries, num_keys);
  if (head_mass.defined()) {
    mass = at::empty({rows, num_image_tokens, problem.units}, log_sum_exp.options());
    average_heads(head_mass, mass);
  } else if (unit_weights.has_value()) {
    const auto captured = [&](const at::Tensor& tensor, int64_t first, int64_t count) {
      return tensor.narrow(0, first_row, rows).narrow(2, first, count);
    };
    const int64_t first_text = text_first ? 0 : num_image_tokens;
    mass = attention_mass(captured(query, first_text, text_queries), captured(key, problem.image_keys.begin, image_keys),
                          *unit_weights, captured(log_sum_exp, first_text, text_queries), scale,
                          lengths.has_value() ? std::optional(lengths->narrow(0, first_row, rows)) : std::nullopt, true);
  }
  return {out, mass, log_sum_exp};
}

}  // namespace star_kernels
