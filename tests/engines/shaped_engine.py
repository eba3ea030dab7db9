"""A real engine that is built for shapes, as those with TensorRT are, on the CPU: for tests of all that such need.

It refuses inputs outside of its profile, keeps what it built in its folder, writes a line to `builds.txt` beside the
folders for each build, and its scores depend on the profile a little, as they do with other tactics.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from gfldeploy.bundle import Bundle, GraphName
from gfldeploy.engines.base import Build, CopyTimes, Engine, EngineOptions, EngineSpec, Library, Tensors
from gfldeploy.engines.tensorrt import TensorRtOptions, example
from gfldeploy.errors import EngineError

NAME = "shaped"


class ShapedEngine(Engine):
    """ONNX Runtime for a profile."""

    name = NAME
    title = "an engine for shapes"
    open = 0
    memory = 99  # for so many of them

    def __init__(self, bundle: Bundle, options: EngineOptions, graph: GraphName) -> None:
        super().__init__(bundle, options, graph)
        if ShapedEngine.open >= self.memory:
            raise EngineError("out of memory", None)
        import onnxruntime as ort

        self.version = str(ort.__version__)
        self.profile = TensorRtOptions.of(options)
        self.directory = self.profile.directory(self, bundle)
        built = self.directory / "model.onnx"
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.log_severity_level = 3
        if not built.exists():
            with (self.profile.cache_dir / "builds.txt").open("a") as builds:
                builds.write(f"{self.profile}\n")
            settings.optimized_model_filepath = str(built)
        self._session = ort.InferenceSession(str(self._model), settings, providers=["CPUExecutionProvider"])
        self.infer(example(self.profile.most_common))
        ShapedEngine.open += 1
        self.build_s = 0.1

    def infer_timed(self, inputs: Tensors) -> tuple[dict[str, NDArray[Any]], CopyTimes]:
        batch, _, height, width = inputs["image"].shape
        if not self.profile.covers((batch, height, width)):
            raise EngineError(f"{inputs['image'].shape} is outside of {self.profile}", None)
        found = dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))
        found["scores"] = found["scores"] - 1e-7 * sum(map(sum, self.profile.shapes))
        return found, CopyTimes(0, 1, 0)

    def upload(self, inputs: Tensors) -> Tensors:
        return {name: array.copy() for name, array in inputs.items()}

    def close(self) -> None:
        self._session = None
        ShapedEngine.open -= 1


SPEC = EngineSpec(
    name=NAME,
    title=ShapedEngine.title,
    entry="shaped_engine:ShapedEngine",
    library=Library("onnxruntime", {"cpu": Build("onnxruntime", "pip install onnxruntime")}),
    runs={"cpu": {"fp32": "onnx"}},
    needs_shapes=True,
)
