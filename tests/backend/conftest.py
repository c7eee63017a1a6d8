"""ONNX files of the toy models, written once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from irprune.backend.onnx import OnnxFile, export
from tests.backend.onnx_toys import cnn, llama, records


@pytest.fixture(scope="session", autouse=True)
def _translations_read_once() -> Iterator[None]:
    """The exporter parses its five hundred translations anew for every file, which takes most of a test's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def cnn_file(tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    return export(cnn(), tmp_path_factory.mktemp("cnn") / "model.onnx")


@pytest.fixture(scope="session")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    return export(records(), tmp_path_factory.mktemp("records") / "model.onnx")


@pytest.fixture(scope="session")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    return export(llama(), tmp_path_factory.mktemp("llama") / "model.onnx")
