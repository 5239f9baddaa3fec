"""The runtime: load a bundle, ask about images, stream the answer.

from internvl_edge.runtime import InternVL

model = InternVL.load("bundle")
print(model.generate("What is the total?", images=["receipt.jpg"]).text)
"""

from internvl_edge.bundle.errors import (
    BundleError,
    BusyError,
    CalibrationDataError,
    CapacityError,
    CheckpointError,
    CheckpointWarning,
    ContextError,
    DataError,
    DeviceError,
    EngineBuildError,
    ExportError,
    FrameWarning,
    ImageError,
    InputError,
    InternVLEdgeError,
    InternVLEdgeWarning,
    LeftoverWarning,
    LimitError,
    MeasurementError,
    MissingExtraError,
    OptionsError,
    OutputError,
    PrecisionError,
    PreparedWarning,
    PrepareError,
    ProcessError,
    PromptError,
    RangeError,
    RangeWarning,
    ResultError,
    UsageError,
    VersionWarning,
)
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.runtime.chat import Chat
from internvl_edge.runtime.decoding.boxes import Box
from internvl_edge.runtime.decoding.generation import TokenStream
from internvl_edge.runtime.decoding.policy import Policy
from internvl_edge.runtime.decoding.progress import Progress
from internvl_edge.runtime.decoding.request import Reply, Timings
from internvl_edge.runtime.decoding.sampling import Sampling
from internvl_edge.runtime.images.sources import Picture
from internvl_edge.runtime.images.video import frames_prompt, video_frames
from internvl_edge.runtime.model import InternVL
from internvl_edge.runtime.streams import AsyncStream

__all__ = [
    "AsyncStream",
    "Box",
    "BundleError",
    "BusyError",
    "CalibrationDataError",
    "CapacityError",
    "Chat",
    "CheckpointError",
    "CheckpointWarning",
    "ContextError",
    "DataError",
    "DeviceError",
    "EngineBuildError",
    "ExportError",
    "FrameWarning",
    "ImageError",
    "InputError",
    "InternVL",
    "InternVLEdgeError",
    "InternVLEdgeWarning",
    "LeftoverWarning",
    "LimitError",
    "MeasurementError",
    "MissingExtraError",
    "OptionsError",
    "OutputError",
    "Picture",
    "Policy",
    "PrecisionError",
    "PrepareError",
    "PreparedWarning",
    "ProcessError",
    "Progress",
    "PromptError",
    "RangeError",
    "RangeWarning",
    "Remedy",
    "Reply",
    "ResultError",
    "Sampling",
    "Timings",
    "TokenStream",
    "UsageError",
    "VersionWarning",
    "frames_prompt",
    "video_frames",
]
