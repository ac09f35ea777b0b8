"""`atma eval`: the table of its suites."""

VERBS = {
    "lengths": ("eval_lengths", "loss and needle recall at many context lengths, on prepared data"),
    "retrieval": ("eval_retrieval", "passkeys, needles and the task types of RULER, by length and depth"),
    "recall": ("eval_recall", "train small models of any mixer to recall and copy; test them at longer contexts"),
    "diff": ("eval_diff", "compare two results files, and say what explains each change"),
}
