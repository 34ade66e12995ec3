"""What stands in an MLflow store, told apart from when and under which ids."""

from __future__ import annotations

from typing import Any

import sqlalchemy

from robustboard.bench import mlflow_store


def whole(client: Any, database: str, key: str) -> dict[str, object]:
    """What stands in a store under a key: one finished run with its children, and nothing unfinished beside it.

    Args:
        client: MLflow's, of the store.
        database: the URI of the database behind the store; a server would tell a thousand metrics one by one.
        key: of the logging.
    """
    experiment = client.get_experiment_by_name(mlflow_store.EXPERIMENT).experiment_id
    runs = client.search_runs([experiment], filter_string=f"tags.`robustboard.key` = '{key}'")
    (parent,) = [run for run in runs if run.data.tags["robustboard.role"] == "score"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs} == {None, parent.info.run_id}
    metrics = _metrics(database)
    return {
        "params": parent.data.params,
        "inputs": [item.dataset.digest for item in parent.inputs.dataset_inputs],
        "files": sorted(item.path for item in client.list_artifacts(parent.info.run_id, "record")),
        "runs": sorted((run.info.run_name, sorted(metrics.get(run.info.run_id, []))) for run in runs),
    }


def _metrics(database: str) -> dict[str, list[tuple[str, int, float]]]:
    """(name, step, value) of every number that was logged, by run."""
    found: dict[str, list[tuple[str, int, float]]] = {}
    engine = sqlalchemy.create_engine(database, poolclass=sqlalchemy.pool.NullPool)
    with engine.connect() as connection:
        for run, *number in connection.execute(sqlalchemy.text("SELECT run_uuid, key, step, value FROM metrics")):
            found.setdefault(run, []).append(tuple(number))
    return found
