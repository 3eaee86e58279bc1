"""The few errors that cross a floor. Each carries its numbers; `proto/status.py` maps them to gRPC codes."""

from __future__ import annotations


class DuopoolError(Exception):
    """Base of every error that Duopool raises on purpose."""


class InvalidRequest(DuopoolError):
    """A request field is outside its limits. Names the field and the limit."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class PromptTooLong(InvalidRequest):
    """The prompt (and the tokens asked for) can never fit the model or the pool."""


class Unauthenticated(DuopoolError):
    """The call shows no credential or API key, or one that is not known here."""


class ModelNotFound(DuopoolError):
    """The model named by a request or a flag is not served or cannot be found."""


class WorkerNotFound(DuopoolError):
    """An admin call names a worker or a role that does not exist."""


class UnsupportedModel(DuopoolError):
    """The model's attention bypasses ours or disagrees with eager attention."""


class OutOfBlocks(DuopoolError):
    """The pool cannot give the blocks that were asked for; nothing was taken."""

    def __init__(self, *, needed: int, free: int) -> None:
        super().__init__(f"needed {needed} blocks, {free} are free")
        self.needed = needed
        self.free = free


class Overloaded(DuopoolError):
    """A bounded queue is full; the caller may try again after `retry_after_s`."""

    def __init__(self, what: str, *, retry_after_s: float) -> None:
        super().__init__(f"{what}; retry after {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class WorkerLost(DuopoolError):
    """No worker could finish the request within its retry budget."""


class SuspectedPoison(DuopoolError):
    """Workers died one after the other while they worked on the request; it is not tried again, nor should it be."""


class DeadlineMissed(DuopoolError):
    """The request's deadline passed before it finished."""


class SlowReader(DuopoolError):
    """The client left more tokens unread than the buffer holds."""


class TransferFailed(DuopoolError):
    """Blocks could not be read from their source, or their digests did not match."""


class Unavailable(DuopoolError):
    """The part of the system that this call needs is not there yet, or not any more."""
