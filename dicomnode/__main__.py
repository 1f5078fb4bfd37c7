"""``python -m dicomnode`` is the command ``dicomnode``."""

from dicomnode.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
