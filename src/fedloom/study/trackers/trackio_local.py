"""Trackio: Hugging Face's local-first tracker, in its own folder of this machine (TRACKIO_DIR)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping

from fedloom.study.trackers import Tracked, Tracker, flat_config


def open_tracker(tracked: Tracked) -> Tracker:
    """Open the arm's run; after an interruption the same one goes on."""
    import trackio

    name = tracked.id or f"{tracked.group}/{tracked.arm}"
    with contextlib.redirect_stdout(io.StringIO()):  # it introduces itself where data goes
        run = trackio.init(
            project=tracked.project,
            name=name,
            group=tracked.group,
            config=flat_config(tracked.config),
            resume="allow" if tracked.id else "never",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    last = [tracked.first_round]

    def log(round: int, metrics: Mapping[str, float]) -> None:
        last[0] = round
        run.log(dict(metrics), step=round)

    def end(figures: Mapping[str, float], finished: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            if figures:
                run.log(dict(figures), step=last[0])
            # Of the run open in this process, so that nothing is said at its exit.
            trackio.finish()  # type: ignore[no-untyped-call]

    return Tracker(str(run.name), log, end, f'trackio show --project "{tracked.project}"')
