"""Every error a user can meet: what was got, what the limit is, what to do about it.

All share `InternVLEdgeError`, so an application catches one class; the CLI prints the message and
exits with status 2. `code` is stable: programs tell errors apart by it, and docs/errors.md lists
all. What helps is data (`Remedy`), which the command line spells as options and `str` as
parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from internvl_edge.bundle.remedies import Remedies, Remedy, told, without_gains


class InternVLEdgeError(Exception):
    """Base class of all errors raised on purpose by internvl_edge.

    Args:
        message: what was got and what the limit is.
        remedies: what helps, where a caller's option or parameter does.

    Attributes:
        code: of the class; no other has it.
        remedies: what helps, with what each gains.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str = "", remedies: Remedies | Iterable[Remedy] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.remedies: Remedies = (
            dict(remedies) if isinstance(remedies, Mapping) else without_gains(remedies)
        )

    def __str__(self) -> str:
        """The message as the library says it: remedies are parameters."""
        return self.told(flags=False)

    def told(self, *, flags: bool) -> str:
        """Return the message with its remedies, as options of the command line or parameters."""
        rest = told(self.remedies, flags=flags)
        return self._what(flags) + (f"; {rest}" if rest else "")

    def _what(self, flags: bool) -> str:
        return self.message


class CheckpointError(InternVLEdgeError):
    """A Hugging Face checkpoint cannot be read: missing, corrupt, unsafe or of an unknown kind."""

    code = "checkpoint"


class BundleError(InternVLEdgeError):
    """A bundle cannot be loaded: missing or altered file, newer format, wrong contract."""

    code = "bundle"


class InputError(InternVLEdgeError):
    """What a model is given cannot be used: an image, a prompt."""

    code = "input"


class ImageError(InputError):
    """An image cannot be decoded or is outside the accepted sizes."""

    code = "image"


class PromptError(InputError):
    """A prompt cannot be used: empty, wrong number of image slots, unknown template."""

    code = "prompt"


class LimitError(InternVLEdgeError):
    """Something exceeds a limit: an argument's, the context's, the memory's."""

    code = "limit"


class UsageError(LimitError):
    """An argument is outside its limits, or does not go with another.

    Args:
        message: what is wrong; where `option` is given, what follows its name.
        option: the parameter's name; the command line spells it as an option.
    """

    code = "usage"

    def __init__(
        self,
        message: str = "",
        remedies: Remedies | Iterable[Remedy] = (),
        *,
        option: str | None = None,
    ) -> None:
        super().__init__(message, remedies)
        self.option = option

    def _what(self, flags: bool) -> str:
        if self.option is None:
            return self.message
        name = f"--{self.option.replace('_', '-')}" if flags else self.option
        return f"{name} {self.message}"


class ContextError(LimitError, InputError):
    """A prompt, or a conversation, has more tokens than the context holds."""

    code = "context"


class ExportError(InternVLEdgeError):
    """A bundle, or something in it, cannot be written."""

    code = "export"


class CapacityError(LimitError, ExportError):
    """Memory or disk does not suffice.

    Attributes:
        needed: bytes; None where that is not known.
        free: bytes; None where that is not known.
    """

    code = "capacity"

    def __init__(
        self,
        message: str = "",
        needed: int | None = None,
        free: int | None = None,
        remedies: Remedies | Iterable[Remedy] = (),
    ) -> None:
        super().__init__(message, remedies)
        self.needed = needed
        self.free = free


class OptionsError(UsageError, ExportError):
    """Options of an export do not go with each other, with the checkpoint or with who runs it."""

    code = "options"


class OutputError(LimitError, ExportError):
    """A file or folder cannot be written: it exists, is somebody else's, or the system refuses."""

    code = "output"


class BusyError(OutputError):
    """Another process is writing there: which one, where it runs, and since when."""

    code = "busy"


class EngineBuildError(ExportError):
    """TensorRT does not build a graph, or its builder died."""

    code = "engine-build"


class PrepareError(ExportError):
    """Weights cannot be stored as this machine's kernels want them."""

    code = "prepare"


class DeviceError(InternVLEdgeError):
    """The device or execution provider asked for is not available."""

    code = "device"


class MissingExtraError(ExportError, DeviceError):
    """Packages of an extra are not installed.

    Args:
        message: what needs which package.
        extra: its name.
    """

    code = "missing-extra"

    def __init__(
        self,
        message: str = "",
        remedies: Remedies | Iterable[Remedy] = (),
        *,
        extra: str = "export",
    ) -> None:
        super().__init__(message, remedies)
        self.extra = extra

    def _what(self, flags: bool) -> str:
        return f"{self.message}: pip install 'internvl-edge[{self.extra}]'"


class PrecisionError(InternVLEdgeError):
    """A part computed values that its precision does not hold: infinite, or not numbers."""

    code = "precision"


class RangeError(PrecisionError, ExportError):
    """A part's values exceed the precision it is to be exported in."""

    code = "range"


class ProcessError(InternVLEdgeError):
    """A model is used in a process forked from its own, or is to be copied or pickled."""

    code = "process"


class DataError(InternVLEdgeError):
    """A file of data cannot be used: a malformed line, a mismatch."""

    code = "data"


class CalibrationDataError(DataError):
    """Calibration data cannot be read: no images, a malformed line."""

    code = "calibration-data"


class ResultError(DataError, LimitError):
    """A stored result cannot be read, or says nothing about what it is asked for."""

    code = "result"


class MeasurementError(LimitError):
    """What was to be measured did not run to its end."""

    code = "measurement"


class InternVLEdgeWarning(UserWarning):
    """Something is not as it should be, and the answer is right all the same."""


class VersionWarning(InternVLEdgeWarning):
    """A package is in a version that was not tried."""


class CheckpointWarning(InternVLEdgeWarning):
    """A checkpoint asks for something that changes answers and is left out: what."""


class RangeWarning(InternVLEdgeWarning):
    """Values come near the ends of float16, or lose precision in it."""


class LeftoverWarning(InternVLEdgeWarning):
    """A run that was cut short left something behind: what became of it."""


class PreparedWarning(InternVLEdgeWarning):
    """Prepared weights do not fit and were left out: running takes more memory."""


class FrameWarning(InternVLEdgeWarning):
    """A picture has several frames or pages, and none was chosen."""


#: What a server answers by an error's code: the request is at fault (400), too large (413), one of
#: too many (429), or this machine cannot serve it now (503). Others are faults of the server.
HTTP_STATUS = {
    "usage": 400,
    "limit": 400,
    "input": 400,
    "image": 400,
    "prompt": 400,
    "context": 413,
    "busy": 429,
    "capacity": 503,
    "device": 503,
    "precision": 503,
}
