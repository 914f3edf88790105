"""Learning problems, which do not know that they are federated."""

from typing import Annotated

from pydantic import Field

from fedpref.tasks.batches import BatchSize
from fedpref.tasks.dialogue import DialogueTask
from fedpref.tasks.feedback import FeedbackTask
from fedpref.tasks.online import OnlinePreferenceTask
from fedpref.tasks.opinion import OpinionTask
from fedpref.tasks.preference import PreferenceTask
from fedpref.tasks.task import Shard, Task

AnyTask = Annotated[
    PreferenceTask | OnlinePreferenceTask | FeedbackTask | OpinionTask | DialogueTask,
    Field(discriminator="name"),
]

__all__ = [
    "AnyTask",
    "BatchSize",
    "DialogueTask",
    "FeedbackTask",
    "OnlinePreferenceTask",
    "OpinionTask",
    "PreferenceTask",
    "Shard",
    "Task",
]
