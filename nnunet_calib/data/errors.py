"""The two ways a user's request can fail, each told in one line."""


class InputError(Exception):
    """A file cannot be used; the message says which file, what is wrong and what to do. Exit code 1."""


class UsageError(Exception):
    """The request itself makes no sense; the message says what is allowed. Exit code 2."""
