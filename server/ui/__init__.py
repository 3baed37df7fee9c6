"""The console: a page over the public API. Plain files without a build step; `server.http.routes.ui` serves them."""

from pathlib import Path

MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
FILES = {path.name: path for path in sorted(Path(__file__).parent.iterdir()) if path.suffix in MEDIA_TYPES}
PATHS = frozenset({"/", "/ui", "/ui/", *(f"/ui/{name}" for name in FILES)})
