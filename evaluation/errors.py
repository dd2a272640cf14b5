"""What a command says in one line when its input is of no use."""

__all__ = ["UnusableInputError"]


class UnusableInputError(Exception):
    """The user's input cannot be used; the message says why, in one line."""
