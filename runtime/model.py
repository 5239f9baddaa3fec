"""The public API: load a bundle, ask about images, stream the answer, hold a conversation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.bundle.errors import UsageError
from internvl_edge.bundle.manifest import Bundle, Verify, open_bundle
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.specs import ModelSpec
from internvl_edge.bundle.tokenizer import Tokenizer, load_tokenizer
from internvl_edge.runtime.answering import Answering
from internvl_edge.runtime.arguments import either, file_path, flag, pictures, whole_or
from internvl_edge.runtime.asking import PromptOptions, item_requests, prompt_request
from internvl_edge.runtime.backends import Backend
from internvl_edge.runtime.chat import Chat
from internvl_edge.runtime.checked_files import CheckedFiles
from internvl_edge.runtime.decoding.background import Background
from internvl_edge.runtime.decoding.batch import Batch, replies
from internvl_edge.runtime.decoding.embedding import EmbeddingTable
from internvl_edge.runtime.decoding.encoding import ImageEncoder
from internvl_edge.runtime.decoding.finite import FiniteCheck
from internvl_edge.runtime.decoding.generation import TokenStream
from internvl_edge.runtime.decoding.inputs import Inputs
from internvl_edge.runtime.decoding.lane import VisionLane
from internvl_edge.runtime.decoding.passes import Engine
from internvl_edge.runtime.decoding.policy import Policy
from internvl_edge.runtime.decoding.request import Reply
from internvl_edge.runtime.decoding.reservations import Reservations
from internvl_edge.runtime.decoding.reuse import ImageStore, PrefixStore
from internvl_edge.runtime.decoding.shelf import Shelf
from internvl_edge.runtime.devices import Device, EngineBuilder, encoder_name, open_device
from internvl_edge.runtime.images.folder import (
    FOLDER_BYTES,
    FOLDER_DAYS,
    ImageFolder,
    folder_or_none,
)
from internvl_edge.runtime.images.identity import TiledImage
from internvl_edge.runtime.images.preprocess import Tiler, check_tiles, tile_on_host, tiles_on_host
from internvl_edge.runtime.images.sources import ImageLike, Images
from internvl_edge.runtime.memory import MemoryGuard, claim_bytes
from internvl_edge.runtime.messages import Messages
from internvl_edge.runtime.process import HomeProcess, NotCopied
from internvl_edge.runtime.streams import AsyncStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Memory for what later prompts may share with earlier ones, unless told otherwise.
REUSE_BYTES = 1 << 30


class InternVL(NotCopied):
    """A loaded model. Create with `InternVL.load`.

    Several threads may use one model; a `Chat` or a `TokenStream` belongs to one at a time. It
    stays in the process that loaded it: one forked from there, a pickle and a copy are refused with
    a `ProcessError`.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        tokenizer: Tokenizer,
        max_context: int,
        tiler: Tiler = tile_on_host,
        *,
        reuse_bytes: int = REUSE_BYTES,
        image_folder: ImageFolder | None = None,
        memory: MemoryGuard | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.spec: ModelSpec = bundle.spec
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.inputs = Inputs(
            self.spec, tokenizer, tiler, max_context, encoder_name(bundle, backend)
        )
        self.context_id, self.sampling = self.inputs.context_id, self.inputs.sampling
        prefixes = PrefixStore(shelf := Shelf(reuse_bytes))
        self.engine = Engine(backend, self.spec, EmbeddingTable.load(bundle), prefixes)
        self.home = HomeProcess()
        finite, shared = FiniteCheck(bundle.manifest), Policy.of(policy)
        encoder = ImageEncoder(self.engine, ImageStore(shelf, image_folder), finite)
        one_graph = memory is not None and memory.low_memory
        self.answering = Answering(
            self.inputs,
            self.engine,
            tokenizer,
            encoder,
            None if one_graph else VisionLane(encoder, shared),
            prefixes,
            Reservations(partial(claim_bytes, bundle.manifest), memory, shared.memory_bytes),
            shared,
            finite,
            max_context,
            self.home,
        )
        self._background = Background(self.answering)

    @property
    def stop_id(self) -> int:
        """Token that ends an answer by the template; `inputs.stop_ids` has all that do."""
        return self.inputs.stop_ids[0]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: Device = "auto",
        threads: int | None = None,
        max_context: int | None = None,
        max_sequences: int | None = None,
        verify: Verify = "once",
        stream: Any = None,
        reuse_bytes: int = REUSE_BYTES,
        image_folder: str | os.PathLike[str] | None = None,
        image_folder_bytes: int = FOLDER_BYTES,
        image_folder_days: float = FOLDER_DAYS,
        low_memory: bool = False,
        build_engines: EngineBuilder | None = None,
        policy: Policy | None = None,
    ) -> InternVL:
        """Load a bundle.

        Args:
            path: directory written by `internvl-edge export`.
            device: "auto" takes the GPU where it works, else the CPU; "tensorrt" runs engines
                (`internvl-edge build`), "cuda" ONNX Runtime's provider.
            threads: CPU threads; None is one per core.
            max_context: most tokens (image rows included) a prompt and its answer may take.
            max_sequences: most answers that a GPU decodes in one pass, each with memory for a whole
                context; None: one, or as many as engines are for. The CPU takes any number.
            verify: "hash" reads all files, "once" large ones only when changed, "size" none.
            stream: CUDA stream of the caller's to work on: an integer handle or an object of
                torch, CuPy, PyCUDA or cuda.core. It must live as long as the model.
            reuse_bytes: memory for what later prompts may share with earlier ones: rows of images,
                KV caches of finished answers; 0 keeps nothing.
            image_folder: where rows of images are kept beyond the process. What is wrong with it
                is logged once and costs no answer.
            image_folder_bytes: most bytes there; what was used longest ago is removed first.
            image_folder_days: rows not used for so long are removed.
            low_memory: on the CPU, hold one of the two graphs at a time.
            build_engines: builds TensorRT engines where the bundle has none that fit this machine,
                `max_context` and `max_sequences`:
                `internvl_edge.export.tensorrt.engines.build_for_machine`.
            policy: how requests that are asked together share the model.

        Raises:
            BundleError: not a bundle, or a damaged one.
            DeviceError: the device is not available.
            LimitError: `max_context` is beyond what the model can do, `max_sequences` beyond what
                engines are for, it does not fit into memory, or `image_folder` is a file.
        """
        max_context = whole_or("max_context", max_context, None)
        kept = whole_or("reuse_bytes", reuse_bytes, REUSE_BYTES)
        if kept < 0:
            raise UsageError(f"is {quoted(kept)}, it must be at least 0", option="reuse_bytes")
        folder = folder_or_none(image_folder, image_folder_bytes, image_folder_days)
        bundle = open_bundle(file_path("path", path), verify=verify, known=CheckedFiles())
        limit = bundle.spec.language.max_context
        if max_context is not None and not 1 <= max_context <= limit:
            raise UsageError(
                f"{quoted(max_context)} is outside 1..{limit} of this model", option="max_context"
            )
        opened = open_device(
            bundle,
            device,
            whole_or("threads", threads, None),
            stream,
            low_memory=flag("low_memory", low_memory),
            context=max_context,
            build_engines=build_engines,
            max_sequences=whole_or("max_sequences", max_sequences, None),
        )
        if max_context is None:
            max_context = min(limit, opened.context or limit)
        model = cls(
            bundle,
            opened.backend,
            load_tokenizer(bundle.path, bundle.manifest.files),
            max_context,
            opened.tile,
            reuse_bytes=kept,
            image_folder=folder,
            memory=opened.memory,
            policy=policy,
        )
        bundle.verified.check()  # of what was read meanwhile too
        return model

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        images: Images = (),
        **options: Unpack[PromptOptions],
    ) -> Reply:
        """Answer one prompt; see `stream`."""
        return self.stream(prompt, images, **options).finish()

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        images: Images = (),
        **options: Unpack[PromptOptions],
    ) -> TokenStream:
        """Answer one prompt, piece by piece; see `PromptOptions` and `AnswerOptions`.

        Args:
            prompt: the user's text, with one `<image>` per image or none (they then come first);
                or token ids taken as they are: templated and with image slots expanded.
            images: path, encoded bytes, `PIL.Image` or uint8 `(H, W, 3)` each; on CUDA also arrays
                in device memory (`__cuda_array_interface__`).

        Raises:
            ImageError, PromptError, LimitError, ProcessError: at once, before anything is computed.
            PrecisionError: while it is iterated, where a part computes values that are not finite.
        """
        self.home.check()
        return TokenStream(self.answering, prompt_request(self.inputs, prompt, images, **options))

    def generate_batch(
        self,
        prompts: str | Mapping[str, Any] | Iterable[str | Sequence[int] | Mapping[str, Any]],
        *,
        return_errors: bool = False,
        **options: Unpack[PromptOptions],
    ) -> list[Reply]:
        """Answer several prompts together, each as `generate` would answer it alone.

        Args:
            prompts: a text, token ids, or the arguments of `generate` by name each, looked at when
                its turn comes.
            return_errors: put the error of a prompt that could not be answered in the place of its
                reply, instead of raising the first one after all the others were answered.
            options: of every prompt, unless it has its own; see `PromptOptions`.

        Raises:
            InternVLEdgeError: an option is wrong, or a prompt could not be answered.
        """
        self.home.check()
        errors = flag("return_errors", return_errors)
        made = item_requests(self.inputs, prompts, options)
        return replies(Batch(self.answering).replies(made), errors=errors)

    async def agenerate(
        self,
        prompt: str | Sequence[int] | None = None,
        images: Images = (),
        **options: Unpack[PromptOptions],
    ) -> Reply:
        """Answer one prompt; see `astream`."""
        return await self.astream(prompt, images, **options).finish()

    def astream(
        self,
        prompt: str | Sequence[int] | None = None,
        images: Images = (),
        **options: Unpack[PromptOptions],
    ) -> AsyncStream:
        """Answer one prompt, piece by piece, together with others that are asked meanwhile.

        See `stream` for the arguments. All of it is computed in a thread of the model's, which
        ends with the model or by `close`; `progress` is called from there. Cancelling the task
        that reads it cancels the answer.
        """
        prepare = partial(prompt_request, self.inputs, prompt, images, **options)
        return AsyncStream(self._background, prepare)

    def close(self) -> None:
        """Cancel what `agenerate` and `astream` have under way, and end the model's threads. What
        is asked later begins them again. In a forked process there are none."""
        if self.home.here:
            self._background.close()
            if self.answering.lane is not None:
                self.answering.lane.close()

    def chat(
        self,
        *,
        system_message: str | None = None,
        max_tiles: int | None = None,
        messages: Messages | str | os.PathLike[str] | None = None,
        history: Messages | str | os.PathLike[str] | None = None,
        control_tokens: bool = False,
        drop_oldest: bool = False,
        thinking: bool = False,
        keep_thinking: bool = True,
    ) -> Chat:
        """Begin a conversation that owns a KV cache: earlier turns are never prefilled again.

        Args:
            system_message, max_tiles: instead of the checkpoint's; see `stream`.
            messages: what was said before, to be gone on with: a list, or the file that
                `Chat.save` wrote; see `read_messages`. `history` is another name of it.
            control_tokens: see `stream`.
            drop_oldest: leave the oldest turns out of a prompt that the context does not hold.
            thinking: see `stream`.
            keep_thinking: whether later turns see earlier reasoning, as in the reference.

        Raises:
            PromptError, ImageError: the messages are not a conversation up to an answer.
        """
        self.home.check()
        return Chat(
            self.answering,
            messages=either("messages", messages, "history", history),
            system_message=system_message,
            max_tiles=max_tiles,
            control_tokens=flag("control_tokens", control_tokens),
            drop_oldest=flag("drop_oldest", drop_oldest),
            thinking=flag("thinking", thinking),
            keep_thinking=flag("keep_thinking", keep_thinking, default=True),
        )

    def tile(self, image: ImageLike, max_tiles: int | None = None) -> NDArray[np.uint8]:
        """Cut an image into uint8 tiles `(tiles, S, S, 3)`, thumbnail last.

        Args:
            image: path, encoded bytes, `PIL.Image` or uint8 `(H, W, 3)`.
            max_tiles: most tiles without the thumbnail; None is the checkpoint's own.
        """
        return tiles_on_host(self.tile_with_identity(image, max_tiles).pixels())

    def encode_images(self, images: Images, max_tiles: int | None = None) -> NDArray[np.float32]:
        """Embeddings of images, float32 `(tiles * tokens_per_tile of all images, hidden)`."""
        tiled = [self.tile_with_identity(image, max_tiles) for image in pictures("images", images)]
        rows = [self.answering.encoder.rows(image) for image in tiled]
        none = np.empty((0, self.spec.language.hidden_size))
        return np.concatenate([none, *rows]).astype(np.float32)

    def logits(
        self,
        token_ids: Sequence[int],
        images: Images = (),
        max_tiles: int | None = None,
    ) -> NDArray[np.float32]:
        """Logits of every position, float32 `(tokens, vocab)`.

        Args:
            token_ids: already expanded: one context id per image row.
            images: in the order of their slots.
            max_tiles: most tiles per image, without thumbnail; None is the checkpoint's own.
        """
        return np.concatenate(list(self.logit_chunks(token_ids, images, max_tiles)))

    def logit_chunks(
        self,
        token_ids: Sequence[int],
        images: Images = (),
        max_tiles: int | None = None,
        *,
        start: int = 0,
    ) -> Iterator[NDArray[np.float32]]:
        """Like `logits`, from position `start` on and piece by piece: float32 `(rows, vocab)`.

        The pieces are those of prefill: of the model of 92,553 tokens at most 190 MB each.
        """
        tiled = [self.tile_with_identity(image, max_tiles) for image in pictures("images", images)]
        self.home.check()
        ids = self.inputs.checked(token_ids, tiled)
        first = whole_or("start", start, 0)
        return self.engine.logit_chunks(self.answering.sequence(ids, tiled), first)

    def logits_of_tiles(
        self, token_ids: Sequence[int], tiles: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        """Like `logits`, for pictures cut already: uint8 `(tiles, S, S, 3)` of all of them.

        Raises:
            ImageError: they are something else.
        """
        self.home.check()
        check_tiles(tiles, self.spec.vision.tile_size)
        tiled = [self.inputs.tiles(tiles)] if len(tiles) else []
        ids = self.inputs.checked(token_ids, tiled)
        return self.engine.logits(self.answering.sequence(ids, tiled))

    def encode_conversation(
        self,
        turns: Sequence[tuple[str, str | None]],
        tiled: Sequence[TiledImage],
        system_message: str | None,
    ) -> list[int]:
        """See `Inputs.conversation`."""
        return self.inputs.conversation(turns, tiled, system_message)

    def tile_with_identity(self, image: ImageLike, max_tiles: int | None) -> TiledImage:
        """Like `tile`, with the name the image has in the caches."""
        self.home.check()
        return self.inputs.tile(image, max_tiles)
