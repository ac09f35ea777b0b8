"""What submitit writes for Slurm, with a Slurm of two scripts that only take note."""

import importlib.util

import pytest

from atma.launching import Work, read, start

if importlib.util.find_spec("submitit") is None:
    pytest.skip("submitit is not installed (pip install 'atma-lm[cluster]')", allow_module_level=True)

WORK = [["train", "r.toml", "--out", "runs/r"]]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of programs with the names of Slurm's; sbatch keeps what it is given in `asked`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", ""), ("sbatch", f"cp $1 {tmp_path}/asked; echo Submitted batch job 12"), ("sacct", "")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return tmp_path / "asked"


def test_a_job_asks_slurm_for_its_nodes_processes_cores_and_a_warning(slurm, tmp_path):
    options = ("nodes=2", "gpus_per_node=8", "slurm_partition=gpu", "timeout_min=600", "slurm_signal_delay_s=300")
    jobs = start(read("slurm", (*options, "slurm_max_num_timeout=9")), Work("atma-train", WORK, tmp_path / "logs", 3))
    asked = slurm.read_text().splitlines()
    wanted = "nodes=2 ntasks-per-node=8 gpus-per-node=8 cpus-per-task=3 partition=gpu time=600 job-name=atma-train"
    assert [f"#SBATCH --{one}" for one in wanted.split() if f"#SBATCH --{one}" not in asked] == []
    assert "#SBATCH --signal=USR2@300" in asked
    assert jobs.told() == "job 12" and len(jobs.logs()) == 2 * 16


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("nodez=2", "--launch slurm: --job: Parameter 'nodez' need to be prefixed"),
        ("slurm_partitoin=a", "Unknown argument 'partitoin' for executor 'slurm'"),
        ("timeout_min=long", '"timeout_min" expected type'),
        ("cluster=moon", "any executor named moon"),
    ],
)
def test_an_option_that_there_is_not_is_told(slurm, tmp_path, option, told):
    with pytest.raises(ValueError, match=told):
        start(read("slurm", (option,)), Work("w", WORK, tmp_path / "logs"))
    assert not slurm.exists()


def test_without_slurm_this_machine_is_said_to_have_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r'--launch slurm: Could not detect "srun".* --job cluster=local'):
        start(read("slurm", ()), Work("w", WORK, tmp_path / "logs"))
