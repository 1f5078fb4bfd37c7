"""From a configuration to its recipe: networks with their first weights, losses, optimisers."""

from dicomnode.imaging.networks import Generator, build_generator
from training.config import Data, TrainConfig, window_of
from training.recipes import Recipe
from training.recipes.adversarial import Run
from training.recipes.aps import Aps
from training.recipes.cyclegan import CycleGan
from training.recipes.gan_circle import GanCircle
from training.recipes.pix2pix import Pix2Pix
from training.recipes.supervised import Supervised
from training.translation import fixed

TWO_WAYS = {"cyclegan": CycleGan, "sccyclegan": CycleGan, "gan_circle": GanCircle}


def build_recipe(config: TrainConfig, epoch_steps: int = 1) -> Recipe:
    """The recipe that `config` names.

    Args:
        epoch_steps: steps that bring every training slice once.

    Raises:
        PackageError: the generator cannot be built with these options.
        ConfigError: the settings do not fit the recipe.
    """
    settings, optimisation = config.adversarial, config.optimisation
    if isinstance(config.data, Data):
        unit = window_of(config).unit_per_network
        return Supervised(_generator(config), optimisation, unit)
    if config.recipe == "supervised":
        unit = fixed(config.data.target.intensity).unit_per_network
        return Supervised(_generator(config), optimisation, unit, residual=config.residual)
    run = Run(
        config.seed,
        config.residual,
        epoch_steps,
        optimisation.precision,
        optimisation.gradient_clip,
    )
    if config.recipe in TWO_WAYS:
        return TWO_WAYS[config.recipe](_generator(config), _generator(config), settings, run)
    if config.recipe == "aps":
        return Aps(_generator(config), settings, run)
    return Pix2Pix(_generator(config), settings, run, config.data.slices)


def _generator(config: TrainConfig) -> Generator:
    return build_generator(config.generator.architecture, config.generator.options)
