"""W gloo processes on the CPU that run functions together; they are started once, since a start costs seconds."""

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 60
"""Seconds that a process waits for another one."""
GRACE = 2
"""Seconds that the other processes have for their answers once one has failed."""
KINDS = ("error", "hangs", "crashes")


class Failure(Exception):
    """A call failed on a process.

    Args:
        kind: one of KINDS: it raised an error, did not answer in time, or ended.
        text: the traceback of an error.
    """

    def __init__(self, kind, text):
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


class Processes:
    """W processes in one gloo group; one process has no group.

    After a failure that leaves processes without an answer, all are ended, and the next call starts others.

    Args:
        world: W, the number of processes.
        method: how `multiprocessing` starts them; "forkserver" is quick where it has preloaded what they import.
    """

    def __init__(self, world, method="spawn"):
        self.world = world
        self._context = multiprocessing.get_context(method)
        self._workers = {}
        self._start()

    def run(self, function, *arguments, patience=2 * TIMEOUT):
        """Call `function(rank, world, *arguments)` in every process; return the results in rank order.

        `function` is at the top of a module that the processes can import.

        Raises:
            Failure: the worst of the processes.
        """
        if not self._workers:
            self._start()
        if not self._ready:
            self._answers(TIMEOUT)
            self._ready = True
        call = pickle.dumps((function, arguments))
        try:
            for pipe in self._workers:
                pipe.send_bytes(call)
        except OSError as error:
            self.close()
            raise Failure("crashes", "a process ended") from error
        return self._answers(patience)

    def _start(self):
        self._folder, self._ready = tempfile.TemporaryDirectory(), False
        init_method = (Path(self._folder.name) / "init").as_uri()
        for rank in range(self.world):
            ours, theirs = self._context.Pipe()
            worker = self._context.Process(target=_serve, args=(rank, self.world, init_method, theirs), daemon=True)
            worker.start()
            theirs.close()
            self._workers[ours] = worker

    def _answers(self, patience):
        """Return one answer per process."""
        answers, failures, until = {}, [], time.monotonic() + patience
        while len(answers) < self.world:
            ready = wait([pipe for pipe in self._workers if pipe not in answers], max(0, until - time.monotonic()))
            if not ready:
                failures = failures or [Failure("hangs", f"no answer within {patience} seconds")]
                break
            for pipe in ready:
                try:
                    failed, answers[pipe] = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    failed, answers[pipe] = "crashes", "a process ended"
                if failed:
                    failures.append(Failure(failed, answers[pipe]))
                    until = min(until, time.monotonic() + GRACE)
        if failures:
            # Where one process crashes, another may first report that it lost the connection.
            worst = max(failures, key=lambda failure: KINDS.index(failure.kind))
            if len(answers) < self.world or worst.kind == "crashes":
                self.close()
            raise worst
        return [answers[pipe] for pipe in self._workers]

    def close(self):
        """End the processes."""
        for pipe, worker in self._workers.items():
            worker.kill()
            worker.join()
            pipe.close()
        self._workers = {}
        self._folder.cleanup()


def _serve(rank, world, init_method, pipe):
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if world > 1:
        timeout = datetime.timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world, timeout=timeout)
    pipe.send_bytes(pickle.dumps((None, None)))
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            os._exit(0)  # The parent has ended.
        try:
            function, arguments = pickle.loads(call)
            answer = (None, function(rank, world, *arguments))
        except Exception:
            answer = ("error", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
