"""Networks that turn a face chip into a raw template: dlib's, or any as an ONNX or TorchScript file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matcher_service.errors import StartRefused
from matcher_service.models.embedder.card import ModelCard, Network
from matcher_service.models.embedder.outcome import Pixels
from matcher_service.terms import Float32

# Chip uint8 [size, size, 3] to raw template float32 [dimension].
NetworkFunction = Callable[[Pixels], Float32]


def load_network(card: ModelCard, files: Mapping[str, Path], device: str) -> NetworkFunction:
    """The card's network on `device` ("cpu" or "cuda:N"), proved to give templates of the card's dimension.

    Raises StartRefused if what runs it is not installed, the file is not what its kind says, or it gives something
    else than the card states.
    """
    load = {"dlib": _dlib, "onnx": _onnx, "torchscript": _torchscript}[card.kind]
    try:
        compute = load(card.network, files["network"], device)
    except (RuntimeError, ValueError, OSError) as error:
        raise StartRefused(
            f"cannot load {files['network'].name} as {card.kind}: {_first_line(error)}",
            field="network",
            hint="check the kind that the model card states",
        ) from error
    _prove(card, compute)
    return compute


def _dlib(network: Network, file: Path, device: str) -> NetworkFunction:
    dlib = _runtime("dlib", "dlib-bin")
    resnet = dlib.face_recognition_model_v1(str(file))
    return lambda chip: np.array(resnet.compute_face_descriptor(chip), dtype=np.float32)


def _onnx(network: Network, file: Path, device: str) -> NetworkFunction:
    runtime = _runtime("onnxruntime", "onnxruntime")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        if "CUDAExecutionProvider" not in runtime.get_available_providers():
            raise StartRefused(
                "this onnxruntime cannot use a GPU", field="device", hint="install onnxruntime-gpu, or use the CPU"
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}))
    try:
        session = runtime.InferenceSession(str(file), providers=providers)
    except Exception as error:
        # Its exceptions have no common base but Exception.
        raise ValueError(_first_line(error)) from error
    name = session.get_inputs()[0].name
    return lambda chip: np.asarray(session.run(None, {name: shown(network, chip)})[0], dtype=np.float32).reshape(-1)


def _torchscript(network: Network, file: Path, device: str) -> NetworkFunction:
    torch = _runtime("torch", "torch")
    module = torch.jit.load(str(file), map_location=device).eval()

    def compute(chip: Pixels) -> Float32:
        with torch.inference_mode():
            answer = module(torch.from_numpy(shown(network, chip)).to(device))
        return np.asarray(answer.cpu().numpy(), dtype=np.float32).reshape(-1)

    return compute


def shown(network: Network, chip: Pixels) -> Float32:
    """The chip as the network wants it: float32 [1, 3, size, size] or [1, size, size, 3]."""
    ordered = chip if network.channels == "RGB" else chip[:, :, ::-1]
    values = (ordered.astype(np.float32) - np.float32(network.mean)) / np.float32(network.deviation)
    if network.layout == "NCHW":
        values = values.transpose(2, 0, 1)
    return np.ascontiguousarray(values[None], dtype=np.float32)


def _runtime(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise StartRefused(
            f"{module}, which runs this embedder, is not installed",
            field="kind",
            hint=f"pip install {package}, or choose an embedder of another kind",
        ) from error


def _prove(card: ModelCard, compute: NetworkFunction) -> None:
    size = card.network.size_px
    ramp = np.broadcast_to(np.linspace(0, 255, size)[:, None, None], (size, size, 3)).astype(np.uint8)
    try:
        answer: NDArray[Any] = compute(np.ascontiguousarray(ramp))
    except Exception as error:
        raise StartRefused(
            f"the network of {card.space} fails on a picture of {size} x {size} pixels: {_first_line(error)}",
            field="network",
            hint="the model card must state the size and layout that the network was trained with",
        ) from error
    if answer.shape != (card.space.dimension,) or not np.isfinite(answer).all() or not answer.any():
        raise StartRefused(
            f"the network gives {answer.shape}, the model card states {card.space.dimension} finite values",
            field="dimension",
            hint="check the dimension, size and layout that the model card states",
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
