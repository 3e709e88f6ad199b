"""Text that people pass on names no code, and nothing opens a socket: recipes, records, the environment of a run."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from covid_cls.errors import InputError
from covid_cls.io import read_json
from covid_cls.runtime.cli import compose_job
from covid_cls.runtime.schema import check_targets
from tests.conftest import ROOT, SMALL, Command, starter
from tests.training.small import compose_small

# What Hydra 1.3.8 refuses itself, what it lets through, and ways around a check of prefixes.
TARGETS = (
    "os.system",
    "logging.os.system",
    "posix.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.open",
    "pathlib.Path.write_text",
    "shutil.copy",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "pandas.read_pickle",
    "joblib.load",
    "numpy.load",
    "hydra.utils.call",
    "functools.partial",
    "hostile_module.run",
    "hostile_module.Callback",
    "pytorch_lightning.core.saving.torch.load",
    "pytorch_lightning.callbacks.os.system",
    "pytorch_lightning.callbacks.model_checkpoint.os.system",
    "pytorch_lightning.callbacks.ModelCheckpoint.__init__",
    "pytorch_lightning.callbacks.ModelCheckpoint\n.x",
    "pytorch_lightning.loggers.TensorBoardLogger",
    "pytorch_lightning.Trainer",
    "pytorch_lightning.callbacks",
    "pytorch_lightning_callbacks.Evil",
    "covid_cls.runtime.sweep.SweepStart",
    "",
)
TARGET = {"_target_": "os.system", "command": "touch marker"}
# Everywhere a recipe could put one: a section of ours, another's, the depths of an allowed one, Hydra's own.
PLACES: dict[str, dict[str, Any]] = {
    "callbacks.evil": {"callbacks": {"evil": TARGET}},
    "callbacks.early_stopping.monitor": {"callbacks": {"early_stopping": {"monitor": TARGET}}},
    "callbacks.best_checkpoint.dirpath.0.1": {"callbacks": {"best_checkpoint": {"dirpath": [[1, TARGET]]}}},
    "trainer": {"trainer": TARGET},
    "trainer.plugins.0": {"trainer": {"plugins": [TARGET]}},
    "trainer.strategy": {"trainer": {"strategy": TARGET}},
    "logger": {"logger": TARGET},
    "logger.name": {"logger": {"name": TARGET}},
    "data.path": {"data": {"path": TARGET}},
    "backbone": {"backbone": TARGET},
    "head.hidden.inside": {"head": {"hidden": {"inside": TARGET}}},
    "loss": {"loss": TARGET},
    "new": {"new": TARGET},
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_callback_is_one_of_lightnings_and_nothing_else(target: str) -> None:
    settings = compose_small()
    check_targets(settings)
    settings["callbacks"]["evil"] = {"_target_": target}
    with pytest.raises(InputError, match=r"^callbacks\.evil\._target_=") as error:
        check_targets(settings)
    assert target in str(error.value)
    assert "hostile_module" not in sys.modules


@pytest.mark.parametrize("place", PLACES)
def test_no_target_is_allowed_in_any_other_place(place: str) -> None:
    settings = compose_small()
    for name, value in PLACES[place].items():
        settings[name] = value
    with pytest.raises(InputError) as error:
        check_targets(settings)
    assert str(error.value).startswith(f"{place}._target_=os.system: refused")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "value", "reason"),
    [
        ("callbacks", {"mine": {"_target_": "pytorch_lightning.callbacks.Evil"}}, "callbacks.mine._target_"),
        ("callbacks", {"mine": {"_target_": "pytorch_lightning.callbacks.Any"}}, "callbacks.mine._target_"),
        ("callbacks", {"mine": {"patience": 3}}, "callbacks.mine._target_=None"),
        ("callbacks", {"mine": {"_target_": "pytorch_lightning.callbacks.Timer", "_args_": [1]}}, "mine._args_"),
        ("callbacks", {"mine": {"_target_": "pytorch_lightning.callbacks.Timer", "_partial_": True}}, "mine._partial_"),
        ("logger", {"_target_": "pytorch_lightning.loggers.Any"}, "logger._target_"),
    ],
)
def test_a_name_that_looks_right_must_be_a_class_of_that_kind(
    section: str, value: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    from covid_cls.experiment import build_trainer

    with pytest.raises(InputError, match=reason):
        build_trainer({**compose_small(), section: value}, tmp_path, [])


def test_lightnings_own_callbacks_and_loggers_may_be_added(tmp_path: Path) -> None:
    from covid_cls.experiment import build_trainer

    settings = compose_small()
    settings["callbacks"]["timer"] = {"_target_": "pytorch_lightning.callbacks.Timer", "duration": "00:12:00:00"}
    settings["logger"] = {"_target_": "pytorch_lightning.loggers.CSVLogger"}
    trainer = build_trainer(settings, tmp_path, [])
    assert {"Timer", "EarlyStopping", "ModelCheckpoint"} <= {type(callback).__name__ for callback in trainer.callbacks}
    assert type(trainer.logger).__name__ == "CSVLogger"


# recipes, as Hydra composes them


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder of recipes, beside the shipped configuration."""
    folder = tmp_path / "theirs" / "experiment"
    folder.mkdir(parents=True)
    return folder


def refusal(recipes: Path, text: str) -> str:
    (recipes / "evil.yaml").write_text("# @package _global_\n" + text, encoding="utf-8")
    with pytest.raises(InputError) as error:
        compose_job("train", [f"hydra.searchpath=[file://{recipes.parent}]", "experiment=evil"])
    assert "\n" not in str(error.value)
    return str(error.value)


HYDRA = {  # what a recipe may not do to Hydra itself, and what the refusal names
    "hydra: {callbacks: {evil: {_target_: os.system}}}": "hydra.callbacks.evil._target_=os.system",
    "hydra: {callbacks: {sweep: {_target_: os.system}}}": "hydra.callbacks.sweep._target_=os.system",
    "hydra: {launcher: {_target_: hostile_module.Launcher}}": "hydra.launcher._target_=hostile_module",
    "hydra: {callbacks: {sweep: {inside: {_target_: os.getcwd}}}}": "hydra.callbacks.sweep.inside._target_",
    "hydra: {sweeper: {params: {seed: {_target_: os.getcwd}}}}": "hydra.sweeper.params.seed._target_",
    "hydra: {sweeper: {params: {hydra/job_logging: a}}}": "hydra.sweeper.params",
    "hydra: {sweeper: {params: {+hydra.callbacks.x._target_: os.system}}}": "hydra.sweeper.params",
    "hydra: {job_logging: {handlers: {x: {(): os.system, command: ls}}}}": "handlers.x.()=os.system",
    "hydra: {job_logging: {handlers: {x: {class: logging.handlers.SocketHandler}}}}": "handlers.x.class",
    "hydra: {job_logging: {formatters: {x: {(): hostile_module.run}}}}": "formatters.x.()",
    "hydra: {job_logging: {handlers: {console: {stream: 'ext://hostile_module.run'}}}}": "ext://hostile_module",
    "hydra: {hydra_logging: {handlers: {x: {(): os.system}}}}": "hydra.hydra_logging.handlers.x.()",
    "hydra: {job: {env_set: {LD_PRELOAD: /tmp/evil.so}}}": "hydra.job.env_set",
    "new: {_target_: os.getcwd}\nhydra: {sweeper: {params: '${new}'}}": "_target_=os.getcwd",
    "hydra: {callbacks: {x: \"${oc.decode:'{_target_: os.getcwd}'}\"}}": "hydra.callbacks.x._target_=os.getcwd",
    "new: \"${oc.decode:'{_target_: os.getcwd}'}\"\nhydra: {callbacks: {x: '${new}'}}": "hydra.callbacks.x._target_",
    "callbacks: {evil: \"${oc.decode:'{_target_: os.system}'}\"}": "callbacks.evil._target_=os.system",
    "new: [[{_target_: os.getcwd}]]": "new.0.0._target_=os.getcwd",
}


@pytest.mark.parametrize("text", HYDRA)
def test_a_recipe_cannot_make_hydra_run_code(recipes: Path, text: str) -> None:
    assert HYDRA[text] in refusal(recipes, text)
    assert "hostile_module" not in sys.modules


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.system ["touch marker"]',
        '!!python/object/new:os.system ["touch marker"]',
        "!!python/name:os.system",
        "!!python/module:hostile_module",
        "!!python/tuple [1, 2]",
        "!evil 3",
    ],
)
def test_a_yaml_tag_is_refused(recipes: Path, value: str) -> None:
    assert "evil.yaml" in refusal(recipes, f"seed: {value}\n")
    assert not Path("marker").exists()


def test_what_recipes_are_for_goes_through(recipes: Path) -> None:
    text = "name: ${oc.env:HOME}\nseed: ${oc.decode:'3'}\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}"
    (recipes / "good.yaml").write_text("# @package _global_\n" + text, encoding="utf-8")
    words = [f"hydra.searchpath=[file://{recipes.parent}]", "experiment=good"]
    assert compose_job("train", words).settings["seed"] == 3


# the commands


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "callbacks: {evil: {_target_: hostile_module.run}}"),
        ([], "hydra: {callbacks: {evil: {_target_: hostile_module.run}}}"),
        (["-m"], "hydra: {job_logging: {handlers: {x: {(): hostile_module.run}}}}"),
        ([], 'seed: !!python/object/apply:os.system ["touch marker"]'),
        (["-m", "seed=0,1"], "hydra: {callbacks: {evil: {_target_: hostile_module.run}}}"),
    ],
)
def test_a_command_refuses_it_in_one_line(words: list[str], text: str, train: Command, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "evil.yaml").write_text("# @package _global_\n" + text, encoding="utf-8")
    (tmp_path / "hostile_module.py").write_text("from pathlib import Path\nPath('marker').touch()\nrun = print\n")
    done = train(tmp_path, *words, "--config-dir", str(tmp_path), *SMALL, "experiment=evil")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {evil: {_target_: hostile_module.run}}}",
        "hydra: {job_logging: {handlers: {x: {(): hostile_module.run}}}}",
        "hydra: {job: {env_set: {LD_PRELOAD: evil.so}}}",
        "name: x\nhydra: {job_logging: {handlers: {x: {class: '${name}'}}}}",
    ],
)
def test_an_option_of_a_sweep_cannot_change_what_hydra_does(text: str, train: Command, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "evil.yaml").write_text("# @package _global_\n" + text, encoding="utf-8")
    (tmp_path / "experiment" / "good.yaml").write_text("# @package _global_\nseed: 1\n", encoding="utf-8")
    done = train(tmp_path, "-m", "--config-dir", str(tmp_path), *SMALL, "experiment=good,evil")
    assert done.returncode == 2, done.stderr
    assert "experiment=evil: an option of a sweep cannot change Hydra itself" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experimental-rerun", "old"], "--experimental-rerun: not supported"),
        (["-m", "hydra.job.name=a,b"], "a sweep cannot vary Hydra itself"),
        (["+hydra.callbacks.evil._target_=os.system", "-m"], "hydra.callbacks.evil._target_=os.system: refused"),
        (["+hydra.callbacks.evil._target_=os.system"], "hydra.callbacks.evil._target_=os.system: refused"),
    ],
)
def test_words_about_hydra_are_refused(words: list[str], message: str, train: Command, tmp_path: Path) -> None:
    done = train(tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(reason="what runs code must not do so in this process")
def test_the_marker_of_the_test_before_can_appear(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hostile_module.py").write_text("from pathlib import Path\nPath('marker').touch()\nrun = print\n")
    script = "from hydra.utils import instantiate; instantiate({'_target_': 'hostile_module.run'})"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "marker").exists()


def test_results_stay_below_the_output_root(train: Command, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    done = train(tmp_path / "here", *SMALL, "name=../../evil")
    assert done.returncode == 2, done.stdout
    assert "name=../../evil" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "here"]


@pytest.mark.parametrize("text", ['{"a": !!python/object/apply:os.system ["ls"]}', "!!python/name:os.system", "[1]"])
def test_records_are_json_and_nothing_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json"):
        read_json(tmp_path / "run.json")


def test_torchvisions_decoders_see_no_file() -> None:
    # its PNG decoder ends the process on a flipped bit, see reference/reliability.md
    for path in sorted((ROOT / "covid_cls").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            else:
                continue
            assert not [name for name in names if name.startswith("torchvision.io")], path


# sockets

# Python runs this at the start of every process; sockets of the machine alone are how multiprocessing talks.
LISTENER = """
import os, socket, sys

log = os.open(os.environ["SOCKETS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def note(event, args):
    if event.startswith("socket.") and event != "socket.gethostname":
        family = args[1] if event == "socket.__new__" else getattr(args[0], "family", None)
        kind = "machine" if family == socket.AF_UNIX else "network"
        os.write(log, f"{kind} {event} {args[1:]} {sys.orig_argv}\\n".encode())


sys.addaudithook(note)
"""


@pytest.fixture
def listened(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """An environment whose processes write every use of a socket to $SOCKETS."""
    (tmp_path / "listener").mkdir()
    (tmp_path / "listener" / "sitecustomize.py").write_text(LISTENER, encoding="utf-8")
    paths = f"{tmp_path / 'listener'}:{ROOT}"
    return {**environment, "PYTHONPATH": paths, "SOCKETS": str(tmp_path / "sockets.txt")}


@pytest.mark.slow(reason="a process of its own notes every socket, from its start on")
def test_nothing_opens_a_socket(listened: dict[str, str], tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    words = (*SMALL, "trainer.max_epochs=1", "backbone.weights=none", "baselines=false", "data.workers=1")
    done = starter("train", listened)(work, *words)
    assert done.returncode == 0, done.stderr
    (run,) = (work / "outputs" / "phantom").iterdir()
    for name, option in {"evaluate": f"run={run}", "report": "runs=outputs/phantom"}.items():
        done = starter(name, listened)(work, option, "resamples=100")
        assert done.returncode == 0, done.stderr
    heard = Path(listened["SOCKETS"]).read_text().splitlines()
    assert [line for line in heard if line.startswith("network")] == []
    assert heard  # TensorBoard was written, and a worker process served images


@pytest.mark.slow(reason="a process of its own notes every socket, from its start on")
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_the_listener_hears_a_socket_in_a_child_process(start: str, listened: dict[str, str], tmp_path: Path) -> None:
    script = f"""
import multiprocessing, socket

def talk():
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).close()
    socket.create_server(("127.0.0.1", 0)).close()

if __name__ == "__main__":
    child = multiprocessing.get_context({start!r}).Process(target=talk)
    child.start()
    child.join()
"""
    (tmp_path / "talk.py").write_text(script)
    subprocess.run([sys.executable, "talk.py"], cwd=tmp_path, env=listened, check=True)
    heard = Path(listened["SOCKETS"]).read_text()
    assert "machine socket.__new__" in heard
    assert "network socket.__new__" in heard
    assert "network socket.bind" in heard
