// The loops of one instruction set, for the source that brings its `Lanes`.
#pragma once

#include "policy_loss_loops.h"
#include "transition_loops.h"

namespace star_kernels {
namespace {

template <typename Lanes>
int64_t scratch_floats(const LatentShape& shape, bool beyond_cache) {
  return std::max(PolicyLoss<Lanes>::scratch_floats(shape, beyond_cache),
                  Transition<Lanes>::scratch_floats(shape, beyond_cache));
}

template <typename Lanes>
void transition(const TransitionProblem& problem, int64_t begin, int64_t end, float* scratch) {
  Transition<Lanes>{problem}.run(begin, end, scratch);
}

template <typename Lanes>
void policy_loss(const PolicyLossProblem& problem, PolicyLossPass pass, int64_t begin, int64_t end, float* scratch) {
  PolicyLoss<Lanes>{problem, pass}.run(begin, end, scratch);
}

template <typename Lanes>
GaussianKernels gaussian_kernels() {
  return {scratch_floats<Lanes>, transition<Lanes>, policy_loss<Lanes>};
}

}  // namespace
}  // namespace star_kernels
