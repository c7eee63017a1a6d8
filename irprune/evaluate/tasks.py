"""Zero-shot accuracy with lm-eval, on task files that lie on this machine.

lm-eval does what it is known for: it builds the requests, picks the likeliest choice and aggregates.
What is ours is the adapter to a :class:`~irprune.evaluate.predictor.Predictor`, and one task
configuration for each *form* of file; no task is known by name.
"""

from __future__ import annotations

import bz2
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from irprune.errors import DataError, OptionError
from irprune.evaluate.predictor import Predictor
from irprune.pipeline.progress import track
from irprune.quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

Document = dict[str, Any]
SUFFIXES = (".jsonl", ".txt", ".txt.bz2")
LONGEST = 2048
BATCH_TOKENS = 1024
_FILL = 7 / 8  # a row that would be shorter than this part of its batch's longest begins a new batch
_HELLASWAG_LINES = 6


@dataclass(frozen=True)
class Accuracy:
    """What was measured on a task.

    Attributes:
        acc: Share of documents whose likeliest choice is the right one.
        acc_norm: The same with log-likelihoods divided by the choices' length in characters;
            ``None`` where all choices of a document are continued by the same text.
        stderr: Standard error of ``acc``; ``None`` for a single document.
        documents: Number of documents.
        chance: What choosing blindly comes to.
    """

    acc: float
    acc_norm: float | None
    stderr: float | None
    documents: int
    chance: float


def accuracy(
    predict: Predictor,
    tokenizer: Any,
    tasks: Mapping[str, Sequence[Document]],
    *,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Accuracy]:
    """Zero-shot accuracy of a model on task files.

    Args:
        predict: The model.
        tokenizer: Its ``transformers`` tokenizer.
        tasks: Name to documents, as :func:`documents` reads them.
        limit: Most documents of each task, from the beginning; ``None`` takes all.
        batch_tokens: About how many tokens one call gets.

    Raises:
        OptionError: lm-eval is not installed.
    """
    harness = lm_eval()
    with _quiet(harness):
        made = {name: _task(harness, name, found) for name, found in tasks.items()}
        adapter = _adapter(harness)(predict, tokenizer, batch_tokens)
        results = harness.evaluator.evaluate(adapter, made, limit=limit, bootstrap_iters=1, log_samples=False)["results"]
    out = {}
    for name, found in tasks.items():
        said = {key.partition(",")[0]: value for key, value in results[name].items()}
        count = len(found) if limit is None else min(limit, len(found))
        error = said["acc_stderr"] if count > 1 else None
        out[name] = Accuracy(float(said["acc"]), said.get("acc_norm"), error, count, chance(found[:count]))
    return out


def chance(found: Sequence[Document]) -> float:
    """The accuracy of choosing blindly: the mean over the documents of one divided by the number of choices."""
    return sum(1 / len(one["choices" if "query" in one else "context_options"]) for one in found) / len(found)


def averages(of: Mapping[str, Accuracy]) -> dict[str, float]:
    """The plain means over the tasks: of ``acc``, of ``acc_norm`` (of ``acc`` where a task has none) and of ``chance``."""
    columns = {
        "acc": [one.acc for one in of.values()],
        "acc_norm": [one.acc if one.acc_norm is None else one.acc_norm for one in of.values()],
        "chance": [one.chance for one in of.values()],
    }
    return {name: sum(values) / len(of) for name, values in columns.items()} if of else {}


def likelihoods(
    predict: Callable[[torch.Tensor], torch.Tensor],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    longest: int = LONGEST,
    batch_tokens: int = BATCH_TOKENS,
) -> list[tuple[float, bool]]:
    """How likely continuations are, after their contexts.

    Args:
        predict: Token indices ``(rows, tokens)`` to logits ``(rows, tokens, vocabulary)``.
        pairs: Tokens of a context, one or more, and of its continuation.
        longest: Most tokens that the model reads; a context loses its beginning for that.
        batch_tokens: About how many tokens one call gets.

    Returns:
        For each pair the log-likelihood in nats, and whether each token of the continuation is the
        model's first choice.
    """
    rows = [[*context, *continuation][-(longest + 1) :] for context, continuation in pairs]
    # Pairs that differ in their last token alone read the same row: it is asked once.
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, whole in enumerate(rows):
        asked.setdefault(tuple(whole[:-1]), []).append(number)
    answers: dict[int, tuple[float, bool]] = {}
    for batch in track(_batches(list(asked), batch_tokens), "zero-shot"):
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
        for place, row in enumerate(batch):
            ids[place, : len(row)] = torch.tensor(row)
        logits = predict(ids)
        for place, row in enumerate(batch):
            for number in asked[row]:
                count = min(len(pairs[number][1]), len(row))
                scores = logits[place, len(row) - count : len(row)].float().log_softmax(-1).cpu()
                wanted = torch.tensor(rows[number][-count:])
                likelihood = scores.gather(-1, wanted[:, None]).double().sum()
                answers[number] = (float(likelihood), bool((scores.argmax(-1) == wanted).all()))
    return [answers[number] for number in range(len(rows))]


def _batches(rows: Sequence[tuple[int, ...]], most: int) -> list[list[tuple[int, ...]]]:
    """Rows of similar length together; longest first, so that what runs out of memory does so at once."""
    batches: list[list[tuple[int, ...]]] = []
    for row in sorted(rows, key=len, reverse=True):
        longest = len(batches[-1][0]) if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= most and len(row) >= _FILL * longest:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


# -- files ----------------------------------------------------------------------------------------


def named(given: Sequence[str], folder: Path | None) -> dict[str, Path]:
    """Tasks by name, from ``NAME=FILE`` and from a directory.

    Args:
        given: ``NAME=FILE``, or names of files in ``folder`` without their ending.
        folder: A directory of task files; with no ``given`` all of them are taken.

    Raises:
        OptionError: A name has no file.
        DataError: There is no such directory.
    """
    there: dict[str, Path] = {}
    if folder is not None:
        if not folder.is_dir():
            raise DataError("there is no such directory of tasks", where=str(folder), hint="check --tasks-dir")
        there = {_stem(path): path for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES)}
        if not given and not there:
            raise DataError("the directory holds no task", where=str(folder), hint=f"task files end in {', '.join(SUFFIXES)}")
    out: dict[str, Path] = {} if given else there
    for entry in given:
        name, sign, path = entry.partition("=")
        if not sign and name not in there:
            known = f"{folder} has {', '.join(there)}" if folder is not None else "or name a directory with --tasks-dir"
            raise OptionError(f"the task '{name}' has no file", where="--tasks", hint=f"give NAME=FILE; {known}")
        out[name] = Path(path) if sign else there[name]
    return out


def documents(path: Path) -> list[Document]:
    """The documents of a task file.

    Each line of a ``.jsonl`` file is one of::

        {"query": "…", "choices": ["…", "…"], "gold": 0}                    which choice follows the query
        {"context_options": ["…", "…"], "continuation": "…", "gold": 0}     which context the text follows

    A ``.txt`` file (or ``.txt.bz2``) has six lines for each document: a context, the index of the right
    one, and four endings.

    Raises:
        DataError: The file is not there, or a line has another form.
    """
    try:
        content = bz2.decompress(path.read_bytes()).decode() if path.suffix == ".bz2" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"the task cannot be read: {error.strerror or error}", where=str(path), hint="check the path") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(f"the task cannot be read: {error}", where=str(path), hint="give a text in UTF-8") from error
    found = list(_json(content, path) if path.suffix == ".jsonl" else _sixes(content, path))
    if not found:
        raise DataError("the task has no documents", where=str(path), hint="give a file with one document or more")
    if len({"query" in one for one in found}) != 1:
        raise DataError("the documents have more than one form", where=str(path), hint="give each form a file of its own")
    return found


def _json(content: str, path: Path) -> Iterable[Document]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            read = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"the line is not JSON: {error.msg}", where=f"{path}:{number}", hint="write one object a line") from error
        text, options = ("query", "choices") if isinstance(read, dict) and "query" in read else ("continuation", "context_options")
        fine = isinstance(read, dict) and isinstance(read.get(text), str) and _texts(read.get(options))
        if not fine or not isinstance(read.get("gold"), int) or not 0 <= read["gold"] < len(read[options]):
            hint = "write query, choices and gold, or context_options, continuation and gold"
            raise DataError("the line is no document of a known form", where=f"{path}:{number}", hint=hint)
        yield {text: read[text], options: read[options], "gold": read["gold"]}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) and one for one in value)


def _sixes(content: str, path: Path) -> Iterable[Document]:
    lines = content.splitlines()
    for start in range(0, len(lines), _HELLASWAG_LINES):
        query, *rest = lines[start : start + _HELLASWAG_LINES]
        if len(rest) < _HELLASWAG_LINES - 1 or rest[0] not in ("0", "1", "2", "3"):
            hint = "write a context, the index of the right ending and four endings, a line each"
            raise DataError("the six lines are no document", where=f"{path}:{start + 1}", hint=hint)
        yield {"query": query, "choices": rest[1:], "gold": int(rest[0])}


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


# -- lm-eval --------------------------------------------------------------------------------------


def lm_eval() -> Any:
    """The package, imported. Raises OptionError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.evaluator
    except ImportError as error:
        raise OptionError(
            f"zero-shot tasks need lm-eval, which is not installed ({error})", hint="install it with `pip install 'irprune[eval]'`"
        ) from error
    return lm_eval


def prompt(query: str) -> str:
    """What a model continues: the query, and ``Answer:`` below a question, as lm-eval's own tasks ask."""
    query = query.strip()
    asks = re.search(r"^Question:", query, flags=re.MULTILINE) is not None and not query.endswith("Answer:")
    return f"{query}\nAnswer:" if asks else query


def _task(harness: Any, name: str, found: Sequence[Document]) -> Any:
    """An lm-eval task over documents of one form."""
    import datasets

    metrics = ["acc", "acc_norm"] if "query" in found[0] else ["acc"]
    # With the index as its text, a task of lm-eval scores one text after each of several contexts.
    forms: dict[str, Callable[[Document], Any]] = {
        "doc_to_text": lambda one: prompt(one["query"]) if "query" in one else one["gold"],
        "doc_to_target": lambda one: one["gold"] if "query" in one else one["continuation"],
        "doc_to_choice": lambda one: one["choices"] if "query" in one else one["context_options"],
    }
    return harness.api.task.ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda: {"test": datasets.Dataset.from_list(list(found))},
            "test_split": "test",
            "output_type": "multiple_choice",
            "num_fewshot": 0,
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
            **forms,
        }
    )


@contextmanager
def _quiet(harness: Any) -> Iterator[None]:
    """Without lm-eval's log and bars; ours are shown."""
    bars = harness.api.task.tqdm
    harness.api.task.tqdm = lambda items, **_: items
    try:
        with quiet():
            yield
    finally:
        harness.api.task.tqdm = bars


def _adapter(harness: Any) -> Any:
    """The class of lm-eval models that ask a predictor. It is made here because its base may not be installed."""

    class Adapter(harness.api.model.TemplateLM):
        """A predictor as a model of lm-eval."""

        def __init__(self, predict: Predictor, tokenizer: Any, batch_tokens: int) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self._predict = predict
            self._batch_tokens = batch_tokens
            limits = (predict.most_tokens, predict.tokens.shape[1], tokenizer.model_max_length, LONGEST)
            self._longest = min(limit for limit in limits if limit is not None)

        @property
        def eot_token_id(self) -> int:
            tokens = (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id)
            return next((token for token in tokens if token is not None), 0)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            found: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"]
            return found

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            rows = [[*context, *continuation][-(self._longest + 1) : -1] for context, continuation in pairs]
            longest = self._predict.reach(torch.tensor(max(rows, key=len)))
            return likelihoods(self._predict, pairs, longest=longest, batch_tokens=self._batch_tokens)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            raise NotImplementedError("texts are measured by irprune.evaluate.perplexity")

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            raise NotImplementedError("the tasks choose between given texts")

    return Adapter
