"""MLflow: to the server or store that MLFLOW_TRACKING_URI names, else to mlflow.db beside the run folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from fedloom.study.trackers import Tracked, Tracker, flat_config

LONGEST_VALUE = 500  # characters of a parameter that every kind of store takes


def open_tracker(tracked: Tracked) -> Tracker:
    """Make the arm's run, or take up the one that was interrupted."""
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells how it makes its tables
    place = tracked.folder.parent / "mlflow.db"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place.resolve()}"
    client = MlflowClient(tracking_uri=uri)
    if tracked.id is None:
        known = client.get_experiment_by_name(tracked.project)
        experiment = known.experiment_id if known is not None else client.create_experiment(tracked.project)
        tags = {"mlflow.runName": f"{tracked.group}/{tracked.arm}", "group": tracked.group, "arm": tracked.arm}
        run_id = client.create_run(experiment, tags=tags).info.run_id
        for key, value in flat_config(tracked.config).items():
            client.log_param(run_id, key, str(value)[:LONGEST_VALUE])
    else:
        run_id = tracked.id
        client.update_run(run_id, status="RUNNING")
    last = [tracked.first_round]

    def log(round: int, metrics: Mapping[str, float]) -> None:
        last[0] = round
        for name, value in metrics.items():
            client.log_metric(run_id, name, value, step=round)

    def end(figures: Mapping[str, float], finished: bool) -> None:
        for name, value in figures.items():
            client.log_metric(run_id, name, value, step=last[0])
        client.set_terminated(run_id, status="FINISHED" if finished else "KILLED")

    named = "MLFLOW_TRACKING_URI" in os.environ
    return Tracker(
        run_id, log, end, "the server of MLFLOW_TRACKING_URI" if named else f"mlflow ui --backend-store-uri {uri}"
    )
