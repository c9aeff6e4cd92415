"""Errors that are raised for a user to read. This module imports nothing."""


class ConfigError(ValueError):
    """A configuration that cannot be served; the message names key, value and what is allowed."""


class TableError(ValueError):
    """A file or object that holds nothing for this model's heads; the message says why."""


class TextError(ValueError):
    """Text or a file that cannot be read; the message says why."""
