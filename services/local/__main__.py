"""`python -m services.local`: the same as `openrl`."""

from services.local.cli import main

main()
