"""A thin trainer on top of star_kernels: STAR, Flow-GRPO and their controls for text-to-image pipelines."""
