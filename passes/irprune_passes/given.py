"""Options that other options make void: given all the same, they are an error."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel


def refuse_void(options: BaseModel, void: Mapping[str, str | None]) -> None:
    """Refuse options that were given and would do nothing.

    Args:
        options: A pass.
        void: Option to what makes it void, in words; ``None`` where it counts.

    Raises:
        ValueError: Naming the option and the reason (a pydantic validator's error).
    """
    for option, reason in void.items():
        value = getattr(options, option)
        if reason is not None and value is not None and option in options.model_fields_set:
            raise ValueError(f"`{option}` ({value}) does nothing with {reason}; leave one of the two out")
