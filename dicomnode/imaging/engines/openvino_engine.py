"""OpenVINO as engine: the fastest on a CPU, measured (docs/PERFORMANCE.md). An optional package.

A generator is traced once, converted in memory and compiled for each size of slice that comes.
The package openvino-telemetry, which comes with OpenVINO and reports every conversion to Google
Analytics, is never imported: a hospital's node tells nobody what it does.
"""

import importlib.util
import io
import sys
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dicomnode.imaging.engines.base import EngineError, Precision, Voxels
from dicomnode.imaging.engines.hardware import cpu_features, cpu_words, runs_well
from dicomnode.imaging.engines.int8 import Limits, in_int8
from dicomnode.imaging.engines.store import FormStore
from dicomnode.imaging.engines.subpixel import without_transposed
from dicomnode.imaging.networks import Generator

if TYPE_CHECKING:
    from openvino import CompiledModel, Core

HINTS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""Number format of what is not in 8-bit integers; beside these bf16 where that gains."""
KEPT_SIZES = 4
"""Compiled forms kept in memory: series of this many matrices take turns without compiling."""
FORM = "3"
"""Raise it when the way a generator is converted changes: forms on disk are then made again."""


def installed() -> bool:
    """Whether the openvino package is there; it is not imported for that."""
    return importlib.util.find_spec("openvino") is not None


class OpenVinoEngine:
    """A generator on the CPU, compiled by OpenVINO."""

    def __init__(
        self,
        generator: Generator,
        precision: Precision,
        *,
        digest: str = "",
        store: FormStore | None = None,
        limits: Limits | None = None,
    ) -> None:
        """
        Args:
            digest: of the package; names its compiled forms in `store`.
            limits: for int8: the convolutions it was calibrated for (see `engines.int8`).

        Raises:
            EngineError: openvino is not installed, or cannot run this.
        """
        if precision not in HINTS:
            raise EngineError(f"openvino does not run {precision} here")
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        try:
            import openvino
        except ImportError as error:
            raise EngineError(f"openvino cannot be imported: {error}") from error
        self.precision: Precision = precision
        self.compiled, self.restored = 0, 0
        """How many forms were compiled from the generator, and how many came from the store."""
        self.kernels: frozenset[str] = frozenset()
        """What the convolutions of the last form are computed in: i8, bf16, f32."""
        self._version = str(openvino.get_version()).partition("-")[0]
        self._core: Core = openvino.Core()
        self._digest, self._store = digest, store
        self._generator, hint = generator, HINTS[precision]
        if precision == "int8":
            self._generator = in_int8(generator, limits or {})
            hint = HINTS["bf16"] if runs_well("bf16", cpu_features()) else hint
        self._options = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        }
        self._forms: OrderedDict[tuple[int, ...], CompiledModel] = OrderedDict()
        self._converted: Any = None

    @property
    def name(self) -> str:
        return f"openvino {self._version}"

    def batch(self, rows: int, columns: int) -> int:
        """One: measured as fast as more."""
        return 1

    def run(self, x: Voxels) -> Voxels:
        """See `Engine.run`.

        Raises:
            EngineError: OpenVINO cannot compile or run it.
        """
        try:
            return np.concatenate([self._form(one.shape)(one)[0].copy() for one in _singly(x)])
        except RuntimeError as error:
            raise EngineError(f"{self.name}: {error}") from error

    def _form(self, shape: tuple[int, ...]) -> "CompiledModel":
        if shape not in self._forms:
            self._forms[shape] = self._restored(shape) or self._compiled(shape)
            if len(self._forms) > KEPT_SIZES:
                self._forms.popitem(last=False)
        self._forms.move_to_end(shape)
        return self._forms[shape]

    def _key(self, shape: tuple[int, ...]) -> str:
        words = cpu_words(cpu_features())
        what = f"{self._digest} {self.precision}"
        return f"{FORM} {what} {self._version} {self._options} {shape} {words}"

    def _restored(self, shape: tuple[int, ...]) -> "CompiledModel | None":
        form = self._store.read(self._key(shape)) if self._store and self._digest else None
        if form is None:
            return None
        try:
            compiled = self._core.import_model(io.BytesIO(form), "CPU", self._options)
        except RuntimeError:  # another build of the same version: compile anew
            return None
        self.restored += 1
        self.kernels = convolutions_run_in(compiled)
        return compiled

    def _compiled(self, shape: tuple[int, ...]) -> "CompiledModel":
        if self._converted is None:
            self._converted = _convert(self._generator, shape)
            if self.precision == "int8":
                _fix_limits(self._core, self._converted[-1])
        model = self._converted[-1].clone()
        model.reshape(list(shape))
        compiled = self._core.compile_model(model, "CPU", self._options)
        self.compiled += 1
        self.kernels = convolutions_run_in(compiled)
        if self.precision == "int8" and "i8" not in self.kernels:
            raise EngineError(f"{self.name} computes int8 in {', '.join(sorted(self.kernels))}")
        if self._store and self._digest:
            self._store.write(self._key(shape), compiled.export_model().getvalue())
        return compiled


def _singly(x: Voxels) -> list[Voxels]:
    return [np.ascontiguousarray(one) for one in np.split(x, len(x))]


def _fix_limits(core: "Core", model: Any) -> None:
    """The limits of roundings as constants, in place.

    The conversion leaves them as arithmetic on constants, and then OpenVINO computes the rounding
    and the convolution in floating point, without a word.
    """
    from openvino import Model
    from openvino.opset8 import constant

    roundings = [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
    limits = [(node, place) for node in roundings for place in (1, 2, 3, 4)]
    values = Model([node.input_value(place) for node, place in limits], [], "limits")
    request = core.compile_model(values, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = request.create_infer_request()
    found.infer({})
    for index, (node, place) in enumerate(limits):
        value = constant(found.get_output_tensor(index).data.copy())
        node.input(place).replace_source_output(value.output(0))


def convolutions_run_in(compiled: "CompiledModel") -> frozenset[str]:
    """Number formats of the kernels that OpenVINO chose for convolutions: i8, bf16, f32."""
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kernels = [
        str(node["primitiveType"].astype(str)).lower()
        for node in nodes
        if node["layerType"].astype(str) == "Convolution"
    ]
    return frozenset(kernel.rpartition("_")[2] for kernel in kernels)


def _convert(generator: Generator, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The generator as an OpenVINO model, with what must live as long (its weights' owner)."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch says that tracing has a successor
        trace: Any = torch.jit.trace  # type: ignore[attr-defined,unused-ignore]
        traced = trace(without_transposed(generator), torch.zeros(shape), check_trace=False)
    decoder = TorchScriptPythonDecoder(traced)
    frontend = FrontEndManager().load_by_framework("pytorch")
    source = frontend.load(decoder)
    return decoder, frontend, source, frontend.convert(source)
