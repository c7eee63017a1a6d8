"""LLM-Pruner's comparison (arXiv 2305.11627, tables 1, 2 and 4) on a small language model, and what goes beyond it.

One cell is one pipeline. It is run, measured and written to ``OUT/CELL.json``; a cell whose file is
there is not run again, so a run that is stopped goes on where it was. Where the file lacks a column that
is asked for now (``--tasks``, ``--latency``), the pipeline is run again and only that is measured. When all
asked cells are there, or with ``--report-only``, the tables are written.

Needs the folder ``shared`` (``IRPRUNE_SHARED``, ``../shared`` if that is not set) for texts and tasks, and a checkpoint:

    python tools/reproduce_llm_pruner.py MODEL [--windows 72] [--tasks 40] [--latency] [--recovery 'lora,recover,merge']
    python tools/reproduce_llm_pruner.py --quick

MODEL is a directory with a Hugging Face checkpoint. ``--quick`` takes stories260K of ``shared``, 100 windows of
TinyStories and Shakespeare in the place of WikiText-2 and PTB, and a short recovery; that takes minutes. Perplexities follow the paper's
protocol: samples joined by blank lines, windows of 128 tokens, no overlap. Calibration text is the
validation part of WikiText-2, never what is measured on; scores take ten windows of 128 tokens as the
paper does, repair takes all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from irprune_passes.score.criteria import Study
from irprune_passes.score.reduce import Array
from irprune_passes.score.taylor import Taylor

from irprune import api
from irprune.analysis.cost import Cost
from irprune.analysis.groups import discover
from irprune.errors import IrpruneError
from irprune.evaluate import Predictor, perplexity, read_text, tokenised
from irprune.ir.facts import Fact, Original, Task
from irprune.ir.program import Program, set_tensor
from irprune.pipeline import manager
from irprune.pipeline.files import write_text
from irprune.pipeline.instruments import Timing
from irprune.pipeline.parser import parse

SHARED = Path(os.environ.get("IRPRUNE_SHARED", "../shared"))
SAMPLES, LENGTH = 10, 128
QUICK_WINDOWS = 100
TASKS = {
    **{name: f"zeroshot/{name}.jsonl" for name in ("boolq", "piqa", "winogrande", "arc_easy", "arc_challenge")},
    "hellaswag": "hellaswag/hellaswag_val_full.txt.bz2",
    "openbookqa": "zeroshot/openbook_qa.jsonl",
}

# What LLM-Pruner reports for LLaMA-7B: WikiText-2, PTB, mean of seven tasks. Tables 1, 2 and 14, appendix.
PAPER: dict[str, tuple[float | None, float | None, float | None]] = {
    "dense": (12.62, 22.14, 63.25),
    "20-l2": (582.41, 1022.17, 42.65),
    "20-random": (27.51, 43.19, 52.69),
    "20-channel": (74.63, 153.75, 45.38),
    "20-vector": (22.28, 41.78, 53.25),
    "20-element2": (19.77, 36.66, 56.82),
    "20-element1": (19.09, 34.21, 56.69),
    "20-channel-tuned": (22.02, 38.67, 55.57),
    "20-vector-tuned": (18.84, 33.05, 57.23),
    "20-element2-tuned": (17.37, 30.39, 60.07),
    "20-element1-tuned": (17.58, 30.11, 59.23),
    "20-global": (20.84, 32.86, 56.49),
    "20-no-dependency": (68378.0, 79942.0, None),
    "50-vector": (141.06, 236.24, 40.45),
    "50-element2": (106.07, 266.65, 41.58),
    "50-element1": (112.44, 255.38, 42.13),
    "50-vector-tuned": (43.47, 68.51, 46.61),
    "50-element2-tuned": (45.70, 69.33, 48.98),
    "50-element1-tuned": (38.12, 66.35, 48.69),
    "50-sum": (66.13, 164.25, None),
    "50-max": (62.59, 144.38, None),
    "50-prod": (77.63, 192.88, None),
    "50-last": (130.00, 170.88, None),
}


@dataclass(frozen=True)
class Cell:
    """One line of a table.

    Attributes:
        name: Name of its file; the seed's number is its last part where there are several.
        title: What the table says.
        pipeline: The passes as text, or ``None`` where the model is not pruned by passes.
        seed: Seed of the run.
    """

    name: str
    title: str
    pipeline: str | None
    seed: int = 0


@dataclass(frozen=True)
class Setting:
    """Which layers lose what, as far as it depends on the model.

    Attributes:
        blocks: Options of ``prune`` for block-wise pruning by ratio, as ``layers=4:28``.
    """

    blocks: dict[int, str]


SETTINGS = {
    # The paper keeps the first four and the last two of 32 blocks at 20 %, the first three and the last at 50 %.
    False: Setting({20: "layers=4:28", 50: "layers=3:29"}),
    True: Setting({20: "layers=1:", 50: "layers=1:"}),
}
BEST = {
    20: "score{criterion=activation},prune{ratio=0.2 kinds=ffn},repair",
    50: "score{criterion=activation},prune{ratio=0.5 kinds=[ffn,heads]},repair{readers=all}",
}


def cells(setting: Setting, recovery: str, best_recovery: str) -> Iterator[Cell]:
    """All lines of the comparison."""
    yield Cell("dense", "dense", "")
    for ratio, blocks in setting.blocks.items():
        part = ratio / 100

        def block(score: str, part: float = part, blocks: str = blocks) -> str:
            return f"score{{{score}}},prune{{ratio={part} kinds=[heads,ffn] {blocks}}}"

        taylor = "criterion=taylor batches=1"
        lines = {
            "l2": ("L2", block("criterion=magnitude")),
            "random": ("random", block("criterion=random")),
            "channel": ("channel, element-1", f"score{{{taylor}}},prune{{ratio={part} kinds=residual}}"),
            "vector": ("vector", block(f"{taylor} mode=vector")),
            "element2": ("element-2", block(f"{taylor} order=2")),
            "mixed": ("element, both orders (equation 5)", block(f"{taylor} order=mixed")),
            "element1": ("element-1", block(taylor)),
        }
        for name, (title, pipeline) in lines.items():
            for seed in range(3) if name == "random" else (0,):
                tail = f"-{seed}" if name == "random" else ""
                yield Cell(f"{ratio}-{name}{tail}", title, pipeline, seed)
                yield Cell(f"{ratio}-{name}-tuned{tail}", title, f"{pipeline},{recovery}", seed)
        ffn = f"score{{{taylor}}},prune{{ratio={part} kinds=ffn}}"
        more = {
            "global": ("element-1, one ranking over all blocks", block(taylor).replace("prune{", "prune{allocation=global ")),
            "element1-ffn": ("element-1, ffn of all blocks", ffn),
            "activation-ffn": ("activations, ffn of all blocks", ffn.replace(taylor, "criterion=activation")),
            "element1-ls": ("element-1, ffn of all blocks, least squares", f"{ffn},repair"),
            "best": ("irprune, best recipe", BEST[ratio]),
        }
        if ratio == 50:
            del more["element1-ffn"], more["activation-ffn"], more["element1-ls"]
        for name, (title, pipeline) in more.items():
            yield Cell(f"{ratio}-{name}", title, pipeline)
        yield Cell(f"{ratio}-best-tuned", "irprune, best recipe", f"{BEST[ratio]},{best_recovery}")
    yield Cell("20-no-dependency", "element-1, every weight on its own", None)
    for how in ("sum", "max", "prod", "last"):
        yield Cell(f"50-{how}", f"element-1, {how}", block(f"{taylor} reduce={how}"))


class Bench:
    """The model, what it is measured on, and where results go.

    Args:
        options: The command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        data = SHARED / "data"
        if not data.is_dir():
            sys.exit(f"skipped: there is no {data}; set IRPRUNE_SHARED to the folder with the texts")
        self.options = options
        self.rows: dict[str, str] = {}  # what Hugging Face's loaders make of a line, where that is not the line
        self.model = str(data / "stories260k") if options.quick else options.model
        self.name = Path(self.model).name
        if options.quick:
            stories = data / "tinystories"
            self.texts = {"TinyStories": stories / "tinystories_valid_cs336_sample.txt", "Shakespeare": data / "tinyshakespeare/input.txt"}
            self.calibration = stories / "tinystories_train_head_944k.txt"
        else:
            self.texts = {"WikiText-2": data / "wikitext2/test.txt", "PTB": data / "ptb/ptb.valid.txt"}
            self.rows = {"WikiText-2": "rows", "PTB": "stripped"}
            self.calibration = data / "wikitext2/valid.txt"
        self.out = Path(options.out) / self.name
        self.out.mkdir(parents=True, exist_ok=True)
        self.program: Program | None = None

    def load(self) -> None:
        """Trace the model and read the texts; nothing is done for cells that are there already."""
        from irprune.evaluate.evaluation import tokenizer_of

        target = f"hf:{self.model}"
        options = {"sequence": LENGTH, "batch": SAMPLES, "windows": self.options.calibration}
        self.program, self.facts = api.load(target, calibration=str(self.calibration), **options)
        self.tokenizer = tokenizer_of(target, None)
        self.tokens = {name: tokenised(self.tokenizer, read_text(path)) for name, path in self.texts.items()}
        for name, samples in self.rows.items():
            self.tokens[f"{name}, {samples}"] = tokenised(self.tokenizer, read_text(self.texts[name], samples))

    def lacks(self, cell: Cell, known: dict[str, Any]) -> list[str]:
        """The columns that are asked for and that a cell does not have yet."""
        asked = [*self.texts, *(["average"] if self.options.tasks else [])]
        asked += [f"{name}, {samples}" for name, samples in self.rows.items()] if cell.pipeline == "" else []
        lacking = [] if "error" in known else [column for column in asked if column not in known]
        timed = "error" in known or ("shapes" in known and self._file(known["shapes"]).exists())
        return lacking if timed or not self.options.latency else [*lacking, "latency_ms"]

    def _file(self, shapes: str) -> Path:
        return self.out / f"{shapes}.onnx"

    def run(self, cell: Cell, known: dict[str, Any]) -> dict[str, Any]:
        """One cell's pipeline and measures; of a cell that is known, those that it lacks."""
        if self.program is None:
            self.load()
        assert self.program is not None
        start = time.perf_counter()
        passes: dict[str, float] = {}
        if cell.pipeline is None:
            program = without_dependency(self.program, self.facts, 0.25, SETTINGS[self.options.quick].blocks[20])
        elif cell.pipeline:
            program, passes = self._piped(cell)
        else:
            program = self.program
        timed = {"seconds": time.perf_counter() - start, "passes": passes}
        cost = Cost(program)
        shapes = hashlib.sha256(repr([(name, tuple(tensor.shape)) for name, tensor in program.tensors.items()]).encode()).hexdigest()
        sizes = {"params": cost.params(), "macs": cost.macs(), "bytes": cost.bytes(), "shapes": shapes}
        found: dict[str, Any] = {**dataclasses.asdict(cell), **timed, **known, **sizes}
        lacking = self.lacks(cell, known)
        predict = Predictor.of(program)
        for name in lacking:
            if name in self.tokens:
                found[name] = perplexity(predict, self.tokens[name], LENGTH, self.options.windows, label=name).perplexity
        if "average" in lacking:
            found["tasks"], found["average"] = self._zero_shot(predict)
        if self.options.latency and not self._file(shapes).exists():
            from irprune.backend.onnx import export

            export(program, self._file(shapes))
        return found

    def latencies(self) -> dict[str, float]:
        """Milliseconds of a prompt by the shapes of a program's tensors: all of them in turn, so that the machine is the same for all."""
        from irprune.backend.runtime import opened

        sessions = {path.stem: opened(path, threads=1, provider="cpu")[0] for path in sorted(self.out.glob("*.onnx"))}
        ids = np.random.default_rng(0).integers(0, 1000, (1, 64)) % int(self.tokens[next(iter(self.tokens))].max())
        times: dict[str, list[float]] = {shapes: [] for shapes in sessions}
        for _ in range(22):
            for shapes, session in sessions.items():
                start = time.process_time()  # on one thread; other work on the machine is not counted
                session.run(None, {session.get_inputs()[0].name: ids})
                times[shapes].append(1000 * (time.process_time() - start))
        return {shapes: statistics.median(found[2:]) for shapes, found in times.items()}

    def _piped(self, cell: Cell) -> tuple[Program, dict[str, float]]:
        """The pipeline's program, and the seconds of each pass."""
        assert self.program is not None
        assert cell.pipeline is not None
        facts = [dataclasses.replace(fact, seed=cell.seed) if isinstance(fact, Task) else fact for fact in self.facts]
        timing = Timing()
        program, _ = manager.run(parse(cell.pipeline), self.program, [*facts, Original(self.program)], [timing])
        return program, {step.of.name: step.seconds for step in timing.steps}

    def chance(self, tasks: Iterable[str]) -> float:
        """What choosing blindly comes to in the documents that are asked, the mean over the tasks."""
        from irprune.evaluate.tasks import chance, documents

        return statistics.fmean(chance(documents(SHARED / "data" / TASKS[name])[: self.options.tasks]) for name in tasks)

    def _zero_shot(self, predict: Predictor) -> tuple[dict[str, float], float]:
        from irprune.evaluate.tasks import accuracy, averages, documents

        tasks = {name: documents(SHARED / "data" / path) for name, path in TASKS.items()}
        measured = accuracy(predict, self.tokenizer, tasks, limit=self.options.tasks)
        return {name: one.acc if one.acc_norm is None else one.acc_norm for name, one in measured.items()}, averages(measured)["acc_norm"]


class _Apart(Study):
    """A study that keeps the scores of every structure on its own."""

    def reduced(self, measured: Sequence[Array]) -> dict[str, Array]:
        self.__dict__["apart"] = list(measured)
        return {}


def without_dependency(program: Program, facts: Sequence[Fact], ratio: float, blocks: str) -> Program:
    """The ablation without dependencies: every weight loses its own lowest slices, whatever its partners lose.

    A program whose matrices do not fit together cannot run, so the slices are zeroed where they stand.
    """
    from irprune_passes.prune.select import Filter, select

    groups = discover(program)
    task = next((fact for fact in facts if isinstance(fact, Task)), None)
    chosen = select(program, groups, Filter(("heads", "ffn"), layers=blocks.removeprefix("layers="))).chosen
    study = _Apart(program, chosen, task, batches=1)
    Taylor().score(study)
    new = program.clone()
    weights: dict[str, torch.Tensor] = {}
    for structure, scores in zip(study.structures, study.__dict__["apart"], strict=True):
        name, axis = structure.member.tensor, structure.member.axis
        weight = weights.setdefault(name, program.tensors[name].detach().clone())
        gone = np.argsort(scores, kind="stable")[: round(ratio * structure.size)]
        owner = np.repeat(np.arange(structure.size), structure.lengths.cpu().numpy())
        positions = structure.positions[torch.from_numpy(np.isin(owner, gone))]
        weight.index_fill_(axis, positions, 0)
    for name, weight in weights.items():
        set_tensor(new.module, name, weight)
    return dataclasses.replace(new, types=program.types)


# -- tables ---------------------------------------------------------------------------------------


def tables(bench: Bench, found: dict[str, dict[str, Any]], wanted: Sequence[str], command: str) -> str:
    """``docs/results.md`` from what the cells say."""
    texts = list(bench.texts)
    seconds = sum(cell["seconds"] for cell in found.values() if "seconds" in cell)
    lines = [
        "# Results",
        "",
        f"LLM-Pruner's comparison (arXiv 2305.11627) on {bench.name}, and irprune's own recipe. Written by",
        "",
        "<!-- not run: it takes hours, and data that is not part of the project -->",
        "```console",
        f"$ {command}",
        "```",
        "",
        f"Pipelines took {seconds / 60:.0f} minutes in all on {platform.machine()} with {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}, without a GPU. Perplexity: samples joined by blank lines, the first "
        f"{bench.options.windows or 'all'} windows of {LENGTH} tokens. Calibration: "
        f"`{bench.calibration.parent.name}/{bench.calibration.name}`, {SAMPLES} windows for Taylor scores, "
        f"{bench.options.calibration} for activations and repair. Seed 0; random criteria: mean over seeds 0, 1 and 2, with the "
        "smallest and the largest value. The last column is what the paper reports for LLaMA-7B (WikiText-2 / PTB / mean of seven "
        "tasks) and was not measured here.",
        "",
        *(f"irprune's recipe at {ratio} % is `{recipe}`." for ratio, recipe in BEST.items()),
        "With recovery the lines of the paper are followed by "
        f"`{bench.options.recovery}`, irprune's by `{bench.options.best_recovery or bench.options.recovery}`: without `lora` "
        "`recover` trains all weights.",
        "",
        *_rows(bench, found),
        *_beside(bench, found),
    ]
    missing = [name for name in wanted if name not in found]
    if missing:
        lines += [f"Not run: {', '.join(f'`{name}`' for name in missing)}.", ""]
    for title, part in _sections(found):
        lines += [f"## {title}", "", *_table(part, found, texts), ""]
    said = list(_findings(found, texts[0]))
    if said:
        lines += ["## What this says", "", *(f"- {line}" for line in said), ""]
    return "\n".join(lines)


def _rows(bench: Bench, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """How far the texts' lines as samples are from the rows that the paper reads."""
    dense = found.get("dense", {})
    values = [f"{dense[key]:.2f} on {name}" for name, samples in bench.rows.items() if (key := f"{name}, {samples}") in dense]
    if values:
        yield (
            "Samples are the lines of the files as they stand. Hugging Face's loaders, which the paper reads with, leave the newline at "
            f"a line of WikiText and strip PTB's of the blanks around them: with their rows the dense model has {' and '.join(values)}."
        )
        yield ""


def _beside(bench: Bench, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What the columns are that not every cell has, and how far the first of them can be trusted."""
    scored = [cell for cell in found.values() if "average" in cell]
    said = []
    if scored:
        tasks = sorted({task for cell in scored for task in cell["tasks"]})
        error = 0.5 / (len(tasks) * bench.options.tasks) ** 0.5
        said.append(
            f"Zero-shot: the mean accuracy of {', '.join(tasks)}, the first {bench.options.tasks} documents of each; one standard "
            f"deviation of it is up to {error:.3f}, so that smaller differences say nothing. Choosing blindly comes to "
            f"{bench.chance(tasks):.3f}."
        )
    if any("latency_ms" in cell for cell in found.values()):
        said.append(
            "onnxruntime: the median processor time of a prompt of 64 tokens on one thread, all shapes in turn; equal shapes share it."
        )
    seeds = [cell for name, cell in found.items() if "-random" in name]
    measured = sorted({cell["seed"] for cell in seeds if "average" in cell})
    if said and 0 < len(measured) < len({cell["seed"] for cell in seeds}):
        said.append(f"Random criteria: these columns for seed {', '.join(map(str, measured))}.")
    if said and any("average" not in cell for cell in found.values() if cell not in seeds and "error" not in cell):
        said.append("Lines without these columns' values were not measured so.")
    if said:
        yield from (" ".join(said), "")


def _findings(found: dict[str, dict[str, Any]], text: str) -> Iterator[str]:
    """Whether the paper's order appears, and how far irprune's recipe goes beyond it; cells that are not there are left out."""
    value = {name: cell[text] for name, cell in found.items() if text in cell}

    def all_of(kind: str) -> list[float]:
        return [one for name, one in value.items() if name == kind or (name.startswith(f"{kind}-") and name[len(kind) + 1 :].isdigit())]

    for ratio in (20, 50):
        for better, worse, words in (
            ("element1", "random", "element-1 is better than random"),
            ("vector", "random", "vector-wise is better than random"),
            ("element1", "channel", "block-wise is better than channel-wise"),
            ("random", "l2", "L2 is worse than random"),
            ("element1", "last", "the sum over a group is better than its last member alone"),
            ("element1", "no-dependency", "keeping coupled structures together is better than every weight on its own"),
        ):
            low, high = all_of(f"{ratio}-{better}"), all_of(f"{ratio}-{worse}")
            if low and high:
                seen = "yes" if max(low) < min(high) else "not here"
                yield f"{ratio} %, {words}, as in the paper: {seen} ({statistics.fmean(low):.2f} against {statistics.fmean(high):.2f})."
    if {"dense", "20-best", "20-element1", "20-element1-ffn"} <= value.keys():
        base, best = value["dense"], value["20-best"] - value["dense"]
        less = [f"{1 - best / (value[name] - base):.0%} less than {words}" for name, words in _ELEMENTS]
        yield f"20 % without training: irprune's recipe raises the perplexity by {best:.2f}: {' and '.join(less)}."
    for ratio in (20, 50):
        pair = [value.get(f"{ratio}-{name}-tuned") for name in ("best", "element1")]
        if pair[0] is not None and pair[1] is not None:
            how = f"{pair[0]:.2f} against {pair[1]:.2f} of element-1 with LoRA in the same number of steps"
            yield f"{ratio} % with recovery: irprune's recipe ends at {how}: {1 - pair[0] / pair[1]:.0%} lower."
    if value.get("20-best-tuned", value.get("dense", 0.0)) < value.get("dense", 0.0):
        yield "Recovery trains on the same kind of text that is measured, which is why perplexities fall below the dense model's."


_ELEMENTS = (("20-element1-ffn", "element-1 on the same layers"), ("20-element1", "the paper's element-1 on heads and ffn"))


def _sections(found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    names = list(found)
    ablations = ("50-sum", "50-max", "50-prod", "50-last", "20-no-dependency")
    for ratio in (20, 50):
        mine = [name for name in names if name.startswith(f"{ratio}-") and name not in ablations]
        for tuned, title in ((False, "without recovery"), (True, "with recovery")):
            part = [name for name in mine if ("-tuned" in name) is tuned]
            if part:
                yield f"{ratio} % of the parameters, {title}", [*(["dense"] if "dense" in names else []), *part]
    part = [name for name in ablations if name in names]
    if part:
        yield "Ablations", part


def _table(names: Sequence[str], found: dict[str, dict[str, Any]], texts: Sequence[str]) -> list[str]:
    merged: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        merged.setdefault(name.rstrip("0123456789").rstrip("-") if "-random" in name else name, []).append(found[name])
    more = [key for key in ("average", "latency_ms") if any(key in cell for cells in merged.values() for cell in cells)]
    heads = {"average": "zero-shot", "latency_ms": "onnxruntime, ms"}
    out = [
        "| | " + " | ".join([*texts, "parameters", "MACs", "weights, MiB", *(heads[key] for key in more), "paper, LLaMA-7B"]) + " |",
        "|---" * (6 + len(texts) - 1 + len(more)) + "|",
    ]
    for name, group in merged.items():
        first = group[0]
        if "error" in first:
            out.append(f"| {first['title']} | " + " | ".join([first["error"], *[""] * (len(texts) + 3 + len(more))]) + " |")
            continue
        values = [_spread([cell[text] for cell in group], ".2f") for text in texts]
        sizes = [f"{first['params'] / 1e6:.2f} M", f"{first['macs'] / 1e9:.3g} G", f"{first['bytes'] / 2**20:.3g}"]
        extra = [_spread([cell[key] for cell in group if key in cell], ".3f" if key == "average" else ".1f") for key in more]
        paper = PAPER.get(name)
        said = " / ".join("" if value is None else f"{value:g}" for value in paper) if paper else ""
        out.append("| " + " | ".join([first["title"], *values, *sizes, *extra, said]) + " |")
    return out


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    return f"{mean:{form}}" + (f" ({min(values):{form}} to {max(values):{form}})" if max(values) > min(values) else "")


def _known(path: Path, cell: Cell) -> dict[str, Any]:
    """What the cell's file says; nothing where it is not there or says what another pipeline does."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("pipeline", "") == cell.pipeline else {}


def _command(arguments: Sequence[str]) -> str:
    """What measures the page's cells again: where cells and page were kept says nothing to a reader."""
    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    places.add_argument("--out")
    places.add_argument("--report")
    places.add_argument("--report-only", action="store_true")
    _, kept = places.parse_known_args(arguments)
    return shlex.join(["python", f"tools/{Path(__file__).name}", *kept])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="directory of a Hugging Face checkpoint")
    parser.add_argument("--quick", action="store_true", help="stories260K")
    parser.add_argument("--out", default="runs/llm-pruner", help="where cells are kept")
    parser.add_argument("--report", help="the page to write; the default is OUT/MODEL/results.md")
    parser.add_argument("--report-only", action="store_true", help="write the page from the cells that are there")
    parser.add_argument("--cells", default="*", help="patterns of cells to run, comma-separated")
    parser.add_argument("--windows", type=int, help="windows of each text; all if not given, with --quick 100")
    parser.add_argument("--calibration", type=int, default=60, help="calibration windows for activations and repair")
    parser.add_argument("--tasks", type=int, default=0, help="documents of each zero-shot task; 0: none")
    parser.add_argument("--latency", action="store_true", help="export and time in onnxruntime")
    parser.add_argument(
        "--recovery", default="", help="passes that recover, as lora,recover,merge; without them nothing is tuned, but with --quick"
    )
    parser.add_argument("--best-recovery", default="", help="those of irprune's own recipe; the default is --recovery")
    options = parser.parse_args()
    if bool(options.model) == options.quick:
        parser.error("give a model or --quick")
    if options.quick:
        options.windows = options.windows or QUICK_WINDOWS
        options.best_recovery = options.best_recovery or options.recovery or "recover{steps=24 lr=2e-3 logits=1}"
        options.recovery = options.recovery or "lora,recover{steps=24 lr=2e-3},merge"
    bench = Bench(options)
    patterns = options.cells.split(",")
    wanted = list(cells(SETTINGS[options.quick], options.recovery, options.best_recovery or options.recovery))
    wanted = [cell for cell in wanted if options.recovery or "-tuned" not in cell.name]
    for cell in wanted:
        path = bench.out / f"{cell.name}.json"
        known = _known(path, cell)
        asked = not options.report_only and any(fnmatch.fnmatch(cell.name, pattern) for pattern in patterns)
        if not asked or (known and not bench.lacks(cell, known)):
            continue
        try:
            found = bench.run(cell, known)
        except IrpruneError as error:
            found = {**dataclasses.asdict(cell), "error": error.message}
        write_text(path, json.dumps(found, indent=2) + "\n")
        said = found.get("error") or ", ".join(f"{name} {found[name]:.2f}" for name in bench.texts)
        print(f"{cell.name}: {said}", flush=True)
    if options.latency and not options.report_only:
        if bench.program is None:
            bench.load()
        timed = bench.latencies()
        for path in bench.out.glob("*.json"):
            found = json.loads(path.read_text())
            if found.get("shapes") in timed:
                write_text(path, json.dumps({**found, "latency_ms": timed[found["shapes"]]}, indent=2) + "\n")
    there = {cell.name: found for cell in wanted if (found := _known(bench.out / f"{cell.name}.json", cell))}
    command = _command(sys.argv[1:])
    report = Path(options.report) if options.report else bench.out / "results.md"
    write_text(report, tables(bench, there, [cell.name for cell in wanted], command))
    print(report)


if __name__ == "__main__":
    main()
