"""The twenty tasks by name."""

from atma.eval.reasoning import carrying, kinds, spaces, whereabouts
from atma.eval.reasoning.worlds import Task

TASKS = {
    task.name: task
    for task in sorted((*carrying.TASKS, *whereabouts.TASKS, *spaces.TASKS, *kinds.TASKS), key=lambda task: task.number)
}


def chosen(names: tuple[str, ...]) -> tuple[Task, ...]:
    """The tasks of these names. ValueError: none, an unknown one, or one twice."""
    for name in names:
        if name not in TASKS:
            raise ValueError(f"no reasoning task '{name}'; known: {', '.join(TASKS)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must be distinct, and at least one, not {list(names)}")
    return tuple(TASKS[name] for name in names)
