"""W gloo processes on the CPU that run functions together; they are started once, since a start costs seconds."""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 60
"""Seconds that a process waits for another one."""


class Processes:
    """W processes in one gloo group.

    Args:
        world: W, the number of processes.
    """

    def __init__(self, world):
        self.world = world
        self._folder = tempfile.TemporaryDirectory()
        init_method = (Path(self._folder.name) / "init").as_uri()
        context = multiprocessing.get_context("spawn")
        self._pipes, self._workers = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, world, init_method, theirs), daemon=True)
            worker.start()
            theirs.close()
            self._pipes.append(ours)
            self._workers.append(worker)

    def run(self, function, *arguments):
        """Call `function(rank, world, *arguments)` in every process; return the results in rank order.

        `function` is defined at the top level of a module that the processes can import.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(2 * TIMEOUT), f"process {rank} did not answer"
            answers.append(pickle.loads(pipe.recv_bytes()))
        for rank, (succeeded, answer) in enumerate(answers):
            assert succeeded, f"process {rank} failed:\n{answer}"
        return [answer for _, answer in answers]

    def close(self):
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        for worker in self._workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()
        self._folder.cleanup()


def _serve(rank, world, init_method, pipe):
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=init_method, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=TIMEOUT)
    )
    while (call := pickle.loads(pipe.recv_bytes())) is not None:
        function, arguments = call
        try:
            answer = (True, function(rank, world, *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
    os._exit(0)  # without the slow shutdown of the interpreter
