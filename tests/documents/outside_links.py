"""Whether the links to elsewhere still work: `make links`. It asks other people's servers, so it is no test."""

import sys
import urllib.error
import urllib.request

from tests.documents.links import EVERY, Link, links

SECONDS = 20
OWN = ("http://127.0.0.1", "http://localhost")


def outside() -> dict[str, list[Link]]:
    """Every address that a page links to, and from where."""
    found: dict[str, list[Link]] = {}
    for link in (link for page in EVERY for link in links(page)):
        if link.target.startswith(("http://", "https://")) and not link.target.startswith(OWN):
            found.setdefault(link.target.partition("#")[0], []).append(link)
    return found


def problem(address: str) -> str:
    """What is wrong with an address; "" if it answers."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (atma, make links)"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return f"status {error.code}"
    except OSError as error:
        return str(error)


def main() -> int:
    found, bad = outside(), 0
    for address, places in found.items():
        if wrong := problem(address):
            bad += 1
            print(f"{address}: {wrong}\n  " + "\n  ".join(map(str, places)), file=sys.stderr)
    print(f"{len(found)} addresses, {bad} of them do not answer")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
