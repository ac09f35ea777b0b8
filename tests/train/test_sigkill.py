import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "sigkill.py"


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_same_bits():
    command = [sys.executable, str(BENCHMARK), "--kills", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 kills: weights, optimiser state and every logged number are bit-identical" in ended.stdout
