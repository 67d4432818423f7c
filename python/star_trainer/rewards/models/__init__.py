"""Rewards that a model of transformers gives: how images are prepared for it, loaded whole, scored with a gradient."""
