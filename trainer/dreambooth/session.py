"""A run of subjects while it trains: what its functions share, whichever way the subjects are trained."""

from dataclasses import dataclass
from pathlib import Path

from controlbooth.models.attention import AttentionChoice
from controlbooth.models.base import Base
from controlbooth.trainer.config.subjects import SubjectRunConfig
from controlbooth.trainer.dreambooth.status import write_status
from controlbooth.trainer.dreambooth.tracking import Untracked
from controlbooth.trainer.dreambooth.validation import Studio
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.run.attempt import Attempt
from controlbooth.trainer.run.process import StopRequest


@dataclass(frozen=True)
class SubjectRun:
    """One start of a run of subjects, on one rank."""

    config: SubjectRunConfig
    base: Base
    """The frozen one, with its attention kernels."""
    attention: AttentionChoice
    precision: str
    folder: Path
    """Of the run; that of the attempt is the same, or the part of it that belongs to a task of an array."""
    attempt: Attempt
    world: World
    stop: StopRequest
    studio: Studio

    @property
    def tracking(self) -> Untracked:
        return self.studio.tracking

    def write_status(self, name: str, **fields: object) -> None:
        """Writes status.json of a subject. Raises Superseded where a newer start trains it."""
        write_status(self.attempt, self.folder, name, **fields)
