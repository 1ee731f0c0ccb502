"""The errors a user can meet. Each message names the file, the field and the way out."""

STOPPED = 75  # exit status after SIGTERM or Ctrl-C: a state is written, start again with --resume (EX_TEMPFAIL)


class ErvMinError(Exception):
    """Base of every error this package raises on bad input."""


class ClipError(ErvMinError):
    """A clip that cannot be decoded, or that lacks what was asked of it."""


class DataError(ErvMinError):
    """An annotation, prediction or label that cannot be read."""


class CheckpointError(ErvMinError):
    """A model folder or training state that cannot be read, or does not fit."""


class JudgeError(ErvMinError):
    """A judge that cannot be asked at all (no key, unknown name); a single failed answer is a status, not an error."""


class SettingsError(ErvMinError):
    """Settings that contradict each other or name something unknown."""


class DiskError(ErvMinError):
    """A disk without room for what has to be written; what was there before is kept."""


class NumbersError(ErvMinError):
    """Losses or gradients that are not finite, several steps in a row."""
