"""Jobs in several processes that end with the one that started them."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2

from controlbooth.data.errors import UnusableFile
from controlbooth.data.processes.parent import end_with_parent

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerError(UnusableFile):
    """What stopped a worker process; the message says how to go on."""


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    start: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Iterator[tuple[Job, Result]]:
    """Yields each job and its result, as they are finished; runs in this process where there is one worker, or one job.

    start(*arguments) is called once in each process, before its first job. `work` and `start` are functions at the top
    level of a module. Raises WorkerError with the message of an OSError or ValueError of a worker process, or where one
    was killed.
    """
    if min(workers, len(jobs)) <= 1:
        if jobs:
            start(*arguments)
        yield from ((job, work(job)) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of OpenCV and pyarrow
    with ProcessPoolExecutor(min(workers, len(jobs)), spawn, _start, (start, arguments)) as pool:
        futures = {pool.submit(_run, work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except (OSError, ValueError) as error:  # its traceback is the worker's and stays in the cause
            raise WorkerError(str(error)) from error
        except BrokenProcessPool as error:
            raise WorkerError(
                "a worker process was killed, most often for memory: use fewer --workers; finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends workers at once, without a traceback from each
    try:
        start(*arguments)
    except Exception as error:  # raised by the first job: a process that fails before it looks as if it was killed
        _failures.append(error)


_failures: list[Exception] = []
"""Why this process could not be started; at most one."""


def _run(work: Callable[[Job], Result], job: Job) -> Result:
    if _failures:
        raise _failures[0]
    return work(job)
