"""A Hugging Face checkpoint: where it lies, its configuration, its model and its tokenizer."""

from __future__ import annotations

import contextlib
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.models.auto import modeling_auto
from transformers.utils.hub import cached_file

from irprune.backend.hf_resize import Resizing, check_files, resized
from irprune.backend.hf_stream import parameters_on_meta
from irprune.errors import DataError, IrpruneError, TargetError
from irprune.frontend import blame
from irprune.frontend.objectives import Kind
from irprune.quiet import quiet_transformers

_TABLES: dict[Kind, tuple[str, ...]] = {
    "seq2seq-lm": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    "causal-lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "masked-lm": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "encoder": ("MODEL_MAPPING_NAMES",),
}


def without_cache(config: Any) -> None:
    """Let a model of this configuration give no key-value caches, which a trace cannot return."""
    for part in (config, config.get_text_config(), config.get_text_config(decoder=True)):
        part.use_cache = False


Loading = Literal["whole", "meta", "lazy"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found.

    Attributes:
        target: What the user named, for messages.
        location: Directory or hub id.
        config: Its configuration, caches switched off.
        original: Its configuration as it is.
        where: Keyword arguments that every transformers loader takes for it.
        code: Its own code may run.
    """

    target: str
    location: str
    config: Any
    original: Any
    where: dict[str, Any]
    code: bool

    @classmethod
    def find(cls, target: str, revision: str | None = None, code: bool = False) -> Checkpoint:
        """Read the configuration, from local files if there are any, else from the hub.

        Raises:
            TargetError: There is nothing there, or no configuration that transformers knows.
        """
        location = target.removeprefix("hf:")
        where: dict[str, Any] = {"revision": revision} if revision else {}
        if location.endswith(".gguf"):
            location, _, where["gguf_file"] = location.rpartition("/")
            location = location or "."
        is_path = location.startswith((".", "/", "~")) or Path(location).exists()
        if is_path:
            location = str(Path(location).expanduser())
            expected = where.get("gguf_file", "config.json")
            if not (Path(location) / expected).is_file():
                raise TargetError(f"the directory {location} holds no {expected}", where=target, hint="name the directory of a checkpoint")
        for local in (True,) if is_path else (True, False):
            where["local_files_only"] = local
            try:
                config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=code, **where)
            except OSError as error:
                if local and not is_path:
                    continue
                raise _unreadable(target, error) from error
            except Exception as error:
                raise _unreadable(target, error) from error
            break
        original = copy.deepcopy(config)
        without_cache(config)
        return cls(target, location, config, original, dict(where), code)

    # -- model ------------------------------------------------------------------------------------

    def model_class(self) -> tuple[Any, Kind]:
        """The model's class, and the kind of its task.

        The class is the one that the configuration names; without one, that of the model type in the
        first of transformers' tables that has it. A class in no table of language models is an
        ``encoder`` until its outputs show that it is a classifier.
        """
        name = next(iter(self.config.architectures or ()), None)
        tables = {kind: [_names(table) for table in names] for kind, names in _TABLES.items()}
        if name is None:
            order: tuple[Kind, ...] = ("causal-lm", "seq2seq-lm", "masked-lm", "encoder")
            found = (table[self.config.model_type][0] for kind in order for table in tables[kind] if self.config.model_type in table)
            name = next(found, None)
            if name is None:
                raise TargetError(
                    f"the configuration names no class, and model type '{self.config.model_type}' has none",
                    where=self.target,
                    hint="set 'architectures' in config.json",
                )
        own = {str(path).rpartition(".")[2]: auto for auto, path in (getattr(self.config, "auto_map", None) or {}).items()}
        if hasattr(transformers, name):
            model_class = getattr(transformers, name)
        elif self.code and name in own:
            model_class = getattr(transformers, own[name])
        else:
            hint = "say trust_remote_code=true if you trust its code" if name in own else "upgrade transformers, or write a model file"
            raise TargetError(f"transformers has no class '{name}'", where=self.target, hint=hint)
        seq2seq = bool(self.config.is_encoder_decoder)
        for kind, entries in tables.items():
            if (kind == "seq2seq-lm") == seq2seq and any(name in classes for table in entries for classes in table.values()):
                return model_class, kind
        return model_class, "causal-lm" if own.get(name) == "AutoModelForCausalLM" else "encoder"

    def build(self, *, dtype: str, attention: str, how: Loading, seed: int) -> tuple[Any, Kind, list[str]]:
        """The model with its weights (``whole``), on the meta device (``meta``), or so with its buffers in memory (``lazy``).

        Returns:
            The model in evaluation mode, the kind of its task, and notes for the user.

        Raises:
            TargetError: The weights cannot be read or do not fit.
            DataError: They are not those that a run wrote into this directory.
        """
        model_class, kind = self.model_class()
        options = {"dtype": dtype, "attn_implementation": attention}
        notes: list[str] = []

        def made(options: dict[str, Any]) -> Any:
            own_sizes = Resizing.of(self.config)
            if how != "whole":
                if dtype == "auto":
                    options = {**options, "dtype": self.config.dtype or "float32"}
                make = model_class.from_config if hasattr(model_class, "from_config") else model_class._from_config
                with torch.device("meta") if how == "meta" else parameters_on_meta():
                    model = make(self.config, **options)
                if own_sizes is not None:
                    own_sizes.apply(model)
                model.tie_weights()
                return model
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                options = {**options, **self.where, **({"trust_remote_code": True} if self.code else {})}
                kind: Any = resized(model_class) if own_sizes is not None else model_class
                model, report = kind.from_pretrained(self.location, config=self.config, output_loading_info=True, **options)
                model.__class__ = model_class if own_sizes is not None else type(model)
            missing = sorted(report["missing_keys"])
            if missing:
                notes.append(f"the checkpoint lacks {_listed(missing)}: newly initialised from the seed")
            return model

        try:
            try:
                model = made(options)
            except ValueError:
                if attention != "sdpa":
                    raise
                notes.clear()
                model = made({**options, "attn_implementation": "eager"})
        except IrpruneError:
            raise
        except Exception as error:
            self._check_shards()
            raise _unreadable(self.target, error) from error
        if how != "meta" and Path(self.location).is_dir():
            check_files(Path(self.location))
        # The one way of running experts that traces without data-dependent sizes and has an ONNX form.
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")
        return model.eval(), kind, notes

    def _check_shards(self) -> None:
        """Name the file of a directory that is cut off, if one is."""
        folder = Path(self.location)
        for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            try:
                with safe_open(str(path), framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                hint = "copy or download the file again"
                raise TargetError(f"the file is cut off or no safetensors file: {error}", where=str(path), hint=hint) from error
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            for name in sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())):
                if not (folder / name).is_file():
                    raise TargetError("the file is missing; the index names it", where=str(folder / name), hint="copy or download it again")

    # -- what lies beside it ----------------------------------------------------------------------

    def folder(self) -> Path:
        """The directory with the weights, in the hub's cache for a hub id.

        Raises:
            TargetError: It has no safetensors files.
        """
        if Path(self.location).is_dir():
            return Path(self.location)
        where = {key: value for key, value in self.where.items() if key != "gguf_file"}
        for name in ("model.safetensors.index.json", "model.safetensors"):
            with contextlib.suppress(OSError):
                found = cached_file(self.location, name, **where)
                if found is not None:
                    return Path(found).parent
        raise TargetError("it holds no safetensors weights", where=self.target, hint="load it without lazy")

    def processors(self) -> list[Any]:
        """Everything beside the weights that prepares inputs: tokenizer, image processor, feature extractor."""
        where = {key: value for key, value in self.where.items() if key != "gguf_file"}
        tokenizer, _ = self.tokenizer()
        found = [tokenizer] if tokenizer is not None else []
        for auto in (transformers.AutoImageProcessor, transformers.AutoFeatureExtractor):
            with contextlib.suppress(Exception):  # most checkpoints have neither; the library raises many kinds
                found.append(auto.from_pretrained(self.location, trust_remote_code=self.code, **where))
        return found

    def tokenizer(self) -> tuple[Any | None, str | None]:
        """The tokenizer, or the reason why there is none."""
        return tokenizer_at(self.location, self.code, **self.where)

    def preprocessor(self) -> dict[str, Any]:
        """The image processor's settings; empty if the checkpoint has none."""
        where = {key: value for key, value in self.where.items() if key != "gguf_file"}
        try:
            path = cached_file(self.location, "preprocessor_config.json", **where)
        except OSError:
            return {}
        settings = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        return settings if isinstance(settings, dict) else {}


def tokenizer_at(location: str, code: bool = False, **where: Any) -> tuple[Any | None, str | None]:
    """The tokenizer in a directory or of a hub id, or the reason why there is none."""
    known, none = ("tokenizer*", "vocab*", "*.model", "merges.txt"), "the checkpoint has no tokenizer files"
    if Path(location).is_dir() and "gguf_file" not in where and not any(any(Path(location).glob(one)) for one in known):
        return None, none  # many classes are built without files, and then know no word
    try:
        found = transformers.AutoTokenizer.from_pretrained(location, trust_remote_code=code, **where)
    except Exception as error:
        return None, blame.first_line(error)
    return (found, None) if found.vocab_size else (None, none)


def tokenizer_of(location: str) -> Any:
    """The tokenizer of a directory or hub id; local files are preferred.

    Raises:
        DataError: There is none.
    """
    folder = Path(location).is_dir()
    if folder and not any((Path(location) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise DataError(
            "there is no tokenizer", where=location, hint="name the checkpoint's directory with --tokenizer, or give tokens with --ids"
        )
    with quiet_transformers():
        try:
            return transformers.AutoTokenizer.from_pretrained(location, local_files_only=folder)
        except Exception as error:
            raise DataError(
                f"the tokenizer cannot be read: {blame.first_line(error)}", where=location, hint="give tokens with --ids"
            ) from error


def _names(table: str) -> dict[str, tuple[str, ...]]:
    """Model type to class names, from one of transformers' tables."""
    entries = getattr(modeling_auto, table)
    return {key: value if isinstance(value, tuple) else (value,) for key, value in entries.items()}


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _unreadable(target: str, error: Exception) -> TargetError:
    text = str(error)
    if "trust_remote_code" in text:
        hint = "say trust_remote_code=true if you trust the checkpoint's own code"
    elif isinstance(error, ImportError):
        hint = "install what it names; GGUF files need irprune[gguf]"
    else:
        hint = "check the path or hub id; a checkpoint is a directory with config.json and weights"
    return TargetError(f"transformers cannot load it: {blame.first_line(error)}", where=target, hint=hint)
