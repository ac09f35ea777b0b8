"""The leaderboard: any set of mixers, each trained alike, on one table of recall, length, size and speed.

`entrants` are the models, `plan` what each of them is asked, `lessons` the recall tasks, `speed` the stop-watch, and
`board` and `pictures` what it all comes to. Training, claiming and resuming are those of a sweep.
"""
