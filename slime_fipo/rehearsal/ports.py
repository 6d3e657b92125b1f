"""Ports of a rehearsal: each has a range of its own, since slime looks for free ports without holding them.

SGLang's servers are searched from 15000 on, and what torch.distributed opens at such a port listens on every address
of the machine: two rehearsals that start in the same second would choose the same. Ray chooses its own ports.
"""

from __future__ import annotations

import os
import socket
from types import ModuleType

from ..errors import UserError

VARIABLE = "SLIME_FIPO_REHEARSAL_PORTS"  # a range's first port, which is the reservation itself
SIZE = 500  # slime takes 33 per SGLang engine
# Above every port from which slime searches upwards, below Linux's ephemeral ports.
RANGES = range(21_500, 32_500, SIZE)


def reserve() -> socket.socket:
    """Reserve a range for as long as the socket that is returned, bound to the range's first port, stays open.

    Raises:
        UserError: every range is taken.
    """
    for first in RANGES:
        lock = socket.socket()
        try:
            lock.bind(("", first))
            lock.listen()  # else slime's own check, which sets SO_REUSEADDR, would call it free
            return lock
        except OSError:
            lock.close()
    raise UserError(
        f"no range of {SIZE} ports from {RANGES.start} to {RANGES.stop} is free: end other rehearsals on this machine"
    )


def keep_to_own_range(http_utils: ModuleType) -> None:
    """Let slime's ``slime.utils.http_utils`` find ports of this rehearsal's range, and of no other's."""
    if VARIABLE not in os.environ:  # slime's parser, asked before a rehearsal: it opens none
        return
    first, is_port_available = int(os.environ[VARIABLE]), http_utils.is_port_available

    def is_own_port_available(port: int) -> bool:
        if port < RANGES.stop and not first <= port < first + SIZE:
            return False
        return is_port_available(port)

    http_utils.is_port_available = is_own_port_available
