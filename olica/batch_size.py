"""How many samples are worked on at a time, as far as memory allows."""

import logging
from collections.abc import Callable

from accelerate.utils.memory import clear_device_cache

from .devices import is_out_of_memory

logger = logging.getLogger(__name__)


class BatchSize:
    """How many samples go through a layer, or a model, at a time: halved, for good, when memory runs out.

    Attributes:
        size: samples.
    """

    def __init__(self, size: int):
        self.size = size

    def run(self, work: Callable[[slice], None], samples: int) -> None:
        """Call `work` with the rows of one batch after the other; a batch that does not fit is done again in halves.

        Raises:
            RuntimeError: out of memory, even with a single sample.
        """
        start = 0
        while start < samples:
            rows = slice(start, min(start + self.size, samples))
            try:
                work(rows)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.size == 1:
                    raise
            else:
                start = rows.stop
                continue
            # Here the error is forgotten, and with it the frames that held what had been allocated.
            clear_device_cache()
            self.size //= 2
            logger.warning("out of memory: going on with --batch_size %d", self.size)
