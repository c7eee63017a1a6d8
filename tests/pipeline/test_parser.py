"""Pipelines as text and as TOML."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_passes import Cut, Paint, Weigh

from irprune.errors import OptionError
from irprune.pipeline.parser import parse, parse_toml, unparse

texts = st.text(max_size=8) | st.sampled_from(["none", "true", "1", "-1.5e3", "inf", "a b", 'q"', "back\\slash", "é", "[1,2]", "x=y", "'"])
cuts = st.builds(
    Cut,
    ratio=st.floats(0, 1, exclude_max=True),
    unit=st.sampled_from(["params", "none"]),
    round_to=st.none() | st.integers(1, 10**9),
    sizes=st.lists(st.integers(1, 99), max_size=3).map(tuple),
    label=texts.filter(lambda text: text != "secret"),
    force=st.booleans(),
    scale=st.integers() | st.floats(allow_nan=False) | texts,
    nested=st.lists(st.lists(texts, max_size=2).map(tuple), max_size=2).map(tuple),
)
paints = st.builds(Paint, skip=st.lists(texts, max_size=3).map(tuple))


@given(st.lists(cuts | paints | st.just(Weigh()), min_size=1, max_size=3))
def test_the_text_of_a_pipeline_reads_back_as_the_same_pipeline(passes: list[Any]) -> None:
    assert parse(unparse(passes)) == passes
    assert [parse(str(one)) for one in passes] == [[one] for one in passes]


def test_the_text_form_names_only_what_differs() -> None:
    assert str(Cut()) == "cut"
    text = 'cut{ratio=0.25 unit="none" round_to=none sizes=[1, 2] label="a b" force=true scale="1" nested=[[x], []]}'
    cut = Cut(ratio=0.25, unit="none", round_to=None, sizes=(1, 2), label="a b", force=True, scale="1", nested=(("x",), ()))
    assert str(cut) == text
    assert parse(text) == [cut]


def test_blanks_commas_and_lines_may_be_written_freely() -> None:
    assert parse(" paint { skip = [ output ,placeholder ] } ,\n weigh{},cut{ratio=1e-1,round_to=4} ") == [
        Paint(skip=("output", "placeholder")),
        Weigh(),
        Cut(ratio=0.1, round_to=4),
    ]


def test_a_word_is_what_the_option_takes() -> None:
    (cut,) = parse("cut{unit=none round_to=none label=12 scale=12}")
    assert (cut.unit, cut.round_to, cut.label, cut.scale) == ("none", None, "12", 12)
    (cut,) = parse("cut{scale=inf}")
    assert cut.scale == math.inf


GRAMMAR = "\n  to go on: a pipeline reads `name{key=value key=value},name`"
CUT = "\n  to go on: `irprune passes cut` documents its options"

ERRORS = {
    "": "[option] at pipeline text, column 1: expected the name of a pass, found the end of the text" + GRAMMAR,
    "paint,": "[option] at pipeline text, column 7: expected the name of a pass, found the end of the text" + GRAMMAR,
    "paint weigh": "[option] at pipeline text, column 7: expected ',' and the next pass, found 'weigh'" + GRAMMAR,
    "cut{ratio}": "[option] at pipeline text, column 10: expected '=' after option 'ratio', found '}'" + GRAMMAR,
    "cut{ratio=0.5": "[option] at pipeline text, column 14: expected an option or '}', found the end of the text" + GRAMMAR,
    "cut{sizes=[1 2]}": "[option] at pipeline text, column 14: expected ',' or ']', found '2'" + GRAMMAR,
    'cut{label="x}': "[option] at pipeline text, column 11: this quoted string does not end" + GRAMMAR,
    'cut{label="\\x"}': '[option] at pipeline text, column 11: "\\x" holds an unknown escape' + GRAMMAR,
    "cut{label=a\\b}": "[option] at pipeline text, column 12: a backslash needs quotes around it" + GRAMMAR,
    "cut{ratio=0.1 ratio=0.2}": "[option] at pipeline text, column 15: option 'ratio' of pass 'cut' is given twice" + GRAMMAR,
    "paint,\n  wiegh": "[option] at pipeline text, line 2, column 3: there is no pass 'wiegh'; "
    "did you mean 'weigh'? known: broken, cut, must, paint, weigh\n  to go on: `irprune passes` documents them",
    "cut{raito=0.2}": "[option] at pipeline text, column 5: pass 'cut' has no option 'raito'; did you mean 'ratio'? "
    "known: ratio, unit, round_to, sizes, label, force, scale, nested" + CUT,
    "weigh{x=1}": "[option] at pipeline text, column 7: pass 'weigh' has no option 'x'; it has no options"
    "\n  to go on: `irprune passes weigh` documents its options",
    "must": "[option] at pipeline text, column 1: pass 'must' needs a value for option 'level': a whole number"
    "\n  to go on: `irprune passes must` documents its options",
    "cut{ratio=1.5}": "[option] at pipeline text, column 5: pass 'cut', option 'ratio': 1.5 is not allowed; "
    "it takes a number, at least 0 and less than 1" + CUT,
    "cut{unit=parms}": "[option] at pipeline text, column 5: pass 'cut', option 'unit': 'parms' is not allowed; "
    "it takes one of params, none" + CUT,
    "cut{round_to=0}": "[option] at pipeline text, column 5: pass 'cut', option 'round_to': 0 is not allowed; "
    "it takes a whole number or none, at least 1" + CUT,
    "cut{sizes=[4, x]}": "[option] at pipeline text, column 5: pass 'cut', option 'sizes': 'x' is not allowed; "
    "it takes a list, each item a whole number, at least 1" + CUT,
    "cut{force=maybe}": "[option] at pipeline text, column 5: pass 'cut', option 'force': 'maybe' is not allowed; it takes true or false"
    + CUT,
    "cut{label=secret}": "[option] at pipeline text, column 5: pass 'cut', option 'label': 'secret' is not allowed; this name is taken"
    + CUT,
    "broken": "[option] at pipeline text, column 1: "
    "pass 'broken' (toy_passes:Missing) cannot be loaded: module 'toy_passes' has no attribute 'Missing'"
    "\n  to go on: repair or uninstall the package that registers it",
}


@pytest.mark.parametrize("text", ERRORS)
def test_an_error_says_what_and_where(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(text)
    assert str(caught.value) == ERRORS[text]


@given(st.text(alphabet='cut paint{}[]=,"\\1.\n', max_size=30))
def test_any_text_is_a_pipeline_or_an_option_error(text: str) -> None:
    with suppress(OptionError):
        passes = parse(text)
        assert parse(unparse(passes)) == passes


def toml(folder: Path, text: str) -> Path:
    path = folder / "pipeline.toml"
    path.write_text(text)
    return path


def test_toml_says_the_same(tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        """
        [[passes]]
        name = "paint"
        skip = ["output"]
        [[passes]]
        name = "cut"
        ratio = 0.25
        unit = "none"
        """,
    )
    assert parse_toml(path) == parse("paint{skip=[output]},cut{ratio=0.25 unit=none}")


TABLE = '\n  to go on: write one table [[passes]] per pass, with name = "..." and its options'
TOML_ERRORS = {
    "passes": ": the pipeline file is not TOML: Expected '=' after a key in a key/value pair (at end of document)",
    "": ": the pipeline file lists no passes" + TABLE,
    "seed = 1": ": 'seed' is not known here; known: passes" + TABLE,
    "[[passes]]\nratio = 1": ", pass 1: the pass has no name" + TABLE,
    '[[passes]]\nname = "cut"\nratio = 1': ", pass 1: pass 'cut', option 'ratio': 1 is not allowed; "
    "it takes a number, at least 0 and less than 1" + CUT,
}


@pytest.mark.parametrize("text", TOML_ERRORS)
def test_a_toml_error_says_what_and_where(tmp_path: Path, text: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(OptionError) as caught:
        parse_toml(path)
    assert str(caught.value) == f"[option] at {path}{TOML_ERRORS[text]}"


def test_a_missing_toml_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the pipeline file cannot be read: No such file or directory"):
        parse_toml(tmp_path / "none.toml")
