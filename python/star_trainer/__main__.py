"""``python -m star_trainer`` and ``accelerate launch -m star_trainer``: the same as ``star-train``."""

from star_trainer.cli import main

raise SystemExit(main())
