"""Programs of others that ask servers, as they come: each is run against this one, and none has a request refused."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.serve.http.conftest import Live

MISSING = importlib.util.find_spec("guidellm") is None


@pytest.mark.slow
@pytest.mark.skipif(MISSING, reason="pip install guidellm: the load tester that is tried here")
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_fails_no_request(live: Live, tmp_path, route):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.json"
    rows = [{"prompt": f"def f{i}(x):", "output_tokens_count": 8} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "guidellm", "run", "--disable-progress", "--profile", "kind=synchronous"]
    command += ["--backend", f"kind=openai_http,target={live.url},request_format={route},model=tiny"]
    command += ["--constraint", "kind=max_requests,count=12", "--data", f"kind=json_file,path={data}"]
    command += ["--output", f"kind=json,path={out}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = json.loads(out.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert (told["successful"], told["errored"], told["incomplete"]) == (12, 0, 0)
