"""Memory of a server whose clients read nothing: `python benchmarks/serving.py readers --clients 1 3`.

Each client asks for a stream of 16 choices of 5,000 tokens with 20 log-probabilities each, and takes nothing of it. The
resident memory of the server's process before (after one whole answer to such a request), at its most while they are
there, and after they have left; and how many texts' worth of tokens were written meanwhile.
"""

import argparse
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

MIB = 1 << 20
ASKED = {"prompt": "x", "max_tokens": 5000, "n": 16, "logprobs": 20, "stream": True, "ignore_eos": True}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="serving.py readers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--budget", default="64MiB")
    options = parser.parse_args(arguments)
    print("clients | budget | before, MiB | at most, MiB | after, MiB | tokens written")
    for clients in options.clients:
        _measure(clients, options)
    return 0


def _measure(clients: int, options: argparse.Namespace) -> None:
    sizes = ["--memory-budget", options.budget, "--cache-budget", "8MiB", "--max-waiting", "64"]
    command = [sys.executable, "-m", "atma", "serve", options.model, "--port", "0", "--threads", "1", *sizes]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r":(\d+) ", process.stdout.readline())
        if found is None:
            raise RuntimeError("the server does not start")
        port = int(found[1])
        body = json.dumps(ASKED | {"max_tokens": 50, "stream": False}).encode()
        address = f"http://127.0.0.1:{port}"
        asked = urllib.request.Request(f"{address}/v1/completions", body, {"content-type": "application/json"})
        urllib.request.urlopen(asked, timeout=120).read()
        before, written = _resident(process.pid), _written(address)
        wires, most, until = [_stuck(port) for _ in range(clients)], before, time.monotonic() + options.seconds
        while time.monotonic() < until:
            time.sleep(0.5)
            most = max(most, _resident(process.pid))
        written = _written(address) - written
        for wire in wires:
            wire.close()
        time.sleep(3)
        after = _resident(process.pid)
        print(f"{clients} | {options.budget} | {before:.0f} | {most:.0f} | {after:.0f} | {written:,.0f}", flush=True)
    finally:
        process.terminate()
        process.wait()


def _stuck(port: int) -> socket.socket:
    body = json.dumps(ASKED).encode()
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.connect(("127.0.0.1", port))
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    wire.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return wire


def _resident(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / MIB


def _written(address: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        found = re.search(r"^atma_tokens_written_total (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])
