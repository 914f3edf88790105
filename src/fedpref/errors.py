"""The one error that a user can cause, and how foreign text is shown."""


class UserError(Exception):
    """A mistake in a config, in data or in a command.

    The message says what is wrong, where, and what to do.
    """


def printable(text: str) -> str:
    """Return a text that no terminal takes for commands: what cannot be printed is escaped."""
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1]
        for character in text
    )
