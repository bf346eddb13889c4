"""Serve the page at /, /docs with a copy of Swagger UI, and their files; nothing is loaded from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from reward_server.http.response_headers import CONTENT_SECURITY_POLICY

_PAGE_FOLDER = Path(__file__).parents[1] / "page"
# The distribution fastapi-offline is used for the files of Swagger UI that it carries, not for its code.
_SWAGGER_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
_DOCS_HEADERS = {"content-security-policy": f"{CONTENT_SECURITY_POLICY}; style-src 'self' 'unsafe-inline'"}


def add_pages(app: FastAPI) -> None:
    """Add a route for each file, so that no path from a request is ever looked up on disk."""
    swagger_folder = Path(str(files("fastapi_offline") / "static"))
    _add_file(app, "/", _PAGE_FOLDER / "index.html")
    _add_file(app, "/docs", _PAGE_FOLDER / "docs.html", _DOCS_HEADERS)
    for file in sorted(_PAGE_FOLDER.iterdir()):
        if file.suffix != ".html":
            _add_file(app, f"/{file.name}", file)
    for name in _SWAGGER_FILES:
        _add_file(app, f"/{name}", swagger_folder / name)


def _add_file(app: FastAPI, path: str, file: Path, headers: dict[str, str] | None = None) -> None:
    async def send_file() -> FileResponse:
        return FileResponse(file, headers=headers)

    app.add_api_route(path, send_file, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
