// The policy loss for Python, where its arguments need no conversion.
#pragma once

#include <pybind11/pybind11.h>

namespace star_kernels {

// (loss, nine metrics) as Python tensors, or None where an argument is not one that star_kernels/policy_loss/__init__.py would
// hand on as it is: that is then the one who converts it, finds another backend or says what is wrong with it.
pybind11::object plain_policy_loss(pybind11::handle velocity, pybind11::handle sample, pybind11::handle next_sample,
                                   pybind11::handle old_log_prob, pybind11::handle advantage, pybind11::handle coefficients,
                                   pybind11::handle weights, pybind11::handle mask, pybind11::handle objective,
                                   pybind11::handle old_velocity, pybind11::handle clip_range,
                                   pybind11::handle divergence_limit, pybind11::handle granularity,
                                   pybind11::handle reference_velocity, pybind11::handle kl_weight, pybind11::handle kl_scale,
                                   pybind11::handle unconditional_velocity, pybind11::handle guidance_scale);

}  // namespace star_kernels
