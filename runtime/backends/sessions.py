"""Opening graphs in ONNX Runtime: one provider and no other, inputs and outputs as agreed."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from internvl_edge.bundle import contract
from internvl_edge.bundle.errors import BundleError, CapacityError, DeviceError, PreparedWarning
from internvl_edge.bundle.manifest import Bundle
from internvl_edge.bundle.quoting import named, reason
from internvl_edge.bundle.remedies import Remedy
from internvl_edge.bundle.verified import HeldFiles, VerifiedFiles
from internvl_edge.runtime.backends.graph_contract import check_graph
from internvl_edge.runtime.backends.ort import load_onnxruntime
from internvl_edge.runtime.backends.own_kernel import OwnKernel
from internvl_edge.runtime.backends.own_kernels import (
    NO_KERNELS,
    bundle_kernels,
    left_products,
    vision_kernels,
)
from internvl_edge.runtime.backends.prepared import (
    PREPARE_AGAIN,
    packed_graphs,
    verified_prepared,
    why_none,
)
from internvl_edge.runtime.backends.products import AS_STORED, Form, bundle_form
from internvl_edge.runtime.memory import MemoryGuard
from internvl_edge.runtime.niceness import give_way

if TYPE_CHECKING:
    import onnxruntime as ort

#: Products that share a zero point, as they did at first, cannot be made unsigned when they load.
_OLD_BUNDLE = (
    "an older bundle needs another form of its weights on this CPU: export the checkpoint anew"
)

#: What C++ calls it, somewhere in ONNX Runtime's error of any kind.
_NO_MEMORY = "std::bad_alloc"

#: How far ONNX Runtime may rewrite a graph when it opens it.
Optimise = Literal["all", "basic", "none"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class GraphChange(Protocol):
    """Changes graphs when they are opened."""

    def give(self, graph: Path, options: ort.SessionOptions) -> str | bytes:
        """Return what to open with these options: a graph's path, or its bytes, changed.

        Raises:
            OSError: it cannot be read.
        """


@dataclass(frozen=True)
class Provider:
    """Where a session runs.

    Attributes:
        device: ONNX Runtime's name of the device's memory.
        options: the provider's.
        optimise: "all", also into operators that compute differently: weights of 4 and 8 bits then
            meet activations rounded to int8 (35 dB instead of 78 on tiny_ocr); "basic", into equal
            ones; or "none": a prepared graph was saved optimised.
        form: in which integer products are exact on this machine.
        own: changes a graph that is opened: by default nothing.
        spins: whether threads without work wait awake, on cores that others want meanwhile.
    """

    device: str = "cpu"
    options: Mapping[str, str] = field(default_factory=dict)
    optimise: Optimise = "all"
    form: Form = AS_STORED
    own: GraphChange = NO_KERNELS
    spins: bool = True

    @property
    def name(self) -> str:
        return PROVIDERS[self.device]


def check_provider(device: str) -> None:
    """Raise DeviceError unless the installed ONNX Runtime was built for "cpu" or "cuda"."""
    ort = load_onnxruntime()

    if PROVIDERS[device] not in ort.get_available_providers():
        raise DeviceError(
            f"onnxruntime {ort.__version__} has no {PROVIDERS[device]}; install internvl-edge[gpu]",
            [Remedy.ON_CPU],
        )


def open_graphs(
    bundle: Bundle, provider: Provider, threads: int | None
) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """The vision and the language graph, checked against the contract.

    Raises:
        BundleError: a graph does not load, or its inputs are not the contract's.
        DeviceError: the provider did not start, or integer products are wrong on this machine.
    """
    provider = replace(provider, form=bundle_form(bundle.manifest))
    sessions = []
    with bundle.verified.unchanged():
        for graph in (contract.VISION_GRAPH, contract.LANGUAGE_GRAPH):
            sessions.append(open_session(bundle.path, graph, provider, threads))
            check_graph(bundle, graph, sessions[-1])
    return sessions[0], sessions[1]


class CpuGraphs:
    """Both graphs of a bundle on the CPU, prepared for this machine where they are.

    Where prepared ones do not fit, the plain graphs are opened instead, with a warning. A graph
    that our own kernel computes is always the plain one: its weights are mapped as they are.

    Args:
        bundle: a verified bundle.
        threads: intra-op threads; None is one per core.
        one_at_a_time: open a graph when it is asked for, and close the other before.

    Raises:
        BundleError: a graph does not load, or its inputs are not the contract's.
        DeviceError: integer products are wrong on this machine.
        CapacityError: prepared graphs do not fit, and the plain ones do not fit into memory.
    """

    def __init__(self, bundle: Bundle, threads: int | None, *, one_at_a_time: bool) -> None:
        self._bundle, self._threads = bundle, threads
        self._own, self._vision = bundle_kernels(bundle), vision_kernels(bundle)
        self._guard = MemoryGuard(
            bundle.manifest,
            prepared=False,
            low_memory=one_at_a_time,
            mapped=self.mapped,
            scores=not self.attends,
        )
        self._form = bundle_form(bundle.manifest, left_products(bundle.manifest, self.mapped))
        self._packed = packed_graphs(bundle, self.mapped)
        self._prepared = self._find_prepared()
        self._held: list[HeldFiles] = []
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._lock = threading.Lock()
        if not one_at_a_time:
            self._open(contract.VISION_GRAPH, contract.LANGUAGE_GRAPH)

    @property
    def prepared(self) -> bool:
        """Whether weights are mapped from prepared files."""
        return self._prepared is not None

    @property
    def mapped(self) -> frozenset[str]:
        """The graphs whose matrices are mapped from the bundle, and multiplied by our kernels."""
        kernels = {contract.VISION_GRAPH: self._vision, contract.LANGUAGE_GRAPH: self._own}
        return frozenset(graph for graph, own in kernels.items() if own.maps)

    @property
    def attends(self) -> bool:
        """Whether attention is our own kernel's: of many sequences in a pass."""
        return self._own.attention.library is not None

    @property
    def tower(self) -> OwnKernel:
        """What computes the operations of an INT8 vision graph."""
        return self._vision.tower

    @property
    def vision(self) -> ort.InferenceSession:
        return self._session(contract.VISION_GRAPH)

    @property
    def language(self) -> ort.InferenceSession:
        return self._session(contract.LANGUAGE_GRAPH)

    def _session(self, graph: str) -> ort.InferenceSession:
        with self._lock:
            if graph not in self._sessions:
                self._sessions.clear()  # first: their memory is needed
                self._open(graph)
            for held in self._held:
                held.check()
            return self._sessions[graph]

    def _find_prepared(self) -> VerifiedFiles | None:
        try:
            found = verified_prepared(self._bundle)
        except BundleError as error:
            self._warn(str(error))
            return None
        if found is None and (text := why_none(self._bundle)) is not None:
            self._warn(text)
        return found

    def _warn(self, text: str) -> None:
        """Say that the plain graphs are used, if there is memory for them."""
        self._guard.check_load()
        warnings.warn(f"{text}; until then the plain graphs answer", PreparedWarning, stacklevel=2)

    def _open(self, *graphs: str) -> None:
        if self._prepared is not None:
            self._prepared.check()  # what has changed is refused, not passed over
            try:
                return self._open_parts(graphs)
            except (BundleError, CapacityError) as error:
                self._prepared = None
                self._sessions.clear()
                self._warn(f"{error}; {PREPARE_AGAIN}")
        return self._open_parts(graphs)

    def _part(self, graph: str) -> _Part:
        """Return what is opened of a graph."""
        own = self._own if graph == contract.LANGUAGE_GRAPH else self._vision
        provider = Provider(form=self._form, own=own, spins=own.tower.library is None)
        if self._prepared is None or graph not in self._packed:
            return _Part(self._bundle.verified, graph, provider)
        return _Part(self._prepared, graph, replace(provider, optimise="none"))

    def _open_parts(self, graphs: Sequence[str]) -> None:
        """Open these graphs at once: packing weights keeps one core busy for each."""
        parts = [self._part(graph) for graph in graphs]
        folders = {id(part.files): part.files for part in parts}.values()
        with contextlib.ExitStack() as stack:
            for files in folders:
                stack.enter_context(files.unchanged())
            # A thread for each, since what it begins is as nice as itself.
            pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in parts]
            opening = [
                pool.submit(part.open, self._threads)
                for pool, part in zip(pools, parts, strict=True)
            ]
            opened = [one.result() for one in opening]
        self._held = [
            files.hold(part.data for part in parts if part.files is files) for files in folders
        ]
        for part, session in zip(parts, opened, strict=True):
            check_graph(self._bundle, part.name, session, attends=self.attends)
        self._sessions |= {part.name: session for part, session in zip(parts, opened, strict=True)}


@dataclass(frozen=True)
class _Part:
    """A graph: the files it is of, and what runs it."""

    files: VerifiedFiles
    name: str
    provider: Provider

    @property
    def data(self) -> str:
        """The name of the file with its weights."""
        return str(Path(self.name).with_suffix(".data"))

    def open(self, threads: int | None) -> ort.InferenceSession:
        """Open it in a thread that does nothing else: those of the vision graph give way to
        tokens, which are many times smaller and waited for."""
        if self.name == contract.VISION_GRAPH:
            give_way()
        return open_session(self.files.path, self.name, self.provider, threads)


def open_session(
    folder: Path, graph: str, provider: Provider, threads: int | None
) -> ort.InferenceSession:
    """Load one graph.

    Raises:
        BundleError: the graph does not load.
        CapacityError: there is no memory for it.
        DeviceError: the provider did not start. ONNX Runtime itself goes on with the CPU then.
    """
    ort = load_onnxruntime()
    check_path(folder)
    options = session_options(provider, threads)
    chosen = {provider.name: dict(provider.options)}
    chosen.setdefault(PROVIDERS["cpu"], {})  # for operators that only the CPU has
    said = io.StringIO()  # it prints when another provider than the CPU's raises, and falls back
    catching = provider.device != "cpu"
    try:
        with contextlib.redirect_stdout(said) if catching else contextlib.nullcontext():
            model = provider.own.give(folder / graph, options)
            # Without a provider to fall back to, it would print and try the same again.
            session = ort.InferenceSession(
                model, options, providers=list(chosen.items()), enable_fallback=catching
            )
    except Exception as error:
        if _NO_MEMORY in str(error):
            raise CapacityError(f"no memory to load {named(folder / graph)}") from error
        remedy = "" if provider.form == AS_STORED else f"; {_OLD_BUNDLE}"
        raise BundleError(
            f"{named(folder / graph)} does not load: {reason(error)}{remedy}"
        ) from error
    if session.get_providers()[0] != provider.name:
        cause = " ".join(line for line in said.getvalue().split("\n") if line.strip(" *"))
        raise DeviceError(
            f"{provider.name} is installed but did not start (got {session.get_providers()}"
            + (f"; ONNX Runtime: {cause[:500]}" if cause else "")
            + "); check the driver and CUDA libraries",
            [Remedy.ON_CPU],
        )
    return session


def session_options(provider: Provider, threads: int | None) -> ort.SessionOptions:
    """Return the options every session is opened with; threads: None is one per core."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Shapes vary from pass to pass: a pattern learnt from one holds a second arena for the next.
    options.enable_mem_pattern = False
    # Idle threads of one graph would spin beside the other's and the host's work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not provider.spins:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }[provider.optimise]
    for key, value in provider.form.entries.items():
        options.add_session_config_entry(key, value)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def check_path(folder: Path) -> None:
    """Raise BundleError where ONNX Runtime could not be given a path."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise BundleError(
            f"{named(folder)} is not UTF-8, and ONNX Runtime takes no other path; rename the folder"
        ) from error
