"""Training of model packages. Imports dicomnode.imaging and dicomnode.errors; never the node."""
