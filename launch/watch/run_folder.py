"""What the folder of a run, of either kind, and that of a subject have in common on their pages."""

from pathlib import Path

from controlbooth.data.arguments import quoted
from controlbooth.launch.watch import facts
from controlbooth.launch.watch.failures import Failure
from controlbooth.launch.watch.files import Files
from controlbooth.launch.watch.metrics import Metrics

READING_SECONDS = 0.3
"""Of a request, that reading a long metrics.jsonl may take; the next request goes on."""


class RunFolder:
    """A folder with files about a training and its metrics.jsonl."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.files = Files(folder)
        self.glance = Metrics(folder, most=96, glance=True)
        self.whole: Metrics | None = None
        """Read when the folder's own page is asked for."""

    def read_whole(self) -> Metrics:
        """Reads on in all of metrics.jsonl, for as long as a request may take; -> what is known up to there."""
        if self.whole is None:
            self.whole = Metrics(self.folder)
        self.whole.update(READING_SECONDS)
        return self.whole

    def told_failure(self, state: facts.State, failures: list[Failure]) -> dict[str, str] | None:
        """Says what went wrong by the run's silence, or by what a rank has written; None where neither tells it."""
        if state.word == "silent":
            return {"what": state.more, "remedy": state.remedy}
        if state.word == "failed" and failures:
            return {"what": f"{failures[0].who}: {failures[0].what}", "remedy": failures[0].remedy}
        return None

    def going_on(self, here: str) -> str:
        """Returns the command that goes on with the run. here: the one of a run that is no job."""
        return f"controlbooth launch resume {quoted(self.folder)}" if facts.job_of(self.files) else here
