// What csrc/attention.cpp asks of the tiles, and what each instruction set offers: no PyTorch in here.
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
  TokenRange image_queries, text_queries, image_keys, text_keys;
  // Batch rows that are captured; U [rows, text, units_stride], zero beyond `units`, or null.
  TokenRange rows;
  const float* unit_weights;
  int64_t units, units_stride;
  float* log_sum_exp;  // [batch, heads, num_queries]
  float* head_mass;    // [rows, heads, image queries, units]: each head has its own, and writes it once
};

// Rows of queries (of image keys in the other direction) that one task works on.
constexpr int64_t kTaskRows = 96;
// U is padded to whole vectors of any instruction set.
constexpr int64_t kUnitsMultiple = 16;

// Tasks are numbered (batch, head, block of rows); any cut of them among threads gives the same bits. Scratch is 64-byte
// aligned, belongs to the caller's thread, and holds `scratch_bytes`.
struct AttentionKernel {
  int64_t (*scratch_bytes)(const AttentionProblem&);
  void (*attend)(const AttentionProblem&, int64_t begin, int64_t end, void* scratch);
  void (*text_to_image)(const AttentionProblem&, int64_t begin, int64_t end, void* scratch);
};

enum class AttentionInput { float32, bfloat16, float16 };

// In the order of preference from last to first. Where the compiler cannot build an instruction set, its functions are null.
AttentionKernel attention_default(AttentionInput input);
AttentionKernel attention_avx2(AttentionInput input);
AttentionKernel attention_avx512(AttentionInput input);
AttentionKernel attention_avx512_bf16();  // bfloat16 input, products of bf16 pairs

}  // namespace star_kernels
