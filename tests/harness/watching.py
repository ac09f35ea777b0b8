"""A file in a real browser, with what it complained of and asked for."""

from pathlib import Path


class Watched:
    """A file in a tab that may have shown others before: a new tab takes as long as three pages."""

    def __init__(self, tab, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page, self.address = tab, path.as_uri()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        kinds = ("error", "warning")
        self._listeners = {
            "console": lambda m: self.complaints.append(m.text) if m.type in kinds else None,
            "pageerror": lambda error: self.complaints.append(str(error)),
            "request": lambda request: self.requests.append(request.url),
        }
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        tab.mouse.move(0, 0)
        for event, listener in self._listeners.items():
            tab.on(event, listener)
        tab.goto(self.address)

    def close(self) -> None:
        """Fails where the page complained, or asked for anything but itself."""
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith("data:")] == [self.address]
