"""How a model is trained: policy gradients (STAR, Flow-GRPO and controls) and R0."""
