"""`atma eval`: the table of its suites."""

VERBS = {
    "lengths": ("eval_lengths", "loss and needle recall at many context lengths, on prepared data"),
    "likelihood": ("eval_likelihood", "bits per byte of the same texts by length, and whether they fall"),
    "tasks": ("eval_tasks", "tasks of lm-eval: accuracy and perplexity"),
    "retrieval": ("eval_retrieval", "passkeys, needles and the task types of RULER, by length and depth"),
    "reasoning": ("eval_reasoning", "questions about facts, alone and spread over long texts: bAbI, BABILong"),
    "recall": ("eval_recall", "train small models of any mixer to recall and copy; test them at longer contexts"),
    "diff": ("eval_diff", "compare two results files, and say what explains each change"),
}
