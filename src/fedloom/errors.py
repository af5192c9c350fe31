"""What can go wrong, as exceptions the command line prints without a traceback. Imports nothing of fedloom."""

import difflib
from collections.abc import Iterable

__all__ = [
    "FedloomError",
    "RefusedByPolicy",
    "RunError",
    "TimeoutOrTooFewClients",
    "UserError",
    "suggest",
]


class FedloomError(Exception):
    """Base of every error fedloom raises on purpose.

    `message` says what is wrong, `hint` names the way out (a command or a setting, may be empty), `code` is a
    stable dotted name that scripts may match on, `exit_code` is what the process ends with.
    """

    exit_code: int = 1
    code: str = "error"

    def __init__(self, message: str, hint: str = "", code: str | None = None, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (workers, test runners), so all four fields must survive pickling.
        return type(self), (self.message, self.hint, self.code, self.exit_code)


class RunError(FedloomError):
    """A run that was well asked for could not go on: a non-finite loss, a full disk, a damaged checkpoint."""

    exit_code = 1
    code = "run"


class UserError(FedloomError):
    """The input is wrong: a recipe, a file, a command line."""

    exit_code = 2
    code = "input"


class TimeoutOrTooFewClients(FedloomError):
    """A round could not gather the clients it needs, or not in time."""

    exit_code = 3
    code = "clients.too_few"


class RefusedByPolicy(FedloomError):
    """A site's or a recipe's rule forbids what was asked for."""

    exit_code = 4
    code = "policy.refused"


def suggest(name: str, names: Iterable[str], limit: int = 12) -> str:
    """Return the tail of an error about an unknown name: the nearest known one, or what there is.

    >>> suggest("fedpox", ["fedavg", "fedprox"])
    "; did you mean 'fedprox'?"
    >>> suggest("zzz", ["fedprox", "fedavg"])
    "; there are 'fedavg', 'fedprox'"
    """
    known = sorted(set(names))
    by_folded = {known_name.casefold(): known_name for known_name in known}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{by_folded[near[0]]}'?"
    if not known:
        return "; there are none"
    shown = ", ".join(f"'{known_name}'" for known_name in known[:limit])
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return f"; there {'is' if len(known) == 1 else 'are'} {shown}{more}"
