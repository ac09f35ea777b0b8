"""Memory of a server whose clients read nothing: `python benchmarks/serving.py readers --clients 1 3`.

Each client asks for a stream of 16 choices of 5,000 tokens with 20 log-probabilities each, and takes nothing of it. The
resident memory of the server's process before (after one whole answer to such a request), at its most while they are
there, and after they have left; and how many texts' worth of tokens were written meanwhile.
"""

import argparse
import socket
import tempfile
import time
from pathlib import Path

from serving_client import MIB, gauge, post, request_bytes, resident, served
from serving_harness import option_parser

ASKED = {"prompt": "x", "max_tokens": 5000, "n": 16, "logprobs": 20, "stream": True, "ignore_eos": True}
WRITTEN = "atma_tokens_written_total"


def main(arguments: list[str]) -> int:
    parser = option_parser(__doc__, "readers")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--budget", default="64MiB")
    options = parser.parse_args(arguments)
    print("clients | budget | before, MiB | at most, MiB | after, MiB | tokens written")
    for clients in options.clients:
        _measure(clients, options)
    return 0


def _measure(clients: int, options: argparse.Namespace) -> None:
    budgets = ("--memory-budget", options.budget, "--cache-budget", "8MiB", "--max-waiting", "64")
    settings = ("--threads", str(options.threads), *budgets)
    with tempfile.TemporaryDirectory() as folder, served(options.model, Path(folder, "log"), *settings) as server:
        post(server.port, "/v1/completions", ASKED | {"max_tokens": 50, "stream": False})
        before, written = resident(server.process), gauge(server.port, WRITTEN)
        wires, most, until = [_stuck(server.port) for _ in range(clients)], before, time.monotonic() + options.seconds
        while time.monotonic() < until:
            time.sleep(0.5)
            most = max(most, resident(server.process))
        written = gauge(server.port, WRITTEN) - written
        for wire in wires:
            wire.close()
        time.sleep(3)
        sizes = " | ".join(f"{size / MIB:.0f}" for size in (before, most, resident(server.process)))
        print(f"{clients} | {options.budget} | {sizes} | {written:,.0f}", flush=True)


def _stuck(port: int) -> socket.socket:
    """A client that asks and never reads."""
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.connect(("127.0.0.1", port))
    wire.sendall(request_bytes(ASKED))
    return wire
