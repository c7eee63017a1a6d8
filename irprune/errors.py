"""Every error that a user can see.

An error has a stable code with a page in ``docs/errors.md``, the place, what was found and what
was wanted, and the way on. Its text is one short paragraph; the command line prints it without a
traceback and exits with :attr:`IrpruneError.exit_code`.
"""

from __future__ import annotations

from typing import ClassVar


def wording(error: BaseException) -> str:
    """The first line of what a library's error says; its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class IrpruneError(Exception):
    """Base of all errors for users.

    Args:
        message: What was found and what was wanted, one sentence.
        where: The place: a file and line, a pass, a node of the program.
        hint: The way on, one sentence in the imperative.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        way_on = f"\n  to go on: {self.hint}" if self.hint else ""
        return f"[{self.code}]{place}: {self.message}{way_on}"


class TargetError(IrpruneError):
    """The model file or checkpoint cannot be used as given."""

    code = "target"


class OptionError(IrpruneError):
    """A pass, an option or a pipeline text is not understood or out of range."""

    code = "option"


class PipelineError(IrpruneError):
    """The passes of a pipeline do not fit together."""

    code = "pipeline"


class DataError(IrpruneError):
    """Calibration data, weights or gradients cannot be used (empty, wrong form, not finite)."""

    code = "data"


class RecipeError(IrpruneError):
    """A recipe does not fit the program that it is applied to."""

    code = "recipe"


class ResumeError(IrpruneError):
    """An interrupted run cannot go on as asked."""

    code = "resume"


class TraceError(IrpruneError):
    """The model cannot be traced by ``torch.export``."""

    code = "trace"
    exit_code = 3


class NothingPrunableError(IrpruneError):
    """No group may be pruned under the given constraints."""

    code = "nothing-prunable"
    exit_code = 3


class BudgetError(IrpruneError):
    """The asked ratio cannot be met under the given constraints."""

    code = "budget"
    exit_code = 3


class ExportError(IrpruneError):
    """The program cannot be written in the asked format."""

    code = "export"
    exit_code = 3


class ProofError(IrpruneError):
    """Translation validation found that the pruned program is not what the plan promises."""

    code = "proof"
    exit_code = 4


class ParityError(IrpruneError):
    """The exported file does not compute what the program computes."""

    code = "parity"
    exit_code = 4


class SpeedError(IrpruneError):
    """The file is not as fast as was required."""

    code = "speed"
    exit_code = 4


class OutputError(IrpruneError):
    """A file cannot be written."""

    code = "output"
    exit_code = 5
