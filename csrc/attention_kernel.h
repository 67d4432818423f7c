// What csrc/attention.cpp and csrc/attention_mass.cpp ask of the tiles, and what each instruction set offers: no PyTorch in here.
#pragma once

#include <cstdint>

namespace star_kernels {

// [batch, heads, tokens, D] with D innermost; strides count elements.
struct HeadsView {
  void* data;
  int64_t batch, head, token;
};

struct TokenRange {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

struct AttentionProblem {
  HeadsView query, key, value, out;
  int64_t batch, heads, num_queries, num_keys, head_dim;
  float scale;
  // Keys are read range by range, image before text; the mass is that of the image queries over the text keys.
  TokenRange image_queries, image_keys, text_keys;
  const int64_t* text_lengths;  // [batch]: as many of the text keys count, or null where all do
  // Batch rows that are captured; U [rows, text, units_stride], zero beyond `units`, or null.
  TokenRange rows;
  const float* unit_weights;
  int64_t units, units_stride;
  float* log_sum_exp;  // [batch, heads, num_queries]
  float* head_mass;    // [rows, heads, image queries, units]: each head has its own, and writes it once
};

// The mass from log-sum-exps: of image tokens over those text tokens that count for a unit.
struct MassProblem {
  HeadsView image, text;
  int64_t rows, heads, num_image, num_text, head_dim;
  float scale;
  // [rows, heads, image tokens], or [rows, heads, text tokens] where the softmax is that of text queries.
  const float* log_sum_exp;
  int64_t log_sum_exp_row, log_sum_exp_head, log_sum_exp_token;
  bool of_text;
  const int64_t* counts;      // [rows]: how many text tokens count
  const int64_t* tokens;      // [rows, num_text]: which ones
  const float* unit_weights;  // their rows of U, [rows, num_text, units_stride], zero beyond `units`
  int64_t units, units_stride;
  float* head_mass;  // [rows, heads, num_image, units]: each head has its own, and writes it once
};

// Rows of queries (of image tokens where the mass is computed alone) that one task works on.
constexpr int64_t kTaskRows = 96;

// Tasks are numbered (batch, head, block of rows); any cut of them among threads gives the same bits. Scratch is 64-byte
// aligned, belongs to the caller's thread, and holds `scratch_bytes`.
template <typename Problem>
struct Pass {
  int64_t (*scratch_bytes)(const Problem&);
  void (*run)(const Problem&, int64_t begin, int64_t end, void* scratch);
};
struct AttentionKernel {
  Pass<AttentionProblem> attend;
  Pass<MassProblem> mass;
};

enum class AttentionInput { float32, bfloat16, float16 };

// In the order of preference from last to first. Where the compiler cannot build an instruction set, its functions are null.
AttentionKernel attention_default(AttentionInput input);
AttentionKernel attention_avx2(AttentionInput input);
AttentionKernel attention_avx512(AttentionInput input);
AttentionKernel attention_avx512_bf16();  // bfloat16 input, products of bf16 pairs

}  // namespace star_kernels
