"""`config.pbtxt`: what Triton Inference Server reads of a model, in the text format of its `ModelConfig` message.

Field names and their meaning: model_config.proto of Triton.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gfldeploy.engines.base import Device

DataType = Literal["TYPE_STRING", "TYPE_UINT8", "TYPE_INT32", "TYPE_FP32"]
# Requests that wait, beyond which Triton answers "unavailable" at once; its own default is no limit.
_MOST_WAITING = 256
_HEADER = "# Written by `gfldeploy triton`. Change what you like: a new `gfldeploy triton --force` replaces it.\n"


@dataclass(frozen=True)
class TritonTensor:
    """An input or output, without the batch dimension; -1 is a free side. `scalar`: the backend has no other side."""

    name: str
    kind: DataType
    dims: tuple[int, ...]
    optional: bool = False
    scalar: bool = False

    def __str__(self) -> str:
        optional = " optional: true" if self.optional else ""
        reshape = " reshape: { shape: [ ] }" if self.scalar else ""
        dims = ", ".join(map(str, self.dims))
        return f'{{ name: "{self.name}" data_type: {self.kind} dims: [ {dims} ]{optional}{reshape} }}'


@dataclass(frozen=True)
class WarmUpRequest:
    """Requests that Triton runs before a model is ready: the `file` in the folder `warmup`, in batches of `batch`."""

    file: str
    batch: int

    def __str__(self) -> str:
        data = f'data_type: TYPE_STRING dims: [ 1 ] input_data_file: "{self.file}"'
        named = f'name: "{self.file}, batch {self.batch}" batch_size: {self.batch}'
        return f'{{ {named} inputs {{ key: "image" value: {{ {data} }} }} }}'


@dataclass(frozen=True)
class EnsembleStep:
    """One model of an ensemble: which of the ensemble's tensors go in and come out, by the model's own names."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def __str__(self) -> str:
        maps = (("input_map", self.inputs), ("output_map", self.outputs))
        pairs = (f'{name} {{ key: "{own}" value: "{tensor}" }}' for name, one in maps for own, tensor in one.items())
        return f'{{ model_name: "{self.model}" model_version: -1 {" ".join(pairs)} }}'


@dataclass(frozen=True)
class TritonConfig:
    """A `config.pbtxt`: `str()` is its text.

    `backend`: Triton's name of it; "ensemble" has `steps` and nothing that runs. `batch`: the most requests of one
    execution, each of one image. `instances`: how many of the model run at once. `parameters`: of the backend. `tf32`:
    whether ONNX Runtime may use it on a GPU, which it does unless told otherwise.
    """

    name: str
    backend: Literal["python", "onnxruntime", "ensemble"]
    batch: int
    inputs: Sequence[TritonTensor]
    outputs: Sequence[TritonTensor]
    device: Device = "cpu"
    instances: int = 1
    warm_ups: Sequence[WarmUpRequest] = ()
    parameters: Mapping[str, str] | None = None
    steps: Sequence[EnsembleStep] = ()
    tf32: bool = False

    def __str__(self) -> str:
        kind = "platform" if self.backend == "ensemble" else "backend"
        parts = [_HEADER, f'name: "{self.name}"', f'{kind}: "{self.backend}"', f"max_batch_size: {self.batch}"]
        parts += [_listed("input", self.inputs), _listed("output", self.outputs)]
        if self.steps:
            parts.append(f"ensemble_scheduling {{\n  {_listed('step', self.steps)}\n}}")
            return "\n".join((*parts, ""))
        # On GPUs gfldeploy's engines choose the card themselves, Triton's own backends take Triton's.
        gpu = "KIND_MODEL" if self.backend == "python" else "KIND_GPU"
        parts.append(
            f"instance_group [ {{ kind: {'KIND_CPU' if self.device == 'cpu' else gpu} count: {self.instances} }} ]"
        )
        # Without a delay: while an instance works, requests gather by themselves, and waiting meets no more deadlines.
        policy = f"max_queue_size: {_MOST_WAITING} timeout_action: REJECT allow_timeout_override: true"
        parts.append(f"dynamic_batching {{ default_queue_policy {{ {policy} }} }}")
        if self.warm_ups:
            parts.append(_listed("model_warmup", self.warm_ups))
        if (self.backend, self.device) == ("onnxruntime", "gpu"):
            cuda = f'{{ name: "cuda" parameters {{ key: "use_tf32" value: "{int(self.tf32)}" }} }}'
            parts.append(f"optimization {{ execution_accelerators {{ gpu_execution_accelerator [ {cuda} ] }} }}")
        for key, value in (self.parameters or {}).items():
            parts.append(
                f'parameters {{ key: "{key}" value: {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}'
            )
        return "\n".join((*parts, ""))


def _listed(name: str, items: Sequence[object]) -> str:
    return f"{name} [\n" + ",\n".join(f"  {item}" for item in items) + "\n]"
