"""Processes report how a call failed, and the next call has processes again."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.gloo import Failure, Processes


def add(rank, world, numbers):
    total = torch.tensor(numbers[rank])
    dist.all_reduce(total)
    return total.item()


def fail(rank, world, failing):
    if rank == failing:
        raise ValueError(f"process {rank} of {world}")
    return rank


def fail_before_others_meet(rank, world):
    if rank == 0:
        raise ValueError("before the collective")
    return add(rank, world, [1, 2])


def sleep(rank, world):
    time.sleep(30 * rank)


def end(rank, world):
    if rank == 1:
        os._exit(3)
    dist.barrier()


@pytest.mark.long
def test_processes_survive_what_fails_in_them():
    processes = Processes(2)
    try:
        assert processes.run(add, [1, 2]) == [3, 3]
        for function, arguments, kind, text in (
            (fail, (1,), "error", "ValueError: process 1 of 2"),
            (fail_before_others_meet, (), "error", "before the collective"),
            (sleep, (), "hangs", "no answer within 3 seconds"),
            (end, (), "crashes", "a process ended"),
        ):
            with pytest.raises(Failure, match=text) as failure:
                processes.run(function, *arguments, patience=3)
            assert failure.value.kind == kind
            assert processes.run(add, [3, 4]) == [7, 7]
    finally:
        processes.close()


def test_one_process_has_no_group():
    processes = Processes(1, "forkserver")
    try:
        assert processes.run(is_initialized) == [False]
    finally:
        processes.close()


def is_initialized(rank, world):
    return dist.is_initialized()
