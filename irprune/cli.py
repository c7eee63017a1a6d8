"""The command line. Every command is one call of :mod:`irprune.api` and its output.

Heavy imports stand inside the commands, so that help comes at once.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from irprune import __version__
from irprune.errors import IrpruneError, OptionError

if TYPE_CHECKING:
    from rich.console import Console

    from irprune.api import Run
    from irprune.pipeline.manager import Instrument
    from irprune.pipeline.manifest import Manifest

EXIT_CODES = "\n\n".join(
    (
        "Exit codes:",
        "0 done",
        "1 a fault of irprune; it comes with a traceback",
        "2 bad input: a target, pipeline, option, recipe or data that cannot be used",
        "3 cannot be done: not traceable, nothing prunable, budget out of reach, not exportable",
        "4 a check failed: proof, parity or a required speed-up",
        "5 the output cannot be written",
        "130 interrupted",
    )
)

INTERRUPTED = 130


class _Commands(TyperGroup):
    """Prints an error for users as what it is, and turns it into its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except IrpruneError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted; nothing is left behind", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A compiler for structural pruning of neural networks.",
    epilog=EXIT_CODES,
)

Target = Annotated[str, typer.Argument(metavar="TARGET", help="A model file, or hf:PATH_OR_ID.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Calibration = Annotated[Path | None, typer.Option(metavar="FILE", help="Calibration data in place of the target's own.")]
Setting = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the target's loader; may be repeated.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="The run directory; by default the first free runs/<target>-<n>.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier run left in DIR.")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on from the last finished pass of a run that was stopped; what is done is kept for the next one."),
]
Require = Annotated[
    float | None, typer.Option(metavar="X", help="Fail unless onnxruntime is surely X times faster; see the pass validate.")
]
Timing = Annotated[bool, typer.Option("--timing", help="Say how long each pass took.")]


@app.callback(invoke_without_command=True)
def irprune(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(epilog=EXIT_CODES)
def run(
    target: Target,
    passes: Annotated[str | None, typer.Option(metavar="TEXT", help="The pipeline, as prune{ratio=0.2},export,validate.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="The pipeline as a TOML file with one table per pass.")] = None,
    out: Out = None,
    seed: Seed = 0,
    calibration: Calibration = None,
    setting: Setting = None,
    print_ir_after: Annotated[
        list[str] | None, typer.Option(metavar="PASS", help="Print the program after a pass; may be repeated.")
    ] = None,
    require_speedup: Require = None,
    timing: Timing = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and change and write nothing.")] = False,
    force: Force = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Run a pipeline on a model and write the run directory."""
    from irprune import api

    if resume and not force and out is not None and (told := api.finished(out)) is not None:
        _show_finished(told, out, quiet=quiet)
        return
    with _watching(quiet, print_ir_after or []) as instruments:
        done = api.run(
            target,
            passes,
            config=config,
            out=out,
            force=force,
            dry_run=dry_run,
            resume=resume,
            require_speedup=require_speedup,
            instruments=instruments,
            **_loading(seed, calibration, setting),
        )
    _show(done, timing=timing, quiet=quiet)


@app.command()
def apply(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.safetensors of an earlier run.")],
    target: Target,
    out: Out = None,
    seed: Seed = 0,
    setting: Setting = None,
    timing: Timing = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Replay a recipe on the model that it was made for; the removal is proven as always."""
    from irprune import api
    from irprune.pipeline.parser import write

    with _watching(quiet) as instruments:
        passes = f"apply{{recipe={write(recipe)}}}"
        done = api.run(target, passes, out=out, force=force, instruments=instruments, **_loading(seed, None, setting))
    _show(done, timing=timing, quiet=quiet)


@app.command()
def validate(
    path: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of an earlier run.")],
    target: Target,
    options: Annotated[str, typer.Option(metavar="TEXT", help="Options of the pass validate, as 'seconds=2 baseline=false'.")] = "",
    require_speedup: Require = None,
    seed: Seed = 0,
    setting: Setting = None,
    timing: Timing = False,
    quiet: Quiet = False,
) -> None:
    """Check the ONNX file of an earlier run again: parity, speed, quality."""
    from irprune import api

    with _watching(quiet) as instruments:
        options = options if require_speedup is None else f"{options} require_speedup={require_speedup}"
        done = api.validate(path, target, options=options, instruments=instruments, **_loading(seed, None, setting))
    _show(done, timing=timing, quiet=quiet)


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A model file, hf:PATH_OR_ID, a run directory or an ONNX file.")],
    text: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]FILE", help="A text (.txt, .jsonl, .parquet) for perplexity; may be repeated.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=FILE]", help="A task (.jsonl, .txt) for zero-shot accuracy; may be repeated.")
    ] = None,
    tasks_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where tasks lie; all of them, where --tasks names none.")] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="torch, onnx, or auto: torch where there is a program.")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(metavar="PATH_OR_ID", help="A tokenizer in place of the target's own.")] = None,
    samples: Annotated[
        str, typer.Option(metavar="NAME", help="A line of a .txt file as a sample: lines, rows (with its newline) or stripped.")
    ] = "lines",
    window: Annotated[int, typer.Option(help="Tokens in a window of text.")] = 128,
    windows: Annotated[int | None, typer.Option(help="Most windows of each text, from its beginning.")] = None,
    batch: Annotated[int, typer.Option(help="Windows of text in one call.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Most documents of each task, from its beginning.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Write evaluation.json into the run directory.")] = False,
    seed: Seed = 0,
    setting: Setting = None,
    quiet: Quiet = False,
) -> None:
    """Measure a language model: perplexity of texts, zero-shot accuracy on tasks."""
    from irprune import api
    from irprune.report import tables

    with _watching(quiet):
        done = api.evaluate(
            target,
            texts=text or (),
            tasks=tasks or (),
            tasks_dir=tasks_dir,
            backend=backend,
            tokenizer=tokenizer,
            samples=samples,
            window=window,
            windows=windows,
            batch=batch,
            limit=limit,
            save=save,
            **_loading(seed, None, setting),
        )
    if as_json:
        print(json.dumps(done.data, indent=2))
    elif not quiet:
        _console().print(tables.evaluation_table(done))
        _say([f"in {'onnxruntime' if done.backend == 'onnx' else done.backend} on {done.device}"])


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="A decoder, written with export{cache=true}.")],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The text to go on from.")] = None,
    ids: Annotated[str | None, typer.Option(metavar="N,N,...", help="The same as tokens; new tokens are printed.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most new tokens; the end token ends it sooner.")] = 64,
    tokenizer: Annotated[str | None, typer.Option(metavar="DIR", help="The tokenizer; by default that beside the model.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads of onnxruntime; 0: its own choice.")] = 0,
    provider: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where onnxruntime runs; auto takes CUDA where it is offered.")
    ] = "auto",
    timing: Annotated[bool, typer.Option("--timing", help="Say how many tokens a second it wrote.")] = False,
) -> None:
    """Go on from a prompt by greedy decoding, in onnxruntime."""
    from irprune import api

    if (prompt is None) == (ids is None):
        raise OptionError("a prompt is given as --prompt or as --ids", hint="give one of them")
    try:
        given: str | list[int] = [int(part) for part in ids.split(",")] if ids is not None else str(prompt)
    except ValueError:
        raise OptionError(f"'{ids}' is not a list of numbers", where="--ids", hint="give tokens as 5,9,2") from None
    done = api.generate(model, given, tokens=tokens, tokenizer=tokenizer, threads=threads, provider=provider)
    _say([",".join(map(str, done.tokens)) if done.text is None else done.text])
    if timing:
        speed = done.speed
        print(
            f"prompt of {speed.prompt} tokens in {speed.prefill_s:.3f} s, then {speed.tokens_per_second:.1f} tokens a second",
            file=sys.stderr,
        )


@app.command()
def report(path: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of an earlier run.")]) -> None:
    """Write report.html of an earlier run again."""
    from irprune import api

    _say([str(api.report(path))])


@app.command()
def compare(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Directories of runs, two or more.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the page with the charts goes.")] = Path("compare.html"),
) -> None:
    """Put runs side by side: a table here, charts in a page."""
    from irprune import api
    from irprune.report import compare as comparing

    done = api.compare(paths, out=out)
    _console().print(comparing.table(done))
    _say([*comparing.lines(done), str(out)])


@app.command()
def inspect(
    target: Target,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    every: Annotated[bool, typer.Option("--all", help="A row for each group; otherwise groups of repeated blocks share one.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the structure graph of --group as SVG.")] = None,
    group: Annotated[str | None, typer.Option(metavar="NAME", help="The group to draw.")] = None,
    freeze: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Tensors that stay whole; may be repeated.")] = None,
    seed: Seed = 0,
    setting: Setting = None,
) -> None:
    """List what may be removed together, and what may not be removed and why."""
    from irprune import api
    from irprune.report import tables

    if (svg is None) != (group is None):
        raise OptionError("--svg and --group go together", hint="give --svg FILE --group NAME")
    with _watching(quiet=False):
        program, groups = api.groups(target, freeze=freeze or (), **_loading(seed, None, setting))
    if svg is not None and group is not None:
        from irprune.analysis.dependency import structure
        from irprune.pipeline.files import write_text
        from irprune.pipeline.registry import suggestion
        from irprune.report import drawing

        if group not in (one.name for one in groups):
            raise OptionError(f"there is no group '{group}'; {suggestion(group, [one.name for one in groups])}", where="--group")
        drawn = groups[group]
        title = f"{drawn.name}: {drawn.size} indices, {drawn.kind}, {'exact' if drawn.exact else 'not exact'}"
        write_text(svg, drawing.svg(structure(program, drawn), title))
        _console().print(f"{svg}", markup=False, soft_wrap=True)
    elif as_json:
        print(json.dumps(tables.inspection(program, groups), indent=2))
    else:
        _console().print(tables.groups_table(groups, every=every))
        _say(tables.inspection_lines(program, groups))


@app.command()
def explain(
    target: Target,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A parameter, a module or a group.")],
    freeze: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Tensors that stay whole; may be repeated.")] = None,
    seed: Seed = 0,
    setting: Setting = None,
) -> None:
    """Say why a parameter, a module or a group is prunable, or why not, and what decides it."""
    from irprune import api
    from irprune.report.explain import explain as explained

    with _watching(quiet=False):
        program, groups = api.groups(target, freeze=freeze or (), **_loading(seed, None, setting))
    _say("  " * line.depth + line.text for line in explained(program, groups, name))


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A pass to document.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page as markdown.")] = False,
) -> None:
    """List the passes, or document one."""
    from irprune.pipeline import registry
    from irprune.report import passes as pages

    listed = [registry.find(name)] if name is not None else list(registry.loadable().values())
    if markdown:
        print("\n".join(pages.markdown(one) for one in listed), end="")
    elif name is not None:
        _console().print(*pages.page(listed[0]), sep="\n")
    else:
        _console().print(pages.listing(listed))


def main() -> None:
    """The command ``irprune``."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    app()


# -- output ---------------------------------------------------------------------------------------


def _console(*, stderr: bool = False) -> Console:
    """A console with colours on a terminal only; away from one, lines are as long as they need to be."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=160)


@contextmanager
def _watching(quiet: bool, print_ir_after: list[str] | None = None) -> Iterator[list[Instrument]]:
    """The instruments of a command, with progress shown on a terminal."""
    from irprune.pipeline import processes, registry
    from irprune.pipeline.instruments import PrintIR, Progress

    console = _console(stderr=True)
    console.quiet = quiet or not processes.leads()
    for name in print_ir_after or ():
        registry.find(name, where="--print-ir-after")
    progress = Progress(console)
    with progress.live():
        yield [progress, *([PrintIR(print_ir_after, console)] if print_ir_after else [])]


def _loading(seed: int, calibration: Path | None, setting: list[str] | None) -> dict[str, Any]:
    """Arguments of :func:`irprune.api.load`."""
    from irprune.pipeline.parser import read

    out: dict[str, Any] = {"seed": seed}
    if calibration is not None:
        out["calibration"] = str(calibration)
    for entry in setting or ():
        key, sign, text = entry.partition("=")
        if not (key.isidentifier() and sign):
            raise OptionError(f"'{entry}' is not KEY=VALUE", where="--set")
        out[key] = read(text)
    return out


def _say(lines: Any) -> None:
    console = _console()
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _show(done: Run, *, timing: bool, quiet: bool) -> None:
    """The end of a run: what was measured, before and after, and where it lies."""
    from irprune.pipeline.instruments import timing_table
    from irprune.pipeline.processes import leads
    from irprune.report import tables

    if not leads():
        return
    if timing:
        _console(stderr=True).print(timing_table(done.steps))
    if quiet:
        return
    if done.plan is not None:
        _console().print(tables.plan_table(done.plan))
        _say(tables.plan_lines(done.manifest, done.plan))
        return
    _say(tables.note_lines(done.manifest.notes, "the manifest has them"))
    _show_finished(done.manifest, done.path, quiet=quiet)


def _show_finished(told: Manifest, path: Path | None, *, quiet: bool) -> None:
    from irprune.report import tables

    if quiet:
        return
    _console().print(tables.run_table(told))
    _say(tables.run_lines(told))
    if path is not None:
        _say([str(path)])
