"""Does a pruned Hugging Face model load where irprune is not installed, answer as the pruned program, and train?

Every model is pruned with ``allocation=uniform`` and written with ``export{format=hf layout=plain}``. Another
process, in which ``irprune`` cannot be imported, loads it with ``from_pretrained``, compares its outputs with
those of the pruned program, generates where the class can, and takes one step with ``Trainer`` and one with
PEFT. A second round (``--layouts resized``) prunes with ``allocation=global``, so that layers differ, and loads
with ``irprune.load_pretrained``.

    python tools/hf_roundtrip.py
    python tools/hf_roundtrip.py --only qwen3 vit --layouts plain

A line per model; the exit code is 1 if one fails. Checkpoints of trained models are taken from
``IRPRUNE_SHARED`` and ``IRPRUNE_MODELS`` (directories ``smollm2-135m-instruct`` and ``all-minilm-l6-v2``) and
skipped where they are absent.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4
SHARED = Path(os.environ.get("IRPRUNE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MODELS = Path(os.environ.get("IRPRUNE_MODELS", SHARED / "models"))

FFN = "kinds=ffn of=indices ratio=0.25 round_to=2"
WIDTH = "kinds=[heads,ffn,residual] of=indices ratio=0.25 round_to=1"
DEFAULT = "ratio=0.2 round_to=2"


@dataclass(frozen=True)
class Model:
    """A model with options of ``prune`` that give its class sizes that it can have.

    Attributes:
        name: For ``--only``.
        target: A subject of ``subjects.py``, or a checkpoint directory.
        prune: Options, but the allocation.
    """

    name: str
    target: str | Path
    prune: str = DEFAULT


ALL = (
    Model("stories260K", SHARED / "data" / "stories260k", "of=indices ratio=0.5"),
    Model("SmolLM2-135M", MODELS / "smollm2-135m-instruct", "of=indices ratio=0.33"),
    Model("all-MiniLM-L6-v2", MODELS / "all-minilm-l6-v2", "kinds=ffn of=indices ratio=0.25"),
    Model("qwen3", "qwen3"),
    Model("gpt2", "gpt2", WIDTH),
    Model("opt", "opt", FFN),
    Model("gemma2", "gemma2", "of=indices ratio=0.5 round_to=2"),
    Model("bert", "bert", WIDTH),
    Model("vit", "vit"),
)


# -- in a process without irprune -------------------------------------------------------------------


class _Blocked:
    """A finder that lets nobody import irprune."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("irprune", "irprune_passes"):
            raise ModuleNotFoundError(f"No module named '{name}'")


def child(folder: str, expected: str, layout: str) -> None:
    """Load, compare and train; print what was found as JSON."""
    import torch
    import transformers
    from safetensors.torch import load_file

    transformers.logging.set_verbosity_error()
    if layout == "plain":
        sys.meta_path.insert(0, _Blocked())  # type: ignore[arg-type]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("irprune", "irprune_passes")]:
            del sys.modules[name]
        assert importlib.util.find_spec("torch") is not None
        try:
            import irprune  # noqa: F401
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("irprune can be imported")
    torch.manual_seed(0)

    def load() -> Any:
        if layout == "plain":
            config = transformers.AutoConfig.from_pretrained(folder)
            auto = {
                "CausalLM": transformers.AutoModelForCausalLM,
                "SequenceClassification": transformers.AutoModelForSequenceClassification,
                "ImageClassification": transformers.AutoModelForImageClassification,
            }
            chosen = next((cls for end, cls in auto.items() if config.architectures[0].endswith(end)), transformers.AutoModel)
            return (transformers.GPT2LMHeadModel if config.architectures[0] == "GPT2LMHeadModel" else chosen).from_pretrained(folder).eval()
        import irprune

        return irprune.load_pretrained(folder)

    model = load()
    held = load_file(expected)
    inputs = {name[3:]: value for name, value in held.items() if name.startswith("in.")}
    with torch.no_grad():
        outputs = model(**inputs)
    found: dict[str, Any] = {"class": type(model).__name__, "module": type(model).__module__, "error": 0.0}
    for name, want in held.items():
        if name.startswith("out."):
            have = outputs[name[4:]]
            found["error"] = max(found["error"], float((have - want).abs().max() / want.abs().max()))
    if model.can_generate():
        prompt = inputs["input_ids"][:1, :6]
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached = model.generate(prompt, use_cache=True, **settings)
        found["generate"] = bool(torch.equal(cached, model.generate(prompt, use_cache=False, **settings)))
    found["trainer"] = trainer_step(model, inputs) if importlib.util.find_spec("accelerate") else None
    found["peft"] = peft_step(load(), inputs) if importlib.util.find_spec("peft") else None
    print(json.dumps(found))


def trainer_step(model: Any, inputs: dict[str, Any]) -> bool:
    """One step changes the weights, and the loss is a number."""
    import torch
    import transformers

    class Own(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            outputs = model(**inputs)
            loss = outputs[0].float().pow(2).mean()
            return (loss, outputs) if return_outputs else loss

    rows = [{name: value[i] for name, value in inputs.items()} for i in range(2)]
    with tempfile.TemporaryDirectory() as scratch:
        settings = transformers.TrainingArguments(
            scratch, max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False, save_strategy="no", learning_rate=1e-3, logging_strategy="no",
        )  # fmt: skip
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        done = Own(model=model, args=settings, train_dataset=rows).train()
    changed = any(not torch.equal(before[name], value) for name, value in model.named_parameters())
    return bool(changed and done.training_loss == done.training_loss)


def peft_step(model: Any, inputs: dict[str, Any]) -> bool:
    """One step changes the adapters only; merged, the model answers as with them."""
    import peft
    import torch

    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=True))
    names = [name for name, value in wrapped.named_parameters() if value.requires_grad]
    before = {name: value.detach().clone() for name, value in wrapped.named_parameters()}
    optimiser = torch.optim.SGD([value for value in wrapped.parameters() if value.requires_grad], lr=0.1)
    wrapped.train()
    wrapped(**inputs)[0].float().pow(2).mean().backward()
    optimiser.step()
    moved = [name for name, value in wrapped.named_parameters() if not torch.equal(before[name], value)]
    wrapped.eval()
    with torch.no_grad():
        want = wrapped(**inputs)[0]
        have = wrapped.merge_and_unload()(**inputs)[0]
    close = bool(torch.allclose(have, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())))
    return bool(moved) and all("lora_" in name for name in names) and set(moved) <= set(names) and close


# -- in this process --------------------------------------------------------------------------------


def target_of(model: Model) -> tuple[Any, dict[str, Any]]:
    if isinstance(model.target, Path):
        return f"hf:{model.target}", {}
    import subjects

    case = next(subject for subject in subjects.TINY if subject.name == model.target).build()
    return case.target, dict(case.options)


def roundtrip(model: Model, layout: str, scratch: Path) -> str:
    """Prune, write, load elsewhere. Returns the line; raises AssertionError with what is wrong."""
    import torch
    from safetensors.torch import save_file
    from torch.utils import _pytree as pytree

    import irprune

    target, options = target_of(model)
    start = time.perf_counter()
    asked = f"{model.prune} allocation=uniform" if layout == "plain" else "ratio=0.25 round_to=2 allocation=global"
    passes = f"score,prune{{{asked}}},export{{format=hf layout={layout}}}"
    done = irprune.run(target, passes, out=scratch / "run", **options)
    args, kwargs = done.program.interface.example
    assert not args
    with torch.no_grad():
        outputs = pytree.tree_leaves(done.program(**kwargs))
    held = {f"in.{name}": value.contiguous() for name, value in kwargs.items()}
    held |= {f"out.{name}": value.contiguous() for name, value in zip(done.program.interface.outputs, outputs, strict=True)}
    save_file(held, scratch / "expected.safetensors")
    command = [sys.executable, __file__, "--child", str(scratch / "run" / "hf"), str(scratch / "expected.safetensors"), layout]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    assert ended.returncode == 0, ended.stderr.strip()[-2000:]
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    assert found["error"] <= TOLERANCE, f"outputs differ by {found['error']:.2g}"
    assert found["module"].startswith("transformers."), found["module"]
    for what in ("generate", "trainer", "peft"):
        assert found.get(what) is not False, f"{what} fails"
    size = done.manifest.model
    told = " ".join(f"{what}={'ok' if found[what] else 'skipped'}" for what in ("generate", "trainer", "peft") if what in found)
    changed = " ".join(f"{name}={value}" for name, value in done.manifest.huggingface["changed"].items())
    seconds = time.perf_counter() - start
    return (
        f"{found['class']} {size.after.params / size.before.params:.3f} of parameters, error {found['error']:.1e} {told} "
        f"[{changed or 'sizes per layer'}] {seconds:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--layouts", nargs="*", default=["plain", "resized"], choices=["plain", "resized"])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return 0
    failed = 0
    for missing in (name for name in ("accelerate", "peft") if importlib.util.find_spec(name) is None):
        print(f"skipped: steps that need {missing}, which is not installed")
    for layout in given.layouts:
        for model in ALL:
            if given.only and model.name not in given.only:
                continue
            if isinstance(model.target, Path) and not model.target.is_dir():
                print(f"{layout:8} {model.name:18} skipped: {model.target} is not there")
                continue
            with tempfile.TemporaryDirectory(prefix="irprune-") as scratch:
                failed += not told(layout, model, lambda m=model, s=scratch, lay=layout: roundtrip(m, lay, Path(s)))  # type: ignore[misc]
    return 1 if failed else 0


def told(layout: str, model: Model, work: Callable[[], str]) -> bool:
    """Print the line of a model; whether it passed."""
    try:
        line, good = work(), True
    except Exception as error:
        line, good = f"FAILED {type(error).__name__}: {str(error).strip()}", False
    print(f"{layout:8} {model.name:18} {line}", flush=True)
    return good


if __name__ == "__main__":
    raise SystemExit(main())
