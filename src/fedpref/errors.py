"""The one error that a user can cause, and how foreign text is shown."""

import shlex
from importlib.util import find_spec


class UserError(Exception):
    """A mistake in a config, in data or in a command.

    The message says what is wrong, where, and what to do.
    """


def reason(error: BaseException, *, whole: bool = False) -> str:
    """Return why something failed, on one line; the error's class where it has no message.

    Args:
        error: What was raised.
        whole: All that it says, to 600 characters, in place of its first line.
    """
    text = str(error).strip()
    said = " ".join(text.split())[:600] if whole else text.partition("\n")[0].rstrip()
    return said or type(error).__name__


def require(what: str, extra: str, *modules: str) -> None:
    """Raise UserError where modules that few need are not installed.

    Args:
        what: What needs them, as a sentence begins.
        extra: The extra of fedpref that brings them.
        *modules: Their names.
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install 'fedpref[{extra}]'.")


def command(*words: object) -> str:
    """Return a command of fedpref's as a shell takes it."""
    return shlex.join(["fedpref", *map(str, words)])


def printable(text: str) -> str:
    """Return a text that no terminal takes for commands: what cannot be printed is escaped."""
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1]
        for character in text
    )
