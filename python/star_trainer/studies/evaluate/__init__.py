"""Evaluation of a trained adapter against its base model on files of prompts."""
