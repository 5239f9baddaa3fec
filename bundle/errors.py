"""Every error a user can meet: what was got, what the limit is, what to do about it.

All share `InternVLEdgeError`, so an application catches one class; the CLI prints the message and
exits with status 2.
"""


class InternVLEdgeError(Exception):
    """Base class of all errors raised on purpose by internvl_edge."""


class CheckpointError(InternVLEdgeError):
    """A Hugging Face checkpoint cannot be read: missing, corrupt, unsafe or of an unknown kind."""


class ExportError(InternVLEdgeError):
    """A bundle cannot be written: no space, target exists, unsupported option."""


class BusyError(ExportError):
    """Another process is writing there: which one, where it runs, and since when."""


class BundleError(InternVLEdgeError):
    """A bundle cannot be loaded: missing or altered file, newer format, wrong contract."""


class ImageError(InternVLEdgeError):
    """An image cannot be decoded or is outside the accepted sizes."""


class PromptError(InternVLEdgeError):
    """A prompt cannot be used: empty, wrong number of image slots, unknown template."""


class LimitError(InternVLEdgeError):
    """A request exceeds a limit of the loaded model: context length, tiles."""


class UsageError(LimitError):
    """An argument is outside its limits, or does not go with another."""


class DeviceError(InternVLEdgeError):
    """The device or execution provider asked for is not available."""


class PrecisionError(InternVLEdgeError):
    """A part computed values that its precision does not hold: infinite, or not numbers."""


class ProcessError(InternVLEdgeError):
    """A model is used in a process forked from its own, or is to be copied or pickled."""


class InternVLEdgeWarning(UserWarning):
    """Something is not as it should be, and the answer is right all the same."""


class VersionWarning(InternVLEdgeWarning):
    """A package is in a version that was not tried."""


class RangeWarning(InternVLEdgeWarning):
    """Values come near the ends of float16, or lose precision in it."""


class LeftoverWarning(InternVLEdgeWarning):
    """A run that was cut short left something behind: what became of it."""


class PreparedWarning(InternVLEdgeWarning):
    """Prepared weights do not fit and were left out: loading is slower and takes more memory."""


class FrameWarning(InternVLEdgeWarning):
    """A picture has several frames or pages, and none was chosen."""
