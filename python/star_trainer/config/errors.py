"""What a command says in one line instead of a traceback."""


class TrainerError(Exception):
    """Something that whoever started the command can mend; the message says what, and commands print it and end."""


class ConfigError(TrainerError, ValueError):
    """A configuration that cannot be used; the message names the key."""
