"""The application: all routes, and errors told as the client understands them."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from . import downloads, repositories, uploads
from .access import Hub
from .errors import HubError


def make_app(hub: Hub) -> FastAPI:
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.hub = hub
    for part in (repositories, uploads, downloads):
        app.include_router(part.router)

    @app.exception_handler(HubError)
    def refused(_request: Request, error: HubError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return refused(request, HubError(400, f"{where}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return refused(request, HubError(error.status_code, str(error.detail)))

    return app
