"""Learning problems: model, data and objective in one."""

from fedpref.tasks.preference import PreferenceTask
from fedpref.tasks.task import Shard, Task

AnyTask = PreferenceTask

__all__ = ["AnyTask", "PreferenceTask", "Shard", "Task"]
