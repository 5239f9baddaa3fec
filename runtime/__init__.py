"""The runtime: load a bundle, ask about images, stream the answer.

from internvl_edge.runtime import InternVL

model = InternVL.load("bundle")
print(model.generate("What is the total?", images=["receipt.jpg"]).text)
"""

from internvl_edge.bundle.errors import (
    BundleError,
    BusyError,
    CheckpointError,
    DeviceError,
    ExportError,
    FrameWarning,
    ImageError,
    InternVLEdgeError,
    InternVLEdgeWarning,
    LeftoverWarning,
    LimitError,
    PrecisionError,
    PreparedWarning,
    ProcessError,
    PromptError,
    RangeWarning,
    VersionWarning,
)
from internvl_edge.runtime.chat import Chat
from internvl_edge.runtime.decoding.generation import TokenStream
from internvl_edge.runtime.decoding.request import Reply, Timings
from internvl_edge.runtime.decoding.sampling import Sampling
from internvl_edge.runtime.images.sources import Picture
from internvl_edge.runtime.images.video import frames_prompt, video_frames
from internvl_edge.runtime.model import InternVL

__all__ = [
    "BundleError",
    "BusyError",
    "Chat",
    "CheckpointError",
    "DeviceError",
    "ExportError",
    "FrameWarning",
    "ImageError",
    "InternVL",
    "InternVLEdgeError",
    "InternVLEdgeWarning",
    "LeftoverWarning",
    "LimitError",
    "Picture",
    "PrecisionError",
    "PreparedWarning",
    "ProcessError",
    "PromptError",
    "RangeWarning",
    "Reply",
    "Sampling",
    "Timings",
    "TokenStream",
    "VersionWarning",
    "frames_prompt",
    "video_frames",
]
