"""Errors of requests, in the forms that clients expect."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from jaxmodels.errors import UserError, printable

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Broken(Exception):
    """What runs a model has failed, and answers no more."""


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    @staticmethod
    def of(error: UserError) -> Refused:
        """The refusal for a mistake; its message names fields, and no options of the command line."""
        return Refused(400, str(error).partition(", try --")[0])


def body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def response(path: str, refused: Refused) -> Response:
    """The answer to a request that was refused, in the form of the protocol that its path belongs to."""
    message = printable(" ".join(refused.message.split()))
    told: Any = {"error": message} if path.startswith("/v2") else body(refused.status, message, refused.code)
    return JSONResponse(told, refused.status, headers=refused.headers)
