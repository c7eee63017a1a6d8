"""Greedy decoding with an ONNX file that has a key-value cache."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irprune.backend.cache import PAST, TOTAL
from irprune.backend.runtime import Provider, opened
from irprune.errors import DataError

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def empty_cache(inputs: Iterable[Any], sizes: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A cache without positions.

    Args:
        inputs: Those of a file, as onnxruntime's ``get_inputs`` gives them.
        sizes: Size of each dynamic axis but that of the positions by its name; 1 where it is missing.

    Returns:
        Array by name of the input; empty for a file without a cache.
    """
    known = {**(sizes or {}), PAST: 0}
    return {
        value.name: np.zeros([size if isinstance(size, int) else known.get(size, 1) for size in value.shape], _DTYPES[value.type])
        for value in inputs
        if PAST in value.shape
    }


@dataclass
class Speed:
    """How long it took.

    Attributes:
        prompt: Tokens of the prompt.
        prefill_s: Seconds until the first new token.
        tokens: New tokens after the first.
        decode_s: Seconds for them.
    """

    prompt: int = 0
    prefill_s: float = 0.0
    tokens: int = 0
    decode_s: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.decode_s if self.decode_s else 0.0


class Decoder:
    """A file with a key-value cache in onnxruntime.

    Args:
        path: The model file, written with ``export{cache=true}``.
        threads: Threads within one operation; 0 leaves the choice to onnxruntime.
        provider: Where it runs.

    Raises:
        DataError: The file has no cache, or takes inputs other than tokens and a mask.
        ExportError: onnxruntime cannot load it.
    """

    def __init__(self, path: Path, *, threads: int = 0, provider: Provider = "auto") -> None:
        import onnxruntime

        if not path.is_file():
            found = "this is a directory" if path.is_dir() else "there is no such file"
            raise DataError(found, where=str(path), hint="name the ONNX file of a run")
        self._session, self._device = opened(path, threads=threads, provider=provider)
        given = {value.name: value for value in self._session.get_inputs()}
        self._pasts = [name for name, value in given.items() if PAST in value.shape]
        outputs = self._session.get_outputs()
        results = [value.name for value in outputs]
        count = len(self._pasts)
        if not count or len(results) <= count:
            raise DataError("the file has no key-value cache", where=str(path), hint="export the model with export{cache=true}")
        self._vocabulary = outputs[0].shape[-1]
        self._logits, self._presents = results[0], results[len(results) - count :]
        empty = empty_cache(given.values())
        self._empty = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value, self._device, 0) for name, value in empty.items()}
        others = [name for name in given if name not in self._pasts]
        self._tokens = next((name for name in others if "int" in given[name].type and TOTAL not in given[name].shape), others[0])
        self._masks = {name: _DTYPES[given[name].type] for name in others if TOTAL in given[name].shape}
        unknown = [name for name in others if name != self._tokens and name not in self._masks]
        if unknown:
            raise DataError(f"the file also takes '{unknown[0]}', which is not known", where=str(path), hint="drive it with onnxruntime")
        self._kind = _DTYPES[given[self._tokens].type]
        self.speed = Speed()

    def greedy(self, prompt: Sequence[int], count: int, stop: Collection[int] = ()) -> Iterator[int]:
        """The most probable next token, again and again; ties go to the lowest.

        Args:
            prompt: Tokens to go on from, at least one.
            count: Most new tokens.
            stop: Tokens after which it ends; they are not given.
        """
        if not len(prompt):
            raise DataError("the prompt has no token", hint="give a prompt")
        if isinstance(self._vocabulary, int) and (unknown := [token for token in prompt if not 0 <= token < self._vocabulary]):
            raise DataError(
                f"there is no token {unknown[0]}", where="the prompt", hint=f"the model has the tokens 0 to {self._vocabulary - 1}"
            )
        feeds, fresh, length = dict(self._empty), list(prompt), 0
        self.speed = Speed(prompt=len(prompt))
        for number in range(count):
            start = time.perf_counter()
            length += len(fresh)
            logits, feeds = self._run(feeds, fresh, length)
            token = int(logits.reshape(-1, logits.shape[-1])[-1].argmax())
            took = time.perf_counter() - start
            if number:
                self.speed.tokens, self.speed.decode_s = self.speed.tokens + 1, self.speed.decode_s + took
            else:
                self.speed.prefill_s = took
            if token in stop:
                return
            yield token
            fresh = [token]

    def _run(self, pasts: dict[str, Any], tokens: Sequence[int], length: int) -> tuple[Any, dict[str, Any]]:
        binding = self._session.io_binding()
        for name, value in pasts.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_cpu_input(self._tokens, np.asarray([tokens], self._kind))
        for name, kind in self._masks.items():
            binding.bind_cpu_input(name, np.ones((1, length), kind))
        binding.bind_output(self._logits, "cpu")
        for name in self._presents:
            binding.bind_output(name, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # the binding's own exceptions share no narrower base
            raise DataError(
                f"onnxruntime cannot run the model on {len(tokens)} tokens after {length - len(tokens)}: {str(error).splitlines()[0]}",
                hint="the prompt may be longer than the positions that the model has",
            ) from error
        outputs = binding.get_outputs()
        return outputs[0].numpy(), dict(zip(pasts, outputs[1:], strict=True))
