"""What goes wrong with rewards."""

from star_trainer.config import TrainerError


class RewardError(TrainerError, ValueError):
    """A reward that cannot be used: the wrong number of values, NaN, infinity, or none at all; the message names it."""
