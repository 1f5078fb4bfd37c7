"""What surrounds a recipe: precision, processes, early stop, interruption, records, rehearsal."""

import io
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dicomnode.errors import ConfigError, DicomNodeError
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.networks import build_generator, count_weights, plan_generator
from dicomnode.imaging.package import read_package
from tests.test_pairs import PUBLISH, anatomy, as_mr, write_config, write_nifti
from training import curves, import_upstream, strips, train
from training.checkpoint import load_checkpoint, load_more, save_checkpoint
from training.config import TWO_WAYS, TrainConfig, load_config
from training.errors import TrainingError
from training.material import load_material
from training.overrides import read_settings
from training.progress import Progress
from training.recipes import Batch, Parts
from training.recipes.adversarial import Adversarial, Discriminator, Run
from training.recipes.build import build_recipe
from training.recipes.descent import Descent, Precision
from training.recipes.pix2pix import Pix2Pix
from training.records import Records, git_commit
from training.tensorboard import EventFile, crc32c
from training.watch import Stopping, Watch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six generated patients, CT and MR."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(6):
        hu = anatomy(number)
        write_nifti(folder / f"P{number}" / "CT.nii.gz", hu)
        write_nifti(folder / f"P{number}" / "MR.nii.gz", as_mr(hu))
    return folder


def run(path: Path, *words: str) -> TrainConfig:
    """The command, in this process; returns what it was told."""
    train.main([str(path), *words])
    return load_config(path, [word for word in words if "=" in word])


def weights_in(config: TrainConfig, file: str = "checkpoint.pt") -> dict[str, torch.Tensor]:
    state = torch.load(config.out / file, weights_only=True)["recipe"]["average"]
    return dict(state)


# precision


def _pix2pix(precision: Precision) -> Pix2Pix:
    torch.manual_seed(5)
    small = Discriminator(width=8, layers=2)
    settings = Adversarial(discriminator=small, learning_rate=1e-3, initial_spread=0.0, pool=0)
    generator = build_generator("residual_denoiser", {"width": 8, "blocks": 1, "gain": 1.0})
    return Pix2Pix(generator, settings, Run(3, True, 10, precision, 1.0))


def _batch(step: int) -> Batch:
    rng = np.random.default_rng([7, step])
    source = torch.from_numpy(rng.uniform(-0.5, 0.5, (2, 1, 32, 32)).astype(np.float32))
    return Batch(source, 0.5 * source + 0.3, torch.ones(2, 1, 32, 32))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_learns_nearly_the_same(precision: Precision) -> None:
    errors = {}
    for kind in ("fp32", precision):
        recipe = _pix2pix(kind)  # type: ignore[arg-type]
        for step in range(40):
            losses = recipe.step(_batch(step), step)
        errors[kind] = losses["pixel"]
        assert all(weight.dtype == torch.float32 for weight in recipe.generator.parameters())
    assert errors[precision] == pytest.approx(errors["fp32"], rel=0.15)


def test_the_scale_of_fp16_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    recipe, again = _pix2pix("fp16"), _pix2pix("fp16")
    recipe.step(_batch(0), 0)
    recipe.descent.scaler.update(2.0**7)  # type: ignore[union-attr]
    save_checkpoint(tmp_path / "c.pt", recipe, 1, "x")
    load_checkpoint(tmp_path / "c.pt", again, "x")
    assert again.descent.scaler.get_scale() == 2.0**7  # type: ignore[union-attr]
    assert recipe.step(_batch(1), 1) == again.step(_batch(1), 1)


def test_an_overflow_in_fp16_changes_no_weight_and_halves_the_scale() -> None:
    network = nn.Linear(1, 1)
    before = network.weight.detach().clone()
    descent = Descent("fp16", 1.0)
    optimizer = torch.optim.Adam(network.parameters())
    descent(network(torch.ones(1, 1)).sum() * 0.0, optimizer, [network], 0)
    whole = descent.scaler.get_scale()  # type: ignore[union-attr]
    descent(network(torch.full((1, 1), 1e38)).sum(), optimizer, [network], 1)
    assert torch.equal(network.weight, before)
    assert descent.scaler.get_scale() == whole / 2  # type: ignore[union-attr]


def test_a_gradient_in_fp16_is_clipped_in_its_own_scale() -> None:
    network = nn.Linear(1, 1, bias=False)
    before = network.weight.item()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    Descent("fp16", 0.5)(network(torch.full((1, 1), 3.0)).sum(), optimizer, [network], 0)
    assert before - network.weight.item() == pytest.approx(0.5, rel=1e-3)


def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing() -> None:
    network = nn.Linear(1, 1, bias=False)
    before = network.weight.detach().clone()
    optimizer = torch.optim.Adam(network.parameters())
    loss = torch.sqrt(network(torch.zeros(1, 1))).sum()  # 0, with slope infinite times 0
    with pytest.raises(TrainingError, match="step 12: the gradient of Linear is not finite"):
        Descent("fp32", 0.0)(loss, optimizer, [network], 12)
    assert torch.equal(network.weight, before)


def test_no_clipping_is_no_clipping(tmp_path: Path, root: Path) -> None:
    path = write_config(root, tmp_path)
    words = ("optimisation.gradient_clip=0", "optimisation.steps=2")
    config = run(path, *words)
    fresh = build_recipe(config).results()["forward"].state_dict()
    learned = weights_in(config)
    assert any(not torch.equal(fresh[name], learned[name]) for name in fresh)


# several processes


def torchrun(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return subprocess.run(
        [sys.executable, *start, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_do_what_one_does_with_the_whole_batch(root: Path, tmp_path: Path) -> None:
    """With a pool, a gradient penalty and unpaired images: all that is drawn is drawn alike."""
    path = write_config(root, tmp_path, recipe="gan_circle", data={"paired": False})
    settings = yaml.safe_load(path.read_text())
    settings["adversarial"] |= {"gan": "wgangp", "pool": 3}
    # a bias before instance normalisation has no slope but rounding, of which Adam makes a step
    settings["adversarial"]["discriminator"]["norm"] = "none"
    settings["optimisation"] |= {"batch_size": 4, "steps": 5}
    path.write_text(yaml.safe_dump(settings))
    alone = run(path, "stop_at=4", "device=cpu")
    words = [f"runs={tmp_path / 'both'}", "stop_at=4", "device=cpu"]
    done = torchrun(2, "training/train.py", str(path), *words)
    assert done.returncode == 0, done.stderr  # torchrun tells the cause first
    assert done.stdout.count("stopped after step 4") == 1  # one process speaks
    both = load_config(path, words)
    one, two = (torch.load(c.out / "checkpoint.pt")["recipe"] for c in (alone, both))
    for part in ("g_ab", "g_ba", "d_a", "d_b"):
        for name, weight in one[part].items():
            assert (weight - two[part][name]).abs().max() <= 1e-5, (part, name)
    assert len(one["pool_a"]["images"]) == len(two["pool_a"]["images"]) == 3
    for held, other in zip(one["pool_a"]["images"], two["pool_a"]["images"], strict=True):
        assert torch.allclose(held, other, atol=1e-5)


def test_a_dry_run_of_two_processes_speaks_once(root: Path, tmp_path: Path) -> None:
    path = write_config(root, tmp_path)
    done = torchrun(2, "training/train.py", "--dry-run", str(path), "device=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dry run: nothing was written") == 1


JOINED_AND_LEFT = """
import pathlib, torch
from training import processes

def gloo():
    tasks = pathlib.Path("/proc/self/task").glob("*/comm")
    return any("gloo" in task.read_text() for task in tasks)

processes.start("cpu")
weight = torch.nn.Parameter(torch.ones(3))
weight.sum().backward()
torch.optim.Adam([weight]).step()  # imports what would keep the group
print("joined", gloo())
processes.stop()
print("left", gloo())
"""


def test_who_left_the_others_has_no_thread_of_theirs(tmp_path: Path) -> None:
    """One that lives while Python ends can abort it: a whole run was reported as failed."""
    script = tmp_path / "script.py"
    script.write_text(JOINED_AND_LEFT)
    done = torchrun(1, str(script))
    assert done.stdout.splitlines() == ["joined True", "left False"], done.stderr


# early stop


def test_patience_ends_a_run_and_the_best_is_remembered() -> None:
    watch = Watch(Stopping("mae", patience=2, least=1.0))
    better = [watch.better({"mae": value}, step) for step, value in enumerate((9, 5, 4.5, 6))]
    assert better == [True, True, False, False]  # 4.5 is not better by 1
    assert (watch.best, watch.best_step, watch.over) == (5, 1, True)
    again = Watch(Stopping("mae", patience=2))
    again.load_state_dict(watch.state_dict())
    assert again.over


def test_gains_are_better_when_higher() -> None:
    watch = Watch(Stopping("gain_db", goal="highest", patience=1))
    assert [watch.better({"gain_db": v}, 0) for v in (1.0, 2.0, 1.5)] == [True, True, False]


def test_a_figure_that_is_not_there_is_named() -> None:
    with pytest.raises(TrainingError, match="no 'dice'; known: mae, bias"):
        Watch(Stopping("dice")).better({"mae": 1.0, "bias": 0.0}, 1)


def test_a_run_stops_early_and_its_package_has_the_best_weights(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopping = {"figure": "mae", "patience": 2, "least": 1e6}  # nothing is ever better by so much
    path = write_config(root, tmp_path, save_every=2, stopping=stopping)
    config = run(path, "optimisation.steps=50")
    assert load_more(config.out / "checkpoint.pt")["watch"] == {
        "best": pytest.approx(load_more(config.out / "checkpoint.pt")["watch"]["best"]),
        "best_step": 2,
        "since": 2,
    }
    steps = [json.loads(line)["step"] for line in (config.out / "log.jsonl").open()]
    assert steps == [2, 4, 6]
    package = read_package(tmp_path / "mr-to-ct")
    assert package.manifest.training["steps"] == 2
    assert "best at step 2: mae" in capsys.readouterr().out
    kept = weights_in(config, "best.pt")
    shipped = torch.from_numpy(_safetensors(package.path / "weights.safetensors")["last.weight"])
    assert torch.equal(shipped, kept["last.weight"])


def _safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    from safetensors.numpy import load_file

    return load_file(path)


def test_an_early_stop_that_was_interrupted_is_the_same(root: Path, tmp_path: Path) -> None:
    stopping = {"figure": "mae", "patience": 2, "least": 1e6}
    path = write_config(root, tmp_path, save_every=2, stopping=stopping)
    whole = run(path, "optimisation.steps=50")
    other = f"runs={tmp_path / 'other'}"
    run(path, "optimisation.steps=50", other, "stop_at=3")
    parts = run(path, "optimisation.steps=50", other)
    assert load_more(parts.out / "checkpoint.pt") == load_more(whole.out / "checkpoint.pt")
    ours, theirs = weights_in(whole), weights_in(parts)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


# interruption and damage


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_the_run_goes_on_to_the_bit(
    root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    path = write_config(root, tmp_path, recipe="aps")
    whole = run(path)
    config = replace(load_config(path), runs=str(tmp_path / "other"))
    spawn = multiprocessing.get_context("spawn")  # the process that runs the tests gets no signal
    child = spawn.Process(target=_run_to_a_signal, args=(path, config.runs, number))
    child.start()
    child.join(240)
    assert child.exitcode == 0
    material = load_material(config)
    assert train.fit(build_recipe(config), material, config, read_settings(path)) == 4
    ours, theirs = weights_in(whole), weights_in(config)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def _run_to_a_signal(path: Path, runs: str, number: signal.Signals) -> None:
    """Train in this process, which is sent the signal in its second step."""
    config = replace(load_config(path), runs=runs)
    torch.set_num_threads(config.threads)
    material = load_material(config)

    class Signalled(type(material)):  # type: ignore[misc]
        def batch(self, step: int) -> Batch:
            if step == 1:
                os.kill(os.getpid(), number)
            return super().batch(step)  # type: ignore[no-any-return]

    signalled, before = Signalled(config, config.data), signal.getsignal(number)
    torch.manual_seed(config.seed)
    assert train.fit(build_recipe(config), signalled, config, read_settings(path)) == 2
    assert signal.getsignal(number) == before


def test_a_run_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path, big = tmp_path / "c.pt", nn.Linear(1500, 1500)
    child = os.fork()
    if child == 0:
        for step in range(10_000):
            save_checkpoint(path, Parts(big=big), step, "x")  # type: ignore[arg-type]
        os._exit(0)
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        os.sched_yield()
    partial = path.with_suffix(".partial")
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > 1e6):
        os.sched_yield()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    other = Parts(big=nn.Linear(1500, 1500))
    load_checkpoint(path, other, "x")  # type: ignore[arg-type]
    assert torch.equal(other.parts["big"].weight, big.weight)


def test_other_data_than_those_of_the_checkpoint_are_refused(root: Path, tmp_path: Path) -> None:
    for number in range(6):
        write_nifti(tmp_path / f"d/P{number}/CT.nii.gz", anatomy(number))
        write_nifti(tmp_path / f"d/P{number}/MR.nii.gz", as_mr(anatomy(number)))
    path = write_config(tmp_path / "d", tmp_path)
    run(path, "stop_at=2")
    write_nifti(tmp_path / "d/P0/CT.nii.gz", anatomy(0) + 1)
    with pytest.raises(TrainingError, match="the data are not those it was trained on"):
        run(path)


# records


def test_a_run_keeps_its_settings_its_commit_and_its_data(root: Path, tmp_path: Path) -> None:
    config = run(write_config(root, tmp_path), "seed=9", "log_every=2")
    about = yaml.safe_load((config.out / "run.yaml").read_text())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(about["settings"]))
    assert load_config(tmp_path / "again.yaml").digest() == config.digest()
    assert about["settings"]["seed"] == 9
    assert about["git_commit"] == git_commit()
    assert about["data_sha256"] == load_material(config).digest()
    rows = (config.out / "losses.csv").read_text().splitlines()
    assert rows[0] == "step,fidelity_hu,bias_hu"
    assert [row.split(",")[0] for row in rows[1:]] == ["2", "4"]


def test_lines_of_steps_that_a_crash_undid_are_not_kept_twice(tmp_path: Path) -> None:
    first = Records(tmp_path, {}, "0", 0)
    for step in (10, 20, 30):
        first.step(step, {"pixel": 1.0})
        first.validation({"step": step, "mae": 1.0}, {"mae": 1.0})
    again = Records(tmp_path, {}, "0", 20)
    again.step(30, {"pixel": 2.0})
    assert (tmp_path / "losses.csv").read_text().split() == ["step,pixel", "10,1", "20,1", "30,2"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    assert steps == [10, 20]


def records_of(path: Path) -> list[bytes]:
    """The records of a TFRecord file; its lengths and checksums are right."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        record, ends = data[12 : 12 + length], data[12 + length : 16 + length]
        for part, held in ((data[:8], data[8:12]), (record, ends)):
            crc = crc32c(part)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert held == struct.pack("<I", masked)
        found.append(record)
        data = data[16 + length :]
    return found


def test_the_checksum_is_that_of_the_rfc() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720 B.4


def test_events_are_the_bytes_that_tensorboard_itself_writes(tmp_path: Path) -> None:
    """After the wall time; made with tensorboard 2.21: Event(step=300, summary=...)."""
    events = EventFile(tmp_path)
    events.scalars({"loss/pixel": 0.5, "v": -2.0}, 300)
    events.picture("p", np.array([[0, 255]], np.uint8), 7)
    version, scalars, picture = (record[9:] for record in records_of(events.path))
    assert version == b"\x1a\x0dbrain.Event:2"
    assert scalars.hex() == "10ac022a1d0a110a0a6c6f73732f706978656c150000003f0a080a017615000000c0"
    png = picture[picture.index(b"\x89PNG") :]
    size = len(png)
    head = [0x10, 7, 0x2A, size + 15, 0x0A, size + 13, 0x0A, 1, 0x70, 0x22, size + 8]
    assert picture == bytes([*head, 8, 1, 16, 2, 24, 1, 0x22, size]) + png


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard here"
    )
    events = EventFile(tmp_path)
    for step in range(3):
        events.scalars({"loss/pixel": 0.5 * step}, 100 * step)
    events.picture("validation", np.zeros((4, 6), np.uint8), 200)
    found = accumulator.EventAccumulator(str(tmp_path)).Reload()
    points = [(event.step, event.value) for event in found.Scalars("loss/pixel")]
    assert points == [(0, 0.0), (100, 0.5), (200, 1.0)]
    assert (found.Images("validation")[0].height, found.Images("validation")[0].width) == (4, 6)


@pytest.mark.parametrize("paired", [True, False])
def test_each_validation_leaves_a_picture(root: Path, tmp_path: Path, paired: bool) -> None:
    recipe = "supervised" if paired else "cyclegan"
    path = write_config(root, tmp_path, recipe=recipe, data={"paired": paired}, save_every=2)
    config = run(path)
    pictured = sorted((config.out / "pictures").iterdir())
    assert [file.name for file in pictured] == ["step-0000002.png", "step-0000004.png"]
    with Image.open(pictured[0]) as image:
        columns = 4 if paired else 2
        assert image.size == (columns * 42, 3 * 42)


def test_an_error_of_nothing_is_grey_and_windows_are_fixed() -> None:
    hu = np.array([[-1000.0, -250.0, 100.0, 450.0, 3000.0]], np.float32)
    assert strips.grey(hu, "HU", hu).tolist() == [[0, 0, 128, 255, 255]]
    assert strips.error(hu, hu, "HU", 1.0).tolist() == [[128] * 5]
    assert strips.error(hu + 150, hu, "HU", 1.0).tolist() == [[255] * 5]
    assert strips.grey(hu, "AU", np.zeros_like(hu)).tolist() == [[128] * 5]


# the screen


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("stream", [_Terminal(), io.StringIO()])
def test_a_terminal_gets_a_bar_and_a_file_a_line_a_minute(stream: io.StringIO) -> None:
    clock = _Clock()
    with Progress(0, 100, stream=stream, clock=clock) as progress:
        for step in range(1, 100):
            clock.now += 2.0
            progress.step(step, {"pixel": 0.25})
    words = stream.getvalue()
    if stream.isatty():
        assert "\r\x1b[2K[============            ] 50/100  0.50 steps/s  100 s left" not in words
        assert "[============            ] 50/100  0.50 steps/s  2 min left  pixel 0.25" in words
        assert "\n" not in words
    else:
        assert words.splitlines()[0] == "step 30/100  0.50 steps/s  2 min left"
        assert len(words.splitlines()) == 3


# rehearsal


def files_below(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("began", [False, True])
def test_a_dry_run_says_everything_and_writes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], began: bool
) -> None:
    path = write_config(root, tmp_path)
    if began:
        run(path, "stop_at=2")
    before = files_below(tmp_path)
    capsys.readouterr()
    train.main(["--dry-run", str(path), "seed=4"])
    words = capsys.readouterr().out
    assert files_below(tmp_path) == before
    assert "slices: " in words
    assert "step 0 on cpu: " in words
    assert "validation after it: mae" in words
    assert "fidelity_hu" in words


def test_a_dry_run_stops_where_the_run_would(root: Path, tmp_path: Path) -> None:
    path = write_config(root, tmp_path)
    with pytest.raises(TrainingError, match="no file"):
        train.main(["--dry-run", str(path), f"data.root={tmp_path / 'nothing'}"])


# every command

COMMANDS = [
    path.stem
    for path in sorted((ROOT / "training").glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text("utf-8")
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_how_to_use_it(name: str) -> None:
    """Without words: a sentence, and never a traceback."""
    with pytest.raises((DicomNodeError, SystemExit)) as caught:
        import_module(f"training.{name}").main([])
    usage = isinstance(caught.value, SystemExit) and caught.value.code == 2  # argparse's
    assert usage or re.search("usage|want ", str(caught.value))
    assert "except DicomNodeError as error:" in (ROOT / f"training/{name}.py").read_text("utf-8")


# presets of the papers

PAPERS = sorted((ROOT / "training/configs/papers").glob("*.yaml"))


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_preset_loads_and_plans_its_networks(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert (ROOT / config.card).exists()
    generator = plan_generator(config.generator.architecture, config.generator.options)
    assert config.optimisation.patch % generator.multiple == 0
    two_ways = config.recipe in TWO_WAYS and config.name.startswith(("brain", "mr-ct"))
    assert (config.backward is not None) == two_ways
    assert config.adversarial.epoch_steps > 0 or config.recipe == "supervised"
    method = re.sub("(-resnet|-unet|-text)?-paper$", "", path.stem)
    assert path.with_name(f"{method}.yaml").exists()  # the paper's has its right one beside it


PUBLISHED = [
    ("cect-pix2pix-paper", "generator", 54_407_809),
    ("brain-ct-mr-cyclegan-resnet-paper", "generator", 11_365_633),
    ("brain-ct-mr-cyclegan-unet-paper", "generator", 54_403_457),
    ("mr-ct-aps-text-paper", "generator", 671_041),
    ("ldct-gan-circle-paper", "generator", 611_418),
    ("ldct-red-cnn-paper", "generator", 1_848_865),
    ("cect-pix2pix-paper", "adversarial.pixel_weight", 100),
    ("cect-pix2pix-paper", "data.target.intensity.method", "global"),
    ("brain-ct-mr-cyclegan-resnet-paper", "adversarial.gan", "vanilla"),
    ("brain-ct-mr-cyclegan-resnet-paper", "adversarial.identity_weight", 0),
    ("brain-ct-mr-cyclegan-resnet-paper", "adversarial.cycle_weight", 10),
    ("mr-ct-aps-paper", "adversarial.learning_rate", 1e-4),
    ("mr-ct-aps-paper", "adversarial.beta1", 0.9),
    ("mr-ct-aps-paper", "adversarial.structure_weight", 10),
    ("mr-ct-aps-paper", "optimisation.batch_size", 8),
    ("mr-ct-sccyclegan-paper", "adversarial.structure_weight", 5),
    ("ldct-gan-circle-paper", "adversarial.learning_rate", 1e-5),
    ("ldct-gan-circle-paper", "optimisation.batch_size", 64),
    ("ldct-gan-circle-paper", "low_dose.lowest", 0.25),
]


@pytest.mark.parametrize(("name", "key", "value"), PUBLISHED)
def test_a_preset_has_the_number_of_its_paper(name: str, key: str, value: Any) -> None:
    found: Any = load_config(ROOT / f"training/configs/papers/{name}.yaml")
    if key == "generator":
        plan = plan_generator(found.generator.architecture, found.generator.options)
        assert count_weights(plan) == value
        return
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


# weights of others


def as_upstream_writes_it(network: nn.Module, path: Path, *, parallel: bool) -> None:
    """`torch.save(net.cpu().state_dict())`, of the network or of its DataParallel."""
    torch.save((nn.DataParallel(network) if parallel else network).cpu().state_dict(), path)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("architecture", ["resnet", "unet_128"])
def test_weights_of_upstream_become_a_package(
    root: Path, tmp_path: Path, architecture: str, parallel: bool
) -> None:
    small = {"width": 4} | ({"blocks": 1} if architecture == "resnet" else {})
    there = build_generator(architecture, {**small, "slices": 3, "outputs": 3})
    as_upstream_writes_it(there, tmp_path / "latest_net_G.pth", parallel=parallel)
    assert hasattr(torch.load(tmp_path / "latest_net_G.pth"), "_metadata")
    manifest = read_package_of(root, tmp_path, architecture, small)
    words = [str(tmp_path / "latest_net_G.pth"), str(manifest), str(tmp_path / "card.md")]
    import_upstream.main([*words, f"out={tmp_path / 'mr-to-ct'}", "grey=yes"])
    ours = load_model(read_package(tmp_path / "mr-to-ct")).generator
    grey = torch.rand(1, 1, 128, 128)
    with torch.inference_mode():
        colours = there(grey.expand(-1, 3, -1, -1)).atanh().mean(1, keepdim=True).tanh()
        assert (ours(grey) - colours).abs().max() < 1e-4


def read_package_of(root: Path, folder: Path, architecture: str, options: Any) -> Path:
    """The manifest of a package with that generator, as a file."""
    generator = {"architecture": architecture, "options": options}
    publish = {**PUBLISH, "padding": "replicate"}  # slices of 40 do not reflect to 128
    path = write_config(root, folder, generator=generator, recipe="pix2pix", publish=publish)
    run(path, "optimisation.steps=1", "optimisation.patch=128")
    held = folder / "manifest.yaml"
    held.write_bytes((folder / "mr-to-ct" / "manifest.yaml").read_bytes())
    return held


def test_the_import_says_what_it_wants(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"want FILE\.pth MANIFEST\.yaml"):
        import_upstream.main(["a.pth"])


def test_a_manifest_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"m\.yaml"):
        import_upstream.main(["a.pth", str(tmp_path / "m.yaml"), "c.md", f"out={tmp_path}"])


# curves


def test_curves_are_drawn_from_what_a_run_left(root: Path, tmp_path: Path) -> None:
    config = run(write_config(root, tmp_path), "log_every=1", "save_every=2", "threads=1")
    curves.main([str(tmp_path / "curves.svg"), str(config.out / "losses.csv")])
    drawn = ElementTree.parse(tmp_path / "curves.svg").getroot()  # noqa: S314  # our own
    lines = [node.get("points", "").split() for node in drawn.iter() if "polyline" in node.tag]
    assert [len(line) for line in lines] == [4, 4, 2]  # two losses, one figure
    assert "validation: mae" in [node.text for node in drawn.iter() if node.text]


def test_a_run_without_losses_has_no_curves(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no losses there"):
        curves.main([str(tmp_path / "out.svg"), str(tmp_path / "losses.csv")])
