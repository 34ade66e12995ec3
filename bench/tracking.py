"""Results in an MLflow store: one parent run a scored defense, one child run a stage; and records back out of it.

Only this module imports MLflow. The store's URI and artifact root are always explicit, telemetry is off, and the
command is the only writer.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustboard.bench.examiner import Floats
from robustboard.errors import RecordError, TrackingError
from robustboard.leaderboard.record import Record, load

EXPERIMENT = "robustboard"
ARTIFACTS = "mlflow-artifacts"
"""The folder of a local store's artifacts: copies of records, so that readers of a runs folder pass it over."""

_ROLE = "robustboard.role"
_PAGE = 1000


def local_uri(folder: Path) -> str:
    """The URI of the SQLite store in `folder`."""
    return f"sqlite:///{(folder / 'mlflow.db').resolve()}"


def store_uri(given: str | None, folder: Path) -> str:
    """The store to use: the one given, else MLFLOW_TRACKING_URI, else the SQLite store in `folder`."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or local_uri(folder)


def log_record(
    record: Record, folder: Path, *, uri: str, images: Floats, training: Sequence[Mapping[str, float]]
) -> str:
    """Log a published record.

    Args:
        record: the record.
        folder: where its files are; all of them become artifacts.
        uri: the store.
        images: the evaluated images, (N, C, H, W), for the data set's profile.
        training: the numbers of each training epoch, in order.

    Returns:
        The id of the parent run.

    Raises:
        TrackingError: if the store cannot be used.
    """
    with _store(uri) as mlflow:
        experiment = _experiment(mlflow, uri)
        with mlflow.start_run(
            experiment_id=experiment, run_name=f"{record.defense.name} on {record.track.id}", tags=_tags(record)
        ) as run:
            # Our digest is of all evaluated images; MLflow's own looks at the first ten thousand numbers only.
            digest = str(record.track.content["images_sha256"])[:36]
            data = mlflow.data.from_numpy(images, name=str(record.track.id), digest=digest)
            mlflow.log_input(data, context="evaluation")
            mlflow.log_params({**_flat("track", record.track.content), **_flat("hyper", record.hyper)})
            mlflow.log_metrics({_metric_name(name): metric.value for name, metric in record.metrics.items()})
            mlflow.log_artifacts(str(folder), artifact_path="record")
            for stage, cost in record.cost.items():
                with mlflow.start_run(
                    experiment_id=experiment, run_name=stage, nested=True, tags={_ROLE: "stage", "stage": stage}
                ):
                    mlflow.log_metrics(cost.model_dump())
                    if stage == "train":
                        for epoch, values in enumerate(training):
                            mlflow.log_metrics(dict(values), step=epoch)
            return str(run.info.run_id)


def read_records(uri: str) -> list[Record]:
    """The newest record of each (track, defense, training seed) in the store.

    Raises:
        TrackingError: if the store cannot be used, or holds no records.
        RecordError: if a stored record is damaged.
    """
    newest: dict[tuple[str, str, str], Record] = {}
    with _store(uri) as mlflow, tempfile.TemporaryDirectory() as scratch:
        for number, run in enumerate(_scored_runs(mlflow)):
            tags = run.data.tags
            key = (tags["robustboard.track"], tags["robustboard.defense"], tags["robustboard.seed"])
            if key in newest:
                continue
            folder = mlflow.artifacts.download_artifacts(
                run_id=run.info.run_id, artifact_path="record", dst_path=str(Path(scratch) / str(number))
            )
            newest[key] = load(Path(folder))
            shutil.rmtree(folder)
    if not newest:
        raise RecordError(f"The MLflow store {uri} holds no scored defense; score one first.")
    return [newest[key] for key in sorted(newest)]


def _scored_runs(mlflow: Any) -> Iterator[Any]:
    """Finished parent runs, newest first."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    token = None
    while experiment is not None:
        page = client.search_runs(
            [experiment.experiment_id],
            filter_string=f"tags.`{_ROLE}` = 'score' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=_PAGE,
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def _store(uri: str) -> Iterator[Any]:
    """MLflow, pointed at `uri` and quiet, with its own settings put back afterwards."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if uri.startswith("sqlite:///"):
        _make_folder(Path(uri.removeprefix("sqlite:///")).parent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mlflow
            import mlflow.data
    except ImportError as error:
        raise TrackingError("MLflow is not installed; install it with: pip install mlflow.") from error
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield mlflow
    except (RecordError, TrackingError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0][:200].rstrip(".")
        raise TrackingError(f"The MLflow store {uri} cannot be used: {first}.") from error
    finally:
        mlflow.set_tracking_uri(before)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"The folder {folder} of the MLflow store cannot be made: {error.strerror}.") from error


def _experiment(mlflow: Any, uri: str) -> str:
    found = mlflow.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / ARTIFACTS).as_uri()
    return str(mlflow.create_experiment(EXPERIMENT, artifact_location=location))


def _tags(record: Record) -> dict[str, str]:
    return {
        _ROLE: "score",
        "robustboard.track": record.track.id,
        "robustboard.track_hash": record.track.hash,
        "robustboard.defense": record.defense.name,
        "robustboard.seed": str(record.seeds.get("training", "")),
        "robustboard.checkpoint": record.checkpoint_sha256,
        "robustboard.status": record.status,
        "mlflow.note.content": f"{record.defense.title}, judged on {record.track.id}.",
    }


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Nested values as MLflow parameters: dotted names, values within its length."""

    def walk(name: str, value: Any) -> Iterable[tuple[str, str]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from walk(f"{name}.{key}", inner)
        else:
            yield name[:250], str(value)[:6000]

    return dict(walk(prefix, values))


def _metric_name(name: str) -> str:
    return name[:250]
