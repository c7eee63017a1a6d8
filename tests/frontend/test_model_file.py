"""Model files: what they may say, and one clear error for each mistake."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from irprune.errors import DataError, IrpruneError, OptionError, TargetError, TraceError
from irprune.frontend.target import load
from irprune.ir.facts import Task
from irprune.ir.program import Program

torch.set_num_threads(1)

MODEL = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
        def forward(self, x, scale=1.0):
            return self.fc(x) * scale

    def model():
        return Net()

    def example_inputs():
        return (torch.randn(2, 3),)
"""

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes a model file of the given pieces and gives its path."""

    def writer(*pieces: str, name: str = "net.py") -> str:
        path = tmp_path / name
        path.write_text("".join(textwrap.dedent(piece) for piece in pieces), encoding="utf-8")
        return str(path)

    before = set(sys.modules)
    yield writer
    for name in set(sys.modules) - before:
        if name.startswith("_irprune_model_"):
            del sys.modules[name]


def loaded(path: str, **options: Any) -> tuple[Program, Task]:
    program, facts = load(path, **options)
    (task,) = facts
    assert isinstance(task, Task)
    return program, task


def line(path: str, text: str) -> str:
    """``file:line`` of the first line that holds a text."""
    for number, source in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if text in source:
            return f"{path}:{number}"
    raise AssertionError(text)


def error_of(path: str, **options: Any) -> IrpruneError:
    with pytest.raises(IrpruneError) as caught:
        load(path, **options)
    return caught.value


# -- what works -----------------------------------------------------------------------------------


def test_smallest_file(write: Write) -> None:
    path = write(MODEL)
    program, task = loaded(path)
    assert program(torch.randn(5, 3)).shape == (5, 2)
    assert list(program.tensors) == ["fc.weight", "fc.bias"]
    assert task.target == path
    assert (task.calibration, task.loss, task.evaluate, task.seed) == (None, None, None, 0)


def test_same_seed_same_weights_and_the_callers_randomness_is_untouched(write: Write) -> None:
    path = write(MODEL)
    torch.manual_seed(5)
    first, _ = loaded(path)
    drawn = torch.rand(1)
    again, _ = loaded(path)
    other, _ = loaded(path, seed=1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first.tensors["fc.weight"], again.tensors["fc.weight"])
    assert not torch.equal(first.tensors["fc.weight"], other.tensors["fc.weight"])


@pytest.mark.parametrize(
    "inputs", ["torch.randn(2, 3)", "[torch.randn(2, 3)]", "{'x': torch.randn(2, 3)}", "{'scale': 2.0, 'x': torch.randn(2, 3)}"]
)
def test_example_inputs_may_be_a_tensor_a_sequence_or_a_dict(write: Write, inputs: str) -> None:
    program, _ = loaded(write(MODEL, f"def example_inputs(): return {inputs}\n"))
    assert program.interface.inputs[0] == "x"
    args, kwargs = program.interface.example
    assert program(*args, **kwargs).shape == (2, 2)


def test_dynamic_axes(write: Write) -> None:
    program, _ = loaded(write(MODEL, "def dynamic_axes(): return {'x': {0: 'rows'}}\n"))
    assert program.interface.dynamic == ({0: "rows"},)


def test_files_next_to_it_are_importable_and_stay_its_own(write: Write, tmp_path: Path) -> None:
    pieces = (MODEL, "import helper\n", "def calibration():\n    import late\n    yield torch.full((2, 3), helper.VALUE + late.VALUE)\n")
    tasks = []
    for value in (1.0, 2.0):
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "helper.py").write_text(f"VALUE = {value}\n", encoding="utf-8")
        (folder / "late.py").write_text(f"VALUE = {value}\n", encoding="utf-8")
        tasks.append(loaded(write(*pieces, name=f"{value}/net.py"))[1])
    for task, value in zip(tasks, (2.0, 4.0), strict=True):
        assert task.calibration is not None
        (batch,) = task.calibration()
        assert batch[0, 0] == value
    assert "helper" not in sys.modules
    assert "late" not in sys.modules
    assert str(tmp_path / "1.0") not in sys.path
    assert not list(tmp_path.rglob("__pycache__"))


CALIBRATION = """
    def calibration():
        for _ in range(2):
            yield torch.randn(4, 3), torch.tensor([0, 1, 0, 1])

    def loss(outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch[1])

    def evaluate(predict):
        x, y = next(iter(calibration()))
        return {"accuracy": (predict(x).argmax(1) == y).float().mean()}
"""


def test_calibration_loss_and_evaluate(write: Write) -> None:
    program, task = loaded(write(MODEL, CALIBRATION))
    assert task.calibration is not None
    assert task.inputs is not None
    assert task.loss is not None
    assert task.evaluate is not None
    first, second = list(task.calibration()), list(task.calibration())
    assert len(first) == 2
    assert torch.equal(first[1][0], second[1][0])
    assert not torch.equal(first[0][0], first[1][0])
    args, kwargs = task.inputs(first[0])
    assert kwargs == {}
    assert len(args) == 1
    task.loss(program(*args), first[0]).backward()
    grad = program.tensors["fc.weight"].grad
    assert grad is not None
    assert bool(grad.any())
    assert 0.0 <= task.evaluate(program)["accuracy"] <= 1.0


def test_batches_by_name_keep_what_the_loss_needs_from_the_model(write: Write) -> None:
    program, task = loaded(write(MODEL))
    assert task.inputs is not None
    x = torch.randn(4, 3)
    for batch in ({"label": torch.zeros(4), "x": x}, (x, torch.zeros(4)), [x], x):
        args, kwargs = task.inputs(batch)
        assert kwargs == {}
        assert args[0] is x
        assert program(*args, **kwargs).shape == (4, 2)


def test_constants_among_the_inputs_are_not_in_batches(write: Write) -> None:
    _, task = loaded(write(MODEL, "def example_inputs(): return (torch.randn(2, 3), 3.0)\n"))
    assert task.inputs is not None
    x = torch.randn(4, 3)
    assert task.inputs((x, torch.zeros(4))) == ((x, 3.0), {})
    assert task.inputs({"x": x}) == ((x, 3.0), {})


# -- calibration files ----------------------------------------------------------------------------


def test_calibration_from_safetensors_npz_and_jsonl(write: Write, tmp_path: Path) -> None:
    path = write(MODEL)
    x, y = torch.arange(15.0).reshape(5, 3), torch.arange(5)
    safetensors.torch.save_file({"x": x, "y": y}, tmp_path / "data.safetensors")
    np.savez(tmp_path / "data.npz", x=x.double().numpy(), y=y.numpy())
    lines = [json.dumps({"x": row, "y": label}) for row, label in zip(x.tolist(), y.tolist(), strict=True)]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    for name in ("data.safetensors", "data.npz", "data.jsonl"):
        _, task = loaded(path, calibration=str(tmp_path / name))
        assert task.calibration is not None
        assert task.inputs is not None
        batches = list(task.calibration())
        assert [len(batch["x"]) for batch in batches] == [2, 2, 1]
        assert torch.equal(torch.cat([task.inputs(batch)[0][0] for batch in batches]), x)
        assert torch.equal(torch.cat([batch["y"] for batch in batches]), y)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npz", None, "there is no such calibration file"),
        (
            "data.txt",
            b"text",
            "calibration data of kind '.txt' is not understood; plain text needs an hf: target with a tokenizer",
        ),
        ("data.bin", b"", "calibration data of kind '.bin' is not understood"),
        ("data.safetensors", b"nonsense", "not a safetensors file: "),
        ("data.npz", b"nonsense", "not an .npz file of plain arrays: "),
        ("data.jsonl", b"{", "not JSON: "),
        ("data.jsonl", b"[1, 2]", "every line must be an object with the same keys"),
        ("data.jsonl", b'{"x": [1, 2, 3]}\n{"y": 3}', "every line must be an object with the same keys"),
        ("data.jsonl", b'{"x": [1, 2, 3]}\n{"x": [1]}', "samples do not form tensors: "),
        ("data.jsonl", b'{"z": [1, 2, 3]}', "the file has no 'x'; it has z"),
        ("data.jsonl", b"\n", "gives no calibration batch"),
    ],
)
def test_bad_calibration_files(write: Write, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = error_of(write(MODEL), calibration=str(tmp_path / name))
    assert isinstance(error, DataError)
    assert message in error.message
    assert error.hint


def test_pickles_are_never_read(write: Write, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.array([{"a": 1}], dtype=object))
    error = error_of(write(MODEL), calibration=str(tmp_path / "data.npz"))
    assert isinstance(error, DataError)
    assert "allow_pickle=False" in error.message


def test_calibration_tensors_must_agree(write: Write, tmp_path: Path) -> None:
    np.savez(tmp_path / "counts.npz", x=np.zeros((4, 3)), y=np.zeros(5))
    assert (
        error_of(write(MODEL), calibration=str(tmp_path / "counts.npz")).message
        == "the tensors differ in their number of samples: x 4, y 5"
    )
    np.savez(tmp_path / "kinds.npz", x=np.zeros((4, 3), dtype=complex))
    assert (
        error_of(write(MODEL), calibration=str(tmp_path / "kinds.npz")).message == "'x' is torch.complex128, the model takes torch.float32"
    )


# -- mistakes in the file -------------------------------------------------------------------------


def test_missing_file_and_directory(tmp_path: Path) -> None:
    missing = error_of(str(tmp_path / "none.py"))
    assert str(missing) == (
        f"[target] at {tmp_path / 'none.py'}: there is no such model file\n"
        "  to go on: check the path, or say hf:ID for a Hugging Face model"
    )
    assert missing.exit_code == 2
    folder = error_of(str(tmp_path))
    assert (
        str(folder)
        == f"[target] at {tmp_path}: the target is a directory\n  to go on: name a Python file in it, or hf:{tmp_path} for a checkpoint"
    )


def test_not_python(write: Write, tmp_path: Path) -> None:
    path = write(MODEL, "def loss(outputs, batch)\n    return 0\n")
    error = error_of(path)
    assert isinstance(error, TargetError)
    assert error.where == line(path, "def loss")
    assert error.message == "the model file is not valid Python: expected ':'"
    (tmp_path / "binary.py").write_bytes(b"\x00\x01\x02")
    binary = error_of(str(tmp_path / "binary.py"))
    assert binary.where == str(tmp_path / "binary.py")
    assert "null bytes" in binary.message


def test_exceptions_of_the_file_name_their_line_and_stay_visible(write: Write) -> None:
    importing = write(MODEL, "import surely_not_installed\n")
    error = error_of(importing)
    assert str(error) == (
        f"[target] at {line(importing, 'surely')}: importing the model file failed: "
        "ModuleNotFoundError: No module named 'surely_not_installed'\n"
        "  to go on: correct the line; it fails in plain Python too"
    )
    assert isinstance(error.__cause__, ModuleNotFoundError)
    calling = write(MODEL, "def model():\n    return {}['weights']\n")
    error = error_of(calling)
    assert error.where == line(calling, "weights")
    assert error.message == "model() failed: KeyError: 'weights'"
    assert isinstance(error.__cause__, KeyError)
    leaving = error_of(write("raise SystemExit(3)\n"))
    assert leaving.message == "importing the model file failed: SystemExit: 3"


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("del model\n", "the model file defines no model()"),
        ("del example_inputs\n", "the model file defines no example_inputs()"),
        ("model = Net()\n", "'model' is a Net"),
        ("model = 3\n", "'model' is a int"),
        ("def model(size): return Net()\n", "model cannot be called as model(): missing a required argument: 'size'"),
        ("def model(): return Net\n", "model() returned a value of type type"),
        ("def model(): pass\n", "model() returned a value of type NoneType"),
        ("def example_inputs(): return 3\n", "example_inputs() returned a value of type int"),
        ("def example_inputs(): return {3: torch.zeros(2, 3)}\n", "example_inputs() has the key 3"),
        ("def dynamic_axes(): return [0]\n", "dynamic_axes() returned a value of type list"),
        ("def dynamic_axes(): return {'x': ['batch']}\n", "dynamic_axes() has the entry 'x': ['batch']"),
        ("def dynamic_axes(): return {'z': {0: 'batch'}}\n", "dynamic axes name 'z', which is not an input; the inputs are x"),
        ("def loss(outputs): return 0\n", "loss cannot be called as loss(outputs, batch): too many positional arguments"),
        ("def evaluate(): return {}\n", "evaluate cannot be called as evaluate(predict): too many positional arguments"),
        (
            "def example_inputs(): return torch.zeros(1, 3)\n",
            "axis 0 ('batch') of input 'x' is dynamic, but its example size is 1",
        ),
        (
            "def example_inputs(): return torch.zeros(2, 4)\n",
            "Net fails on its own example inputs (float32[2, 4]): RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x4 and 3x2)",
        ),
        (
            "def example_inputs(): return torch.zeros(2, 3).double()\n",
            "Net fails on its own example inputs (float64[2, 3]): "
            "RuntimeError: mat1 and mat2 must have the same dtype, but got Double and Float",
        ),
        (
            "def example_inputs(): return {'y': torch.zeros(2, 3)}\n",
            "the example inputs do not fit Net.forward(x, scale=1.0): missing a required argument: 'x'",
        ),
    ],
)
def test_each_mistake_has_its_message_place_and_way_on(write: Write, piece: str, message: str) -> None:
    path = write(MODEL, piece)
    error = error_of(path)
    assert isinstance(error, TargetError)
    assert error.message == message
    assert error.where
    assert error.where.startswith(path)
    assert error.hint


def test_batch_of_one_says_what_to_do(write: Write) -> None:
    path = write(MODEL, "def example_inputs(): return torch.zeros(1, 3)\n")
    assert str(error_of(path)) == (
        f"[target] at {line(path, 'zeros(1, 3)')}: axis 0 ('batch') of input 'x' is dynamic, but its example size is 1\n"
        "  to go on: give an example of size 2 or more there (a trace takes 0 and 1 for constants), "
        "or make the input static: dynamic_axes() -> {'x': {}}"
    )


def test_untraceable_model_names_its_line(write: Write) -> None:
    path = write(
        MODEL,
        """
        class Branch(Net):
            def forward(self, x):
                h = self.fc(x)
                if h.sum() > 0:
                    return h
                return -h

        def model(): return Branch()
        """,
    )
    error = error_of(path)
    assert isinstance(error, TraceError)
    assert error.exit_code == 3
    assert str(error) == (
        f"[trace] at {line(path, 'if h.sum()')}: torch.export cannot trace Branch: "
        "GuardOnDataDependentSymNode: Could not guard on data-dependent expression Eq(u0, 1)\n"
        "  to go on: there a tensor's values decide a shape or a branch; compute both ways and choose with torch.where, or decide by shapes"
    )


def test_weights_that_are_not_finite(write: Write) -> None:
    for value in ("nan", "inf"):
        path = write(MODEL, f"def model():\n    net = Net()\n    net.fc.weight.data[1, 2] = float('{value}')\n    return net\n")
        error = error_of(path)
        assert isinstance(error, DataError)
        assert str(error) == (
            "[data] at fc.weight: 'fc.weight' holds NaN or infinite values\n  to go on: repair the checkpoint before pruning it"
        )


def test_model_files_take_no_options(write: Write) -> None:
    error = error_of(write(MODEL), dtype="float16")
    assert isinstance(error, OptionError)
    assert error.message == "unknown target option 'dtype'"


# -- mistakes in the data -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("return []", DataError, "calibration() of {path} gives no calibration batch"),
        ("yield from ()", DataError, "calibration() of {path} gives no calibration batch"),
        ("return None", DataError, "calibration() returned a value of type NoneType"),
        ("return torch.zeros(4, 3)", DataError, "calibration() returned a value of type Tensor"),
        ("yield 1 / 0", TargetError, "calibration() failed: ZeroDivisionError: division by zero"),
        ("return 1 / 0", TargetError, "calibration() failed: ZeroDivisionError: division by zero"),
    ],
)
def test_bad_calibration_functions(write: Write, body: str, kind: type[IrpruneError], message: str) -> None:
    path = write(MODEL, f"def calibration():\n    {body}\n")
    _, task = loaded(path)
    assert task.calibration is not None
    with pytest.raises(kind) as caught:
        list(task.calibration())
    assert caught.value.message == message.format(path=path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "a calibration batch is a str"),
        ({"y": torch.zeros(2)}, "a calibration batch has no 'x'; it has y"),
        ((), "a calibration batch has 0 of the 1 inputs x"),
        (
            torch.zeros(2, 4),
            "input 'x' of a calibration batch is torch.float32 of shape [2, 4], the model takes torch.float32 of shape [batch, 3]",
        ),
        (
            torch.zeros(2, 3).long(),
            "input 'x' of a calibration batch is torch.int64 of shape [2, 3], the model takes torch.float32 of shape [batch, 3]",
        ),
        (([0.0],), "a calibration batch is not built like the example inputs"),
        ((0.5,), "input 'x' of a calibration batch is a float, the model takes torch.float32 of shape [batch, 3]"),
        (torch.full((2, 3), torch.nan), "input 'x' of a calibration batch holds NaN"),
    ],
)
def test_batches_that_do_not_fit(write: Write, batch: Any, message: str) -> None:
    _, task = loaded(write(MODEL))
    assert task.inputs is not None
    with pytest.raises(DataError) as caught:
        task.inputs(batch)
    assert caught.value.message == message
    assert caught.value.hint


def test_bad_loss_and_metrics(write: Write) -> None:
    path = write(
        MODEL,
        "def loss(outputs, batch): return outputs if batch else 0.0 / batch\n",
        "def evaluate(predict): return {'accuracy': predict(None)}\n",
    )
    _, task = loaded(path)
    assert task.loss is not None
    assert task.evaluate is not None
    with pytest.raises(TargetError, match=r"loss\(\) returned a tensor of shape \[2, 3\]"):
        task.loss(torch.zeros(2, 3), 1)
    with pytest.raises(TargetError, match=r"loss\(outputs, batch\) failed: ZeroDivisionError"):
        task.loss(torch.zeros(2, 3), 0)
    with pytest.raises(TargetError, match=r"evaluate\(\) returned {'accuracy': 'good'}"):
        task.evaluate(lambda _: "good")
    assert task.evaluate(lambda _: np.float32(0.5)) == {"accuracy": 0.5}
