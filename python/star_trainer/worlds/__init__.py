"""Worlds whose truth is known: prompts, pictures, judges, and small models that were trained on them."""
