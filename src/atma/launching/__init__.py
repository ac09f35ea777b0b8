"""Command lines of `atma` run elsewhere: as jobs of Slurm (through submitit) or of Ray, each of one or more processes.

A process of a job is a child of what the cluster starts, so that it is the same `atma` as in a terminal, and ends with
it. Where a job has several processes, each is told which it is, and where the first can be found, in the words of
torchrun. All processes must see the folders at the same paths.
"""

from atma.launching.request import Jobs, Kind, Request, Work, read, start

__all__ = ["Jobs", "Kind", "Request", "Work", "read", "start"]
