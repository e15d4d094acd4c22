"""Errors that are the reader's to mend. The command line prints their message alone and exits with 2."""


class UserError(ValueError):
    """Something asked for cannot be done; the message says what was asked, what was got, what would be right."""


class ConfigError(UserError):
    """A config that cannot be run; the message names file, field, value, and what would be valid."""


class DataError(UserError):
    """Input data that cannot be used: unreadable, empty, changed or damaged."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found or read."""
