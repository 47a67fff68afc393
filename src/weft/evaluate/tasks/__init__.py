"""Tasks: small YAML files that say what is asked, how, and what counts."""

from weft.evaluate.tasks.exercises import Exercise
from weft.evaluate.tasks.find import Named, find_tasks, task_names
from weft.evaluate.tasks.settings import TaskSettings
from weft.evaluate.tasks.task import Frame, Task

__all__ = ["Exercise", "Frame", "Named", "Task", "TaskSettings", "find_tasks", "task_names"]
