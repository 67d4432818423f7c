// Mass to allocation map on the CPU, docs/method.md, section 4.
//
// Floor: one read of the mass [N, K] from memory (N = h w) and one write of the weights [N]. Everything between is a
// few passes over N doubles, which stay in the first levels of cache, so the mass is read twice (once for the totals of the
// units, once to combine them) and the second time mostly from cache. Bound by memory while no power is taken.
//
// One sample is the work of one thread, in a fixed order and in double: the result depends neither on the number of
// threads nor on the rest of the batch, and the mean of the weights is 1 up to the rounding of the output.

#include "star_kernels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace star_kernels {
namespace {

struct Options {
  Combine combine;
  double sharpness;
  bool smooth;
  double strength;
  std::optional<std::array<double, 2>> clamp;
};

// Entries of the mass that make a second thread worth waking.
constexpr int64_t kEntriesPerThread = 32768;

struct Shape {
  int64_t height, width, units;
  int64_t positions() const { return height * width; }
};

// Index into the sample's mass of the first entry that is negative, NaN or infinite; -1 without one.
template <typename Mass>
int64_t first_bad_entry(const Mass* mass, const bool* valid, const Shape& shape) {
  for (int64_t i = 0; i < shape.positions(); ++i) {
    if (valid != nullptr && !valid[i]) continue;
    for (int64_t k = 0; k < shape.units; ++k) {
      const double value = static_cast<double>(mass[i * shape.units + k]);
      if (!(value >= 0.0 && std::isfinite(value))) return i * shape.units + k;
    }
  }
  return -1;
}

// out = the 3x3 binomial sum [1 2 1]^T [1 2 1] of `in`, zero beyond the border. `rows` is scratch.
void binomial_sum(const double* in, double* rows, double* out, const Shape& shape) {
  const int64_t h = shape.height, w = shape.width;
  for (int64_t y = 0; y < h; ++y) {
    const double* line = in + y * w;
    for (int64_t x = 0; x < w; ++x) {
      const double left = x > 0 ? line[x - 1] : 0.0, right = x + 1 < w ? line[x + 1] : 0.0;
      rows[y * w + x] = left + 2.0 * line[x] + right;
    }
  }
  for (int64_t y = 0; y < h; ++y) {
    for (int64_t x = 0; x < w; ++x) {
      const int64_t i = y * w + x;
      const double above = y > 0 ? rows[i - w] : 0.0, below = y + 1 < h ? rows[i + w] : 0.0;
      out[i] = above + 2.0 * rows[i] + below;
    }
  }
}

double sum(const std::vector<double>& values) {
  double total = 0.0;
  for (const double value : values) total += value;
  return total;
}

// Scratch of one thread, as large as one sample.
struct Workspace {
  explicit Workspace(const Shape& shape)
      : totals(shape.units), map(shape.positions()), valid(shape.positions()), blurred(shape.positions()),
        valid_blurred(shape.positions()), rows(shape.positions()) {}
  std::vector<double> totals, map, valid, blurred, valid_blurred, rows;
};

// mass [N, K], mask [N] or null, weights [N]. Returns false where an entry of the mass is negative or not finite.
template <typename Mass, typename Weight>
bool map_sample(const Mass* mass, const bool* mask, Weight* weights, const Shape& shape, const Options& options,
                Workspace& work) {
  const int64_t n = shape.positions(), units = shape.units;
  std::vector<double>&map = work.map, &valid = work.valid, &totals = work.totals;

  for (int64_t i = 0; i < n; ++i) valid[i] = mask == nullptr || mask[i] ? 1.0 : 0.0;
  const double count = sum(valid);

  std::fill(totals.begin(), totals.end(), 0.0);
  bool negative = false;
  for (int64_t i = 0; i < n; ++i) {
    if (valid[i] == 0.0) continue;
    const Mass* row = mass + i * units;
    for (int64_t k = 0; k < units; ++k) {
      const double value = static_cast<double>(row[k]);
      negative |= value < 0.0;
      totals[k] += value;
    }
  }
  bool any_unit = false;
  for (const double total : totals) {
    if (negative || !std::isfinite(total)) return false;
    any_unit |= total > 0.0;
  }

  // A unit without mass adds zero to the sum and to the maximum, so dividing its mass by one drops it. Dividing by the
  // total instead of the mean, and adding instead of averaging, leaves out factors that all positions share: the
  // normalisation below removes them anyway.
  for (double& total : totals) total = total > 0.0 ? total : 1.0;
  for (int64_t i = 0; i < n; ++i) {
    if (valid[i] == 0.0 || !any_unit) {
      map[i] = valid[i];
      continue;
    }
    const Mass* row = mass + i * units;
    double value = 0.0;
    for (int64_t k = 0; k < units; ++k) {
      const double share = static_cast<double>(row[k]) / totals[k];
      value = options.combine == Combine::mean ? value + share : std::max(value, share);
    }
    map[i] = value;
  }

  if (options.sharpness != 1.0) {
    // Relative to the peak, so that no power overflows.
    const double peak = *std::max_element(map.begin(), map.end());
    for (int64_t i = 0; i < n; ++i) {
      if (valid[i] != 0.0) map[i] = std::pow(map[i] / peak, options.sharpness);
    }
  }
  if (options.smooth) {
    binomial_sum(map.data(), work.rows.data(), work.blurred.data(), shape);
    binomial_sum(valid.data(), work.rows.data(), work.valid_blurred.data(), shape);
    for (int64_t i = 0; i < n; ++i) map[i] = valid[i] != 0.0 ? work.blurred[i] / work.valid_blurred[i] : 0.0;
  }

  const double mean = sum(map) / count;
  for (int64_t i = 0; i < n; ++i) {
    double weight = (1.0 - options.strength) + options.strength * (map[i] / mean);
    if (options.clamp) weight = std::clamp(weight, (*options.clamp)[0], (*options.clamp)[1]);
    map[i] = valid[i] != 0.0 ? weight : 0.0;
  }
  const double final_mean = sum(map) / count;
  for (int64_t i = 0; i < n; ++i) weights[i] = static_cast<Weight>(valid[i] != 0.0 ? map[i] / final_mean : 0.0);
  return true;
}

template <typename Mass, typename Weight>
void map_batch(const at::Tensor& mass, const at::Tensor& mask, const at::Tensor& weights, const Shape& shape,
               const Options& options) {
  const int64_t batch = mass.size(0), n = shape.positions();
  const Mass* mass_data = mass.const_data_ptr<Mass>();
  const bool* mask_data = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  Weight* weights_data = weights.mutable_data_ptr<Weight>();
  std::vector<char> fine(batch, 1);
  const int64_t samples_per_thread = std::max<int64_t>(1, kEntriesPerThread / (n * shape.units));
  at::parallel_for(0, batch, samples_per_thread, [&](int64_t begin, int64_t end) {
    Workspace work(shape);
    for (int64_t b = begin; b < end; ++b) {
      fine[b] = map_sample(mass_data + b * n * shape.units, mask_data == nullptr ? nullptr : mask_data + b * n,
                           weights_data + b * n, shape, options, work);
    }
  });
  for (int64_t b = 0; b < batch; ++b) {
    if (fine[b]) continue;
    const Mass* sample = mass_data + b * n * shape.units;
    const int64_t bad = first_bad_entry(sample, mask_data == nullptr ? nullptr : mask_data + b * n, shape);
    TORCH_CHECK_VALUE(bad >= 0, "mass: expected values whose sum over positions is finite, got a sum of inf in sample ", b);
    TORCH_CHECK_VALUE(false, "mass: expected finite values >= 0, got ", static_cast<double>(sample[bad]), " at sample ", b,
                      ", position ", bad / shape.units, ", unit ", bad % shape.units);
  }
}

}  // namespace

at::Tensor allocation_map(const at::Tensor& mass, const std::optional<at::Tensor>& mask, int64_t height, int64_t width,
                          Combine combine, double sharpness, bool smooth, double strength,
                          std::optional<std::array<double, 2>> clamp) {
  TORCH_CHECK_VALUE(mass.dim() == 3 && mass.size(1) == height * width && mass.numel() > 0, "mass: expected shape [B, ",
                    height * width, ", K] without zero sizes, got ", mass.sizes());
  const Shape shape{height, width, mass.size(2)};
  const Options options{combine, sharpness, smooth, strength, clamp};
  const at::Tensor dense_mass = mass.contiguous();
  at::Tensor dense_mask;
  if (mask.has_value()) {
    TORCH_CHECK_VALUE(mask->sizes() == at::IntArrayRef({mass.size(0), height, width}) && mask->scalar_type() == at::kBool,
                      "mask: expected a bool tensor [", mass.size(0), ", ", height, ", ", width, "], got ",
                      mask->scalar_type(), " with shape ", mask->sizes());
    dense_mask = mask->contiguous();
  }
  const at::ScalarType out_type = mass.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor weights = at::empty({mass.size(0), height, width}, mass.options().dtype(out_type));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, mass.scalar_type(), "allocation_map", [&] {
    using weight_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    map_batch<scalar_t, weight_t>(dense_mass, dense_mask, weights, shape, options);
  });
  return weights;
}

}  // namespace star_kernels
