"""The inputs of a Hugging Face model, from its main input's name, the signature of ``forward`` and its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from irprune.errors import TargetError
from irprune.frontend.objectives import Batch, Kind

_IMAGE_SIZE = 224
_MAIN = ("input_ids", "pixel_values", "input_features", "input_values")


@dataclass(frozen=True)
class Reader:
    """Makes batches that a model reads.

    Attributes:
        model: The model.
        kind: The kind of its task.
        length: Tokens in a row.
        preprocessor: Settings of its image processor, if it has one.
    """

    model: Any
    kind: Kind
    length: int
    preprocessor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def reads_text(self) -> bool:
        return bool(self.model.main_input_name == "input_ids")

    @property
    def framed(self) -> bool:
        """Whether a row of text carries special tokens at both ends."""
        return self.kind not in ("causal-lm", "seq2seq-lm")

    def choices(self) -> Iterator[tuple[str, ...]]:
        """Sets of input names to try: the fewest that should do, then all of the main kind that ``forward`` takes."""
        parameters = inspect.signature(self.model.forward).parameters
        main = self.model.main_input_name
        if main not in _MAIN:
            raise TargetError(
                f"the inputs of {type(self.model).__name__} cannot be derived: its main input is '{main}'", hint="write a model file for it"
            )
        names = [main]
        if main == "input_ids" and self.kind != "causal-lm" and "attention_mask" in parameters:
            names.append("attention_mask")
        if self.config.is_encoder_decoder and "decoder_input_ids" in parameters:
            names.append("decoder_input_ids")
        yield tuple(names)
        more = [name for name in _MAIN if name in parameters and name not in names]
        if more:
            yield (*names, *more)

    def dynamic(self, names: tuple[str, ...]) -> dict[str, dict[int, str]]:
        """The axes that may vary: the batch, and the length of texts and sounds."""
        lengths = {"input_ids": "sequence", "attention_mask": "sequence", "decoder_input_ids": "decoder_sequence"}
        if not self._has_spectrogram:
            lengths["input_values"] = "samples"
        return {name: {0: "batch", **({1: lengths[name]} if name in lengths else {})} for name in names}

    def batch(self, names: tuple[str, ...], count: int, generator: torch.Generator, rows: torch.Tensor | None = None) -> Batch:
        """Inputs by name.

        Args:
            names: The inputs.
            count: Samples.
            generator: Where noise and random tokens come from.
            rows: Tokens ``(count, length)`` of a text in place of random ones.
        """
        if rows is None:
            rows = torch.randint(self._tokens, (count, self.length), generator=generator)
        made: Batch = {}
        for name in names:
            if name == "input_ids":
                made[name] = rows
            elif name == "attention_mask":
                made[name] = torch.ones_like(rows)
            elif name == "decoder_input_ids":
                made[name] = torch.cat([torch.full_like(rows[:, :1], self._start), rows[:, :-1]], dim=1)
            else:
                shape = {"pixel_values": self._image, "input_features": self._features, "input_values": self._values}[name]()
                made[name] = torch.randn(count, *shape, generator=generator).to(self.model.dtype)
        return made

    @property
    def _tokens(self) -> int:
        return int(getattr(self.config.get_text_config(decoder=True), "vocab_size", None) or 2)

    @property
    def _start(self) -> int:
        """The first token that a decoder reads."""
        sources = (getattr(self.model, "generation_config", None), self.config, self.config.get_text_config(decoder=True))
        tokens = (getattr(source, "decoder_start_token_id", None) for source in sources)
        return next((token for token in tokens if isinstance(token, int) and token < self._tokens), 0)

    # -- shapes of what is not text ---------------------------------------------------------------

    def _setting(self, *names: str) -> Any:
        """The first of these that the configuration, or its vision or audio part, gives."""
        parts = [self.config, *(getattr(self.config, part, None) for part in ("vision_config", "audio_config", "encoder"))]
        found = (getattr(part, name, None) for part in parts if part is not None for name in names)
        return next((value for value in found if value is not None), None)

    def _image(self) -> tuple[int, ...]:
        frames = self._setting("num_frames")
        channels = self._setting("num_channels") or 3
        return (*((frames,) if frames else ()), channels, *self._image_size())

    def _image_size(self) -> tuple[int, int]:
        size = self._setting("image_size") or self.preprocessor.get("crop_size") or self.preprocessor.get("size") or _IMAGE_SIZE
        if isinstance(size, Mapping):
            edge = size.get("shortest_edge", _IMAGE_SIZE)
            return int(size.get("height", edge)), int(size.get("width", edge))
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return int(height), int(width)

    def _features(self) -> tuple[int, ...]:
        positions, bins = self._setting("max_source_positions"), self._setting("num_mel_bins", "input_feat_per_channel")
        if bins is None:
            raise TargetError(
                f"the shape of 'input_features' of {type(self.model).__name__} cannot be derived", hint="write a model file for it"
            )
        if self._setting("input_feat_per_channel") is not None:
            return (self.length, bins)
        return (bins, 2 * positions) if positions else (bins, self.length)

    @property
    def _has_spectrogram(self) -> bool:
        return self._setting("num_mel_bins") is not None

    def _values(self) -> tuple[int, ...]:
        if self._has_spectrogram:
            return (self._setting("max_length") or self.length, self._setting("num_mel_bins"))
        return (100 * self.length,)
