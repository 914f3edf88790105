"""The one error that a user can cause."""


class UserError(Exception):
    """A mistake in a config, in data or in a command.

    The message says what is wrong, where, and what to do.
    """
