"""A pool of processes that form one gloo group and run functions together."""

import multiprocessing
import queue as queues
import socket
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def _serve(rank, world, port, tasks, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            results.put((rank, function(*args), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """Runs a function on every rank at once and returns the results in the order of ranks."""

    def __init__(self, world):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.tasks = [context.Queue() for _ in range(world)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, world, port, self.tasks[rank], self.results), daemon=True)
            for rank in range(world)
        ]

    def __enter__(self):
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_):
        for queue in self.tasks:
            queue.put(None)
        for process in self.processes:
            process.join(timeout=10)

    def run(self, function, *args):
        for queue in self.tasks:
            queue.put((function, args))
        answers = {}
        while len(answers) < len(self.tasks):
            try:
                rank, value, error = self.results.get(timeout=1)
            except queues.Empty:
                assert all(process.is_alive() for process in self.processes), "a process of the pool died"
                continue
            answers[rank] = value, error
        for _, error in answers.values():
            assert error is None, error
        return [answers[rank][0] for rank in range(len(self.tasks))]
