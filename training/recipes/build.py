"""From a configuration to its recipe: networks with their first weights, losses, optimisers."""

from pathlib import Path

from dicomnode.errors import ConfigError
from dicomnode.imaging.inference import load_model
from dicomnode.imaging.intensity import Intensity
from dicomnode.imaging.networks import Generator, build_classifier, build_generator
from dicomnode.imaging.package import ModelPackage, read_package
from training.config import Classes, Data, Images, TrainConfig, window_of
from training.recipes import Recipe
from training.recipes.adversarial import Run
from training.recipes.aps import Aps
from training.recipes.classifier import Classify
from training.recipes.cyclegan import CycleGan
from training.recipes.gan_circle import GanCircle
from training.recipes.pix2pix import Pix2Pix
from training.recipes.supervised import Supervised
from training.translation import fixed

_TWO_WAYS = {"cyclegan": CycleGan, "sccyclegan": CycleGan, "gan_circle": GanCircle}


def build_recipe(config: TrainConfig, epoch_steps: int = 1) -> Recipe:
    """The recipe that `config` names.

    Args:
        epoch_steps: steps that bring every training slice once.

    Raises:
        PackageError: the generator cannot be built with these options.
        ConfigError: the settings do not fit the recipe.
    """
    settings, optimisation = config.adversarial, config.optimisation
    if isinstance(config.data, Classes):
        network = build_classifier(config.generator.architecture, config.generator.options)
        return Classify(network, optimisation, config.seed)
    data = config.data
    scale: Intensity
    if isinstance(data, Data):
        scale, residual, channels = window_of(config), True, 1
    else:
        scale, residual, channels = fixed(data.target.intensity), config.residual, data.channels
    if config.recipe == "supervised":
        unit = scale.unit_per_network
        return Supervised(_generator(config), optimisation, unit, residual=residual)
    run = Run(
        config.seed,
        residual,
        epoch_steps,
        optimisation.precision,
        optimisation.gradient_clip,
    )
    if config.recipe in _TWO_WAYS:
        return _TWO_WAYS[config.recipe](_generator(config), _generator(config), settings, run)
    if config.recipe == "aps":
        return Aps(_generator(config), settings, run)
    return Pix2Pix(_generator(config), settings, run, channels)


def _generator(config: TrainConfig) -> Generator:
    generator = build_generator(config.generator.architecture, config.generator.options)
    if config.start:
        begin_with(generator, read_package(Path(config.start)))
    if isinstance(config.data, Images) and generator.slices != config.data.channels:
        raise ConfigError(
            f"generator.options: it takes {generator.slices} channels, data.slices and "
            f"data.equalised give {config.data.channels}"
        )
    return generator


def begin_with(generator: Generator, package: ModelPackage) -> None:
    """Give `generator` the weights of a package; what the package lacks begins as it would.

    Raises:
        ConfigError: a weight of the package has no place in `generator`.
    """
    weights = load_model(package, precision="fp32").generator.state_dict()
    own = generator.state_dict()
    if odd := [
        name for name in weights if name not in own or own[name].shape != weights[name].shape
    ]:
        raise ConfigError(
            f"start: {package.name} has {len(odd)} weights that this generator has not"
        )
    generator.load_state_dict({**own, **weights})
