"""A package's metadata in the words of a MONAI bundle (metadata.json), for users of MONAI."""

from typing import Any

from dicomnode.imaging.manifest import InputSpec, Manifest, OutputSpec
from dicomnode.imaging.package import ModelPackage

SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
FORMATS = {"HU": "hounsfield", "AU": "magnitude", "SUV": "raw", "BQML": "raw"}
"""Our units -> MONAI's `format`; where it has no word for a unit: raw."""


def monai_metadata(package: ModelPackage) -> dict[str, Any]:
    """metadata.json of `package` as plain values.

    It describes and does not run: MONAI's configurations are code, and this package has none.
    """
    manifest = package.manifest
    torch_version = str(manifest.training.get("torch", "unknown"))
    return {
        "schema": SCHEMA,
        "version": package.version,
        "changelog": {package.version: "as written by dicomnode"},
        "monai_version": "1.4.0",
        "pytorch_version": torch_version,
        "numpy_version": "2.0.0",
        "required_packages_version": {},
        "name": package.name,
        "task": manifest.task,
        "description": f"{manifest.generator.architecture}: {manifest.input.modality} in "
        f"{manifest.input.unit} to {manifest.output.modality} in {manifest.output.unit}",
        "authors": "see MODEL_CARD.md",
        "copyright": manifest.licence,
        "intended_use": manifest.intended_use,
        "data_source": "see MODEL_CARD.md",
        "network_data_format": {
            "inputs": {"image": _image(manifest, manifest.input, manifest.input.slices)},
            "outputs": {"pred": _image(manifest, manifest.output, 1)},
        },
        "dicomnode": {
            "package_sha256": package.digest,
            "generator": {
                "architecture": manifest.generator.architecture,
                "options": dict(manifest.generator.options),
            },
            "residual": manifest.output.residual,
            "normalisation": manifest.normalisation,
        },
    }


def _image(manifest: Manifest, side: InputSpec | OutputSpec, channels: int) -> dict[str, Any]:
    """One side of the network; its values are what the intensity leaves, not the unit itself."""
    multiple = manifest.input.padding.multiple
    size = manifest.input.trained_matrix() or (f"{multiple}*n" if multiple > 1 else "*")
    scaled = side.intensity.kind != "none"
    return {
        "type": "image",
        "format": FORMATS[side.unit],
        "modality": side.modality,
        "num_channels": channels,
        "spatial_shape": [size, size],
        "dtype": "float32",
        "value_range": [-1, 1] if scaled else [],
        "is_patch_data": False,
        "channel_def": {str(channel): "image" for channel in range(channels)},
    }
