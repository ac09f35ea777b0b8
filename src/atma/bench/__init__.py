"""Measuring: operations and whole models beside their peers and beside the floor that the machine sets.

A measurement checks first that everything computes what it should, then times ours and the peers in turn in one
process, then compares medians with the floor: the least operations over the machine's rate of matrix products, or the
least bytes over its copy rate, whichever takes longer. `bench` measures; `table`, `roofline` and `Result.as_dict` show.
"""
