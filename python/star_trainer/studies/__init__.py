"""Commands that measure and compare: ablation, sensitivity, cost, evaluation, text units."""
