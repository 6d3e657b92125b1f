"""What slime logged: the scalars of its TensorBoard events (``--use-tensorboard``, ``TENSORBOARD_DIR``)."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> its (step, value) pairs in the order of logging, over all event files in ``folder``."""
    scalars: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):  # the driver, rollout manager and trainer write one each
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return scalars
