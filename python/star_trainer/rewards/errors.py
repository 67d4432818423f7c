"""What goes wrong with rewards."""


class RewardError(ValueError):
    """A reward that cannot be used: the wrong number of values, NaN, infinity, or none at all; the message names it."""
