"""A residual denoiser that gives only a share of what it was trained to take away."""

from dataclasses import replace

from dicomnode.imaging.manifest import GeneratorSpec
from dicomnode.imaging.networks import Generator, build_generator


def spec_at(spec: GeneratorSpec, strength: float) -> GeneratorSpec:
    """What a manifest says of the generator at that strength; at 1 nothing more than `spec`."""
    options = {name: value for name, value in spec.options.items() if name != "strength"}
    if strength != 1.0:
        options["strength"] = strength
    return replace(spec, options=options)


def at_strength(spec: GeneratorSpec, generator: Generator, strength: float) -> Generator:
    """A generator with the weights of another, at that strength.

    Raises:
        PackageError: a generator of that kind has no strength.
    """
    wanted = spec_at(spec, strength)
    made = build_generator(wanted.architecture, wanted.options)
    made.load_state_dict(generator.state_dict())
    return made
