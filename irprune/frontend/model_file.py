"""Model files: plain Python with conventional functions.

Required are ``model()`` and ``example_inputs()``; ``dynamic_axes()``, ``calibration()``,
``loss(outputs, batch)`` and ``evaluate(predict)`` are optional. See :func:`load`.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from irprune.errors import DataError, IrpruneError, TargetError
from irprune.frontend import axes, blame
from irprune.frontend.batches import Binding, counted, read
from irprune.frontend.export import trace
from irprune.ir.facts import Fact, Task
from irprune.ir.program import Program

_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "model": (),
    "example_inputs": (),
    "dynamic_axes": (),
    "calibration": (),
    "loss": ("outputs", "batch"),
    "evaluate": ("predict",),
}
_REQUIRED = ("model", "example_inputs")
_KINDS: dict[type, str] = {
    torch.nn.Module: "a torch.nn.Module",
    torch.Tensor: "a tensor",
    tuple: "a tuple (inputs by position)",
    list: "a list",
    Mapping: "a dict (inputs by name)",
    dict: "a dict",
}


def load(target: str, *, calibration: str | None = None, seed: int = 0) -> tuple[Program, tuple[Fact, ...]]:
    """Trace the model of a file.

    The file's functions::

        model() -> nn.Module
        example_inputs() -> Tensor | tuple | dict      # a batch of 2 or more
        dynamic_axes() -> dict[str, dict[int, str]]    # input name: {axis: label}; default: axis 0 is the batch
        calibration() -> Iterable[batch]               # fresh on every call
        loss(outputs, batch) -> Tensor                 # a scalar
        evaluate(predict) -> dict[str, float]          # predict(*inputs) gives what the model gives

    A batch is a tensor (the only input), a tuple or list (the inputs in their order, then what the
    loss needs) or a dict (inputs by name, and what the loss needs).

    Args:
        target: Path of the file. Its own directory is importable for it.
        calibration: File of samples in place of ``calibration()``; its batches are dicts.
        seed: Seed under which the file and its functions run.

    Returns:
        The untyped program, and the :class:`Task`.

    Raises:
        TargetError: The file or one of its functions is not as it should be.
        TraceError: The model cannot be traced.
        DataError: The weights or the calibration data cannot be used.
    """
    file = ModelFile(Path(target), seed)
    model = file.call("model", torch.nn.Module)
    args, kwargs = file.example_inputs()
    dynamic = file.dynamic_axes()
    try:
        with file.home():
            program = trace(model, args, kwargs, dynamic)
    except TargetError as error:
        raise TargetError(error.message, where=error.where or file.place("example_inputs"), hint=error.hint) from error
    binding = Binding(axes.positional_names(inspect.signature(model.forward), len(args)), program.interface)
    source: Callable[[], Iterable[Any]] | None = file.batches if file.has("calibration") else None
    if calibration is not None:
        samples = list(counted(read(Path(calibration), binding), calibration))
        source = samples.copy
    task = Task(
        target=target,
        calibration=source,
        inputs=binding,
        loss=file.loss if file.has("loss") else None,
        evaluate=file.evaluate if file.has("evaluate") else None,
        read=lambda path: list(counted(read(path, binding), str(path))).copy,
        seed=seed,
    )
    return program, (task,)


class ModelFile:
    """A loaded model file. Its functions are called with its directory importable.

    Args:
        path: The file.
        seed: Seed of what it draws.
    """

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.path = path
        self.seed = seed
        self._siblings: dict[str, ModuleType] = {}
        self._module = self._load()
        for name in _FUNCTIONS:
            if name in _REQUIRED or self.has(name):
                self._function(name)

    def has(self, name: str) -> bool:
        return hasattr(self._module, name)

    def place(self, name: str) -> str:
        """``file:line`` of one of the file's functions."""
        code = getattr(getattr(self._module, name, None), "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else str(self.path)

    # -- loading ----------------------------------------------------------------------------------

    def _load(self) -> ModuleType:
        where = str(self.path)
        if self.path.is_dir():
            raise TargetError("the target is a directory", where=where, hint=f"name a Python file in it, or hf:{where} for a checkpoint")
        if not self.path.is_file():
            raise TargetError("there is no such model file", where=where, hint="check the path, or say hf:ID for a Hugging Face model")
        try:
            code = compile(self.path.read_bytes(), where, "exec", dont_inherit=True)
        except SyntaxError as error:
            place = f"{where}:{error.lineno}" if error.lineno else where
            raise TargetError(f"the model file is not valid Python: {error.msg}", where=place, hint="correct the line") from error
        except (ValueError, OSError) as error:
            raise TargetError(f"the model file cannot be read: {error}", where=where, hint="name a Python file") from error
        name = "_irprune_model_" + hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        module = ModuleType(name)
        module.__file__ = where
        sys.modules[name] = module
        with self._blamed("importing the model file"), Randomness(self.seed).in_charge():
            exec(code, vars(module))
        return module

    @contextlib.contextmanager
    def home(self) -> Iterator[None]:
        """The file's directory is importable; modules from it are known to this file alone."""
        directory = self.path.resolve().parent
        others = {name: sys.modules.pop(name) for name in self._siblings if name in sys.modules}
        sys.modules.update(self._siblings)
        known = set(sys.modules)
        bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        sys.path.insert(0, str(directory))
        try:
            yield
        finally:
            sys.path.remove(str(directory))
            sys.dont_write_bytecode = bytecode
            for name in set(sys.modules) - known:
                top = name.partition(".")[0]
                source = getattr(sys.modules[name], "__file__", None) or ""
                ours = source.startswith((f"{directory / top}{os.sep}", f"{directory / top}."))
                if ours and (top not in known or top in self._siblings):
                    self._siblings[name] = sys.modules[name]
            for name in self._siblings:
                sys.modules.pop(name, None)
            sys.modules.update(others)

    @contextlib.contextmanager
    def _blamed(self, doing: str) -> Iterator[None]:
        """The user's exceptions name their line; ours pass."""
        try:
            with self.home():
                yield
        except IrpruneError:
            raise
        except (Exception, SystemExit) as error:
            raise TargetError(
                f"{doing} failed: {blame.first_line(error)}",
                where=blame.innermost(traceback.walk_tb(error.__traceback__)) or str(self.path),
                hint="correct the line; it fails in plain Python too",
            ) from error

    # -- calling ----------------------------------------------------------------------------------

    def _function(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name, None)
        arguments = _FUNCTIONS[name]
        signature = f"{name}({', '.join(arguments)})"
        if function is None:
            raise TargetError(f"the model file defines no {signature}", where=str(self.path), hint=f"add a function {signature}")
        if not callable(function) or isinstance(function, torch.nn.Module):
            raise TargetError(f"'{name}' is a {type(function).__name__}", where=str(self.path), hint=f"make it a function {signature}")
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError as error:
            raise TargetError(
                f"{name} cannot be called as {signature}: {error}", where=self.place(name), hint=f"write def {signature}"
            ) from error
        return function

    def call(self, name: str, *kinds: type) -> Any:
        """What a function without arguments returns; another type is an error."""
        function = self._function(name)
        with self._blamed(f"{name}()"), Randomness(self.seed).in_charge():
            value = function()
        if not isinstance(value, kinds):
            raise TargetError(
                f"{name}() returned a value of type {type(value).__name__}",
                where=self.place(name),
                hint=f"return {' or '.join(_KINDS[kind] for kind in kinds)}",
            )
        return value

    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example ``(args, kwargs)``."""
        value = self.call("example_inputs", torch.Tensor, tuple, list, Mapping)
        if isinstance(value, Mapping):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise TargetError(
                    f"example_inputs() has the key {odd[0]!r}",
                    where=self.place("example_inputs"),
                    hint="name the model's parameters with strings",
                )
            return (), dict(value)
        return (value,) if isinstance(value, torch.Tensor) else tuple(value), {}

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Input name to ``{axis: label}``; empty if the file says nothing."""
        if not self.has("dynamic_axes"):
            return {}
        value: dict[str, dict[int, str]] = self.call("dynamic_axes", dict)
        for name, entry in value.items():
            fine = isinstance(name, str) and isinstance(entry, dict)
            if not fine or not all(isinstance(axis, int) and isinstance(label, str) for axis, label in entry.items()):
                raise TargetError(
                    f"dynamic_axes() has the entry {name!r}: {entry!r}",
                    where=self.place("dynamic_axes"),
                    hint="return input names with axes and labels, as {'x': {0: 'batch', 1: 'length'}}",
                )
        return value

    def batches(self) -> Iterator[Any]:
        """The calibration batches, from a fresh call of ``calibration()``."""
        function = self._function("calibration")
        state = Randomness(self.seed)
        with self._blamed("calibration()"), state.in_charge():
            value = function()
            if isinstance(value, (torch.Tensor, Mapping, str)) or not isinstance(value, Iterable):
                raise DataError(
                    f"calibration() returned a value of type {type(value).__name__}",
                    where=self.place("calibration"),
                    hint="return a list or generator of batches",
                )
            iterator = iter(value)

        def advance() -> Iterator[Any]:
            end = object()
            while True:
                with self._blamed("calibration()"), state.in_charge():
                    batch = next(iterator, end)
                if batch is end:
                    return
                yield batch

        return counted(advance(), f"calibration() of {self.path}")

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        function = self._function("loss")
        with self._blamed("loss(outputs, batch)"):
            value = function(outputs, batch)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            found = f"tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise TargetError(f"loss() returned a {found}", where=self.place("loss"), hint="return a tensor with one number")
        return value

    def evaluate(self, predict: Callable[..., Any]) -> dict[str, float]:
        function = self._function("evaluate")
        with self._blamed("evaluate(predict)"), Randomness(self.seed).in_charge():
            value = function(predict)
        try:
            return {str(name): float(metric) for name, metric in value.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise TargetError(
                f"evaluate() returned {value!r}", where=self.place("evaluate"), hint="return metrics by name, as {'accuracy': 0.9}"
            ) from error


class Randomness:
    """Random states of torch, numpy and Python that can be put in charge again and again.

    Args:
        seed: What they start from.
    """

    def __init__(self, seed: int) -> None:
        self._states: tuple[Any, Any, Any] | None = None
        self._seed = seed

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        outer = _states()
        if self._states is None:
            torch.manual_seed(self._seed)
            np.random.seed(self._seed % 2**32)
            random.seed(self._seed)
        else:
            _set_states(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _set_states(outer)


def _states() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_states(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
