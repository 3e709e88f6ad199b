"""What TensorBoard is told of a run as a whole: its charts, its row in the HParams tab, its texts."""

from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

# Each chart lays the runs that are ticked over one another. TensorBoard joins equal layouts of many runs into one, so
# that it must not depend on the task; tags are regular expressions, matched from the start.
_CHARTS = {
    "validation": {
        "loss": ["loss/val$"],
        "AUROC, mean over classes": ["auroc/val$"],
        "AUROC of covid": ["auroc/val/covid$"],
        "accuracy": ["accuracy/val$"],
        "F1, mean over classes": ["f1/val$"],
        "sensitivity to covid": ["sensitivity/val/covid$"],
    },
    "generalisation": {
        f"{shown}: training and validation": [f"{name}/train$", f"{name}/val$"]
        for name, shown in (("loss", "loss"), ("auroc", "AUROC"), ("accuracy", "accuracy"))
    },
    "running": {
        "learning rates: head and pretrained backbone": ["lr/head$", "lr/backbone$"],  # the latter may be missing
        "speed: images per second": ["speed/images_per_second$"],
    },
}
# Tags and what the HParams tab calls them; it shows five of each kind at first.
_BEST = {
    "loss/val": "loss",
    "auroc/val": "AUROC",
    "accuracy/val": "accuracy",
    "f1/val": "F1",
    "sensitivity/val/covid": "covid sensitivity",
}


def write_layout(logger: TensorBoardLogger) -> None:
    """Give the Custom Scalars tab its charts, the same ones whatever the run."""
    charts = {kind: {title: ["Multiline", tags] for title, tags in rows.items()} for kind, rows in _CHARTS.items()}
    logger.experiment.add_custom_scalars(charts)


def write_hparams(logger: TensorBoardLogger, record: dict[str, Any], best: dict[str, float]) -> None:
    """Give the run its row in the HParams tab: what sets cells apart, and the selected epoch's validation scores.

    record: run.json. best: the numbers of that epoch, see `EpochHistory`; the scores become scalars `best/...` at its
    number. To be called once, at the end: a row that is written at the start shows no metric, or an earlier one.
    """
    hparams = _hparams(record)
    # TensorBoard shows the five first columns, those said to differ before others, each part in the alphabet's order.
    first = {"task", "backbone", "strategy", "loss", "seed" if hparams["fold"] == "-" else "fold"}
    columns = [
        api_pb2.HParamInfo(
            name=name,
            type=api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64,
            differs=name in first,
        )
        for name, value in hparams.items()
    ]
    scores = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=f"best/{tag.replace('/', '_')}"), display_name=f"{shown} (val)")
        for tag, shown in _BEST.items()
    ]
    # Not by the logger's log_hyperparams: without a group's name the row is called by the first letters of the cell,
    # which all cells of a sweep share.
    start = SessionStartInfo(group_name=record["cell"].rpartition("-")[2])
    for name, value in hparams.items():
        setattr(start.hparams[name], "string_value" if isinstance(value, str) else "number_value", value)
    writer = logger.experiment
    for tag, content in (
        (metadata.EXPERIMENT_TAG, {"experiment": api_pb2.Experiment(hparam_infos=columns, metric_infos=scores)}),
        (metadata.SESSION_START_INFO_TAG, {"session_start_info": start}),
        (metadata.SESSION_END_INFO_TAG, {"session_end_info": SessionEndInfo(status=api_pb2.STATUS_SUCCESS)}),
    ):
        about = metadata.create_summary_metadata(HParamsPluginData(**content))
        value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
        writer._get_file_writer().add_summary(Summary(value=[value]))
    for tag in _BEST:
        writer.add_scalar(f"best/{tag.replace('/', '_')}", best[tag], int(best["epoch"]) + 1)
    writer.flush()


def write_text(logger: TensorBoardLogger, tag: str, markdown: str) -> None:
    """Show `markdown` in the Text tab."""
    logger.experiment.add_text(tag, markdown)


def _hparams(record: dict[str, Any]) -> dict[str, str | float]:
    """Few typed values by which a run is known; the same names in each, for the tab takes them from one run."""
    config = record["config"]
    data = config["data"]
    return {
        "task": config["task"]["name"],
        "backbone": config["backbone"]["name"],
        "strategy": config["strategy"]["freeze_until"] or config["strategy"]["name"],
        "loss": config["loss"]["name"],
        "seed": str(config["seed"]),  # as a number it would be shown as 0.0000
        "fold": "-" if data["folds"] is None else str(data["fold"]),
        "split": f"by {data['group']}",
        "weights": record["weights"]["used"].rpartition("/")[2],
        "augment": config["augment"]["name"],
        "optimizer": config["optimizer"]["name"],
        "lr": float(config["optimizer"]["lr"]),
        "feature_cache": config["feature_cache"],
        "seen": config["preprocess"]["seen"],
    }
