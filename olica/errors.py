"""The one exception a user can cause: its message is a sentence that names the flag or file and what to do."""


class UsageError(ValueError):
    """Wrong input; the command lines print the message and end with exit status 2."""
