"""The exceptions that a user can meet. Each message says what was given, what is allowed and what to do.

BitsAndHeadsError
├── PlanError (ValueError)            a plan, preset or plan file that cannot be used
├── ShapeError (ValueError)           tensors of another shape than the plan or the model says
├── NotFiniteError (ValueError)       NaN or infinity (or a value out of the metadata's range) in keys or values
├── ModelMismatchError (ValueError)   a cache, file or score sheet that was made for another model
├── AttentionNotEnabledError          a compressed cache met an attention function that cannot read it
├── CacheStateError (RuntimeError)    an operation that the cache's present contents do not allow
├── FileFormatError (ValueError)      a damaged, foreign or newer file
├── BackendError (RuntimeError)       a kernel backend that was asked for and cannot run here
└── TaskError (ValueError)            a generated task with a split, kind or level that does not exist
"""


class BitsAndHeadsError(Exception):
    """Base class of all errors raised on purpose by bitsandheads."""


class PlanError(BitsAndHeadsError, ValueError):
    """A plan, preset name or plan file that cannot be used."""


class ShapeError(BitsAndHeadsError, ValueError):
    """A tensor whose shape does not fit the plan or the model."""


class NotFiniteError(BitsAndHeadsError, ValueError):
    """NaN, infinity or an out-of-range value in keys or values. The forward pass was cut short: reset() the cache before using it again."""


class ModelMismatchError(BitsAndHeadsError, ValueError):
    """A cache, file or score sheet that belongs to another model."""


class AttentionNotEnabledError(BitsAndHeadsError, RuntimeError):
    """A compressed cache was given to a model whose attention function was not switched on."""


class CacheStateError(BitsAndHeadsError, RuntimeError):
    """An operation that the cache's present contents do not allow."""


class FileFormatError(BitsAndHeadsError, ValueError):
    """A file that is damaged, foreign, or written by a newer version."""


class BackendError(BitsAndHeadsError, RuntimeError):
    """A kernel backend that was asked for by name and cannot run here."""


class TaskError(BitsAndHeadsError, ValueError):
    """A task that there is not, or not with these data, kinds, levels or settings."""
