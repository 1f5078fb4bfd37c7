"""What the cards of the bundled demonstration models claim, measured: see training/prove.py."""
