"""The public API: load a bundle, ask about images, stream the answer, hold a conversation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from internvl_edge.kernels.ops import cpu_kernels
from internvl_edge.runtime.backends import Backend, Cache
from internvl_edge.runtime.bundle import Bundle, Verify, open_bundle
from internvl_edge.runtime.chat import Chat
from internvl_edge.runtime.embedding import EmbeddingTable
from internvl_edge.runtime.engine import EncodedImage, Engine, TokenSequence, check_slots
from internvl_edge.runtime.errors import BundleError, DeviceError, LimitError, PromptError
from internvl_edge.runtime.generation import Reply, Steps, Timings, TokenStream
from internvl_edge.runtime.preprocess import ImageLike, content_hash, load_image, tile_image
from internvl_edge.runtime.prompt import IMAGE_CONTEXT, expand_images, get_template, place_images
from internvl_edge.runtime.sampling import Sampler, Sampling
from internvl_edge.runtime.specs import ModelSpec
from internvl_edge.runtime.tokenizer import Tokenizer

Device = Literal["auto", "cpu", "cuda"]

#: On a CUDA device the cache is committed when it is allocated, so a chat gets this many
#: positions unless told otherwise: room for 41 tiles and some turns. On the CPU pages are
#: committed as they fill, and a chat gets the model's whole context.
CUDA_CONTEXT = 16384

#: The dialect of the bundles that can be loaded.
ONNXRUNTIME = "onnxruntime"

#: Most tiles of one image; more would not fit the context of any model of the family.
MAX_TILES = 1024

GREEDY = Sampling()


class TiledImage:
    """An image cut into tiles, with the identity its rows have in the KV cache."""

    def __init__(self, tiles: NDArray[np.uint8], content: bytes) -> None:
        self.tiles = tiles  # uint8 (tiles, S, S, 3)
        self.key = content + len(tiles).to_bytes(2, "little")
        # Token ids are not negative, so a negative number can never be one.
        self.signature = -1 - int.from_bytes(content[:7], "little")


class InternVL:
    """A loaded model. Create with `InternVL.load`; safe to use from one thread at a time."""

    def __init__(
        self, bundle: Bundle, backend: Backend, tokenizer: Tokenizer, max_context: int
    ) -> None:
        self.spec: ModelSpec = bundle.spec
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.template = get_template(self.spec.prompt.template)
        self.engine = Engine(backend, self.spec, EmbeddingTable.load(bundle))
        self.context_id = tokenizer.token_id(IMAGE_CONTEXT)
        self.stop_id = tokenizer.token_id(self.template.stop)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: Device = "auto",
        threads: int | None = None,
        max_context: int | None = None,
        verify: Verify = "hash",
    ) -> InternVL:
        """Load a bundle.

        Args:
            path: directory written by `internvl-edge export`.
            device: "auto" takes CUDA where it works, else the CPU.
            threads: CPU threads; None is one per core.
            max_context: most tokens (image rows included) a prompt and its answer may take.
            verify: "hash" checks the sha256 of every file, "size" only their sizes.

        Raises:
            BundleError: not a bundle, or a damaged one.
            DeviceError: the device is not available.
            LimitError: `max_context` is beyond what the model can do.
        """
        bundle = open_bundle(Path(path), verify=verify)
        cpu_kernels()  # compiled once per machine: here rather than in the first answer
        if bundle.manifest.dialect != ONNXRUNTIME:
            raise BundleError(
                f"{bundle.path} was written for {bundle.manifest.dialect!r}, this runtime reads"
                f" {ONNXRUNTIME!r} only; export the checkpoint again"
            )
        backend, used = _open_backend(bundle, device, threads)
        limit = bundle.spec.language.max_context
        if max_context is None:
            max_context = min(limit, CUDA_CONTEXT) if used == "cuda" else limit
        if not 1 <= max_context <= limit:
            raise LimitError(f"max_context {max_context} is outside 1..{limit} of this model")
        return cls(bundle, backend, Tokenizer.load(bundle.path), max_context)

    def generate(
        self,
        prompt: str | Sequence[int],
        images: Sequence[ImageLike] = (),
        *,
        max_new_tokens: int = 1024,
        max_tiles: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        system_message: str | None = None,
    ) -> Reply:
        """Answer one prompt; see `stream` for the arguments."""
        return self.stream(
            prompt,
            images,
            max_new_tokens=max_new_tokens,
            max_tiles=max_tiles,
            sampling=sampling,
            stop=stop,
            system_message=system_message,
        ).finish()

    def stream(
        self,
        prompt: str | Sequence[int],
        images: Sequence[ImageLike] = (),
        *,
        max_new_tokens: int = 1024,
        max_tiles: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        system_message: str | None = None,
    ) -> TokenStream:
        """Answer one prompt, piece by piece.

        Args:
            prompt: the user's text, with one `<image>` per image or none (they then come first);
                or token ids taken as they are: templated and with image slots expanded.
            images: path, encoded bytes, `PIL.Image` or uint8 `(H, W, 3)` each.
            max_new_tokens: the answer ends there with finish_reason "length".
            max_tiles: most tiles per image, without thumbnail; None is the checkpoint's own.
            sampling: greedy unless told otherwise.
            stop: texts that end the answer; they are not part of it.
            system_message: instead of the checkpoint's.

        Raises:
            ImageError, PromptError, LimitError: at once, before anything is computed.
        """
        started = time.perf_counter()
        timings = Timings()
        tiled = [self.tile_with_identity(image, max_tiles) for image in images]
        timings.preprocess_s = time.perf_counter() - started
        if isinstance(prompt, str):
            question = place_images(prompt, len(tiled), earlier_images=0)
            ids = self.encode_conversation([(question, None)], tiled, system_message)
        else:
            ids = [int(token) for token in prompt]
        return self.start(
            ids,
            tiled,
            None,
            encode=lambda image, check: self.encode_tiled(image, timings, check),
            finish=lambda reply: None,
            timings=timings,
            started=started,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
        )

    def chat(self, *, system_message: str | None = None, max_tiles: int | None = None) -> Chat:
        """Begin a conversation that owns a KV cache: earlier turns are never prefilled again."""
        return Chat(self, system_message=system_message, max_tiles=max_tiles)

    def tile(self, image: ImageLike, max_tiles: int | None = None) -> NDArray[np.uint8]:
        """Cut an image into uint8 tiles `(tiles, S, S, 3)`, thumbnail last.

        Args:
            image: path, encoded bytes, `PIL.Image` or uint8 `(H, W, 3)`.
            max_tiles: most tiles without the thumbnail; None is the checkpoint's own.
        """
        return self.tile_with_identity(image, max_tiles).tiles

    def encode_images(
        self, images: Sequence[ImageLike], max_tiles: int | None = None
    ) -> NDArray[np.float32]:
        """Embeddings of images, float32 `(tiles * tokens_per_tile of all images, hidden)`."""
        tiled = [self.tile_with_identity(image, max_tiles) for image in images]
        rows = [self.encode_tiled(image, Timings(), _no_check).rows for image in tiled]
        hidden = self.spec.language.hidden_size
        return np.concatenate([np.empty((0, hidden)), *rows]).astype(np.float32)

    def logits(
        self,
        token_ids: Sequence[int],
        images: Sequence[ImageLike] = (),
        max_tiles: int | None = None,
    ) -> NDArray[np.float32]:
        """Logits of every position, float32 `(tokens, vocab)`.

        Args:
            token_ids: already expanded: one context id per image row.
            images: in the order of their slots.
            max_tiles: most tiles per image, without thumbnail; None is the checkpoint's own.
        """
        ids = self._check_ids(list(token_ids))
        tiled = [self.tile_with_identity(image, max_tiles) for image in images]
        self._check_slots(ids, tiled)
        encoded = [self.encode_tiled(image, Timings(), _no_check) for image in tiled]
        return self.engine.logits(self._sequence(ids, encoded))

    def logits_of_tiles(
        self, token_ids: Sequence[int], tiles: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        """Like `logits`, for pictures cut already: uint8 `(tiles, S, S, 3)` of all of them."""
        ids = self._check_ids([int(token) for token in token_ids])
        tiled = [TiledImage(tiles, bytes(32))] if len(tiles) else []
        self._check_slots(ids, tiled)
        encoded = [self.encode_tiled(image, Timings(), _no_check) for image in tiled]
        return self.engine.logits(self._sequence(ids, encoded))

    def encode_conversation(
        self,
        turns: Sequence[tuple[str, str | None]],
        tiled: Sequence[TiledImage],
        system_message: str | None,
    ) -> list[int]:
        """Token ids of a conversation whose `<image>` markers stand for `tiled`, in order."""
        if system_message is None:
            system_message = self.spec.prompt.system_message
        rows = iter([self._rows(image) for image in tiled])
        # Question by question, so that an answer which happens to contain "<image>" stays text.
        expanded = [(expand_images(question, rows), answer) for question, answer in turns]
        return self.tokenizer.encode(self.template.render(expanded, system_message))

    def start(
        self,
        ids: list[int],
        tiled: Sequence[TiledImage],
        cache: Cache | None,
        *,
        encode: Callable[[TiledImage, Callable[[], None]], EncodedImage],
        finish: Callable[[Reply], None],
        timings: Timings,
        started: float,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
    ) -> TokenStream:
        """Check a tokenised prompt and bind the phases to it; `cache` None allocates one."""
        if max_new_tokens < 1:
            raise LimitError(f"max_new_tokens is {max_new_tokens}, it must be at least 1")
        self._check_ids(ids)
        self._check_slots(ids, tiled)
        timings.prompt_tokens = len(ids)
        # The last token generated is never run, so it needs no place in the cache.
        room = self.max_context - len(ids) + 1
        if cache is None:
            needed = min(self.max_context, len(ids) + max_new_tokens - 1)
            cache = self.engine.backend.new_cache(needed)
        target = cache

        def prefill(timings: Timings, check: Callable[[], None]) -> NDArray[np.float32]:
            sequence = self._sequence(ids, [encode(image, check) for image in tiled])
            before = time.perf_counter()
            logits, timings.cached_tokens = self.engine.prefill(target, sequence, check)
            timings.prefill_s = time.perf_counter() - before
            return logits

        def decode(token: int) -> NDArray[np.float32]:
            return self.engine.decode(target, token)

        return TokenStream(
            Steps(prefill, decode, Sampler(sampling), finish),
            self.tokenizer,
            timings,
            started,
            stop_id=self.stop_id,
            stop=stop,
            max_new_tokens=min(max_new_tokens, room),
        )

    def tile_with_identity(self, image: ImageLike, max_tiles: int | None) -> TiledImage:
        """Decode, hash and cut an image."""
        tiling = self.spec.tiling
        limit = tiling.max_tiles if max_tiles is None else max_tiles
        if not 1 <= limit <= MAX_TILES:
            raise LimitError(f"max_tiles is {limit}, it must be in 1..{MAX_TILES}")
        decoded = load_image(image)
        tiles = tile_image(
            decoded,
            tile_size=self.spec.vision.tile_size,
            min_tiles=min(tiling.min_tiles, limit) if tiling.dynamic else 1,
            max_tiles=limit if tiling.dynamic else 1,
            thumbnail=tiling.thumbnail,
        )
        return TiledImage(tiles, content_hash(decoded))

    def encode_tiled(
        self, image: TiledImage, timings: Timings, check: Callable[[], None]
    ) -> EncodedImage:
        """Run the vision graph over one image, adding to the timings."""
        before = time.perf_counter()
        rows = self.engine.encode_tiles(image.tiles, check)
        timings.vision_s += time.perf_counter() - before
        timings.tiles += len(image.tiles)
        return EncodedImage(rows, image.signature)

    def _rows(self, image: TiledImage) -> int:
        return len(image.tiles) * self.spec.vision.tokens_per_tile

    def _sequence(self, ids: list[int], encoded: Sequence[EncodedImage]) -> TokenSequence:
        return TokenSequence.build(ids, self.context_id, encoded, self.spec.language.hidden_size)

    def _check_slots(self, ids: list[int], tiled: Sequence[TiledImage]) -> None:
        check_slots(ids.count(self.context_id), sum(map(self._rows, tiled)))

    def _check_ids(self, ids: list[int]) -> list[int]:
        vocab = self.spec.language.vocab_size
        if not ids:
            raise PromptError("the prompt has no tokens")
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise PromptError(f"token ids must be in 0..{vocab - 1}, got {min(ids)}..{max(ids)}")
        if len(ids) > self.max_context:
            raise LimitError(
                f"the prompt has {len(ids)} tokens, the context holds {self.max_context}; use"
                " fewer images, a lower max_tiles, or a larger max_context"
            )
        return ids


def _no_check() -> None:
    pass


def _open_backend(
    bundle: Bundle, device: Device, threads: int | None
) -> tuple[Backend, Literal["cpu", "cuda"]]:
    from internvl_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend

    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"unknown device {device!r}; use 'auto', 'cpu' or 'cuda'")
    if threads is not None and threads < 1:
        raise LimitError(f"threads is {threads}, it must be at least 1")
    if device == "auto":
        try:
            return OnnxRuntimeBackend(bundle, "cuda", threads), "cuda"
        except DeviceError:
            device = "cpu"
    return OnnxRuntimeBackend(bundle, device, threads), device
