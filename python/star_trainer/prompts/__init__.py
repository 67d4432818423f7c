"""Prompts, the files that they come from, and which of their phrases matter."""

from star_trainer.prompts.files import read_prompts as read_prompts
from star_trainer.prompts.prompt import Prompt as Prompt
