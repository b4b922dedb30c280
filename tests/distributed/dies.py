"""A fit of which rank 1 is killed once, in its third batch, under a launcher."""

import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pyro
import torch
import torch.distributed as dist

import pyro_lora as pl
from tests.distributed import jobs


class Dying:
    """Batches in the third of which rank 1 dies, the first time."""

    def __init__(self, batches: list[jobs.Batch], restarts: int) -> None:
        self.batches, self.restarts = pl.share(batches), restarts

    def __iter__(self) -> Iterator[jobs.Batch]:
        for index, batch in enumerate(self.batches):
            if index == 2 and self.restarts == 0 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def main(folder: Path) -> None:
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    pyro.set_rng_seed(0)
    lora, model = jobs.lifted()
    batches = Dying(jobs.data(by=1), restarts)
    done: list[int] = []
    lora.network.register_forward_hook(lambda *_: done.append(1))
    guide = jobs.guide_of(lora, model)
    guide.laplace_approximation(batches, checkpoint=folder / "fit")
    if dist.get_rank() == 0:
        # The guide's start takes two runs; of its own 3 batches some were done before.
        print(f"resumed after {restarts} restart: {len(done) < 2 + 3}")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
