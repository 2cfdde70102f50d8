"""Errors that are meant for a person: one sentence on what is wrong, one on what to do."""

from __future__ import annotations

from collections.abc import Callable


class DeepHairError(Exception):
    """A failure with a cause that the user can mend.

    ``message`` says what is wrong with the value that came and the value wanted; ``hint`` says what to do next; ``code`` is a short
    stable name for programs (it becomes the problem type over HTTP and the reason code in reports).
    """

    code = "failed"

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


class UsageError(DeepHairError):
    """The command or its settings are wrong; nothing was started (exit code 2)."""

    code = "usage"


class MissingInputError(DeepHairError):
    """A dataset, weight file or earlier stage's output is not where it is expected."""

    code = "missing_input"


def require_all(*checks: Callable[[], None]) -> None:
    """Runs every check and raises one MissingInputError that names all that is missing, not only the first thing."""
    found: list[MissingInputError] = []
    for check in checks:
        try:
            check()
        except MissingInputError as error:
            found.append(error)
    if found:
        hint = "; ".join(dict.fromkeys(error.hint for error in found if error.hint))
        raise MissingInputError("\n".join(error.message for error in found), hint=hint)


class InvalidArtifactError(DeepHairError):
    """A file exists and is not what it claims to be: truncated, wrong format, wrong hash, non-finite."""

    code = "invalid_artifact"
