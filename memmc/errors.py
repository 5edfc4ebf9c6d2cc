"""Every error a user of memmc can meet, one tree.

::

    MemmcError
    +-- UsageError              exit 2: the call or the configuration is wrong
    |   +-- ConfigError             unknown key, value out of range, unreadable file
    +-- GateRefused             exit 3: a gate said no; nothing is broken
    +-- DataError               exit 1: the data cannot do what was asked
    |   +-- AccountingError         objects listed do not equal objects accounted for
    |   +-- IntegrityError          bytes read differ from bytes written
    |   +-- PreprocessMismatch      model and pixels were prepared differently
    |   +-- IdentityKeyError        no key, or not the key this lake was made with
    |   +-- MissingClassError       no normal, or no abnormal, image to measure on
    +-- StorageError            exit 1: a place could not be read or written
    +-- DeadlineError           exit 1: a step took longer than it may
    +-- ModelError              exit 1: a model is missing, unfinished or unreadable
    +-- TrainingError           exit 1: a training run failed
        +-- DivergedError           loss or gradient is not finite; another try would end alike

A message says what was found, what was expected and what to do next. It never
holds patient data: no path, no attribute value, no text of a decoder's error.
"""


class MemmcError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        exit_code: the process's exit status when a verb ends with this error.
    """

    exit_code = 1


class UsageError(MemmcError):
    """The call is wrong; nothing was done."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration source holds an unknown key or a value out of range."""


class GateRefused(MemmcError):
    """A gate refused; its reason is the message."""

    exit_code = 3


class DataError(MemmcError):
    """The data at hand cannot do what was asked."""


class AccountingError(DataError):
    """Listed objects are not equal to stored + duplicate + excluded + quarantined."""


class IntegrityError(DataError):
    """Bytes read are not the bytes that were written."""


class PreprocessMismatch(DataError):
    """Model and pixels carry different `preprocess_id`s."""


class IdentityKeyError(DataError):
    """The de-identification key is missing, malformed, or not this lake's."""


class MissingClassError(DataError):
    """One of the two labels is missing among the images that could be measured on."""


class StorageError(MemmcError):
    """A storage location could not be read or written."""


class DeadlineError(MemmcError):
    """A step took longer than it may, and was stopped."""


class ModelError(MemmcError):
    """A model is missing, unfinished or unreadable."""


class TrainingError(MemmcError):
    """A training run failed for good."""


class DivergedError(TrainingError):
    """A loss or gradient is not finite, on all workers at the same step; another try would end alike."""


def known_name(error: MemmcError) -> str:
    """Return the name by which another process knows an error: of the nearest class that stands in this module."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == __name__)
