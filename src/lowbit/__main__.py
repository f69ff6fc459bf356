"""``python -m lowbit``: the command line."""

from lowbit.cli.main import main

raise SystemExit(main())
