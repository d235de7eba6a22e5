"""The one exception that dev.py shows as a single line, and how to word the failures that any step can meet."""

import errno


FULL_DISK = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


class DevError(Exception):
    """A failure whose message says what to do about it; shown without a traceback."""


class DiskFullError(DevError):
    """No space left on a device, or a quota used up."""

    def __init__(self, where: object):
        super().__init__(f"The disk is full ({where}): free some space, then run the same command again.")


def as_dev_error(error: OSError) -> DevError | None:
    """The clear line for an operating-system error that has one, else None."""
    if error.errno in FULL_DISK:
        return DiskFullError(error.filename or "while writing")
    return None
