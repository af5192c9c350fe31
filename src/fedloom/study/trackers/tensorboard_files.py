"""TensorBoard: event files under RUN/trackers/tensorboard/ARM, nothing leaves the machine."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.study.trackers import Tracked, Tracker, flat_config


def open_tracker(tracked: Tracked) -> Tracker:
    """Append to the arm's event files; what a killed run wrote beyond `first_round` is hidden by TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    place = tracked.folder / "trackers" / "tensorboard"
    resumed = tracked.first_round if tracked.first_round else None
    writer = SummaryWriter(str(place / tracked.arm), purge_step=resumed)
    if not tracked.first_round:
        table = "\n".join(f"| {key} | {value} |" for key, value in flat_config(tracked.config).items())
        writer.add_text("recipe", f"| key | value |\n|---|---|\n{table}")
    last = [tracked.first_round]

    def log(round: int, metrics: Mapping[str, float]) -> None:
        last[0] = round
        for name, value in metrics.items():
            writer.add_scalar(name, value, round)
        writer.flush()

    def end(figures: Mapping[str, float], finished: bool) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, last[0])
        writer.close()

    return Tracker(tracked.arm, log, end, f"tensorboard --logdir {place}")
