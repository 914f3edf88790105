"""Learning problems: model, data and objective in one."""

from fedpref.tasks.feedback import FeedbackTask
from fedpref.tasks.preference import PreferenceTask
from fedpref.tasks.task import BatchSize, Shard, Task

AnyTask = PreferenceTask | FeedbackTask

__all__ = ["AnyTask", "BatchSize", "FeedbackTask", "PreferenceTask", "Shard", "Task"]
