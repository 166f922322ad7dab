"""Errors whose message is for the person at the keyboard, as opposed to defects, which keep their traceback."""


class Explained(Exception):
    """Marks an error whose message says what is wrong, with its value, and what to do. Never raised by itself."""


class UserError(Explained, ValueError):
    """A value that cannot be used: of a field, an option, a file's contents."""


class MissingFile(Explained, FileNotFoundError):
    """A file or folder that was named and is not there."""


class UnusableFile(Explained, OSError):
    """A file, folder or disk that is there and cannot be used."""


class Occupied(Explained, FileExistsError):
    """A place to write to that holds something already."""
